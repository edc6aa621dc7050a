"""The adapter for TensorFlow's eager tensors: immutable, so results are new tensors.

Imports tensorflow. A cache of constants, a variable or a tape's intermediates may share a tensor's
memory, which its DLPack exports do not say.
"""

from __future__ import annotations

from typing import Any, Final

import tensorflow as tf

from colltensor.adapters.base import AdapterBase
from colltensor.adapters.dlpack import view_of
from colltensor.errors import DeviceError, UnsupportedDTypeError
from colltensor.types import CPU, DTYPES
from colltensor.view import BufferView

_EAGER: Final = type(tf.constant(0))


class TensorflowAdapter(AdapterBase):
    """tf.Tensor outside tf.function."""

    name = "tensorflow"
    immutable = True

    def claims(self, kind: type) -> bool:
        return kind is _EAGER

    def source(self, tensor: Any) -> BufferView:
        # TensorFlow 2.21 ends the process where it is asked to export text
        if tensor.dtype.name not in DTYPES:
            raise UnsupportedDTypeError(
                f"dtype {tensor.dtype.name} is not supported; known are {', '.join(DTYPES)}"
            )
        try:
            view, _ = view_of(tensor)
        except tf.errors.InvalidArgumentError as error:  # float8, which its DLPack does not have
            raise UnsupportedDTypeError(
                f"TensorFlow does not export {tensor.dtype.name}: {error.message}"
            ) from error
        view.readonly = True
        return view

    def target(self, tensor: Any) -> BufferView:
        view = self.source(tensor)
        if view.device is not CPU:
            raise DeviceError(
                f"the TensorFlow tensor is on {view.device}, where it can be sent but nothing be received in its "
                "place; move it, with tf.device('CPU'): tf.identity(x)"
            )
        return view

    def allocate_result(self, tensor: Any, donate: bool) -> tuple[Any, BufferView]:
        """Copy it, whatever ``donate`` says: nobody knows who shares its memory.

        A gradient through the copy, which a tape takes, is an error. TensorFlow has no gradient for
        DeepCopy.
        """
        with tf.device(tensor.device):
            result = tf.raw_ops.DeepCopy(x=tensor)
        return result, view_of(result)[0]


ADAPTER: Final = TensorflowAdapter()
