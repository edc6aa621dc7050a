"""The adapter for torch tensors on CPU and CUDA.

Imports torch. tvm_ffi exports what torch itself would guard (a lazy negation or conjugate, memory
that is not there), so those guards are here; see ``_view``.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from colltensor._compat.torch import (
    current_raw_stream,
    increment_version,
    is_functional_tensor,
    tensor_guards,
)
from colltensor.adapters.base import AdapterBase
from colltensor.dlpack import exchange_reader
from colltensor.errors import (
    DeviceError,
    ReadOnlyError,
    UnsupportedDTypeError,
    UnsupportedTensorError,
)
from colltensor.types import CPU, DTYPES, Device
from colltensor.view import BufferView

_is_inference_mode_enabled: Final = torch.is_inference_mode_enabled
_is_nested: Final = operator.attrgetter("is_nested")
_DTYPE_OF: Final = {
    getattr(torch, name): dtype for name, dtype in DTYPES.items() if hasattr(torch, name)
}
_REAL: Final = frozenset(name for name, dtype in _DTYPE_OF.items() if dtype.kind != "c")


class TorchAdapter(AdapterBase):
    """torch.Tensor and Parameter, in place. Other subclasses come by ``register_adapter``."""

    name = "torch"

    def claims(self, kind: type) -> bool:
        return kind in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)

    def source(self, tensor: Any) -> BufferView:
        return _view(tensor)

    def target(self, tensor: Any) -> BufferView:
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ReadOnlyError(
                "the torch tensor requires grad, and a write in place would not be seen by autograd; call it under "
                "torch.no_grad(), or pass tensor.detach()"
            )
        if tensor.is_inference() and not _is_inference_mode_enabled():
            raise ReadOnlyError(
                "the torch tensor was made under torch.inference_mode() and may be written only there; pass "
                "tensor.clone()"
            )
        return _view(tensor)

    def directly_exportable(self, tensor: Any) -> bool:
        dtype = tensor.dtype
        if (
            (dtype not in _REAL and (dtype not in _DTYPE_OF or tensor.is_conj()))
            or not tensor.is_cpu
            or tensor.requires_grad
            or tensor.is_nested
            or tensor.is_neg()
        ):
            return False
        try:
            tensor.data_ptr()
            tensor._version  # noqa: B018 - asking is cheaper than is_inference()
        except RuntimeError:  # sparse, or inside torch.func's transforms; made in inference mode
            return False
        return True

    def alike(self, tensors: Sequence[Any]) -> Callable[..., bool] | None:
        """Return the check that guards torch's compiled code.

        It compares types, dispatch keys, dtypes, devices and autograd. A layout and a lazy negation
        or conjugate are dispatch keys; so are transforms and modes of torch. All extents and
        strides may differ.
        """
        # What it would learn of a plain tensor fits an inference tensor outside.
        if _is_inference_mode_enabled():
            return None
        anything = [[None] * tensor.dim() for tensor in tensors]
        try:
            check: Callable[..., bool] = tensor_guards(
                *tensors, dynamic_dims_sizes=anything, dynamic_dims_strides=anything
            ).check
            return functools.partial(_are_like, check) if check(*tensors) else None
        except Exception:  # noqa: BLE001 - private to torch: without it each tensor is asked
            return None

    def reader(self, kind: type) -> int:
        return exchange_reader(kind)

    def reduced(self, tensor: Any) -> tuple[Any, ...] | None:
        """Leave out the rest of a storage, all of which torch pickles with a view of it."""
        if (
            type(tensor) is not torch.Tensor
            or tensor.layout is not torch.strided
            or tensor.is_nested
            or tensor.is_quantized
            or tensor.untyped_storage().nbytes() <= tensor.nbytes
        ):
            return None
        alone: Any = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        alone.__dict__.update(tensor.__dict__)
        found: tuple[Any, ...] = alone.__reduce_ex__(5)
        return found

    def stream(self, index: int) -> int:
        return _current_stream(index)

    def written_together(self, tensors: Sequence[Any]) -> None:
        try:
            increment_version(tensors)
        except RuntimeError:
            for tensor in tensors:
                self.written(tensor)

    def written(self, tensor: Any) -> None:
        try:
            increment_version((tensor,))
        except RuntimeError:
            if not tensor.is_inference():  # inference tensors have no version
                raise


def _view(tensor: Any) -> BufferView:
    dtype = _DTYPE_OF.get(tensor.dtype)
    if dtype is None:
        raise UnsupportedDTypeError(
            f"dtype {tensor.dtype} is not supported; known are {', '.join(DTYPES)}"
        )

    if tensor.is_nested:
        raise UnsupportedTensorError(
            "the torch tensor is nested; pass its parts, tensor.unbind(), as a list"
        )

    if tensor.is_neg() or (dtype.kind == "c" and tensor.is_conj()):
        raise UnsupportedTensorError(
            "the torch tensor is a lazy negation or conjugate, whose memory holds other values; pass "
            "tensor.resolve_neg().resolve_conj()"
        )

    device = CPU if tensor.is_cpu else _device(tensor)
    try:
        strides = None if tensor.is_contiguous() else tensor.stride()
        stream = None if device is CPU else _current_stream(device.index)
        pointer, count = tensor.data_ptr(), tensor.numel()
    except RuntimeError as error:
        # sparse, or inside torch.func's transforms: no address, no strides
        raise UnsupportedTensorError(
            f"the torch tensor (layout {tensor.layout}) is no plain array in memory ({error}); pass a dense tensor, "
            "tensor.to_dense(), outside torch.func's transforms"
        ) from error

    # a view of freed storage has its offset for an address
    if count and (
        not pointer or (tensor.storage_offset() and not tensor.untyped_storage().nbytes())
    ):
        if is_functional_tensor(tensor):
            raise UnsupportedTensorError(
                "the torch tensor stands for others inside torch.func.functionalize, torch.export or a compiler, and "
                "has no memory: call it outside the traced function"
            )
        raise UnsupportedTensorError(
            "the torch tensor has no memory: its storage was freed (resize_(0), as FSDP does with parameters that are "
            "not gathered), or it is one of autograd's zeros; pass a tensor with memory, such as tensor.clone() of the "
            "latter"
        )

    return BufferView(pointer, count, dtype, device, None, strides, False, None, tensor, stream)


def _are_like(check: Callable[..., bool], *tensors: Any) -> bool:
    """Return what ``check`` says of tensors, which ends the process where one of them is nested."""
    try:
        return not any(map(_is_nested, tensors)) and check(*tensors)
    except AttributeError:  # one is no tensor of torch's
        return False


def _current_stream(index: int) -> int:
    stream: int = (
        torch.cuda.current_stream(index).cuda_stream
        if current_raw_stream is None
        else current_raw_stream(index)
    )
    return stream


@functools.lru_cache
def _cuda(index: int) -> Device:
    return Device("cuda", index)


def _device(tensor: Any) -> Device:
    if tensor.is_cuda:
        return _cuda(tensor.get_device())
    raise DeviceError(
        f"the torch tensor is on {tensor.device}; collectives work on cpu and cuda, move it there"
    )


ADAPTER: Final = TorchAdapter()
