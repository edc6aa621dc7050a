"""The process of one rank: sets its library up, then does what the coordinator asks for until that hangs up.

    python -m worlds.rank SETTINGS RANK       a rank of colltensor or torch, started by the coordinator
    mpiexec -n N python -m worlds.rank SETTINGS        a rank of an MPI

Between its turns a rank sleeps in a read from its socket: in no library does it spin or poll.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
import zlib
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

from worlds.libraries import Colltensor, JaxLoop, Library, Loop, Mpi, RayCollective, TorchGloo, make_arrays, versions


@dataclass(frozen=True)
class Settings:
    """What every rank of a world is told.

    Attributes:
        world: The world's name.
        library: The library's name.
        ranks: The number of ranks.
        folder: A folder for the ranks to meet in.
        address: The path of the coordinator's socket.
        pin: Whether rank r runs on core r modulo the number of cores only.
        backend: colltensor's backend.
    """

    world: str
    library: str
    ranks: int
    folder: str
    address: str
    pin: bool
    backend: str

    def dump(self) -> str:
        """Return the settings as one word of a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Settings:
        """Return what ``dump`` wrote."""
        return cls(**json.loads(text))


class Rank:
    """Answers the coordinator's messages, each with one reply.

    Args:
        library: This rank's share of the library.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._loops: dict[str, Loop] = {}

    def prepare(self, operation: str, nbytes: int) -> list[int]:
        """Make an operation's arrays and loop, and return check sums of what it computes.

        The arrays hold numbers for that; then they are set to zero, whose sums stay finite however often they are
        taken.
        """
        library = self._library
        arrays = make_arrays(operation, nbytes, library.rank, library.ranks)
        loop = library.loop(operation, arrays)
        loop(library.ranks)
        results = loop.results() if isinstance(loop, JaxLoop) else arrays.values()
        sums = [zlib.crc32(array) for array in results]
        for array in arrays.values():
            array.fill(0)
        self._loops[operation] = library.loop(operation, arrays)
        return sums

    def run(self, operation: str, warm_up: int, calls: int) -> float:
        """Make ``calls`` calls after ``warm_up`` and a barrier, and return the seconds that they took."""
        loop, barrier = self._loops[operation], self._library.barrier
        barrier()
        loop(warm_up)
        barrier()
        began = time.perf_counter()
        loop(calls)
        return time.perf_counter() - began

    def forget(self) -> None:
        """Free all arrays."""
        self._loops.clear()


def serve(settings: Settings, rank: int) -> None:
    """Set the library up, say hello, and answer until the coordinator hangs up."""
    if settings.pin:
        cores = sorted(os.sched_getaffinity(0))
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), {cores[rank % len(cores)]})
    library = _open(settings, rank)
    link = connect(settings.address)
    answers = Rank(library)
    try:
        link.send((settings.world, library.rank, os.getpid(), {**versions(), **library.versions}))
        while True:
            name, arguments = link.recv()
            try:
                link.send((True, getattr(answers, name)(*arguments)))
            except Exception:  # noqa: BLE001 - the coordinator reports it and ends
                link.send((False, traceback.format_exc()))
    except (EOFError, ConnectionError):
        pass  # the coordinator hung up


def connect(address: str) -> Connection:
    """Return a connection to the coordinator."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end:
        end.connect(address)
        return Connection(end.detach())


def _open(settings: Settings, rank: int) -> Library:
    if settings.library in ("Open MPI", "MPICH"):
        return Mpi(settings.library)
    if settings.library == "torch":
        return TorchGloo(rank, settings.ranks, settings.folder)
    if settings.library == "ray":
        return RayCollective(rank, settings.ranks)
    return Colltensor(rank, settings.ranks, f"{settings.folder}/{settings.world}", settings.backend)


def _mpi_rank() -> int:
    """Return the rank that mpiexec gave, which is needed for the affinity before MPI is imported."""
    return int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK") or os.environ["PMIX_RANK"])


if __name__ == "__main__":
    serve(Settings.load(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else _mpi_rank())
