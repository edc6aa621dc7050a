"""What becomes of open control planes when their process ends in good order, or forks.

Imports nothing of the package and no framework.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import Protocol


class Mortal(Protocol):
    """What wants to be told."""

    def close(self) -> None:
        """Say goodbye: the process ends."""

    def disown(self) -> None:
        """Close one's copies of the parent's descriptors without a word: this is a forked child."""


_open: set[Mortal] = set()
_first: set[Mortal] = set()
"""Those of them that are told before the others."""
_ends: list[Callable[[], None]] = []
_over: set[int] = set()
"""The process, by number, once all were told that it ends."""
_finalized: set[int] = set()


def before_end(call: Callable[[], None]) -> None:
    """Have ``call`` called when the process ends, before anybody is told; not in a forked child that makes nothing."""
    _ends.append(call)


def watch(mortal: Mortal, first: bool = False) -> None:
    """Tell ``mortal`` when the process ends, before all that are not ``first``, or forks; kept until ``forget``."""
    _open.add(mortal)
    if first:
        _first.add(mortal)
    util = sys.modules.get("multiprocessing.util")
    if util is not None and os.getpid() not in _finalized:
        # A process that multiprocessing forked ends without running atexit, but runs its finalizers.
        _finalized.add(os.getpid())
        util.Finalize(None, _close_all, exitpriority=0)


def forget(mortal: Mortal) -> None:
    """Tell ``mortal`` nothing any more."""
    _open.discard(mortal)
    _first.discard(mortal)


def is_over() -> bool:
    """Return whether the process ends, and all were told: what is made now would be told nothing any more."""
    return os.getpid() in _over


def _close_all() -> None:
    _over.add(os.getpid())
    for call in _ends:
        call()
    for mortal in [*_first, *(_open - _first)]:
        mortal.close()


def _disown_all() -> None:
    for mortal in list(_open):
        mortal.disown()
    _open.clear()
    _first.clear()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)
