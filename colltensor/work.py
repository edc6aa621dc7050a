"""Work, the handle of an asynchronous collective, and the queue that keeps a group's operations in order.

Imports no framework.
"""

from __future__ import annotations

import collections
import logging
import math
import numbers
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from colltensor.errors import (
    CollectiveError,
    CollectiveTimeoutError,
    GroupError,
    OptionError,
    PeerLostError,
    TensorError,
)

if TYPE_CHECKING:
    from colltensor.backends.base import Flight, IssueQueue


_log: Final = logging.getLogger(__name__)
Lane = tuple[int, int]
_SPARE_WORKERS: Final = 2
"""Threads that may wait for work: a rank that sends and receives has two."""
_LOOK_S: Final = 0.1
_WORKERS: Final = -1
"""Who has the turn while works run: not one thread, since those of several lanes share it."""


class _Always(threading.Event):
    """An event that is always set. Waiting takes no lock, which an interrupted thread would leave to all others."""

    def is_set(self) -> bool:
        return True

    def wait(self, timeout: float | None = None) -> bool:
        return True


FINISHED: Final = _Always()
"""Shared by what is done when it is first seen: making an event takes longer than queuing a call on a device."""
_LONGEST_S: Final = 1e9
_UNSEEN: Final = 15
"""So many operations of a native queue may have ended before the next one that is issued lets go of their tensors."""


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
            raise _waits_inside(self._operation)
        if not self._finished.wait(None if timeout_s is None else _seconds(timeout_s)):
            raise CollectiveTimeoutError(
                f"{self._operation}: wait() timed out after {timeout_s:g} s; the operation goes on, wait again"
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
            _call(callback, self._error)


def _call(callback: Callable[[BaseException | None], None], outcome: BaseException | None) -> None:
    """Call a done callback."""
    try:
        callback(outcome)
    except BaseException as error:
        if not isinstance(error, Exception) and threading.current_thread() is threading.main_thread():
            raise  # it may be Ctrl-C, and no operation runs in this thread
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
        left_s = None if timeout_s is None else max(0.0, _seconds(timeout_s) - (time.monotonic() - began))
        try:
            self._flight.order(self._streams(), left_s)
        except CollectiveError:
            raise
        except TimeoutError:
            raise CollectiveTimeoutError(
                f"{self._operation}: wait() timed out after {timeout_s:g} s; the operation goes on, wait again"
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


class EndedWork(Work):
    """An operation that had ended when its call returned, as a short one does whose other ranks are there."""

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

    def add_done_callback(self, callback: Callable[[BaseException | None], None]) -> None:
        """Call ``callback``."""
        _call(callback, self._error)


def failed_work(error: BaseException) -> EndedWork:
    """Return the Work of an operation that has failed."""
    work = EndedWork(None)
    work._error = error
    return work


class IssuedWork(Work):
    """An operation that a native queue makes.

    What its end means for Python is done by whoever sees it first: nobody takes the interpreter lock for that alone.
    """

    number = 0
    _error: BaseException | None = None
    _over = False
    _done: Sequence[Callable[[BaseException | None], None]] = ()

    def __init__(
        self, operation: str, queue: OperationQueue, held: Any, result: Any, finish: Callable[[Any, int], bool],
        written: Sequence[Any], note: Callable[[Sequence[Any]], None],
    ) -> None:
        """Make the handle of an operation that ``queue`` is about to issue.

        Args:
            operation: Its name.
            queue: Where it is issued.
            held: The tensors that it uses, and their exports.
            result: What the call returns.
            finish: Told the tensors and the code of one that did not succeed, in the worker; raises, or returns whether
                it did after all.
            written: What ``note`` is told when it has succeeded, if there is any.
            note: See there.
        """
        self._operation = operation
        self._issuer = queue
        self._held = held
        self._result = result
        self._settle = finish
        self._written = written
        self._note = note

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the operation is done; see ``Work.wait``."""
        queue = self._issuer
        if not self._over and queue.is_before(self):
            raise _waits_inside(self._operation)
        if not self._over and not queue.wait_for(self, None if timeout_s is None else _seconds(timeout_s)):
            if timeout_s is None:
                raise GroupError(f"{self._operation}: it was issued by the parent process of this one")
            raise CollectiveTimeoutError(
                f"{self._operation}: wait() timed out after {timeout_s:g} s; the operation goes on, wait again"
            )
        if self._error is not None:
            raise self._error

    def done(self) -> bool:
        """Return True once the operation succeeded or failed; never waits."""
        return self._over or self._issuer.wait_for(self, 0.0)

    def add_done_callback(self, callback: Callable[[BaseException | None], None]) -> None:
        """Have ``callback`` called once the operation is done; see ``Work.add_done_callback``."""
        if self._over or not self._issuer.notify(self, callback):
            if not self.done():
                raise GroupError(f"{self._operation}: it was issued by the parent process of this one")
            _call(callback, self._error)

    def fail(self, code: int) -> None:
        """Deal with an operation that did not succeed, before it counts as ended."""
        try:
            if not self._settle(self._held[0], code):
                self._error = CollectiveTimeoutError(f"{self._operation}: timed out: the call before it did not end")
        except BaseException as error:  # noqa: BLE001 - kept for whoever waits, whatever it is
            self._error = error

    def end(self) -> None:
        """Let go of what it held; once, when it has ended."""
        if self._written and self._error is None:
            self._note(self._written)
        self._held, self._written = None, ()
        self._over = True


class Turn:
    """Who may run an operation: one thread, known from the instant in which it takes the turn.

    A signal's handler may raise at any moment. What would be left behind then is undone by the thread itself.

    Attributes:
        release: Gives the turn back. It is no function of Python's, at whose beginning a handler could raise.
    """

    __slots__ = ("_holder", "release")

    def __init__(self) -> None:
        self._holder: dict[None, int] = {}
        self.release: Callable[[], None] = self._holder.clear

    def take(self, owner: int = 0) -> bool:
        """Take the turn for this thread, or in another name, if nobody has it; nobody blocks on it."""
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
    """Return a lock for data that a signal's handler may use in the thread that has it, and what tells if this one has.

    ``with`` takes it in one step. That of a Condition is a function of Python's, in which a handler could raise once
    the lock is taken, for ever.
    """
    lock = threading.RLock()
    return lock, lock._is_owned  # type: ignore[attr-defined]  # private; threading.Condition uses it


class OperationQueue:
    """Runs the operations of one group one at a time, in the order in which they were issued; but transfers that cross.

    A synchronous call runs in its own thread when nothing is before it (``enter``);
    everything else runs in worker threads, made on first use. Works with a lane that follow one another
    share the turn: those of one lane run in their order, of different lanes at the same time, each in a thread.

    A native queue has a thread of its own, which serves it without the interpreter lock and sleeps there. Nothing is
    put into it while an operation of Python's waits or runs in a worker, so that it has only what comes before those.

    Attributes:
        idle: Whether nothing waits or runs here, so that a call needs not queue; after operations of the native queue
            it stays False until ``rests`` is asked.
        busy: Whether an operation of Python's waits for a worker or runs in one.
        watch: Told True when work is put, and False when the workers have nothing to do any more; or None.
        is_in_direct_call: Whether this thread is in a call that took no turn here; or None.
    """

    def __init__(self, name: str, native: IssueQueue | None = None, rank: int = 0) -> None:
        self._name = name
        self._rank = rank
        self._native = native
        self._renew()
        self._closed = False
        self._warned = False
        self.watch: Callable[[bool], None] | None = None
        self.is_in_direct_call: Callable[[], bool] | None = None

    def _renew(self) -> None:
        self.turn = Turn()
        self._lock, self._is_locked_here = lock_of_handlers()
        self._changed = threading.Condition(self._lock)
        self._waiting: collections.deque[Work] = collections.deque()
        self._lanes: set[Lane] = set()  # in which a work runs
        self._due: collections.Counter[Lane] = collections.Counter()  # works that wait or run, by lane
        self._workers = self._spare = 0
        self._serving: set[int] = set()  # the workers' threads
        self._issued: collections.deque[IssuedWork] = collections.deque()
        self._notified: collections.deque[IssuedWork] = collections.deque()  # whose callbacks are not called yet
        self._number = 0  # of the last one
        self._has_server = False
        self.busy = False
        self.idle = True

    def disown(self) -> None:
        """Forget the parent's operations in a forked child, where no thread of the parent's gives back what it held."""
        self._renew()

    def enter(self) -> bool:
        """Take the turn if nobody has it or waits for it; then ``turn.release`` and ``pass_on`` must follow."""
        return not self._waiting and (self.idle or self.busy or self.rests()) and self.turn.take()

    def pass_on(self) -> None:
        """Let who waits for the turn know that it was given back."""
        if self._waiting or self._closed:
            with self._lock:
                self._changed.notify_all()

    def is_busy(self) -> bool:
        """Return whether an operation runs or waits."""
        return bool(self._waiting or self.turn.owner()) or not self._is_native_done()

    def is_inside(self) -> bool:
        """Return whether this thread is in a call, so that what it begins meanwhile cannot be waited for."""
        here = threading.get_ident()
        if here == self.turn.owner() or here in self._serving or self._is_locked_here():
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

    def warn_of_threads(self, others: str) -> None:
        """Log, once, that two threads call at the same time, which ranks may take in different orders."""
        if not self._warned:
            self._warned = True
            _log.warning(
                "group %r (rank %d): thread %r calls while %s does: ranks match calls by their order, which is chance "
                "then, and calls of equal shapes can meet those of the other thread on another rank, in silence; let "
                "one call at a time, in one order on all ranks, or give each a group of its own (group.split)",
                self._name, self._rank, threading.current_thread().name, others,
            )

    def put(self, work: Work) -> Work:
        """Run ``work`` in a worker thread when its turn comes.

        Raises:
            RuntimeError: No thread can be started; nothing is left behind.
        """
        work._queue = self
        owner = self.turn.owner()
        if owner not in (0, _WORKERS, threading.get_ident()):
            self.warn_of_threads(_name_of(owner))
        with self._lock:
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
                self.busy = bool(self._waiting or self._lanes)
                self.idle = was_idle and not self.busy
                raise
        return work

    def man_native(self) -> None:
        """See that the native queue has its thread, before anything of a call is begun that may go there.

        Raises:
            RuntimeError: No thread can be started; nothing is left behind.
        """
        if self._has_server:
            return
        with self._lock:
            native = self._native
            if not (self._has_server or self._closed) and native is not None and native.wait(0, 0.0):  # not a fork's
                threading.Thread(target=self._serve_native, name=f"colltensor {self._name}", daemon=True).start()
                self._has_server = True

    def issue(
        self, work: IssuedWork, push: Callable[..., int], arguments: Sequence[Any], first: bool = False
    ) -> bool:
        """Have the native queue make what ``push`` puts into it, which returns its number; ``man_native`` was called.

        Args:
            work: The operation's handle.
            push: See above.
            arguments: What ``push`` is told.
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
        if self.busy and self._native is not None:  # a signal's handler has put something, and saw it as empty
            self._native.kick()

    def rests(self) -> bool:
        """Return whether nothing waits or runs here, and note it in ``idle``."""
        if not self.idle and not self.busy and self._is_native_done():
            self._look()
        return self.idle

    def is_before(self, work: IssuedWork) -> bool:
        """Return whether this thread is in a call that keeps an operation of the native queue from ending."""
        assert self._native is not None
        return self._native.ended() < work.number and self.is_inside()

    def wait_for(self, work: IssuedWork, timeout_s: float | None) -> bool:
        """Wait until an operation of the native queue has ended; False if it has not in time, or never will here."""
        assert self._native is not None
        if not self._native.wait(work.number, timeout_s):
            return False
        self._look()
        return True

    def notify(self, work: IssuedWork, callback: Callable[[BaseException | None], None]) -> bool:
        """Have ``callback`` called when an operation of the native queue has ended; False if it has."""
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
            if self.idle or self.busy or self._closed or inside or self._notified or ended != self._number:
                return
            self.idle = True
            if self.watch is not None:
                self.watch(False)

    def _notify_all(self) -> None:
        """Call the done callbacks of what has ended, in the queue's thread, where a call in one of them is refused."""
        while self._notified:
            work = self._notified[0]
            try:
                for callback in work._done:
                    _call(callback, work._error)
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

    def _end_served(self) -> None:
        self._look()
        if self._notified:
            self._notify_all()
            self._look()
        with self._lock:
            self._changed.notify_all()

    def _man(self) -> None:
        """See that there is a thread for every lane that has something to do, or one; the lock is held.

        It is started before the lane's turn comes, while the caller can still be told that there is none to be had.
        """
        if self._workers < max(1, len(self._due)):
            threading.Thread(target=self._serve, name=f"colltensor {self._name}", daemon=True).start()
            self._workers += 1

    def tell_watch(self) -> None:
        """Tell ``watch`` once more whether the workers have something to do."""
        with self._lock:
            if self.watch is not None:
                self.watch(not self.rests())

    def close(self, error: CollectiveError, timeout_s: float) -> bool:
        """Fail what waits, end the workers, and wait for the operations that run; False if one did not end."""
        native, deadline = self._native, time.monotonic() + timeout_s
        with self._lock:
            self._closed = True
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
                    self._changed.wait_for(lambda: not self._notified, max(0.0, deadline - time.monotonic()))
        for work in cancelled:
            work._cancel(error)
        return idle

    def _next(self) -> int | None:
        """Return the place of the work that can be run beside the transfers that run; the lock is held."""
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
                if self._spare >= _SPARE_WORKERS and self._workers > len(self._due) and self._next() is None:
                    self._workers -= 1
                    return
                self._spare += 1
                while not taken():
                    # A signal's handler may have raised in who gave the turn back, before it told.
                    self._changed.wait(_LOOK_S if self._waiting else None)
                self._spare -= 1
                if work is None:  # closed
                    return
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
    return next((f"thread {found.name!r}" for found in threading.enumerate() if found.ident == thread), "another")


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
