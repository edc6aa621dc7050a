"""ShmBackend: every collective in memory that the ranks of one host share.

The native library does the work on the tensors' own memory. Here a call is packed, and its outcome
is turned into results and errors.
"""

from __future__ import annotations

import array
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from colltensor.backends.base import FAST_DONE, FAST_MISMATCH, FAST_REFUSED, BackendBase
from colltensor.backends.shm import error_mapping, library, requests
from colltensor.backends.shm.error_mapping import AgreeingControl, ErrorMapping, ExpectedSignature
from colltensor.backends.shm.issuing import IssueQueue
from colltensor.backends.shm.segment import Segment
from colltensor.errors import CollectiveError
from colltensor.operations import NATIVE
from colltensor.types import ReduceOp
from colltensor.view import BufferView

_NEVER_NS: Final = (1 << 63) - 1


class ShmBackend(BackendBase):
    """Collectives between the ranks of one host.

    The ranks agree inside the segment, on arrival and before anything is written. ``set_signature``
    and ``set_transfer_signature`` say what they agree on. A call without one is compared by
    operation, dtype, count, op and root.

    Attributes:
        number: The group's number in the native library.
        queue: Of asynchronous fast calls.
        details: Whether large messages are read from the peers' memory, and the obstacle if not, in
            words.
    """

    name = "shm"
    takes_strided = True
    needs_agreement = False
    crosses = True

    def __init__(self, control: AgreeingControl, segment: Segment, timeout_s: float) -> None:
        self._rank = control.rank
        self._size = control.world_size
        self._native = segment.library
        self._handle = self.number = segment.handle
        self._run = segment.library.shm_run
        self.details = segment.details
        self._held = False
        self._joining = threading.Lock()
        self._joined = 0
        self._expected: ExpectedSignature | None = None
        self._expected_transfers: dict[tuple[int, int], ExpectedSignature] = {}
        self._error_mapping = ErrorMapping(control, segment.library, segment.handle)
        segment.stop.append(self._error_mapping.stop)
        self._crowded = segment.crowded
        self.queue = IssueQueue(segment.library, segment.handle)
        self.set_timeout(timeout_s)

    def set_timeout(self, timeout_s: float) -> None:
        """Let fast calls wait so long: ``fast_call`` returns other functions afterwards."""
        self._timeout_ns = int(timeout_s * 1e9)
        self._native.shm_set_timeout(self._handle, self._timeout_ns)
        self._resume = self._native.shm_resume_function(self._handle, self._timeout_ns)
        self._hand_over = self._native.shm_hand_over_function(self._handle, self._timeout_ns)
        self._hand_over.release_gil = False

    def fast_call(
        self, operation: int, op: int, root: int, source: int, stacked: bool
    ) -> tuple[Callable[..., int], Callable[..., int]]:
        """Return functions of the native library's: see ``AgreeingBackend``."""
        make = self._native.shm_fast_function
        call = self._handle, self._timeout_ns, operation, op, root, source, stacked
        patient = make(*call, False)
        # Where ranks share cores, the others seldom come within microseconds: wait at once without
        # the interpreter lock.
        if self._crowded:
            return patient, patient
        brief = make(*call, True)
        brief.release_gil = False
        return brief, patient

    def issuing(
        self, operation: int, op: int, root: int, source: int, stacked: bool
    ) -> Callable[..., int]:
        """Return a function of the native library's: see ``AgreeingBackend``."""
        function: Callable[..., int] = self._native.shm_issue_function(
            self._handle, self._timeout_ns, operation, op, root, source, stacked
        )
        function.release_gil = False  # type: ignore[attr-defined]
        return function

    def hand_over(self) -> int:
        """Put this thread's pending call into the queue: see ``AgreeingBackend``."""
        number: int = self._hand_over()
        return number

    def tree(
        self, operation: int, op: int, root: int, source: int, plan: array.array[int]
    ) -> Callable[..., int]:
        """Return a function of the native library's: see ``AgreeingBackend``."""
        function: Callable[..., int] = self._native.shm_tree_function(
            self._handle, self._timeout_ns, operation, op, root, source, plan.buffer_info()[0]
        )
        return function

    def reading_tree(
        self, operation: int, op: int, root: int, source: int, plan: array.array[int]
    ) -> Callable[[int, int, int], int] | None:
        """Return a function of the native library's: see ``AgreeingBackend``."""
        if not library.reads_python():
            return None
        function: Callable[[int, int, int], int] = self._native.shm_reading_tree_function(
            self._handle, self._timeout_ns, operation, op, root, source, plan.buffer_info()[0]
        )
        function.release_gil = False  # type: ignore[attr-defined]
        return function

    def allocating_tree(
        self, operation: int, op: int, root: int, source: int, plan: array.array[int]
    ) -> Callable[..., int]:
        """Return a function of the native library's: see ``AgreeingBackend``."""
        function: Callable[..., int] = self._native.shm_allocating_tree_function(
            self._handle, self._timeout_ns, operation, op, root, source, plan.buffer_info()[0]
        )
        return function

    def hold(self, deadline: float) -> bool:
        """Take the turn for a call of several steps, waiting for a fast call of another thread.

        Returns:
            False where this thread has begun one, which goes on only when it returns there, or not
            at all.
        """
        code = self._native.shm_hold(self._handle, _nanoseconds(deadline))
        if code == error_mapping.INSIDE:
            return False
        if code:
            self._error_mapping.fail("hold", code)
        self._held = True
        return True

    def is_inside(self) -> bool:
        """Return whether this thread is in a fast call, whose wait runs Python code now."""
        return bool(self._native.shm_inside(self._handle))

    def is_pending(self) -> bool:
        """Return whether this thread is between the two steps of a fast call.

        That also holds for a thread that was interrupted there.
        """
        return bool(self._native.shm_pending(self._handle))

    def release(self) -> None:
        """Give the turn back, and forget an expected signature that was not used."""
        self._expected = None
        self._expected_transfers.clear()
        if self._held:
            self._held = False
            self._native.shm_release(self._handle)

    def join(self, deadline: float) -> None:
        """Take the turn for a send or recv in a thread of its own, with other such threads."""
        with self._joining:
            if not self._joined:
                code = self._native.shm_hold(self._handle, _nanoseconds(deadline))
                if code:
                    self._error_mapping.fail(
                        "hold", error_mapping.BUSY if code == error_mapping.INSIDE else code
                    )
            self._joined += 1

    def part(self, source: int, destination: int) -> None:
        """Give it back, and forget the signature that was expected of that transfer."""
        self._expected_transfers.pop((source, destination), None)
        with self._joining:
            self._joined -= 1
            if not self._joined:
                self._native.shm_release(self._handle)

    def progress(self) -> int:
        """Return -1 while no call runs, else a number that grows from call to call."""
        return int(self._native.shm_progress(self._handle))

    def calls(self) -> int:
        """Return how many collectives this rank has taken part in.

        Each buffer of a call counts.
        """
        return int(self._native.shm_calls(self._handle))

    def set_signature(
        self,
        signature: bytes,
        describe: Callable[[], str],
        allocate: Callable[[], None] | None = None,
    ) -> None:
        """Set what the ranks must agree on in the next collective.

        It is the sequence number (8 bytes) and the rest.
        """
        self._expected = ExpectedSignature(signature, requests.words(signature), describe, allocate)

    def set_transfer_signature(
        self,
        source: int,
        destination: int,
        signature: bytes,
        describe: Callable[[], str],
        allocate: Callable[[], None] | None = None,
    ) -> None:
        """Set what two ranks must agree on in the next transfer between them.

        It goes from ``source`` to ``destination``.
        """
        self._expected_transfers[source, destination] = ExpectedSignature(
            signature, requests.words(signature), describe, allocate
        )

    def agree(self, deadline: float) -> None:
        """Meet all ranks, which must expect the same signature."""
        self._collective(self._take(), "agree", None, None, -1, 0, (), deadline)

    def propagate_failure(self, error: CollectiveError) -> None:
        """Let the ranks that wait in the segment know why the group broke."""
        self._error_mapping.propagate_failure(error)

    def abandon(self) -> None:
        """Break the group for every rank, which then look at the control plane for the reason."""
        self._error_mapping.abandon()

    def exports(self, tensors: Sequence[Any]) -> bool:
        """Return True if the library can view the tensors."""
        return library.exports(tensors)

    def abandon_pending(self) -> None:
        """Forget this thread's fast call, interrupted between its steps.

        It ends at once in a broken group.
        """
        self._resume()

    def complete(self, name: str, code: int) -> int:
        """End a fast call: see ``AgreeingBackend``."""
        if code == error_mapping.PENDING:
            code = self._resume()
        if code == error_mapping.DONE:
            return FAST_DONE
        if code in (error_mapping.REFUSED, error_mapping.BUSY):
            return FAST_REFUSED
        if code & 0xFF == error_mapping.MISMATCH:
            return code - error_mapping.MISMATCH + FAST_MISMATCH
        return self._error_mapping.fail(name, code)

    def explain(self, signature: bytes, describe: Callable[[], str], deadline: float) -> None:
        """Raise the MismatchError of a fast call."""
        self._error_mapping.mismatch(
            ExpectedSignature(signature, requests.words(signature), describe), deadline
        )

    def explain_transfer(
        self, pairs: Sequence[tuple[int, int, bytes, Callable[[], str]]], deadline: float
    ) -> None:
        """Raise the MismatchError of fast transfers."""
        expected = [
            (source, destination, ExpectedSignature(signature, requests.words(signature), describe))
            for source, destination, signature, describe in pairs
        ]
        self._error_mapping.pair_mismatch(expected, deadline)

    def transfers(self, source: int, destination: int) -> int:
        """Return the number of transfers from ``source`` to ``destination``; one is this rank."""
        return int(self._native.shm_transfers(self._handle, source, destination))

    def peers(self) -> tuple[int, int]:
        """Return the ranks that a waiting fast call sends to and receives from; -1 for none."""
        to, source = divmod(int(self._native.shm_peers(self._handle)), 1 << 16)
        return to - 1, source - 1

    def allreduce(self, buffers: Sequence[BufferView], op: ReduceOp, deadline: float) -> None:
        """Combine in place on every rank, each buffer on its own."""
        expected = self._take()
        for index, buffer in enumerate(buffers or (None,)):
            self._collective(expected, "allreduce", buffer, op, -1, index, (buffer,), deadline)

    def reduce(
        self, buffers: Sequence[BufferView], root: int, op: ReduceOp, deadline: float
    ) -> None:
        """Combine in place on ``root``; elsewhere the buffers are only read."""
        expected = self._take()
        for index, buffer in enumerate(buffers or (None,)):
            self._collective(expected, "reduce", buffer, op, root, index, (buffer,), deadline)

    def broadcast(self, buffers: Sequence[BufferView], root: int, deadline: float) -> None:
        """Overwrite with ``root``'s elements on the other ranks, each buffer on its own."""
        expected = self._take()
        for index, buffer in enumerate(buffers or (None,)):
            self._collective(expected, "broadcast", buffer, None, root, index, (buffer,), deadline)

    def allgather(self, outputs: Sequence[BufferView], source: BufferView, deadline: float) -> None:
        """Copy every rank's ``source`` into ``outputs``."""
        self._collective(
            self._take(), "allgather", source, None, -1, 0, (*outputs, source), deadline
        )

    def gather(
        self, outputs: Sequence[BufferView] | None, source: BufferView, root: int, deadline: float
    ) -> None:
        """Copy every rank's ``source`` into ``outputs`` of ``root``."""
        views = (*(outputs or ()), source) if self._rank == root else (source,)
        self._collective(self._take(), "gather", source, None, root, 0, views, deadline)

    def scatter(
        self, target: BufferView, sources: Sequence[BufferView] | None, root: int, deadline: float
    ) -> None:
        """Copy ``root``'s ``sources`` to their ranks' ``target``."""
        views = (target, *(sources or ())) if self._rank == root else (target,)
        self._collective(self._take(), "scatter", target, None, root, 0, views, deadline)

    def reducescatter(
        self, target: BufferView, sources: Sequence[BufferView], op: ReduceOp, deadline: float
    ) -> None:
        """Combine all ranks' ``sources[rank]`` into ``target``."""
        self._collective(
            self._take(), "reducescatter", target, op, -1, 0, (target, *sources), deadline
        )

    def alltoall(
        self, outputs: Sequence[BufferView], sources: Sequence[BufferView], deadline: float
    ) -> None:
        """Copy rank r's ``sources[rank]`` into ``outputs[r]``."""
        self._collective(
            self._take(), "alltoall", sources[0], None, -1, 0, (*outputs, *sources), deadline
        )

    def barrier(self, deadline: float) -> None:
        """Return when all ranks have called."""
        self._collective(self._take(), "barrier", None, None, -1, 0, (), deadline)

    def send(self, buffers: Sequence[BufferView], peer: int, deadline: float) -> None:
        """Send each buffer to ``peer``, one after the other.

        Returns when ``peer`` has come, for a short buffer, or has the buffers.
        """
        expected = self._expected_transfers.get((self._rank, peer))
        for index, buffer in enumerate(buffers or (None,)):
            self._transfer("send", buffer, peer, expected, None, -1, None, index, deadline)

    def recv(self, buffers: Sequence[BufferView], peer: int, deadline: float) -> None:
        """Receive each buffer from ``peer``, one after the other."""
        expected = self._expected_transfers.get((peer, self._rank))
        for index, buffer in enumerate(buffers or (None,)):
            self._transfer("recv", None, -1, None, buffer, peer, expected, index, deadline)

    def sendrecv(
        self, source: BufferView, dst: int, target: BufferView, src: int, deadline: float
    ) -> None:
        """Send to ``dst`` and receive from ``src`` at once; both may be one rank."""
        sending = self._expected_transfers.get((self._rank, dst))
        receiving = self._expected_transfers.get((src, self._rank))
        self._transfer("sendrecv", source, dst, sending, target, src, receiving, 0, deadline)

    def close(self) -> None:
        """Leave the segment and unmap it. Idempotent.

        A call of another thread ends with an error.
        """
        self._native.shm_close(self._handle)

    def _take(self) -> ExpectedSignature | None:
        """Return the expected signature of the next call, and forget it.

        It keeps the call's tensors alive.
        """
        expected, self._expected = self._expected, None
        return expected

    def _collective(
        self,
        expected: ExpectedSignature | None,
        name: str,
        like: BufferView | None,
        op: ReduceOp | None,
        root: int,
        index: int,
        views: Sequence[BufferView | None],
        deadline: float,
    ) -> None:
        """Run one collective; ``like`` has its count and dtype, None where nothing is moved."""
        if expected is None:
            dtype, count = (None, 0) if like is None else (like.dtype, like.count)
            words = requests.own_words(NATIVE.get(name, NATIVE["barrier"]), dtype, count, op, root)
            expected = error_mapping.derived_signature(
                name, words, like, op, "" if root < 0 else f"root {root}"
            )

        moved = [view for view in views if view is not None]
        request = requests.collective(
            NATIVE["barrier" if like is None else name],
            like,
            op,
            root,
            expected.words,
            index,
            moved,
        )
        code = self._call(request, moved, None if index else expected.allocate, deadline)

        if code == error_mapping.MISMATCH:
            self._error_mapping.mismatch(expected, deadline)
        elif code:
            self._error_mapping.fail(name, code)

    def _transfer(
        self,
        name: str,
        source: BufferView | None,
        dst: int,
        sending: ExpectedSignature | None,
        target: BufferView | None,
        src: int,
        receiving: ExpectedSignature | None,
        index: int,
        deadline: float,
    ) -> None:
        """Run one transfer to ``dst``, one from ``src``, or both at once; -1 stands for none."""
        gives = sending or _derived_transfer(source, self._rank, dst)
        takes = receiving or _derived_transfer(target, src, self._rank)
        request = requests.transfer(
            source, dst, gives.words, target, src, takes.words, index, self._joined > 0
        )

        moved = [view for view in (source, target) if view is not None]
        code = self._call(request, moved, None if index else takes.allocate, deadline)
        if code == error_mapping.MISMATCH:
            sent, received = requests.differing(request)
            if self._joined:
                ends = (self._rank, dst, gives) if sent else (src, self._rank, takes)
                self._error_mapping.mismatch_beside(*ends, deadline)

            pairs = [(self._rank, dst, gives)] if sent else []
            self._error_mapping.pair_mismatch(
                [*pairs, (src, self._rank, takes)] if received else pairs, deadline
            )
        elif code:
            self._error_mapping.fail(name, code)

    def _call(
        self,
        request: array.array[int],
        views: Sequence[BufferView],
        allocate: Callable[[], None] | None,
        deadline: float,
    ) -> int:
        """Run a request; ``allocate`` may move its views once the ranks agree."""

        def agreed() -> None:
            assert allocate is not None
            allocate()
            requests.rebase(request, views)

        held = self._held or self._joined > 0
        if not held and not self.hold(deadline):  # a call that no group makes, but another backend
            self._error_mapping.fail("hold", error_mapping.BUSY)

        try:
            address = request.buffer_info()[0]
            return int(
                self._run(
                    self._handle,
                    address,
                    _nanoseconds(deadline),
                    None if allocate is None else agreed,
                )
            )
        except BaseException:  # a signal's exception, or what allocate raised
            self._error_mapping.abandon()
            raise
        finally:
            if not held:
                self.release()


def _nanoseconds(deadline: float) -> int:
    return _NEVER_NS if math.isinf(deadline) else int(deadline * 1e9)


def _derived_transfer(view: BufferView | None, source: int, destination: int) -> ExpectedSignature:
    dtype, count = (None, 0) if view is None else (view.dtype, view.count)
    words = requests.own_words(NATIVE["transfer"], dtype, count, None, -1)
    return error_mapping.derived_signature(
        f"transfer from rank {source} to rank {destination}", words, view, None
    )
