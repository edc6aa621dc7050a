"""What moves in the operations of a process group that are not one call of a Group, those of sparse tensors too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch

from colltensor.errors import (
    AliasError,
    MismatchError,
    OptionError,
    ShapeError,
    UnsupportedTensorError,
)
from colltensor.group import Group
from colltensor.torch.c10d.tensors import flat
from colltensor.types import ReduceOp

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
    """Write the averages of integers or bools as NCCL makes them: the sum, divided, and rounded towards zero.

    Sums of less than 64 bits do not overflow; of bools an element is true where it is on all ranks.

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
    """Copy every rank's ``source`` into its row of ``output``, whose row of this rank may be ``source`` itself."""
    target = flat(output)
    group.allgather(target, source)
    if target is not output:
        output.copy_(target)


def reduce_parts(
    group: Group, target: torch.Tensor, sources: list[torch.Tensor], op: ReduceOp
) -> None:
    """Combine all ranks' source of each rank into that rank's ``target``, which may share memory with the sources.

    The sources of different ranks may differ in length, the same way on all ranks.
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
        apart = torch.empty_like(target, memory_format=torch.contiguous_format)
        group.reducescatter(apart, sources, op)
        target.copy_(apart)


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
    """Copy ``sources[r]`` into rank r's target of this rank, in pairs, because the sizes may differ from pair to pair.

    Args:
        group: The group.
        output: Gets ``buffer``'s elements in the end, or None.
        buffer: What ``targets`` are views of, or None.
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
    """Sum sparse COO tensors of all ranks, which may have different elements; in place, and coalesced.

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
