"""ShmBackend: every collective in memory that the ranks of one host share.

The native library does the work on the tensors' own memory. Here a call is packed, and what it comes to is turned
into results and errors.

Imports no framework.
"""

from __future__ import annotations

import array
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from colltensor.backends.base import DIRECT_DONE, DIRECT_MISMATCH, DIRECT_REFUSED, require
from colltensor.backends.shm import library, outcomes, requests
from colltensor.backends.shm.issuing import IssueQueue
from colltensor.backends.shm.outcomes import AgreeingControl, Outcomes, Signed
from colltensor.backends.shm.segment import Segment
from colltensor.errors import CollectiveError
from colltensor.types import DType, ReduceOp
from colltensor.view import BufferView

_NEVER_NS: Final = (1 << 63) - 1


class ShmBackend:
    """Collectives between the ranks of one host.

    The ranks agree inside the segment, on arrival and before anything is written: ``sign`` and ``sign_transfer``
    say what on. A call that nobody signed is compared by operation, dtype, count, op and root.

    Attributes:
        number: The group's number in the native library.
        queue: Of asynchronous direct calls.
        details: Whether large messages are read from the peers' memory, and what stands against it, in words.
    """

    name = "shm"
    device_types = frozenset({"cpu"})
    takes_strided = True
    fuses = True
    joins: frozenset[str] = frozenset()
    agrees = False
    crosses = True

    require = staticmethod(require)

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
        self._signed: Signed | None = None
        self._signed_transfers: dict[tuple[int, int], Signed] = {}
        self._outcomes = Outcomes(control, segment.library, segment.handle)
        segment.stop.append(self._outcomes.stop)
        self._crowded = segment.crowded
        self.queue = IssueQueue(segment.library, segment.handle)
        self.set_timeout(timeout_s)

    def set_timeout(self, timeout_s: float) -> None:
        """Let direct calls wait so long: ``direct`` returns other functions afterwards."""
        self._timeout_ns = int(timeout_s * 1e9)
        self._native.shm_set_timeout(self._handle, self._timeout_ns)
        self._resume = self._native.shm_resume_function(self._handle, self._timeout_ns)
        self._hand_over = self._native.shm_hand_over_function(self._handle, self._timeout_ns)
        self._hand_over.release_gil = False

    def direct(
        self, operation: int, op: int, root: int, source: int, stacked: bool
    ) -> tuple[Callable[..., int], Callable[..., int]]:
        """Return functions of the native library's: see ``SigningBackend``."""
        make = self._native.shm_direct_function
        call = self._handle, self._timeout_ns, operation, op, root, source, stacked
        patient = make(*call, False)
        # Where ranks share cores the others seldom come within microseconds: wait without the interpreter lock at once.
        if self._crowded:
            return patient, patient
        brief = make(*call, True)
        brief.release_gil = False
        return brief, patient

    def issuing(self, operation: int, op: int, root: int, source: int, stacked: bool) -> Callable[..., int]:
        """Return a function of the native library's: see ``SigningBackend``."""
        function: Callable[..., int] = self._native.shm_issue_function(
            self._handle, self._timeout_ns, operation, op, root, source, stacked
        )
        function.release_gil = False  # type: ignore[attr-defined]
        return function

    def hand_over(self) -> int:
        """Put this thread's pending call into the queue: see ``SigningBackend``."""
        number: int = self._hand_over()
        return number

    def tree(self, operation: int, op: int, root: int, source: int, plan: array.array[int]) -> Callable[..., int]:
        """Return a function of the native library's: see ``SigningBackend``."""
        function: Callable[..., int] = self._native.shm_tree_function(
            self._handle, self._timeout_ns, operation, op, root, source, plan.buffer_info()[0]
        )
        return function

    def reading_tree(
        self, operation: int, op: int, root: int, source: int, plan: array.array[int]
    ) -> Callable[[int, int, int], int] | None:
        """Return a function of the native library's: see ``SigningBackend``."""
        if not library.reads_python():
            return None
        function: Callable[[int, int, int], int] = self._native.shm_reading_tree_function(
            self._handle, self._timeout_ns, operation, op, root, source, plan.buffer_info()[0]
        )
        function.release_gil = False  # type: ignore[attr-defined]
        return function

    def claiming_tree(self, op: int, plan: array.array[int]) -> Callable[..., int]:
        """Return a function of the native library's: see ``SigningBackend``."""
        function: Callable[..., int] = self._native.shm_claiming_tree_function(
            self._handle, self._timeout_ns, op, plan.buffer_info()[0]
        )
        return function

    def emulates(self, operation: str, dtype: DType, op: ReduceOp | None) -> bool:
        """Nothing is converted: 16-bit floats are widened in registers."""
        return False

    def hold(self, deadline: float) -> bool:
        """Take the turn for a call of several steps, waiting for a direct call of another thread.

        Returns:
            False where this thread has begun one, which goes on only when it returns there, or not at all.
        """
        code = self._native.shm_hold(self._handle, _nanoseconds(deadline))
        if code == outcomes.INSIDE:
            return False
        if code:
            self._outcomes.fail("hold", code)
        self._held = True
        return True

    def is_inside(self) -> bool:
        """Return whether this thread is in a direct call, whose wait runs Python code now."""
        return bool(self._native.shm_inside(self._handle))

    def is_pending(self) -> bool:
        """Return whether this thread is between the two steps of a direct call, or was interrupted there."""
        return bool(self._native.shm_pending(self._handle))

    def release(self) -> None:
        """Give the turn back, and forget what was signed and not used."""
        self._signed = None
        self._signed_transfers.clear()
        if self._held:
            self._held = False
            self._native.shm_release(self._handle)

    def join(self, deadline: float) -> None:
        """Take the turn for a send or recv in a thread of its own, together with other such threads."""
        with self._joining:
            if not self._joined:
                code = self._native.shm_hold(self._handle, _nanoseconds(deadline))
                if code:
                    self._outcomes.fail("hold", outcomes.BUSY if code == outcomes.INSIDE else code)
            self._joined += 1

    def part(self, source: int, destination: int) -> None:
        """Give it back, and forget what that transfer was signed with."""
        self._signed_transfers.pop((source, destination), None)
        with self._joining:
            self._joined -= 1
            if not self._joined:
                self._native.shm_release(self._handle)

    def progress(self) -> int:
        """Return -1 while no call runs, else a number that grows from call to call."""
        return int(self._native.shm_progress(self._handle))

    def calls(self) -> int:
        """Return how many collectives this rank has taken part in, each buffer of a call counted."""
        return int(self._native.shm_calls(self._handle))

    def sign(self, signature: bytes, describe: Callable[[], str], claim: Callable[[], None] | None = None) -> None:
        """Say what the ranks must agree on in the next collective: its sequence number (8 bytes) and the rest."""
        self._signed = Signed(signature, requests.words(signature), describe, claim)

    def sign_transfer(
        self, source: int, destination: int, signature: bytes, describe: Callable[[], str],
        claim: Callable[[], None] | None = None,
    ) -> None:
        """Say what two ranks must agree on in the next transfer from ``source`` to ``destination``."""
        self._signed_transfers[source, destination] = Signed(signature, requests.words(signature), describe, claim)

    def agree(self, deadline: float) -> None:
        """Meet all ranks, which must have signed the same."""
        self._collective(self._take(), "agree", requests.BARRIER, None, None, -1, 0, (), deadline)

    def tell(self, error: CollectiveError) -> None:
        """Let the ranks that wait in the segment know why the group broke."""
        self._outcomes.tell(error)

    def abandon(self) -> None:
        """Break the group for every rank, which then look at the control plane for the reason."""
        self._outcomes.abandon()

    def exports(self, tensors: Sequence[Any]) -> bool:
        """Return True if the library can view the tensors."""
        try:
            self._native.shm_export_function()(*tensors)
        except (BufferError, TypeError, ValueError):
            return False
        return True

    def drop(self) -> None:
        """Forget this thread's direct call, interrupted between its steps: it ends at once in a broken group."""
        self._resume()

    def settle(self, name: str, code: int) -> int:
        """End a direct call: see ``SigningBackend``."""
        if code == outcomes.PENDING:
            code = self._resume()
        if code == outcomes.DONE:
            return DIRECT_DONE
        if code in (outcomes.REFUSED, outcomes.BUSY):
            return DIRECT_REFUSED
        if code & 0xFF == outcomes.MISMATCH:
            return code - outcomes.MISMATCH + DIRECT_MISMATCH
        return self._outcomes.fail(name, code)

    def explain(self, signature: bytes, describe: Callable[[], str], deadline: float) -> None:
        """Raise the MismatchError of a direct call."""
        self._outcomes.mismatch(Signed(signature, requests.words(signature), describe), deadline)

    def explain_transfer(
        self, pairs: Sequence[tuple[int, int, bytes, Callable[[], str]]], deadline: float
    ) -> None:
        """Raise the MismatchError of direct transfers."""
        signed = [
            (source, destination, Signed(signature, requests.words(signature), describe))
            for source, destination, signature, describe in pairs
        ]
        self._outcomes.pair_mismatch(signed, deadline)

    def transfers(self, source: int, destination: int) -> int:
        """Return how many transfers there were from ``source`` to ``destination``, one of which is this rank."""
        return int(self._native.shm_transfers(self._handle, source, destination))

    def allreduce(self, buffers: Sequence[BufferView], op: ReduceOp, deadline: float) -> None:
        """Combine in place on every rank, each buffer on its own."""
        signed = self._take()
        for index, buffer in enumerate(buffers or (None,)):
            self._collective(signed, "allreduce", requests.ALLREDUCE, buffer, op, -1, index, (buffer,), deadline)

    def reduce(self, buffers: Sequence[BufferView], root: int, op: ReduceOp, deadline: float) -> None:
        """Combine in place on ``root``; elsewhere the buffers are only read."""
        signed = self._take()
        for index, buffer in enumerate(buffers or (None,)):
            self._collective(signed, "reduce", requests.REDUCE, buffer, op, root, index, (buffer,), deadline)

    def broadcast(self, buffers: Sequence[BufferView], root: int, deadline: float) -> None:
        """Overwrite with ``root``'s elements on the other ranks, each buffer on its own."""
        signed = self._take()
        for index, buffer in enumerate(buffers or (None,)):
            self._collective(signed, "broadcast", requests.BROADCAST, buffer, None, root, index, (buffer,), deadline)

    def allgather(self, outputs: Sequence[BufferView], source: BufferView, deadline: float) -> None:
        """Copy every rank's ``source`` into ``outputs``."""
        self._collective(
            self._take(), "allgather", requests.ALLGATHER, source, None, -1, 0, (*outputs, source), deadline
        )

    def gather(
        self, outputs: Sequence[BufferView] | None, source: BufferView, root: int, deadline: float
    ) -> None:
        """Copy every rank's ``source`` into ``outputs`` of ``root``."""
        views = (*(outputs or ()), source) if self._rank == root else (source,)
        self._collective(self._take(), "gather", requests.GATHER, source, None, root, 0, views, deadline)

    def scatter(
        self, target: BufferView, sources: Sequence[BufferView] | None, root: int, deadline: float
    ) -> None:
        """Copy ``root``'s ``sources`` to their ranks' ``target``."""
        views = (target, *(sources or ())) if self._rank == root else (target,)
        self._collective(self._take(), "scatter", requests.SCATTER, target, None, root, 0, views, deadline)

    def reducescatter(
        self, target: BufferView, sources: Sequence[BufferView], op: ReduceOp, deadline: float
    ) -> None:
        """Combine all ranks' ``sources[rank]`` into ``target``."""
        self._collective(
            self._take(), "reducescatter", requests.REDUCESCATTER, target, op, -1, 0, (target, *sources), deadline
        )

    def alltoall(self, outputs: Sequence[BufferView], sources: Sequence[BufferView], deadline: float) -> None:
        """Copy rank r's ``sources[rank]`` into ``outputs[r]``."""
        self._collective(
            self._take(), "alltoall", requests.ALLTOALL, sources[0], None, -1, 0, (*outputs, *sources), deadline
        )

    def barrier(self, deadline: float) -> None:
        """Return when all ranks have called."""
        self._collective(self._take(), "barrier", requests.BARRIER, None, None, -1, 0, (), deadline)

    def send(self, buffers: Sequence[BufferView], peer: int, deadline: float) -> None:
        """Send each buffer to ``peer``, one after the other; returns when it has come (a short one) or has them."""
        signed = self._signed_transfers.get((self._rank, peer))
        for index, buffer in enumerate(buffers or (None,)):
            self._transfer("send", buffer, peer, signed, None, -1, None, index, deadline)

    def recv(self, buffers: Sequence[BufferView], peer: int, deadline: float) -> None:
        """Receive each buffer from ``peer``, one after the other."""
        signed = self._signed_transfers.get((peer, self._rank))
        for index, buffer in enumerate(buffers or (None,)):
            self._transfer("recv", None, -1, None, buffer, peer, signed, index, deadline)

    def sendrecv(self, source: BufferView, dst: int, target: BufferView, src: int, deadline: float) -> None:
        """Send to ``dst`` and receive from ``src`` at once; both may be one rank."""
        sending = self._signed_transfers.get((self._rank, dst))
        receiving = self._signed_transfers.get((src, self._rank))
        self._transfer("sendrecv", source, dst, sending, target, src, receiving, 0, deadline)

    def close(self) -> None:
        """Leave the segment and unmap it; a call of another thread ends with an error. Idempotent."""
        self._native.shm_close(self._handle)

    def _take(self) -> Signed | None:
        """Return what the next call is signed with; it is not kept, because it keeps the call's tensors."""
        signed, self._signed = self._signed, None
        return signed

    def _collective(
        self, signed: Signed | None, name: str, operation: int, like: BufferView | None, op: ReduceOp | None,
        root: int, index: int, views: Sequence[BufferView | None], deadline: float,
    ) -> None:
        """Run one collective; ``like`` has its count and dtype, None where nothing is moved."""
        if signed is None:
            dtype, count = (None, 0) if like is None else (like.dtype, like.count)
            words = requests.own_words(operation, dtype, count, op, root)
            signed = outcomes.unsigned(name, words, like, op, "" if root < 0 else f"root {root}")
        moved = [view for view in views if view is not None]
        request = requests.collective(
            requests.BARRIER if like is None else operation, like, op, root, signed.words, index, moved
        )
        code = self._call(request, moved, None if index else signed.claim, deadline)
        if code == outcomes.MISMATCH:
            self._outcomes.mismatch(signed, deadline)
        elif code:
            self._outcomes.fail(name, code)

    def _transfer(
        self, name: str, source: BufferView | None, dst: int, sending: Signed | None, target: BufferView | None,
        src: int, receiving: Signed | None, index: int, deadline: float,
    ) -> None:
        """Run one transfer to ``dst``, one from ``src``, or both at once; -1 stands for none."""
        gives = sending or _unsigned_transfer(source, self._rank, dst)
        takes = receiving or _unsigned_transfer(target, src, self._rank)
        request = requests.transfer(source, dst, gives.words, target, src, takes.words, index, self._joined > 0)
        moved = [view for view in (source, target) if view is not None]
        code = self._call(request, moved, None if index else takes.claim, deadline)
        if code == outcomes.MISMATCH:
            sent, received = requests.differing(request)
            if self._joined:
                ends = (self._rank, dst, gives) if sent else (src, self._rank, takes)
                self._outcomes.mismatch_beside(*ends, deadline)
            pairs = [(self._rank, dst, gives)] if sent else []
            self._outcomes.pair_mismatch([*pairs, (src, self._rank, takes)] if received else pairs, deadline)
        elif code:
            self._outcomes.fail(name, code)

    def _call(
        self, request: array.array[int], views: Sequence[BufferView], claim: Callable[[], None] | None, deadline: float
    ) -> int:
        """Run a request; ``claim`` may move its views once the ranks agree."""
        def agreed() -> None:
            assert claim is not None
            claim()
            requests.rebase(request, views)

        held = self._held or self._joined > 0
        if not held and not self.hold(deadline):  # a call that no group makes, but another backend
            self._outcomes.fail("hold", outcomes.BUSY)
        try:
            address = request.buffer_info()[0]
            return int(self._run(self._handle, address, _nanoseconds(deadline), None if claim is None else agreed))
        except BaseException:  # a signal's exception, or what claim raised
            self._outcomes.abandon()
            raise
        finally:
            if not held:
                self.release()


def _nanoseconds(deadline: float) -> int:
    return _NEVER_NS if math.isinf(deadline) else int(deadline * 1e9)


def _unsigned_transfer(view: BufferView | None, source: int, destination: int) -> Signed:
    dtype, count = (None, 0) if view is None else (view.dtype, view.count)
    words = requests.own_words(requests.TRANSFER, dtype, count, None, -1)
    return outcomes.unsigned(f"transfer from rank {source} to rank {destination}", words, view, None)
