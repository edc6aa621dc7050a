"""The operations of a process group: their handles and the queue that runs them.

The handles are ours and torch's around them. ``colltensor.operation_queue`` has one thread. Here a
callback may wait for a later operation, as torch's PowerSGD hook does, so another thread goes on
meanwhile.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist

from colltensor.errors import CollectiveError, without_frames
from colltensor.turn import Turn, lock_of_handlers
from colltensor.work import Work, callers

_NO_TIMEOUT: Final = timedelta(0)
_CLOSE_TIMEOUT_S: Final = 5.0
_LOOK_S: Final = 0.1
_followed: Final[weakref.WeakSet[QueuedCall]] = weakref.WeakSet()
"""Operations whose end a future tells, and with it whoever calls us then."""


class QueuedCall(Work):
    """An operation of a process group.

    ``notify`` calls whatever waits for its end, and that may wait for other operations.

    Attributes:
        name: The operation, for messages.
        watch: Looks after a thread that waits for the operation without a timeout, until it is
            done; or None.
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
        """Return whether this thread is in a call that the operation has to wait for."""
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
        """Call ``callback`` in the thread that ends the operation; at once if it is done."""
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


class ProcessGroupQueue:
    """Runs operations in their order: in the caller's thread after ``enter``, else its own."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.turn = Turn()
        self._lock, self._is_locked_here = lock_of_handlers()
        self._changed = threading.Condition(self._lock)
        self._waiting: collections.deque[QueuedCall] = collections.deque()
        self._closed: CollectiveError | None = None
        self.awaited: Work | None = None
        self._watched = False  # somebody waits for the turn to be free
        self._idle = 0  # threads that wait for an operation
        # a thread runs one, and takes the next unless it has somebody to tell
        self._running = False

    def enter(self) -> bool:
        """Take a free turn nobody waits for; ``turn.release`` and ``pass_on`` must follow."""
        return not self._waiting and self.turn.take()

    def is_inside(self) -> bool:
        """Return whether this thread runs an operation, and can wait for none after it."""
        return self.turn.owner() == threading.get_ident() or self._is_locked_here()

    def pass_on(self) -> None:
        """Let who waits for the turn know that it was given back."""
        if self._waiting or self._watched:
            with self._lock:
                self._changed.notify_all()

    def put(self, operation: QueuedCall) -> None:
        """Run ``operation`` in a thread of the queue when its turn comes.

        It fails at once where the queue is closed.

        Raises:
            RuntimeError: No thread can be started; nothing is left behind.
        """
        operation._queue = self
        with self._lock:
            if self._closed is None:
                try:
                    self._waiting.append(operation)
                    self._man()
                except BaseException:
                    if operation in self._waiting:
                        self._waiting.remove(operation)
                    raise
                return

        operation.end(self._closed)
        operation.notify()

    def withdraw(self, operation: QueuedCall) -> None:
        """Forget an operation that was ended by others, if its turn has not come."""
        with self._lock, contextlib.suppress(ValueError):
            self._waiting.remove(operation)
            self._changed.notify_all()

    def drain(self, deadline: float) -> None:
        """Wait until everything that was put has run, or until ``deadline``.

        The deadline is a value of ``time.monotonic()``. Not for an operation that runs in a thread
        of the caller's own.
        """
        with self._lock:
            self._watched = True
            self._changed.wait_for(
                lambda: (not self._waiting and not self.turn.owner()) or self._is_callers(),
                max(0.0, deadline - time.monotonic()),
            )

    def close(self, error: CollectiveError) -> None:
        """Fail what waits, and wait a while for the operation that runs."""
        with self._lock:
            self._closed, self._watched = error, True
            cancelled = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
            # else in a signal's handler: it ends when that returns
            if self.turn.owner() != threading.get_ident():
                self._changed.wait_for(lambda: not self.turn.owner(), _CLOSE_TIMEOUT_S)
        for operation in cancelled:
            operation.end(error)
            operation.notify()

    def _is_callers(self) -> bool:
        """Return whether the operation that runs does so after ``enter``."""
        return bool(self.turn.owner()) and not self._running

    def _man(self) -> None:
        """See that somebody takes the next operation; the lock is held."""
        if self._running:
            return
        if self._idle > 0:
            self._changed.notify()
        else:
            self._idle += 1
            try:
                threading.Thread(
                    target=self._serve, name=f"colltensor {self._name}", daemon=True
                ).start()
            except BaseException:
                self._idle -= 1
                raise

    def _serve(self) -> None:
        with self._lock:
            self._idle = max(0, self._idle - 1)  # 0 if a signal's handler raised in who started it
        while True:
            with self._lock:
                if self._idle and not self._waiting:  # one that waits is enough
                    return
                self._idle += 1
                while not self._may_go_on():
                    # A signal's handler may have raised in who gave the turn back, before it told.
                    self._changed.wait(_LOOK_S if self._waiting else None)
                self._idle -= 1
                if not self._waiting:  # closed, with the turn never taken
                    return
                operation = self._waiting.popleft()
                self._running = True

            operation.execute()
            self.turn.release()
            with self._lock:
                self._running = False
                if self._watched:
                    self._changed.notify_all()
                if self._waiting and operation.awaited:
                    # no new thread: this one goes on when it has told
                    with contextlib.suppress(RuntimeError):
                        self._man()

            operation.notify()
            del operation  # not kept while this waits: its error has the caller's frames

    def _may_go_on(self) -> bool:
        return (self._closed is not None and not self._waiting) or bool(
            self._waiting and self.turn.take()
        )


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

    def exception(self) -> BaseException | None:
        """Return None."""
        return None

    def synchronize(self) -> None:
        """Wait."""
        self.wait()

    def result(self) -> list[torch.Tensor]:
        """Wait, and return the tensors that were written."""
        self.wait()
        return self._tensors

    def get_future(self) -> Any:
        """Return a ``torch.futures.Future`` that has the tensors."""
        future: Any = torch.futures.Future()
        future.set_result(self._tensors)
        return future


class PendingWork(FinishedWork):
    """torch's handle of an operation that may still run; keeps its tensors."""

    def __init__(
        self,
        operation: QueuedCall,
        tensors: list[torch.Tensor],
        received: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(tensors)
        self._operation = operation
        self._future: Any = None
        self._received = received

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """Return True when the operation is done.

        Raises:
            CollectiveTimeoutError: It is not done after ``timeout``, where one is given; it goes
                on.
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

    def source_rank(self) -> int:
        """Return the rank that sent, once a receive is done; -1 for other operations."""
        return -1 if self._received is None else self._received()

    _source_rank = source_rank

    def get_future(self) -> Any:
        """Return the future of the tensors; its error is a RuntimeError in our words."""
        if self._future is None:
            operation, tensors = self._operation, self._tensors
            _followed.add(operation)
            done: Any = torch.futures.Future()
            half = bool(tensors) and tensors[0].dtype is torch.float16

            def value(_: object) -> list[torch.Tensor]:
                operation.wait()
                return tensors

            # An exception that Python sets is a value like any other to C++, which DDP's reducer
            # would take for the tensors. One that a callback raises is an error there too.
            ended = done.then(value)
            self._future = _script().list_after(ended, tensors) if half else ended
            operation.then(lambda: done.set_result(None))
        return self._future


@functools.cache
def _script() -> Any:
    """Return the script whose futures have a list of tensors for a value.

    Python's have a Python object. C++ takes the latter for the former, but not in the built-in hook
    of DDP that compresses to float16, which checks the type. Other futures are spared the 20 us
    that a script takes.
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


def _is_followed() -> bool:
    """Return whether a future will tell of an operation that is not done."""
    return any(not operation.done() for operation in list(_followed))


callers.append(_is_followed)


def _nothing() -> None:
    pass
