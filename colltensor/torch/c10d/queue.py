"""ProcessGroupQueue: the operations of one process group, one at a time, in the order in which they were issued.

``colltensor.operation_queue`` does the same with one thread; here a callback may wait for a later operation, as torch's
PowerSGD hook does, so another thread goes on meanwhile.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from typing import Final

from colltensor.errors import CollectiveError
from colltensor.torch.c10d.work import QueuedCall
from colltensor.turn import Turn, lock_of_handlers
from colltensor.work import Work

_CLOSE_TIMEOUT_S: Final = 5.0
_LOOK_S: Final = 0.1


class ProcessGroupQueue:
    """Runs operations in their order: in the caller's thread after ``enter``, else in one of its own."""

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
        """Take the turn if nobody has it or waits for it; then ``turn.release`` and ``pass_on`` must follow."""
        return not self._waiting and self.turn.take()

    def is_inside(self) -> bool:
        """Return whether this thread runs an operation, so that what it begins meanwhile cannot be waited for."""
        return self.turn.owner() == threading.get_ident() or self._is_locked_here()

    def pass_on(self) -> None:
        """Let who waits for the turn know that it was given back."""
        if self._waiting or self._watched:
            with self._lock:
                self._changed.notify_all()

    def put(self, operation: QueuedCall) -> None:
        """Run ``operation`` in a thread of the queue when its turn comes; it fails at once where the queue is closed.

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

    def drain(self, deadline: float) -> None:
        """Wait until everything that was put has run, or until ``deadline``, a value of ``time.monotonic()``.

        Not for an operation that runs in a thread of the caller's own.
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
