"""The handles of operations: ours, which call back when they are done, and torch's around them; their deadlines."""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist

from colltensor.errors import CollectiveError, without_frames
from colltensor.work import Work

_NO_TIMEOUT: Final = timedelta(0)
_followed: Final[weakref.WeakSet[QueuedCall]] = weakref.WeakSet()
"""Operations whose end a future tells, and with it whoever calls us then."""


class QueuedCall(Work):
    """An operation of a process group; ``notify`` calls what waits for its end, and that may wait for other operations.

    Attributes:
        name: The operation, for messages.
        watch: What looks after a thread that waits for the operation without a timeout, until it is done; or None.
    """

    watch: Callable[[], None] | None = None

    def __init__(self, name: str, run: Callable[[], Any] | None = None) -> None:
        super().__init__(name, run or _nothing)
        self.name = name
        self._guard = threading.Lock()
        self._listeners: list[Callable[[], None]] = []

    @property
    def error(self) -> BaseException | None:
        """What the operation failed with; None while it runs."""
        return self._error

    @property
    def awaited(self) -> bool:
        """Whether ``notify`` has somebody to call."""
        return bool(self._listeners)

    def is_done_within(self, seconds: float | None) -> bool:
        """Wait so long at most, or for ever; return whether the operation succeeded or failed."""
        return self._finished.wait(seconds)

    def is_inside(self) -> bool:
        """Return whether this thread is in a call that is before the operation, which cannot be waited for then."""
        return self._queue is not None and self._queue.is_inside()

    def execute(self) -> None:
        """Run the operation; ``notify`` must follow."""
        self._finish()

    def _end(self) -> None:
        self.watch = None  # which has the operation and its tensor
        super()._end()

    def end(self, error: BaseException | None = None) -> bool:
        """End an operation that others did, unless it has ended; True if it had not."""
        with self._guard:
            if self._finished.is_set():
                return False
            self._error = without_frames(error) if isinstance(error, CollectiveError) else error
            self._run = self.watch = None
            self._finished.set()
        return True

    def then(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once the operation is done, in the thread that ended it or, if it is done, at once."""
        with self._guard:
            if not self._finished.is_set():
                self._listeners.append(callback)
                return
        callback()

    def notify(self) -> None:
        """Call what waits for the end."""
        with self._guard:
            listeners, self._listeners = self._listeners, []
        for callback in listeners:
            callback()


class PendingWork(dist.Work):
    """torch's handle of an operation that may still run; keeps its tensors."""

    def __init__(
        self,
        operation: QueuedCall,
        tensors: list[torch.Tensor],
        received: Callable[[], int] | None = None,
    ) -> None:
        super().__init__()
        self._operation = operation
        self._tensors = tensors
        self._future: Any = None
        self._received = received

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """Return True when the operation is done.

        Raises:
            CollectiveTimeoutError: It is not done after ``timeout``, where one is given; it goes on.
            CollectiveError: It failed.
        """
        operation = self._operation
        watch = operation.watch  # None as soon as it is done
        if watch is not None and timeout <= _NO_TIMEOUT and not operation.is_inside():
            watch()
        operation.wait(timeout.total_seconds() if timeout > _NO_TIMEOUT else None)
        return True

    def is_completed(self) -> bool:
        """Return True once the operation succeeded or failed."""
        return self._operation.done()

    def is_success(self) -> bool:
        """Return True once the operation succeeded."""
        return self._operation.done() and self._operation.error is None

    def exception(self) -> BaseException | None:
        """Return what the operation failed with, or None."""
        return self._operation.error

    def synchronize(self) -> None:
        """Wait."""
        self.wait()

    def result(self) -> list[torch.Tensor]:
        """Wait, and return the tensors that were written."""
        self.wait()
        return self._tensors

    def source_rank(self) -> int:
        """Return the rank that sent, once a receive is done; -1 for other operations."""
        return -1 if self._received is None else self._received()

    _source_rank = source_rank

    def get_future(self) -> Any:
        """Return the ``torch.futures.Future`` of the tensors; its error is a RuntimeError with ours in its text."""
        if self._future is None:
            operation, tensors = self._operation, self._tensors
            _followed.add(operation)
            done: Any = torch.futures.Future()
            half = bool(tensors) and tensors[0].dtype is torch.float16

            def value(_: object) -> list[torch.Tensor]:
                operation.wait()
                return tensors

            # An exception that Python sets is a value like any other to C++, which DDP's reducer would take for the
            # tensors; one that a callback raises is an error there too.
            ended = done.then(value)
            self._future = _script().list_after(ended, tensors) if half else ended
            operation.then(lambda: done.set_result(None))
        return self._future


class FinishedWork(dist.Work):
    """torch's handle of an operation that is done."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """Return True."""
        return True

    def is_completed(self) -> bool:
        """Return True."""
        return True

    def is_success(self) -> bool:
        """Return True."""
        return True

    def exception(self) -> None:
        """Return None."""

    def synchronize(self) -> None:
        """Return at once."""

    def result(self) -> list[torch.Tensor]:
        """Return the tensors that were written."""
        return self._tensors

    def get_future(self) -> Any:
        """Return a ``torch.futures.Future`` that has the tensors."""
        future: Any = torch.futures.Future()
        future.set_result(self._tensors)
        return future


@functools.cache
def _script() -> Any:
    """Return the script whose futures have a list of tensors for a value, where Python's have a Python object.

    C++ takes the latter for the former but in the built-in hook of DDP that compresses to float16, which checks the
    type; other futures are spared the 20 us that a script takes.
    """
    return torch.jit.CompilationUnit(
        """
        def wait_and_return(ended: Future[int], tensors: List[Tensor]) -> List[Tensor]:
            torch.jit._wait(ended)
            return tensors

        def list_after(ended: Future[int], tensors: List[Tensor]) -> Future[List[Tensor]]:
            return torch.jit._fork(wait_and_return, ended, tensors)
        """
    )


def is_followed() -> bool:
    """Return whether a future will tell of an operation that is not done."""
    return any(not operation.done() for operation in list(_followed))


def _nothing() -> None:
    pass


_PRUNE_FROM = 64
_LONGEST_WAIT_S = 86400.0


class Deadline(NamedTuple):
    """When an operation expires, and what is said then."""

    at: float
    operation: weakref.ref[QueuedCall]
    timeout_s: float
    ranks: tuple[int, ...]

    def is_over(self) -> bool:
        """Return whether the operation is done; nothing else keeps one that is."""
        operation = self.operation()
        return operation is None or operation.done()


class Deadlines:
    """Calls ``expire`` for each operation that is not done in time."""

    def __init__(self, expire: Callable[[Deadline], None]) -> None:
        self._expire = expire
        self._changed = threading.Condition(threading.Lock())
        self._pending: list[Deadline] = []
        self._prune_at = _PRUNE_FROM
        self._wake_at = 0.0
        self._started = self._closed = False

    def add(self, operation: QueuedCall, timeout_s: float, ranks: tuple[int, ...]) -> None:
        """Let ``operation`` expire after ``timeout_s``, for which ``ranks`` are to blame.

        Raises:
            RuntimeError: No thread can be started; nothing is left behind.
        """
        deadline = Deadline(time.monotonic() + timeout_s, weakref.ref(operation), timeout_s, ranks)
        with self._changed:
            if len(self._pending) >= self._prune_at:
                self._pending = [entry for entry in self._pending if not entry.is_over()]
                self._prune_at = 2 * len(self._pending) + _PRUNE_FROM
            if not self._started:
                threading.Thread(
                    target=self._serve, name="colltensor deadlines", daemon=True
                ).start()
                self._started = True
            self._pending.append(deadline)
            if deadline.at < self._wake_at:
                self._changed.notify_all()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._pending.clear()
            self._changed.notify_all()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._wake_at = min((entry.at for entry in self._pending), default=float("inf"))
                left_s = min(self._wake_at - time.monotonic(), _LONGEST_WAIT_S)
                if left_s > 0 and not self._closed:
                    self._changed.wait(left_s)
                if self._closed:
                    return
                now = time.monotonic()
                late = [entry for entry in self._pending if entry.at <= now]
                self._pending = [entry for entry in self._pending if entry.at > now]
            for entry in late:
                if not entry.is_over():
                    self._expire(entry)
