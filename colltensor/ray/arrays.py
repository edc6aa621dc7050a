"""What a transport knows of a framework: array type, memory to receive into, pending work."""

from __future__ import annotations

import ctypes
import importlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from colltensor.adapters import adapter_of
from colltensor.errors import TensorError
from colltensor.view import BufferView


@dataclass(frozen=True, slots=True, eq=False)
class NumpyArray:
    """A numpy array that Ray's transport ``COLLTENSOR_NUMPY`` carries.

    Ray takes over how the type of a transport is pickled, everywhere in the process. With
    ``numpy.ndarray`` itself every ordinary ``ray.put`` of an array would become slower. So an array
    travels directly where it is wrapped, and as always where it is not. ``numpy.asarray`` unwraps
    it.

    Attributes:
        array: The array, of any dtype that collectives know, any shape and strides.
    """

    array: Any

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """Return the array, for ``numpy.asarray`` and numpy's functions."""
        numpy = importlib.import_module("numpy")
        array = self.array if dtype is None else self.array.astype(dtype, copy=False)
        return numpy.array(array) if copy else array


class Framework(Protocol):
    """What a transport asks of a framework.

    Attributes:
        transport: The transport's name in Ray.
        devices: The types of device whose arrays it carries.
    """

    transport: str
    devices: tuple[str, ...]

    def data_type(self) -> type:
        """Return the exact type of the arrays that Ray takes out of a value for this transport."""

    def inside(self, tensor: Any) -> Any:
        """Return the array of the framework's that travels for a tensor of ``data_type``."""

    def buffer(self, shape: Sequence[int], dtype: Any, device: str) -> Any:
        """Return a new array to receive into, on this process's current device of the type."""

    def result(self, buffer: Any) -> Any:
        """Return the ``data_type`` made of a buffer that was received into.

        It takes the buffer over.
        """

    def synchronize(self, index: int) -> None:
        """Wait on the host until the work that this thread has queued on a CUDA device is done."""


class _FrameworkBase:
    """A framework whose tensors themselves travel, and are received where they stay."""

    devices: tuple[str, ...] = ("cpu", "cuda")

    def inside(self, tensor: Any) -> Any:
        return tensor

    def result(self, buffer: Any) -> Any:
        return buffer

    def synchronize(self, index: int) -> None:
        pass


class _Torch(_FrameworkBase):
    transport = "COLLTENSOR"

    def data_type(self) -> type:
        kind: type = importlib.import_module("torch").Tensor
        return kind

    def inside(self, tensor: Any) -> Any:
        return tensor.detach()

    def buffer(self, shape: Sequence[int], dtype: Any, device: str) -> Any:
        torch = importlib.import_module("torch")
        # the caller's mode is of its thread, and another one may write
        with torch.inference_mode(False):
            tensor = torch.empty(shape, dtype=dtype, device=device)
        if device == "cpu":
            _ask_for_huge_pages(tensor.data_ptr(), tensor.nbytes)
        return tensor

    def synchronize(self, index: int) -> None:
        importlib.import_module("torch").cuda.current_stream(index).synchronize()


class _Numpy(_FrameworkBase):
    transport = "COLLTENSOR_NUMPY"
    devices: tuple[str, ...] = ("cpu",)

    def data_type(self) -> type:
        return NumpyArray

    def inside(self, tensor: Any) -> Any:
        return tensor.array

    def buffer(self, shape: Sequence[int], dtype: Any, device: str) -> Any:
        return importlib.import_module("numpy").empty(shape, dtype)

    def result(self, buffer: Any) -> Any:
        return NumpyArray(buffer)


class _Jax(_FrameworkBase):
    """On a CPU the elements arrive in numpy's memory, which becomes the array's.

    Nothing is filled or compiled. The adapter waits for pending computations.
    """

    transport = "COLLTENSOR_JAX"

    def data_type(self) -> type:
        kind: type = importlib.import_module("colltensor._compat.jax").array_type()
        return kind

    def buffer(self, shape: Sequence[int], dtype: Any, device: str) -> Any:
        if device == "cpu":
            return _aligned(shape, dtype)
        with self._every_dtype():
            return importlib.import_module("jax.numpy").empty(shape, dtype)

    def result(self, buffer: Any) -> Any:
        if isinstance(buffer, self.data_type()):
            return buffer
        jax = importlib.import_module("jax")
        with self._every_dtype():
            return jax.device_put(buffer, jax.local_devices(backend="cpu")[0])

    def _every_dtype(self) -> Any:
        """Let JAX make 64-bit arrays, which may come from a process where they are switched on."""
        jax = importlib.import_module("jax")
        # before JAX 0.8
        home = jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")
        return home.enable_x64(True)


class _Cupy(_FrameworkBase):
    transport = "COLLTENSOR_CUPY"
    devices: tuple[str, ...] = ("cuda",)

    def data_type(self) -> type:
        kind: type = importlib.import_module("cupy").ndarray
        return kind

    def buffer(self, shape: Sequence[int], dtype: Any, device: str) -> Any:
        return importlib.import_module("cupy").empty(shape, dtype)

    def synchronize(self, index: int) -> None:
        importlib.import_module("cupy").cuda.get_current_stream(index).synchronize()


_HUGE_NBYTES: Final = 4 << 20

FRAMEWORKS: Final[dict[str, Framework]] = {
    "torch": _Torch(),
    "jax": _Jax(),
    "cupy": _Cupy(),
    "numpy": _Numpy(),
}
"""The frameworks that have a transport, by the name of their package."""


def views_of(arrays: Sequence[Any]) -> list[BufferView]:
    """View arrays that will be read, once what computes them is done.

    Raises:
        TensorError: An array cannot be sent as it is; says which and what to do.
    """
    views = []
    for index, array in enumerate(arrays):
        try:
            views.append(adapter_of(array).source(array))
        except TensorError as error:
            error.args = (f"array {index} of {len(arrays)}: {error}",)
            raise
    return views


def _aligned(shape: Sequence[int], dtype: Any) -> Any:
    """Return an uninitialised numpy array aligned to 64 bytes, which JAX need not copy."""
    numpy = importlib.import_module("numpy")
    nbytes = numpy.dtype(dtype).itemsize * int(numpy.prod(shape, dtype=numpy.int64))
    raw = numpy.empty(nbytes + 64, numpy.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _ask_for_huge_pages(address: int, nbytes: int) -> None:
    """Have large new memory come in huge pages, as numpy does.

    Page by page, its first use takes longer than the copy. This is advice only, madvise(2): a
    system that does not know it, or where it is switched off, goes on as before.
    """
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    if nbytes >= _HUGE_NBYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        length = ctypes.c_size_t(address + nbytes - start)
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), length, mmap.MADV_HUGEPAGE)
