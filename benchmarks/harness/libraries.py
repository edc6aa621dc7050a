"""What an operation calls in each library, on the same numpy memory; used inside the ranks.

The operations, with S the size in the tables, in bytes:

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

Frameworks are imported by the library that needs them: an MPI's environment has numpy and mpi4py alone.
"""

from __future__ import annotations

import ctypes
import importlib.util
import zlib
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from harness.places import array_at
from harness.rank import InGroup, Loop, Settings, Timed, repeat

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


class Library(Timed):
    """A rank of a library. A subclass gives the loop of an operation on arrays."""

    def loop_on(self, operation: str, arrays: Arrays) -> Loop:
        """Return the loop of an operation on these arrays."""
        raise NotImplementedError

    def loop(self, operation: str, *case: Any) -> Loop:
        """Return an operation's loop on new arrays, and leave check sums of what it computes.

        The arrays hold numbers for that; then they are set to zero, whose sums stay finite however often they are
        taken.
        """
        arrays = self._make_arrays(operation, *case)
        once = self.loop_on(operation, arrays)
        once(self.ranks)
        self.check = [
            zlib.crc32(array)
            for array in (once.results() if isinstance(once, JaxLoop) else arrays.values())
        ]
        for array in arrays.values():
            array.fill(0)
        return self.loop_on(operation, arrays)

    def _make_arrays(self, operation: str, nbytes: int) -> Arrays:
        """Return the operation's arrays, whose small whole numbers differ by rank, array and index."""
        count, arrays = nbytes // 4, {}
        for number, name in enumerate(ARRAYS[kind_of(operation)]):
            of_all = count * (self.ranks if name.endswith("blocks") else 1)
            values = array_at(self.place, of_all, small_pages=operation.endswith(":pages"))
            values[:] = np.arange(of_all, dtype=np.float32)
            np.remainder(values, 7, out=values)
            values += self.rank + 1 + 10 * number
            arrays[name] = values.reshape(self.ranks, count) if name.endswith("blocks") else values
        return arrays


class Colltensor(Library, InGroup):
    """colltensor through its public functions."""

    def __init__(self, settings: Settings, rank: int) -> None:
        super().__init__(settings, rank)
        self.versions["apache-tvm-ffi"] = metadata.version("apache-tvm-ffi")

    def loop_on(self, operation: str, arrays: Arrays) -> Loop:
        """Return the loop of any operation."""
        kind, _, variant = operation.partition(":")
        if kind in ("copyto", "memmove"):
            return _copy_loop(kind, arrays["other_block"], arrays["block"])
        if variant == "function":
            return self._function_loop(arrays["block"])
        if variant == "jax":
            return JaxLoop(self.group, arrays["block"])
        if kind == "allreduce":
            return self._allreduce_loop(
                _torch_tensor(arrays["block"]) if variant == "torch" else arrays["block"]
            )
        if variant == "list":
            arrays = {
                name: list(array) if name.endswith("blocks") else array
                for name, array in arrays.items()
            }
        return repeat(*self._calls(kind, arrays))

    def _allreduce_loop(self, tensor: Any) -> Loop:
        group = self.group

        def loop(calls: int) -> None:
            for _ in range(calls):
                group.allreduce(tensor)

        return loop

    def _function_loop(self, array: np.ndarray) -> Loop:
        import colltensor as col

        def loop(calls: int) -> None:
            for _ in range(calls):
                col.allreduce(array)

        return loop

    def _calls(self, operation: str, arrays: dict[str, Any]) -> list[Callable[[], object]]:
        group, rank, ranks = self.group, self.rank, self.ranks
        block, other = arrays.get("block"), arrays.get("other_block")
        blocks, other_blocks = arrays.get("blocks"), arrays.get("other_blocks")
        right, left = (rank + 1) % ranks, (rank - 1) % ranks
        roots = range(ranks)
        if operation == "reduce":
            return [lambda root=root: group.reduce(block, root) for root in roots]
        if operation == "broadcast":
            return [lambda root=root: group.broadcast(block, root) for root in roots]
        if operation == "gather":
            return [
                lambda root=root: group.gather(blocks if root == rank else None, block, root)
                for root in roots
            ]
        if operation == "scatter":
            return [
                lambda root=root: group.scatter(block, blocks if root == rank else None, root)
                for root in roots
            ]
        if operation == "send/recv":
            return _one_way(
                rank, ranks, lambda: group.send(block, right), lambda: group.recv(block, left)
            )
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


class Mpi(Library):
    """An MPI through mpi4py's buffer calls."""

    def __init__(self, settings: Settings, rank: int) -> None:
        from mpi4py import MPI

        super().__init__(settings, MPI.COMM_WORLD.rank)
        vendor, version = MPI.get_vendor()
        name = {"openmpi": "Open MPI", "mpich": "MPICH"}[settings.world]
        if vendor != name:
            raise RuntimeError(
                f"expected the environment of {name}, and its mpi4py runs on {vendor} {version}"
            )
        self._mpi, self._comm = MPI, MPI.COMM_WORLD
        self.versions = {
            name: ".".join(map(str, version)),
            f"mpi4py of {name}": metadata.version("mpi4py"),
        }
        if importlib.util.find_spec("torch") is not None:
            self.versions[f"torch of {name}"] = metadata.version("torch")
        self.barrier = self._comm.Barrier  # type: ignore[method-assign]

    def loop_on(self, operation: str, arrays: Arrays) -> Loop:
        """Return the loop of an operation."""
        kind, _, variant = operation.partition(":")
        if kind != "allreduce":
            return repeat(*self._calls(operation, arrays))
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
                (lambda root=root: comm.Reduce(in_place, block, root=root))
                if root == rank
                else (lambda root=root: comm.Reduce(block, None, root=root))
                for root in roots
            ]
        if operation == "broadcast":
            return [lambda root=root: comm.Bcast(block, root) for root in roots]
        if operation == "gather":
            return [
                lambda root=root: comm.Gather(block, blocks if root == rank else None, root)
                for root in roots
            ]
        if operation == "scatter":
            return [
                lambda root=root: comm.Scatter(blocks if root == rank else None, block, root)
                for root in roots
            ]
        if operation == "send/recv":
            return _one_way(
                rank, ranks, lambda: comm.Send(block, right), lambda: comm.Recv(block, left)
            )
        calls: dict[str, Callable[[], object]] = {
            "allgather": lambda: comm.Allgather(block, blocks),
            "reducescatter": lambda: comm.Reduce_scatter_block(blocks, block),
            "alltoall": lambda: comm.Alltoall(blocks, other_blocks),
            "sendrecv": lambda: comm.Sendrecv(block, right, 0, other, left),
            "barrier": lambda: comm.Barrier(),
        }
        return [calls[operation]]


class TorchGloo(Library):
    """torch.distributed over Gloo; allreduce only."""

    def __init__(self, settings: Settings, rank: int) -> None:
        import torch
        import torch.distributed as dist

        super().__init__(settings, rank)
        torch.set_num_threads(1)
        store = dist.FileStore(f"{settings.folder}/torch", self.ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=self.ranks)
        self._dist = dist
        self.versions = {"torch": str(torch.__version__)}
        self.barrier = dist.barrier  # type: ignore[method-assign]

    def loop_on(self, operation: str, arrays: Arrays) -> Loop:
        """Return the loop of ``allreduce``."""
        dist, tensor = self._dist, _torch_tensor(arrays["block"])
        return repeat(lambda: dist.all_reduce(tensor))


class RayCollective(Library):
    """ray.util.collective over Gloo, inside a Ray actor; allreduce only."""

    def __init__(self, settings: Settings, rank: int) -> None:
        import ray
        import torch
        from ray.util import collective

        super().__init__(settings, rank)
        torch.set_num_threads(1)
        collective.init_collective_group(self.ranks, rank, "gloo")
        self._collective = collective
        self.versions = {"ray": ray.__version__}
        self.barrier = collective.barrier  # type: ignore[method-assign]

    def loop_on(self, operation: str, arrays: Arrays) -> Loop:
        """Return the loop of ``allreduce``."""
        collective, array = self._collective, arrays["block"]
        return repeat(lambda: collective.allreduce(array))


def kind_of(operation: str) -> str:
    """Return an operation's name without its variant and without where its arrays lie."""
    return operation.partition("@")[0].partition(":")[0]


def _torch_tensor(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array)


def _copy_loop(operation: str, target: np.ndarray, source: np.ndarray) -> Loop:
    memmove = ctypes.CDLL(None).memmove
    memmove.argtypes, memmove.restype = (
        (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t),
        ctypes.c_void_p,
    )
    # These pointers keep their arrays alive.
    to, of = target.ctypes.data_as(ctypes.c_void_p), source.ctypes.data_as(ctypes.c_void_p)
    if operation == "memmove":
        return repeat(lambda: memmove(to, of, source.nbytes))
    return repeat(lambda: np.copyto(target, source))


def _one_way(
    rank: int, ranks: int, send: Callable[[], object], recv: Callable[[], object]
) -> list[Callable[[], object]]:
    """Return this rank's part of call i, which goes from rank i to rank i + 1."""
    parts = {rank: send, (rank - 1) % ranks: recv}
    return [parts.get(sender, lambda: None) for sender in range(ranks)]
