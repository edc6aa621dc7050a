"""What collectives must give, computed with numpy alone and without the package, and the values to give them.

Every value depends on rank and index, so that a swapped rank or a shifted block is seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]

INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
FLOATS = ("float16", "bfloat16", "float32", "float64")
COMPLEXES = ("complex64", "complex128")
FLOAT8 = tuple(
    name
    for name in (
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
        "float8_e4m3",
        "float8_e3m4",
        "float8_e4m3b11fnuz",
    )
    if hasattr(ml_dtypes, name)
)
REDUCIBLE = ("bool", *INTEGERS, *FLOATS, *COMPLEXES)
DTYPES = (*REDUCIBLE, *FLOAT8)

_rank_order = [True]

ARITHMETIC = ("SUM", "PRODUCT", "MIN", "MAX")
BITWISE = ("BAND", "BOR", "BXOR")


def ops_of(name: str) -> tuple[str, ...]:
    """Return the reduce operations that are defined for a dtype."""
    if name == "bool" or name in INTEGERS:
        return ARITHMETIC + BITWISE
    if name in FLOATS:
        return (*ARITHMETIC, "AVERAGE")
    return ("SUM", "AVERAGE") if name in COMPLEXES else ()


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return numpy's dtype of this name, ml_dtypes' where numpy has none."""
    return np.dtype(getattr(ml_dtypes, name, name))


def moved(name: str, count: int, rank: int, salt: int = 0) -> Array:
    """Return values for an operation that only moves: every byte depends on rank, index and ``salt``."""
    dtype = numpy_dtype(name)
    index = np.arange(count * dtype.itemsize, dtype=np.uint64)
    raw = (
        (index * np.uint64(2654435761) + np.uint64(7919 * rank + 104729 * salt + 12345))
        >> np.uint64(5)
    ) % 251
    if name == "bool":
        return (raw % 2 == 1)[:count]
    raw = raw.astype(np.uint8)
    # no NaN, whose payload bits a framework may change: exponents stay small
    if dtype.kind == "c" or name in FLOATS:
        parts = raw.view(f"uint{8 * (dtype.itemsize // (2 if dtype.kind == 'c' else 1))}")
        bits = 8 * parts.itemsize
        parts &= parts.dtype.type((1 << bits) - 1 - (1 << (bits - 2)))
    return raw.view(dtype)


def reduced(name: str, count: int, rank: int, salt: int = 0) -> Array:
    """Return values to be reduced; sums of floats are inexact, so that a wrong order or a double rounding shows."""
    index = np.arange(count, dtype=np.int64)
    if name == "bool":
        return ((index + salt) >> rank) % 2 == 1
    if name in INTEGERS:
        mixed = (index + 1 + salt).astype(np.uint64) * np.uint64(
            0x9E3779B97F4A7C15 + 2 * rank * 0x3C6EF372
        )
        return (mixed >> np.uint64(7)).astype(name)
    scale = 2.0 ** ((index + rank) % 7 - 3)
    real = np.sin(index * 1.37 + rank * 2.11 + salt * 0.71 + 0.3) * scale
    if name in COMPLEXES:
        return (real + 1j * np.cos(index * 0.77 + rank * 1.31 + salt) * scale).astype(name)
    return real.astype(numpy_dtype(name))


def combined(name: str, op: str, inputs: Sequence[Array]) -> tuple[Array, Array | None]:
    """Return the reduction of all ranks' values, and how far each element may be from it (None: equal bits)."""
    if name == "bool":
        trues = sum(values.astype(np.int64) for values in inputs)
        if op in ("SUM", "MAX", "BOR"):
            return trues > 0, None
        return (trues == len(inputs), None) if op != "BXOR" else (trues % 2 == 1, None)
    if name in INTEGERS:
        return _combined_integers(name, op, inputs), None
    if name in ("float16", "bfloat16"):
        return _combined_halves(name, op, inputs), _apart(name, op, inputs)
    stack = np.stack(inputs)
    if op in ("MIN", "MAX"):
        ordered = np.sort(stack, axis=0)  # NaN comes last, wherever it was
        found = ordered[-1] if op == "MAX" else ordered[0]
        return np.where(np.isnan(stack).any(axis=0), np.nan, found).astype(name), np.zeros(
            stack.shape[1:]
        )
    wider = {
        "float32": np.float64,
        "float64": np.longdouble,
        "complex64": np.complex128,
        "complex128": np.clongdouble,
    }
    wide = stack.astype(wider[name])
    exact = np.prod(wide, axis=0) if op == "PRODUCT" else np.sum(wide, axis=0)
    size = np.abs(exact) if op == "PRODUCT" else np.sum(np.abs(wide), axis=0)
    if op == "AVERAGE":
        exact, size = exact / len(inputs), size / len(inputs)
    part = np.finfo(name).eps
    return exact.astype(name), (size * part * (len(inputs) + 1)).astype(np.float64)


@contextlib.contextmanager
def in_another_order() -> Iterator[None]:
    """Let ``combined`` expect sums in any order, as between hosts, which 16-bit floats do not have by default."""
    _rank_order.append(False)
    try:
        yield
    finally:
        _rank_order.pop()


def _apart(name: str, op: str, inputs: Sequence[Array]) -> Array | None:
    """Return how far sums in two orders, in float32 and rounded once, may be apart; None where the order is given."""
    if _rank_order[-1] or op in ("MIN", "MAX"):
        return None
    wide = np.stack(inputs).astype(np.float64)
    size = np.abs(np.prod(wide, axis=0)) if op == "PRODUCT" else np.sum(np.abs(wide), axis=0)
    result = np.abs(_combined_halves(name, op, inputs).astype(np.float64))
    unit = result * float(ml_dtypes.finfo(name).eps) + float(
        ml_dtypes.finfo(name).smallest_subnormal
    )
    return unit + size * np.finfo(np.float32).eps * len(inputs)


def _combined_integers(name: str, op: str, inputs: Sequence[Array]) -> Array:
    if op in ("MIN", "MAX"):
        stack = np.stack(inputs)
        return stack.min(axis=0) if op == "MIN" else stack.max(axis=0)
    result = inputs[0].astype(np.uint64)  # modulo 2**64, and so modulo every smaller width
    for values in inputs[1:]:
        wide = values.astype(np.uint64)
        if op == "SUM":
            result = result + wide
        elif op == "PRODUCT":
            result = result * wide
        else:
            result = {"BAND": result & wide, "BOR": result | wide, "BXOR": result ^ wide}[op]
    return result.astype(name)


def _combined_halves(name: str, op: str, inputs: Sequence[Array]) -> Array:
    """Combine in float32, in rank order, and round once."""
    result = inputs[0].astype(np.float32)
    for values in inputs[1:]:
        wide = values.astype(np.float32)
        if op in ("SUM", "AVERAGE"):
            result = result + wide
        elif op == "PRODUCT":
            result = result * wide
        else:
            lost = np.isnan(result) | np.isnan(wide)
            ordered = np.where((result < wide) == (op == "MIN"), result, wide)
            result = np.where(lost, np.float32(np.nan), ordered)
    if op == "AVERAGE":
        result = result / np.float32(len(inputs))
    return result.astype(numpy_dtype(name))


def assert_values(got: Array, expected: Array, tolerance: Array | None) -> None:
    """Compare values: bit by bit, or within ``tolerance``; NaN is equal to NaN."""
    assert got.dtype == expected.dtype, f"dtype {got.dtype}, expected {expected.dtype}"
    assert got.shape == expected.shape, f"shape {got.shape}, expected {expected.shape}"
    if got.tobytes() == expected.tobytes():
        return
    with np.errstate(all="ignore"):
        wide = np.complex128 if got.dtype.kind == "c" else np.float64
        if tolerance is None:
            wrong = got.view(f"uint{8 * got.itemsize}") != expected.view(f"uint{8 * got.itemsize}")
            if got.dtype.kind not in "biu":
                wrong &= ~(np.isnan(got.astype(wide)) & np.isnan(expected.astype(wide)))
        else:
            close = np.abs(got.astype(wide) - expected.astype(wide)) <= tolerance
            wrong = ~(close | (got == expected) | (np.isnan(got) & np.isnan(expected)))
    places = np.flatnonzero(wrong)
    assert not len(places), (
        f"{len(places)} of {got.size} wrong, first at {places[0]}: got {got[places[:4]]}, "
        f"expected {expected[places[:4]]}"
    )
