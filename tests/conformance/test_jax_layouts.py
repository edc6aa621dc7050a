"""JAX arrays whose memory is not row-major: the elements are matched by index, whatever the order of the axes."""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from pool import RankPool
from worlds import Report, World

import colltensor as col
from colltensor.gradients import Synchronizer, sync_gradients

pytestmark = pytest.mark.needs("jax")

LAYOUTS = (((2, 3), (1, 0)), ((5, 1, 4, 3), (2, 0, 3, 1)), ((64, 65), (1, 0)), ((640, 900), (1, 0)))
"""Shapes, and the axes from the slowest to the fastest in memory; the last is large enough to be read by the peers."""


def _numbers(shape: Sequence[int], start: float = 0) -> np.ndarray:
    return (np.arange(math.prod(shape), dtype=np.float32) + start).reshape(shape)


def _laid_out(values: np.ndarray, order: Sequence[int]) -> Any:
    """Return a JAX array of these values whose memory has the axes in this order.

    It comes through DLPack on even ranks, and from JAX itself on odd ones and where JAX (0.6) ignores DLPack's strides.
    """
    jax = importlib.import_module("jax")
    permuted = np.ascontiguousarray(values.transpose(order))
    layout = importlib.import_module("jax.experimental.layout")
    if hasattr(layout, "DeviceLocalLayout"):
        x = jax.device_put(
            values, layout.Layout(layout.DeviceLocalLayout(tuple(order)), _sharding(jax))
        )
    elif _from_dlpack:
        memory = np.empty(values.nbytes + 64, np.uint8)
        start = -memory.ctypes.data % 64
        aligned = memory[start : start + values.nbytes].view(values.dtype).reshape(permuted.shape)
        aligned[...] = permuted
        x = jax.dlpack.from_dlpack(aligned.transpose(np.argsort(order)))
    else:
        x = jax.device_put(values, layout.Format(layout.Layout(tuple(order)), _sharding(jax)))
    raw = (ctypes.c_float * values.size).from_address(x.block_until_ready().unsafe_buffer_pointer())
    # else the test would test nothing
    assert (np.frombuffer(raw, np.float32) == permuted.ravel()).all()
    assert (np.asarray(x) == values).all()
    return x


_from_dlpack = True


def _sharding(jax: Any) -> Any:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def every_operation(rank: int, world_size: int, world: World, alone: bool) -> None:
    """``alone``: only rank 0's arrays are laid out so."""
    global _from_dlpack
    _from_dlpack = rank % 2 == 0
    group, size = world.group(), world_size
    report = Report(group)
    to, of = (rank + 1) % size, (rank - 1) % size
    for shape, order in LAYOUTS:

        def make(start: float, shape: Any = shape, order: Any = order) -> Any:
            values = _numbers(shape, start)
            return (
                importlib.import_module("jax").numpy.asarray(values)
                if alone and rank
                else _laid_out(values, order)
            )

        def base(start: float, shape: Any = shape) -> np.ndarray:
            return _numbers(shape, start)

        total = sum(base(r) for r in range(size))

        def blocks(start: float, make: Any = make) -> list[Any]:
            return [make(start + r) for r in range(size)]

        everyone = [base(r) for r in range(size)]
        cases: dict[str, tuple[Callable[[], Any], Any]] = {
            "allreduce": (lambda: group.allreduce(make(rank)), total),
            "max": (lambda: group.allreduce(make(rank), col.ReduceOp.MAX), base(size - 1)),
            "donated": (lambda: group.allreduce(make(rank), donate=True), total),
            "async": (lambda: group.allreduce(make(rank), async_op=True).result(), total),
            "reduce": (lambda: group.reduce(make(rank), 0), base(rank) if rank else total),
            "broadcast": (lambda: group.broadcast(make(rank), size - 1), base(size - 1)),
            "broadcast of 0": (lambda: group.broadcast(make(rank), 0), base(0)),
            "broadcast, donated": (lambda: group.broadcast(make(rank), 0, donate=True), base(0)),
            "allgather": (lambda: group.allgather(blocks(9), make(rank)), everyone),
            "gather": (
                lambda: group.gather(blocks(9), make(rank), 0),
                everyone if rank == 0 else blocks(9),
            ),
            "scatter": (
                lambda: group.scatter(make(9), blocks(0) if rank == 0 else None, 0),
                base(rank),
            ),
            "reducescatter": (lambda: group.reducescatter(make(9), blocks(0)), size * base(rank)),
            "alltoall": (
                lambda: group.alltoall(blocks(9), blocks(size * rank)),
                [base(size * r + rank) for r in range(size)],
            ),
            "sendrecv": (lambda: group.sendrecv(make(rank), to, make(9), of), base(of)),
            "tree": (
                lambda: list(group.allreduce({"a": make(rank), "b": [make(rank + 1)]}).values()),
                [total, [total + size]],
            ),
            "tree, donated": (
                lambda: group.allreduce([make(rank), make(0)], donate=True),
                [total, size * base(0)],
            ),
            "tree, broadcast": (
                lambda: group.broadcast([make(rank), make(rank)], 0),
                [base(0)] * 2,
            ),
            "sync_gradients": (
                lambda: sync_gradients([make(rank), make(rank)], group=group, average=False),
                [total, total],
            ),
            "Synchronizer": (
                lambda: Synchronizer([make(0), make(1)], group=group, average=False).sync(
                    [make(rank), make(0)]
                ),
                [total, size * base(0)],
            ),
        }
        if size > 1 and rank < 2:
            cases["send and recv"] = (
                lambda: group.send(make(0), 1) if rank == 0 else group.recv(make(9), 0),
                base(0),
            )
        for name, (call, expected) in cases.items():
            with report.case(name, shape):
                _compare(call(), expected)
        with report.case("one array of all", shape):
            stack = group.allgather(_stacked(base(9), size, order), make(rank))
            assert (np.asarray(stack) == np.stack(everyone)).all()
            stack = group.alltoall(
                _stacked(base(9), size, order), _stacked(base(rank), size, order)
            )
            assert (np.asarray(stack) == np.stack(everyone)).all()
        with report.case("what was given stays as it was", shape):
            x = make(rank)
            group.allreduce(x)
            assert (np.asarray(x) == base(rank)).all()
    report.done()


def _stacked(values: np.ndarray, size: int, order: Sequence[int]) -> Any:
    """Return ``size`` times these values in one array, whose first axis is the slowest and the others as ``order``."""
    return _laid_out(np.stack([values] * size), (0, *(axis + 1 for axis in order)))


def _compare(result: Any, expected: Any) -> None:
    if isinstance(expected, list):
        assert len(result) == len(expected)
        for one, other in zip(result, expected, strict=True):
            _compare(one, other)
    elif result is not None:  # send() returns nothing
        np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))


@pytest.mark.parametrize("alone", [False, True], ids=["every rank", "rank 0"])
def test_elements_are_matched_by_index(pool: RankPool, world: World, alone: bool) -> None:
    pool.run(world.size, every_operation, world, alone)


def refuses_a_copy(rank: int, world_size: int, world: World) -> None:
    group = world.group()
    with pytest.raises(col.OptionError, match="strided"):
        group.broadcast(_laid_out(_numbers((2, 3)), (1, 0)), rank, copy=False)


@pytest.mark.gloo
def test_a_staging_copy_can_be_refused(pool: RankPool, provider: str) -> None:
    pool.run(2, refuses_a_copy, World(2, "gloo", provider))
