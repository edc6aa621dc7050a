"""The process of one rank, which does what the coordinator asks for until that hangs up.

    python -m harness.rank SETTINGS RANK              a rank that the coordinator started
    mpiexec -n N python -m harness.rank SETTINGS      a rank of an MPI

Between its turns a rank sleeps in a read from its socket: in no library does it spin or poll.
"""

from __future__ import annotations

import importlib
import itertools
import json
import mmap
import os
import platform
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

Loop = Callable[[int], object]
"""Makes so many calls."""

PAGE = 4096
NUMPY_PLACE = 16
"""Where in a page numpy's arrays of 128 KiB and more begin.

So it is as long as glibc maps memory for each of them.
"""


@dataclass(frozen=True)
class Settings:
    """What every rank of a world is told.

    Attributes:
        world: The world's name.
        library: What its ranks are, as ``module:class``; the class is made of the settings and a
            rank.
        ranks: The number of ranks.
        folder: A folder for the ranks to meet in.
        address: The path of the coordinator's socket.
        pin: Whether rank r runs on core r modulo the number of cores only.
        options: What the class wants to know besides.
    """

    world: str
    library: str
    ranks: int
    folder: str
    address: str
    pin: bool
    options: dict[str, Any]

    def dump(self) -> str:
        """Return the settings as one word of a command line."""
        return json.dumps(asdict(self))


def array_at(place: int, count: int, *, small_pages: bool = False) -> np.ndarray:
    """Return memory for so many float32 numbers that begins ``place`` bytes into a page.

    With ``small_pages`` the kernel must take pages of 4 KiB, and not the huge ones that numpy asks
    for.
    """
    nbytes = 4 * count + 2 * PAGE
    if small_pages:
        memory = mmap.mmap(-1, nbytes)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        raw = np.frombuffer(memory, np.uint8)
    else:
        raw = np.empty(nbytes, np.uint8)
    start = (place - raw.ctypes.data) % PAGE
    return raw[start : start + 4 * count].view(np.float32)


class Timed:
    """A rank whose calls are timed. A subclass says in ``loop`` what the operations are.

    Attributes:
        versions: Names and versions to print.
        place: Where in a page the arrays of the operation at hand begin, on this rank.
        check: What contestants of one operation must have in common once it is prepared.
    """

    def __init__(self, settings: Settings, rank: int) -> None:
        self.settings, self.rank, self.ranks = settings, rank, settings.ranks
        self.versions: dict[str, str] = {}
        self.place, self.check = NUMPY_PLACE, None
        self._loops: dict[str, Loop] = {}

    def barrier(self) -> object:
        """Return when all ranks have called."""

    def loop(self, operation: str, *case: Any) -> Loop:
        """Return the loop of an operation on new arrays; called by all ranks at the same time."""
        raise NotImplementedError

    def array(self, count: int) -> np.ndarray:
        """Return zeros, of float32, that begin where the operation wants them."""
        array = array_at(self.place, count)
        array[:] = 0
        return array

    def join(self, backend: str = "shm", name: str = "default", **options: Any) -> Any:
        """Return a group of all ranks, and have its version printed."""
        import colltensor as col

        method = f"file://{self.settings.folder}/{self.settings.world}-{name}"
        group = col.init_collective_group(
            self.ranks, self.rank, backend, name, init_method=method, **options
        )
        self.versions["colltensor"] = f"{col.__version__} (backend {group.backend})"
        return group

    def prepare(self, operation: str, *case: Any) -> Any:
        """Make an operation's loop, and return ``check``.

        Where its arrays begin follows an ``@``: ``broadcast@16`` puts each 16 bytes into a page,
        ``broadcast@0,16`` rank 0's at the beginning of a page and those of the others 16 bytes into
        one.
        """
        name, _, places = operation.partition("@")
        of_ranks = [int(place) for place in (places or str(NUMPY_PLACE)).split(",")]
        self.place = of_ranks[min(self.rank, len(of_ranks) - 1)]
        self._loops[operation] = self.loop(name, *case)
        return self.check

    def run(self, operation: str, warm_up: int, calls: int) -> float:
        """Make calls after those to warm up and a barrier, and return the seconds they took."""
        loop = self._loops[operation]
        self.barrier()
        loop(warm_up)
        self.barrier()
        began = time.perf_counter()
        loop(calls)
        return time.perf_counter() - began

    def forget(self) -> None:
        """Free all arrays."""
        self._loops.clear()


class InGroup(Timed):
    """A rank with one group of colltensor's, ``self.group``; the options are those of ``join``."""

    def __init__(self, settings: Settings, rank: int) -> None:
        super().__init__(settings, rank)
        self.group = self.join(**settings.options)
        self.barrier = self.group.barrier  # type: ignore[method-assign]


def repeat(*calls: Callable[[], object]) -> Loop:
    """Return the loop of these calls, in turn."""

    def loop(count: int) -> None:
        for call in itertools.islice(itertools.cycle(calls), count):
            call()

    return loop


def on_one_thread(settings: Settings, rank: int, backend: str = "gloo") -> Any:
    """Make torch's process group of all ranks, with one thread each; return its module."""
    import torch

    torch.set_num_threads(1)
    store = f"file://{settings.folder}/{settings.world}-torch"
    torch.distributed.init_process_group(backend, store, rank=rank, world_size=settings.ranks)
    return torch.distributed


def serve(settings: Settings, rank: int) -> None:
    """Set the rank up, say hello, and answer until the coordinator hangs up."""
    if settings.pin:
        cores = sorted(os.sched_getaffinity(0))
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), {cores[rank % len(cores)]})
    module, _, name = settings.library.partition(":")
    answers = getattr(importlib.import_module(module), name)(settings, rank)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end:
        end.connect(settings.address)
        link = Connection(end.detach())
    own = {"Python": platform.python_version(), "numpy": np.__version__}
    try:
        link.send((settings.world, answers.rank, os.getpid(), own | answers.versions))
        while True:
            name, arguments = link.recv()
            try:
                link.send((True, getattr(answers, name)(*arguments)))
            except Exception:  # noqa: BLE001 - the coordinator reports it and ends
                link.send((False, traceback.format_exc()))
    except (EOFError, ConnectionError):
        pass  # the coordinator hung up


def _mpi_rank() -> int:
    """Return the rank that mpiexec gave: the affinity needs it before MPI is imported."""
    names = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
    return int(next(os.environ[name] for name in names if name in os.environ))


if __name__ == "__main__":
    serve(
        Settings(**json.loads(sys.argv[1])), int(sys.argv[2]) if len(sys.argv) > 2 else _mpi_rank()
    )
