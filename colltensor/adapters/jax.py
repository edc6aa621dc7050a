"""The adapter for JAX arrays: immutable, so results are new arrays, or donated ones.

Imports jax.
"""

from __future__ import annotations

from typing import Any, Final

import jax
import jax.numpy as jnp

from colltensor.adapters import LEGACY_STREAM
from colltensor.adapters._numpy_dtypes import DTYPE_OF, unsupported_dtype
from colltensor.errors import DeviceError, UnsupportedTensorError
from colltensor.types import CPU, Device
from colltensor.view import BufferView

_ARRAY: Final = type(jax.device_put(0))
_copy: Final = jax.jit(jnp.copy)
_claim: Final = jax.jit(jnp.copy, donate_argnums=0)
"""A donating copy: XLA hands the same memory on where nobody else holds it, and copies it otherwise."""


class JaxAdapter:
    """jax.Array on one device of this process."""

    name = "jax"
    immutable = True

    def claims(self, kind: type) -> bool:
        return kind is _ARRAY

    def source(self, tensor: Any) -> BufferView:
        _check(tensor)
        return _view(tensor, readonly=True)

    def target(self, tensor: Any) -> BufferView:
        return self.source(tensor)

    def claim(self, tensor: Any, donate: bool) -> tuple[Any, BufferView]:
        if not donate:
            result = _copy(tensor)
        else:
            result = _claim(tensor)
            if not tensor.is_deleted():  # XLA found nothing to reuse (an empty array): the promise is kept here
                tensor.delete()
        return result, _view(result, readonly=False)

    def written(self, tensor: Any) -> None:
        pass

    def stream(self, index: int) -> None:
        return None  # XLA queues what reads an array as soon as it has it, on streams of its own


def _check(tensor: Any) -> None:
    if tensor.is_deleted():
        raise UnsupportedTensorError("the JAX array was deleted or donated before; use the array that call returned")
    if tensor.dtype not in DTYPE_OF:
        raise unsupported_dtype(tensor.dtype)
    if len(tensor.sharding.device_set) != 1 or not tensor.is_fully_addressable:
        raise UnsupportedTensorError(
            f"the JAX array is sharded over {len(tensor.sharding.device_set)} devices; a collective works on one "
            "device of this process: pass its addressable shards, x.addressable_shards[i].data, one by one"
        )


def _view(tensor: Any, *, readonly: bool) -> BufferView:
    (where,) = tensor.sharding.device_set
    stream = None
    if where.platform == "cpu":
        tensor.block_until_ready()
        device = CPU
    elif where.platform in ("gpu", "cuda"):
        device, stream = Device("cuda", where.local_hardware_id), LEGACY_STREAM
        tensor.__dlpack__(stream=stream)  # makes that stream wait for the array, and not the host
    else:
        raise DeviceError(f"the JAX array is on {where}; collectives work on cpu and cuda: jax.device_put it there")
    return BufferView(
        tensor.unsafe_buffer_pointer(), tensor.size, DTYPE_OF[tensor.dtype], device, tensor.shape, None, readonly,
        None, tensor, stream,
    )


ADAPTER: Final = JaxAdapter()
