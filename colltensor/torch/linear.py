"""The collectives as linear maps of all ranks' tensors, each with its adjoint, which autograd runs.

The loss that is differentiated is the sum of all ranks' losses. A collective that is linear takes
rank s's tensors x_s to rank r's results y_r = sum over s of A_rs x_s. A_rs holds only real numbers.
Let g_r be the gradient of the loss with respect to y_r. The one with respect to x_s is the sum over
r of A_rs' g_r. That is again a collective, the adjoint. So every backward pass is one collective,
every rank must run it, and it can be differentiated in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from colltensor.group import Group
from colltensor.types import ReduceOp

Tensors = Sequence[torch.Tensor]


class LinearMap(Protocol):
    """One collective."""

    def __call__(self, tensors: Tensors) -> Tensors:
        """Run it: this rank's tensors in, new tensors out."""
        ...

    def adjoint(self) -> LinearMap:
        """Return the collective that takes gradients of the results to gradients of the tensors."""
        ...


class LinearFunction(torch.autograd.Function):
    """Records a linear collective; its backward records the adjoint."""

    @staticmethod
    def forward(ctx: Any, operation: LinearMap, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the collective."""
        ctx.operation = operation
        return tuple(operation([tensor.resolve_conj().resolve_neg() for tensor in tensors]))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Run the adjoint."""
        return None, *apply(ctx.operation.adjoint(), gradients)


def apply(operation: LinearMap, tensors: Tensors) -> tuple[torch.Tensor, ...]:
    """Run a collective and record it."""
    results: tuple[torch.Tensor, ...] = LinearFunction.apply(operation, *tensors)  # type: ignore[no-untyped-call]
    return results


@dataclass(frozen=True, slots=True)
class Allreduce:
    """y_r = sum of x_s, times a factor, on every r: A_rs = 1 for all r and s, its own transpose."""

    group: Group
    op: ReduceOp

    def __call__(self, tensors: Tensors) -> Tensors:
        result = _copy(tensors[0])
        self.group.allreduce(result, self.op)
        return [result]

    def adjoint(self) -> LinearMap:
        """Return itself."""
        return self


@dataclass(frozen=True, slots=True)
class Reduce:
    """y_root = sum of x_s; y_r = 0 elsewhere: A_rs = 1 where r is the root."""

    group: Group
    root: int
    op: ReduceOp

    def __call__(self, tensors: Tensors) -> Tensors:
        result = _copy(tensors[0])
        self.group.reduce(result, self.root, self.op)
        return [result if self.group.rank == self.root else result.zero_()]

    def adjoint(self) -> LinearMap:
        """Return a broadcast: x_s has the gradient g_root."""
        return Broadcast(self.group, self.root, self.op)


@dataclass(frozen=True, slots=True)
class Broadcast:
    """y_r = x_root, divided by the number of ranks for AVERAGE: A_rs = 1 where s is the root."""

    group: Group
    root: int
    op: ReduceOp = ReduceOp.SUM

    def __call__(self, tensors: Tensors) -> Tensors:
        result = _copy(tensors[0])
        self.group.broadcast(result, self.root)
        return [result.div_(self.group.world_size) if self.op is ReduceOp.AVERAGE else result]

    def adjoint(self) -> LinearMap:
        """Return a reduce: x_root has the gradient sum of g_r, the others' x has none."""
        return Reduce(self.group, self.root, self.op)


@dataclass(frozen=True, slots=True)
class Allgather:
    """y_r[s] = x_s, divided by the number of ranks where ``op`` is AVERAGE."""

    group: Group
    op: ReduceOp = ReduceOp.SUM

    def __call__(self, tensors: Tensors) -> Tensors:
        results = _room(self.group, tensors[0])
        self.group.allgather(results, tensors[0].contiguous())
        if self.op is ReduceOp.AVERAGE:
            results = [result.div_(self.group.world_size) for result in results]
        return results

    def adjoint(self) -> LinearMap:
        """Return a reduce-scatter: x_s has the gradient sum over r of g_r[s]."""
        return Reducescatter(self.group, self.op)


@dataclass(frozen=True, slots=True)
class Reducescatter:
    """y_r = sum over s of x_s[r]."""

    group: Group
    op: ReduceOp

    def __call__(self, tensors: Tensors) -> Tensors:
        result = _empty(tensors[0])
        self.group.reducescatter(result, [tensor.contiguous() for tensor in tensors], self.op)
        return [result]

    def adjoint(self) -> LinearMap:
        """Return an allgather: x_s[r] has the gradient g_r."""
        return Allgather(self.group, self.op)


@dataclass(frozen=True, slots=True)
class Gather:
    """y_root[s] = x_s; y_r = 0 elsewhere."""

    group: Group
    root: int

    def __call__(self, tensors: Tensors) -> Tensors:
        results = _room(self.group, tensors[0])
        here = self.group.rank == self.root
        self.group.gather(results if here else None, tensors[0].contiguous(), self.root)
        return results if here else [result.zero_() for result in results]

    def adjoint(self) -> LinearMap:
        """Return a scatter: x_s has the gradient g_root[s]."""
        return Scatter(self.group, self.root)


@dataclass(frozen=True, slots=True)
class Scatter:
    """y_r = x_root[r]; what other ranks bring does not matter."""

    group: Group
    root: int

    def __call__(self, tensors: Tensors) -> Tensors:
        result = _empty(tensors[0])
        here = self.group.rank == self.root
        self.group.scatter(
            result, [tensor.contiguous() for tensor in tensors] if here else None, self.root
        )
        return [result]

    def adjoint(self) -> LinearMap:
        """Return a gather: x_root[r] has the gradient g_r, the others' x has none."""
        return Gather(self.group, self.root)


@dataclass(frozen=True, slots=True)
class Alltoall:
    """y_r[s] = x_s[r]: a transposition of blocks, and its transpose is one too."""

    group: Group

    def __call__(self, tensors: Tensors) -> Tensors:
        results = _room(self.group, tensors[0])
        self.group.alltoall(results, [tensor.contiguous() for tensor in tensors])
        return results

    def adjoint(self) -> LinearMap:
        """Return itself: x_s[r] has the gradient g_r[s]."""
        return self


@dataclass(frozen=True, slots=True)
class Send:
    """y_peer = x; the result here is a scalar zero, which stands for what went away."""

    group: Group
    peer: int
    shape: torch.Size
    dtype: torch.dtype

    def __call__(self, tensors: Tensors) -> Tensors:
        self.group.send(tensors[0].contiguous(), self.peer)
        return [torch.zeros((), dtype=self.dtype, device=tensors[0].device)]

    def adjoint(self) -> LinearMap:
        """Return a receive: x has the gradient g_peer."""
        return Recv(self.group, self.peer, self.shape, self.dtype)


@dataclass(frozen=True, slots=True)
class Recv:
    """y = x_peer; takes a scalar on the device of the result, whose value does not matter."""

    group: Group
    peer: int
    shape: torch.Size
    dtype: torch.dtype

    def __call__(self, tensors: Tensors) -> Tensors:
        result = torch.empty(self.shape, dtype=self.dtype, device=tensors[0].device)
        self.group.recv(result, self.peer)
        return [result]

    def adjoint(self) -> LinearMap:
        """Return a send: x_peer has the gradient g."""
        return Send(self.group, self.peer, self.shape, self.dtype)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _room(group: Group, tensor: torch.Tensor) -> list[torch.Tensor]:
    return [_empty(tensor) for _ in range(group.world_size)]
