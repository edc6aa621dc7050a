"""CUDA and NCCL as CuPy offers them: streams, events and communicators, by their numbers.

Imports cupy, and nothing else of the backend. Streams and events are what CUDA calls
``cudaStream_t`` and ``cudaEvent_t``, as numbers. Tests put a device of their own in its place.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
import warnings
from collections.abc import Iterator
from typing import Any, Final

import cupy as cp
from cupy.cuda import nccl, runtime

from colltensor.types import UINT8
from colltensor.view import BufferView

_NOT_READY: Final = 600
"""``cudaErrorNotReady``."""
_CAPTURE_ERRORS: Final = range(900, 909)
"""``cudaErrorStreamCapture...``: what a capture forbids, and what does not last."""
_THREAD_LOCAL: Final = 1
"""``CU_STREAM_CAPTURE_MODE_THREAD_LOCAL``."""


class CupyDriver:
    """The CUDA devices of this process.

    Attributes:
        error: What a call of NCCL may raise.
    """

    error: Final = (nccl.NcclError, KeyError)
    """What CuPy raises for NCCL's errors.

    CuPy 14.2 has no text for results above 6, and raises KeyError in place of its NcclError.
    """
    in_progress: Final = 7
    """``ncclInProgress``, which is no error.

    A communicator may say so while another thread is in a call of it.
    """

    def __init__(self) -> None:
        self._group = threading.local()

    def unique_id(self) -> bytes:
        """Return what the ranks of a new communicator find each other by; one makes it."""
        return bytes(nccl.get_unique_id())

    def connect(self, size: int, unique_id: bytes, rank: int) -> Any:
        """Return a communicator of the current device; blocks until all ``size`` ranks call."""
        return nccl.NcclCommunicator(size, unique_id, rank)

    def error_of(self, communicator: Any) -> BaseException | None:
        """Return the error that a communicator reports, or None; never waits."""
        try:
            communicator.check_async_error()
        except self.error as error:
            return None if error.args == (self.in_progress,) else error
        return None

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Queue the calls made inside as one; after an exception ``ungroup`` must follow."""
        self._group.open = True
        nccl.groupStart()
        yield
        nccl.groupEnd()
        self._group.open = False

    def ungroup(self) -> None:
        """Close the group of calls that an exception left open in this thread.

        Its next calls would join it. Whatever NCCL says to it: there is none if the exception, an
        interrupt say, came just before it was opened.
        """
        if getattr(self._group, "open", False):
            with contextlib.suppress(*self.error):
                nccl.groupEnd()
            self._group.open = False

    def enter(self, device: int) -> int | None:
        """Make a device the current one of this thread; returns what ``leave`` needs to undo it."""
        before: int = runtime.getDevice()
        if before == device:
            return None
        runtime.setDevice(device)
        return before

    def leave(self, before: int | None) -> None:
        """Make the device the current one that was so before ``enter``."""
        if before is not None:
            runtime.setDevice(before)

    @contextlib.contextmanager
    def on(self, device: int, stream: int | None = None) -> Iterator[None]:
        """Make a device and a stream CuPy's current ones in this thread, to compute on."""
        with cp.cuda.Device(device):
            if stream is None:
                yield
            else:
                before = cp.cuda.get_current_stream(device)
                try:
                    _stream(stream, device).use()
                    yield
                finally:
                    # CuPy's own ``with stream`` forgets a stream that ``use()`` had made the
                    # current one
                    before.use()

    def new_stream(self) -> int:
        """Return a new stream of the current device.

        The legacy default stream does not wait for it.
        """
        stream: int = runtime.streamCreateWithFlags(runtime.streamNonBlocking)
        return stream

    def capturing(self, stream: int) -> bool:
        """Return whether what is queued on a stream goes into a CUDA graph, or would end a capture.

        The latter is so of the legacy default stream while another one that synchronises with it is
        captured.
        """
        try:
            return bool(runtime.streamIsCapturing(stream))
        except runtime.CUDARuntimeError as error:
            if error.status in _CAPTURE_ERRORS:
                return True
            raise

    def new_event(self) -> int:
        """Return a new event of the current device, without a clock."""
        event: int = runtime.eventCreateWithFlags(runtime.eventDisableTiming)
        return event

    record = staticmethod(runtime.eventRecord)
    """Let an event stand for all work that is on a stream now."""

    wait = staticmethod(runtime.streamWaitEvent)
    """Let what is queued on a stream from now on wait for what an event stands for now."""

    def done(self, event: int) -> bool:
        """Return whether the work that ``event`` stands for is done."""
        return bool(runtime.eventQuery(event) == 0)

    def check(self, event: int) -> None:
        """Raise the error that the device reports when it is asked for an event.

        It is one that stays, of whatever kernel.

        Raises:
            CUDARuntimeError: A RuntimeError of CuPy's.
        """
        status = runtime.eventQuery(event)
        if status not in (0, _NOT_READY, *_CAPTURE_ERRORS):
            raise runtime.CUDARuntimeError(status)

    def mind_own_captures(self) -> None:
        """Let this thread ask for events while another one captures a stream into a CUDA graph.

        Otherwise the question ends a capture in the mode that is CUDA's default, and torch's,
        without an answer (cuThreadExchangeStreamCaptureMode). CuPy 14 has no name for it.
        """
        mode = ctypes.c_int(_THREAD_LOCAL)
        # captures are disturbed then, and nothing else
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))

    def free(self, streams: list[int], events: list[int]) -> None:
        """Free streams and events of the current device; CUDA does it once their work is done."""
        # an earlier error of the device is raised by every call
        with contextlib.suppress(runtime.CUDARuntimeError):
            for event in events:
                runtime.eventDestroy(event)
            for stream in streams:
                runtime.streamDestroy(stream)

    def allocate(self, nbytes: int, like: BufferView) -> BufferView:
        """Return memory of CuPy's pool, as bytes, on ``like``'s device.

        It is for use on CuPy's current stream.
        """
        raw = cp.empty(nbytes, cp.uint8)
        return BufferView.from_address(
            raw.data.ptr,
            (nbytes,),
            UINT8,
            device=like.device,
            owner=raw,
            stream=cp.cuda.get_current_stream().ptr,
        )

    def copy(self, target: BufferView, source: BufferView, stream: int) -> None:
        """Queue a copy between contiguous views of one size."""
        runtime.memcpyAsync(
            target.pointer, source.pointer, source.nbytes, runtime.memcpyDeviceToDevice, stream
        )

    def to_keys(
        self, keys: BufferView, bits: BufferView, mask: int, infinity: int, nan: int
    ) -> None:
        """Queue, on CuPy's current stream, making keys of the bits of floats.

        See ``reductions.OrderEncoding``.
        """
        given, result = _array(bits), _array(keys)
        kind = result.dtype.type
        _TO_KEYS(given, kind(mask), kind(infinity), kind(nan), result)

    def from_keys(self, bits: BufferView, keys: BufferView, mask: int) -> None:
        """Queue, on CuPy's current stream, making the bits of floats of their keys."""
        given, result = _array(keys), _array(bits)
        _FROM_KEYS(given, given.dtype.type(mask), result)


_TO_KEYS: Final = cp.ElementwiseKernel(
    "B bits, K mask, K infinity, K nan",
    "K key",
    "K b = bits; key = (b & mask) > infinity ? nan : b < 0 ? b ^ mask : b",
    "colltensor_to_keys",
)
_FROM_KEYS: Final = cp.ElementwiseKernel(
    "K key, K mask", "B bits", "bits = key < 0 ? key ^ mask : key", "colltensor_from_keys"
)


@functools.lru_cache(maxsize=256)
def _stream(stream: int, device: int) -> Any:
    """Return CuPy's object of a stream, which is kept.

    It warns of its deprecation, at five times its own cost. What CuPy 14 has in its place,
    ``Stream.from_external``, destroys the stream at its end; and owns no device.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return cp.cuda.ExternalStream(stream, device)


def _array(view: BufferView) -> Any:
    memory = cp.cuda.UnownedMemory(view.pointer, view.nbytes, view, view.device.index)
    return cp.ndarray((view.count,), view.dtype.name, cp.cuda.MemoryPointer(memory, 0))
