"""Combine the ranks' elements on the host, in rank order.

What Gloo or its provider has not, or has wrong: 16-bit floats that accumulate in float32, MIN and
MAX that keep NaN, integers of any width, bool.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from colltensor.types import DTYPES, DType, ReduceOp

Array = np.ndarray[Any, Any]

ANY_MEMORY: Final = ctypes.c_char * (1 << 62)
"""An array type for all memory: one type serves every size, where ctypes takes 8 us for a new one.

``frombuffer(ANY_MEMORY.from_address(p), count=n)`` views n elements at p.
"""

CHUNK: Final = 1 << 16
"""Elements worked on at a time: what is read and written of them stays in a core's cache."""

_FUNCTIONS: Final[dict[ReduceOp, np.ufunc]] = {
    ReduceOp.SUM: np.add,
    ReduceOp.PRODUCT: np.multiply,
    ReduceOp.MIN: np.minimum,
    ReduceOp.MAX: np.maximum,
    ReduceOp.AVERAGE: np.add,
    ReduceOp.BAND: np.bitwise_and,
    ReduceOp.BOR: np.bitwise_or,
    ReduceOp.BXOR: np.bitwise_xor,
}
_BOOL_FUNCTIONS: Final[dict[ReduceOp, np.ufunc]] = {
    ReduceOp.SUM: np.logical_or,
    ReduceOp.MAX: np.logical_or,
    ReduceOp.BOR: np.logical_or,
    ReduceOp.PRODUCT: np.logical_and,
    ReduceOp.MIN: np.logical_and,
    ReduceOp.BAND: np.logical_and,
    ReduceOp.BXOR: np.logical_xor,
}
_STORED_AS: Final = {
    dtype: np.dtype({"bfloat16": "uint16", "bool": "uint8"}.get(name, name))
    for name, dtype in DTYPES.items()
    if not dtype.moves_only
}
_FENV_NBYTES: Final = 64
"""More than any C library's ``fenv_t`` has (glibc: 32 on x86-64, 8 on arm64)."""
_FE_DFL_ENV: Final = ctypes.c_void_p(-1)
"""A program's state at its start, as the C libraries of Linux name it."""


def _math_library() -> ctypes.PyDLL | None:
    for name in (None, "libm.so.6"):
        with contextlib.suppress(OSError):
            library = ctypes.PyDLL(name)
            if hasattr(library, "fesetenv"):
                return library
    return None


_libm: Final = _math_library() if sys.platform == "linux" else None
_FLOAT16: Final = DTYPES["float16"]
_BFLOAT16: Final = DTYPES["bfloat16"]
_BOOL: Final = DTYPES["bool"]


def combine(target: int, inputs: Sequence[int], count: int, dtype: DType, op: ReduceOp) -> None:
    """Write ``inputs[0] op inputs[1] op ...`` to ``target``, elementwise and from left to right.

    Args:
        target: Address of the result; it may be one of ``inputs`` and overlaps no other.
        inputs: Addresses of contiguous host memory, one a rank; only read.
        count: Elements of each.
        dtype: Their type. 16-bit floats are combined in float32 and rounded once, to nearest even.
        op: How they are combined; AVERAGE divides the sum by the number of inputs.
    """
    out = _array(target, count, dtype)
    arrays = [_array(pointer, count, dtype) for pointer in inputs]

    with float_state():
        if dtype is _FLOAT16 or dtype is _BFLOAT16:
            _combine_halves(out, arrays, dtype, op)
            return

        function = (_BOOL_FUNCTIONS if dtype is _BOOL else _FUNCTIONS)[op]
        if dtype is _BOOL:
            out = out.view(np.bool_)
        _combine_chunks(out, arrays, function)

        if op is ReduceOp.AVERAGE:
            np.true_divide(_reals(out), len(arrays), out=_reals(out))


def divide(pointer: int, count: int, dtype: DType, divisor: int) -> None:
    """Divide floating-point or complex elements in place."""
    elements = _reals(_array(pointer, count, dtype))
    with float_state():
        np.true_divide(elements, divisor, out=elements)


def widen(target: int, source: int, count: int, dtype: DType) -> None:
    """Write 16-bit floats as float32."""
    wide, halves = np.frombuffer(_memory(target), np.float32, count), _array(source, count, dtype)
    with float_state():
        (_widen_float16 if dtype is _FLOAT16 else _widen_bfloat16)(halves, wide)


def narrow(target: int, source: int, count: int, dtype: DType) -> None:
    """Round float32 to 16-bit floats, to nearest even."""
    wide, halves = np.frombuffer(_memory(source), np.float32, count), _array(target, count, dtype)
    scratch = np.empty(min(CHUNK, count), np.float32)
    with float_state():
        for start in range(0, count, CHUNK):
            part = wide[start : start + CHUNK]
            own = scratch[: len(part)]
            (_narrow_float16 if dtype is _FLOAT16 else _narrow_bfloat16)(
                part, own, halves[start : start + CHUNK]
            )


@contextlib.contextmanager
def float_state() -> Iterator[None]:
    """Compute as in native code, whatever state the thread is in.

    Subnormals are numbers, and nothing is reported. XLA's threads flush subnormals to zero, and so
    do those in which ``torch.set_flush_denormal(True)`` was called.
    """
    outer = ctypes.create_string_buffer(_FENV_NBYTES)
    if _libm is not None:
        _libm.fegetenv(outer)
        _libm.fesetenv(_FE_DFL_ENV)
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        if _libm is not None:
            _libm.fesetenv(outer)


def _reals(elements: Array) -> Array:
    """Return complex elements as pairs of reals.

    numpy's division of a complex infinity by a number gives NaN.
    """
    return elements.view(elements.real.dtype) if elements.dtype.kind == "c" else elements


def _array(pointer: int, count: int, dtype: DType) -> Array:
    return np.frombuffer(_memory(pointer), _STORED_AS[dtype], count)


def _memory(pointer: int) -> Any:
    return ANY_MEMORY.from_address(pointer)


def _combine_chunks(out: Array, arrays: Sequence[Array], function: np.ufunc) -> None:
    if len(arrays) == 2:
        function(arrays[0], arrays[1], out=out)
        return
    if len(arrays) == 1:
        np.copyto(out, arrays[0], casting="unsafe")
        return
    partial = np.empty(min(CHUNK, len(out)), out.dtype)
    for start in range(0, len(out), CHUNK):
        stop = start + CHUNK
        first = arrays[0][start:stop]
        sums = partial[: len(first)]
        function(first, arrays[1][start:stop], out=sums)
        for other in arrays[2:-1]:
            function(sums, other[start:stop], out=sums)
        function(sums, arrays[-1][start:stop], out=out[start:stop])


def _combine_halves(out: Array, arrays: Sequence[Array], dtype: DType, op: ReduceOp) -> None:
    widen, narrow = (
        (_widen_float16, _narrow_float16)
        if dtype is _FLOAT16
        else (_widen_bfloat16, _narrow_bfloat16)
    )
    function = _FUNCTIONS[op]
    size = min(CHUNK, len(out))
    partial, operand = np.empty(size, np.float32), np.empty(size, np.float32)

    for start in range(0, len(out), CHUNK):
        stop = start + CHUNK
        wide = partial[: len(out[start:stop])]
        other = operand[: len(wide)]

        widen(arrays[0][start:stop], wide)
        for array in arrays[1:]:
            widen(array[start:stop], other)
            function(wide, other, out=wide)
        if op is ReduceOp.AVERAGE:
            np.true_divide(wide, np.float32(len(arrays)), out=wide)
        narrow(wide, other, out[start:stop])


def _widen_float16(halves: Array, wide: Array) -> None:
    np.copyto(wide, halves)


def _narrow_float16(wide: Array, scratch: Array, halves: Array) -> None:
    np.copyto(halves, wide, casting="same_kind")


def _widen_bfloat16(halves: Array, wide: Array) -> None:
    """A bfloat16 is the upper half of a float32."""
    bits = wide.view(np.uint32)
    np.left_shift(halves, np.uint32(16), out=bits, dtype=np.uint32)


def _narrow_bfloat16(wide: Array, scratch: Array, halves: Array) -> None:
    """Round to nearest, ties to even.

    Adds half of the last place that is kept, less one where that place is 0.
    """
    bits, rounded = wide.view(np.uint32), scratch.view(np.uint32)
    lost = np.isnan(wide)
    np.right_shift(bits, 16, out=rounded)
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    np.copyto(halves, rounded, casting="unsafe")
    if lost.any():
        halves[lost] = (bits[lost] >> 16) | 0x40
