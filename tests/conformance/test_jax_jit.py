"""Collectives inside ``jax.jit``: values, derivatives, order, and what a failure looks like there."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from pool import RankPool
from worlds import Report, Transport, World

import colltensor as col
from colltensor import bridge

pytestmark = [
    pytest.mark.needs("jax"),
    pytest.mark.skipif(
        sys.version_info < (3, 11), reason="jax-tvm-ffi has no wheel for Python 3.10"
    ),
]

DTYPES = ("float32", "float64", "int32", "uint8", "bool", "complex64", "bfloat16", "float16")


def _jax() -> tuple[Any, Any, Any]:
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    return jax, jax.numpy, importlib.import_module("colltensor.jax")


def _values(rank: int, shape: tuple[int, ...], dtype: str = "float32") -> Any:
    """Return small numbers that differ by rank and index."""
    numbers = np.arange(int(np.prod(shape))).reshape(shape) % 5 + rank + 1
    return numbers.astype(np.dtype(getattr(importlib.import_module("ml_dtypes"), dtype, dtype)))


@contextlib.contextmanager
def _own_group(
    rank: int, size: int, transport: Transport, name: str, timeout_s: float = 10.0
) -> Iterator[Any]:
    group = col.init_collective_group(
        size,
        rank,
        transport.backend,
        name,
        init_method=f"file://{os.environ['TMPDIR']}",
        timeout_s=timeout_s,
        provider=transport.provider,
    )
    try:
        yield group
    finally:
        group.destroy()


def every_collective(rank: int, size: int, world: World) -> None:
    group = world.group()
    jax, jnp, cj = _jax()
    report = Report(group)
    for dtype in DTYPES:
        for shape in ((7,), (3, 5), (), (0,), (40_000,)):
            if len(shape) == 1 and shape[0] > 10_000 and dtype != "float32":
                continue
            everyone = [_values(other, shape, dtype) for other in range(size)]
            x = jnp.asarray(everyone[rank])
            wide = [array.astype("complex128") for array in everyone]
            total = np.any(everyone, axis=0) if dtype == "bool" else sum(wide)
            with report.case("allreduce", dtype, shape):
                y = jax.jit(lambda a: cj.allreduce(a, group))(x)
                assert y.dtype == x.dtype
                assert y.shape == x.shape
                assert (np.asarray(y).astype(total.dtype) == total).all()
                assert (np.asarray(x) == everyone[rank]).all()
            with report.case("broadcast", dtype, shape):
                y = jax.jit(lambda a: cj.broadcast(a, size - 1, group))(x)
                assert (np.asarray(y) == everyone[size - 1]).all()
            with report.case("allgather", dtype, shape):
                y = jax.jit(lambda a: cj.allgather(a, group))(x)
                assert (np.asarray(y) == np.stack(everyone)).all()
            with report.case("sendrecv", dtype, shape):
                y = jax.jit(lambda a: cj.sendrecv(a, (rank + 1) % size, (rank - 1) % size, group))(
                    x
                )
                assert (np.asarray(y) == everyone[rank - 1]).all()
    lists = [_values(other, (size, 6)) for other in range(size)]
    with report.case("reducescatter"):
        y = jax.jit(lambda a: cj.reducescatter(a, group))(jnp.asarray(lists[rank]))
        assert (np.asarray(y) == sum(lists)[rank]).all()
    everyone = [_values(other, (6,)) for other in range(size)]
    x = jnp.asarray(everyone[rank])
    for op in (col.ReduceOp.AVERAGE, col.ReduceOp.MIN, col.ReduceOp.MAX, col.ReduceOp.PRODUCT):
        with report.case("allreduce", op.name):
            functions = {"AVERAGE": np.mean, "MIN": np.min, "MAX": np.max, "PRODUCT": np.prod}
            y = jax.jit(lambda a, op=op: cj.allreduce(a, group, op))(x)
            assert np.allclose(y, functions[op.name](everyone, axis=0))
    with report.case("reduce"):
        y = jax.jit(lambda a: cj.reduce(a, 0, group))(x)
        assert (np.asarray(y) == (sum(everyone) if rank == 0 else everyone[rank])).all()
    if size > 1:
        with report.case("send and recv, the result of the send unused"):

            def move(a: Any) -> Any:
                if rank == 0:
                    cj.send(a, size - 1, group)
                return cj.recv(a, 0, group) if rank == size - 1 else a

            y = jax.jit(move)(x)
            assert (np.asarray(y) == everyone[0 if rank == size - 1 else rank]).all()
    with report.case("a result that nobody reads is not left out"):
        jax.jit(lambda a: (cj.allreduce(a, group), a)[1])(x)
        assert float(group.allreduce(np.ones(1))[0]) == size
    report.done()


def test_every_collective_inside_jit(pool: RankPool, world: World) -> None:
    pool.run(world.size, every_collective, world, timeout_s=110)


def transformations(rank: int, size: int, world: World) -> None:
    group = world.group()
    jax, jnp, cj = _jax()
    report = Report(group)
    everyone = [_values(other, (4, 3), "float64") for other in range(size)]
    x = jnp.asarray(everyone[rank])
    total = sum(everyone)
    for name, wrap in (("plain", lambda f: f), ("ordered", cj.ordered)):
        with report.case(name, "fori_loop"):

            def loop(a: Any) -> Any:
                return jax.lax.fori_loop(0, 5, lambda i, b: cj.allreduce(b, group) / size + i, a)

            y = jax.jit(wrap(loop))(x)
            assert np.allclose(y, total / size + 10)
        with report.case(name, "scan"):

            def summed(a: Any) -> Any:
                return jax.lax.scan(
                    lambda carry, row: (carry + cj.allreduce(row, group), row.sum()), a[0], a
                )

            carry, _ = jax.jit(wrap(summed))(x)
            assert np.allclose(carry, everyone[rank][0] + total.sum(axis=0))
        with report.case(name, "while_loop"):
            y = jax.jit(
                wrap(
                    lambda a: jax.lax.while_loop(
                        lambda b: b.max() < 100,
                        lambda b: cj.allreduce(2 * b / size, group),
                        jnp.ones_like(a),
                    )
                )
            )(x)
            assert np.allclose(y, 128)
        with report.case(name, "cond"):
            y = jax.jit(
                wrap(
                    lambda a, on: jax.lax.cond(
                        on, lambda b: cj.allreduce(b, group), lambda b: cj.broadcast(b, 0, group), a
                    )
                )
            )(x, False)
            assert np.allclose(y, everyone[0])
        for axis in (0, 1):
            with report.case(name, "vmap", axis):
                y = jax.vmap(wrap(lambda a: cj.allreduce(a, group)), in_axes=axis, out_axes=axis)(x)
                assert np.allclose(y, total)
            with report.case(name, "vmap of allgather", axis):
                y = jax.jit(jax.vmap(wrap(lambda a: cj.allgather(a, group)), in_axes=axis))(x)
                assert np.allclose(y, np.moveaxis(np.stack(everyone), axis + 1, 0))
        with report.case(name, "vmap of reducescatter"):
            lists = [_values(other, (size, 2, 3), "float64") for other in range(size)]
            y = jax.vmap(wrap(lambda a: cj.reducescatter(a, group)), in_axes=1)(
                jnp.asarray(lists[rank])
            )
            assert np.allclose(y, sum(lists)[rank])
        with report.case(name, "nested jit, twice"):
            inner = jax.jit(lambda a: cj.allreduce(a, group))
            y = jax.jit(wrap(lambda a: inner(a) + inner(2 * a)))(x)
            assert np.allclose(y, 3 * total)
        with report.case(name, "checkpoint under grad"):
            y = jax.grad(
                wrap(lambda a: jax.checkpoint(lambda b: (cj.allreduce(b, group) ** 2).sum())(a))
            )(x)
            assert np.allclose(y, 2 * size * total)
        with report.case(name, "vmap of grad"):
            y = jax.jit(jax.vmap(jax.grad(wrap(lambda a: (cj.allreduce(a, group) ** 2).sum()))))(x)
            assert np.allclose(y, 2 * size * total)
        with report.case(name, "grad of scan"):
            y = jax.jit(
                jax.grad(
                    wrap(
                        lambda a: jax.lax.scan(
                            lambda carry, row: (carry + cj.allreduce(row, group) ** 2, None),
                            a[0],
                            a,
                        )[0].sum()
                    )
                )
            )(x)
            expected = 2 * size * total
            expected[0] += 1
            assert np.allclose(y, expected)
    report.done()


def test_inside_loops_branches_and_transformations(pool: RankPool, world: World) -> None:
    pool.run(world.size, transformations, world, timeout_s=110)


def _weights(rank: int, count: int) -> Any:
    """Return rank's weights in its loss, which is their product with the result: the cotangent."""
    return np.cos(np.arange(count) + 3 * rank)


def derivatives(rank: int, size: int, world: World) -> None:
    """Compare with the matrix of the whole map, from all ranks' operands to all ranks' results."""
    group = world.group()
    jax, jnp, cj = _jax()
    report = Report(group)
    entries = 2 * size
    average, least = col.ReduceOp.AVERAGE, col.ReduceOp.MIN

    def as_rows(array: Any) -> Any:
        return array.reshape(size, 2)

    everyone = np.array(
        [_values(other, (entries,), "float64") * (1 + other) for other in range(size)]
    )
    last = size - 1
    maps = {
        "allreduce": (lambda a: cj.allreduce(a, group), lambda e, r: e.sum(0)),
        "average": (lambda a: cj.allreduce(a, group, average), lambda e, r: e.mean(0)),
        "min": (lambda a: cj.allreduce(a, group, least), lambda e, r: e.min(0)),
        "reduce": (
            lambda a: cj.reduce(a, last, group),
            lambda e, r: e.sum(0) if r == last else e[r],
        ),
        "reduce, average": (
            lambda a: cj.reduce(a, last, group, average),
            lambda e, r: e.mean(0) if r == last else e[r],
        ),
        "broadcast": (lambda a: cj.broadcast(a, last, group), lambda e, r: e[last]),
        "allgather": (lambda a: cj.allgather(a, group), lambda e, r: e),
        "reducescatter": (
            lambda a: cj.reducescatter(as_rows(a), group),
            lambda e, r: as_rows(e.sum(0))[r],
        ),
        "reducescatter, average": (
            lambda a: cj.reducescatter(as_rows(a), group, average),
            lambda e, r: as_rows(e.mean(0))[r],
        ),
        "sendrecv": (
            lambda a: cj.sendrecv(a, (rank + 1) % size, (rank - 1) % size, group),
            lambda e, r: e[r - 1],
        ),
    }
    if size > 1:

        def move(a: Any) -> Any:
            a = cj.send(a, last, group) if rank == 0 else a
            return cj.recv(a, 0, group) if rank == last else a

        maps["send and recv"] = (move, lambda e, r: e[0] if r == last else e[r])
    for name, (function, model) in maps.items():

        def losses(e: Any, model: Any = model) -> float:
            return sum(
                float((np.ravel(model(e, r)) * _weights(r, np.ravel(model(e, r)).size)).sum())
                for r in range(size)
            )

        step = 1e-6
        expected = np.zeros(entries)
        for index in range(entries):
            for sign in (1, -1):
                moved = everyone.copy()
                moved[rank, index] += sign * step
                expected[index] += sign * losses(moved) / (2 * step)

        def loss(a: Any, function: Any = function) -> Any:
            y = function(a).ravel()
            return (y * _weights(rank, y.size)).sum()

        x = jnp.asarray(everyone[rank])
        for how, gradient in (
            ("jit", jax.jit(jax.grad(loss))),
            ("eager", jax.grad(loss)),
            ("ordered", jax.jit(jax.grad(cj.ordered(loss)))),
        ):
            with report.case("gradient", name, how):
                assert np.allclose(gradient(x), expected, atol=1e-6)
        with report.case("tangent", name):
            tangents = np.sin(np.arange(size * entries)).reshape(size, entries)
            _, tangent = jax.jvp(function, (x,), (jnp.asarray(tangents[rank]),))
            moved = [np.ravel(model(everyone + sign * step * tangents, rank)) for sign in (1, -1)]
            assert np.allclose(np.ravel(tangent), (moved[0] - moved[1]) / (2 * step), atol=1e-6)
    with report.case("second derivative"):
        y = jax.jit(
            jax.grad(lambda a: jax.grad(lambda b: (cj.allreduce(b, group) ** 3).sum())(a).sum())
        )(x)
        assert np.allclose(y, 6 * size**2 * everyone.sum(0))
    with (
        report.case("a product has none"),
        pytest.raises(NotImplementedError, match="SUM, AVERAGE"),
    ):
        jax.grad(lambda a: cj.allreduce(a, group, col.ReduceOp.PRODUCT).sum())(x)
    report.done()


def test_derivatives(pool: RankPool, world: World) -> None:
    pool.run(world.size, derivatives, world, timeout_s=110)


MANY = 6


def _program(cj: Any, jnp: Any, group: Any, x: Any) -> list[Any]:
    """Reduce arrays of one shape, the first of which takes long to compute."""
    first = x
    for _ in range(4):
        first = first @ first / x.shape[0]
    return [cj.allreduce(first[0] * 0 + 1, group)] + [
        cj.allreduce(x[k] * 0 + k + 1, group) for k in range(1, MANY)
    ]


def mixed_order(
    rank: int, size: int, transport: Transport, name: str, others: str, tokens: bool
) -> bool:
    """Return whether a jitted rank's calls meet the same calls of eager ranks."""
    jax, jnp, cj = _jax()
    with _own_group(rank, size, transport, name) as group:
        if rank != 0:
            found = []
            for k in range(MANY):
                x = np.full(256, k + 1.0, "float32")
                x = importlib.import_module("torch").from_numpy(x) if others == "torch" else x
                found.append(float(group.allreduce(x)[0]))
            return found == [size * (k + 1.0) for k in range(MANY)]
        order = importlib.import_module("colltensor.jax._order")
        lower_to = order.lower_to
        if not tokens:

            def without(
                target: str, context: Any, operand: Any, aliased: bool, attributes: Any
            ) -> Any:
                rule = jax.ffi.ffi_lowering(target, has_side_effect=True)
                context.set_tokens_out(context.tokens_in)
                return rule(context, operand, **attributes)

            order.lower_to = without
        try:
            found = jax.jit(lambda a: _program(cj, jnp, group, a))(jnp.ones((256, 256), "float32"))
            return [float(y[0]) for y in found] == [size * (k + 1.0) for k in range(MANY)]
        finally:
            order.lower_to = lower_to


def test_order_among_eager_ranks(
    pool: RankPool, transport: Transport, libraries: tuple[str, ...]
) -> None:
    for size in (2, 3):
        others = "torch" if "torch" in libraries else "numpy"
        assert (
            pool.run(size, mixed_order, transport, uuid.uuid4().hex, others, True) == [True] * size
        )
        # The proof that the tokens are needed: XLA's own order pairs equal shapes wrongly, and nobody notices.
        assert (
            pool.run(size, mixed_order, transport, uuid.uuid4().hex, "numpy", False)
            == [False] * size
        )


def follows(rank: int, size: int, transport: Transport, name: str, waits: bool) -> bool:
    """Return whether an eager call comes after a jitted one that was started before and is still computing."""
    jax, jnp, cj = _jax()
    with _own_group(rank, size, transport, name) as group:
        if rank != 0:
            assert float(group.allreduce(np.full(4, 5.0))[0]) == 5.0 * size
            return [
                float(group.allreduce(np.full(4, value))[0]) for value in (1.0, 10.0, 100.0)
            ] == [size * 1.0, size * 10.0, size * 100.0]

        def slow(a: Any, value: Any) -> Any:
            return cj.allreduce(
                jnp.full(4, value)
                + 0 * jax.lax.fori_loop(0, 60, lambda _, y: y @ y / 512, a)[0, 0],
                group,
            )

        step, square = jax.jit(slow), jnp.ones((512, 512))
        assert float(step(square, 5.0)[0]) == 5.0 * size
        if not waits:
            bridge.follow(group, lambda: None, lambda on: None)
        first = step(square, 1.0)
        second = group.allreduce(np.full(4, 10.0))
        third = step(square, 100.0)
        return [float(y[0]) for y in (first, second, third)] == [
            size * 1.0,
            size * 10.0,
            size * 100.0,
        ]


def test_eager_calls_follow_jitted_ones(pool: RankPool, transport: Transport) -> None:
    assert pool.run(2, follows, transport, uuid.uuid4().hex, True) == [True, True]
    assert pool.run(2, follows, transport, uuid.uuid4().hex, False) == [False, False]


def started_one_after_the_other(rank: int, size: int, transport: Transport, name: str) -> None:
    """A computation that takes long and one that does not, without waiting, in both spellings and mixed."""
    jax, jnp, cj = _jax()
    with _own_group(rank, size, transport, name) as group:

        def slow(a: Any, value: Any) -> Any:
            return cj.allreduce(
                jnp.full(4, value)
                + 0 * jax.lax.fori_loop(0, 60, lambda _, y: y @ y / 512, a)[0, 0],
                group,
            )

        def quick(a: Any, value: Any) -> Any:
            return cj.allreduce(jnp.full(4, value), group)

        square, value = jnp.ones((512, 512)), 0
        for first in (jax.jit(slow), jax.jit(cj.ordered(slow))):
            for second in (jax.jit(quick), jax.jit(cj.ordered(quick))):
                for _ in range(3):
                    steps = (first, second, first, second)
                    numbers = [float(value + k) for k in range(4)]
                    if rank == 0:
                        found = [
                            step(square, number)
                            for step, number in zip(steps, numbers, strict=True)
                        ]
                    else:
                        found = [group.allreduce(np.full(4, number)) for number in numbers]
                    assert [float(y[0]) for y in found] == [size * number for number in numbers]
                    value += 4


def test_computations_run_in_the_order_in_which_they_were_started(
    pool: RankPool, transport: Transport
) -> None:
    pool.run(2, started_one_after_the_other, transport, uuid.uuid4().hex)


def jitted_after_asynchronous(rank: int, size: int, transport: Transport, name: str) -> None:
    jax, jnp, cj = _jax()
    with _own_group(rank, size, transport, name) as group:
        step = jax.jit(lambda a: cj.allreduce(a, group))
        assert float(step(jnp.ones(3, "float64"))[0]) == size
        for _ in range(5):
            works = [group.allreduce(np.full(3, k + 1.0), async_op=True) for k in range(4)]
            last = step(jnp.full(3, 10.0)) if rank == 0 else group.allreduce(np.full(3, 10.0))
            assert [float(work.result()[0]) for work in works] == [
                size * (k + 1.0) for k in range(4)
            ]
            assert float(last[0]) == size * 10


def test_jitted_calls_follow_asynchronous_ones(pool: RankPool, transport: Transport) -> None:
    pool.run(2, jitted_after_asynchronous, transport, uuid.uuid4().hex)


def mixed_operations(rank: int, size: int, world: World) -> None:
    """Rank 0 is jitted, the others call with numpy arrays."""
    group = world.group()
    jax, jnp, cj = _jax()
    everyone = [_values(other, (6,)) for other in range(size)]
    lists = [_values(other, (size, 3)) for other in range(size)]
    mine = everyone[rank].copy()
    if rank == 0:

        def program(a: Any, rows: Any) -> Any:
            return (
                cj.allreduce(a, group, col.ReduceOp.MAX),
                cj.broadcast(a, 1, group),
                cj.allgather(a, group),
                cj.reducescatter(rows, group),
                cj.reduce(a, 1, group),
                cj.send(a, 1, group),
                cj.recv(a, 1, group),
                cj.sendrecv(a, 1, size - 1, group),
            )

        results = [
            np.asarray(y) for y in jax.jit(program)(jnp.asarray(mine), jnp.asarray(lists[0]))
        ]
    else:
        gathered = [np.empty_like(mine) for _ in range(size)]
        results = [group.allreduce(mine.copy(), col.ReduceOp.MAX), group.broadcast(mine.copy(), 1)]
        results += [np.stack(group.allgather(gathered, mine))]
        results += [
            group.reducescatter(np.empty(3, "float32"), list(lists[rank])),
            group.reduce(mine.copy(), 1),
        ]
        received = mine.copy()
        if rank == 1:
            group.recv(received, 0)
            group.send(mine, 0)
        shifted = group.sendrecv(mine, (rank + 1) % size, np.empty_like(mine), rank - 1)
        results += [received, mine if rank else everyone[1], shifted]
    expected = [
        np.max(everyone, axis=0),
        everyone[1],
        np.stack(everyone),
        sum(lists)[rank],
        sum(everyone) if rank == 1 else everyone[rank],
        everyone[0] if rank < 2 else everyone[rank],
        everyone[1] if rank == 0 else everyone[rank],
        everyone[rank - 1],
    ]
    for y, wanted in zip(results, expected, strict=True):
        assert (y == wanted).all()


def test_jitted_and_eager_ranks_make_every_call_together(pool: RankPool, ranks: World) -> None:
    pool.run(ranks.size, mixed_operations, ranks)


def donated(rank: int, size: int, world: World) -> None:
    group = world.group()
    jax, jnp, cj = _jax()
    for function in (
        lambda a: cj.allreduce(a, group),
        cj.ordered(lambda a: cj.allreduce(a, group)),
    ):
        for count in (1000, 300_000):
            x = (jnp.zeros(count, "float32") + rank).block_until_ready()
            pointer = x.unsafe_buffer_pointer()
            y = jax.jit(function, donate_argnums=0)(x)
            assert y.unsafe_buffer_pointer() == pointer
            assert x.is_deleted()
            assert (np.asarray(y) == sum(range(size))).all()
            z = jax.jit(function)(y)
            assert z.unsafe_buffer_pointer() != pointer
            assert (np.asarray(y) == sum(range(size))).all()


def test_a_donated_argument_keeps_its_memory(pool: RankPool, world: World) -> None:
    pool.run(world.size, donated, world)


def mismatch(rank: int, size: int, transport: Transport, name: str) -> None:
    jax, jnp, cj = _jax()
    with _own_group(rank, size, transport, name) as group:
        step = jax.jit(lambda a: cj.allreduce(a, group))
        if rank == size - 1:
            with pytest.raises(col.MismatchError):
                group.allreduce(np.ones(5))
        else:
            with pytest.raises(jax.errors.JaxRuntimeError, match=r"allreduce .*\[4\].*\[5\]"):
                step(jnp.ones(4)).block_until_ready()
        x = step(jnp.ones(4)) if rank != size - 1 else group.allreduce(np.ones(4))
        assert float(x[0]) == size
        with pytest.raises(col.UnsupportedDTypeError):
            jax.jit(lambda a: cj.allreduce(a, group, col.ReduceOp.AVERAGE))(jnp.ones(3, "int32"))
        with pytest.raises(col.RankError, match=r"broadcast: .*\b7\b"):
            jax.jit(lambda a: cj.broadcast(a, 7, group))(jnp.ones(3))
        with pytest.raises(col.ShapeError, match=rf"reducescatter: x .*\({size + 1},\)"):
            jax.jit(lambda a: cj.reducescatter(a, group))(jnp.ones(size + 1))
        with pytest.raises(col.GroupError, match="nobody"):
            jax.jit(lambda a: cj.allreduce(a, "nobody"))(jnp.ones(3))
        assert float(step(jnp.ones(4))[0]) == size


def test_a_mismatch_is_an_error_and_the_group_goes_on(pool: RankPool, transport: Transport) -> None:
    for size in (2, 3):
        pool.run(size, mismatch, transport, uuid.uuid4().hex)


def failure_in_the_background(rank: int, size: int, name: str) -> None:
    """JAX keeps the failure of a computation that ran in its own threads: documented, with the way out."""
    jax, jnp, cj = _jax()
    with _own_group(rank, size, Transport("shm", None), name) as group:

        def slow(a: Any, b: Any) -> Any:
            return cj.allreduce(
                b + 0 * jax.lax.fori_loop(0, 60, lambda _, y: y @ y / 512, a)[0, 0], group
            )

        square = jnp.ones((512, 512))
        for step in (jax.jit(slow), jax.jit(cj.ordered(slow))):
            assert float(step(square, jnp.ones(3))[0]) == size
            with pytest.raises(jax.errors.JaxRuntimeError, match=r"allreduce .*\[3\].*\[4\]"):
                step(square, jnp.ones(3 + rank)).block_until_ready()
            cj.forget_failures()
            assert float(step(square, jnp.ones(3))[0]) == size
            with pytest.raises(jax.errors.JaxRuntimeError, match=r"allreduce .*\[3\].*\[4\]"):
                step(square, jnp.ones(3 + rank)).block_until_ready()
            assert float(group.allreduce(np.ones(3))[0]) == size
            assert float(step(square, jnp.ones(3))[0]) == size


@pytest.mark.shm
def test_a_failure_in_the_background_can_be_left_behind(pool: RankPool) -> None:
    pool.run(2, failure_in_the_background, uuid.uuid4().hex)


def a_rank_dies(rank: int, size: int, transport: Transport, name: str, how: str) -> None:
    jax, jnp, cj = _jax()
    with _own_group(rank, size, transport, name, timeout_s=2.0 if how == "late" else 10.0) as group:
        step = jax.jit(lambda a: jax.lax.fori_loop(0, 3, lambda _, b: cj.allreduce(b, group), a))
        assert float(step(jnp.ones(4))[0]) == size**3
        if rank == size - 1:
            if how == "dies":
                os._exit(3)
            importlib.import_module("time").sleep(4)
            return
        with pytest.raises(jax.errors.JaxRuntimeError, match=rf"rank {size - 1}"):
            step(jnp.ones(4)).block_until_ready()
        with pytest.raises(col.GroupError) as caught:
            group.allreduce(np.ones(4))
        expected = col.CollectiveTimeoutError if how == "late" else col.PeerLostError
        assert isinstance(caught.value.__cause__, expected)
        assert caught.value.__cause__.ranks == (size - 1,)
        with pytest.raises(jax.errors.JaxRuntimeError, match=rf"\brank {size - 1}"):
            step(jnp.ones(4)).block_until_ready()


@pytest.mark.parametrize("how", ["dies", "late"])
def test_a_dead_or_late_rank_is_an_error_and_no_hang(
    pool: RankPool, transport: Transport, how: str
) -> None:
    pool.run(3, a_rank_dies, transport, uuid.uuid4().hex, how, may_die={2} if how == "dies" else ())


def remade(rank: int, size: int, transport: Transport, name: str) -> None:
    jax, jnp, cj = _jax()
    step = jax.jit(lambda a: cj.allreduce(a, name))
    for _ in range(2):
        with _own_group(rank, size, transport, name):
            fresh = jax.jit(lambda a: cj.allreduce(a, name))
            assert float(fresh(jnp.ones(4))[0]) == size
            if _ == 0:
                assert float(step(jnp.ones(4))[0]) == size
                continue
            with pytest.raises(jax.errors.JaxRuntimeError, match=r"\bjit\b"):
                step(jnp.ones(4)).block_until_ready()
            assert float(fresh(jnp.ones(4))[0]) == size
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"\bjit\b"):
        fresh(jnp.ones(4)).block_until_ready()


def test_a_function_of_a_group_that_was_made_again_says_so(
    pool: RankPool, transport: Transport
) -> None:
    pool.run(2, remade, transport, uuid.uuid4().hex)


def optax_step(rank: int, size: int, world: World, average: bool) -> None:
    group = world.group()
    jax, jnp, cj = _jax()
    optax = importlib.import_module("optax")
    transform = optax.chain(cj.sync_gradients(group, average=average), optax.sgd(1.0))
    params = {
        "w": jnp.zeros((3, 2), "float32"),
        "b": [jnp.zeros(4, "float32"), jnp.zeros((), "bfloat16")],
    }
    state = transform.init(params)

    @jax.jit
    def step(params: Any, state: Any, scale: Any) -> Any:
        gradients = jax.tree.map(
            lambda leaf: jnp.ones_like(leaf) * scale.astype(leaf.dtype), params
        )
        updates, state = transform.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(params, state, jnp.float32(rank + 1))
    total = sum(range(1, size + 1)) / (size if average else 1)
    for leaf in jax.tree.leaves(params):
        assert np.allclose(np.asarray(leaf, "float32"), -total)
    assert params["w"].shape == (3, 2)
    assert params["b"][1].dtype == "bfloat16"


@pytest.mark.parametrize("average", [True, False])
def test_optax_transformation(pool: RankPool, world: World, average: bool) -> None:
    pool.run(world.size, optax_step, world, average)


def test_without_jax_tvm_ffi_the_error_names_the_extra() -> None:
    script = """
        import sys
        sys.modules["jax_tvm_ffi"] = None
        import colltensor as col
        import colltensor.jax as cj
        import jax
        col.init_collective_group(1, 0)
        try:
            jax.jit(cj.allreduce)(jax.numpy.ones(3))
        except col.BackendUnavailableError as error:
            print(error)
        print(col.allreduce(jax.numpy.ones(3)))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert "pip install 'jax-tvm-ffi>=" in result.stdout
    assert "[1. 1. 1.]" in result.stdout
