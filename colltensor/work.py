"""Work, the handle of an asynchronous collective, and the queue that keeps a group's operations in order.

Imports no framework.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from colltensor.errors import CollectiveError, CollectiveTimeoutError, GroupError, TensorError

if TYPE_CHECKING:
    from colltensor.backends.base import Flight, IssueQueue


class _Always(threading.Event):
    """An event that is always set. Waiting takes no lock, which an interrupted thread would leave to all others."""

    def is_set(self) -> bool:
        return True

    def wait(self, timeout: float | None = None) -> bool:
        return True


FINISHED: Final = _Always()
"""Shared by what is done when it is first seen: making an event takes longer than queuing a call on a device."""
_LOOK_EVERY: Final = 16
"""So many operations of a native queue may have ended before the next one that is issued lets go of their tensors."""


class Work:
    """An operation that was issued and runs in the background. Made by ``async_op=True``.

    It keeps the tensors of the call alive until it is done. The tensors must not be read or written
    before that.
    """

    def __init__(self, operation: str, run: Callable[[], Any], finished: threading.Event | None = None) -> None:
        """Make the handle of what ``run`` does; with ``finished=FINISHED`` it is run before anybody waits for it."""
        self._operation = operation
        self._run: Callable[[], Any] | None = run
        self._finished = threading.Event() if finished is None else finished
        self._result: Any = None
        self._error: BaseException | None = None
        self._callbacks: collections.deque[Callable[[BaseException | None], None]] = collections.deque()

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the operation is done; its own timeout bounds the wait.

        Args:
            timeout_s: Give up waiting after so many seconds. The operation goes on.

        Raises:
            CollectiveTimeoutError: It is not done after ``timeout_s``.
            CollectiveError: The operation failed; the same error on every call.
        """
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
            callback(self._error)


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
        callback(self._error)


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
        self._queue = queue
        self._held = held
        self._result = result
        self._settle = finish
        self._written = written
        self._note = note

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the operation is done; see ``Work.wait``."""
        if not self._over and not self._queue.wait_for(self, timeout_s):
            if timeout_s is None:
                raise GroupError(f"{self._operation}: it was issued by the parent process of this one")
            raise CollectiveTimeoutError(
                f"{self._operation}: not done after the {timeout_s} s that wait() was given; it goes on, wait again"
            )
        if self._error is not None:
            raise self._error

    def done(self) -> bool:
        """Return True once the operation succeeded or failed; never waits."""
        return self._over or self._queue.wait_for(self, 0.0)

    def add_done_callback(self, callback: Callable[[BaseException | None], None]) -> None:
        """Have ``callback`` called once the operation is done; see ``Work.add_done_callback``."""
        if self._over or not self._queue.notify(self, callback):
            callback(self._error)

    def fail(self, code: int) -> None:
        """Deal with an operation that did not succeed, before it counts as ended."""
        try:
            if not self._settle(self._held[0], code):
                self._error = CollectiveTimeoutError(f"{self._operation}: the call before it did not end in time")
        except BaseException as error:  # noqa: BLE001 - kept for whoever waits, whatever it is
            self._error = error

    def end(self) -> None:
        """Let go of what it held; once, when it has ended."""
        if self._written and self._error is None:
            self._note(self._written)
        self._held, self._written = None, ()
        self._over = True


class OperationQueue:
    """Runs the operations of one group one at a time, in the order in which they were issued.

    A synchronous call runs in its own thread when nothing is before it (``enter`` and ``leave``);
    everything else runs in one worker thread, made on first use. The turn is a lock used as an
    atomic flag: it is only ever tried, so nobody blocks on it while an operation runs.

    Where there is a native queue the worker serves that, without the interpreter lock, whenever no operation of
    Python's waits, and sleeps there. Nothing is put into it while one does, so that it has only what comes before.

    Attributes:
        idle: Whether the worker has nothing to do, so that a call needs not queue behind it; after operations of the
            native queue it stays False until ``rests`` is asked.
        busy: Whether an operation of Python's waits or runs in the worker.
        watch: Told True when work is put, and False when the worker has nothing to do any more; or None.
    """

    def __init__(self, name: str, native: IssueQueue | None = None) -> None:
        self._name = name
        self._native = native
        self._renew()
        self._closed = False
        self.watch: Callable[[bool], None] | None = None

    def _renew(self) -> None:
        self._turn = threading.Lock()
        self._changed = threading.Condition(threading.Lock())
        self._waiting: collections.deque[Work] = collections.deque()
        self._issued: collections.deque[IssuedWork] = collections.deque()
        self._number = 0  # of the last one
        self._worker: threading.Thread | None = None
        self.idle = True
        self.busy = False

    def disown(self) -> None:
        """Forget the parent's operations in a forked child, where no thread of the parent's gives back what it held."""
        self._renew()

    def enter(self) -> bool:
        """Take the turn if nobody has it or waits for it; then ``leave`` must follow."""
        return not self._waiting and (self.idle or self.busy or self.rests()) and self._turn.acquire(False)

    def leave(self) -> None:
        """Give the turn back."""
        self._turn.release()
        if self._waiting or self._closed:
            with self._changed:
                self._changed.notify_all()

    def put(self, work: Work) -> Work:
        """Run ``work`` in the worker thread when its turn comes."""
        with self._changed:
            self.busy = True
            self.idle = False
            if self.watch is not None:
                self.watch(True)
            self._waiting.append(work)
            if self._worker is None:
                self._start()
            self._changed.notify_all()
        if self._native is not None:
            self._native.kick()
        return work

    def issue(self, work: IssuedWork, push: Callable[..., int], arguments: Sequence[Any]) -> bool:
        """Have the native queue make what ``push`` puts into it, which returns its number; False if it put nothing."""
        if len(self._issued) % _LOOK_EVERY == _LOOK_EVERY - 1:
            self._look()
        with self._changed:
            if self._closed:
                return False
            if self._worker is None:
                self._start()
            work.number = number = self._number + 1
            self._issued.append(work)
            self.idle = False
            try:
                if push(*arguments) <= 0:
                    self._issued.pop()
                    return False
            except BaseException:
                assert self._native is not None
                if self._native.issued() < number:
                    self._issued.pop()
                else:
                    self._number = number
                raise
            self._number = number
        return True

    def rests(self) -> bool:
        """Return whether the worker has nothing to do, and note it in ``idle``."""
        if not self.idle and not self.busy and self._native is not None and self._native.ended() == self._number:
            self._look()
        return self.idle

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
        with self._changed:
            if not self._native.notify(work.number):
                return False
            work._done = [*work._done, callback]
        return True

    def _look(self) -> None:
        """End, for Python, what the native queue has made."""
        native = self._native
        if native is None:
            return
        over = []
        with self._changed:
            ended = native.ended()
            while self._issued and self._issued[0].number <= ended:
                work = self._issued.popleft()
                work.end()
                if work._done:
                    over.append(work)
            if not self.busy and ended == self._number:
                self.idle = True
        for work in over:
            for callback in work._done:
                callback(work._error)

    def _start(self) -> None:
        """Make the worker; with the lock."""
        self._worker = threading.Thread(target=self._serve, name=f"colltensor {self._name}", daemon=True)
        self._worker.start()

    def close(self, error: CollectiveError, timeout_s: float) -> bool:
        """Fail what waits, end the worker, and wait for the operation that runs; False if it did not end."""
        native, deadline = self._native, time.monotonic() + timeout_s
        with self._changed:
            self._closed = True
            cancelled = list(self._waiting)
            self._waiting.clear()
            if native is not None:
                first = native.close()
                for issued in self._issued:
                    if issued.number >= first:
                        issued._error = error
                native.cancel()
            self._changed.notify_all()
            idle = self._changed.wait_for(lambda: not self._turn.locked(), timeout_s)
        if native is not None:
            idle = native.wait(native.issued(), deadline - time.monotonic()) and idle
            self._look()
        for work in cancelled:
            work._cancel(error)
        return idle

    def _serve_native(self, native: IssueQueue) -> None:
        """Serve the native queue until there is something to do here."""
        while not (self._closed or self._waiting) or native.ended() != native.issued():
            code = native.serve(not self._waiting)
            if code:
                with self._changed:
                    number = native.ended() + 1
                    failed = [work for work in self._issued if work.number == number]
                for work in failed:
                    work.fail(code)
            self._look()

    def _serve(self) -> None:
        while True:
            if self._native is not None:
                self._serve_native(self._native)
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._waiting and self._turn.acquire(False)))
                if not self._waiting:  # closed, with the turn never taken
                    return
                work = self._waiting.popleft()
            work._finish()
            self.leave()
            with self._changed:
                self.busy = bool(self._waiting)
                if not self.busy:
                    self.idle = self._native is None or self._native.ended() == self._number
                    if self.watch is not None:
                        self.watch(False)
