"""Elements: how NCCL spells data types and reduce ops, and what stands in where it has none.

NCCL's numbers are those of its header (``ncclDataType_t`` and ``ncclRedOp_t`` in nccl.h). Imports no framework: arrays
come with the module whose functions work on them.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from colltensor.backends.base import REDUCTIONS
from colltensor.backends.base import require as require_defined
from colltensor.errors import UnsupportedDTypeError
from colltensor.types import DTYPES, DType, ReduceOp

BYTE: Final = 1
"""``ncclUint8``: what moves travel as."""
_TYPES: Final = {
    "int8": 0, "uint8": 1, "int32": 2, "uint32": 3, "int64": 4, "uint64": 5, "float16": 6, "float32": 7, "float64": 8,
    "bfloat16": 9,
}
_SUM, _PRODUCT, _MAX, _MIN, _AVERAGE = range(5)
_OPS: Final = {
    ReduceOp.SUM: _SUM, ReduceOp.PRODUCT: _PRODUCT, ReduceOp.MAX: _MAX, ReduceOp.MIN: _MIN, ReduceOp.AVERAGE: _AVERAGE
}
_LOGICAL: Final = {
    ReduceOp.SUM: _MAX, ReduceOp.MAX: _MAX, ReduceOp.BOR: _MAX, ReduceOp.PRODUCT: _MIN, ReduceOp.MIN: _MIN,
    ReduceOp.BAND: _MIN,
}
"""bool is a byte of 0 or 1: or is the greater of two, and is the smaller."""
_ORDERED: Final = frozenset({ReduceOp.MIN, ReduceOp.MAX})


class Spelling(NamedTuple):
    """How a reduction is put to NCCL.

    Attributes:
        datatype: NCCL's data type.
        op: NCCL's reduce op.
        parts: How many of NCCL's elements make one.
        keyed: Whether elements travel as ``keys``.
    """

    datatype: int
    op: int
    parts: int
    keyed: bool


def spelling(dtype: DType, op: ReduceOp) -> Spelling | None:
    """Return how NCCL combines elements of ``dtype`` with ``op``, or None if it cannot."""
    if dtype.kind == "b":
        return Spelling(BYTE, _LOGICAL[op], 1, False) if op in _LOGICAL else None
    if dtype.kind == "c":
        part = "float32" if dtype.itemsize == 8 else "float64"
        return Spelling(_TYPES[part], _OPS[op], 2, False) if op in (ReduceOp.SUM, ReduceOp.AVERAGE) else None
    if dtype.kind == "f" and op in _ORDERED and dtype.name in _TYPES:
        return Spelling(_TYPES["int64" if dtype.itemsize == 8 else "int32"], _OPS[op], 1, True)
    if dtype.name not in _TYPES or op not in _OPS:
        return None
    return Spelling(_TYPES[dtype.name], _OPS[op], 1, False)


def require(operation: str, dtype: DType, op: ReduceOp | None) -> None:
    """Raise UnsupportedDTypeError or OptionError if the call cannot be done with NCCL."""
    require_defined(operation, dtype, op)
    if op is None or operation not in REDUCTIONS or spelling(dtype, op) is not None:
        return
    raise UnsupportedDTypeError(
        f"NCCL has no {operation} with op={op.name} of {dtype}; convert it to a type that it has ({', '.join(_TYPES)}; "
        "bitwise ops only of bool), or move it to cpu"
    )


def key_dtype(dtype: DType) -> DType:
    """Return the type of the keys of a floating-point type."""
    return DTYPES["int64"] if dtype.itemsize == 8 else DTYPES["int32"]


def keys(array: Any, dtype: DType, op: ReduceOp, xp: Any) -> Any:
    """Return integers in the order of the floats, with NaN where MIN or MAX finds it.

    NCCL's own minimum and maximum of floats drop a NaN where the other operand is none. Read as an integer, a positive
    float keeps its order and a negative one has it reversed (IEEE 754-2019, 3.4: sign, exponent, significand from the
    top), which turning all bits but the sign mends.

    Args:
        array: The elements; bfloat16 as uint16.
        dtype: Their true type.
        op: MIN or MAX.
        xp: The module whose functions work on ``array``.
    """
    if dtype.name == "bfloat16":
        array = (array.astype(xp.uint32) << 16).view(xp.float32)
    elif dtype.name == "float16":
        array = array.astype(xp.float32)
    whole = xp.int64 if dtype.itemsize == 8 else xp.int32
    bits = array.view(whole)
    limits = xp.iinfo(whole)
    ordered = xp.where(bits < 0, bits ^ limits.max, bits)
    return xp.where(xp.isnan(array), limits.max if op is ReduceOp.MAX else limits.min, ordered).astype(whole)


def from_keys(array: Any, dtype: DType, xp: Any) -> Any:
    """Return the floats of ``keys``; bfloat16 as uint16."""
    limits = xp.iinfo(array.dtype)
    bits = xp.where(array < 0, array ^ limits.max, array).astype(array.dtype)
    if dtype.name == "bfloat16":
        return (bits.view(xp.uint32) >> 16).astype(xp.uint16)
    floats = bits.view(xp.float64 if dtype.itemsize == 8 else xp.float32)
    return floats.astype(xp.float16) if dtype.name == "float16" else floats
