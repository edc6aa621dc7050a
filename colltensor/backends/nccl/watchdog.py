"""Watchdog: the thread that looks after what is queued, because the host does not wait for it.

It finds calls that are not done in time, errors that NCCL reports only when it is asked, and peers
that are gone. Then it ends the communicators, which ends the kernels that wait in them, and
notifies the group.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from colltensor.backends.nccl.streams import QueuedOperation, StreamManager
from colltensor.errors import CollectiveError, CollectiveTimeoutError, GroupError

_TICK_S: Final = 0.05
_JOIN_S: Final = 5.0


class Watchdog:
    """Watches the pending operations of one group on this rank.

    Attributes:
        failure: The error that ended them all, or None.
        timeout_s: How long an operation that is added next may be under way.
    """

    def __init__(
        self,
        control: Any,
        stream_manager: StreamManager,
        timeout_s: float,
        errors: Callable[[], BaseException | None],
        end: Callable[[CollectiveError, Sequence[QueuedOperation]], None],
    ) -> None:
        """Watch nothing yet.

        Args:
            control: The group's ControlPlane, or None.
            stream_manager: Where the pending operations are.
            timeout_s: How long an operation may be under way.
            errors: Asks the communicators for their errors.
            end: Called once, with what was found and the operations that it ends: ends all, and
                notifies the group.
        """
        self._control = control
        self._stream_manager = stream_manager
        self.timeout_s = timeout_s
        self._errors = errors
        self._end = end

        self._pending: deque[QueuedOperation] = deque()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._asleep = False
        self._looked = 0.0
        self._closed = False
        self._last: Callable[[], None] | None = None
        self._gone: CollectiveError | None = None
        self._thread: threading.Thread | None = None
        self.failure: CollectiveError | None = None

    def check(self) -> None:
        """Raise if an operation failed, or a peer has broken the group.

        The control plane is looked at now and then.

        Raises:
            CollectiveError: What happened.
        """
        if self.failure is not None:
            raise self.failure
        now = time.monotonic()
        if self._control is not None and now - self._looked > _TICK_S:
            self._looked = now
            self._control.check()

    def add(self, operation: QueuedOperation) -> None:
        """Watch an operation from now on, its queuing included.

        Raises:
            CollectiveError: An operation failed before, or the group was destroyed.
        """
        if self._control is not None:
            operation.number = self._control.queue(operation.peers)
        operation.timeout_s = self.timeout_s

        with self._lock:
            refusal = self.failure or self._gone
            if refusal is not None:
                raise refusal
            if self._thread is None:
                thread = threading.Thread(
                    target=self._watch, name="colltensor nccl watchdog", daemon=True
                )
                thread.start()
                self._thread = thread

            self._pending.append(operation)
            if self._asleep:
                self._changed.notify_all()

    def abandon(self, operation: QueuedOperation) -> None:
        """Watch an operation no longer, whose queuing failed.

        ``fail`` has let go of it where it was the reason.
        """
        with self._changed:
            if operation in self._pending:  # not if all of them failed meanwhile
                self._pending.remove(operation)

    def drain(self, deadline: float, index: int | None = None) -> None:
        """Return when all pending operations, or those on device ``index``, are done.

        Raises:
            TimeoutError: They are not at ``deadline``.
            CollectiveError: One failed.
        """
        with self._changed:
            pending = [
                operation
                for operation in self._pending
                if index is None or operation.device == index
            ]
        for operation in pending:
            operation.wait(max(0.0, deadline - time.monotonic()))
        if self.failure is not None:
            raise self.failure

    def fail(self, error: CollectiveError) -> None:
        """Take ``error`` for the reason why nothing goes on; the first one stays."""
        with self._changed:
            if self.failure is not None or self._closed:
                return
            self.failure = error
            pending = list(self._pending)
            self._pending.clear()
            self._closed = True
            self._changed.notify_all()
        for operation in pending:
            operation.failure = error
        self._end(error, pending)

    def close(
        self, gone: CollectiveError, end: Callable[[Sequence[QueuedOperation]], None]
    ) -> Sequence[QueuedOperation]:
        """Stop watching; what is not done fails with ``gone``.

        The communicators are ended next.

        Args:
            gone: The error.
            end: Ends them, given the pending operations that are not done. It is called in the
                watchdog's thread, if there is one, and waited for some seconds: no other thread can
                be made while the interpreter shuts down.

        Returns:
            The pending operations that are not done. They hold memory that the device uses until
            the communicators are ended.
        """
        with self._changed:
            self._closed = True
            undone = [
                operation
                for operation in self._pending
                if not self._stream_manager.finished(operation)
            ]
            for operation in undone:
                operation.failure = gone
            self._pending.clear()
            self._gone = gone
            self._last = lambda: end(undone)
            self._changed.notify_all()
            thread = self._thread

        if thread is not None:  # it may be looking at events, which are freed next
            thread.join(_JOIN_S)
        return undone

    def _watch(self) -> None:
        self._stream_manager.enter_watchdog()
        while self._wait():
            try:
                found = self._look()
            except RuntimeError as error:  # CUDA's, which every later call gives again
                with self._changed:
                    operation = self._pending[0] if self._pending else None
                if operation is None:
                    continue
                found = self._diagnose(operation, error)
            if found is not None:
                self.fail(found)
                return
        last, self._last = self._last, None
        if last is not None:
            last()

    def _wait(self) -> bool:
        """Return True when it is time to look at what is pending, False when watching ends."""
        with self._changed:
            self._asleep = True
            self._changed.wait_for(lambda: self._pending or self._closed)
            self._asleep = False
            self._changed.wait_for(lambda: self._closed, _TICK_S)
            return not self._closed

    def _look(self) -> CollectiveError | None:
        """Let go of what is done; return what is wrong, or None."""
        with self._changed:
            while self._pending and self._stream_manager.finished(self._pending[0]):
                self._pending.popleft()
            if not self._pending:
                return None
            operation = self._pending[0]

        self._stream_manager.check(operation)
        cause = self._errors()
        if cause is not None:
            return self._diagnose(operation, cause)

        now = time.monotonic()
        if operation.since is None and self._stream_manager.under_way(operation):
            operation.since = now
        if operation.since is not None and now - operation.since > operation.timeout_s:
            return self._diagnose(operation, None)

        control = self._control
        if control is None:
            return None
        try:
            control.check()
        except CollectiveError as error:
            return error

        # A rank that has left in good order may have done its part. Asked after 1, 2, 4 ...
        # seconds.
        if operation.since is not None and now - operation.since > operation.patience_s:
            operation.patience_s *= 2
            lost: CollectiveError | None = control.gone(operation.name, operation.peers)
            return None if self._stream_manager.finished(operation) else lost
        return None

    def _diagnose(self, operation: QueuedOperation, cause: BaseException | None) -> CollectiveError:
        control = self._control
        if control is not None:
            found: CollectiveError = control.diagnose_queued(
                operation.name, operation.peers, operation.number, cause
            )
            return found
        if cause is not None:
            return GroupError(
                f"{operation.name}: NCCL failed: {cause}; destroy the group and make it again"
            )
        return CollectiveTimeoutError(
            f"{operation.name}: timed out after {operation.timeout_s:g} s; destroy the group"
        )
