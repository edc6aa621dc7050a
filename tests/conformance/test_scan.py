"""scan: every op on every dtype, layouts, trees, in rank order, with the bits of the reference."""

from __future__ import annotations

import numpy as np
import pytest
from oracle import combined
from pool import RankPool
from samples import Sample, dense, library_for
from test_reductions import SMALL, inputs_of, pairs
from worlds import Report, World

import colltensor as col


def scan_all(rank: int, world_size: int, world: World, libraries: tuple[str, ...]) -> None:
    group = world.group()
    report = Report(group)
    for dtype, op in pairs():
        library = library_for(libraries, rank, dtype, dense(SMALL))
        if library is None:
            continue
        with report.case("scan", dtype, op):
            inputs = inputs_of(world_size, dtype, SMALL)
            sample = Sample(library, dtype, dense(SMALL), inputs[rank])
            result = group.scan(sample.tensor, col.ReduceOp[op])
            sample.check_result(result, *combined(dtype, op, inputs[: rank + 1]))
    report.done()


def test_scan_of_every_pair(pool: RankPool, world: World, arrays: tuple[str, ...]) -> None:
    pool.run(world.size, scan_all, world, arrays)


def scan_others(rank: int, world_size: int, world: World) -> None:
    group = world.group()
    upto = np.arange(rank + 1)

    # strided, empty, larger than a block, a tree, a number, asynchronous
    strided = np.full((3, 8), float(rank))[:, ::2]
    assert group.scan(strided) is strided
    assert (strided == upto.sum()).all()
    assert group.scan(np.empty(0)).size == 0
    large = np.full(3_000_001, rank + 1, np.float32)
    assert (group.scan(large, col.ReduceOp.MAX) == rank + 1).all()
    tree = {"a": np.ones(3), "b": [np.full((2, 2), rank, np.int64)]}
    assert group.scan(tree)["a"].tolist() == [rank + 1.0] * 3
    assert (tree["b"][0] == upto.sum()).all()
    assert group.scan(2) == 2 * (rank + 1)
    work = group.scan(np.ones(2), async_op=True)
    assert work.result().tolist() == [rank + 1.0] * 2

    # a scan is no allreduce, and its counts are compared
    if world_size > 1:
        for call in (
            lambda: group.scan(np.ones(2 + rank)),
            lambda: (group.allreduce if rank else group.scan)(np.ones(2)),
        ):
            with pytest.raises(col.MismatchError, match="scan"):
                call()
    assert group.scan(np.ones(1))[0] == rank + 1


def test_scan_of_other_arguments(pool: RankPool, world: World) -> None:
    pool.run(world.size, scan_others, world)


@pytest.mark.gloo
@pytest.mark.shm
def test_scan_between_hosts(pool: RankPool, arrays: tuple[str, ...]) -> None:
    world = World(3, "hierarchical", None, "aab")
    pool.run(world.size, scan_all, world, arrays)
    pool.run(world.size, scan_others, world)
