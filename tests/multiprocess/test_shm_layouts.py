"""Large allreduces of tensors in any memory layout, alike on all ranks or not; what lies between elements stays."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from pool import RankPool
from shm_ranks import fresh, numpy_dtype, own_group

import colltensor as col
from colltensor.types import DTYPES

Array = np.ndarray[Any, Any]
SHAPE = (70, 66, 130)
ORDERS = tuple(itertools.permutations(range(3)))


def laid_out(values: Array, layout: int) -> tuple[Array, Array]:
    """Return an array of these values in another layout, and all of the memory around it."""
    order = ORDERS[layout % len(ORDERS)]
    back = np.argsort(order)
    shape = [values.shape[axis] for axis in order]
    gap = layout // len(ORDERS) % 3  # none, behind each row, between elements
    room = np.full(
        (*shape[:2], shape[2] + 3 if gap == 1 else shape[2] * (2 if gap == 2 else 1)),
        1,
        values.dtype,
    )
    inside = room[:, :, 2:-1] if gap == 1 else room[:, :, ::2] if gap == 2 else room
    if layout // len(ORDERS) == 3:
        inside = inside[::-1]
    array = inside.transpose(back)
    assert array.shape == values.shape
    array[...] = values
    return array, room


def meet(rank: int, size: int, name: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    with own_group(rank, size, name) as group:
        for step in range(30):
            dtype = numpy_dtype(
                DTYPES[("float32", "uint8", "float64", "int16", "complex128", "float16")[step % 6]]
            )
            shape = SHAPE if step % 2 else (1, *SHAPE[1:])
            values = [random.integers(0, 20, shape).astype(dtype) for _ in range(size)]
            layouts = random.integers(0, 4 * len(ORDERS), size)
            if step % 3 == 0:
                layouts[:] = layouts[0]
            elif step % 3 == 1:
                layouts[0] = 0  # a row-major one among the others
            array, room = laid_out(values[rank], int(layouts[rank]))
            untouched = room.copy()
            assert group.allreduce(array) is array
            np.testing.assert_array_equal(array, sum(values[1:], values[0]), f"{step} {layouts}")
            array[...] = values[rank]
            np.testing.assert_array_equal(room, untouched)
            with pytest.raises(col.MismatchError):
                group.allreduce(array if rank else array.reshape(-1)[1:].copy())
            np.testing.assert_array_equal(room, untouched)


@pytest.mark.parametrize("size", [2, 3])
def test_layouts_alike_and_not(pool: RankPool, size: int) -> None:
    pool.run(size, meet, fresh(), size)


def turned(rank: int, size: int, name: str) -> None:
    """Ranks whose elements lie in an order of their own match them by index."""
    with own_group(rank, size, name) as group:
        # beside the signature, in one block, in several, read from the other's memory
        for count in (3, 40, 700, 1100):
            index = np.arange(count * count, dtype=np.float32).reshape(count, count) % 1009
            for alike in (True, False):
                x = index.copy() if rank == 0 and not alike else np.asfortranarray(index)
                group.allreduce(x)
                np.testing.assert_array_equal(x, size * index)


def test_a_row_major_array_meets_a_column_major_one(pool: RankPool) -> None:
    pool.run(2, turned, fresh())
