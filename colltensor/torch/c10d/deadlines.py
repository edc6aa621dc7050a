"""Deadlines: ends the operations that last too long, in a thread of its own."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import NamedTuple

from colltensor.torch.c10d.work import QueuedCall

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
