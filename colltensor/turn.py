"""Turn, and the lock of a queue: neither is left taken where a signal's handler raises.

It may raise at whatever moment. This holds from Python 3.11 on, where such a moment is between two
calls of Python's functions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Turn:
    """Who may run an operation: one thread, known from the instant in which it takes the turn.

    A signal's handler may raise at any moment. What would be left behind then is undone by the
    thread itself.

    Attributes:
        release: Gives the turn back. It is no function of Python's, at whose beginning a handler
            could raise.
    """

    __slots__ = ("_holder", "release")

    def __init__(self) -> None:
        self._holder: dict[None, int] = {}
        self.release: Callable[[], None] = self._holder.clear

    def take(self, owner: int = 0) -> bool:
        """Take the turn for this thread, or in another name, if nobody has it.

        Nobody blocks on it.
        """
        holder, owner = self._holder, owner or threading.get_ident()
        if holder:
            return False
        try:
            return holder.setdefault(None, owner) == owner
        except BaseException:
            if self.owner() == owner:
                holder.clear()
            raise

    def owner(self) -> int:
        """Return who has it; 0 if nobody."""
        return self._holder.get(None, 0)


def lock_of_handlers() -> tuple[threading.RLock, Callable[[], bool]]:
    """Return a lock for data that a signal's handler may use in the thread that has it.

    Returns also what tells if this thread has it. ``with`` takes the lock in one step. That of a
    Condition is a function of Python's. In it a handler could raise once the lock is taken, for
    ever.
    """
    lock = threading.RLock()
    return lock, lock._is_owned  # type: ignore[attr-defined]  # private; threading.Condition uses it
