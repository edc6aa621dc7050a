"""Arrays of libraries that the tests do without, as far as they behave in what a collective meets of them."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

import colltensor.adapters as adapters_module


class Exporter:
    """An array of nobody's framework, which exports DLPack as it was before 1.0."""

    def __init__(self, array: Any, device: tuple[Any, Any] = (1, 0)) -> None:
        self.array = array
        self.device = device

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[Any, Any]:
        return self.device


class ReadOnly(Exporter):
    """Marks its memory read-only where it can, for those who ask by version; like pyarrow 26, exports it to all."""

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None, **options: Any) -> Any:
        if max_version is None:
            return self.array.__dlpack__()
        locked = self.array[...]
        locked.flags.writeable = False
        return locked.__dlpack__(max_version=max_version)


class Copying(Exporter):
    """Exports a copy of its memory, and says so."""

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None, **options: Any) -> Any:
        return self.array.__dlpack__(max_version=max_version, copy=True)


def _tensorflow() -> types.ModuleType:
    """Of TensorFlow 2.21: exports are writable, scalars come from a cache, exporting text ends the process."""

    class DType:
        def __init__(self, name: str) -> None:
            self.name = name

    class InvalidArgumentError(Exception):
        message = "is not supported by dlpack"

    class EagerTensor(Exporter):
        device = "/job:localhost/replica:0/task:0/device:CPU:0"

        def __init__(self, array: Any, where: tuple[int, int] = (1, 0)) -> None:
            self.array = array
            self.shape = array.shape
            self.dtype = DType({"U": "string"}.get(array.dtype.kind, array.dtype.name))
            self._where = where

        def __dlpack__(self, **options: Any) -> Any:
            assert self.dtype.name != "string", "the process ends here"
            if self.dtype.name.startswith("float8"):
                raise InvalidArgumentError
            return self.array.__dlpack__()

        def __dlpack_device__(self) -> tuple[int, int]:
            return self._where

    class Variable:
        pass

    EagerTensor.__module__ = "tensorflow.python.framework.ops"
    Variable.__module__ = "tensorflow.python.ops.variables"
    Variable.__qualname__ = "Variable"
    scalars: dict[float, Any] = {}

    def constant(value: Any) -> Any:
        if isinstance(value, (int, float)):
            return scalars.setdefault(value, EagerTensor(np.array(value, np.float32)))
        return EagerTensor(np.array(value))

    tf: Any = types.ModuleType("tensorflow")
    tf.constant = constant
    tf.EagerTensor = EagerTensor
    tf.Variable = Variable
    tf.device = lambda name: contextlib.nullcontext()
    tf.raw_ops = types.SimpleNamespace(DeepCopy=lambda x: EagerTensor(x.array.copy()))
    tf.errors = types.SimpleNamespace(InvalidArgumentError=InvalidArgumentError)
    return tf


def _mlx() -> types.ModuleType:
    """Of mlx 0.32: exports are writable, shared by expressions that wait, and strided where the array is a view."""

    class array(Exporter):  # noqa: N801 - its name in mlx
        def __init__(self, value: Any) -> None:
            super().__init__(value if isinstance(value, _Shared) else np.array(value))
            self.array = np.asarray(self.array)
            self.shape = self.array.shape
            self.dtype = self.array.dtype

        def __dlpack__(self, **options: Any) -> Any:
            return self.array.__dlpack__()

        def view(self, dtype: Any) -> Any:
            return array(self.array.view(_Shared).view(dtype))

        def reshape(self, shape: Any) -> Any:
            return array(self.array.view(_Shared).reshape(shape))

    array.__module__ = "mlx.core"
    core: Any = types.ModuleType("mlx.core")
    core.array = array
    core.contiguous = lambda x: array(np.ascontiguousarray(x.array))
    core.transpose = lambda x: array(x.array.T.view(_Shared))
    mlx: Any = types.ModuleType("mlx")
    mlx.core = core
    mlx.__path__ = []
    return mlx


class _Shared(np.ndarray[Any, Any]):
    """Memory that an array of ``_mlx`` shares, where it copies numpy's otherwise."""


def _paddle() -> types.ModuleType:
    """Of Paddle 3.3: no index for the host, no export of what has a gradient, an in-place version."""

    class Tensor(Exporter):
        def __init__(self, array: Any, stop_gradient: bool = True) -> None:
            super().__init__(array, (1, None))
            self.stop_gradient = stop_gradient
            self.inplace_version = 0

        def __dlpack__(self, *, stream: Any = None, max_version: Any = None, **options: Any) -> Any:
            if not self.stop_gradient:
                raise BufferError("Can't get __dlpack__ from Tensor that requires gradients")
            return self.array.__dlpack__(max_version=max_version)

        def detach(self) -> Any:
            return Tensor(self.array)

        def _bump_inplace_version(self) -> None:
            self.inplace_version += 1

    class EagerParamBase(Tensor):
        pass

    Tensor.__module__ = "paddle"
    EagerParamBase.__module__ = "paddle.base.framework"
    paddle: Any = types.ModuleType("paddle")
    paddle.Tensor = Tensor
    paddle.base = types.SimpleNamespace(
        framework=types.SimpleNamespace(EagerParamBase=EagerParamBase)
    )
    paddle.grad_enabled = True
    paddle.is_grad_enabled = lambda: paddle.grad_enabled
    return paddle


_MAKERS = {"tensorflow": _tensorflow, "mlx": _mlx, "paddle": _paddle}


@contextlib.contextmanager
def imitated(name: str) -> Iterator[Any]:
    """Have a library of this name imported, for as long as the context lasts."""
    assert name not in sys.modules, f"the real {name} is imported"
    module: Any = _MAKERS[name]()
    sys.modules[name] = module
    if hasattr(module, "core"):
        sys.modules[f"{name}.core"] = module.core
    try:
        yield module
    finally:
        for loaded in (name, f"{name}.core", f"colltensor.adapters.{name}"):
            sys.modules.pop(loaded, None)
        adapters_module.known.clear()
