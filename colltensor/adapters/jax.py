"""The adapter for JAX arrays: immutable, so results are new arrays, or donated ones."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.experimental
import jax.numpy as jnp

from colltensor._compat.jax import layout_name, ready_function, sharding_name, traces_nothing
from colltensor.adapters._numpy_dtypes import DTYPE_OF, unsupported_dtype
from colltensor.adapters.base import AdapterBase
from colltensor.errors import DeviceError, UnsupportedTensorError
from colltensor.types import CPU, Device
from colltensor.view import LEGACY_STREAM, BufferView, are_row_major

with jax.ensure_compile_time_eval():  # the first call of a program may be inside jax.jit
    _ARRAY: Final = type(jax.device_put(0))
_copy: Final = jax.jit(jnp.copy)
_allocate: Final = jax.jit(jnp.copy, donate_argnums=0)
"""A donating copy: XLA reuses memory that nobody else holds, and copies it otherwise."""
_copy_some: Final = jax.jit(lambda tensors: [jnp.copy(tensor) for tensor in tensors])
_allocate_some: Final = jax.jit(
    lambda tensors: [jnp.copy(tensor) for tensor in tensors], donate_argnums=0
)
"""The same for several, compiled once a list of shapes: a call costs 1.6 us an array, not 3.5."""
_SOME: Final = 8
"""How many are copied at once.

XLA hands longer computations to other threads, and ranks that share cores wait for those.
"""
_LAYOUT: Final = layout_name(_ARRAY)
_layout_of: Final = operator.attrgetter(_LAYOUT)
_kind_of: Final = operator.attrgetter("aval", sharding_name(_ARRAY), _LAYOUT)
"""Shape, dtype, device and layout, as quickly as JAX gives them."""
_wait_for: Final = ready_function()
_is_deleted: Final = operator.methodcaller("is_deleted")
_address_of: Final = operator.methodcaller("unsafe_buffer_pointer")
_row_major_layouts: Final[set[Any]] = set()
"""As far as they were seen."""
_ROW_MAJOR: Final = tuple(range(64))
_IMPORT: Final = jax.dlpack.from_dlpack.__code__
_WIDE: Final = frozenset({"int64", "uint64", "float64", "complex128"})
"""Types that JAX cuts to half their size where ``jax_enable_x64`` is off."""
_devices: Final[dict[Any, Device]] = {}
"""By JAX's devices, as far as arrays on them were seen."""


class JaxAdapter(AdapterBase):
    """jax.Array on one device of this process."""

    name = "jax"
    immutable = True

    def claims(self, kind: type) -> bool:
        return kind is _ARRAY

    def source(self, tensor: Any) -> BufferView:
        if not traces_nothing():
            raise _traced()
        if tensor.is_deleted():
            raise UnsupportedTensorError(
                "the JAX array was deleted or donated before; use the array that call returned"
            )
        return _view(tensor, readonly=True)

    def allocate_result(self, tensor: Any, donate: bool) -> tuple[Any, BufferView]:
        (result,) = self.allocate_results((tensor,), donate)
        return result, _view(result, readonly=False)

    def allocate_results(self, tensors: Sequence[Any], donate: bool) -> list[Any]:
        reuse = donate and not any(map(_is_imported, tensors))
        if len(tensors) == 1:
            results = [(_allocate if reuse else _copy)(tensors[0])]
        else:
            results = []
            for start in range(0, len(tensors), _SOME):
                results += (_allocate_some if reuse else _copy_some)(
                    list(tensors[start : start + _SOME])
                )
        if results and results[0].__class__ is not _ARRAY:
            raise _traced()
        if donate:
            for tensor in tensors:
                # XLA had nothing to reuse (an empty array): the promise is kept here
                if not tensor.is_deleted():
                    tensor.delete()
        return results

    def addresses(self, tensors: Sequence[Any]) -> list[int]:
        if len(tensors) == 1:
            tensors[0].block_until_ready()
        else:
            _wait_for(list(tensors))
        return list(map(_address_of, tensors))

    def kinds(self, tensors: Sequence[Any]) -> list[Any]:
        if any(map(_is_deleted, tensors)):  # JAX may not survive the question that follows
            raise RuntimeError("deleted")
        return list(map(_kind_of, tensors))

    def reduced(self, tensor: Any) -> tuple[Any, ...] | None:
        if tensor.dtype.name not in _WIDE:
            return None
        function, arguments = tensor.__reduce__()
        return with_every_dtype, (function, *arguments)

    def stream(self, index: int) -> None:
        return None  # XLA queues what reads an array as soon as it has it, on streams of its own


def _traced() -> UnsupportedTensorError:
    return UnsupportedTensorError(
        "this call would run once, while jax.jit and the like trace the function around it, and not each time that "
        "that runs; use the collectives of colltensor.jax there, or call it outside"
    )


def _view(tensor: Any, *, readonly: bool) -> BufferView:
    dtype = DTYPE_OF.get(tensor.dtype)
    if dtype is None:
        raise unsupported_dtype(tensor.dtype)

    devices = tensor.sharding.device_set
    if len(devices) != 1:
        raise _sharded(tensor)
    (where,) = devices
    device = _devices.get(where) or _device_of(where, tensor)

    # What computes the array is waited for, on the host or by a stream.
    if device is CPU:
        tensor.block_until_ready()
        stream = None
    else:
        stream = LEGACY_STREAM
        tensor.__dlpack__(stream=stream)  # makes that stream wait for the array, and not the host

    pointer, count = tensor.unsafe_buffer_pointer(), tensor.size
    strides = None if tensor.ndim < 2 else _strides(tensor)
    return BufferView(pointer, count, dtype, device, None, strides, readonly, None, tensor, stream)


def _strides(tensor: Any) -> tuple[int, ...] | None:
    """Return the steps in elements per axis, None for a row-major array.

    XLA may lay the axes out in any order. An array that comes through DLPack keeps its layout: a
    transposed torch tensor, an array in Fortran's order. So does one that is given a layout
    (``jax.experimental.layout``).

    Raises:
        UnsupportedTensorError: The elements are not laid out by strides: in tiles, or packed into
            bytes.
    """
    if _layout_of(tensor) in _row_major_layouts:
        return None

    layout = tensor.format
    # before JAX 0.7
    layout = layout.layout if hasattr(layout, "layout") else layout.device_local_layout
    order = layout.major_to_minor
    if tuple(order) == _ROW_MAJOR[: len(order)] and not _tiling(layout):
        _row_major_layouts.add(_layout_of(tensor))
        return None
    if _tiling(layout):
        raise UnsupportedTensorError(
            f"the JAX array's memory is not laid out by strides ({layout}); pass jax.jit(jax.numpy.copy)(x), which has "
            "the default layout"
        )

    strides = [0] * len(order)
    step = 1
    for axis in reversed(order):
        strides[axis] = step
        step *= tensor.shape[axis]
    return None if are_row_major(tensor.shape, tuple(strides)) else tuple(strides)


def _tiling(layout: Any) -> Any:
    """Return what a layout has beside the axes' order: tiles, or elements below a byte."""
    tiling = getattr(layout, "tiling", None) or getattr(layout, "_tiling", None)
    return tiling or getattr(layout, "sub_byte_element_size_in_bits", 0)


def _is_imported(tensor: Any) -> bool:
    """Return True for an array that ``jax.dlpack.from_dlpack`` made: its memory may be another's.

    With ``copy=True`` JAX 0.10.2 does not copy on a CPU. It lets XLA take that memory for its own,
    and donate it. Only the frames that made such an array tell it from others. This can go when JAX
    copies.
    """
    made_by = tensor.traceback
    return made_by is not None and _IMPORT in made_by.raw_frames()[0]


def _device_of(where: Any, tensor: Any) -> Device:
    """Return which device JAX's is, and remember it, for its arrays are asked in every call.

    Raises:
        TensorError: It is another process's, or of a type that no collective reaches.
    """
    if not tensor.is_fully_addressable:
        raise _sharded(tensor)
    if where.platform == "cpu":
        device = CPU
    elif where.platform in ("gpu", "cuda"):
        device = Device("cuda", where.local_hardware_id)
    else:
        raise DeviceError(
            f"the JAX array is on {where}; collectives work on cpu and cuda: jax.device_put it there"
        )
    _devices[where] = device
    return device


def _sharded(tensor: Any) -> UnsupportedTensorError:
    if tensor.is_fully_replicated:
        return UnsupportedTensorError(
            f"the JAX array is replicated over {len(tensor.sharding.device_set)} devices; a collective works on one of "
            "this process: pass one copy, x.addressable_data(0), and put the result on all, "
            "jax.device_put(result, x.sharding)"
        )
    return UnsupportedTensorError(
        f"the JAX array is sharded over {len(tensor.sharding.device_set)} devices; a collective works on one device of "
        "this process: pass its addressable shards, x.addressable_shards[i].data, one by one"
    )


def with_every_dtype(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function makes while JAX makes 64-bit arrays, which senders may have."""
    home = jax if hasattr(jax, "enable_x64") else jax.experimental  # before JAX 0.8
    with home.enable_x64(True):
        return function(*arguments)


ADAPTER: Final = JaxAdapter()
