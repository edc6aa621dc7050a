"""How the kernel schedules Gloo's socket threads.

A Gloo device has a thread that serves its sockets. Another thread that posts a send or a receive
holds the connection's lock. The socket thread does not sleep meanwhile but tries again and again
(``Pair::handleEvents``).

Where there are no idle cores, the kernel lets the socket thread preempt the very thread that holds
the lock. The socket thread then spins for the rest of its time slice. A 1 KiB exchange takes 4 ms
instead of 0.15 (2 ranks on 2 cores).

Under ``SCHED_BATCH`` a thread preempts nobody when it wakes. It then shares a busy core less
eagerly too. That delays large transfers that run beside computation, so the policy is chosen by
size.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, TypeVar

CALM_NBYTES: Final = 512 << 10
"""Transfers up to this size run with calm socket threads."""

T = TypeVar("T")


class SocketThreads:
    """The socket threads of one Gloo device. Does nothing where the system does not let it."""

    def __init__(self, threads: list[int]) -> None:
        self._threads = threads
        self._calm = False

    @classmethod
    def started_by(cls, make: Callable[[], T]) -> tuple[T, SocketThreads]:
        """Call ``make``, which starts the threads, and return its result and them.

        Threads inherit the policy of the thread that starts them, which tells these from any that
        others start at the same time.
        """
        if not hasattr(os, "SCHED_BATCH") or os.sched_getscheduler(0) != os.SCHED_OTHER:
            return make(), cls([])

        try:
            before = _threads()
        except OSError:  # no /proc
            return make(), cls([])

        try:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        except PermissionError:
            return make(), cls([])
        try:
            made = make()
        finally:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))

        # New threads inherit the policy. Others that start meanwhile do not have it.
        own = cls([thread for thread in _threads() - before if _policy(thread) == os.SCHED_BATCH])
        own._set(os.SCHED_OTHER)
        return made, own

    def prepare(self, nbytes: int) -> None:
        """Choose the policy for a transfer of ``nbytes``; costs nothing while it stays."""
        calm = nbytes <= CALM_NBYTES
        if calm is not self._calm:
            self._calm = calm
            if self._threads:
                self._set(os.SCHED_BATCH if calm else os.SCHED_OTHER)

    def _set(self, policy: int) -> None:
        for thread in self._threads:
            try:
                os.sched_setscheduler(thread, policy, os.sched_param(0))
            except OSError:
                self._threads = []  # not permitted, or the threads have ended
                return


def _threads() -> set[int]:
    return {int(thread) for thread in os.listdir("/proc/self/task")}


def _policy(thread: int) -> int:
    try:
        return os.sched_getscheduler(thread)
    except OSError:
        return -1
