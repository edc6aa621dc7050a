"""Watcher: the thread that looks after what is queued, because the host does not wait for it.

It finds calls that are not done in time, errors that NCCL reports only when it is asked, and peers that are gone. Then
it ends the communicators, which ends the kernels that wait in them, and tells the group. Imports no framework.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from colltensor.backends.nccl.lanes import Lanes, QueuedFlight
from colltensor.errors import CollectiveError, CollectiveTimeoutError, GroupError

_TICK_S: Final = 0.05
_JOIN_S: Final = 5.0


class Watcher:
    """Watches the flights of one group on this rank.

    Attributes:
        failure: The error that ended them all, or None.
        timeout_s: How long a flight that is added next may be under way.
    """

    def __init__(
        self, control: Any, lanes: Lanes, timeout_s: float, errors: Callable[[], BaseException | None],
        end: Callable[[CollectiveError, Sequence[QueuedFlight]], None],
    ) -> None:
        """Watch nothing yet.

        Args:
            control: The group's ControlPlane, or None.
            lanes: Where the flights are.
            timeout_s: How long a flight may be under way.
            errors: Asks the communicators for their errors.
            end: Called once, with what was found and the flights that it ends: ends everything and tells the group.
        """
        self._control = control
        self._lanes = lanes
        self.timeout_s = timeout_s
        self._errors = errors
        self._end = end
        self._flights: deque[QueuedFlight] = deque()
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
        """Raise if a flight failed, or a peer has broken the group; the control plane is looked at now and then.

        Raises:
            CollectiveError: What happened.
        """
        if self.failure is not None:
            raise self.failure
        now = time.monotonic()
        if self._control is not None and now - self._looked > _TICK_S:
            self._looked = now
            self._control.check()

    def add(self, flight: QueuedFlight) -> None:
        """Watch a flight from now on, its queuing included.

        Raises:
            CollectiveError: A flight failed before, or the group was destroyed.
        """
        if self._control is not None:
            flight.number = self._control.queue(flight.peers)
        flight.timeout_s = self.timeout_s
        with self._lock:
            refusal = self.failure or self._gone
            if refusal is not None:
                raise refusal
            if self._thread is None:
                thread = threading.Thread(target=self._watch, name="colltensor nccl watcher", daemon=True)
                thread.start()
                self._thread = thread
            self._flights.append(flight)
            if self._asleep:
                self._changed.notify_all()

    def drop(self, flight: QueuedFlight) -> None:
        """Watch a flight no longer, whose queuing failed; ``fail`` has let go of it where it was the reason."""
        with self._changed:
            if flight in self._flights:  # not if all of them failed meanwhile
                self._flights.remove(flight)

    def drain(self, deadline: float, index: int | None = None) -> None:
        """Return when all flights, or those on device ``index``, are done.

        Raises:
            TimeoutError: They are not at ``deadline``.
            CollectiveError: One failed.
        """
        with self._changed:
            flights = [flight for flight in self._flights if index is None or flight.device == index]
        for flight in flights:
            flight.wait(max(0.0, deadline - time.monotonic()))
        if self.failure is not None:
            raise self.failure

    def fail(self, error: CollectiveError) -> None:
        """Take ``error`` for the reason why nothing goes on; the first one stays."""
        with self._changed:
            if self.failure is not None or self._closed:
                return
            self.failure = error
            flights = list(self._flights)
            self._flights.clear()
            self._closed = True
            self._changed.notify_all()
        for flight in flights:
            flight.failure = error
        self._end(error, flights)

    def close(self, gone: CollectiveError, end: Callable[[Sequence[QueuedFlight]], None]) -> Sequence[QueuedFlight]:
        """Stop watching; what is not done fails with ``gone``, because the communicators are ended next.

        Args:
            gone: The error.
            end: Ends them, given the flights that are not done. It is called in the watcher's thread, if there is one,
                and waited for some seconds: no other thread can be made while the interpreter shuts down.

        Returns:
            The flights that are not done. They hold memory that the device uses until the communicators are ended.
        """
        with self._changed:
            self._closed = True
            undone = [flight for flight in self._flights if not self._lanes.finished(flight)]
            for flight in undone:
                flight.failure = gone
            self._flights.clear()
            self._gone = gone
            self._last = lambda: end(undone)
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:  # it may be looking at events, which are freed next
            thread.join(_JOIN_S)
        return undone

    def _watch(self) -> None:
        self._lanes.enter_watcher()
        while self._wait():
            try:
                found = self._look()
            except RuntimeError as error:  # CUDA's, which every later call gives again
                with self._changed:
                    flight = self._flights[0] if self._flights else None
                if flight is None:
                    continue
                found = self._diagnose(flight, error)
            if found is not None:
                self.fail(found)
                return
        last, self._last = self._last, None
        if last is not None:
            last()

    def _wait(self) -> bool:
        """Return True when it is time to look at the flights, False when the watching ends."""
        with self._changed:
            self._asleep = True
            self._changed.wait_for(lambda: self._flights or self._closed)
            self._asleep = False
            self._changed.wait_for(lambda: self._closed, _TICK_S)
            return not self._closed

    def _look(self) -> CollectiveError | None:
        """Let go of what is done; return what is wrong, or None."""
        with self._changed:
            while self._flights and self._lanes.finished(self._flights[0]):
                self._flights.popleft()
            if not self._flights:
                return None
            flight = self._flights[0]
        self._lanes.check(flight)
        cause = self._errors()
        if cause is not None:
            return self._diagnose(flight, cause)
        now = time.monotonic()
        if flight.since is None and self._lanes.under_way(flight):
            flight.since = now
        if flight.since is not None and now - flight.since > flight.timeout_s:
            return self._diagnose(flight, None)
        control = self._control
        if control is None:
            return None
        try:
            control.check()
        except CollectiveError as error:
            return error
        # A rank that has left in good order may have done its part. Asked after 1, 2, 4 ... seconds.
        if flight.since is not None and now - flight.since > flight.patience_s:
            flight.patience_s *= 2
            lost: CollectiveError | None = control.gone(flight.name, flight.peers)
            return None if self._lanes.finished(flight) else lost
        return None

    def _diagnose(self, flight: QueuedFlight, cause: BaseException | None) -> CollectiveError:
        control = self._control
        if control is not None:
            found: CollectiveError = control.diagnose_queued(flight.name, flight.peers, flight.number, cause)
            return found
        if cause is not None:
            return GroupError(f"{flight.name}: NCCL failed: {cause}; destroy the group and make it again")
        return CollectiveTimeoutError(f"{flight.name}: timed out after {flight.timeout_s:g} s; destroy the group")
