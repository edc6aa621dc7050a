"""From torch's arguments to payloads: reduce ops, options and tensors.

It also has the operations of more than one call of a Group: averages of integers, parts of unequal
sizes and sparse tensors. No single call makes those. Tensors travel without autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist

from colltensor.errors import (
    AliasError,
    MismatchError,
    OptionError,
    ShapeError,
    UnsupportedTensorError,
)
from colltensor.group import Group
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
    """Return the same memory without autograd and subclass: torch's backends only write."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor if tensor.__class__ in _BARE else tensor.as_subclass(torch.Tensor)


def apart(value: Any) -> Any:
    """Return a call's arguments with tensors of their own on the same memory.

    Those within lists and tuples are replaced, too. Between the issue of a call and its run, the
    autograd function around a functional collective changes the tensor that it returns. It makes it
    require grad.
    """
    if isinstance(value, torch.Tensor):  # a sparse one would get its new elements alone
        return value.detach() if value.layout is torch.strided else value
    return type(value)(map(apart, value)) if value.__class__ in (list, tuple) else value


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor if it is contiguous, else memory of its shape that is."""
    if tensor.is_contiguous():
        return tensor
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def only(operation: str, argument: str, tensors: Any) -> torch.Tensor:
    """Return the one tensor of an argument in which torch can give several, or the tensor itself.

    torch gives several for several devices.

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
    """Return the one list of tensors where torch can give several lists, or the list itself.

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
        timeout: How long the call may wait for other ranks; None for as long as the process group's
            calls do.
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


_WIDE: Final = (torch.int64, torch.uint64)


def one_by_one(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> None:
    """Call ``function`` with each tuple of arguments."""
    for arguments in calls:
        function(*arguments)


def is_integral(tensor: torch.Tensor) -> bool:
    """Return whether an average of such tensors is one of integers, which no ``Group`` makes."""
    return not tensor.is_floating_point() and not tensor.is_complex()


def average(
    group: Group, name: str, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]
) -> None:
    """Write the averages of integers or bools as NCCL makes them.

    The sum is divided, and rounded towards zero. Sums of less than 64 bits do not overflow. Of
    bools an element is true where it is on all ranks.

    Args:
        group: The group.
        name: The operation with what the ranks must agree on.
        targets: What the sources' averages go to, as many; empty on a rank that gets none.
        sources: This rank's tensors. They stay as they are.
    """
    sums = [
        source.clone() if source.dtype in _WIDE else source.to(torch.int64) for source in sources
    ]
    # The ranks compare paths: so an average does not meet a sum, or integers of another width.
    group.allreduce(
        {f"{name} average {source.dtype} {at}": sums[at] for at, source in enumerate(sources)}
    )

    for target, total in zip(targets, sums, strict=False):
        if total.dtype is torch.uint64:  # which torch cannot divide
            quotient = total.numpy()
            quotient //= group.world_size
        else:
            total.div_(group.world_size, rounding_mode="trunc")
        target.copy_(total.view(target.shape))


def reduce_all(group: Group, tensors: Sequence[torch.Tensor]) -> None:
    """Average tensors over all ranks, of which some are integers."""
    integral = [tensor for tensor in tensors if is_integral(tensor)]
    others = [tensor for tensor in tensors if not is_integral(tensor)]
    if others:
        group.allreduce(others, ReduceOp.AVERAGE)
    average(group, "allreduce", integral, integral)


def reduce_to(group: Group, tensor: torch.Tensor, root: int) -> None:
    """Average integers over all ranks into the root's."""
    average(group, f"reduce to {root}", [tensor] if group.rank == root else [], [tensor])


def gather_rows(group: Group, output: torch.Tensor, source: torch.Tensor) -> None:
    """Copy every rank's ``source``, which may be its row of ``output``, into its row there."""
    target = flat(output)
    group.allgather(target, source)
    if target is not output:
        output.copy_(target)


def reduce_parts(
    group: Group, target: torch.Tensor, sources: list[torch.Tensor], op: ReduceOp
) -> None:
    """Combine all ranks' source of each rank into that rank's ``target``.

    The target may share memory with the sources. The sources of different ranks may differ in
    length, the same way on all ranks.
    """
    uneven = any(source.numel() != sources[0].numel() for source in sources)
    if (
        uneven
        and len(sources) == group.world_size
        and not (op is ReduceOp.AVERAGE and is_integral(target))
    ):
        _reduce_one_by_one(group, target, sources, op)
        return
    _reduce(group, target, sources, op)


def reduce_rows(group: Group, target: torch.Tensor, source: torch.Tensor, op: ReduceOp) -> None:
    """Combine all ranks' row of each rank of ``source`` into that rank's ``target``."""
    _reduce(group, target, source.contiguous(), op)


def _reduce(group: Group, target: torch.Tensor, sources: Any, op: ReduceOp) -> None:
    if op is ReduceOp.AVERAGE and is_integral(target):
        _average_parts(group, target, sources)
        return
    try:
        group.reducescatter(target, sources, op)
    except AliasError:  # found before anything moved
        own = torch.empty_like(target, memory_format=torch.contiguous_format)
        group.reducescatter(own, sources, op)
        target.copy_(own)


def _average_parts(group: Group, target: torch.Tensor, sources: Any) -> None:
    """Average all ranks' integers; each takes its part. Rare enough that all get all of it."""
    if isinstance(sources, torch.Tensor):
        if sources.numel() != target.numel() * group.world_size:
            raise ShapeError(
                f"reduce_scatter: group '{group.name}' (rank {group.rank}): expected an input of {group.world_size} "
                f"times {target.numel()} elements, got {sources.numel()}"
            )
        sources = sources.reshape(group.world_size, -1).unbind()

    if len(sources) != group.world_size or sources[group.rank].numel() != target.numel():
        raise ShapeError(
            f"reduce_scatter: group '{group.name}' (rank {group.rank}): expected an input of each of "
            f"{group.world_size} ranks, this one's of {target.numel()} elements, got "
            f"{[source.numel() for source in sources]}"
        )

    results = [
        torch.empty_like(source, memory_format=torch.contiguous_format) for source in sources
    ]
    average(group, "reduce_scatter", results, sources)
    target.copy_(results[group.rank].view(target.shape))


def _reduce_one_by_one(
    group: Group, target: torch.Tensor, sources: list[torch.Tensor], op: ReduceOp
) -> None:
    mine = sources[group.rank]
    if mine.numel() != target.numel():
        raise ShapeError(
            f"reduce_scatter: group '{group.name}' (rank {group.rank}): expected an output of {mine.numel()} elements, "
            f"as this rank's entry of the inputs has, got {target.numel()}"
        )
    combined = mine.clone(memory_format=torch.contiguous_format)
    for root, source in enumerate(sources):
        group.reduce(combined if root == group.rank else source, root, op)
    target.copy_(combined.view_as(target))


def exchange(
    group: Group,
    output: torch.Tensor | None,
    buffer: torch.Tensor | None,
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
) -> None:
    """Copy ``sources[r]`` into rank r's target of this rank, in pairs.

    It goes in pairs because the sizes may differ from pair to pair.

    Args:
        group: The group.
        output: Gets ``buffer``'s elements in the end, or None.
        buffer: The tensor that ``targets`` are views of, or None.
        targets: What this rank gets from each rank.
        sources: What this rank gives each rank.
    """
    rank, size = group.rank, group.world_size
    if len(targets) != size or len(sources) != size:
        raise ShapeError(
            f"all-to-all: group '{group.name}' (rank {rank}): expected {size} inputs and outputs, one for each rank, "
            f"got {len(sources)} and {len(targets)}"
        )
    if targets[rank].numel() != sources[rank].numel():
        raise ShapeError(
            f"all-to-all: group '{group.name}' (rank {rank}): this rank gives itself {sources[rank].numel()} elements "
            f"and gets {targets[rank].numel()}"
        )

    targets[rank].copy_(sources[rank].view_as(targets[rank]))
    for step in range(1, size):
        to, of = (rank + step) % size, (rank - step) % size
        group.sendrecv(sources[to], to, targets[of], of)
    if output is not None and buffer is not None:
        output.copy_(buffer)


def allreduce_sparse(group: Group, tensor: torch.Tensor, op: ReduceOp) -> None:
    """Sum sparse COO tensors of all ranks, which may have different elements.

    It works in place; the result is coalesced.

    Raises:
        OptionError: Another op than SUM.
        UnsupportedTensorError: Another layout.
        MismatchError: The shapes differ; on every rank, nothing was changed.
    """
    if op is not ReduceOp.SUM:
        raise OptionError(
            f"allreduce: op: a sparse tensor has SUM only, got {op.name}; use a dense one"
        )
    if tensor.layout is not torch.sparse_coo:
        raise UnsupportedTensorError(
            f"allreduce: tensor: layout {tensor.layout} is not supported; use sparse COO"
        )

    mine = tensor.coalesce()
    indices, values = mine.indices(), mine.values()
    counts = _element_counts(group, mine)
    most = max(counts)
    # an element a row, to be padded below
    all_indices = _gather(group, indices.t().contiguous(), most)
    all_values = _gather(group, values.contiguous(), most)

    # In the order of the ranks, so that all get the same bits.
    total = None
    for count, place, value in zip(counts, all_indices, all_values, strict=True):
        part = torch.sparse_coo_tensor(place[:count].t(), value[:count], mine.shape)
        total = part if total is None else total + part
    assert total is not None
    tensor.copy_(total.coalesce())


def _element_counts(group: Group, tensor: torch.Tensor) -> list[int]:
    """Return how many elements each rank has, once the ranks agree on the shape."""
    shapes = group.allgather_object(
        (tuple(tensor.shape), tensor.sparse_dim(), str(tensor.dtype), tensor._nnz())
    )
    for rank, described in enumerate(shapes):
        if described[:3] != shapes[0][:3]:
            raise MismatchError(
                f"allreduce of sparse tensors: group '{group.name}' (rank {group.rank}): rank {rank} has shape, sparse "
                f"dimensions and dtype {described[:3]}, rank 0 {shapes[0][:3]}",
                (0, rank),
            )
    return [described[3] for described in shapes]


def _gather(group: Group, tensor: torch.Tensor, length: int) -> list[torch.Tensor]:
    """Return all ranks' tensors, each with ``length`` rows."""
    padded = tensor.new_zeros((length, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    return list(
        group.allgather([torch.empty_like(padded) for _ in range(group.world_size)], padded)
    )
