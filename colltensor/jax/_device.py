"""The memory of a computation on a CUDA device, as a tensor that the group's methods take."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from colltensor.adapters.base import AdapterBase
from colltensor.types import Device, DType
from colltensor.view import BufferView

_here: Final = threading.local()


@dataclass(frozen=True, slots=True)
class DeviceBuffer:
    """An operand or a result of a call that XLA queues.

    It is used for as long as its stream has not passed the call.

    Attributes:
        pointer: Address of the first element; all are contiguous.
        count: Number of elements.
        dtype: Their true type.
        device: The index of the device.
        stream: The stream of the computation, a ``cudaStream_t`` as a number.
    """

    pointer: int
    count: int
    dtype: DType
    device: int
    stream: int


@contextlib.contextmanager
def on(stream: int) -> Iterator[None]:
    """Let what this thread's calls are followed by be queued on a stream."""
    outer, _here.stream = getattr(_here, "stream", None), stream
    try:
        yield
    finally:
        _here.stream = outer


class DeviceAdapter(AdapterBase):
    """The adapter of ``DeviceBuffer``, written in place; its stream orders what follows."""

    name = "jax"

    def claims(self, kind: type) -> bool:
        return kind is DeviceBuffer

    def source(self, tensor: DeviceBuffer) -> BufferView:
        shape, device = (tensor.count,), Device("cuda", tensor.device)
        return BufferView.from_address(
            tensor.pointer, shape, tensor.dtype, device=device, owner=tensor, stream=tensor.stream
        )

    def stream(self, index: int) -> int | None:
        stream: int | None = getattr(_here, "stream", None)
        return stream


ADAPTER: Final = DeviceAdapter()
