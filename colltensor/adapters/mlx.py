"""The adapter for mlx arrays: immutable, so results are new arrays.

Imports mlx. Expressions that were not evaluated yet may share an array's memory, which mlx's DLPack
exports do not say.
"""

from __future__ import annotations

from typing import Any, Final

import mlx.core as mx

from colltensor.adapters.base import AdapterBase
from colltensor.adapters.dlpack import view_of
from colltensor.adapters.numpy import MEMORY
from colltensor.view import BufferView


class MlxAdapter(AdapterBase):
    """mlx.core.array in host memory."""

    name = "mlx"
    immutable = True

    def claims(self, kind: type) -> bool:
        return kind is mx.array

    def source(self, tensor: Any) -> BufferView:
        view, _ = view_of(tensor)
        view.readonly = True
        return view

    def target(self, tensor: Any) -> BufferView:
        view = self.source(tensor)
        # as the result will lie
        return view if view.strides is None else self.source(mx.contiguous(tensor))

    def allocate_result(self, tensor: Any, donate: bool) -> tuple[Any, BufferView]:
        """Copy it, whatever ``donate`` says: nobody knows who shares its memory."""
        view = self.source(tensor)
        raw = MEMORY.allocate(view.nbytes)
        MEMORY.copy(raw.cast(view.dtype), view)
        # numpy knows no bfloat16
        result = mx.array(MEMORY.array(raw)).view(tensor.dtype).reshape(tensor.shape)
        return result, view_of(result)[0]


ADAPTER: Final = MlxAdapter()
