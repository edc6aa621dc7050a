"""Which bits a reduction of floats has: in which order it adds, and that no way of calling it changes them.

Elements are combined in rank order, those of 16 bits in float32. Two backends have another order where rank order would
cost time: torch's and pygloo's Gloo in large allreduces of three and more ranks, hierarchical by hosts.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from oracle import COMPLEXES, FLOATS, Array, numpy_dtype, ops_of
from pool import RankPool
from test_between_hosts import PLACEMENTS, world_of
from worlds import Report, World, assert_same_bits

import colltensor as col
from colltensor.backends import is_available, reason
from colltensor.backends.gloo.backend import DIRECT_NBYTES, PIGGYBACKED_NBYTES

COUNTS = (3, 33, 5003, 120_001)
LARGE_DTYPES = ("float16", "float32", "complex64")
"""The dtypes of the larger counts, which the others would repeat."""
OPERATIONS = ("allreduce", "reduce", "reducescatter")
Call = Callable[[Array, str], Array]


def _cases() -> Iterator[tuple[str, str, str, int]]:
    for dtype in (*FLOATS, *COMPLEXES):
        for op in ops_of(dtype):
            for count in COUNTS:
                for operation in OPERATIONS:
                    if count == COUNTS[1] or (
                        operation == "allreduce" and (count < 33 or dtype in LARGE_DTYPES)
                    ):
                        yield operation, dtype, op, count


def _selected(world: World) -> list[tuple[str, str, str, int]]:
    """Return all cases where the session has everything in full, else one in so many."""
    step = (
        4
        if int(os.environ.get("COLLTENSOR_TEST_SEQUENCES") or "800") < 800
        else 3
        if world.hosts
        else 1
    )
    return list(_cases())[::step]


def _values(dtype: str, op: str, count: int, rank: int) -> Array:
    """Return subnormal, ordinary and special numbers; one zero for MIN and MAX, which are free to take either."""
    if dtype in COMPLEXES:
        real = "float32" if dtype == "complex64" else "float64"
        return _values(real, op, 2 * count, rank).view(dtype)
    generator = np.random.default_rng([rank, count, len(op)])
    kind, limits = numpy_dtype(dtype), ml_dtypes.finfo(numpy_dtype(dtype))
    least, smallest = float(limits.smallest_subnormal), float(limits.smallest_normal)
    specials = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        least,
        -3 * least,
        smallest,
        -smallest / 2,
        float(limits.max),
    ]
    with np.errstate(all="ignore"):
        tiny = generator.normal(size=count) * smallest
        ordinary = generator.normal(size=count) * 2.0 ** generator.integers(-8, 8, count)
        drawn = np.where(generator.random(count) < 0.6, tiny, ordinary)
        values = np.where(
            generator.random(count) < 0.15, generator.choice(specials, count), drawn
        ).astype(kind)
    values[0] = 3 * least * (rank + 1)
    return values + kind.type(0) if op in ("MIN", "MAX") else values


def _combine(op: str, first: Array, second: Array) -> Array:
    if op == "PRODUCT":
        return first * second
    if op in ("MIN", "MAX"):
        return np.minimum(first, second) if op == "MIN" else np.maximum(first, second)
    return first + second


def _in_order(op: str, inputs: list[Array], groups: list[list[int]]) -> Array:
    """Combine the ranks of each group in order, then the groups."""
    dtype = inputs[0].dtype
    parts = [values.view(values.real.dtype) if dtype.kind == "c" else values for values in inputs]
    wide = [part.astype(np.float32) if part.itemsize == 2 else part for part in parts]
    with np.errstate(all="ignore"):
        sums = []
        for group in groups:
            total = wide[group[0]]
            for rank in group[1:]:
                total = _combine(op, total, wide[rank])
            sums.append(total)
        result = sums[0]
        for other in sums[1:]:
            result = _combine(op, result, other)
        if op == "AVERAGE":
            result = result / result.dtype.type(len(inputs))
        return result.astype(parts[0].dtype).view(dtype)


def _bits(values: Array) -> Array:
    """Return the bits of the real numbers in an array, of every NaN the same."""
    reals = np.ascontiguousarray(values)
    reals = (reals.view(reals.real.dtype) if reals.dtype.kind == "c" else reals).copy()
    lost = np.isnan(reals)
    reals[lost] = np.nan
    return reals.view(f"uint{8 * reals.itemsize}")


def _order(world: World, operation: str, op: str, nbytes: int) -> list[list[int]] | None:
    """Return the order of a reduction, as groups of ranks; None where it is Gloo's."""
    size, ranks = world.size, [[rank] for rank in range(world.size)]
    if world.backend == "hierarchical":
        carried = (
            operation == "allreduce"
            and world.provider == "native"
            and nbytes * size <= PIGGYBACKED_NBYTES
        )
        if carried or operation == "reducescatter":
            return ranks
        return [
            [rank for rank in range(size) if world.hosts[rank] == host]
            for host in dict.fromkeys(world.hosts)
        ]
    ring = (
        world.provider in ("torch", "pygloo") and size > 2 and nbytes * (size - 1) > DIRECT_NBYTES
    )
    return None if ring and operation == "allreduce" and op not in ("MIN", "MAX") else ranks


def _run(group: Any, operation: str, values: Array, op: str) -> Array | None:
    """Make the call on the host; None where this rank has no result. Reduce-scatter: of as many copies as ranks."""
    if operation == "allreduce":
        return group.allreduce(values.copy(), col.ReduceOp[op])
    if operation == "reduce":
        result = group.reduce(values.copy(), group.world_size - 1, col.ReduceOp[op])
        return result if group.rank == group.world_size - 1 else None
    return group.reducescatter(np.empty_like(values), [values] * group.world_size, col.ReduceOp[op])


def _flushing(function: Callable[[], Any]) -> Any:
    """Run a function in a thread that flushes subnormals to zero, as after ``torch.set_flush_denormal(True)``."""
    libm = ctypes.CDLL("libm.so.6")
    place, bits = {"x86_64": (28, 0x8040)}.get(
        importlib.import_module("platform").machine(), (0, 1 << 24)
    )
    found: list[Any] = []

    def run() -> None:
        state = ctypes.create_string_buffer(64)
        libm.fegetenv(state)
        ctypes.c_uint32.from_buffer(state, place).value |= bits
        libm.fesetenv(state)
        assert not (np.full(1, np.finfo("float32").tiny, "float32") * np.float32(0.5)).any()
        found.append(function())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def _ways(
    group: Any, libraries: tuple[str, ...]
) -> list[Callable[[str, Array, str], Array | None]]:
    """Return the ways in which a rank may make a call."""
    ways: list[Callable[[str, Array, str], Array | None]] = [
        lambda operation, values, op: _run(group, operation, values, op),
        lambda operation, values, op: _flushing(lambda: _run(group, operation, values, op)),
    ]
    if "jax" not in libraries:
        return ways
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)

    def in_callback(operation: str, values: Array, op: str) -> Array | None:
        found: list[Any] = []

        def call(x: Any) -> Any:
            found.append(_run(group, operation, np.asarray(x), op))
            return values

        like = jax.ShapeDtypeStruct(values.shape, values.dtype)
        jax.jit(lambda x: jax.pure_callback(call, like, x))(values).block_until_ready()
        return found[0]

    ways.append(in_callback)
    if sys.version_info >= (3, 11) and importlib.util.find_spec("jax_tvm_ffi"):
        cj, last = importlib.import_module("colltensor.jax"), group.world_size - 1

        def jitted(operation: str, values: Array, op: str) -> Array | None:
            def call(x: Any) -> Any:
                if operation == "allreduce":
                    return cj.allreduce(x, group, col.ReduceOp[op])
                if operation == "reduce":
                    return cj.reduce(x, last, group, col.ReduceOp[op])
                return cj.reducescatter(x, group, col.ReduceOp[op])

            given = (
                np.stack([values] * group.world_size) if operation == "reducescatter" else values
            )
            result = np.asarray(jax.jit(call)(given))
            return result if operation != "reduce" or group.rank == last else None

        ways.append(jitted)
    return ways


def reduce_every_way(
    rank: int, size: int, world: World, libraries: tuple[str, ...]
) -> dict[str, str]:
    group = world.group()
    report = Report(group)
    ways = _ways(group, libraries)
    for number, (operation, dtype, op, count) in enumerate(_selected(world)):
        inputs = [_values(dtype, op, count, other) for other in range(size)]
        # on all ranks the same, or different ones
        way = ways[(number + rank * (number // len(ways))) % len(ways)]
        with report.case(operation, dtype, op, count) as name:
            got = way(operation, inputs[rank], op)
            if got is None:
                continue
            order = _order(world, operation, op, inputs[0].nbytes)
            if order is not None:
                expected = _in_order(op, inputs, order)
                wrong = np.flatnonzero(_bits(got) != _bits(expected))
                first = (
                    ""
                    if not len(wrong)
                    else (
                        f"{len(wrong)} of {count} differ, first {wrong[0]}: "
                        f"{[_show(x, wrong[0]) for x in inputs]} became "
                        f"{_show(got, wrong[0])}, expected {_show(expected, wrong[0])}"
                    )
                )
                assert not len(wrong), first
            if operation == "allreduce":
                report.same_everywhere(name, _bits(got).tobytes())
    return report.done()


def _show(values: Array, place: int) -> str:
    reals = values.view(values.real.dtype) if values.dtype.kind == "c" else values
    return f"{reals.ravel()[place]!r}"


def test_every_way_of_calling_gives_the_bits_of_rank_order(
    pool: RankPool, ranks: World, libraries: tuple[str, ...]
) -> None:
    assert_same_bits(pool.run(ranks.size, reduce_every_way, ranks, libraries))


@pytest.mark.gloo
@pytest.mark.skipif(not is_available("shm"), reason=str(reason("shm")))
@pytest.mark.parametrize("hosts", PLACEMENTS[1::2])
def test_between_hosts(
    pool: RankPool, provider: str, hosts: str, libraries: tuple[str, ...]
) -> None:
    assert_same_bits(pool.run(len(hosts), reduce_every_way, world_of(hosts, provider), libraries))
