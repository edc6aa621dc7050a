"""What becomes of open control planes when their process ends in good order, or forks."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import Protocol


class ExitHook(Protocol):
    """What is notified when the process ends or forks."""

    def close(self) -> None:
        """Say goodbye: the process ends."""

    def disown(self) -> None:
        """Close one's copies of the parent's descriptors without a word: this is a forked child."""


_open: set[ExitHook] = set()
_first: set[ExitHook] = set()
"""The hooks that are called first."""
_ends: list[Callable[[], None]] = []
_over: set[int] = set()
"""The process, by number, once all were notified that it ends."""
_finalized: set[int] = set()


def before_end(call: Callable[[], None]) -> None:
    """Have ``call`` called when the process ends, before any hook.

    It is not called in a forked child that makes nothing.
    """
    _ends.append(call)


def register(hook: ExitHook, first: bool = False) -> None:
    """Notify ``hook`` when the process ends or forks.

    At the end it comes before all that are not ``first``. It is kept until ``unregister``.
    """
    _open.add(hook)
    if first:
        _first.add(hook)
    util = sys.modules.get("multiprocessing.util")
    if util is not None and os.getpid() not in _finalized:
        # multiprocessing ends a process that it forked without atexit, but runs its finalizers.
        _finalized.add(os.getpid())
        util.Finalize(None, _close_all, exitpriority=0)


def unregister(hook: ExitHook) -> None:
    """Notify ``hook`` no more."""
    _open.discard(hook)
    _first.discard(hook)


def is_over() -> bool:
    """Return whether the process is ending and all hooks were notified.

    What is made from now on would not be notified.
    """
    return os.getpid() in _over


def _close_all() -> None:
    _over.add(os.getpid())
    for call in _ends:
        call()
    for hook in [*_first, *(_open - _first)]:
        hook.close()


def _disown_all() -> None:
    for hook in list(_open):
        hook.disown()
    _open.clear()
    _first.clear()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)
