"""Engine: the order of one group's calls, and how one is run."""

from __future__ import annotations

import logging
import os
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Final

from colltensor.backends.base import AgreeingBackend, Backend
from colltensor.buffers import Buffers
from colltensor.control import Control
from colltensor.engine.agreement import NESTED, agreement_of
from colltensor.engine.call import Call, Refusal, Transfer
from colltensor.engine.deadlock import COLLECTIVE, SETTLED_S, Certainty, DeadlockDetector, Waits
from colltensor.engine.device import DeviceCalls, is_on
from colltensor.errors import GroupError, MismatchError, PeerLostError
from colltensor.operation_queue import OperationQueue
from colltensor.work import Lane, Work, nested

_NEVER: Final = float("inf")
_log: Final = logging.getLogger(__name__)
_CLOSE_TIMEOUT_S: Final = 5.0
_PACKAGE: Final = os.path.dirname(os.path.dirname(__file__)) + os.sep


class Engine(DeviceCalls):
    """Runs one group's calls, one at a time in the order of issue.

    Any thread may submit calls.
    """

    def __init__(
        self, name: str, rank: int, control: Control | None, backend: Backend, timeout_s: float
    ) -> None:
        where = f"group '{name}' (rank {rank})"
        agreement = agreement_of(rank, control, backend, where, self._is_in_fast_call)
        agrees_itself = isinstance(backend, AgreeingBackend)
        queue = OperationQueue(name, backend.queue if agrees_itself else None, rank)  # type: ignore[attr-defined]
        if agrees_itself:
            queue.is_in_fast_call = self._is_in_fast_call
        super().__init__(name, rank, control, agreement, timeout_s, queue)
        self._crosses = backend.crosses
        self._alone = control is None
        self._running: Call | None = None
        if control is not None:
            self._deadlocks = DeadlockDetector(
                name, control, self._waits, self.progress, self._settled_s, self._end_deadlock
            )
        _engines.add(self)

    def run(self, call: Call, async_op: bool) -> Any:
        """Run a call.

        Returns:
            What the call returns, or with ``async_op`` the Work that will have it.
        """
        if self.before is not None:
            self.before()

        device, queue = self.device, self.queue
        if device is not None and call.buffers and is_on(device, call.buffers[0]):
            return self._run_on_device(call, device, async_op)

        # one rank: nobody to agree with or to notify
        if self._alone and not async_op and queue.enter():
            try:
                for buffers in call.buffers:
                    buffers.allocate_result()
                    buffers.load()
                call.move(*call.arguments, _NEVER)
                for buffers in call.buffers:
                    buffers.store()
                return call.result()
            finally:
                queue.turn.release()
                queue.pass_on()

        return self._submit(call, async_op)

    def refuse(self, name: str, root: int, argument: Buffers | None, error: BaseException) -> None:
        """Notify the other ranks that this one refuses its part of a call.

        Their calls then end in MismatchError. It is for what this rank alone can get wrong, by its
        role in the call. Waits for nobody: it is a call in the background, and what this rank calls
        next comes after it.

        Args:
            name: The operation.
            root: The call's root.
            argument: What this rank has in common with the others, None where it is no tensor.
            error: Why.
        """
        device = self.device
        if self._control is None or self.broken is not None:
            return

        if device is not None and argument is not None and is_on(device, argument):
            return  # there the ranks need not agree

        if self.before is not None:
            self.before()

        try:
            self.queue.put(self._work(Refusal(name, root, error)))
        except RuntimeError as no_thread:
            _log.info(
                "group %r (rank %d): the others do not hear of %s: %s",
                self._name,
                self._rank,
                error,
                no_thread,
            )

    def _submit(self, call: Call, async_op: bool) -> Any:
        if self.broken is not None:
            raise self._refusal(call.name)
        queue = self.queue
        if async_op:
            return queue.put(self._work(call))
        if not queue.enter():
            return queue.run(self._work(call))
        try:
            return self._execute(call)
        finally:
            queue.turn.release()
            queue.pass_on()

    def _work(self, call: Call) -> Work:
        """Return the handle of a call that waits for its turn.

        Transfers with other peers or directions share the turn.
        """
        transfers = call.transfers
        if not self._crosses or transfers is None or len(transfers) != 1 or self._alone:
            return Work(call.name, lambda: self._execute_queued(call))
        work = Work(call.name, lambda: self._execute_beside(call, transfers[0]))
        work.lane = transfers[0].source, transfers[0].destination
        return work

    def _execute_queued(self, call: Call) -> Any:
        if self.broken is not None:
            raise self._consequence(call.name)
        return self._execute(call)

    def _execute(self, call: Call) -> Any:
        if self.broken is not None:
            raise self._refusal(call.name)

        deadline = time.monotonic() + self.timeout_s
        agreement = self._agreement
        combine: Callable[[], None] | None = None
        outer, self._running = self._running, call

        try:
            combine = agreement.begin(call, deadline)
            if combine is None:
                for buffers in call.buffers:
                    if buffers.staged:
                        buffers.load()
                call.move(*call.arguments, deadline)
            else:
                combine()

            if combine is not NESTED:
                for buffers in call.buffers:
                    buffers.store()
        except BaseException as error:
            self._fail(call, error)
            raise
        finally:
            self._running = outer
            # A nested call was refused before it took the agreement's turn.
            if combine is not NESTED:
                agreement.end()

        if combine is NESTED:
            raise nested(call.name, self._name)
        return call.result()

    def _execute_beside(self, call: Call, transfer: Transfer) -> Any:
        """Run a send or a recv while other threads run others; nothing else runs meanwhile."""
        if self.broken is not None:
            raise self._consequence(call.name)
        deadline = time.monotonic() + self.timeout_s
        buffers = transfer.buffers
        try:
            self._agreement.begin_beside(call, transfer, deadline)
            buffers.load()
            transfer.move(deadline)
            buffers.store()
        except BaseException as error:
            self._fail(call, error)
            raise
        finally:
            self._agreement.end_beside(transfer)
        return call.result()

    def _fail(self, call: Call, error: BaseException) -> None:
        """Break the group over what a call raised, unless that is ranks that disagree and go on."""
        if isinstance(error, MismatchError) and (
            self._control is None or self._control.broken is None
        ):
            return
        self._break(call.name, error, call)

    def _waits(self) -> Waits | None:
        """Return what keeps this rank's caller from going on, in calls of host tensors.

        It may be asked in any thread.
        """
        assert self._control is not None
        agreement, queue, rank = self._agreement, self.queue, self._rank
        blocking, call = queue.blocking(), self._running
        lanes: list[Lane] = []
        queued: list[Lane | None] = []

        if blocking is not None:
            lanes, queued = blocking
            # Nothing goes past a call that has the turn, but past one that waits for it.
            certainty = (
                Certainty.of_turn(queue.turn.owner())
                if queue.awaited is None
                else Certainty.of_wait()
            )
        elif call is not None or queue.is_busy() or agreement.progress() < 0:
            return None
        else:
            certainty = Certainty.of_turn(self._deadlocks.waiting_thread)

        if not lanes and call is not None and call.transfers is not None:
            lanes = [(transfer.source, transfer.destination) for transfer in call.transfers]
        elif not lanes and call is None:
            if agreement.progress() < 0:
                return None
            to, source = agreement.native_peers()
            lanes = [(rank, to)] if to >= 0 else []
            lanes += [(source, rank)] if source >= 0 else []

        peers = [peer for peer in range(self._control.world_size) if peer != rank]
        counts = {
            lane: agreement.transfers(*lane)
            for peer in peers
            for lane in ((rank, peer), (peer, rank))
        }
        counts[COLLECTIVE] = agreement.collectives(not lanes and call is None)
        awaited = [[*lane, counts[lane]] for lane in lanes or [COLLECTIVE]]
        return Waits(
            certainty,
            awaited,
            [[*lane, count] for lane, count in counts.items()],
            [[*(lane or COLLECTIVE)] for lane in queued],
        )

    def _settled_s(self) -> float:
        return min(SETTLED_S, self.timeout_s / 2)

    def _end_deadlock(self, error: MismatchError) -> None:
        """Break the group because of ranks that wait for each other.

        The calls that wait raise the error.
        """
        self._agreement.propagate_failure(error, raises=False)

    def progress(self) -> tuple[int, ...] | None:
        """Return None while no call of host tensors runs or waits.

        Otherwise return what changes from call to call.
        """
        fast = self._agreement.progress()
        if fast < 0 and not self.queue.is_busy():
            return None
        return fast, self._agreement.sequence, 0 if self._control is None else self._control.pairs()

    def close(self, how: str) -> None:
        """Fail what waits and drop everything.

        A call that runs in another thread ends with an error that says how.
        """
        gone = GroupError(f"group '{self._name}' (rank {self._rank}) {how}")
        self._alone = False
        leaves = self.broken is None and self._agreement.is_in_call()
        # in a signal's handler: the call goes on, and ends, when this returns
        inside = self.queue.is_inside()
        self.broken = self.broken or gone
        self._unraised = None
        if self._control is not None:
            if leaves:  # the others do not all wait for this rank, and would not notice
                left = f"group '{self._name}': rank {self._rank} left the group in the middle of a call"
                self._agreement.propagate_failure(PeerLostError(left, (self._rank,)))
            self._control.close(waits=not inside)
        self.queue.close(gone, 0.0 if inside else _CLOSE_TIMEOUT_S)
        self._kept.clear()

    def _is_in_fast_call(self) -> bool:
        """Return whether this thread is in a call that took no turn of the queue and will go on."""
        agreement = self._agreement
        return agreement.is_inside() or (agreement.is_pending() and self._has_call_above())

    def _has_call_above(self) -> bool:
        """Return whether a call of the group is further up the stack.

        The package's frames that have called this one do not count.
        """
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        while frame is not None:
            ours = frame.f_code.co_filename.startswith(_PACKAGE)
            if ours and getattr(frame.f_locals.get("self"), "_engine", None) is self:
                return True
            frame = frame.f_back
        return False

    def signatures(
        self, transfers: Sequence[Transfer]
    ) -> list[tuple[int, int, bytes, Callable[[], str]]]:
        """Return source, destination, signature and words of transfers that were made already."""
        terms = self._agreement.terms
        return [
            (transfer.source, transfer.destination, *terms(transfer, True)[1:])
            for transfer in transfers
        ]


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _disown() -> None:
    """Refuse the parent's groups in a forked child.

    The child shares their sockets and must not use them.
    """
    for engine in _engines:
        engine._alone = False
        engine.queue.disown()
        engine.queue.idle = False  # no call goes past it
        engine._unraised = None
        engine.broken = GroupError(
            "it belongs to the parent process; a forked child makes groups of its own"
        )


os.register_at_fork(after_in_child=_disown)
