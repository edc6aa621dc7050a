"""Line: the operations of one process group, one at a time, in the order in which they were issued.

``colltensor.work.OperationQueue`` does the same with one thread; here a callback may wait for a later operation, as
torch's PowerSGD hook does, so another thread goes on meanwhile.

Imports nothing but the operations and errors.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from typing import Final

from colltensor.errors import CollectiveError
from colltensor.torch.c10d.work import Operation

_CLOSE_TIMEOUT_S: Final = 5.0


class Line:
    """Runs operations in their order: in the caller's thread between ``enter`` and ``leave``, else in one of its own.

    The turn is a lock that is only ever tried: nobody blocks on it while an operation runs.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._turn = threading.Lock()
        self._owner = 0  # the thread that has the turn
        # A signal's handler may come back here at any moment, in the thread that has the lock.
        self._changed = threading.Condition(threading.RLock())
        self._putting = 0  # the thread that has the lock
        self._waiting: collections.deque[Operation] = collections.deque()
        self._closed: CollectiveError | None = None
        self._watched = False  # somebody waits for the turn to be free
        self._idle = 0  # threads that wait for an operation
        self._running = False  # a thread runs one, and takes the next unless it has somebody to tell

    def enter(self) -> bool:
        """Take the turn if nobody has it or waits for it; then ``leave`` must follow."""
        if self._waiting or not self._turn.acquire(False):
            return False
        self._owner = threading.get_ident()
        return True

    def is_inside(self) -> bool:
        """Return whether this thread runs an operation, so that what it begins meanwhile cannot be waited for."""
        return threading.get_ident() in (self._owner, self._putting)

    def leave(self) -> None:
        """Give the turn back."""
        self._owner = 0
        self._turn.release()
        if self._waiting or self._watched:
            with self._changed:
                self._changed.notify_all()

    def put(self, operation: Operation) -> None:
        """Run ``operation`` in a thread of the line when its turn comes; it fails at once where the line is closed.

        Raises:
            RuntimeError: No thread can be started; nothing is left behind.
        """
        operation._queue = self
        with self._changed:
            if self._closed is None:
                outer, self._putting = self._putting, threading.get_ident()
                self._waiting.append(operation)
                try:
                    self._man()
                except BaseException:
                    self._waiting.remove(operation)
                    raise
                finally:
                    self._putting = outer
                return
        operation.end(self._closed)
        operation.tell()

    def drain(self, deadline: float) -> None:
        """Wait until everything that was put has run, or until ``deadline``, a value of ``time.monotonic()``.

        Not for an operation that runs in a thread of the caller's own.
        """
        with self._changed:
            self._watched = True
            self._changed.wait_for(
                lambda: (not self._waiting and not self._turn.locked()) or self._is_callers(),
                max(0.0, deadline - time.monotonic()),
            )

    def close(self, error: CollectiveError) -> None:
        """Fail what waits, and wait a while for the operation that runs."""
        with self._changed:
            self._closed, self._watched = error, True
            cancelled = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
            if not self.is_inside():  # else in a signal's handler: the operation ends when that returns
                self._changed.wait_for(lambda: not self._turn.locked(), _CLOSE_TIMEOUT_S)
        for operation in cancelled:
            operation.end(error)
            operation.tell()

    def _is_callers(self) -> bool:
        """Return whether the operation that runs does so between ``enter`` and ``leave``."""
        return self._turn.locked() and not self._running

    def _man(self) -> None:
        """See that somebody takes the next operation; the lock is held."""
        if self._running:
            return
        if self._idle:
            self._changed.notify()
        else:
            self._idle += 1
            try:
                threading.Thread(target=self._serve, name=f"colltensor {self._name}", daemon=True).start()
            except BaseException:
                self._idle -= 1
                raise

    def _serve(self) -> None:
        with self._changed:
            self._idle -= 1
        while True:
            with self._changed:
                if self._idle and not self._waiting:  # one that waits is enough
                    return
                self._idle += 1
                self._changed.wait_for(self._may_go_on)
                self._idle -= 1
                if not self._waiting:  # closed, with the turn never taken
                    return
                self._owner = threading.get_ident()
                operation = self._waiting.popleft()
                self._running = True
            operation.execute()
            self._owner = 0
            self._turn.release()
            with self._changed:
                self._running = False
                if self._watched:
                    self._changed.notify_all()
                if self._waiting and operation.awaited:
                    with contextlib.suppress(RuntimeError):  # no new thread: this one goes on when it has told
                        self._man()
            operation.tell()

    def _may_go_on(self) -> bool:
        return (self._closed is not None and not self._waiting) or bool(
            self._waiting and self._turn.acquire(False)
        )
