"""Work, the handle of an asynchronous collective, and the errors of calls and waits in vain."""

from __future__ import annotations

import collections
import math
import numbers
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from colltensor.errors import (
    CollectiveError,
    CollectiveTimeoutError,
    GroupError,
    MismatchError,
    OptionError,
    PeerLostError,
    TensorError,
)

if TYPE_CHECKING:
    from colltensor.backends.base import PendingOperation

Lane = tuple[int, int]


class _Always(threading.Event):
    """An event that is always set; no lock that an interrupted thread could leave taken."""

    def is_set(self) -> bool:
        return True

    def wait(self, timeout: float | None = None) -> bool:
        return True


FINISHED: Final = _Always()
"""Shared by what is done when it is first seen.

Making an event takes longer than queuing a call on a device.
"""
_LONGEST_S: Final = 1e9


def _seconds(timeout_s: Any) -> float:
    """Return how long to wait, at most about as long as clocks can count.

    Raises:
        OptionError: It is no number of seconds.
    """
    if isinstance(timeout_s, numbers.Real) and not isinstance(timeout_s, bool):
        seconds = float(min(timeout_s, _LONGEST_S))  # type: ignore[arg-type]  # numbers.Real has no types
        if not math.isnan(seconds):
            return seconds
    raise OptionError(f"wait: timeout_s: expected seconds or None, got {timeout_s!r}")


class Queue(Protocol):
    """What runs operations in their order.

    Attributes:
        awaited: The work that a thread waits for without a timeout of its own, or None.
    """

    awaited: Work | None

    def is_inside(self) -> bool:
        """Return whether this thread runs one of them, or is at work on the queue itself."""


class Issuer(Protocol):
    """What has a native queue make operations.

    Attributes:
        awaited: As a ``Queue``'s.
    """

    awaited: Work | None

    def is_before(self, work: IssuedWork) -> bool:
        """Return whether this thread is in a call that keeps the operation from ending."""

    def wait_for(self, work: IssuedWork, timeout_s: float | None) -> bool:
        """Wait until the operation has ended; False if it has not in time, or never will here."""

    def notify(self, work: IssuedWork, callback: Callable[[Work], None]) -> bool:
        """Have ``callback`` called when the operation has ended; False if it has."""


class Work:
    """An operation that was issued and runs in the background. Made by ``async_op=True``.

    It keeps the tensors of the call alive until it is done. The tensors must not be read or written
    before that.
    """

    lane: Lane | None = None
    """The source and destination of a transfer that may run beside transfers of other lanes."""

    def __init__(
        self, operation: str, run: Callable[[], Any], finished: threading.Event | None = None
    ) -> None:
        """Make the handle of ``run``; with ``FINISHED`` it runs before anybody waits."""
        self._operation = operation
        self._run: Callable[[], Any] | None = run
        self._finished = threading.Event() if finished is None else finished
        self._result: Any = None
        self._error: BaseException | None = None
        self._callbacks: collections.deque[Callable[[Work], None]] = collections.deque()
        self._queue: Queue | None = None

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the operation is done; its own timeout bounds the wait.

        Args:
            timeout_s: Give up waiting after so many seconds. The operation goes on.

        Raises:
            CollectiveTimeoutError: It is not done after ``timeout_s``.
            GroupError: This thread is inside another call of the group (in a signal's handler),
                which is before it.
            CollectiveError: The operation failed; the same error on every call.
        """
        if self._queue is not None and not self._finished.is_set() and self._queue.is_inside():
            raise _waits_inside(self._operation)
        if not self._wait(timeout_s):
            raise _late(self._operation, timeout_s)
        if self._error is not None:
            raise self._error

    def _wait(self, timeout_s: float | None) -> bool:
        queue = self._queue
        if timeout_s is not None or queue is None or self._finished.is_set():
            return self._finished.wait(None if timeout_s is None else _seconds(timeout_s))
        outer, queue.awaited = queue.awaited, self
        try:
            return self._finished.wait()
        finally:
            queue.awaited = outer

    def done(self) -> bool:
        """Return True once the operation succeeded or failed; never waits."""
        return self._finished.is_set()

    def result(self, timeout_s: float | None = None) -> Any:
        """Wait as ``wait`` does; return what the call returns without ``async_op``."""
        self.wait(timeout_s)
        return self._result

    def exception(self, timeout_s: float | None = None) -> BaseException | None:
        """Wait as ``wait`` does, and return the error of the operation, or None if it succeeded.

        Raises:
            CollectiveTimeoutError: It is not done after ``timeout_s``; it goes on.
        """
        try:
            self.wait(timeout_s)
        except BaseException as error:
            if error is self._error:
                return error
            raise
        return None

    def add_done_callback(self, callback: Callable[[Work], None]) -> None:
        """Have ``callback`` called with this Work once the operation is done (on a GPU: queued).

        It is called in the thread that ends the operation, or here if that was before. It must not
        raise or wait. As in ``concurrent.futures``, ``exception()`` and ``result()`` say how it
        ended.
        """
        self._callbacks.append(_Pending(callback))
        if self._finished.is_set():
            self._call_back()

    def _finish(self) -> None:
        run = self._run
        if run is None:  # it was ended before its turn came
            return
        try:
            self._result = run()
        except BaseException as error:  # noqa: BLE001 - kept for whoever waits, whatever it is
            self._error = error
        self._run = None
        self._end()

    def _cancel(self, error: CollectiveError) -> None:
        self._error = error
        self._run = None
        self._end()

    def _end(self) -> None:
        if self._finished is not FINISHED:
            self._finished.set()
        if self._callbacks:
            self._call_back()

    def _call_back(self) -> None:
        while True:
            try:
                callback = self._callbacks.popleft()
            except IndexError:  # called, here or by the thread that came at the same time
                return
            call_back(callback, self)


class _Pending:
    """A done callback that is to be called, or has not returned yet."""

    __slots__ = ("__weakref__", "_callback")

    def __init__(self, callback: Callable[[Work], None]) -> None:
        self._callback = callback
        _pending.add(self)

    def __call__(self, work: Work) -> None:
        try:
            self._callback(work)
        finally:
            _pending.discard(self)


_pending: Final[weakref.WeakSet[_Pending]] = weakref.WeakSet()
callers: Final[list[Callable[[], bool]]] = [lambda: bool(_pending)]
"""What returns whether something pending will call the user's code, which may make calls."""


def call_back(callback: Callable[[Work], None], work: Work) -> None:
    """Call a done callback."""
    try:
        callback(work)
    except BaseException as error:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and not isinstance(error, Exception):
            raise  # it may be Ctrl-C, and no operation runs in this thread
        told = (type(error), error, error.__traceback__, threading.current_thread())
        threading.excepthook(threading.ExceptHookArgs(told))


class QueuedWork(Work):
    """An operation that is queued on a device.

    Waiting lets the device wait, as torch's does, not the host. After ``wait`` what this thread
    queues on the frameworks' current streams comes after the operation. The host waits only where a
    framework cannot be notified (JAX).
    """

    def __init__(
        self,
        operation: str,
        launch: Callable[[], PendingOperation],
        streams: Callable[[], set[int | None]],
        result: Callable[[], Any],
    ) -> None:
        super().__init__(operation, self._launch, FINISHED)
        self._begin = launch
        self._streams = streams
        self._get = result
        self._pending: PendingOperation | None = None

    def queue_here(self) -> None:
        """Queue it in this thread.

        Raises:
            TensorError: Nothing was queued.
            BaseException: What is no error of the call: an interrupt. Other errors are for ``wait``
                to raise.
        """
        self._finish()
        error = self._error
        if error is not None and (
            isinstance(error, TensorError) or not isinstance(error, Exception)
        ):
            raise error

    def postpone(self) -> None:
        """Let others wait until another thread has queued it."""
        self._finished = threading.Event()

    def _launch(self) -> None:
        self._pending = self._begin()

    def wait(self, timeout_s: float | None = None) -> None:
        """Let this thread's streams, or else the host, wait for it; see ``Work.wait``."""
        began = time.monotonic()
        super().wait(timeout_s)
        assert self._pending is not None
        left_s = None
        if timeout_s is not None:
            left_s = max(0.0, began + _seconds(timeout_s) - time.monotonic())
        try:
            self._pending.order(self._streams(), left_s)
        except CollectiveError as error:
            self._error = error
            raise
        except TimeoutError:
            raise _late(self._operation, timeout_s) from None

    def done(self) -> bool:
        """Return True once the device is done with the operation, or it failed; never waits."""
        if not super().done():
            return False
        return self._error is not None or (self._pending is not None and self._pending.done())

    def result(self, timeout_s: float | None = None) -> Any:
        """Wait as ``wait`` does; return what the call returns without ``async_op``."""
        self.wait(timeout_s)
        return self._get()


class EndedWork(Work):
    """An operation that had ended when its call returned, as a short one may."""

    _error: BaseException | None = None

    def __init__(self, result: Any) -> None:
        self._result = result

    def wait(self, timeout_s: float | None = None) -> None:
        """Return; see ``Work.wait``."""
        if self._error is not None:
            raise self._error

    def done(self) -> bool:
        """Return True."""
        return True

    def add_done_callback(self, callback: Callable[[Work], None]) -> None:
        """Call ``callback``."""
        call_back(callback, self)


def failed_work(error: BaseException) -> EndedWork:
    """Return the Work of an operation that has failed."""
    work = EndedWork(None)
    work._error = error
    return work


class IssuedWork(Work):
    """An operation that a native queue makes.

    What its end means for Python is done by whoever sees it first. Nobody takes the interpreter
    lock for that alone.
    """

    number = 0
    _error: BaseException | None = None
    _over = False
    _done: Sequence[Callable[[Work], None]] = ()

    def __init__(
        self,
        operation: str,
        queue: Issuer,
        held: Any,
        result: Any,
        finish: Callable[[Any, int], bool],
        written: Sequence[Any],
        notify: Callable[[Sequence[Any]], None],
    ) -> None:
        """Make the handle of an operation that ``queue`` is about to issue.

        Args:
            operation: Its name.
            queue: Where it is issued.
            held: The tensors that it uses, and their exports.
            result: What the call returns.
            finish: Called, in the worker, with the tensors and the code of one that did not
                succeed. Raises, or returns whether it succeeded after all.
            written: What ``notify`` is called with when it has succeeded, if there is any.
            notify: See there.
        """
        self._operation = operation
        self._issuer = queue
        self._held = held
        self._result = result
        self._complete = finish
        self._written = written
        self._notify = notify

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the operation is done; see ``Work.wait``."""
        queue = self._issuer
        if not self._over and queue.is_before(self):
            raise _waits_inside(self._operation)
        if not self._over and not self._wait(timeout_s):
            if timeout_s is None:
                raise _parents(self._operation)
            raise _late(self._operation, timeout_s)
        if self._error is not None:
            raise self._error

    def _wait(self, timeout_s: float | None) -> bool:
        queue = self._issuer
        if timeout_s is not None:
            return queue.wait_for(self, _seconds(timeout_s))
        outer, queue.awaited = queue.awaited, self
        try:
            return queue.wait_for(self, None)
        finally:
            queue.awaited = outer

    def done(self) -> bool:
        """Return True once the operation succeeded or failed; never waits."""
        return self._over or self._issuer.wait_for(self, 0.0)

    def add_done_callback(self, callback: Callable[[Work], None]) -> None:
        """Have ``callback`` called once the operation is done; see ``Work.add_done_callback``."""
        if self._over or not self._issuer.notify(self, _Pending(callback)):
            if not self.done():
                raise _parents(self._operation)
            call_back(callback, self)

    def fail(self, code: int) -> None:
        """Deal with an operation that did not succeed, before it counts as ended."""
        try:
            if not self._complete(self._held[0], code):
                self._error = CollectiveTimeoutError(
                    f"{self._operation}: timed out: the call before it did not end"
                )
        except BaseException as error:  # noqa: BLE001 - kept for whoever waits, whatever it is
            self._error = error

    def end(self) -> None:
        """Let go of what it held; once, when it has ended."""
        if self._written and self._error is None:
            self._notify(self._written)
        self._held, self._written = None, ()
        self._over = True


def _late(operation: str, timeout_s: float | None) -> CollectiveTimeoutError:
    return CollectiveTimeoutError(
        f"{operation}: wait() timed out after {timeout_s:g} s; the operation goes on, wait again"
    )


def _parents(operation: str) -> GroupError:
    return GroupError(f"{operation}: it was issued by the parent process of this one")


def _waits_inside(operation: str) -> GroupError:
    """Return the error of who waits for an operation inside a call of the same thread and group."""
    return GroupError(
        f"{operation}: it cannot be waited for here, inside a call of the same thread and group that is before it "
        "(from a signal's handler, a done callback or __del__); wait when that call has returned"
    )


def nested(operation: str, group_name: str) -> GroupError:
    """Return the error of a call from inside a call of the same thread and group."""
    return GroupError(
        f"{operation}: group '{group_name}': this thread is inside another call of the group, which waits (this one "
        "came from a signal's handler, a done callback or __del__); that one goes on, call again when it has returned"
    )


def consequence(
    operation: str, group_name: str, rank: int, broken: CollectiveError | None
) -> PeerLostError | CollectiveTimeoutError | MismatchError | None:
    """Return what a call fails with that was issued before ranks were lost.

    It has the same class, with the same ranks. None where the group broke over something else.
    """
    if not isinstance(broken, (PeerLostError, CollectiveTimeoutError, MismatchError)):
        return None
    where = f"{operation}: group '{group_name}' (rank {rank})"
    error = type(broken)(f"{where}: a call before it failed: {broken}", broken.ranks)
    error.__cause__ = broken
    return error
