"""OperationQueue: the operations of a group in their order.

They run in the caller's thread and in workers.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from colltensor.errors import CollectiveError, GroupError
from colltensor.native_queue import NativeQueue
from colltensor.turn import Turn
from colltensor.work import Lane, Work, nested

if TYPE_CHECKING:
    from colltensor.backends.base import IssueQueue

_log: Final = logging.getLogger(__name__)
_SPARE_WORKERS: Final = 2
"""Threads that may wait for work: a rank that sends and receives has two."""
_LOOK_S: Final = 0.1
_WORKERS: Final = -1
"""Who has the turn while works run: not one thread, since those of several lanes share it."""


class OperationQueue(NativeQueue):
    """Runs the operations of one group one at a time, in the order in which they were issued.

    Only transfers that cross run at the same time. A synchronous call runs in its own thread when
    nothing is before it (``enter``). Everything else runs in worker threads, made on first use.
    Works with a lane that follow one another share the turn. Those of one lane run in their order,
    of different lanes at the same time, each in a thread.

    Attributes:
        turn: Who may run an operation.
        is_in_fast_call: Whether this thread is in a call that took no turn here; or None.
    """

    def __init__(self, name: str, native: IssueQueue | None = None, rank: int = 0) -> None:
        self._rank = rank
        self._warned = False
        self._why = ""  # it is closed
        self.is_in_fast_call: Callable[[], bool] | None = None
        super().__init__(name, native)

    def _renew(self) -> None:
        super()._renew()
        self.turn = Turn()
        self._waiting: collections.deque[Work] = collections.deque()
        self._lanes: set[Lane] = set()  # in which a work runs
        # works that wait or run, by lane
        self._due: collections.Counter[Lane] = collections.Counter()
        self._workers = self._spare = 0

    def disown(self) -> None:
        """Forget the parent's operations in a forked child.

        There no thread of the parent's gives back what it held.
        """
        self._renew()

    def enter(self) -> bool:
        """Take the turn if nobody has it or waits for it.

        Then ``turn.release`` and ``pass_on`` must follow.
        """
        return not self._waiting and (self.idle or self.busy or self.rests()) and self.turn.take()

    def pass_on(self) -> None:
        """Let who waits for the turn know that it was given back."""
        if self._waiting or self._closed:
            with self._lock:
                self._changed.notify_all()

    def is_busy(self) -> bool:
        """Return whether an operation runs or waits."""
        return bool(self._waiting or self.turn.owner()) or not self._is_native_done()

    def blocking(self) -> tuple[list[Lane], list[Lane | None]] | None:
        """Return what keeps the caller of this rank from going on.

        Returns None if nothing of the queue does. May be called in any thread.

        Returns:
            First the lanes of the transfers that run in workers and that the caller waits for.
            There are none if it waits for a call that is made alone. Then the lanes of all works
            that are issued and not begun, None for those without.
        """
        work, owner = self.awaited, self.turn.owner()
        if (work is None or work.done()) and owner in (0, _WORKERS):
            return None

        with self._lock:
            lanes, waiting = set(self._lanes), list(self._waiting)

        concerned = list(lanes)
        if work is not None and work.lane in lanes:
            concerned = [work.lane]
        return concerned, [other.lane for other in waiting if other is not work]

    def is_inside(self) -> bool:
        """Return whether this thread is in a call.

        If so, what it begins meanwhile cannot be waited for.
        """
        if super().is_inside() or threading.get_ident() == self.turn.owner():
            return True
        return self.is_in_fast_call is not None and self.is_in_fast_call()

    def run(self, work: Work) -> Any:
        """Run ``work`` in a worker thread when its turn comes, and return its result.

        Raises:
            GroupError: This thread is inside a call, which goes on only when it returns there.
        """
        if self.is_inside():
            raise nested(work._operation, self._name)
        return self.put(work).result()

    def warn_of_threads(self, others: str) -> None:
        """Log, once, that two threads call at the same time.

        The ranks may take such calls in different orders.
        """
        if not self._warned:
            self._warned = True
            _log.warning(
                "group %r (rank %d): thread %r calls while %s does: ranks match calls by their order, which is chance "
                "then, and calls of equal shapes can meet those of the other thread on another rank, in silence; let "
                "one call at a time, in one order on all ranks, or give each a group of its own (group.split)",
                self._name,
                self._rank,
                threading.current_thread().name,
                others,
            )

    def put(self, work: Work) -> Work:
        """Run ``work`` in a worker thread when its turn comes.

        Raises:
            GroupError: The queue is closed.
            RuntimeError: No thread can be started; nothing is left behind.
        """
        work._queue = self
        owner = self.turn.owner()
        if owner not in (0, _WORKERS, threading.get_ident()):
            self.warn_of_threads(_name_of(owner))

        with self._lock:
            if self._closed:
                raise GroupError(f"{work._operation}: {self._why}")
            was_idle = self.idle

            try:
                self._waiting.append(work)
                if work.lane is not None:
                    self._due[work.lane] += 1
                self._man()

                self.busy = True
                self.idle = False
                if self.watch is not None:
                    self.watch(True)
                if self._native is not None and not self._is_native_done():
                    self._native.kick()  # its thread tells the workers when it has nothing left

                self._changed.notify_all()
            except BaseException:
                if work in self._waiting:
                    self._waiting.remove(work)
                    self._forget(work)
                self.busy = bool(self._waiting or self._lanes or self.turn.owner() == _WORKERS)
                self.idle = was_idle and not self.busy
                raise
        return work

    def _man(self) -> None:
        """See that there is a thread for every lane that has something to do, or one.

        The lock is held. The thread is started before the lane's turn comes, while the caller can
        still be told that none can be had.
        """
        if self._workers < max(1, len(self._due)):
            threading.Thread(
                target=self._serve, name=f"colltensor {self._name}", daemon=True
            ).start()
            self._workers += 1

    def close(self, error: CollectiveError, timeout_s: float) -> bool:
        """Fail what waits, end the workers, and wait for the operations that run.

        Returns False if one did not end.
        """
        native, deadline = self._native, time.monotonic() + timeout_s

        with self._lock:
            self._closed, self._why = True, str(error)
            self.idle = False  # nothing goes past the queue any more
            cancelled = list(self._waiting)
            self._waiting.clear()
            for work in cancelled:
                self._forget(work)

            if native is not None:
                first = native.close()
                for issued in self._issued:
                    if issued.number >= first:
                        issued._error = error
                native.cancel()

            self._changed.notify_all()
            idle = self._changed.wait_for(lambda: not self.turn.owner(), timeout_s)

        if native is not None:
            idle = native.wait(native.issued(), max(0.0, deadline - time.monotonic())) and idle
            self._look()
            if threading.get_ident() not in self._serving:
                with self._lock:
                    self._changed.wait_for(
                        lambda: not self._notified, max(0.0, deadline - time.monotonic())
                    )
            self._await_server(deadline - time.monotonic())

        for work in cancelled:
            work._cancel(error)
        return idle

    def _next(self) -> int | None:
        """Return the place of the work that can be run beside the transfers that run.

        The lock is held.
        """
        if not self._is_native_done():
            return None
        for place, work in enumerate(self._waiting):
            if work.lane is None:
                return place if not place and not self._lanes else None
            if work.lane not in self._lanes:
                return place
        return None

    def _take(self) -> Work | None:
        """Take the next work that can be run, and the turn for it; the lock is held."""
        place = self._next()
        if place is None or not (self._lanes or self.turn.take(_WORKERS)):
            return None
        self._look()  # what is before it has ended
        work = self._waiting[place]
        del self._waiting[place]
        if work.lane is not None:
            self._lanes.add(work.lane)
        return work

    def _serve(self) -> None:
        here = threading.get_ident()
        self._serving.add(here)
        try:
            self._run_works()
        finally:
            self._serving.discard(here)

    def _run_works(self) -> None:
        work: Work | None = None

        def taken() -> bool:
            nonlocal work
            work = self._take()
            return work is not None or self._closed

        while True:
            with self._lock:
                if (
                    self._spare >= _SPARE_WORKERS
                    and self._workers > len(self._due)
                    and self._next() is None
                ):
                    self._workers -= 1
                    return

                self._spare += 1
                while not taken():
                    # A signal's handler may have raised in who gave the turn back, before it told.
                    self._changed.wait(_LOOK_S if self._waiting else None)
                self._spare -= 1
                if work is None:  # closed
                    return

            # The lock is not held here: others must be able to issue calls meanwhile.
            work._finish()
            self._end(work)
            work = None

    def _forget(self, work: Work) -> None:
        """Count a work no more that waited or ran; the lock is held."""
        if work.lane is not None:
            self._due[work.lane] -= 1
            if self._due[work.lane] <= 0:
                del self._due[work.lane]

    def _end(self, work: Work) -> None:
        """Give back the turn that was taken for a work."""
        with self._lock:
            if work.lane is not None:
                self._lanes.discard(work.lane)
                self._forget(work)
            if not self._lanes:
                self.turn.release()
            self._changed.notify_all()
            self.busy = bool(self._waiting or self._lanes)
            self.idle = not self.busy and not self._closed
            if self.idle and self.watch is not None:
                self.watch(False)


def _name_of(thread: int) -> str:
    return next(
        (f"thread {found.name!r}" for found in threading.enumerate() if found.ident == thread),
        "another",
    )
