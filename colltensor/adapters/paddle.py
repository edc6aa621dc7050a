"""The adapter for Paddle tensors, in place."""

from __future__ import annotations

from typing import Any, Final

import paddle

from colltensor.adapters.base import AdapterBase
from colltensor.adapters.dlpack import ADAPTER as DLPACK
from colltensor.errors import ReadOnlyError
from colltensor.view import BufferView

_KINDS: Final = (paddle.Tensor, paddle.base.framework.EagerParamBase)


class PaddleAdapter(AdapterBase):
    """paddle.Tensor and parameters, outside of static graphs."""

    name = "paddle"

    def claims(self, kind: type) -> bool:
        return kind in _KINDS

    def source(self, tensor: Any) -> BufferView:
        return DLPACK.source(tensor.detach())

    def target(self, tensor: Any) -> BufferView:
        if not tensor.stop_gradient and paddle.is_grad_enabled():
            raise ReadOnlyError(
                "the Paddle tensor has stop_gradient=False, and a write in place would not be seen by autograd; call "
                "it under paddle.no_grad(), or pass tensor.detach()"
            )
        return DLPACK.target(tensor.detach())

    def written(self, tensor: Any) -> None:
        tensor._bump_inplace_version()  # so that a value saved for the backward pass raises there


ADAPTER: Final = PaddleAdapter()
