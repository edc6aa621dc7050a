"""What a benchmark measures: colltensor, and the libraries that it is compared with.

Each stands behind the same three calls, and is imported only in a rank of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

Call = Callable[[], Any]


class UnsupportedError(Exception):
    """A library has no such operation, or not of this dtype."""


class Library(Protocol):
    """One library, in one rank."""

    rank: int
    world_size: int

    def prepare(
        self, backend: str, arrays: str, operation: str, source: np.ndarray, output: np.ndarray
    ) -> Call:
        """Return one call of the operation, which returns its result.

        It is made of arrays of its own. All ranks call.

        Raises:
            UnsupportedError: The library cannot do it.
        """

    def barrier(self, backend: str) -> None:
        """Wait for all ranks."""


def as_array(array: np.ndarray, kind: str) -> Any:
    """Return a copy of a numpy array as one of a framework."""
    if kind == "torch":
        torch = importlib.import_module("torch")
        source = array.astype("float32") if array.dtype.name == "bfloat16" else array
        return torch.tensor(source, dtype=getattr(torch, array.dtype.name))
    if kind == "jax":
        jax = importlib.import_module("jax")
        jax.config.update("jax_enable_x64", True)
        return jax.block_until_ready(jax.numpy.array(array))
    return array.copy()


def as_numpy(result: Any) -> np.ndarray:
    """Return a result as a numpy array; of a list, one of all its arrays."""
    import numpy as np

    if isinstance(result, list):
        return np.stack([as_numpy(entry) for entry in result])
    if type(result).__module__ == "torch":
        wide = result.float() if "bfloat16" in str(result.dtype) else result
        array: np.ndarray = wide.detach().numpy()
        return array
    return np.asarray(result)


class ColTensor:
    """This library: a group for each backend."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._groups: dict[str, Any] = {}

    def prepare(
        self, backend: str, arrays: str, operation: str, source: np.ndarray, output: np.ndarray
    ) -> Call:
        group = self._group(backend)
        x, out = as_array(source, arrays), as_array(output, arrays)
        is_root, last = self.rank == 0, self.world_size - 1
        following, before = (self.rank + 1) % self.world_size, (self.rank + last) % self.world_size

        calls: dict[str, Call] = {
            "allreduce": lambda: group.allreduce(x),
            "reduce": lambda: group.reduce(x, 0),
            "broadcast": lambda: group.broadcast(x, 0),
            "allgather": lambda: group.allgather(out, x),
            "gather": lambda: group.gather(out if is_root else None, x, 0),
            "scatter": lambda: group.scatter(out, x if is_root else None, 0),
            "reducescatter": lambda: group.reducescatter(out, x),
            "alltoall": lambda: group.alltoall(out, x),
            "sendrecv": lambda: group.sendrecv(x, following, out, before),
        }

        return calls[operation]

    def barrier(self, backend: str) -> None:
        self._group(backend).barrier()

    def _group(self, backend: str) -> Any:
        if backend not in self._groups:
            init = importlib.import_module("colltensor").init_collective_group
            self._groups[backend] = init(
                self.world_size, self.rank, backend, f"bench-{backend}", timeout_s=60
            )
        return self._groups[backend]


class TorchDistributed:
    """torch.distributed over its Gloo."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._dist = importlib.import_module("torch.distributed")
        self._dist.init_process_group("gloo", rank=rank, world_size=world_size)

    def prepare(
        self, backend: str, arrays: str, operation: str, source: np.ndarray, output: np.ndarray
    ) -> Call:
        dist = self._dist
        x, out = as_array(source, "torch"), as_array(output, "torch")

        flat = out.reshape(-1)  # the same memory
        rows_in = list(x) if x.dim() > 1 else []
        rows_out = list(out) if out.dim() > 1 else []
        root = self.rank == 0
        pair = (self.rank + 1) % self.world_size, (self.rank - 1) % self.world_size

        def exchange() -> None:
            sends = [dist.P2POp(dist.isend, x, pair[0]), dist.P2POp(dist.irecv, out, pair[1])]
            for request in dist.batch_isend_irecv(sends):
                request.wait()

        calls: dict[str, tuple[Call, Any]] = {
            "allreduce": (lambda: dist.all_reduce(x), x),
            "reduce": (lambda: dist.reduce(x, 0), x),
            "broadcast": (lambda: dist.broadcast(x, 0), x),
            "allgather": (lambda: dist.all_gather_into_tensor(flat, x), out),
            "gather": (lambda: dist.gather(x, rows_out if root else None, 0), out),
            "scatter": (lambda: dist.scatter(out, rows_in if root else None, 0), out),
            "reducescatter": (lambda: dist.reduce_scatter_tensor(out, x.reshape(-1)), out),
            "alltoall": (lambda: dist.all_to_all_single(out, x), out),
            "sendrecv": (exchange, out),
        }

        call, result = calls[operation]
        return _returning(call, result)

    def barrier(self, backend: str) -> None:
        self._dist.barrier()


class Mpi:
    """mpi4py's buffer calls over the MPI that it finds."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._mpi = importlib.import_module("mpi4py.MPI")
        self._comm = self._mpi.COMM_WORLD
        self.rank, self.world_size = self._comm.Get_rank(), self._comm.Get_size()

    def prepare(
        self, backend: str, arrays: str, operation: str, source: np.ndarray, output: np.ndarray
    ) -> Call:
        if source.dtype.name == "bfloat16":
            raise UnsupportedError("MPI has no bfloat16")

        comm, in_place = self._comm, self._mpi.IN_PLACE
        x, out = source.copy(), output.copy()
        root = self.rank == 0
        following, before = (self.rank + 1) % self.world_size, (self.rank - 1) % self.world_size

        calls: dict[str, tuple[Call, Any]] = {
            "allreduce": (lambda: comm.Allreduce(in_place, x), x),
            "reduce": (
                (lambda: comm.Reduce(in_place, x)) if root else (lambda: comm.Reduce(x, None)),
                x,
            ),
            "broadcast": (lambda: comm.Bcast(x), x),
            "allgather": (lambda: comm.Allgather(x, out), out),
            "gather": (lambda: comm.Gather(x, out if root else None), out),
            "scatter": (lambda: comm.Scatter(x if root else None, out), out),
            "reducescatter": (lambda: comm.Reduce_scatter_block(x, out), out),
            "alltoall": (lambda: comm.Alltoall(x, out), out),
            "sendrecv": (lambda: comm.Sendrecv(x, following, 0, out, before, 0), out),
        }

        call, result = calls[operation]
        return _returning(call, result)

    def barrier(self, backend: str) -> None:
        self._comm.Barrier()


class RayCollective:
    """ray.util.collective over its Gloo, inside an actor."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._collective = importlib.import_module("ray.util.collective")
        self._collective.init_collective_group(world_size, rank, "gloo", "bench")

    def prepare(
        self, backend: str, arrays: str, operation: str, source: np.ndarray, output: np.ndarray
    ) -> Call:
        ray = self._collective
        kind = "torch" if source.dtype.name == "bfloat16" else arrays
        if kind == "jax":
            raise UnsupportedError("ray.util.collective takes no JAX arrays")

        x, out = as_array(source, kind), as_array(output, kind)
        rows_in = list(x) if x.ndim > 1 else []
        rows_out = list(out) if out.ndim > 1 else []
        calls: dict[str, tuple[Call, Any]] = {
            "allreduce": (lambda: ray.allreduce(x, "bench"), x),
            "reduce": (lambda: ray.reduce(x, 0, "bench"), x),
            "broadcast": (lambda: ray.broadcast(x, 0, "bench"), x),
            "allgather": (lambda: ray.allgather(rows_out, x, "bench"), rows_out),
            "reducescatter": (lambda: ray.reducescatter(out, rows_in, "bench"), out),
        }

        if operation not in calls:
            raise UnsupportedError(f"ray.util.collective has no {operation}")
        call, result = calls[operation]
        return _returning(call, result)

    def barrier(self, backend: str) -> None:
        self._collective.barrier("bench")


def _returning(call: Call, result: Any) -> Call:
    def both() -> Any:
        call()
        return result

    return both


LIBRARIES: dict[str, Callable[[int, int], Library]] = {
    "colltensor": ColTensor,
    "torch": TorchDistributed,
    "mpi": Mpi,
    "ray": RayCollective,
}
"""By the name that the command line gives them."""
