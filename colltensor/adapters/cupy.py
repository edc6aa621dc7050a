"""The adapter for CuPy arrays, and the memory functions of CUDA devices that use CuPy's kernels."""

from __future__ import annotations

import functools
import warnings
from typing import Any, Final

import cupy as cp

from colltensor.adapters._numpy_dtypes import DTYPE_OF, unsupported_dtype
from colltensor.adapters.base import AdapterBase
from colltensor.adapters.numpy import MEMORY as HOST
from colltensor.errors import UnsupportedTensorError
from colltensor.types import UINT8, Device
from colltensor.view import BufferView

_WIDTHS: Final = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64", 16: "complex128"}


class CupyAdapter(AdapterBase):
    """cupy.ndarray on any CUDA device, in place."""

    name = "cupy"

    def claims(self, kind: type) -> bool:
        return kind is cp.ndarray

    def source(self, tensor: Any) -> BufferView:
        return _view(tensor)

    def stream(self, index: int) -> int:
        return _current_stream(index)


def _view(array: Any) -> BufferView:
    dtype = DTYPE_OF.get(array.dtype)
    if dtype is None:
        raise unsupported_dtype(array.dtype)
    strides = None
    if not array.flags.c_contiguous:
        if any(step % array.itemsize for step in array.strides):
            raise UnsupportedTensorError(
                f"its strides {array.strides} cut through items; pass x.copy()"
            )
        strides = tuple(step // array.itemsize for step in array.strides)
    device = Device("cuda", array.data.device_id)
    stream = _current_stream(device.index)
    return BufferView(
        array.data.ptr, array.size, dtype, device, array.shape, strides, False, None, array, stream
    )


def _current_stream(index: int) -> int:
    stream: int = cp.cuda.get_current_stream(index).ptr
    return stream


@functools.lru_cache(maxsize=256)
def _stream(stream: int, device: int) -> Any:
    """Return CuPy's object of a stream; kept, because making one warns of its deprecation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return cp.cuda.ExternalStream(stream, device)


class DeviceMemory:
    """Staging buffers on a CUDA device, and copies between layouts on its current stream."""

    def allocate(self, nbytes: int, like: BufferView | None = None) -> BufferView:
        if like is None:
            raw = cp.empty(nbytes, cp.uint8)
        else:
            # CuPy's pool gives freed memory back to the stream that asked for it, in its order.
            with cp.cuda.Device(like.device.index):
                before = cp.cuda.get_current_stream(like.device.index)
                try:
                    _stream(like.stream or 0, like.device.index).use()
                    raw = cp.empty(nbytes, cp.uint8)
                finally:
                    # CuPy's own ``with stream`` forgets a stream that ``use()`` had made current.
                    before.use()
        device = Device("cuda", raw.data.device_id)
        stream = None if like is None else like.stream
        return BufferView.from_address(
            raw.data.ptr, (nbytes,), UINT8, device=device, owner=raw, stream=stream
        )

    def copy(self, target: BufferView, source: BufferView) -> None:
        if target.count:
            to, of = device_array(target), device_array(source)
            to[...] = cp.ascontiguousarray(of).reshape(target.shape)

    def contents(self, view: BufferView) -> bytes:
        with cp.cuda.Device(view.device.index):
            _stream(view.stream or 0, view.device.index).synchronize()
            contents: bytes = cp.asnumpy(device_array(view)).tobytes()
        return contents

    def overlap(self, first: BufferView, second: BufferView) -> bool:
        return HOST.overlap(first, second)  # from addresses and strides alone


def device_array(view: BufferView) -> Any:
    """Return a CuPy array over a view of device memory.

    Its elements are plain numbers of the same width. CuPy's kernels know no float8, and bfloat16
    only lately.
    """
    low, high = view.span()
    memory = cp.cuda.UnownedMemory(low, high - low, view, view.device.index)
    strides = (
        None if view.strides is None else tuple(step * view.dtype.itemsize for step in view.strides)
    )
    start = cp.cuda.MemoryPointer(memory, view.pointer - low)
    return cp.ndarray(view.shape, _WIDTHS[view.dtype.itemsize], start, strides)


ADAPTER: Final = CupyAdapter()
MEMORY: Final = DeviceMemory()
