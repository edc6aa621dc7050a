"""Elements: how NCCL spells data types and reduce ops, and what stands in where it has none.

NCCL's numbers are those of its header (``ncclDataType_t`` and ``ncclRedOp_t`` in nccl.h).
"""

from __future__ import annotations

import functools
from typing import Final, NamedTuple

from colltensor.backends.rules import require as require_defined
from colltensor.errors import UnsupportedDTypeError
from colltensor.operations import REDUCTIONS
from colltensor.types import DTYPES, DType, ReduceOp

BYTE: Final = 1
"""``ncclUint8``: what moves travel as."""
_TYPES: Final = {
    "int8": 0,
    "uint8": 1,
    "int32": 2,
    "uint32": 3,
    "int64": 4,
    "uint64": 5,
    "float16": 6,
    "float32": 7,
    "float64": 8,
    "bfloat16": 9,
}
_SUM, _PRODUCT, _MAX, _MIN, _AVERAGE = range(5)
_OPS: Final = {
    ReduceOp.SUM: _SUM,
    ReduceOp.PRODUCT: _PRODUCT,
    ReduceOp.MAX: _MAX,
    ReduceOp.MIN: _MIN,
    ReduceOp.AVERAGE: _AVERAGE,
}
_LOGICAL: Final = {
    ReduceOp.SUM: _MAX,
    ReduceOp.MAX: _MAX,
    ReduceOp.BOR: _MAX,
    ReduceOp.PRODUCT: _MIN,
    ReduceOp.MIN: _MIN,
    ReduceOp.BAND: _MIN,
}
"""bool is a byte of 0 or 1: or is the greater of two, and is the smaller."""
_SIGNIFICANDS: Final = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}
"""How many bits of a float are its significand's."""
_ORDERED: Final = frozenset({ReduceOp.MIN, ReduceOp.MAX})


class NcclReduction(NamedTuple):
    """How a reduction is put to NCCL.

    Attributes:
        datatype: NCCL's data type.
        op: NCCL's reduce op.
        parts: How many of NCCL's elements make one.
        encoded: Whether elements travel as keys; see ``OrderEncoding``.
    """

    datatype: int
    op: int
    parts: int
    encoded: bool


@functools.cache
def reduction(dtype: DType, op: ReduceOp) -> NcclReduction | None:
    """Return how NCCL combines elements of ``dtype`` with ``op``, or None if it cannot."""
    if dtype.kind == "b":
        return NcclReduction(BYTE, _LOGICAL[op], 1, False) if op in _LOGICAL else None
    if dtype.kind == "c":
        part = "float32" if dtype.itemsize == 8 else "float64"
        return (
            NcclReduction(_TYPES[part], _OPS[op], 2, False)
            if op in (ReduceOp.SUM, ReduceOp.AVERAGE)
            else None
        )
    if dtype.kind == "f" and op in _ORDERED and dtype.name in _TYPES:
        return NcclReduction(_TYPES[order_encoding(dtype).keys.name], _OPS[op], 1, True)
    if dtype.name not in _TYPES or op not in _OPS:
        return None
    return NcclReduction(_TYPES[dtype.name], _OPS[op], 1, False)


def require(operation: str, dtype: DType, op: ReduceOp | None) -> None:
    """Raise UnsupportedDTypeError or OptionError if the call cannot be done with NCCL."""
    require_defined(operation, dtype, op)
    if op is None or operation not in REDUCTIONS or reduction(dtype, op) is not None:
        return
    raise UnsupportedDTypeError(
        f"NCCL has no {operation} with op={op.name} of {dtype}; convert it to a type that it has ({', '.join(_TYPES)}; "
        "bitwise ops only of bool), or move it to cpu"
    )


class OrderEncoding(NamedTuple):
    """How floats become integers of the same order.

    NCCL's own minimum and maximum of floats drop a NaN where the other operand is none. Read as a
    signed integer, a positive float keeps its order and a negative one has it reversed (IEEE
    754-2019, 3.4: sign, exponent, significand from the top), which turning all bits but the sign
    mends. A NaN, of either sign, becomes the integer that is found::

        key = nan            if (bits & mask) > infinity
              bits ^ mask    if bits < 0
              bits           else
        bits = key ^ mask if key < 0 else key

    Attributes:
        bits: Signed integers of the floats' width.
        keys: The signed integers that travel, of a width that NCCL has.
        mask: All bits but the sign.
        infinity: The bits of infinity, above which are those of NaN.
        least: The key of NaN for MIN.
    """

    bits: DType
    keys: DType
    mask: int
    infinity: int
    least: int

    def nan(self, op: ReduceOp) -> int:
        """Return the key of NaN, whose bits are a NaN's again."""
        return self.mask if op is ReduceOp.MAX else self.least


@functools.cache
def order_encoding(dtype: DType) -> OrderEncoding:
    """Return how the floats of a type become keys."""
    width = 8 * dtype.itemsize
    mask = (1 << (width - 1)) - 1
    significand = _SIGNIFICANDS[dtype.name]
    bits = DTYPES[f"int{width}"]
    return OrderEncoding(
        bits,
        max(bits, DTYPES["int32"], key=_width),
        mask,
        mask >> significand << significand,
        ~mask,
    )


def _width(dtype: DType) -> int:
    return dtype.itemsize
