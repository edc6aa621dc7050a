"""The map from numpy's data types to ColTensor's, shared by the numpy, JAX and CuPy adapters."""

from __future__ import annotations

from typing import Any, Final

import ml_dtypes
import numpy as np

from colltensor.errors import UnsupportedDTypeError
from colltensor.types import DTYPES, DType


def numpy_dtype(dtype: DType) -> np.dtype[Any] | None:
    """Return numpy's data type for ours, or None where this ml_dtypes is too old to have it."""
    extension = getattr(ml_dtypes, dtype.name, None)
    if extension is not None:
        found: np.dtype[Any] = np.dtype(extension)
        return found
    # numpy 1 warns of its old name `bool`
    return np.dtype(dtype.name) if dtype.name == "bool" or hasattr(np, dtype.name) else None


def host_dtype(dtype: DType) -> np.dtype[Any]:
    """Return numpy's data type for ours, or an integer of its width where there is none."""
    return numpy_dtype(dtype) or np.dtype(f"uint{8 * dtype.itemsize}")


DTYPE_OF: Final = {
    found: dtype for dtype in DTYPES.values() if (found := numpy_dtype(dtype)) is not None
}
"""ColTensor's data type by numpy's; byte orders other than the machine's are absent."""

CARRIER_OF: Final = {
    dtype: np.dtype(f"uint{8 * dtype.itemsize}")
    for found, dtype in DTYPE_OF.items()
    if found.isbuiltin != 1
}
"""Integers that carry the bits of types that numpy does not know and cannot export by DLPack."""


def unsupported_dtype(dtype: Any) -> UnsupportedDTypeError:
    """Return the error for a data type without a counterpart, with the remedy that fits it."""
    if getattr(dtype, "names", None):
        remedy = "structured dtypes have no arithmetic: pass each field, x['name'], or a view of plain numbers"
    elif getattr(dtype, "str", "") in ("|V1", "|V2") and dtype.type.__name__ == "void":
        name = "bfloat16" if dtype.itemsize == 2 else "float8_e4m3fn"
        remedy = (
            "numpy.load and others, which do not know the types of ml_dtypes, make such arrays of them: pass "
            f"x.view(ml_dtypes.{name}), or what it was"
        )
    elif getattr(dtype, "byteorder", "=") in "<>" and getattr(dtype, "isnative", True) is False:
        remedy = "its byte order is not this machine's: use x.astype(x.dtype.newbyteorder('='))"
    elif getattr(dtype, "kind", "") == "O":
        remedy = "objects are no numbers: convert them with x.astype(float), or use broadcast_object/allgather_object"
    else:
        remedy = f"known are {', '.join(DTYPES)}"
    return UnsupportedDTypeError(f"dtype {dtype} is not supported; {remedy}")
