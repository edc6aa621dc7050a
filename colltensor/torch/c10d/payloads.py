"""What moves in the operations of a process group that are not one call of a Group.

Imports torch, and of the package errors and group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from colltensor.errors import AliasError, ShapeError
from colltensor.group import Group
from colltensor.torch.c10d.tensors import flat
from colltensor.types import ReduceOp


def one_by_one(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> None:
    """Call ``function`` with each tuple of arguments."""
    for arguments in calls:
        function(*arguments)


def gather_rows(group: Group, output: torch.Tensor, source: torch.Tensor) -> None:
    """Copy every rank's ``source`` into its row of ``output``, whose row of this rank may be ``source`` itself."""
    target = flat(output)
    group.allgather(target, source)
    if target is not output:
        output.copy_(target)


def reduce_parts(group: Group, target: torch.Tensor, sources: list[torch.Tensor], op: ReduceOp) -> None:
    """Combine all ranks' source of each rank into that rank's ``target``, which may share memory with the sources.

    The sources of different ranks may differ in length, the same way on all ranks.
    """
    if any(source.numel() != sources[0].numel() for source in sources) and len(sources) == group.world_size:
        _reduce_one_by_one(group, target, sources, op)
        return
    _reduce(group, target, sources, op)


def reduce_rows(group: Group, target: torch.Tensor, source: torch.Tensor, op: ReduceOp) -> None:
    """Combine all ranks' row of each rank of ``source`` into that rank's ``target``."""
    _reduce(group, target, source.contiguous(), op)


def _reduce(group: Group, target: torch.Tensor, sources: Any, op: ReduceOp) -> None:
    try:
        group.reducescatter(target, sources, op)
    except AliasError:  # found before anything moved
        apart = torch.empty_like(target, memory_format=torch.contiguous_format)
        group.reducescatter(apart, sources, op)
        target.copy_(apart)


def _reduce_one_by_one(group: Group, target: torch.Tensor, sources: list[torch.Tensor], op: ReduceOp) -> None:
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
    group: Group, output: torch.Tensor | None, buffer: torch.Tensor | None, targets: Sequence[torch.Tensor],
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
