"""Strided tensors: the right answer in row-major order, and not a byte between the elements touched."""

from __future__ import annotations

import numpy as np
import pytest
from oracle import combined, moved, reduced
from pool import RankPool
from samples import EMPTY, LAYOUTS, SCALARS, Layout, Sample, dense, library_for
from test_moves import OPERATIONS, Mover
from worlds import Report, Transport, World, assert_same_bits

import colltensor as col

REDUCTIONS = (
    ("float32", "SUM"),
    ("bfloat16", "MAX"),
    ("int64", "MIN"),
    ("bool", "SUM"),
    ("complex64", "SUM"),
)


def layouts_of_all(libraries: tuple[str, ...]) -> list[tuple[int, Layout]]:
    return list(enumerate((*LAYOUTS, *SCALARS, *EMPTY)))


def work_on_layouts(
    rank: int, world_size: int, world: World, libraries: tuple[str, ...]
) -> dict[str, str]:
    group = world.group()
    report = Report(group)
    for number, layout in layouts_of_all(libraries):
        dtype, op = REDUCTIONS[number % len(REDUCTIONS)]
        library = library_for(libraries, rank, dtype, layout)
        if library is None:
            continue
        inputs = [reduced(dtype, layout.count, peer) for peer in range(world_size)]
        expected, tolerance = combined(dtype, op, inputs)
        with report.case("allreduce", layout.name, dtype) as name:
            sample = Sample(library, dtype, layout, inputs[rank])
            got = sample.check_result(
                group.allreduce(sample.tensor, col.ReduceOp[op]), expected, tolerance
            )
            report.same_everywhere(name, got.tobytes())
        with report.case("reduce", layout.name, dtype):
            sample = Sample(library, dtype, layout, inputs[rank])
            result = group.reduce(sample.tensor, number % world_size, col.ReduceOp[op])
            if rank == number % world_size:
                sample.check_result(result, expected, tolerance)
            else:
                sample.check_untouched()
        with report.case("reducescatter", layout.name, dtype):
            source = Sample(library, dtype, layout, inputs[rank])
            target = Sample(library, dtype, layout, inputs[rank])
            result = group.reducescatter(
                target.tensor, [source.tensor] * world_size, col.ReduceOp[op]
            )
            target.check_result(result, expected, tolerance)
            source.check_untouched()
        for operation in OPERATIONS:
            with report.case(operation.__name__, layout.name, dtype):
                operation(Mover(group, libraries, dtype, layout), number % world_size)
    return report.done()


def test_every_operation_on_every_layout(
    pool: RankPool, world: World, arrays: tuple[str, ...]
) -> None:
    assert_same_bits(pool.run(world.size, work_on_layouts, world, arrays))


def meet_with_different_layouts(
    rank: int, world_size: int, world: World, libraries: tuple[str, ...]
) -> dict[str, str]:
    """Rank r brings layout r + n: elements are matched by row-major index, shapes are not compared."""
    group = world.group()
    report = Report(group)
    for number in range(len(LAYOUTS)):
        layout = LAYOUTS[(number + 2 * rank) % len(LAYOUTS)]
        library = library_for(libraries, rank, "float64", layout)
        assert library is not None
        inputs = [reduced("float64", 24, peer, number) for peer in range(world_size)]
        with report.case("allreduce", number, layout.name) as name:
            sample = Sample(library, "float64", layout, inputs[rank])
            got = sample.check_result(
                group.allreduce(sample.tensor), *combined("float64", "SUM", inputs)
            )
            report.same_everywhere(str(number), got.tobytes())
        with report.case("broadcast", number, layout.name) as name:
            sample = Sample(library, "float64", layout, moved("float64", 24, rank))
            result = group.broadcast(sample.tensor, 1)
            if rank != 1:
                got = sample.check_result(result, moved("float64", 24, 1))
        assert name
    return report.done()


@pytest.mark.parametrize("size", [2, 4])
def test_layouts_that_differ_between_ranks(
    pool: RankPool, transport: Transport, size: int, libraries: tuple[str, ...]
) -> None:
    order = ("numpy", *(name for name in libraries if name != "numpy"))
    assert_same_bits(pool.run(size, meet_with_different_layouts, World(size, *transport), order))


def mix_layouts_within_a_call(rank: int, world_size: int, world: World) -> None:
    """The entries of one list lie differently."""
    group = world.group()
    layouts = (LAYOUTS[2 + rank], LAYOUTS[4], LAYOUTS[0], LAYOUTS[8])[:world_size]
    targets = [Sample("numpy", "int16", layout, moved("int16", 24, 77)) for layout in layouts]
    sources = [
        Sample("numpy", "int16", layout, moved("int16", 24, rank, part))
        for part, layout in enumerate(layouts)
    ]
    group.alltoall([target.tensor for target in targets], [source.tensor for source in sources])
    for peer, target in enumerate(targets):
        target.check_result(target.tensor, moved("int16", 24, peer, rank))
        sources[peer].check_untouched()


def test_entries_of_a_list_may_lie_differently(pool: RankPool, world: World) -> None:
    pool.run(world.size, mix_layouts_within_a_call, world)


def reduce_rows_of_one_matrix(rank: int, world_size: int, world: World) -> None:
    """Two interleaved columns of one memory in one list: no overlap, whatever their bounds say."""
    group = world.group()
    matrix = np.arange(20.0).reshape(10, 2) + 100 * rank
    mine = matrix[:, 0].copy()
    group.allreduce({"even": matrix[:, 0], "odd": matrix[:, 1]})
    expected = sum(np.arange(20.0).reshape(10, 2) + 100 * peer for peer in range(world_size))
    assert (matrix == expected).all()
    assert mine[0] == 100 * rank


def test_interleaved_leaves_do_not_overlap(pool: RankPool, world: World) -> None:
    pool.run(world.size, reduce_rows_of_one_matrix, world)


def stride_over_many_megabytes(rank: int, world_size: int, world: World) -> None:
    group = world.group()
    layout = Layout("large-strided", (3, 1_000_003), (2_000_010, 2), 1, 6_000_030)
    count = layout.count
    inputs = [reduced("float32", count, peer) for peer in range(world_size)]
    sample = Sample("numpy", "float32", layout, inputs[rank])
    sample.check_result(group.allreduce(sample.tensor), *combined("float32", "SUM", inputs))
    assert dense(3).dense


def test_a_large_strided_tensor(pool: RankPool, transport: Transport) -> None:
    pool.run(2, stride_over_many_megabytes, World(2, *transport))
