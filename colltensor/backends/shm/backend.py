"""ShmBackend: every collective in memory that the ranks of one host share.

The native library does the work on the tensors' own memory. Here a call is packed, and what it comes to is turned
into results and errors.

Imports no framework.
"""

from __future__ import annotations

import array
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from colltensor.backends.base import require
from colltensor.backends.shm import outcomes, requests
from colltensor.backends.shm.outcomes import AgreeingControl, Outcomes, Signed
from colltensor.backends.shm.segment import Segment
from colltensor.errors import CollectiveError
from colltensor.types import DType, ReduceOp
from colltensor.view import BufferView

DONE: Final = 0
GENERAL: Final = 1
MISMATCH: Final = 2
"""What ``ShmBackend.fast_allreduce`` returns."""

_NEVER_NS: Final = (1 << 63) - 1


class ShmBackend:
    """Collectives between the ranks of one host.

    The ranks agree inside the segment, on arrival and before anything is written: ``sign`` and ``sign_transfer``
    say what on. A call that nobody signed is compared by operation, dtype, count, op and root.
    """

    name = "shm"
    device_types = frozenset({"cpu"})
    takes_strided = True
    agrees = False

    require = staticmethod(require)

    def __init__(self, control: AgreeingControl, segment: Segment) -> None:
        self._rank = control.rank
        self._size = control.world_size
        self._native = segment.library
        self._handle = segment.handle
        self._run = segment.library.shm_run
        self._resume = segment.library.shm_resume
        self._signed: Signed | None = None
        self._signed_transfers: dict[tuple[int, int], Signed] = {}
        self._outcomes = Outcomes(control, segment.library, segment.handle)
        segment.stop.append(self._outcomes.stop)
        # One function, twice: Python asks each object on its own whether it gives up the interpreter lock.
        self._brief: Any = segment.library.get_function("shm_allreduce_tensor")
        self._brief.release_gil = False
        self._long: Any = segment.library.get_function("shm_allreduce_tensor")
        self._crowded = segment.crowded

    def emulates(self, operation: str, dtype: DType, op: ReduceOp | None) -> bool:
        """Nothing is converted: 16-bit floats are widened in registers."""
        return False

    def sign(self, signature: bytes, describe: Callable[[], str]) -> None:
        """Say what the ranks must agree on in the next collective: its sequence number (8 bytes) and the rest."""
        self._signed = Signed(signature, requests.words(signature), describe)

    def sign_transfer(self, source: int, destination: int, signature: bytes, describe: Callable[[], str]) -> None:
        """Say what two ranks must agree on in the next transfer from ``source`` to ``destination``."""
        self._signed_transfers[source, destination] = Signed(signature, requests.words(signature), describe)

    def tell(self, error: CollectiveError) -> None:
        """Let the ranks that wait in the segment know why the group broke."""
        self._outcomes.tell(error)

    def fast_allreduce(self, tensor: Any, op: int, timeout_s: float) -> int:
        """Combine a framework's contiguous CPU tensor in place, without a view.

        The signature is that of a single tensor with ``copy=None``; the other ranks may come any way they like.

        Args:
            tensor: A tensor that may be written and whose framework has nothing to add to what DLPack says.
            op: The reduce op.
            timeout_s: How long to wait for the other ranks.

        Returns:
            ``DONE``; ``GENERAL`` if nothing was begun and the call must go the general way; ``MISMATCH`` if all
            ranks found that they disagree: then ``explain`` must follow.

        Raises:
            CollectiveError: As every collective.
        """
        try:
            if self._crowded:
                code = self._long(self._handle, tensor, op, _nanoseconds(time.monotonic() + timeout_s))
            else:
                code = self._brief(self._handle, tensor, op, 0)
                if code == outcomes.LARGE:
                    code = self._long(self._handle, tensor, op, _nanoseconds(time.monotonic() + timeout_s))
                elif code == outcomes.PENDING:
                    code = self._resume(self._handle, _nanoseconds(time.monotonic() + timeout_s))
        except (BufferError, TypeError, ValueError):  # what the conversion to DLPack raises, before anything has begun
            return GENERAL
        except BaseException:
            self._outcomes.abandon()
            raise
        if code == outcomes.DONE:
            return DONE
        if code == outcomes.REFUSED:
            return GENERAL
        if code == outcomes.MISMATCH:
            return MISMATCH
        return self._outcomes.fail("allreduce", code)

    def explain(self, signature: bytes, describe: Callable[[], str], deadline: float) -> None:
        """Raise the MismatchError of a call that came back as ``MISMATCH``."""
        self._outcomes.mismatch(Signed(signature, requests.words(signature), describe), deadline)

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
        """Send each buffer to ``peer``, one after the other; returns when it has them."""
        signed = self._signed_transfers.pop((self._rank, peer), None)
        for index, buffer in enumerate(buffers or (None,)):
            self._transfer("send", buffer, peer, signed, None, -1, None, index, deadline)

    def recv(self, buffers: Sequence[BufferView], peer: int, deadline: float) -> None:
        """Receive each buffer from ``peer``, one after the other."""
        signed = self._signed_transfers.pop((peer, self._rank), None)
        for index, buffer in enumerate(buffers or (None,)):
            self._transfer("recv", None, -1, None, buffer, peer, signed, index, deadline)

    def sendrecv(self, source: BufferView, dst: int, target: BufferView, src: int, deadline: float) -> None:
        """Send to ``dst`` and receive from ``src`` at once; both may be one rank."""
        sending = self._signed_transfers.pop((self._rank, dst), None)
        receiving = self._signed_transfers.pop((src, self._rank), None)
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
        request = requests.collective(
            requests.BARRIER if like is None else operation, like, op, root, signed.words, index,
            [view for view in views if view is not None],
        )
        code = self._call(request, deadline)
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
        request = requests.transfer(source, dst, gives.words, target, src, takes.words, index)
        code = self._call(request, deadline)
        if code == outcomes.MISMATCH:
            sent, received = requests.differing(request)
            pairs = [(self._rank, dst, gives)] if sent else []
            self._outcomes.pair_mismatch([*pairs, (src, self._rank, takes)] if received else pairs, deadline)
        elif code:
            self._outcomes.fail(name, code)

    def _call(self, request: array.array[int], deadline: float) -> int:
        try:
            return int(self._run(self._handle, request.buffer_info()[0], _nanoseconds(deadline)))
        except BaseException:  # a signal's exception
            self._outcomes.abandon()
            raise


def _nanoseconds(deadline: float) -> int:
    return _NEVER_NS if math.isinf(deadline) else int(deadline * 1e9)


def _unsigned_transfer(view: BufferView | None, source: int, destination: int) -> Signed:
    dtype, count = (None, 0) if view is None else (view.dtype, view.count)
    words = requests.own_words(requests.TRANSFER, dtype, count, None, -1)
    return outcomes.unsigned(f"transfer from rank {source} to rank {destination}", words, view, None)
