"""Which operations are defined for which data types, on any backend."""

from __future__ import annotations

from typing import Final

from colltensor.errors import OptionError, UnsupportedDTypeError
from colltensor.operations import REDUCTIONS
from colltensor.types import DTYPES, DType, ReduceOp

_ARITHMETIC: Final = frozenset({ReduceOp.SUM, ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.MAX})
_BITWISE: Final = frozenset({ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR})
_OPS_OF_KIND: Final = {
    "b": _ARITHMETIC | _BITWISE,
    "i": _ARITHMETIC | _BITWISE,
    "u": _ARITHMETIC | _BITWISE,
    "f": _ARITHMETIC | {ReduceOp.AVERAGE},
    "c": frozenset({ReduceOp.SUM, ReduceOp.AVERAGE}),
}
_PAIRS: Final = frozenset(
    (dtype, op)
    for dtype in DTYPES.values()
    if not dtype.moves_only
    for op in _OPS_OF_KIND[dtype.kind]
)


def require(operation: str, dtype: DType, op: ReduceOp | None) -> None:
    """Check that ``operation`` is defined for elements of ``dtype``, on any backend.

    Args:
        operation: The name of the collective, ``"allreduce"``.
        dtype: The elements' true type.
        op: How elements are combined; None where nothing is.

    Raises:
        UnsupportedDTypeError: The operation is not defined for this type.
        OptionError: A reduction without ``op``.
    """
    if (dtype, op) in _PAIRS or operation not in REDUCTIONS:
        return

    if op is None:
        raise OptionError(
            f"{operation} needs a reduce op: expected one of {', '.join(ReduceOp.__members__)}, got None"
        )
    if dtype.moves_only:
        raise UnsupportedDTypeError(
            f"{operation} with op={op.name} is not defined for {dtype}, which can only be moved (broadcast, gather, "
            "send ...); convert it to float16, bfloat16 or float32 first"
        )

    defined = ", ".join(sorted(other.name for other in _OPS_OF_KIND[dtype.kind]))
    remedy = "use one of these"
    if op is ReduceOp.AVERAGE:
        remedy = "convert it to a floating-point type first, or take the SUM and divide it by the number of ranks"
    if dtype.kind == "c":
        remedy = "use one of these, or reduce the real and imaginary parts on their own"
    raise UnsupportedDTypeError(
        f"{operation} with op={op.name} is not defined for {dtype}, which has {defined}; {remedy}"
    )
