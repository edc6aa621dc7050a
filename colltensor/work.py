"""Work, the handle of an asynchronous collective, and the queue that keeps a group's operations in order.

Imports no framework.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from colltensor.errors import CollectiveError, CollectiveTimeoutError, GroupError, PeerLostError, TensorError

if TYPE_CHECKING:
    from colltensor.backends.base import Flight


Lane = tuple[int, int]
_SPARE_WORKERS: Final = 2
"""Threads that may wait for work: a rank that sends and receives has two."""


class _Always(threading.Event):
    """An event that is always set. Waiting takes no lock, which an interrupted thread would leave to all others."""

    def is_set(self) -> bool:
        return True

    def wait(self, timeout: float | None = None) -> bool:
        return True


FINISHED: Final = _Always()
"""Shared by what is done when it is first seen: making an event takes longer than queuing a call on a device."""


class Queue(Protocol):
    """What runs operations in their order."""

    def is_inside(self) -> bool:
        """Return whether this thread runs one of them, or is at work on the queue itself."""


class Work:
    """An operation that was issued and runs in the background. Made by ``async_op=True``.

    It keeps the tensors of the call alive until it is done. The tensors must not be read or written
    before that.
    """

    lane: Lane | None = None
    """The source and destination of a transfer that may run beside transfers of other lanes."""

    def __init__(self, operation: str, run: Callable[[], Any], finished: threading.Event | None = None) -> None:
        """Make the handle of what ``run`` does; with ``finished=FINISHED`` it is run before anybody waits for it."""
        self._operation = operation
        self._run: Callable[[], Any] | None = run
        self._finished = threading.Event() if finished is None else finished
        self._result: Any = None
        self._error: BaseException | None = None
        self._callbacks: collections.deque[Callable[[BaseException | None], None]] = collections.deque()
        self._queue: Queue | None = None

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the operation is done; its own timeout bounds the wait.

        Args:
            timeout_s: Give up waiting after so many seconds. The operation goes on.

        Raises:
            CollectiveTimeoutError: It is not done after ``timeout_s``.
            GroupError: This thread is inside another call of the group (in a signal's handler), which is before it.
            CollectiveError: The operation failed; the same error on every call.
        """
        if self._queue is not None and not self._finished.is_set() and self._queue.is_inside():
            raise GroupError(
                f"{self._operation}: it cannot be waited for here, inside a call of the same thread and group that is "
                "before it (from a signal's handler, a done callback or __del__); wait when that call has returned"
            )
        if not self._finished.wait(timeout_s):
            raise CollectiveTimeoutError(
                f"{self._operation}: not done after the {timeout_s} s that wait() was given; it goes on, wait again"
            )
        if self._error is not None:
            raise self._error

    def done(self) -> bool:
        """Return True once the operation succeeded or failed; never waits."""
        return self._finished.is_set()

    def result(self) -> Any:
        """Wait, and return what the call would have returned without ``async_op``."""
        self.wait()
        return self._result

    def add_done_callback(self, callback: Callable[[BaseException | None], None]) -> None:
        """Have ``callback`` called with the error, or None, once the operation is done (on a GPU: queued).

        It is called in the thread that ends the operation, or here if that was before. It must not raise or wait.
        """
        self._callbacks.append(callback)
        if self._finished.is_set():
            self._call_back()

    def _finish(self) -> None:
        run = self._run
        assert run is not None
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
            try:
                callback(self._error)
            except Exception as error:  # noqa: BLE001 - told as what ends a thread, which has other operations to run
                told = (type(error), error, error.__traceback__, threading.current_thread())
                threading.excepthook(threading.ExceptHookArgs(told))


class QueuedWork(Work):
    """An operation that is queued on a device. Waiting lets the device wait, as torch's does, not the host.

    After ``wait`` what this thread queues on the frameworks' current streams comes after the operation. The host waits
    only where a framework cannot be told (JAX).
    """

    def __init__(
        self, operation: str, launch: Callable[[], Flight], streams: Callable[[], set[int | None]],
        result: Callable[[], Any],
    ) -> None:
        super().__init__(operation, self._launch, FINISHED)
        self._begin = launch
        self._streams = streams
        self._get = result
        self._flight: Flight | None = None

    def queue_here(self) -> None:
        """Queue it in this thread.

        Raises:
            TensorError: Nothing was queued.
            BaseException: What is no error of the call: an interrupt. Other errors are for ``wait`` to raise.
        """
        self._finish()
        error = self._error
        if error is not None and (isinstance(error, TensorError) or not isinstance(error, Exception)):
            raise error

    def postpone(self) -> None:
        """Let others wait until another thread has queued it."""
        self._finished = threading.Event()

    def _launch(self) -> None:
        self._flight = self._begin()

    def wait(self, timeout_s: float | None = None) -> None:
        """Let this thread's streams, or the host where it must, wait for the operation; see ``Work.wait``."""
        began = time.monotonic()
        super().wait(timeout_s)
        assert self._flight is not None
        left_s = None if timeout_s is None else max(0.0, timeout_s - (time.monotonic() - began))
        try:
            self._flight.order(self._streams(), left_s)
        except CollectiveError:
            raise
        except TimeoutError:
            raise CollectiveTimeoutError(
                f"{self._operation}: not done after the {timeout_s} s that wait() was given; it goes on, wait again"
            ) from None

    def done(self) -> bool:
        """Return True once the device is done with the operation, or it failed; never waits."""
        if not super().done():
            return False
        return self._error is not None or (self._flight is not None and self._flight.done())

    def result(self) -> Any:
        """Wait as ``wait`` does, and return what the call would have returned without ``async_op``."""
        self.wait()
        return self._get()


class OperationQueue:
    """Runs the operations of one group one at a time, in the order in which they were issued; but transfers that cross.

    A synchronous call runs in its own thread when nothing is before it (``enter`` and ``leave``);
    everything else runs in worker threads, made on first use. The turn is a lock used as an
    atomic flag: it is only ever tried, so nobody blocks on it while an operation runs. Works with a
    lane that follow one another share it: those of one lane run in their order, of different lanes at
    the same time, each in a thread.

    Attributes:
        idle: Whether the workers have nothing to do, so that a call needs not queue behind them.
        watch: Told True when work is put, and False when the workers have nothing to do any more; or None.
        is_in_direct_call: Whether this thread is in a call that took no turn here; or None.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._renew()
        self._closed = False
        self.watch: Callable[[bool], None] | None = None
        self.is_in_direct_call: Callable[[], bool] | None = None

    def _renew(self) -> None:
        self._turn = threading.Lock()
        self._owner = 0  # the thread that has the turn, if it is the caller's
        # A signal's handler may come back here at any moment, in the thread that has the lock.
        self._changed = threading.Condition(threading.RLock())
        self._putting = 0  # the thread that has the lock
        self._waiting: collections.deque[Work] = collections.deque()
        self._lanes: set[Lane] = set()  # in which a work runs
        self._workers = self._spare = 0
        self._serving: set[int] = set()  # the workers' threads
        self.idle = True

    def disown(self) -> None:
        """Forget the parent's operations in a forked child, where no thread of the parent's gives back what it held."""
        self._renew()

    def enter(self) -> bool:
        """Take the turn if nobody has it or waits for it; then ``leave`` must follow."""
        if self._waiting or not self._turn.acquire(False):
            return False
        self._owner = threading.get_ident()
        return True

    def leave(self) -> None:
        """Give the turn back."""
        self._owner = 0
        self._turn.release()
        if self._waiting or self._closed:
            with self._changed:
                self._changed.notify_all()

    def is_busy(self) -> bool:
        """Return whether an operation runs or waits."""
        return bool(self._waiting) or self._turn.locked()

    def is_inside(self) -> bool:
        """Return whether this thread is in a call, so that what it begins meanwhile cannot be waited for."""
        here = threading.get_ident()
        if here in (self._owner, self._putting) or here in self._serving:
            return True
        return self.is_in_direct_call is not None and self.is_in_direct_call()

    def run(self, work: Work) -> Any:
        """Run ``work`` in a worker thread when its turn comes, and return its result.

        Raises:
            GroupError: This thread is inside a call, which goes on only when it returns there.
        """
        if self.is_inside():
            raise nested(work._operation, self._name)
        return self.put(work).result()

    def put(self, work: Work) -> Work:
        """Run ``work`` in a worker thread when its turn comes.

        Raises:
            RuntimeError: No thread can be started; nothing is left behind.
        """
        work._queue = self
        with self._changed:
            outer, self._putting = self._putting, threading.get_ident()
            try:
                self._waiting.append(work)
                try:
                    self._man()
                except BaseException:
                    self._waiting.remove(work)
                    raise
                self.idle = False
                if self.watch is not None:
                    self.watch(True)
                self._changed.notify_all()
            finally:
                self._putting = outer
        return work

    def _man(self) -> None:
        """See that somebody takes the next work, if it can be run; the lock is held."""
        if not self._workers or (self._lanes and not self._spare and self._next() is not None):
            threading.Thread(target=self._serve, name=f"colltensor {self._name}", daemon=True).start()
            self._workers += 1

    def tell_watch(self) -> None:
        """Tell ``watch`` once more whether the workers have something to do."""
        with self._changed:
            if self.watch is not None:
                self.watch(not self.idle)

    def close(self, error: CollectiveError, timeout_s: float) -> bool:
        """Fail what waits, end the workers, and wait for the operations that run; False if one did not end."""
        with self._changed:
            self._closed = True
            self.idle = False  # nothing goes past the queue any more
            cancelled = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
            idle = self._changed.wait_for(lambda: not self._turn.locked(), timeout_s)
        for work in cancelled:
            work._cancel(error)
        return idle

    def _next(self) -> int | None:
        """Return the place of the work that can be run beside the transfers that run; the lock is held."""
        for place, work in enumerate(self._waiting):
            if work.lane is None:
                return place if not place and not self._lanes else None
            if work.lane not in self._lanes:
                return place
        return None

    def _take(self) -> Work | None:
        """Take the next work that can be run, and the turn for it; the lock is held."""
        place = self._next()
        if place is None or not (self._lanes or self._turn.acquire(False)):
            return None
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
            with self._changed:
                if self._spare >= _SPARE_WORKERS and self._next() is None:
                    self._workers -= 1
                    return
                self._spare += 1
                self._changed.wait_for(taken)
                self._spare -= 1
                if work is None:  # closed
                    return
                with contextlib.suppress(RuntimeError):  # no thread can be started: what is next waits for one of these
                    self._man()
            work._finish()
            self._end(work)
            work = None

    def _end(self, work: Work) -> None:
        """Give back the turn that was taken for a work."""
        with self._changed:
            if work.lane is not None:
                self._lanes.discard(work.lane)
            if not self._lanes:
                self._turn.release()
            self._changed.notify_all()
            self.idle = not self._waiting and not self._lanes and not self._closed
            if self.idle and self.watch is not None:
                self.watch(False)


def nested(operation: str, group_name: str) -> GroupError:
    """Return the error of a call from inside a call of the same thread and group."""
    return GroupError(
        f"{operation}: group '{group_name}': this thread is inside another call of the group, which waits (this one "
        "came from a signal's handler, a done callback or __del__); that one goes on, call again when it has returned"
    )


def consequence(
    operation: str, group_name: str, rank: int, broken: CollectiveError | None
) -> PeerLostError | CollectiveTimeoutError | None:
    """Return what a call fails with that was issued before ranks were lost: the same class, with the same ranks.

    None where the group broke over something else.
    """
    if not isinstance(broken, (PeerLostError, CollectiveTimeoutError)):
        return None
    error = type(broken)(
        f"{operation}: group '{group_name}' (rank {rank}): a call before it failed: {broken}", broken.ranks
    )
    error.__cause__ = broken
    return error
