"""StreamManager: which stream a call is queued on, what it comes after, and what comes after it.

A synchronous call goes on the stream on which the framework queues its own work, so that nothing
else is needed; the streams of other frameworks in the same call, and the stream of the call before,
are waited for by events. An asynchronous one goes on a stream of the group's own, so that the
frameworks' work goes on beside it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

from colltensor.errors import CollectiveError, DeviceError
from colltensor.view import BufferView

_LEGACY: Final = 1
"""The stream given for frameworks that have none of their own to name.

They free memory without regard to it.
"""
_PER_THREAD: Final = 2
"""``cudaStreamPerThread``: another stream in each thread."""
_GLANCE_S: Final = 20e-6
_LONGEST_GLANCE_S: Final = 1e-3


class QueuedOperation:
    """One call on a device. Of ``PendingOperation``.

    Attributes:
        name: The operation.
        peers: The ranks of a point-to-point call, None for all.
        number: Which one it is of this rank's calls with these ranks.
        device: The index of the device.
        stream: The stream that it is on.
        began: The event before it.
        ended: The event behind it.
        since: When it was first seen under way, by ``time.monotonic()``.
        timeout_s: How long it may be under way.
        patience_s: After how many seconds under way the other ranks are asked whether they are
            there.
        landed: Whether it is done, and its events may be used again.
        failure: Why it did not end, or None.
    """

    number = 0
    queued = landed = False
    since: float | None = None
    timeout_s = 0.0
    patience_s = 1.0
    failure: CollectiveError | None = None

    def __init__(
        self,
        stream_manager: StreamManager,
        name: str,
        peers: Sequence[int] | None,
        device: int,
        stream: int,
        keep: object,
        began: int,
        ended: int,
    ) -> None:
        self._stream_manager = stream_manager
        self.name = name
        self.peers = peers
        self.device = device
        self.stream = stream
        self.keep: object = keep
        self.began = began
        self.ended = ended

    def done(self) -> bool:
        """Return True once the call is done or failed; never waits."""
        return self.failure is not None or self._stream_manager.finished(self)

    def order(self, streams: Iterable[int | None], timeout_s: float | None = None) -> None:
        """Let streams, and for None the host, go on only when the call is done.

        See ``PendingOperation``.
        """
        if self.failure is not None:
            raise self.failure
        for stream in streams:
            if stream is None:
                self.wait(timeout_s)
            elif stream != self.stream:
                self._stream_manager.follow(stream, self)
        if self.failure is not None:
            raise self.failure

    def wait(self, timeout_s: float | None = None) -> None:
        """Return, on the host, when the call is done.

        The watchdog bounds the wait by the group's timeout.

        Raises:
            TimeoutError: It is not done after ``timeout_s``.
            CollectiveError: It failed.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        glance_s = _GLANCE_S
        while not self.done():
            if until is not None and time.monotonic() >= until:
                raise TimeoutError(f"{self.name} is not done after {timeout_s} s")
            time.sleep(glance_s)
            glance_s = min(2 * glance_s, _LONGEST_GLANCE_S)
        if self.failure is not None:
            raise self.failure


class PendingOperations:
    """One call on several devices. Of ``PendingOperation``."""

    def __init__(self, pending: Sequence[QueuedOperation]) -> None:
        self._pending = pending

    def done(self) -> bool:
        """Return True once the call is done on all devices, or failed on one; never waits."""
        return all(operation.done() for operation in self._pending)

    def order(self, streams: Iterable[int | None], timeout_s: float | None = None) -> None:
        """Let streams of each device, and for None the host, wait until the call is done there."""
        wanted = list(streams)
        for operation in self._pending:
            operation.order(wanted, timeout_s)


class StreamManager:
    """The streams and events of one group in this process."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._lock = threading.Lock()
        self._own: dict[int, int] = {}
        self._events: dict[int, list[int]] = {}
        self._last: dict[int, QueuedOperation] = {}

    def begin(
        self,
        name: str,
        views: Sequence[BufferView],
        peers: Sequence[int] | None,
        apart: bool,
        keep: object,
    ) -> QueuedOperation:
        """Return the operation of what is queued next.

        Its device is the current one for it, and its stream is ready.

        Args:
            name: The operation.
            views: The views of the call, on one device, the current one; at least one.
            peers: The ranks of a point-to-point call, None for all.
            apart: Whether to use the group's own stream.
            keep: Kept until the operation is done, where the frameworks' own order does not protect
                its memory.
        """
        device = views[0].device.index
        streams = {view.stream or 0 for view in views}
        stream = self._own_stream(device) if apart else views[0].stream or 0
        streams.discard(stream)
        for other in streams:
            self._chain(device, other, stream)

        last = self._last.get(device)
        if last is not None and (last.stream != stream or stream == _PER_THREAD):
            self.follow(stream, last)

        began, ended = self._two_events(device)
        kept = keep if apart or streams or stream == _LEGACY else None
        operation = QueuedOperation(self, name, peers, device, stream, kept, began, ended)
        self._driver.record(began, stream)
        return operation

    def follows_itself(self, device: int, stream: int) -> bool:
        """Return whether a call on a stream follows the call before as it is.

        Then its memory needs no keeping.
        """
        last = self._last.get(device)
        return last is not None and last.stream == stream and stream not in (_LEGACY, _PER_THREAD)

    def begin_alone(self, name: str, device: int, stream: int) -> QueuedOperation:
        """Do as ``begin`` for a call of all ranks on one tensor that ``follows_itself``."""
        began, ended = self._two_events(device)
        self._driver.record(began, stream)
        return QueuedOperation(self, name, None, device, stream, None, began, ended)

    def end(self, operation: QueuedOperation) -> None:
        """Take what was queued since ``begin`` for the operation; its device is the current one."""
        self._driver.record(operation.ended, operation.stream)
        operation.queued = True
        self._last[operation.device] = operation

    def refuse_capture(self, name: str, views: Sequence[BufferView]) -> None:
        """Refuse to queue a call on streams that are captured.

        A graph that is run again would call on one rank alone.

        Raises:
            DeviceError: One of them is.
        """
        for stream in {view.stream or 0 for view in views}:
            if self._driver.capturing(stream):
                raise DeviceError(
                    f"{name}: the current stream is being captured into a CUDA graph, of which a collective cannot be "
                    "a part; call it before or after the capture, on every rank"
                )

    def follow(self, stream: int, operation: QueuedOperation) -> None:
        """Let a stream go on only when the operation is done."""
        with self._lock:
            if not operation.landed and operation.queued:
                before = self._driver.enter(operation.device)
                try:
                    self._driver.wait(stream, operation.ended)
                finally:
                    self._driver.leave(before)

    def finished(self, operation: QueuedOperation) -> bool:
        """Return whether the operation is done.

        If so, takes its events back and lets go of what it keeps.
        """
        with self._lock:
            if operation.landed:
                return True
            if not operation.queued or not self._driver.done(operation.ended):
                return False
            operation.landed = True
            self._events[operation.device] += (operation.began, operation.ended)
        operation.keep = None
        return True

    def under_way(self, operation: QueuedOperation) -> bool:
        """Return whether all that was queued before the operation is done."""
        with self._lock:
            return operation.landed or bool(self._driver.done(operation.began))

    def enter_watchdog(self) -> None:
        """Prepare the thread that watches pending operations."""
        self._driver.mind_own_captures()

    def check(self, operation: QueuedOperation) -> None:
        """Raise the driver's RuntimeError if the device has failed.

        No operation is ever done after that.
        """
        with self._lock:
            if not operation.landed:
                self._driver.check(operation.ended)

    def close(self) -> None:
        """Free streams and events."""
        with self._lock:
            for device in {*self._own, *self._events}:
                with self._driver.on(device):
                    own = [self._own[device]] if device in self._own else []
                    self._driver.free(own, self._events.get(device, []))
            self._own.clear()
            self._events.clear()
            self._last.clear()

    def _own_stream(self, device: int) -> int:
        if device not in self._own:
            self._own[device] = self._driver.new_stream()
        return self._own[device]

    def _two_events(self, device: int) -> tuple[int, int]:
        with self._lock:
            spare = self._events.setdefault(device, [])
            if len(spare) > 1:
                return spare.pop(), spare.pop()
        return self._driver.new_event(), self._driver.new_event()

    def _chain(self, device: int, before: int, after: int) -> None:
        """Let one stream go on only when what is on another one now is done."""
        events = self._two_events(device)
        self._driver.record(events[0], before)
        self._driver.wait(after, events[0])
        with self._lock:  # a wait keeps to what the event stood for when it was queued
            self._events[device] += events
