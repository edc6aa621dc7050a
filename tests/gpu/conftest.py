"""Tests on a CUDA device, all marked ``gpu``. Several ranks share the first one; Ray is not needed.

The ranks of ``gpu_pool`` are processes with NCCL's environment for that. A test that takes ``libraries`` runs once for
each selected one of torch, CuPy and JAX, and for their mix, on 4 ranks for the mix alone; ``library`` for those of them
that have current streams, torch and CuPy; ``size`` for 1, 2 and 4 ranks, named ``1_rank``, ``2_ranks`` and ``4_ranks``;
``pair`` has two ranks. What is quick and says most comes first. Where there is no device the tests are skipped with
what CUDA says; anything else that is missing fails.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pool import RankPool, RanksFailedError

# oracle, samples, worlds
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "conformance"))

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
    "NCCL_DEBUG": os.environ.get("NCCL_DEBUG", "WARN"),
}
"""Several ranks on one device; JAX leaves memory to the others; no kernel is loaded while another rank's waits."""
_SIZES = {"1_rank": 1, "2_ranks": 2, "4_ranks": 4}
_RUN_S = 180.0
_LIMIT_S = float(os.environ.get("COLLTENSOR_TEST_GPU_LIMIT_S", "inf"))
"""What no run may exceed where there is little time, so that one that hangs leaves some to the others."""
_WARM_UP_S = 250.0
_LOG_TAIL = 3000


def _libraries(config: pytest.Config) -> tuple[str, ...]:
    session: Any = config.pluginmanager.get_plugin(_SESSION)
    selected = config.stash[session.FRAMEWORKS_KEY]
    return tuple(name for name in ("torch", "cupy", "jax") if name in selected)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test over the selected libraries and the world sizes."""
    names = _libraries(metafunc.config)
    cases = {name: (name,) for name in names} | ({"mixed": names} if len(names) > 1 else {})
    if "libraries" in metafunc.fixturenames and "size" in metafunc.fixturenames:
        pairs = [
            pytest.param(size, case, id=f"{words}-{name}")
            for words, size in _SIZES.items()
            for name, case in cases.items()
            if size < 4 or case == names
        ]
        metafunc.parametrize(("size", "libraries"), pairs)
    elif "size" in metafunc.fixturenames:
        metafunc.parametrize("size", _SIZES.values(), ids=_SIZES)
    if "library" in metafunc.fixturenames:
        metafunc.parametrize("library", [name for name in names if name != "jax"])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test here, and begin with what is quick; all of them need CuPy, which the backend is built on."""
    places = [
        place for place, item in enumerate(items) if Path(__file__).parent in item.path.parents
    ]
    ours = sorted((items[place] for place in places), key=_length)
    for place, item in zip(places, ours, strict=True):
        items[place] = item
        item.add_marker("gpu")
        item.add_marker(pytest.mark.timeout(600))


def _length(item: pytest.Item) -> tuple[bool, int, bool]:
    """Return what puts short tests before long ones: processes that share a device take turns on it."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    size = parameters.get("size", 2)
    if not isinstance(size, int):  # a test over nothing, which is deselected
        size = 0
    return "threads" in item.name, size, "conformance" in item.path.name


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


class GpuPool(RankPool):
    """Ranks that share the first device. A run may take longer, and shows the ranks' output where it failed."""

    @classmethod
    def below(cls, parent: Path) -> GpuPool:
        """Make a pool whose folder the session's last check knows."""
        folder = parent / "pool-gpu"
        folder.mkdir()
        return cls(folder, ENVIRONMENT)

    def run(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        timeout_s: float = _RUN_S,
        **options: Any,
    ) -> list[Any]:
        """Run a function in the ranks; see ``RankPool.run``."""
        try:
            return super().run(
                world_size, function, *args, timeout_s=min(timeout_s, _LIMIT_S), **options
            )
        except RanksFailedError:
            for log in sorted(self.folder.glob("rank*.log")):
                print(f"--- {log.name}: ...{log.read_text(errors='replace')[-_LOG_TAIL:]}")
            raise


@pytest.fixture(scope="session")
def gpu_pool(nothing_left: None, _device: None, pytestconfig: pytest.Config) -> Iterator[RankPool]:
    """The session's pool of ranks that share the first device, with everything loaded that takes long to load."""
    session: Any = pytestconfig.pluginmanager.get_plugin(_SESSION)
    ranks = GpuPool.below(pytestconfig.stash[session.FOLDER_KEY])
    warm_up = importlib.import_module("gpu_streams").warm_up
    # first alone, which leaves compiled kernels on the disk
    for size in (1, 1 if too_many(4) else 4):
        ranks.run(size, warm_up, _libraries(pytestconfig), timeout_s=_WARM_UP_S)
    yield ranks
    ranks.close()
    left = sorted(
        str(path.relative_to(ranks.folder)) for path in (ranks.folder / "rendezvous").iterdir()
    )
    assert not left, f"rendezvous files were left: {left}"
