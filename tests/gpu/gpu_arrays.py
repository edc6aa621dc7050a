"""Arrays of torch, CuPy and JAX on the first CUDA device, over memory that the test can look at as bytes.

As ``samples`` has them on the host. All work is queued on the framework's own current stream and read back on it
without any other synchronisation, so that a result that is not ordered before the reading is a wrong one.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import gpu_streams
import numpy as np
from oracle import FLOATS, INTEGERS, Array, assert_values, combined, numpy_dtype
from samples import GUARD, Layout, host_memory, host_view

_JAX_LACKS = frozenset({"float8_e8m0fnu", "float8_e4m3", "float8_e3m4"})
"""New types, which XLA may refuse on a device."""


class Refused(NamedTuple):
    """What NCCL cannot reduce."""

    dtype: str
    op: str


REFUSED = frozenset(
    [Refused(dtype, op) for dtype in INTEGERS for op in ("BAND", "BOR", "BXOR")]
    + [
        Refused(dtype, op)
        for dtype in ("int16", "uint16")
        for op in ("SUM", "PRODUCT", "MIN", "MAX")
    ]
    + [Refused("bool", "BXOR")]
)


def supports(library: str, dtype: str, layout: Layout) -> bool:
    """Return True if the library can have such a tensor on a device."""
    if library == "cupy":
        return True
    if library == "torch":
        return hasattr(importlib.import_module("torch"), dtype) and not layout.backwards
    return (
        layout.dense
        and dtype not in _JAX_LACKS
        and hasattr(importlib.import_module("jax.numpy"), dtype)
    )


def library_for(libraries: tuple[str, ...], rank: int, dtype: str, layout: Layout) -> str | None:
    """Return the library that a rank uses, in a mix another one where it has to; None where there is none."""
    shifted = [libraries[(rank + step) % len(libraries)] for step in range(len(libraries))]
    return next((name for name in shifted if supports(name, dtype, layout)), None)


def expected_of(dtype: str, op: str, inputs: list[Array]) -> tuple[Array, Array | None]:
    """Return the reduction and how far each element may be from it: NCCL adds in an order and a width of its own."""
    expected, tolerance = combined(dtype, op, inputs)
    if dtype in FLOATS and op not in ("MIN", "MAX"):
        wide = np.stack(inputs).astype(np.float64)
        size = np.abs(np.prod(wide, axis=0)) if op == "PRODUCT" else np.sum(np.abs(wide), axis=0)
        info = importlib.import_module("ml_dtypes").finfo(numpy_dtype(dtype))
        tolerance = size * float(info.eps) * (len(inputs) + 1) + float(info.smallest_subnormal)
    return expected, tolerance


class DeviceSample:
    """One tensor of a library on the device, and the memory around it.

    Attributes:
        tensor: What the call gets.
        immutable: The library's tensors cannot be written.
    """

    def __init__(self, library: str, dtype: str, layout: Layout, values: Array) -> None:
        self.immutable = library == "jax"
        self._library, self._dtype, self._layout = library, dtype, layout
        self._before = host_memory(dtype, layout)
        view = host_view(self._before, dtype, layout)
        view[...] = values.reshape(layout.shape)
        self._given = values.copy()
        self._memory: Any = None
        self.tensor: Any = getattr(self, f"_{library}")(view)
        self._address = address(self.tensor)

    def _torch(self, view: Array) -> Any:
        torch = importlib.import_module("torch")
        self._memory = torch.from_numpy(self._before.copy()).to("cuda:0")
        end = GUARD + self._layout.extent * numpy_dtype(self._dtype).itemsize
        flat = self._memory[GUARD:end].view(getattr(torch, self._dtype))
        offset = flat.storage_offset() + self._layout.offset
        return flat.as_strided(self._layout.shape, self._layout.strides, offset)

    def _cupy(self, view: Array) -> Any:
        cupy = importlib.import_module("cupy")
        self._memory = cupy.asarray(self._before)
        dtype = numpy_dtype(self._dtype)
        start = self._memory.data + GUARD + self._layout.offset * dtype.itemsize
        strides = tuple(step * dtype.itemsize for step in self._layout.strides)
        return cupy.ndarray(self._layout.shape, dtype, start, strides)

    def _jax(self, view: Array) -> Any:
        jax = importlib.import_module("jax")
        jax.config.update("jax_enable_x64", True)
        return jax.device_put(view, jax.devices(gpu_streams.PLATFORM)[0])

    def check_result(self, result: Any, expected: Array, tolerance: Array | None = None) -> Array:
        """Check a result: values, object, address, shape, gaps; return its flat values."""
        assert tuple(result.shape) == self._layout.shape
        if self.immutable:
            got = np.asarray(result).reshape(-1)
            assert_values(got, expected, tolerance)
            assert result is not self.tensor
            assert result.devices() == self.tensor.devices()
            self.check_untouched()
            return got
        assert result is self.tensor, "not the object that was given"
        assert address(result) == self._address, "its memory is another now"
        return self._check_memory(expected, tolerance)

    def check_untouched(self) -> None:
        """Check that the tensor given has its values still, and the memory around it too."""
        if self.immutable:
            assert_values(np.asarray(self.tensor).reshape(-1), self._given, None)
        else:
            self._check_memory(self._given, None)

    def _check_memory(self, expected: Array, tolerance: Array | None) -> Array:
        raw = self._memory.cpu().numpy() if self._library == "torch" else self._memory.get()
        memory = host_memory(self._dtype, self._layout)  # aligned, as the views of it need
        memory[...] = raw
        got = host_view(memory, self._dtype, self._layout).reshape(-1).copy()
        assert_values(got, expected, tolerance)
        wanted = self._before.copy()
        aligned = host_memory(self._dtype, self._layout)
        aligned[...] = wanted
        host_view(aligned, self._dtype, self._layout)[...] = got.reshape(self._layout.shape)
        places = np.flatnonzero(aligned != memory)
        assert not len(places), (
            f"memory that is not the tensor's was written, byte {places[0] - GUARD} first"
        )
        return got


def address(tensor: Any) -> int:
    """Return where a tensor's first element lies, as its own library says."""
    for name in ("data_ptr", "unsafe_buffer_pointer"):
        if hasattr(tensor, name):
            return int(getattr(tensor, name)())
    return int(tensor.data.ptr)
