"""The native queue of a group's asynchronous calls, whose twin is native/src/queue.h."""

from __future__ import annotations

import math
from typing import Any, Final

_ISSUED, _ENDED, _SERVE, _KICK, _NOTIFY, _CLOSE, _CANCEL = range(7)
_NEVER_NS: Final = (1 << 63) - 1


class IssueQueue:
    """The queue of one group: see ``colltensor.backends.base.IssueQueue``."""

    def __init__(self, native: Any, handle: int) -> None:
        def function(asked: int, brief: bool = True) -> Any:
            made = native.shm_queue_function(handle, asked)
            if brief:
                made.release_gil = False
            return made

        self._issued = function(_ISSUED)
        self._ended = function(_ENDED)
        self._serve = function(_SERVE, brief=False)
        self._kick = function(_KICK)
        self._notify = function(_NOTIFY)
        self._close = function(_CLOSE)
        self._cancel = function(_CANCEL)
        self._wait = native.shm_queue_wait_function(handle)

    def issued(self) -> int:
        """Return how many calls were issued."""
        return int(self._issued(0))

    def ended(self) -> int:
        """Return how many of them have ended."""
        count: int = self._ended(0)
        return count

    def serve(self, patient: bool) -> int:
        """Make calls until there is something to do here."""
        return max(0, int(self._serve(patient)))

    def kick(self) -> None:
        """Have ``serve`` return when nothing is left."""
        self._kick(0)

    def wait(self, number: int, timeout_s: float | None) -> bool:
        """Wait until a call has ended; False if it has not in time."""
        endless = timeout_s is None or math.isinf(timeout_s) or timeout_s > _NEVER_NS / 1e9
        return bool(
            self._wait(
                number,
                _NEVER_NS if timeout_s is None or endless else int(max(0.0, timeout_s) * 1e9),
            )
        )

    def notify(self, number: int) -> bool:
        """Have ``serve`` return when a call has ended; False if it has."""
        return bool(self._notify(number))

    def close(self) -> int:
        """Drop what is not begun, and return the number of its first call."""
        return int(self._close(0))

    def cancel(self) -> None:
        """Let what was dropped have ended."""
        self._cancel(0)
