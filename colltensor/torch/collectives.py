"""Collectives that autograd sees: they return new tensors.

Their backward pass is a collective too. The loss is the sum of all ranks' losses. Every rank must
run the backward pass of each collective, in one order. So the result of a call must be part of the
loss on every rank. Add ``0 * result.sum()`` where a result is not otherwise used. A result requires
grad on all ranks if some rank's tensor does. ``torch.autograd.grad()`` and ``backward()`` with
``inputs`` leave out whatever leads to none of them, so there every rank's tensor must. ``linear``
has the derivations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Final

import torch

from colltensor.errors import OptionError, ShapeError
from colltensor.group import Group
from colltensor.table import find_group
from colltensor.torch.linear import (
    Allgather,
    Allreduce,
    Alltoall,
    Broadcast,
    Gather,
    Recv,
    Reduce,
    Reducescatter,
    Scatter,
    Send,
    apply,
)
from colltensor.types import ReduceOp

_LINEAR: Final = (ReduceOp.SUM, ReduceOp.AVERAGE)
_EXTREMES: Final = (ReduceOp.MIN, ReduceOp.MAX)


def allreduce(
    tensor: torch.Tensor, group: str | Group = "default", op: ReduceOp = ReduceOp.SUM
) -> torch.Tensor:
    """Combine the tensors of all ranks; every rank gets the result as a new tensor.

    Derivatives: y_r = sum of x_s on every rank r, so x_s has the gradient sum over r of g_r. That
    of a SUM-allreduce is a SUM-allreduce, and of an AVERAGE-allreduce an AVERAGE-allreduce. MIN and
    MAX hand the sum of all g_r to the rank that has the element. Where several have it, they get
    equal shares, as with ``torch.amax``. The other ops have none.

    Raises:
        OptionError: On every rank: some tensor requires grad and ``op`` has no derivative.
    """
    found, op = _group(group), ReduceOp.of(op)
    [tensor] = _recorded(found, "allreduce", op, [tensor], extremes=True)
    if op in _EXTREMES:
        result: torch.Tensor = _Extreme.apply(tensor, found, op)  # type: ignore[no-untyped-call]
        return result
    return apply(Allreduce(found, op), [tensor])[0]


def reduce(
    tensor: torch.Tensor,
    dst_rank: int = 0,
    group: str | Group = "default",
    op: ReduceOp = ReduceOp.SUM,
) -> torch.Tensor:
    """Combine the tensors of all ranks on ``dst_rank``; the others get zeros.

    Derivatives: y_dst = sum of x_s, so every x_s has the gradient g_dst: a broadcast from
    ``dst_rank``, divided by the number of ranks for AVERAGE.

    Raises:
        OptionError: On every rank: some tensor requires grad and ``op`` is neither SUM nor AVERAGE.
    """
    found, op = _group(group), ReduceOp.of(op)
    tensors = _recorded(found, "reduce", op, [tensor])
    return apply(Reduce(found, dst_rank, op), tensors)[0]


def broadcast(
    tensor: torch.Tensor, src_rank: int = 0, group: str | Group = "default"
) -> torch.Tensor:
    """Return rank ``src_rank``'s tensor on every rank; the others' must have its shape and dtype.

    Derivatives: y_r = x_src, so x_src has the gradient sum of all g_r, a SUM-reduce to
    ``src_rank``; the others' zero.
    """
    found = _group(group)
    return apply(Broadcast(found, src_rank), _recorded(found, "broadcast", None, [tensor]))[0]


def allgather(tensor: torch.Tensor, group: str | Group = "default") -> list[torch.Tensor]:
    """Return the tensors of all ranks on every rank.

    Derivatives: y_r[s] = x_s, so x_s has the gradient sum over r of g_r[s]: a SUM-reducescatter.
    """
    found = _group(group)
    return list(apply(Allgather(found), _recorded(found, "allgather", None, [tensor])))


def gather(
    tensor: torch.Tensor, dst_rank: int = 0, group: str | Group = "default"
) -> list[torch.Tensor]:
    """Return the tensors of all ranks on ``dst_rank``; zeros of the same shapes elsewhere.

    Derivatives: y_dst[s] = x_s, so x_s has the gradient g_dst[s]: a scatter from ``dst_rank``.
    """
    found = _group(group)
    return list(apply(Gather(found, dst_rank), _recorded(found, "gather", None, [tensor])))


def scatter(
    tensor: torch.Tensor,
    tensor_list: Sequence[torch.Tensor] | None = None,
    src_rank: int = 0,
    group: str | Group = "default",
) -> torch.Tensor:
    """Return entry ``rank`` of rank ``src_rank``'s list.

    Derivatives: y_r = x_src[r], so x_src[r] has the gradient g_r: a gather to ``src_rank``.

    Args:
        tensor: Has the shape and dtype of the entries; its values do not matter, and its gradient
            is zero.
        tensor_list: On ``src_rank`` a tensor for each rank; ignored elsewhere.
        src_rank: The rank that has the tensors.
        group: The group or its name.
    """
    found = _group(group)
    entries = [tensor] * found.world_size
    if found.rank == src_rank:
        nobody_waits = contextlib.nullcontext()
        with found._refusing("scatter", src_rank, None) if tensor.is_cpu else nobody_waits:
            entries = _entries(found, "scatter", tensor_list)
    return apply(Scatter(found, src_rank), _recorded(found, "scatter", None, entries))[0]


def reducescatter(
    tensor_list: Sequence[torch.Tensor], group: str | Group = "default", op: ReduceOp = ReduceOp.SUM
) -> torch.Tensor:
    """Combine entry ``rank`` of all ranks' lists.

    Derivatives: y_r = sum over s of x_s[r], so x_s[r] has the gradient g_r: an allgather, divided
    by the number of ranks for AVERAGE.

    Raises:
        OptionError: On every rank: some tensor requires grad and ``op`` is neither SUM nor AVERAGE.
    """
    found, op = _group(group), ReduceOp.of(op)
    entries = _entries(found, "reducescatter", tensor_list)
    return apply(Reducescatter(found, op), _recorded(found, "reducescatter", op, entries))[0]


def alltoall(
    tensor_list: Sequence[torch.Tensor], group: str | Group = "default"
) -> list[torch.Tensor]:
    """Send entry r to rank r; return what every rank sent here.

    Derivatives: y_r[s] = x_s[r], so x_s[r] has the gradient g_r[s]: an alltoall back.
    """
    found = _group(group)
    entries = _entries(found, "alltoall", tensor_list)
    return list(apply(Alltoall(found), _recorded(found, "alltoall", None, entries)))


def send(tensor: torch.Tensor, dst_rank: int, group: str | Group = "default") -> torch.Tensor:
    """Send a tensor to ``dst_rank``, which calls ``recv``; return a scalar zero for the loss.

    Use it as ``loss + sent``. Derivatives: y_dst = x, so x has the gradient g_dst, which
    ``dst_rank`` sends back. It is received when the backward pass comes to the scalar.
    """
    found = _group(group)
    if _differentiable(tensor) and torch.is_grad_enabled():
        found.send(torch.tensor([tensor.requires_grad], device=tensor.device), dst_rank)
    return apply(Send(found, dst_rank, tensor.shape, tensor.dtype), [tensor])[0]


def recv(tensor: torch.Tensor, src_rank: int, group: str | Group = "default") -> torch.Tensor:
    """Return the tensor that ``src_rank`` sends; ``tensor`` has its shape and dtype.

    The values of ``tensor`` do not matter. Derivatives: y = x_src, so x_src has the gradient g,
    which is sent back to ``src_rank``; that of ``tensor`` is zero.
    """
    found = _group(group)
    origin = tensor.flatten()[:0].sum(dtype=tensor.dtype)
    if _differentiable(tensor) and torch.is_grad_enabled():
        wanted = torch.tensor([False], device=tensor.device)
        found.recv(wanted, src_rank)
        if not wanted or not origin.requires_grad:
            origin = origin.detach().requires_grad_(bool(wanted))
    return apply(Recv(found, src_rank, tensor.shape, tensor.dtype), [origin])[0]


class _Extreme(torch.autograd.Function):
    """An allreduce with MIN or MAX."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group, op: ReduceOp) -> torch.Tensor:
        """Run it; keep what tells who has the element."""
        result = Allreduce(group, op)([tensor.resolve_conj().resolve_neg()])[0]
        ctx.save_for_backward(tensor, result)
        ctx.group = group
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Sum the gradients of all ranks, and take this rank's share where it has the element."""
        tensor, result = ctx.saved_tensors
        total = Allreduce(ctx.group, ReduceOp.SUM)
        with torch.no_grad():
            has_it = (tensor == result) | (tensor.isnan() & result.isnan())
            share = has_it.to(gradient.dtype)
            share = share / total([share])[0]
        return apply(total, [gradient])[0] * share, None, None


def _group(group: str | Group) -> Group:
    return group if isinstance(group, Group) else find_group(group)


def _differentiable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _recorded(
    group: Group,
    name: str,
    op: ReduceOp | None,
    tensors: Sequence[torch.Tensor],
    *,
    extremes: bool = False,
) -> Sequence[torch.Tensor]:
    """Return the tensors so that autograd records the call on every rank, or on none.

    A rank whose own tensors do not require grad takes part in the backward pass where another's do.
    """
    if not torch.is_grad_enabled() or not _differentiable(tensors[0]):
        return tensors

    here = any(tensor.requires_grad for tensor in tensors)
    anywhere = torch.tensor([here], device=tensors[0].device)  # a group may reach no other
    group.allreduce(anywhere, ReduceOp.MAX)
    if not anywhere:
        return tensors

    if op is not None and op not in (*_LINEAR, *(_EXTREMES if extremes else ())):
        other = "; allreduce has a rule for it" if op in _EXTREMES else ""
        raise OptionError(
            f"{name}: op: expected SUM or AVERAGE where a tensor requires grad, got {op.name}, which has no derivative "
            f"here{other}; or pass tensor.detach() on all ranks"
        )
    return tensors if here else [tensor.detach().requires_grad_() for tensor in tensors]


def _entries(
    group: Group, name: str, tensor_list: Sequence[torch.Tensor] | None
) -> list[torch.Tensor]:
    if tensor_list is None or len(tensor_list) != group.world_size:
        found = "none" if tensor_list is None else len(tensor_list)
        raise ShapeError(
            f"{name}: tensor_list (rank {group.rank}): expected {group.world_size} tensors, one a rank, got {found}"
        )
    return list(tensor_list)
