"""Point-to-point calls of a group whose ends prepare their trees differently."""

from __future__ import annotations

import numpy as np
import pytest
from pool import RankPool, group_of

import colltensor as col

pytestmark = pytest.mark.gloo


def tree(value: float) -> list[np.ndarray]:
    return [np.full(4, value), np.full(3, value)]


def one_end_fuses(rank: int, world_size: int, provider: str) -> tuple[str, list[list[float]]]:
    group = group_of(world_size, "gloo", provider)
    with pytest.raises(col.MismatchError) as caught:
        group.send(tree(1.0), 1, copy=False) if rank == 0 else group.recv(tree(0.0), 0)
    result = group.send(tree(2.0), 1) if rank == 0 else group.recv(tree(0.0), 0)
    return str(caught.value), [leaf.tolist() for leaf in result]


def one_tensor(rank: int, world_size: int, provider: str) -> list[float]:
    group = group_of(world_size, "gloo", provider)
    values = np.full(4, rank + 1.0)
    return (group.send(values, 1, copy=False) if rank == 0 else group.recv(values, 0)).tolist()


def test_ends_that_fuse_differently_disagree_before_anything_moves(
    pool: RankPool, provider: str
) -> None:
    for words, leaves in pool.run(2, one_end_fuses, provider):
        assert "copy=False" in words
        assert leaves == [[2.0] * 4, [2.0] * 3]


def test_copy_false_on_one_end_is_no_matter_for_one_tensor(pool: RankPool, provider: str) -> None:
    assert pool.run(2, one_tensor, provider) == [[1.0] * 4] * 2
