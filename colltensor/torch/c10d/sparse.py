"""The allreduce of sparse tensors: every rank gets all ranks' elements and adds them in rank order."""

from __future__ import annotations

import torch

from colltensor.errors import MismatchError, OptionError, UnsupportedTensorError
from colltensor.group import Group
from colltensor.types import ReduceOp


def allreduce(group: Group, tensor: torch.Tensor, op: ReduceOp) -> None:
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
