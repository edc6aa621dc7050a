"""Tests on a CUDA device, all marked ``gpu``. Several ranks share the first one; Ray is not needed.

The ranks of ``gpu_pool`` are processes with NCCL's environment for that. A test that takes ``libraries`` runs once for
each selected one of torch, CuPy and JAX, and for their mix; ``library`` for those of them that have current streams,
torch and CuPy; ``size`` for 1, 2 and 4 ranks; ``pair`` has two ranks. Where there is no device the tests are skipped
with what CUDA says; anything else that is missing fails.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pool import RankPool

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "conformance"))  # oracle, samples, worlds

_SESSION = str(Path(__file__).resolve().parent.parent / "conftest.py")
_SHARED_SINCE = 23000
_NO_DEVICE = frozenset({35, 100})
"""cudaErrorInsufficientDriver, which is also what is said where there is no driver, and cudaErrorNoDevice."""
ENVIRONMENT = {
    "NCCL_MULTI_RANK_GPU_ENABLE": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_MAX_CTAS": "1",
    "JAX_PLATFORMS": "cuda,cpu",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "CUDA_MODULE_LOADING": "EAGER",
}
"""Several ranks on one device; JAX leaves memory to the others; no kernel is loaded while another rank's waits."""


def _libraries(config: pytest.Config) -> tuple[str, ...]:
    session: Any = config.pluginmanager.get_plugin(_SESSION)
    selected = config.stash[session.FRAMEWORKS_KEY]
    return tuple(name for name in ("torch", "cupy", "jax") if name in selected)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test over the selected libraries and the world sizes."""
    names = _libraries(metafunc.config)
    if "libraries" in metafunc.fixturenames:
        cases = [(name,) for name in names] + ([names] if len(names) > 1 else [])
        metafunc.parametrize("libraries", cases, ids=["mixed" if len(case) > 1 else case[0] for case in cases])
    if "library" in metafunc.fixturenames:
        metafunc.parametrize("library", [name for name in names if name != "jax"])
    if "size" in metafunc.fixturenames:
        metafunc.parametrize("size", (1, 2, 4))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test here; all of them need CuPy, which the backend is built on."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("gpu")
            item.add_marker(pytest.mark.timeout(600))


def no_device() -> str | None:
    """Return None if CUDA sees a device, else what it says. Whatever else is wrong is raised."""
    runtime = importlib.import_module("cupy.cuda.runtime")
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        if error.status not in _NO_DEVICE:
            raise
        return str(error)
    return None if count else "CUDA sees no device"


def too_many(size: int) -> str | None:
    """Return None if so many ranks can share a device, else why not."""
    version = importlib.import_module("cupy.cuda.nccl").get_version()
    if size == 1 or version >= _SHARED_SINCE:
        return None
    return f"several ranks on one GPU need libnccl 2.30 or later, this is {version}"


@pytest.fixture(scope="session")
def _device() -> None:
    reason = no_device()
    if reason is not None:
        pytest.skip(f"no CUDA device: {reason}")


@pytest.fixture(autouse=True)
def _enough(_device: None, request: pytest.FixtureRequest) -> None:
    """Skip where there is no device, or where the ranks of this test cannot share it."""
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    reason = too_many(parameters.get("size", 1))
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def pair(_device: None, gpu_pool: RankPool) -> RankPool:
    """The pool, for a test of two ranks."""
    reason = too_many(2)
    if reason is not None:
        pytest.skip(reason)
    return gpu_pool


@pytest.fixture(scope="session")
def gpu_pool(nothing_left: None, _device: None, pytestconfig: pytest.Config) -> Iterator[RankPool]:
    """The session's pool of ranks that share the first device."""
    session: Any = pytestconfig.pluginmanager.get_plugin(_SESSION)
    folder = pytestconfig.stash[session.FOLDER_KEY] / "gpu_pool"
    folder.mkdir()
    ranks = RankPool(folder, ENVIRONMENT)
    yield ranks
    ranks.close()
    left = sorted(str(path.relative_to(folder)) for path in (folder / "rendezvous").iterdir())
    assert not left, f"rendezvous files were left: {left}"
