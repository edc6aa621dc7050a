"""NativeQueue: what Python does about the operations of a group's native queue."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from colltensor.turn import lock_of_handlers
from colltensor.work import IssuedWork, Work, call_back

if TYPE_CHECKING:
    from colltensor.backends.base import IssueQueue

_UNSEEN: Final = 15
"""How many operations of a native queue may have ended and still hold their tensors.

Beyond that, the next one that is issued lets go of them.
"""


class NativeQueue:
    """The operations that a group's native queue makes, in their order.

    The native queue has a thread of its own, which serves it without the interpreter lock and
    sleeps there. Nothing is put into it while an operation of Python's waits or runs in a worker.
    So it has only what comes before those.

    Attributes:
        idle: Whether nothing waits or runs here, so that a call needs not queue. After operations
            of the native queue it stays False until ``rests`` is asked.
        busy: Whether an operation of Python's waits for a worker or runs in one.
        is_native: Whether there is a native queue.
        awaited: The work that a thread waits for without a timeout of its own, or None.
        watch: Told True when work is put, and False when the workers have nothing to do any more;
            or None.
    """

    def __init__(self, name: str, native: IssueQueue | None) -> None:
        self._name = name
        self._native = native
        self.is_native = native is not None
        self._closed = False
        self.watch: Callable[[bool], None] | None = None
        self._renew()

    def _renew(self) -> None:
        self._lock, self._is_locked_here = lock_of_handlers()
        self._changed = threading.Condition(self._lock)
        self._serving: set[int] = set()  # the threads that run operations
        self._issued: collections.deque[IssuedWork] = collections.deque()
        # whose callbacks are not called yet
        self._notified: collections.deque[IssuedWork] = collections.deque()
        self._number = 0  # of the last one
        self._has_server = False
        self._server: threading.Thread | None = None
        self.busy = False
        self.idle = True
        self.awaited: Work | None = None

    def is_inside(self) -> bool:
        """Return whether this thread is in a call.

        If so, what it begins meanwhile cannot be waited for.
        """
        return threading.get_ident() in self._serving or self._is_locked_here()

    def man_native(self) -> None:
        """See that the native queue has its thread.

        Called before anything of a call is begun that may go there.

        Raises:
            RuntimeError: No thread can be started; nothing is left behind.
        """
        if self._has_server:
            return

        with self._lock:
            native = self._native
            # not a fork's
            if (
                not (self._has_server or self._closed)
                and native is not None
                and native.wait(0, 0.0)
            ):
                server = threading.Thread(
                    target=self._serve_native, name=f"colltensor {self._name}", daemon=True
                )
                server.start()
                self._server = server
                self._has_server = True

    def issue(
        self,
        work: IssuedWork,
        push: Callable[..., int],
        arguments: Sequence[Any],
        first: bool = False,
    ) -> bool:
        """Have the native queue make what ``push`` puts into it, which returns its number.

        ``man_native`` was called before.

        Args:
            work: The operation's handle.
            push: See above.
            arguments: What ``push`` is given.
            first: The operation has begun already: nothing else can end before it.

        Returns:
            False if it put nothing.
        """
        issued = self._issued
        if len(issued) >= _UNSEEN:
            assert self._native is not None
            if self._native.ended() >= issued[0].number + _UNSEEN - 1:
                self._look()

        inside = self._is_locked_here()  # in a signal's handler
        with self._lock:
            if self._closed or self.busy or inside or (first and not self._is_native_done()):
                return False

            native = self._native
            assert native is not None
            number = self._number + 1

            # An interrupt may come at any point here: what the native queue has taken stays issued.
            try:
                work.number = number
                self._issued.append(work)
                self.idle = False
                if push(*arguments) <= 0:
                    self._issued.pop()
                    return False
            except BaseException:
                if native.issued() >= number:
                    self._count(number)
                elif self._issued and self._issued[-1] is work:
                    self._issued.pop()
                raise
            self._count(number)

        return True

    def _count(self, number: int) -> None:
        """Note the number of what was put into the native queue last."""
        self._number = number
        # a signal's handler has put something, and saw it as empty
        if self.busy and self._native is not None:
            self._native.kick()

    def rests(self) -> bool:
        """Return whether nothing waits or runs here, and note it in ``idle``."""
        if not self.idle and not self.busy and self._is_native_done():
            self._look()
        return self.idle

    def is_before(self, work: IssuedWork) -> bool:
        """Return whether this thread is in a call that keeps an operation from ending.

        The operation is one of the native queue.
        """
        assert self._native is not None
        return self._native.ended() < work.number and self.is_inside()

    def wait_for(self, work: IssuedWork, timeout_s: float | None) -> bool:
        """Wait until an operation of the native queue has ended.

        Returns False if it has not in time, or never will here.
        """
        assert self._native is not None
        if not self._native.wait(work.number, timeout_s):
            return False
        self._look()
        return True

    def notify(self, work: IssuedWork, callback: Callable[[Work], None]) -> bool:
        """Have ``callback`` called when an operation of the native queue has ended.

        Returns False if it has ended.
        """
        assert self._native is not None
        with self._lock:
            if work._over or not self._native.notify(work.number):
                return False
            work._done = [*work._done, callback]
        return True

    def _is_native_done(self) -> bool:
        return self._native is None or self._native.ended() == self._number

    def _look(self) -> None:
        """End, for Python, what the native queue has made."""
        native = self._native
        if native is None:
            return

        inside = self._is_locked_here()
        with self._lock:
            ended = native.ended()
            while self._issued and self._issued[0].number <= ended:
                work = self._issued.popleft()
                work.end()
                if work._done:
                    self._notified.append(work)

            if (
                self.idle
                or self.busy
                or self._closed
                or inside
                or self._notified
                or ended != self._number
            ):
                return

            self.idle = True
            if self.watch is not None:
                self.watch(False)

    def _notify_all(self) -> None:
        """Call the done callbacks of what has ended.

        That is in the queue's thread, where a call in one of them is refused.
        """
        while self._notified:
            work = self._notified[0]
            try:
                for callback in work._done:
                    call_back(callback, work)
            finally:
                self._notified.popleft()

    def _serve_native(self) -> None:
        """Serve the native queue until it is closed."""
        native, here = self._native, threading.get_ident()
        assert native is not None
        self._serving.add(here)
        try:
            while not self._closed or native.ended() != native.issued():
                code = native.serve(True)
                if code:
                    with self._lock:
                        number = native.ended() + 1
                        failed = [work for work in self._issued if work.number == number]
                    for work in failed:
                        work.fail(code)
                    failed = work = None  # type: ignore[assignment]  # the operation's tensors and its error
                    continue

                self._end_served()
        finally:
            self._end_served()
            self._serving.discard(here)

    def _await_server(self, seconds: float) -> None:
        """Wait until the native queue's thread has left native code, once the queue is closed.

        The interpreter's end would end the thread there, in frames of C++, which the process does
        not survive.
        """
        server = self._server
        if (
            server is not None
            and server is not threading.current_thread()
            and not self._is_locked_here()
        ):
            server.join(max(0.0, seconds))

    def _end_served(self) -> None:
        self._look()
        if self._notified:
            self._notify_all()
            self._look()
        with self._lock:
            self._changed.notify_all()

    def notify_watch(self) -> None:
        """Tell ``watch`` once more whether the workers have something to do."""
        with self._lock:
            if self.watch is not None:
                self.watch(not self.rests())
