"""What an operation calls in each library, on the same numpy memory; used inside the ranks.

The operations, with S the size in the tables, in bytes:

- ``allreduce``: S in place on every rank, SUM. ``allreduce:function``, ``:torch`` and ``:jax`` are
  other ways to it; ``:pages`` is the same on memory in pages of 4 KiB, as JAX's is and numpy's
  large arrays are not.
- ``reduce``: S, SUM, in place at the root; the other ranks' memory is only read.
- ``broadcast``: S, in place.
- ``allgather``: S from each rank, into memory of its own of S times ranks.
- ``reducescatter``: S times ranks on each rank, only read, SUM, into S.
- ``gather``, ``scatter``: S for each rank; the root has S times ranks. S times ranks are one array
  in every library; ``allgather:list`` and so on give colltensor a list of its rows.
- ``alltoall``: S for each pair of ranks, from S times ranks into as much.
- ``send/recv``: S one way, in turns: call i goes from rank i to rank i + 1, so that 2 ranks play
  ping-pong and a call is half a round trip.
- ``sendrecv``: S to the next rank and S from the one before, in separate memory.
- ``barrier``.
- ``copyto``, ``memmove``: S copied within each process, by numpy and by libc, with no
  communication.

The root of a rooted operation is rank i of call i, as in the Intel MPI Benchmarks: with a fixed
root a library's ranks may run ahead of each other, and a loop would measure its queue and not the
operation.

Frameworks are imported by the library that needs them: an MPI's environment has numpy and mpi4py
alone.
"""

from __future__ import annotations

import ctypes
import importlib.util
import zlib
from collections.abc import Callable
from functools import partial
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import numpy as np

from harness.rank import InGroup, Loop, Settings, Timed, array_at, on_one_thread, repeat

Arrays = dict[str, Any]
Call = Callable[[], object]

ARRAYS = {
    **dict.fromkeys(("allreduce", "reduce", "broadcast"), ("block",)),
    **dict.fromkeys(("allgather", "reducescatter", "gather", "scatter"), ("block", "blocks")),
    "alltoall": ("blocks", "other_blocks"),
    "send/recv": ("block",),
    "sendrecv": ("block", "other_block"),
    "barrier": (),
    **dict.fromkeys(("copyto", "memmove"), ("block", "other_block")),
}
"""The memory of each operation: a block is S bytes, blocks are S times ranks."""

NAMES = ("block", "other_block", "blocks", "other_blocks")
ROOTED = ("reduce", "broadcast", "gather", "scatter", "send/recv")
"""Operations whose root changes from call to call."""


class Library(Timed):
    """A rank of a library. A subclass says what the operations call."""

    def calls(self, on: SimpleNamespace) -> dict[str, Call]:
        """Return the calls by operation, those of one way by ``send`` and ``recv``.

        Args:
            on: Their arrays, by the names in ``ARRAYS``, and ``at_root``, which are ``blocks`` on
                the root alone; the ``root``; the ranks ``right`` and ``left`` of this one.
        """
        raise NotImplementedError

    def loop_on(self, operation: str, arrays: Arrays) -> Loop:
        """Return the loop of an operation on these arrays."""
        rank, ranks, calls = self.rank, self.ranks, []
        if operation in ("copyto", "memmove"):
            return repeat(_copy(operation, arrays["other_block"], arrays["block"]))
        for root in range(ranks if operation in ROOTED else 1):
            on = SimpleNamespace(**dict.fromkeys(NAMES) | arrays, root=root)
            on.right, on.left = (rank + 1) % ranks, (rank - 1) % ranks
            on.at_root = on.blocks if root == rank else None
            side = {rank: "send", on.left: "recv"}.get(root, "idle")
            name = side if operation == "send/recv" else operation
            calls.append((self.calls(on) | {"idle": lambda: None})[name])
        return repeat(*calls)

    def loop(self, operation: str, *case: Any) -> Loop:
        """Return an operation's loop on new arrays, and leave check sums of what it computes.

        The arrays hold numbers for that; then they are set to zero, whose sums stay finite however
        often they are taken.
        """
        arrays = self._make_arrays(operation, *case)
        once = self.loop_on(operation, arrays)
        once(self.ranks)
        results = once.results() if isinstance(once, JaxLoop) else arrays.values()
        self.check = [zlib.crc32(array) for array in results]
        for array in arrays.values():
            array.fill(0)
        return self.loop_on(operation, arrays)

    def _make_arrays(self, operation: str, nbytes: int) -> Arrays:
        """Return an operation's arrays: small whole numbers by rank, array and index."""
        count, arrays = nbytes // 4, {}
        for number, name in enumerate(ARRAYS[kind_of(operation)]):
            rows = self.ranks if name.endswith("blocks") else 1
            values = array_at(self.place, rows * count, small_pages=operation.endswith(":pages"))
            values[:] = np.arange(rows * count, dtype=np.float32)
            np.remainder(values, 7, out=values)
            values += self.rank + 1 + 10 * number
            arrays[name] = values.reshape(rows, count) if name.endswith("blocks") else values
        return arrays


class Colltensor(Library, InGroup):
    """colltensor through its public functions."""

    def __init__(self, settings: Settings, rank: int) -> None:
        super().__init__(settings, rank)
        self.versions["apache-tvm-ffi"] = metadata.version("apache-tvm-ffi")

    def loop_on(self, operation: str, arrays: Arrays) -> Loop:
        """Return the loop of any operation."""
        kind, _, variant = operation.partition(":")
        if variant == "jax":
            return JaxLoop(self.group, arrays["block"])
        if kind == "allreduce":
            return self._allreduce(variant, arrays["block"])
        if variant == "list":
            arrays = {
                name: list(array) if name.endswith("blocks") else array
                for name, array in arrays.items()
            }
        return super().loop_on(kind, arrays)

    def _allreduce(self, variant: str, block: np.ndarray) -> Loop:
        import colltensor as col

        group, tensor = self.group, _torch_tensor(block) if variant == "torch" else block

        def by_method(calls: int) -> None:
            for _ in range(calls):
                group.allreduce(tensor)

        def by_function(calls: int) -> None:
            for _ in range(calls):
                col.allreduce(tensor)

        return by_function if variant == "function" else by_method

    def calls(self, on: SimpleNamespace) -> dict[str, Call]:
        """Return calls of the group's methods."""
        group, block, blocks, root = self.group, on.block, on.blocks, on.root
        at_root, right, left = on.at_root, on.right, on.left
        other, other_blocks = on.other_block, on.other_blocks
        return {
            "reduce": lambda: group.reduce(block, root),
            "broadcast": lambda: group.broadcast(block, root),
            "gather": lambda: group.gather(at_root, block, root),
            "scatter": lambda: group.scatter(block, at_root, root),
            "send": lambda: group.send(block, right),
            "recv": lambda: group.recv(block, left),
            "allgather": lambda: group.allgather(blocks, block),
            "reducescatter": lambda: group.reducescatter(block, blocks),
            "alltoall": lambda: group.alltoall(other_blocks, blocks),
            "sendrecv": lambda: group.sendrecv(block, right, other, left),
            "barrier": lambda: group.barrier(),
        }


class JaxLoop:
    """A loop of donating calls, whose results are the next calls' arguments.

    The first argument is a copy of ``array``.
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
        self._in_place, self._comm = MPI.IN_PLACE, MPI.COMM_WORLD
        self.versions[name] = ".".join(map(str, version))
        for package in ("mpi4py", "torch"):
            if importlib.util.find_spec(package) is not None:
                self.versions[f"{package} of {name}"] = metadata.version(package)
        self.barrier = self._comm.Barrier  # type: ignore[method-assign]

    def loop_on(self, operation: str, arrays: Arrays) -> Loop:
        """Return the loop of an operation."""
        if kind_of(operation) != "allreduce":
            return super().loop_on(operation, arrays)
        comm, in_place = self._comm, self._in_place
        array = _torch_tensor(arrays["block"]) if ":torch" in operation else arrays["block"]

        def loop(calls: int) -> None:
            for _ in range(calls):
                comm.Allreduce(in_place, array)

        return loop

    def calls(self, on: SimpleNamespace) -> dict[str, Call]:
        """Return calls of the communicator's methods."""
        comm, block, blocks, root = self._comm, on.block, on.blocks, on.root
        at_root, right, left = on.at_root, on.right, on.left
        other, other_blocks = on.other_block, on.other_blocks
        given, taken = (self._in_place, block) if root == self.rank else (block, None)
        return {
            "reduce": lambda: comm.Reduce(given, taken, root=root),
            "broadcast": lambda: comm.Bcast(block, root),
            "gather": lambda: comm.Gather(block, at_root, root),
            "scatter": lambda: comm.Scatter(at_root, block, root),
            "send": lambda: comm.Send(block, right),
            "recv": lambda: comm.Recv(block, left),
            "allgather": lambda: comm.Allgather(block, blocks),
            "reducescatter": lambda: comm.Reduce_scatter_block(blocks, block),
            "alltoall": lambda: comm.Alltoall(blocks, other_blocks),
            "sendrecv": lambda: comm.Sendrecv(block, right, 0, other, left),
            "barrier": lambda: comm.Barrier(),
        }


class TorchGloo(Library):
    """torch.distributed over Gloo; allreduce only."""

    def __init__(self, settings: Settings, rank: int) -> None:
        super().__init__(settings, rank)
        self.dist = on_one_thread(settings, rank)
        self.versions["torch"] = metadata.version("torch")
        self.barrier = self.dist.barrier

    def calls(self, on: SimpleNamespace) -> dict[str, Call]:
        """Return the call of ``allreduce``."""
        return {"allreduce": partial(self.dist.all_reduce, _torch_tensor(on.block))}


class RayCollective(Library):
    """ray.util.collective over Gloo, inside a Ray actor; allreduce only."""

    def __init__(self, settings: Settings, rank: int) -> None:
        import torch
        from ray.util import collective

        super().__init__(settings, rank)
        torch.set_num_threads(1)
        collective.init_collective_group(self.ranks, rank, "gloo")
        self._collective = collective
        self.versions["ray"] = metadata.version("ray")
        self.barrier = collective.barrier  # type: ignore[method-assign]

    def calls(self, on: SimpleNamespace) -> dict[str, Call]:
        """Return the call of ``allreduce``."""
        return {"allreduce": partial(self._collective.allreduce, on.block)}


def kind_of(operation: str) -> str:
    """Return an operation's name without its variant and without where its arrays lie."""
    return operation.partition("@")[0].partition(":")[0]


def _torch_tensor(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array)


def _copy(operation: str, target: np.ndarray, source: np.ndarray) -> Call:
    if operation == "copyto":
        return partial(np.copyto, target, source)
    memmove = ctypes.CDLL(None).memmove
    memmove.argtypes, memmove.restype = [ctypes.c_void_p] * 2 + [ctypes.c_size_t], ctypes.c_void_p
    # These pointers keep their arrays alive.
    to, of = (array.ctypes.data_as(ctypes.c_void_p) for array in (target, source))
    return partial(memmove, to, of, source.nbytes)
