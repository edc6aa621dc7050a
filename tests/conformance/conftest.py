"""What the conformance suite runs over: the array libraries and the worlds (ranks, backend, provider).

A test that takes ``arrays`` runs once for each selected framework, for the generic DLPack adapter where
array-api-strict is installed, and for the mix of them; one that takes ``world`` once for loopback and, with
every selected Gloo provider, for 1 to 4 ranks; ``ranks`` leaves out worlds of one rank.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from worlds import World

_SESSION = str(Path(__file__).resolve().parent.parent / "conftest.py")
_HOST_FRAMEWORKS = ("numpy", "torch", "jax")


def _selected(config: pytest.Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the array libraries under test on the host, and the Gloo providers."""
    session: Any = config.pluginmanager.get_plugin(_SESSION)
    names = [name for name in config.stash[session.FRAMEWORKS_KEY] if name in _HOST_FRAMEWORKS]
    if importlib.util.find_spec("array_api_strict"):
        names.append("dlpack")
    return tuple(names or ["numpy"]), config.stash[session.PROVIDERS_KEY]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test over the selected array libraries and worlds."""
    names, providers = _selected(metafunc.config)
    if "arrays" in metafunc.fixturenames:
        cases = [(name,) for name in names] + ([names] if len(names) > 1 else [])
        metafunc.parametrize("arrays", cases, ids=["mixed" if len(case) > 1 else case[0] for case in cases])
    worlds = [World(size, "gloo", provider) for provider in providers for size in (1, 2, 3, 4)]
    if "world" in metafunc.fixturenames:
        worlds.insert(0, World(1, "loopback", None))
        metafunc.parametrize("world", worlds, ids=str)
    if "ranks" in metafunc.fixturenames:
        metafunc.parametrize("ranks", [world for world in worlds if world.size > 1], ids=str)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what runs over Gloo, so that it is deselected where there is no provider."""
    if {"ranks", "provider"} & set(getattr(item, "fixturenames", ())):
        item.add_marker("gloo")


@pytest.fixture(scope="session")
def libraries(pytestconfig: pytest.Config) -> tuple[str, ...]:
    """The array libraries under test on the host."""
    return _selected(pytestconfig)[0]
