"""The adapter for numpy arrays, and the host memory functions that use numpy's copy loops."""

from __future__ import annotations

import array
import ctypes
import functools
import importlib
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from colltensor import dlpack
from colltensor.adapters import native_copies, native_readers
from colltensor.adapters._numpy_dtypes import CARRIER_OF, DTYPE_OF, host_dtype, unsupported_dtype
from colltensor.adapters.base import AdapterBase
from colltensor.errors import ReadOnlyError, UnsupportedTensorError
from colltensor.types import CPU, UINT8
from colltensor.view import BufferView

_ALIGNMENT: Final = 64
_NATIVE_FROM_NBYTES: Final = 4096
"""Below, what native code must be given takes longer than what it saves."""
_READABLE: Final = (0x01000009, 0x02000000)
"""Versions of numpy's C interface whose arrays native code reads: numpy 1's and 2's.

See native/src/python.cpp.
"""
_DLPACK_CODES: Final = {
    dtype: {"b": 6, "i": 0, "u": 1, "f": 4 if known.name == "bfloat16" else 2, "c": 5}[known.kind]
    for dtype, known in DTYPE_OF.items()
    if not known.moves_only
}
"""DLPack's codes of types, by numpy's."""
_OVERLAP_WORK: Final[Any] = 1 << 16
"""Bound on the search for a common address of two strided arrays (numpy.shares_memory)."""


class NumpyAdapter(AdapterBase):
    """numpy.ndarray and numpy.memmap, in place; other subclasses may hide elements."""

    name = "numpy"
    # numpy exports neither read-only memory nor types that DLPack does not know
    directly_exportable = None

    def claims(self, kind: type) -> bool:
        return kind is np.ndarray or kind is np.memmap

    def source(self, tensor: Any) -> BufferView:
        return self.target(tensor) if tensor.flags.writeable else _view_read_only(tensor)

    def target(self, tensor: Any) -> BufferView:
        dtype = DTYPE_OF.get(tensor.dtype)
        if dtype is None:
            raise unsupported_dtype(tensor.dtype)
        flags = tensor.flags
        if not flags.writeable:
            raise ReadOnlyError(
                "the numpy array is read-only (arrays out of ray.get are views of the object store, shared by "
                "every reader) and the call would write to it; pass x.copy()"
            )

        # DLPack does not know every type: others travel as integers of their width.
        carrier = CARRIER_OF.get(dtype)
        try:
            handle = dlpack.export(tensor if carrier is None else tensor.view(carrier))
        except BufferError as error:
            raise UnsupportedTensorError(
                f"numpy cannot export this array ({error}); pass x.copy()"
            ) from error
        strides = None if flags.c_contiguous else _element_strides(tensor)
        return BufferView(
            handle.data_ptr(), tensor.size, dtype, CPU, tensor.shape, strides, False, handle, tensor
        )

    def reader(self, kind: type) -> int:
        return _reader()


@functools.lru_cache
def _reader() -> int:
    """Return native code's reader of arrays, 0 where numpy's may lie in another way."""
    for found in native_readers:
        native = found()
        if native is None:
            continue
        try:
            if _c_version() not in _READABLE:
                continue
        except (AttributeError, ImportError, KeyError, ValueError):  # private to numpy
            continue
        make, trial = native
        rows = sorted(_numbers())
        words = array.array("q", [len(rows), *(number for row in rows for number in row)])
        address = make(words.buffer_info()[0])
        if address and all(_reads(trial, address, dtype) for dtype in _DLPACK_CODES):
            return address
    return 0


def _c_version() -> int:
    """Return the version of numpy's C interface, which says how arrays lie."""
    # numpy 1.26 may have a _core, too, which holds other things
    home = "numpy._core" if int(np.__version__.partition(".")[0]) >= 2 else "numpy.core"
    core: Any = importlib.import_module(f"{home}._multiarray_umath")
    functions = dlpack.capsule_pointer(core._ARRAY_API)
    version: int = ctypes.PYFUNCTYPE(ctypes.c_uint)(
        ctypes.c_void_p.from_address(functions).value or 0
    )()
    return version


def _numbers() -> set[tuple[int, int, int]]:
    """Return numpy's number, DLPack's code and the bits of all types; several are alike."""
    found: set[tuple[int, int, int]] = {
        (dtype.num, code, 8 * dtype.itemsize) for dtype, code in _DLPACK_CODES.items()
    }
    for alike in map(np.dtype, np.typecodes["AllInteger"]):
        code = _DLPACK_CODES[np.dtype(f"{alike.kind}{alike.itemsize}")]
        found.add((alike.num, code, 8 * alike.itemsize))
    return found


def _reads(trial: Callable[[int, int, int], bool], reader: int, dtype: np.dtype[Any]) -> bool:
    """Return whether a reader finds what numpy says, and takes no read-only array."""
    whole = np.zeros((4, 6), dtype)
    for sample in (whole, whole.T, whole[::2, ::-3], whole[1], whole[0, 0, ...], whole[:0]):
        words = array.array("q", bytes(8 * (4 + 2 * sample.ndim)))
        if not trial(reader, id(sample), words.buffer_info()[0]):
            return False
        strides = [step // dtype.itemsize for step in sample.strides]
        said = [sample.ctypes.data, _DLPACK_CODES[dtype], 8 * dtype.itemsize, sample.ndim]
        if words.tolist() != [*said, *sample.shape, *strides]:
            return False

    whole.flags.writeable = False
    words = array.array("q", bytes(64))
    return not trial(reader, id(whole), words.buffer_info()[0])


def _view_read_only(array: Any) -> BufferView:
    dtype = DTYPE_OF.get(array.dtype)
    if dtype is None:
        raise unsupported_dtype(array.dtype)
    strides = None if array.flags.c_contiguous else _element_strides(array)
    return BufferView.from_address(
        array.ctypes.data, array.shape, dtype, strides=strides, readonly=True, owner=array
    )


def _element_strides(array: Any) -> tuple[int, ...]:
    itemsize = array.itemsize
    if any(step % itemsize for step in array.strides):
        raise UnsupportedTensorError(
            f"its strides {array.strides} are no multiples of the item size {itemsize} (a field of a structured "
            "array?); pass x.copy()"
        )
    return tuple(step // itemsize for step in array.strides)


class HostMemory:
    """Host staging buffers, and copies between layouts: large ones by native code."""

    def allocate(self, nbytes: int, like: BufferView | None = None) -> BufferView:
        raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        return BufferView.from_address(raw.ctypes.data + start, (nbytes,), UINT8, owner=raw)

    def copy(self, target: BufferView, source: BufferView) -> None:
        if not target.count:
            return
        if target.strides is None and source.strides is None and target.dtype == source.dtype:
            # numpy's arrays over it take 3 us to make
            ctypes.memmove(target.pointer, source.pointer, target.nbytes)
            return

        is_one_strided = (target.strides is None) != (source.strides is None)
        if is_one_strided and target.nbytes >= _NATIVE_FROM_NBYTES:
            for found in native_copies:
                native = found()
                if native is not None and target.dtype == source.dtype:
                    words = _copy_words(target, source)
                    native(words.buffer_info()[0])
                    return

        to, of = host_array(target), host_array(source)
        if source.strides is None:
            to[...] = of.reshape(target.shape)
        elif target.strides is None:
            to.reshape(source.shape)[...] = of
        else:
            to[...] = np.ascontiguousarray(of).reshape(target.shape)

    def array(self, view: BufferView) -> np.ndarray[Any, Any]:
        return host_array(view)

    def contents(self, view: BufferView) -> memoryview:
        if view.strides is None:
            return view.memory()
        array = np.ascontiguousarray(host_array(view))
        return array.view(np.uint8).reshape(-1).data if array.size else memoryview(b"")

    def overlap(self, first: BufferView, second: BufferView) -> bool:
        (low, high), (other_low, other_high) = first.span(), second.span()
        if low >= other_high or other_low >= high:
            return False
        if first.strides is None and second.strides is None:
            return True
        try:
            return bool(np.shares_memory(host_array(first), host_array(second), _OVERLAP_WORK))
        except RuntimeError:  # numpy's TooHardError, whose place changed with numpy 2
            return True


def _copy_words(target: BufferView, source: BufferView) -> array.array[int]:
    """Return what native code is given of a copy, one of whose views is strided."""
    scatters = target.strides is not None
    strided, contiguous = (target, source) if scatters else (source, target)
    assert strided.strides is not None
    shape, itemsize = strided.shape, strided.dtype.itemsize
    head = (scatters, contiguous.pointer, strided.pointer, itemsize, strided.count, len(shape))
    return array.array("q", (*head, *shape, *strided.strides))


def host_array(view: BufferView) -> np.ndarray[Any, Any]:
    """Return a writable array over host memory, of integers for bits numpy cannot name."""
    low, high = view.span()
    raw = (ctypes.c_char * (high - low)).from_address(low)
    # The array keeps its view, and so the owner, alive.
    raw._view = view  # type: ignore[attr-defined]
    strides = (
        None if view.strides is None else [step * view.dtype.itemsize for step in view.strides]
    )
    buffer: Any = raw  # numpy's stubs do not know that ctypes arrays are buffers
    array: np.ndarray[Any, Any] = np.ndarray(
        view.shape, host_dtype(view.dtype), buffer, view.pointer - low, strides
    )
    return array


ADAPTER: Final = NumpyAdapter()
MEMORY: Final = HostMemory()
