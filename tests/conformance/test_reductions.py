"""allreduce, reduce and reducescatter: every op on every dtype, sizes, NaN, and the same bits on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from oracle import FLOATS, REDUCIBLE, Array, assert_values, combined, numpy_dtype, ops_of, reduced
from pool import RankPool
from samples import Layout, Sample, dense, library_for
from worlds import Report, Transport, World, assert_same_bits

import colltensor as col
from colltensor.backends.gloo.backend import DIRECT_NBYTES
from colltensor.backends.gloo.composed import BLOCK_NBYTES

SMALL, MIDDLE = 7, 5003
"""Elements: what goes in one step to everyone, and what is divided between the ranks."""
LARGE_NBYTES = BLOCK_NBYTES + (1 << 20) + 24
"""More than a block of the composed reductions."""
LARGE = {2: (("float32", "SUM"), ("bfloat16", "SUM")), 3: (("float32", "MAX"), ("int16", "SUM"))}


def pairs() -> Iterator[tuple[str, str]]:
    """Every dtype with every op that is defined for it."""
    for dtype in REDUCIBLE:
        for op in ops_of(dtype):
            yield dtype, op


def all_cases() -> Iterator[tuple[str, str, int]]:
    """Every pair at a few elements, some at none, at one and at many."""
    for number, (dtype, op) in enumerate(pairs()):
        yield dtype, op, SMALL
        if number % 5 == 0:
            yield dtype, op, 0
            yield dtype, op, 1
        if number % 4 == 0 or op == "AVERAGE":
            yield dtype, op, MIDDLE


def some_cases(libraries: tuple[str, ...]) -> list[tuple[str, str, int]]:
    """All cases for numpy and for the mix; every third for one other library, whose memory is handled alike."""
    step = 1 if libraries == ("numpy",) or len(libraries) > 1 else 3
    return list(all_cases())[::step]


def inputs_of(world_size: int, dtype: str, count: int, salt: int = 0) -> list[Array]:
    return [reduced(dtype, count, rank, salt) for rank in range(world_size)]


def check_allreduce(
    group: Any, report: Report, name: str, library: str, dtype: str, op: str, inputs: list[Array]
) -> None:
    sample = Sample(library, dtype, dense(len(inputs[0])), inputs[group.rank])
    result = group.allreduce(sample.tensor, col.ReduceOp[op])
    got = sample.check_result(result, *combined(dtype, op, inputs))
    report.same_everywhere(name, got.tobytes())


def allreduce_all(
    rank: int, world_size: int, world: World, libraries: tuple[str, ...]
) -> dict[str, str]:
    group = world.group()
    report = Report(group)
    for dtype, op, count in all_cases():
        library = library_for(libraries, rank, dtype, dense(count))
        if library is not None:
            with report.case("allreduce", dtype, op, count) as name:
                check_allreduce(
                    group, report, name, library, dtype, op, inputs_of(world_size, dtype, count)
                )
    return report.done()


def test_allreduce_of_every_pair(pool: RankPool, world: World, arrays: tuple[str, ...]) -> None:
    assert_same_bits(pool.run(world.size, allreduce_all, world, arrays))


def allreduce_in_steps(rank: int, world_size: int, world: World) -> dict[str, str]:
    """Just more than what Gloo's composed reductions take, and than shared memory takes in one step."""
    group = world.group()
    report = Report(group)
    for dtype, op in pairs():
        count = DIRECT_NBYTES // numpy_dtype(dtype).itemsize + 1003
        inputs = inputs_of(world_size, dtype, count)
        with report.case("allreduce", dtype, op, count) as name:
            check_allreduce(group, report, name, "numpy", dtype, op, inputs)
    return report.done()


@pytest.mark.parametrize("size", [2, 3])
def test_allreduce_of_every_pair_in_more_than_one_step(
    pool: RankPool, transport: Transport, size: int
) -> None:
    world = World(size, *transport)
    assert_same_bits(pool.run(size, allreduce_in_steps, world, timeout_s=90))


def reduce_all(
    rank: int, world_size: int, world: World, libraries: tuple[str, ...]
) -> dict[str, str]:
    group = world.group()
    report = Report(group)
    for number, (dtype, op, count) in enumerate(some_cases(libraries)):
        library = library_for(libraries, rank, dtype, dense(count))
        if library is None:
            continue
        root = number % world_size
        with report.case("reduce", dtype, op, count, "to", root):
            inputs = inputs_of(world_size, dtype, count, salt=1)
            sample = Sample(library, dtype, dense(count), inputs[rank])
            result = group.reduce(sample.tensor, root, col.ReduceOp[op])
            if rank == root:
                sample.check_result(result, *combined(dtype, op, inputs))
            else:
                assert result is sample.tensor
                sample.check_untouched()
    return report.done()


def test_reduce_of_every_pair(pool: RankPool, world: World, arrays: tuple[str, ...]) -> None:
    pool.run(world.size, reduce_all, world, arrays)


def reducescatter_all(
    rank: int, world_size: int, world: World, libraries: tuple[str, ...]
) -> dict[str, str]:
    group = world.group()
    report = Report(group)
    for dtype, op, count in some_cases(libraries):
        library = library_for(libraries, rank, dtype, dense(count))
        if library is None:
            continue
        with report.case("reducescatter", dtype, op, count):
            everyone = range(world_size)
            given = [
                [reduced(dtype, count, peer, 10 + part) for part in everyone] for peer in everyone
            ]
            sources = [Sample(library, dtype, dense(count), values) for values in given[rank]]
            target = Sample(library, dtype, dense(count), reduced(dtype, count, rank, 99))
            result = group.reducescatter(
                target.tensor, [source.tensor for source in sources], col.ReduceOp[op]
            )
            expected, tolerance = combined(dtype, op, [parts[rank] for parts in given])
            target.check_result(result, expected, tolerance)
            for source in sources:
                source.check_untouched()
    return report.done()


def test_reducescatter_of_every_pair(pool: RankPool, world: World, arrays: tuple[str, ...]) -> None:
    pool.run(world.size, reducescatter_all, world, arrays)


def reduce_large(rank: int, world_size: int, world: World) -> dict[str, str]:
    group = world.group()
    report = Report(group)
    for dtype, op in LARGE[world_size]:
        count = LARGE_NBYTES // numpy_dtype(dtype).itemsize + 1
        inputs = inputs_of(world_size, dtype, count)
        expected, tolerance = combined(dtype, op, inputs)
        with report.case("allreduce of", count, dtype, op) as name:
            sample = Sample("numpy", dtype, dense(count), inputs[rank])
            got = sample.check_result(
                group.allreduce(sample.tensor, col.ReduceOp[op]), expected, tolerance
            )
            report.same_everywhere(name, got.tobytes())
        with report.case("reduce of", count, dtype, op):
            sample = Sample("numpy", dtype, dense(count), inputs[rank])
            group.reduce(sample.tensor, world_size - 1, col.ReduceOp[op])
            if rank == world_size - 1:
                sample.check_result(sample.tensor, expected, tolerance)
            else:
                sample.check_untouched()
        with report.case("reducescatter of", count, dtype, op):
            sample = Sample("numpy", dtype, dense(count), inputs[rank])
            target = np.empty(count, numpy_dtype(dtype))
            group.reducescatter(target, [sample.tensor] * world_size, col.ReduceOp[op])
            sample.check_untouched()
            assert_values(target, expected, tolerance)
    return report.done()


@pytest.mark.parametrize("size", [2, 3])
def test_more_than_one_block(pool: RankPool, transport: Transport, size: int) -> None:
    assert_same_bits(pool.run(size, reduce_large, World(size, *transport), timeout_s=90))


def special_values(dtype: str, rank: int, world_size: int) -> Array:
    """NaN on each rank alone and on all, infinities of both signs, both zeros, among numbers unique per rank."""
    values = (np.arange(64) * 0.25 - 3 + rank).astype(np.float64)
    for culprit in range(world_size):
        if rank == culprit:
            values[[culprit, 8 + culprit]] = np.nan
            values[16 + culprit] = np.inf
            values[24 + culprit] = -np.inf
    values[40] = np.nan
    values[41] = np.inf if rank % 2 else -np.inf
    values[42:46] = 0.0 if rank % 2 else -0.0
    values[46:50] = -0.0 if rank % 2 else 0.0
    return values.astype(numpy_dtype(dtype))


def reduce_specials(
    rank: int, world_size: int, world: World, libraries: tuple[str, ...]
) -> dict[str, str]:
    group = world.group()
    report = Report(group)
    layout = dense(64)
    for dtype in FLOATS:
        library = library_for(libraries, rank, dtype, layout)
        if library is None:
            continue
        for op in ("MIN", "MAX", "SUM"):
            with np.errstate(all="ignore"):
                inputs = [special_values(dtype, peer, world_size) for peer in range(world_size)]
                expected, tolerance = combined(dtype, op, inputs)
            for operation in ("allreduce", "reduce", "reducescatter"):
                with report.case(operation, dtype, op, "of special values") as name:
                    got = _reduce_by(operation, group, library, dtype, layout, inputs, op)
                    if got is not None:
                        _check_specials(got, expected, tolerance)
                        if operation == "allreduce":
                            report.same_everywhere(name, got.tobytes())
    return report.done()


def _reduce_by(
    operation: str,
    group: Any,
    library: str,
    dtype: str,
    layout: Layout,
    inputs: list[Array],
    op: str,
) -> Array | None:
    sample = Sample(library, dtype, layout, inputs[group.rank])
    reduce_op = col.ReduceOp[op]
    if operation == "allreduce":
        result = group.allreduce(sample.tensor, reduce_op)
    elif operation == "reduce":
        result = group.reduce(sample.tensor, 0, reduce_op)
        if group.rank:
            return None
    else:
        target = Sample(library, dtype, layout, np.zeros(layout.count, numpy_dtype(dtype)))
        result = group.reducescatter(target.tensor, [sample.tensor] * group.world_size, reduce_op)
    return np.asarray(
        result if library != "torch" else result.float().numpy().astype(numpy_dtype(dtype))
    )


def _check_specials(got: Array, expected: Array, tolerance: Array | None) -> None:
    """Compare as numbers: which NaN and which zero is not said."""
    got64, expected64 = got.astype(np.float64), expected.astype(np.float64)
    assert (np.isnan(got64) == np.isnan(expected64)).all(), (
        f"NaN at {np.flatnonzero(np.isnan(got64))}"
    )
    known = ~np.isnan(expected64)
    allowed = 0 if tolerance is None else np.nan_to_num(tolerance[known], posinf=0)
    difference = np.where(
        got64[known] == expected64[known], 0, np.abs(got64[known] - expected64[known])
    )
    assert (difference <= allowed).all(), f"{got64[known]} instead of {expected64[known]}"


def test_nan_infinity_and_zero(pool: RankPool, world: World, arrays: tuple[str, ...]) -> None:
    assert_same_bits(pool.run(world.size, reduce_specials, world, arrays))


def accumulate_halves(rank: int, world_size: int, world: World) -> list[list[float]]:
    """Sums whose addends each vanish if every step is rounded to 16 bits."""
    group = world.group()
    results = []
    for dtype, big, little in (("float16", 2048.0, 0.75), ("bfloat16", 256.0, 0.75)):
        for count in (3, 40_000):
            values = np.full(count, big if rank == 0 else little, numpy_dtype(dtype))
            results.append([float(group.allreduce(values)[0]), float(values[-1])])
    return results


@pytest.mark.parametrize("size", [4])
def test_halves_accumulate_in_float32(pool: RankPool, transport: Transport, size: int) -> None:
    for found in pool.run(size, accumulate_halves, World(size, *transport)):
        assert found == [[2050.0] * 2] * 2 + [[258.0] * 2] * 2
