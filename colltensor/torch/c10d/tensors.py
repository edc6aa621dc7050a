"""What a process group does to tensors before they travel: views without autograd, parts, memory for strided ones.

And torch's options of a call, also from its short spelling, which gives them one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist

from colltensor.errors import OptionError, ShapeError
from colltensor.types import ReduceOp

_TORCH: Final[Any] = dist.ReduceOp.RedOpType
_OPS: Final = {
    _TORCH.AVG if op is ReduceOp.AVERAGE else getattr(_TORCH, op.name): op for op in ReduceOp
}
_BARE: Final = (torch.Tensor, torch.nn.Parameter)


def op_of(operation: str, op: Any) -> ReduceOp:
    """Return our reduce op for torch's.

    Raises:
        OptionError: There is none.
    """
    kind = op if op.__class__ is _TORCH else op.op
    found = _OPS.get(kind)
    if found is None:
        known = ", ".join(other.name for other in _OPS)
        raise OptionError(
            f"{operation}: op: backend 'colltensor' has {known}, got {kind}; multiply, then take the SUM"
        )
    return found


def bare(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor without autograd and without a subclass, on the same memory: torch's backends only write."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor if tensor.__class__ in _BARE else tensor.as_subclass(torch.Tensor)


def apart(value: Any) -> Any:
    """Return arguments of a call with tensors of their own on the same memory, also those within lists and tuples.

    Between the issue of a call and its run, the autograd function around a functional collective makes the tensor that
    it returns require grad.
    """
    if isinstance(value, torch.Tensor):  # a sparse one would get its new elements alone
        return value.detach() if value.layout is torch.strided else value
    return type(value)(map(apart, value)) if value.__class__ in (list, tuple) else value


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor if it is contiguous, else memory of its shape that is."""
    return (
        tensor
        if tensor.is_contiguous()
        else torch.empty_like(tensor, memory_format=torch.contiguous_format)
    )


def only(operation: str, argument: str, tensors: Any) -> torch.Tensor:
    """Return the one tensor of an argument in which torch can give several, for several devices, or the tensor itself.

    Raises:
        OptionError: There are more, or none.
    """
    if isinstance(tensors, torch.Tensor):
        return tensors
    if len(tensors) != 1:
        raise OptionError(
            f"{operation}: {argument}: expected one tensor, got {len(tensors)}; the coalesced forms take several"
        )
    found: torch.Tensor = tensors[0]
    return found


def of_rank(operation: str, lists: Sequence[Any]) -> list[torch.Tensor]:
    """Return the list of tensors of an argument in which torch can give several lists, or the list itself.

    Raises:
        OptionError: There are more lists.
    """
    if len(lists) == 1 and not isinstance(lists[0], torch.Tensor):
        return list(lists[0])
    if any(not isinstance(entry, torch.Tensor) for entry in lists):
        raise OptionError(f"{operation}: expected one list of tensors, got {len(lists)}")
    return list(lists)


def split(
    operation: str, argument: str, tensor: torch.Tensor, sizes: Sequence[int], count: int
) -> list[torch.Tensor]:
    """Return ``count`` parts of a contiguous tensor along its first dimension; views of it.

    Args:
        operation: The operation, for messages.
        argument: The argument, for messages.
        tensor: The tensor.
        sizes: The length of each part, or nothing for equal parts.
        count: The number of ranks.

    Raises:
        ShapeError: The sizes are not those of ``count`` parts of the tensor.
    """
    length = tensor.size(0) if tensor.dim() else 0
    if not sizes:
        if length % count:
            raise ShapeError(
                f"{operation}: {argument}: length {length} cannot be shared by {count} ranks equally"
            )
        return list(torch.split(tensor, length // count)) if length else [tensor] * count
    if len(sizes) != count or sum(sizes) != length or min(sizes) < 0:
        raise ShapeError(
            f"{operation}: {argument}: expected the lengths of {count} parts of {length} in all, got {list(sizes)}"
        )
    return list(torch.split(tensor, list(sizes)))


def options(kind: Any, given: Any, timeout: timedelta | None = None, **short: Any) -> Any:
    """Return options of a kind.

    Args:
        kind: The class of the options.
        given: They themselves, or the value of the first of ``short``, or None.
        timeout: How long the call may wait for other ranks; None for as long as the process group's calls do.
        **short: Values of attributes; None where it is not given.
    """
    if isinstance(given, kind):
        return given
    made = kind()
    if given is not None:
        short[next(iter(short))] = given
    for name, value in short.items():
        if value is not None:
            setattr(made, name, value)
    if timeout is not None:
        made.timeout = timeout
    return made
