"""What an operation calls in each library, on the same numpy memory; used inside the ranks.

A library makes *loops*: functions that take a number of calls and make them. Each rank of a world makes the same
loop at the same time. The operations, with S the size in the tables, in bytes:

- ``allreduce``: S in place on every rank, SUM. ``allreduce:function``, ``:torch`` and ``:jax`` are other ways to it;
  ``:pages`` is the same on memory in pages of 4 KiB, as JAX's is and numpy's large arrays are not.
- ``reduce``: S, SUM, in place at the root; the other ranks' memory is only read.
- ``broadcast``: S, in place.
- ``allgather``: S from each rank, into memory of its own of S times ranks.
- ``reducescatter``: S times ranks on each rank, only read, SUM, into S.
- ``gather``, ``scatter``: S for each rank; the root has S times ranks.
  S times ranks are one array in every library; ``allgather:list`` and so on give colltensor a list of its rows.
- ``alltoall``: S for each pair of ranks, from S times ranks into as much.
- ``send/recv``: S one way, in turns: call i goes from rank i to rank i + 1, so that 2 ranks play ping-pong and a
  call is half a round trip.
- ``sendrecv``: S to the next rank and S from the one before, in separate memory.
- ``barrier``.
- ``copyto``, ``memmove``: S copied within each process, by numpy and by libc, with no communication.

The root of a rooted operation is rank i of call i, as in the Intel MPI Benchmarks: with a fixed root a library's
ranks may run ahead of each other, and a loop would measure its queue and not the operation.

Where an operation's arrays begin follows an ``@``: ``broadcast@16`` puts each 16 bytes into a page, ``broadcast@0,16``
rank 0's at the beginning of a page and those of the others 16 bytes into one. Without, it is ``NUMPY_PLACE``.

Frameworks are imported by the library that needs them: an MPI's environment has numpy and mpi4py alone.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import platform
from collections.abc import Callable
from importlib import metadata
from typing import Any, Protocol

import numpy as np

from worlds.places import NUMPY_PLACE, array_at

Loop = Callable[[int], None]
Arrays = dict[str, np.ndarray]

ARRAYS: dict[str, tuple[str, ...]] = {
    "allreduce": ("block",),
    "reduce": ("block",),
    "broadcast": ("block",),
    "allgather": ("block", "blocks"),
    "reducescatter": ("block", "blocks"),
    "gather": ("block", "blocks"),
    "scatter": ("block", "blocks"),
    "alltoall": ("blocks", "other_blocks"),
    "send/recv": ("block",),
    "sendrecv": ("block", "other_block"),
    "barrier": (),
    "copyto": ("block", "other_block"),
    "memmove": ("block", "other_block"),
}
"""The memory of each operation: a block is S bytes, blocks are S times ranks."""

ROOTED = ("reduce", "broadcast", "gather", "scatter", "send/recv")
"""Operations whose root changes from call to call."""


class Library(Protocol):
    """One rank's share of a library's world.

    Attributes:
        rank: This process's rank.
        ranks: The number of ranks.
        versions: Names and versions to print.
    """

    rank: int
    ranks: int
    versions: dict[str, str]

    def loop(self, operation: str, arrays: Arrays) -> Loop:
        """Return the loop of an operation on these arrays."""

    def barrier(self) -> None:
        """Return when all ranks have called."""


class Colltensor:
    """colltensor through its public functions."""

    def __init__(self, rank: int, ranks: int, meeting: str, backend: str) -> None:
        import colltensor as col

        self.rank, self.ranks, self._col = rank, ranks, col
        self._group = col.init_collective_group(ranks, rank, backend, init_method=f"file://{meeting}")
        self.versions = {
            "colltensor": f"{col.__version__} (backend {self._group.backend})",
            "apache-tvm-ffi": metadata.version("apache-tvm-ffi"),
        }
        self.barrier = self._group.barrier

    def loop(self, operation: str, arrays: Arrays) -> Loop:
        """Return the loop of any operation."""
        operation = operation.partition("@")[0]
        variant = operation.partition(":")[2]
        if operation in ("copyto", "memmove"):
            return _copy_loop(operation, arrays["other_block"], arrays["block"])
        if operation == "allreduce:function":
            return self._function_loop(arrays["block"])
        if operation == "allreduce:jax":
            return JaxLoop(self._group, arrays["block"])
        if operation.startswith("allreduce"):
            return self._allreduce_loop(_torch_tensor(arrays["block"]) if variant == "torch" else arrays["block"])
        if variant == "list":
            arrays = {name: list(array) if name.endswith("blocks") else array for name, array in arrays.items()}
        return _in_turn(self._calls(operation.partition(":")[0], arrays))

    def _allreduce_loop(self, tensor: Any) -> Loop:
        group = self._group

        def loop(calls: int) -> None:
            for _ in range(calls):
                group.allreduce(tensor)

        return loop

    def _function_loop(self, array: np.ndarray) -> Loop:
        col = self._col

        def loop(calls: int) -> None:
            for _ in range(calls):
                col.allreduce(array)

        return loop

    def _calls(self, operation: str, arrays: dict[str, Any]) -> list[Callable[[], object]]:
        group, rank, ranks = self._group, self.rank, self.ranks
        block, other = arrays.get("block"), arrays.get("other_block")
        blocks, other_blocks = arrays.get("blocks"), arrays.get("other_blocks")
        right, left = (rank + 1) % ranks, (rank - 1) % ranks
        roots = range(ranks)
        if operation == "reduce":
            return [lambda root=root: group.reduce(block, root) for root in roots]
        if operation == "broadcast":
            return [lambda root=root: group.broadcast(block, root) for root in roots]
        if operation == "gather":
            return [lambda root=root: group.gather(blocks if root == rank else None, block, root) for root in roots]
        if operation == "scatter":
            return [lambda root=root: group.scatter(block, blocks if root == rank else None, root) for root in roots]
        if operation == "send/recv":
            return _one_way(rank, ranks, lambda: group.send(block, right), lambda: group.recv(block, left))
        calls: dict[str, Callable[[], object]] = {
            "allgather": lambda: group.allgather(blocks, block),
            "reducescatter": lambda: group.reducescatter(block, blocks),
            "alltoall": lambda: group.alltoall(other_blocks, blocks),
            "sendrecv": lambda: group.sendrecv(block, right, other, left),
            "barrier": lambda: group.barrier(),
        }
        return [calls[operation]]


class JaxLoop:
    """A loop of donating calls, whose results are the next calls' arguments.

    Args:
        group: The group.
        array: What the first call's JAX array holds.
    """

    def __init__(self, group: Any, array: np.ndarray) -> None:
        import jax

        self._group = group
        self._held = jax.block_until_ready(jax.numpy.asarray(array) + 0)

    def __call__(self, calls: int) -> None:
        """Make so many calls."""
        group, held = self._group, self._held
        self._held = None  # the only reference must be the one that is donated
        for _ in range(calls):
            held = group.allreduce(held, donate=True)
        self._held = held

    def results(self) -> list[np.ndarray]:
        """Return what the last call gave."""
        return [np.array(self._held)]


class Mpi:
    """An MPI through mpi4py's buffer calls."""

    def __init__(self, name: str) -> None:
        from mpi4py import MPI

        vendor, version = MPI.get_vendor()
        if vendor != name:
            raise RuntimeError(f"expected the environment of {name}, and its mpi4py runs on {vendor} {version}")
        self._mpi, self._comm = MPI, MPI.COMM_WORLD
        self.rank, self.ranks = self._comm.rank, self._comm.size
        self.versions = {name: ".".join(map(str, version)), f"mpi4py of {name}": metadata.version("mpi4py")}
        if importlib.util.find_spec("torch") is not None:
            self.versions[f"torch of {name}"] = metadata.version("torch")
        self.barrier = self._comm.Barrier

    def loop(self, operation: str, arrays: Arrays) -> Loop:
        """Return the loop of an operation."""
        operation = operation.partition("@")[0]
        kind, _, variant = operation.partition(":")
        if kind != "allreduce":
            return _in_turn(self._calls(operation, arrays))
        comm, in_place = self._comm, self._mpi.IN_PLACE
        array: Any = _torch_tensor(arrays["block"]) if variant == "torch" else arrays["block"]

        def loop(calls: int) -> None:
            for _ in range(calls):
                comm.Allreduce(in_place, array)

        return loop

    def _calls(self, operation: str, arrays: Arrays) -> list[Callable[[], object]]:
        comm, rank, ranks, in_place = self._comm, self.rank, self.ranks, self._mpi.IN_PLACE
        block, other = arrays.get("block"), arrays.get("other_block")
        blocks, other_blocks = arrays.get("blocks"), arrays.get("other_blocks")
        right, left = (rank + 1) % ranks, (rank - 1) % ranks
        roots = range(ranks)
        if operation == "reduce":
            return [
                (lambda root=root: comm.Reduce(in_place, block, root=root)) if root == rank
                else (lambda root=root: comm.Reduce(block, None, root=root))
                for root in roots
            ]
        if operation == "broadcast":
            return [lambda root=root: comm.Bcast(block, root) for root in roots]
        if operation == "gather":
            return [lambda root=root: comm.Gather(block, blocks if root == rank else None, root) for root in roots]
        if operation == "scatter":
            return [lambda root=root: comm.Scatter(blocks if root == rank else None, block, root) for root in roots]
        if operation == "send/recv":
            return _one_way(rank, ranks, lambda: comm.Send(block, right), lambda: comm.Recv(block, left))
        calls: dict[str, Callable[[], object]] = {
            "allgather": lambda: comm.Allgather(block, blocks),
            "reducescatter": lambda: comm.Reduce_scatter_block(blocks, block),
            "alltoall": lambda: comm.Alltoall(blocks, other_blocks),
            "sendrecv": lambda: comm.Sendrecv(block, right, 0, other, left),
            "barrier": lambda: comm.Barrier(),
        }
        return [calls[operation]]


class TorchGloo:
    """torch.distributed over Gloo; allreduce only."""

    def __init__(self, rank: int, ranks: int, folder: str) -> None:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        store = dist.FileStore(f"{folder}/torch", ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        self.rank, self.ranks, self._dist = rank, ranks, dist
        self.versions = {"torch": str(torch.__version__)}
        self.barrier = dist.barrier

    def loop(self, operation: str, arrays: Arrays) -> Loop:
        """Return the loop of ``allreduce``."""
        dist, tensor = self._dist, _torch_tensor(arrays["block"])

        def loop(calls: int) -> None:
            for _ in range(calls):
                dist.all_reduce(tensor)

        return loop


class RayCollective:
    """ray.util.collective over Gloo, inside a Ray actor; allreduce only."""

    def __init__(self, rank: int, ranks: int) -> None:
        import ray
        import torch
        from ray.util import collective

        torch.set_num_threads(1)
        collective.init_collective_group(ranks, rank, "gloo")
        self.rank, self.ranks, self._collective = rank, ranks, collective
        self.versions = {"ray": ray.__version__}
        self.barrier = collective.barrier

    def loop(self, operation: str, arrays: Arrays) -> Loop:
        """Return the loop of ``allreduce``."""
        collective, array = self._collective, arrays["block"]

        def loop(calls: int) -> None:
            for _ in range(calls):
                collective.allreduce(array)

        return loop


def kind_of(operation: str) -> str:
    """Return an operation's name without its variant and without where its arrays lie."""
    return operation.partition("@")[0].partition(":")[0]


def make_arrays(operation: str, nbytes: int, rank: int, ranks: int) -> Arrays:
    """Return the operation's arrays, whose small whole numbers differ by rank, array and index."""
    count = nbytes // 4
    arrays = {}
    name_of, _, places = operation.partition("@")
    places_of_ranks = [int(place) for place in places.split(",")] if places else [NUMPY_PLACE]
    place = places_of_ranks[min(rank, len(places_of_ranks) - 1)]
    for number, name in enumerate(ARRAYS[kind_of(operation)]):
        of_all = count * (ranks if name.endswith("blocks") else 1)
        values = array_at(place, of_all, small_pages=name_of.endswith(":pages"))
        values[:] = np.arange(of_all, dtype=np.float32)
        np.remainder(values, 7, out=values)
        values += rank + 1 + 10 * number
        arrays[name] = values.reshape(ranks, count) if name.endswith("blocks") else values
    return arrays


def versions() -> dict[str, str]:
    """Return the versions of what every rank has."""
    return {"Python": platform.python_version(), "numpy": np.__version__}


def _torch_tensor(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array)


def _copy_loop(operation: str, target: np.ndarray, source: np.ndarray) -> Loop:
    memmove = ctypes.CDLL(None).memmove
    memmove.argtypes, memmove.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_void_p
    # These pointers keep their arrays alive.
    to, of = target.ctypes.data_as(ctypes.c_void_p), source.ctypes.data_as(ctypes.c_void_p)
    if operation == "memmove":
        return _in_turn([lambda: memmove(to, of, source.nbytes)])
    return _in_turn([lambda: np.copyto(target, source)])


def _one_way(
    rank: int, ranks: int, send: Callable[[], object], recv: Callable[[], object]
) -> list[Callable[[], object]]:
    """Return this rank's part of call i, which goes from rank i to rank i + 1."""
    parts = {rank: send, (rank - 1) % ranks: recv}
    return [parts.get(sender, lambda: None) for sender in range(ranks)]


def _in_turn(calls: list[Callable[[], object]]) -> Loop:
    def loop(count: int) -> None:
        for call in itertools.islice(itertools.cycle(calls), count):
            call()

    return loop
