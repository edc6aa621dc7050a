"""Tensors of every array library in every layout, over memory that the test can look at as bytes.

A sample lies in memory filled with a pattern; what a call must not touch (the gaps between elements,
the memory before and after) is compared byte by byte.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from oracle import Array, assert_values, numpy_dtype

GUARD = 64
PATTERN = 0xA5


@dataclass(frozen=True)
class Layout:
    """How elements lie: strides and offset in elements, in memory of ``extent`` elements."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    extent: int

    @property
    def count(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def dense(self) -> bool:
        """Row-major without gaps."""
        return self.strides == _row_major(self.shape) or self.count <= 1

    @property
    def backwards(self) -> bool:
        """Some stride is negative."""
        return any(stride < 0 for stride in self.strides)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


def dense(*shape: int) -> Layout:
    """Row-major, without gaps."""
    return Layout("C" + "x".join(map(str, shape)), shape, _row_major(shape), 0, math.prod(shape))


LAYOUTS = (
    dense(24),
    dense(2, 3, 4),
    Layout("fortran", (4, 6), (1, 4), 0, 24),
    Layout("permuted", (3, 4, 2), (4, 1, 12), 0, 24),
    Layout("every-other", (24,), (2,), 1, 48),
    Layout("column", (24,), (5,), 3, 120),
    Layout("rows-apart", (4, 6), (11, 1), 2, 44),
    Layout("transposed-gaps", (6, 4), (2, 16), 1, 64),
    Layout("reversed", (24,), (-1,), 23, 24),
    Layout("reversed-both", (4, 6), (-8, -1), 30, 32),
    Layout("mixed-signs", (2, 3, 4), (20, -6, 1), 13, 40),
)
"""Layouts of 24 elements."""

SCALARS = (dense(), dense(1), dense(1, 1, 1), Layout("one-of-many", (1,), (7,), 2, 9))
"""Layouts of one element."""

EMPTY = (dense(0), dense(3, 0, 2), Layout("empty-strided", (0, 4), (9, 2), 0, 5))
"""Layouts of none."""


def library_for(libraries: tuple[str, ...], rank: int, dtype: str, layout: Layout) -> str | None:
    """Return the array library that a rank uses; in a mix one that has the dtype and layout, else numpy.

    None where the only library has not got it.
    """
    name = libraries[rank % len(libraries)]
    if supports(name, dtype, layout):
        return name
    return "numpy" if len(libraries) > 1 else None


def supports(library: str, dtype: str, layout: Layout) -> bool:
    """Return True if the library can have such a tensor."""
    if library == "numpy":
        return True
    if library == "torch":
        return hasattr(importlib.import_module("torch"), dtype) and not layout.backwards
    if library == "jax":
        return hasattr(importlib.import_module("jax.numpy"), dtype) and layout.dense
    return hasattr(importlib.import_module("array_api_strict"), dtype)


def host_view(memory: Array, dtype: str, layout: Layout) -> Array:
    """View guarded memory as a numpy array."""
    itemsize = numpy_dtype(dtype).itemsize
    strides = [step * itemsize for step in layout.strides]
    return np.ndarray(
        layout.shape, numpy_dtype(dtype), memory.data, GUARD + layout.offset * itemsize, strides
    )


def host_memory(dtype: str, layout: Layout) -> Array:
    """Return bytes for a sample, filled with the pattern, aligned to 64."""
    nbytes = 2 * GUARD + layout.extent * numpy_dtype(dtype).itemsize
    raw = np.empty(nbytes + GUARD, np.uint8)
    start = -raw.ctypes.data % GUARD
    memory = raw[start : start + nbytes]
    memory.fill(PATTERN)
    return memory


def _torch_tensor(memory: Array, dtype: str, layout: Layout) -> Any:
    torch = importlib.import_module("torch")
    flat = torch.frombuffer(memory.data, dtype=getattr(torch, dtype), offset=GUARD)
    return flat.as_strided(layout.shape, layout.strides, flat.storage_offset() + layout.offset)


def _jax_array(view: Array) -> Any:
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    return jax.numpy.array(view, copy=True)


def _dlpack_array(view: Array) -> Any:
    return importlib.import_module("array_api_strict").asarray(view, copy=False)


def address(tensor: Any) -> int:
    """Return where a tensor's first element lies, as its own library says."""
    if isinstance(tensor, np.ndarray):
        return tensor.ctypes.data
    for name in ("data_ptr", "unsafe_buffer_pointer"):
        if hasattr(tensor, name):
            return int(getattr(tensor, name)())
    return np.from_dlpack(tensor).ctypes.data


def as_numpy(tensor: Any, dtype: str) -> Array:
    """Return a tensor's elements, row-major and flat, as its own library gives them."""
    if type(tensor).__module__.partition(".")[0] == "torch":
        torch = importlib.import_module("torch")
        if not tensor.numel():
            return np.empty(0, numpy_dtype(dtype))
        raw = (
            torch.empty(tensor.shape, dtype=tensor.dtype)
            .copy_(tensor.detach())
            .reshape(-1)
            .view(torch.uint8)
            .numpy()
        )
        return raw.view(numpy_dtype(dtype)).copy()
    if hasattr(tensor, "__array__") or isinstance(tensor, np.ndarray):
        return np.array(tensor, copy=True).reshape(-1)
    return np.from_dlpack(tensor).reshape(-1).copy()


class Sample:
    """One tensor of a library, and the memory around it.

    Attributes:
        library: numpy, torch, jax or dlpack.
        tensor: What the call gets.
        immutable: The library's tensors cannot be written.
    """

    def __init__(self, library: str, dtype: str, layout: Layout, values: Array) -> None:
        self.library = library
        self.immutable = library == "jax"
        self._dtype = dtype
        self._layout = layout
        self._memory = host_memory(dtype, layout)
        view = host_view(self._memory, dtype, layout)
        view[...] = values.reshape(layout.shape)
        self._given = values.copy()
        self._before = self._memory.copy()
        self.tensor: Any = view
        if library == "torch":
            self.tensor = _torch_tensor(self._memory, dtype, layout)
        elif library == "jax":
            self.tensor = _jax_array(view)
        elif library == "dlpack":
            self.tensor = _dlpack_array(view)
        self._address = address(self.tensor)

    def check_result(self, result: Any, expected: Array, tolerance: Array | None = None) -> Array:
        """Check a result: values, object, address, shape, gaps; return its flat values."""
        assert tuple(result.shape) == self._layout.shape
        got = as_numpy(result, self._dtype)
        assert_values(got, expected, tolerance)
        if self.immutable:
            assert result is not self.tensor
            self.check_untouched()
            return got
        assert result is self.tensor, "not the object that was given"
        assert address(result) == self._address, "its memory is another now"
        self._check_memory(got)
        return got

    def check_untouched(self) -> None:
        """Check that the tensor given has its values still, and the memory around it too."""
        assert_values(as_numpy(self.tensor, self._dtype), self._given, None)
        self._check_memory(self._given)

    def _check_memory(self, values: Array) -> None:
        if self.immutable:
            return
        expected = self._before.copy()
        host_view(expected, self._dtype, self._layout)[...] = values.reshape(self._layout.shape)
        places = np.flatnonzero(expected != self._memory)
        assert not len(places), (
            f"memory that is not the tensor's was written, byte {places[0] - GUARD} first"
        )
