"""The adapter for every other object that exports DLPack."""

from __future__ import annotations

import ctypes
import math
from typing import Any, Final

from colltensor import dlpack
from colltensor.adapters.base import AdapterBase
from colltensor.errors import (
    DeviceError,
    ReadOnlyError,
    UnsupportedDTypeError,
    UnsupportedTensorError,
)
from colltensor.types import CPU, DTYPES, Device
from colltensor.view import LEGACY_STREAM, BufferView

_CPU: Final = 1
_CUDA: Final = 2
_COMPLEX: Final = 5
_DTYPE_OFFSET: Final = 20
"""Where DLTensor, with which DLManagedTensor begins, has its dtype: after data, device and ndim."""
_capsule_pointer: Final = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


class DlpackAdapter(AdapterBase):
    """Any object that exports DLPack, taken to be mutable unless it says otherwise."""

    name = "dlpack"

    def claims(self, kind: type) -> bool:
        return hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__")

    def source(self, tensor: Any) -> BufferView:
        return view_of(tensor)[0]

    def target(self, tensor: Any) -> BufferView:
        view, flags = view_of(tensor)
        if view.readonly:
            raise ReadOnlyError(
                f"{type(tensor).__name__} exports its memory as read-only (others may share it, as they do Arrow's) "
                "and the call would write to it; pass a copy, numpy.array(x), and use that"
            )
        if flags & dlpack.IS_COPIED:
            raise ReadOnlyError(
                f"{type(tensor).__name__} exports a copy of its memory, so that what the call writes would be lost; "
                "pass numpy.array(x), and use that"
            )
        return view


def view_of(tensor: Any) -> tuple[BufferView, int]:
    """View a tensor's export, read-only where the export says so, and return the export's flags.

    Raises:
        TensorError: It does not export its memory, or its export cannot be used.
    """
    kind, index = tensor.__dlpack_device__()  # the index is None on the host in paddle 3.3
    if kind not in (_CPU, _CUDA):
        raise DeviceError(
            f"the tensor is on DLPack device type {int(kind)}; move it to cpu or cuda, where collectives work"
        )

    try:
        handle, flags = dlpack.export_with_flags(tensor)
    except BufferError as error:
        raise ReadOnlyError(
            f"{type(tensor).__name__} does not export its memory ({error}); pass a copy"
        ) from error
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise UnsupportedTensorError(
            f"{type(tensor).__name__} cannot be exported through DLPack: {error}"
        ) from error

    name = _dtype_name(handle)
    dtype = DTYPES.get(name)
    if dtype is None:
        raise UnsupportedDTypeError(f"dtype {name} is not supported; known are {', '.join(DTYPES)}")

    pointer, shape = handle.data_ptr(), tuple(handle.shape)
    strides = None if handle.is_contiguous() else tuple(handle.strides)
    device, stream = (CPU, None) if kind == _CPU else (Device("cuda", int(index)), LEGACY_STREAM)
    count, readonly = math.prod(shape), bool(flags & dlpack.READ_ONLY)
    view = BufferView(
        pointer, count, dtype, device, shape, strides, readonly, handle, tensor, stream
    )
    return view, flags


def _dtype_name(handle: Any) -> str:
    """Return numpy's name of a handle's dtype.

    tvm_ffi 0.1.15 cannot name complex types, so theirs is read from the DLPack capsule itself
    (``code``, ``bits``: one byte each). To go when ``str(handle.dtype)`` gives "complex64".
    """
    try:
        return str(handle.dtype)
    except ValueError:
        capsule = handle.__dlpack__()
        code, bits = ctypes.string_at(_capsule_pointer(capsule, b"dltensor") + _DTYPE_OFFSET, 2)
        return f"complex{bits}" if code == _COMPLEX else f"of DLPack code {code} with {bits} bits"


ADAPTER: Final = DlpackAdapter()
