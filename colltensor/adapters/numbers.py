"""The adapter for numbers: Python's and numpy's scalars, whose results are new ones."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from colltensor.adapters._numpy_dtypes import DTYPE_OF
from colltensor.adapters.base import AdapterBase
from colltensor.errors import UnsupportedDTypeError
from colltensor.types import CPU
from colltensor.view import BufferView

_DTYPES: Final = {
    kind: np.dtype(name)
    for kind, name in ((bool, "bool"), (int, "int64"), (float, "float64"), (complex, "complex128"))
}
"""Those of Python's numbers, the same on every system."""


class NumberAdapter(AdapterBase):
    """bool, int, float and complex, and numpy's scalars, as arrays of no axis."""

    name = "number"
    immutable = True

    def claims(self, kind: type) -> bool:
        return kind in _DTYPES or (issubclass(kind, np.generic) and np.dtype(kind) in DTYPE_OF)

    def source(self, tensor: Any) -> BufferView:
        view = _view(_array(tensor))
        view.readonly = True
        return view

    def allocate_result(self, tensor: Any, donate: bool) -> tuple[Any, BufferView]:
        array = _array(tensor)
        return array, _view(array)

    def restored(self, result: Any, given: Any) -> Any:
        return result.item() if type(given) in _DTYPES else result[()]


def _array(number: Any) -> np.ndarray[Any, Any]:
    try:
        return np.array(number, _DTYPES.get(type(number)))
    except OverflowError:
        raise UnsupportedDTypeError(
            f"{number} does not fit int64, as which Python's int travels; pass numpy.uint64(x) or float(x) where that "
            "holds it, or use broadcast_object"
        ) from None


def _view(array: np.ndarray[Any, Any]) -> BufferView:
    return BufferView(
        array.ctypes.data, 1, DTYPE_OF[array.dtype], CPU, (), None, False, None, array
    )


ADAPTER: Final = NumberAdapter()
