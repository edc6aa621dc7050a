"""A tensor that is sent and received into at once: scatter, reducescatter and sendrecv, on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from oracle import Array
from pool import RankPool
from worlds import World

import colltensor as col

COUNTS = (1, 5, 700, 300_001)


def values(rank: int, part: int, count: int) -> Array:
    return (np.arange(count) % 7 + 10 * rank + part).astype(np.float32)


def rows(rank: int, size: int, count: int) -> Array:
    return np.stack([values(rank, part, count) for part in range(size)])


def finish(work: Any, async_op: bool) -> Any:
    return work.wait() if async_op else work


def scatter(group: Any, count: int, as_list: bool, async_op: bool, strided: bool) -> None:
    rank, size = group.rank, group.world_size
    for root in range(size):
        x = given = rows(rank, size, 2 * count)[:, ::2] if strided else rows(rank, size, count)
        before = x.copy()
        if as_list:
            given = list(x)
        finish(
            group.scatter(x[rank], given if rank == root else None, root, async_op=async_op),
            async_op,
        )
        got = (rows(root, size, 2 * count)[:, ::2] if strided else rows(root, size, count))[rank]
        assert np.array_equal(x[rank], got)
        assert np.array_equal(np.delete(x, rank, 0), np.delete(before, rank, 0))


def reducescatter(group: Any, count: int, as_list: bool, async_op: bool, strided: bool) -> None:
    rank, size = group.rank, group.world_size
    everything = [rows(other, size, 2 * count if strided else count) for other in range(size)]
    x = everything[rank].copy()
    if strided:
        everything, x = [each[:, ::2] for each in everything], x[:, ::2]
    before = x.copy()
    given = list(x) if as_list else x
    finish(group.reducescatter(x[rank], given, col.ReduceOp.SUM, async_op=async_op), async_op)
    assert np.array_equal(x[rank], sum(everything)[rank])
    assert np.array_equal(np.delete(x, rank, 0), np.delete(before, rank, 0))


def sendrecv(group: Any, count: int, as_list: bool, async_op: bool, strided: bool) -> None:
    rank, size = group.rank, group.world_size
    x = values(rank, 0, 2 * count)[:: 2 if strided else 1]
    to, of = (rank + 1) % size, (rank - 1) % size
    finish(group.sendrecv(x, to, x, of, async_op=async_op), async_op)
    assert np.array_equal(x, values(of, 0, 2 * count)[:: 2 if strided else 1])


def work_in_place(rank: int, world_size: int, world: World) -> None:
    group = world.group()
    for operation in (scatter, reducescatter, sendrecv):
        for count in COUNTS:
            for as_list, async_op, strided in (
                (True, False, False),
                (False, True, False),
                (True, False, True),
            ):
                operation(group, count, as_list, async_op, strided)
    x = rows(rank, world_size, 4)
    with pytest.raises(col.OptionError, match="copy=False"):
        group.reducescatter(x[rank], list(x), copy=False)
    if world_size > 1:
        with pytest.raises(col.AliasError):  # it reaches into another entry
            group.reducescatter(x.reshape(-1)[1:5], list(x))


def test_a_tensor_may_be_sent_and_received_into(pool: RankPool, world: World) -> None:
    pool.run(world.size, work_in_place, world)
