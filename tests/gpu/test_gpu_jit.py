"""Collectives inside ``jax.jit`` on a device: values, derivatives, order, and what a rank that does not come means."""

from __future__ import annotations

import importlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import gpu_streams
import numpy as np
import pytest
from gpu_streams import Queue, shared_group
from pool import RankPool
from test_gpu_failures import LIMIT_S, TIMEOUT_S, own_group, runs_on
from worlds import Report

import colltensor as col

pytestmark = pytest.mark.needs("jax")

DTYPES = ("float32", "float64", "int32", "uint8", "bool", "complex64", "bfloat16", "float16")
SHAPES = ((7,), (300_007,))
SHAPES_OF = {"float32": (*SHAPES, (3, 5), (), (0,))}
"""More for one type: each case compiles two computations."""
PRODUCTS = 4000
"""As in test_gpu_streams."""
LATE_S = 2.0
TURNS = 20


def _jax() -> tuple[Any, Any, Any]:
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    assert jax.devices()[0].platform == gpu_streams.PLATFORM
    return jax, jax.numpy, importlib.import_module("colltensor.jax")


def own_jitted_group(rank: int, folder: str, **options: Any) -> Any:
    """Return a group that may break, once both ranks have called a jitted collective: a new one compiles for long."""
    jax, jnp, cj = _jax()
    group = shared_group(2)
    jax.jit(lambda a: cj.allreduce(a, group))(jnp.ones(1 << 20)).block_until_ready()
    return own_group(rank, folder, **options)


def _values(rank: int, shape: tuple[int, ...], dtype: str = "float32") -> Any:
    numbers = np.arange(int(np.prod(shape))).reshape(shape) % 5 + rank + 1
    return numbers.astype(np.dtype(getattr(importlib.import_module("ml_dtypes"), dtype, dtype)))


def _slow(jax: Any, jnp: Any) -> tuple[Any, Any]:
    """Return a function that takes long on a device and whose result is 0, and its operand."""
    matrix = jnp.full((2048, 2048), 1 / 2048, jnp.float32)
    columns = jnp.ones((2048, 256), jnp.float32)
    return lambda a: 0 * jax.lax.fori_loop(0, PRODUCTS, lambda _, y: matrix @ y, a)[0, 0], columns


def every_collective(rank: int, size: int) -> dict[str, str]:
    group = shared_group(size)
    jax, jnp, cj = _jax()
    report = Report(group)
    to, of = (rank + 1) % size, (rank - 1) % size
    for dtype in DTYPES:
        for shape in SHAPES_OF.get(dtype, SHAPES):
            everyone = [_values(other, shape, dtype) for other in range(size)]
            lists = [_values(other, (size, *shape), dtype) for other in range(size)]
            total, sums = (
                (np.any(everyone, 0), np.any(lists, 0))
                if dtype == "bool"
                else (sum(everyone), sum(lists))
            )

            def program(a: Any, rows: Any) -> Any:
                moved = a
                if size > 1:
                    moved = cj.send(a, size - 1, group) if rank == 0 else a
                    moved = cj.recv(moved, 0, group) if rank == size - 1 else moved
                return (
                    cj.allreduce(a, group),
                    cj.reduce(a, 0, group),
                    cj.broadcast(a, size - 1, group),
                    cj.allgather(a, group),
                    cj.reducescatter(rows, group),
                    cj.sendrecv(a, to, of, group),
                    moved,
                )

            x, rows = jnp.asarray(everyone[rank]), jnp.asarray(lists[rank])
            expected = [
                total,
                total if rank == 0 else everyone[rank],
                everyone[size - 1],
                np.stack(everyone),
                sums[rank],
                everyone[of],
                everyone[0 if rank == size - 1 else rank],
            ]
            for how, function in (("jit", program), ("ordered", cj.ordered(program))):
                with report.case(how, dtype, shape):
                    for y, wanted in zip(jax.jit(function)(x, rows), expected, strict=True):
                        assert y.devices() == x.devices()
                        np.testing.assert_array_equal(np.asarray(y), wanted)
                    np.testing.assert_array_equal(np.asarray(x), everyone[rank])
    for op, function in (
        ("AVERAGE", np.mean),
        ("MIN", np.min),
        ("MAX", np.max),
        ("PRODUCT", np.prod),
    ):
        with report.case(op):
            everyone = [_values(other, (33,)) for other in range(size)]
            y = jax.jit(lambda a, op=op: cj.allreduce(a, group, col.ReduceOp[op]))(
                jnp.asarray(everyone[rank])
            )
            assert np.allclose(y, function(everyone, axis=0))
    return report.done()


def test_every_collective(gpu_pool: RankPool, size: int) -> None:
    gpu_pool.run(size, every_collective, timeout_s=500)


def transformations(rank: int, size: int) -> dict[str, str]:
    group = shared_group(size)
    jax, jnp, cj = _jax()
    report = Report(group)
    everyone = [_values(other, (4, 3), "float64") for other in range(size)]
    x, total = jnp.asarray(everyone[rank]), sum(everyone)

    def summed(a: Any) -> Any:
        return jax.lax.scan(
            lambda carry, row: (carry + cj.allreduce(row, group) ** 2, None), a[0], a
        )[0].sum()

    for how, wrap in (("plain", lambda f: f), ("ordered", cj.ordered)):
        with report.case(how, "fori_loop"):
            y = jax.jit(
                wrap(
                    lambda a: jax.lax.fori_loop(
                        0, 5, lambda i, b: cj.allreduce(b, group) / size + i, a
                    )
                )
            )(x)
            assert np.allclose(y, total / size + 10)
        with report.case(how, "while_loop"):
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
        with report.case(how, "cond"):
            y = jax.jit(
                wrap(
                    lambda a, on: jax.lax.cond(
                        on, lambda b: cj.allreduce(b, group), lambda b: cj.broadcast(b, 0, group), a
                    )
                )
            )(x, False)
            assert np.allclose(y, everyone[0])
        with report.case(how, "vmap"):
            assert np.allclose(jax.jit(jax.vmap(wrap(lambda a: cj.allreduce(a, group))))(x), total)
        with report.case(how, "gradient of a scan"):
            expected = 2 * size * total
            expected[0] += 1
            assert np.allclose(jax.jit(jax.grad(wrap(summed)))(x), expected)
    return report.done()


def test_loops_and_derivatives(gpu_pool: RankPool, size: int) -> None:
    gpu_pool.run(size, transformations, timeout_s=300)


def host_goes_on(rank: int, size: int) -> None:
    """Rank 1 comes late: rank 0's target returns at once, while its result is not ready."""
    group = shared_group(2)
    jax, jnp, cj = _jax()
    targets = importlib.import_module("colltensor.jax._targets")
    step = jax.jit(lambda a: cj.allreduce(2 * a, group) + 1)
    x = jnp.full(1 << 20, rank + 1.0)
    step(x).block_until_ready()  # compiles and connects
    move, taken = targets._move, []

    def timed(*arguments: Any) -> None:
        began = time.monotonic()
        move(*arguments)
        taken.append(time.monotonic() - began)

    targets._move = timed
    try:
        group.barrier()
        if rank == 1:
            time.sleep(LATE_S)
        y = step(x)
        if rank == 0:
            until = time.monotonic() + LATE_S / 2
            while not taken:
                assert time.monotonic() < until, "the target waits for the other rank"
                time.sleep(0.001)
            assert not y.is_ready()
        np.testing.assert_array_equal(np.asarray(y), 7.0)
        assert max(taken) < LATE_S / 2
    finally:
        targets._move = move


def test_the_host_goes_on(pair: RankPool) -> None:
    pair.run(2, host_goes_on)


def counted(rank: int, size: int) -> None:
    """XLA calls the target for every turn of a loop and every run: no CUDA graph has taken it in."""
    group = shared_group(size)
    jax, jnp, cj = _jax()
    targets = importlib.import_module("colltensor.jax._targets")
    step = jax.jit(
        lambda a: jax.lax.fori_loop(0, TURNS, lambda _, b: cj.allreduce(b + 1, group) / size, a)
    )
    move, names = targets._move, []
    targets._move = lambda *arguments: (names.append(arguments[1]), move(*arguments))
    try:
        for run in range(1, 6):
            assert float(step(jnp.zeros(3))[0]) == TURNS
            assert names == ["allreduce"] * TURNS * run
    finally:
        targets._move = move


def test_each_call_is_made(gpu_pool: RankPool, size: int) -> None:
    gpu_pool.run(size, counted)


def among_eager_ranks(rank: int, size: int) -> None:
    """Rank 0 is jitted and its first operand takes long; the others call eagerly, with arrays of one shape."""
    group = shared_group(size)
    jax, jnp, cj = _jax()
    slow, columns = _slow(jax, jnp)
    numbers = [float(k + 1) for k in range(6)]

    def program(a: Any) -> Any:
        first = cj.allreduce(jnp.full(256, numbers[0], "float32") + slow(a), group)
        return [first, *(cj.allreduce(jnp.full(256, k, "float32"), group) for k in numbers[1:])]

    for function in (program, cj.ordered(program)):
        if rank == 0:
            found = jax.jit(function)(columns)
        else:
            found = [group.allreduce(jnp.full(256, k, "float32")) for k in numbers]
        assert [float(y[0]) for y in found] == [size * k for k in numbers]


def test_order_among_eager_ranks(gpu_pool: RankPool, size: int) -> None:
    gpu_pool.run(size, among_eager_ranks)


def one_after_the_other(rank: int, size: int, library: str) -> None:
    """Computations that take long and that do not, and eager calls on another library's stream, none waited for."""
    group = shared_group(size)
    jax, jnp, cj = _jax()
    slow, columns = _slow(jax, jnp)

    def late(a: Any, value: Any) -> Any:
        return cj.allreduce(jnp.full(4, value) + slow(a), group)

    def prompt(a: Any, value: Any) -> Any:
        return cj.allreduce(jnp.full(4, value), group)

    value = 0.0
    with Queue(library) as queue:
        for first in (jax.jit(late), jax.jit(cj.ordered(late))):
            for second in (jax.jit(prompt), jax.jit(cj.ordered(prompt))):
                tensor = queue.full(value + 2)
                found = [first(columns, value), second(columns, value + 1)]
                group.allreduce(tensor)
                found += [second(columns, value + 3), first(columns, value + 4)]
                assert [float(y[0]) for y in found] == [size * (value + k) for k in (0, 1, 3, 4)]
                assert queue.read(tensor) == {size * (value + 2)}
                value += 5


def test_order_of_computations_and_eager_calls(gpu_pool: RankPool, size: int, library: str) -> None:
    gpu_pool.run(size, one_after_the_other, library)


def donated(rank: int, size: int) -> None:
    group = shared_group(size)
    jax, jnp, cj = _jax()
    for function in (
        lambda a: cj.allreduce(a, group),
        cj.ordered(lambda a: cj.allreduce(a, group)),
    ):
        x = (jnp.zeros(1 << 20, "float32") + rank).block_until_ready()
        pointer = x.unsafe_buffer_pointer()
        y = jax.jit(function, donate_argnums=0)(x)
        assert y.unsafe_buffer_pointer() == pointer
        assert x.is_deleted()
        np.testing.assert_array_equal(np.asarray(y), sum(range(size)))


def test_a_donated_argument_keeps_its_memory(gpu_pool: RankPool, size: int) -> None:
    gpu_pool.run(size, donated)


def memory_in_flight(rank: int, size: int) -> None:
    """What XLA frees behind a call that waits is not given to a computation whose values the call would then send."""
    group = shared_group(2)
    jax, jnp, cj = _jax()
    step = jax.jit(lambda a: cj.allreduce(2 * a, group)[0])
    fill = jax.jit(lambda value: jnp.full(1 << 22, value))
    step(fill(1.0)).block_until_ready()
    group.barrier()
    if rank == 1:
        time.sleep(LATE_S)
    y = step(fill(1.0 + rank))
    others = [fill(100.0 + k) for k in range(8)]
    assert float(y) == 6.0
    assert [float(other[-1]) for other in others] == [100.0 + k for k in range(8)]


def test_xla_does_not_reuse_memory_in_flight(pair: RankPool) -> None:
    pair.run(2, memory_in_flight)


def absent(rank: int, size: int, folder: str) -> Any:
    jax, jnp, cj = _jax()
    group = own_jitted_group(rank, folder)
    step = jax.jit(lambda a: cj.allreduce(a, group))
    assert float(step(jnp.ones(1 << 20))[0]) == 2
    group.barrier()
    error = None
    if rank == 1:
        time.sleep(TIMEOUT_S + 3)
    else:
        began = time.monotonic()
        step(jnp.ones(1 << 20)).block_until_ready()  # undefined: the communicators were ended
        with pytest.raises(col.CollectiveError) as caught:
            group.synchronize()
        with pytest.raises(jax.errors.JaxRuntimeError, match="rank 1"):
            step(jnp.ones(1 << 20)).block_until_ready()
        assert time.monotonic() - began < LIMIT_S
        error = caught.value.__cause__ or caught.value
    group.destroy()
    cj.forget_failures()
    again = own_group(rank, folder, timeout_s=LIMIT_S)
    assert float(jax.jit(lambda a: cj.allreduce(a, again))(jnp.full(5, rank + 1.0))[0]) == 3.0
    again.barrier()
    again.destroy()
    return None if error is None else (type(error).__name__, error.ranks)


def test_a_rank_that_does_not_come(pair: RankPool, tmp_path: Path) -> None:
    assert pair.run(2, absent, str(tmp_path))[0] == ("CollectiveTimeoutError", (1,))


def killed(rank: int, size: int, folder: str) -> Any:
    jax, jnp, cj = _jax()
    group = own_jitted_group(rank, folder, timeout_s=LIMIT_S)
    step = jax.jit(lambda a: cj.allreduce(a, group))
    assert float(step(jnp.ones(1 << 20))[0]) == 2
    group.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    step(jnp.ones(1 << 20)).block_until_ready()
    with pytest.raises(col.CollectiveError) as caught:
        group.synchronize()
    with Queue("cupy") as queue:
        runs_on(queue)
    group.destroy()
    error = caught.value.__cause__ or caught.value
    return type(error).__name__, error.ranks


@pytest.mark.needs("cupy")
def test_a_rank_that_is_killed(pair: RankPool, tmp_path: Path) -> None:
    assert pair.run(2, killed, str(tmp_path), may_die=[1])[0] == ("PeerLostError", (1,))


def disagree(rank: int, size: int, folder: str) -> None:
    jax, jnp, cj = _jax()
    group = own_jitted_group(rank, folder, check=True)
    step = jax.jit(lambda a: cj.allreduce(a, group))
    for _ in range(2):
        assert float(step(jnp.ones(4))[0]) == 2
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"allreduce .*\[4\].*\[5\]"):
            step(jnp.ones(4 + rank)).block_until_ready()
        cj.forget_failures()
    with pytest.raises(col.UnsupportedDTypeError, match=r"\bNCCL .*\bint16\b"):
        step(jnp.ones(4, "int16"))
    group.barrier()
    group.destroy()


def test_check_names_who_differs(pair: RankPool, tmp_path: Path) -> None:
    pair.run(2, disagree, str(tmp_path))


def alone(rank: int, size: int) -> None:
    """A group of one rank that was not asked for NCCL has nothing to call."""
    jax, jnp, cj = _jax()
    group = col.init_collective_group(1, 0, group_name="alone")
    x = jnp.arange(6.0).reshape(1, 6)
    for wrap in (lambda f: f, cj.ordered):
        np.testing.assert_array_equal(
            np.asarray(jax.jit(wrap(lambda a: cj.allreduce(a, group)))(x)), np.asarray(x)
        )
        assert jax.jit(wrap(lambda a: cj.allgather(a, group)))(x).shape == (1, 1, 6)
        assert jax.jit(wrap(lambda a: cj.reducescatter(a, group)))(x).shape == (6,)
    group.destroy()


def test_a_group_of_one_rank(gpu_pool: RankPool) -> None:
    gpu_pool.run(1, alone)
