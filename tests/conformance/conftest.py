"""What the conformance suite runs over: the array libraries and the worlds (ranks, backend, provider).

A test that takes ``arrays`` runs once for each selected framework, for the generic DLPack adapter where
array-api-strict is installed, and for the mix of them; one that takes ``world`` once for loopback, in shared memory
for 2 to 4 ranks and, with every selected Gloo provider, for 1 to 4 (or as ``--shm-sizes`` and ``--gloo-sizes`` say);
``ranks`` leaves out worlds of one rank; ``transport`` is each backend between ranks once, for tests that say their
world sizes themselves.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from worlds import Transport, World

_SESSION = str(Path(__file__).resolve().parent.parent / "conftest.py")
_HOST_FRAMEWORKS = ("numpy", "torch", "jax")


def _session_of(config: pytest.Config) -> Any:
    return config.pluginmanager.get_plugin(_SESSION)


def _selected(config: pytest.Config) -> tuple[str, ...]:
    """Return the array libraries under test on the host."""
    names = [
        name
        for name in config.stash[_session_of(config).FRAMEWORKS_KEY]
        if name in _HOST_FRAMEWORKS
    ]
    if importlib.util.find_spec("array_api_strict"):
        names.append("dlpack")
    return tuple(names or ["numpy"])


def _transports(config: pytest.Config) -> list[Transport]:
    """Return the backends between ranks that are under test."""
    session = _session_of(config)
    transports = [Transport("gloo", provider) for provider in config.stash[session.PROVIDERS_KEY]]
    return transports if config.stash[session.NO_SHM_KEY] else [Transport("shm", None), *transports]


def _worlds(config: pytest.Config) -> list[World]:
    sizes = config.stash[_session_of(config).SIZES_KEY]
    return [
        World(size, *transport)
        for transport in _transports(config)
        for size in sizes[transport.backend]
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test over the selected array libraries and worlds."""
    config = metafunc.config
    names, worlds = _selected(config), _worlds(config)
    if "arrays" in metafunc.fixturenames:
        cases = [(name,) for name in names] + ([names] if len(names) > 1 else [])
        metafunc.parametrize(
            "arrays", cases, ids=["mixed" if len(case) > 1 else case[0] for case in cases]
        )
    if "world" in metafunc.fixturenames:
        metafunc.parametrize("world", [World(1, "loopback", None), *worlds], ids=str)
    if "ranks" in metafunc.fixturenames:
        metafunc.parametrize("ranks", [world for world in worlds if world.size > 1], ids=str)
    if "transport" in metafunc.fixturenames:
        metafunc.parametrize("transport", _transports(config), ids=str)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what runs over Gloo or in shared memory, by its world."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    for value in parameters.values():
        if isinstance(value, (World, Transport)) and value.backend != "loopback":
            item.add_marker(value.backend)
    if "provider" in getattr(item, "fixturenames", ()):
        item.add_marker("gloo")


@pytest.fixture(scope="session")
def libraries(pytestconfig: pytest.Config) -> tuple[str, ...]:
    """The array libraries under test on the host."""
    return _selected(pytestconfig)


@pytest.fixture(scope="session")
def worlds(pytestconfig: pytest.Config) -> list[World]:
    """All worlds under test but loopback."""
    return _worlds(pytestconfig)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out simulated hosts where the ranks are in network namespaces: those of one host could not reach it."""
    if (
        "between_hosts" in item.nodeid
        and len(item.config.stash[_session_of(item.config).PREFIXES_KEY]) > 1
    ):
        pytest.skip("the ranks of a simulated host would be in two network namespaces")
