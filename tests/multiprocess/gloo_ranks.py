"""A rank of the Gloo backend's own tests: a backend on a fake control plane, its values, and what is expected."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from fake_control import FakeControl

from colltensor.backends import get_backend
from colltensor.types import CPU, DTYPES, DType, ReduceOp
from colltensor.view import BufferView

SUM = ReduceOp.SUM


class Ranks:
    """One rank's backend and control plane, for the time of a test."""

    def __init__(self, path: str, rank: int, size: int, provider: str, **options: Any) -> None:
        self.rank, self.size = rank, size
        self.control = FakeControl(path, rank, size)
        settings = {"timeout_s": 20.0, "interface": None, "provider": provider} | options
        self.restore: Callable[[], object] = bool
        self.shrunk = False
        self.backend: Any = get_backend("gloo").create(self.control, self.control, **settings)

    def shrink(self, direct_nbytes: int, block_nbytes: int, whole_nbytes: int = 0) -> None:
        """Make thresholds small, so that few elements take the ways of many."""
        from colltensor.backends.gloo import backend
        from colltensor.backends.gloo.composed import Composer

        if not self.shrunk:
            self.restore = functools.partial(
                setattr, backend, "DIRECT_NBYTES", backend.DIRECT_NBYTES
            )
            self.shrunk = True
        if self.backend._own is not None:
            self.backend._provider.limit(
                direct_nbytes if whole_nbytes == 0 else whole_nbytes, block_nbytes, 2
            )
            return
        backend.DIRECT_NBYTES = direct_nbytes  # type: ignore[misc]
        self.backend._composer = Composer(
            self.backend._provider,
            self.rank,
            self.size,
            block_nbytes=block_nbytes,
            whole_nbytes=whole_nbytes,
        )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self.control.allgather(b"", soon())
        self.backend.close()
        self.control.close()
        self.restore()


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    if dtype.name in np.sctypeDict:
        return np.dtype(dtype.name)
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, dtype.name))


def view(
    array: np.ndarray[Any, Any], dtype: DType | None = None, *, readonly: bool = False
) -> BufferView:
    dtype = dtype or DTYPES[array.dtype.name]
    return BufferView.from_address(
        array.ctypes.data, array.shape, dtype, device=CPU, readonly=readonly, owner=array
    )


def values(rank: int, count: int, dtype: DType, salt: int = 0) -> np.ndarray[Any, Any]:
    """Return elements that no other rank, index or salt has, as far as the type can tell them apart."""
    numbers = np.arange(count) * 7 + rank * 31 + salt * 101 + 1
    if dtype.kind == "b":
        return numbers % 3 == 0
    if dtype.kind == "c":
        return (numbers + 1j * (numbers[::-1] + 0.5)).astype(dtype.name)
    if dtype.kind == "f" and dtype.itemsize < 4:
        numbers = numbers % 61 / 8
    if dtype.kind == "f" and dtype.itemsize >= 4:
        numbers = numbers / 4
    return numbers.astype(numpy_dtype(dtype))


def expected(
    op: ReduceOp, inputs: list[np.ndarray[Any, Any]], dtype: DType
) -> np.ndarray[Any, Any]:
    """Reduce in rank order with numpy, in float32 for types of 16 bits."""
    if dtype.kind == "b":
        inputs = [array.astype(np.int64) for array in inputs]
        either, both = np.stack(inputs).max(axis=0), np.stack(inputs).min(axis=0)
        odd = np.stack(inputs).sum(axis=0) % 2
        chosen = {
            "SUM": either,
            "MAX": either,
            "BOR": either,
            "PRODUCT": both,
            "MIN": both,
            "BAND": both,
            "BXOR": odd,
        }
        return chosen[op.name].astype(bool)
    wide = [
        array.astype(np.float32) if dtype.kind == "f" and dtype.itemsize == 2 else array
        for array in inputs
    ]
    function = {
        "SUM": np.add,
        "AVERAGE": np.add,
        "PRODUCT": np.multiply,
        "MIN": np.minimum,
        "MAX": np.maximum,
        "BAND": np.bitwise_and,
        "BOR": np.bitwise_or,
        "BXOR": np.bitwise_xor,
    }[op.name]
    with np.errstate(all="ignore"):
        result = wide[0].copy()
        for array in wide[1:]:
            result = function(result, array)
        if op is ReduceOp.AVERAGE:
            result = result / result.dtype.type(len(inputs))
        return result.astype(inputs[0].dtype)


def check(
    got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], dtype: DType, label: str
) -> None:
    """Compare bits; only native sums of floats may differ, by the order of addition."""
    if dtype.kind in "fc" and dtype.itemsize >= 4:
        np.testing.assert_allclose(got, wanted, rtol=1e-5, err_msg=label)
    else:
        np.testing.assert_array_equal(got, wanted, err_msg=label)


def reducible() -> Iterator[tuple[DType, ReduceOp]]:
    from colltensor.backends.rules import _PAIRS

    return iter(sorted(_PAIRS, key=lambda pair: (pair[0].code, pair[1])))
