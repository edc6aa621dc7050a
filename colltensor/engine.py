"""Engine: runs the calls of one group in order; agreement first, then the payload, then the verdict."""

from __future__ import annotations

import functools
import logging
import os
import struct
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Final, NamedTuple, NoReturn

from colltensor.backends.base import (
    AgreeingBackend,
    PendingOperation,
    PiggybackingBackend,
    QueueingBackend,
)
from colltensor.buffers import Buffers
from colltensor.control import Control
from colltensor.control.messages import REFUSED
from colltensor.errors import (
    CollectiveError,
    CollectiveTimeoutError,
    DeviceError,
    GroupError,
    MismatchError,
    PeerLostError,
    is_from_handler,
    say_timed_out,
    without_frames,
)
from colltensor.operation_queue import OperationQueue
from colltensor.operations import CODES
from colltensor.types import ReduceOp
from colltensor.work import QueuedWork, Work, consequence, nested

_SIGNATURE: Final = struct.Struct("<QBBhBQQ")
"""Sequence number, operation, reduce op, root, whether leaves are fused, count, leaves."""
_NO_OP: Final = 255
_NEVER: Final = float("inf")
_log: Final = logging.getLogger(__name__)
_CLOSE_TIMEOUT_S: Final = 5.0
_PACKAGE: Final = os.path.dirname(__file__) + os.sep


class Transfer(NamedTuple):
    """One point-to-point transfer of a call.

    Attributes:
        source: The rank that sends.
        destination: The rank that receives.
        buffers: What this rank sends or receives into.
        move: Moves this transfer alone, given the deadline.
    """

    source: int
    destination: int
    buffers: Buffers
    move: Callable[[float], None]


class Call:
    """One checked call: what the ranks must agree on, what it moves, what it returns.

    Attributes:
        name: The operation.
        argument: The argument whose dtypes, counts and paths must be equal on all ranks, or None.
        op: The reduce op, or None.
        root: The root's rank, or -1.
        fused: Whether small leaves share transfers.
        buffers: The arguments to allocate_result and load before the payload and to store after it.
        move: Moves the payload: called with ``arguments`` and the deadline.
        arguments: What ``move`` gets.
        result: Returns what the call returns.
        transfers: For point-to-point calls, what travels between which two ranks.
    """

    __slots__ = (
        "argument",
        "arguments",
        "buffers",
        "fused",
        "move",
        "name",
        "op",
        "result",
        "root",
        "transfers",
    )

    def __init__(
        self,
        name: str,
        argument: Buffers | None,
        op: ReduceOp | None,
        root: int,
        fused: bool,
        buffers: Sequence[Buffers],
        move: Callable[..., Any],
        arguments: tuple[Any, ...],
        result: Callable[[], Any],
        transfers: Sequence[Transfer] | None = None,
    ) -> None:
        self.name = name
        self.argument = argument
        self.op = op
        self.root = root
        self.fused = fused
        self.buffers = buffers
        self.move = move
        self.arguments = arguments
        self.result = result
        self.transfers = transfers

    def allocate_result(self) -> None:
        """Make the results of immutable tensors."""
        for buffers in self.buffers:
            buffers.allocate_result()

    def streams(self) -> set[int | None]:
        """Return the streams that must come after the call, on a device; None among them for the host."""
        return set().union(*(buffers.streams() for buffers in self.buffers))

    def signature(self, sequence: int) -> bytes:
        """Return what must be equal on all ranks, packed."""
        argument = self.argument
        count, leaves = (0, 0) if argument is None else (argument.count(), argument.leaves_hash())
        op = _NO_OP if self.op is None else self.op
        return _SIGNATURE.pack(sequence, CODES[self.name], op, self.root, self.fused, count, leaves)

    def describe(self, sequence: int) -> str:
        """Return what ``signature`` packs, in words."""
        parts = [f"{self.name} #{sequence}"]
        parts += [] if self.argument is None else [self.argument.describe()]
        parts += [] if self.op is None else [f"op {self.op.name}"]
        parts += [] if self.root < 0 else [f"root {self.root}"]
        parts += [] if self.fused else ["copy=False"]
        return ", ".join(parts)


class Refusal(Call):
    """What a rank calls in the place of a call that it has refused: no other call agrees with it.

    Attributes:
        words: Which call it refused, and why.
    """

    __slots__ = ("words",)

    def __init__(self, name: str, root: int, error: BaseException) -> None:
        super().__init__(
            "refusal", None, None, root, True, (), lambda deadline: None, (), lambda: None
        )
        self.words = f"{REFUSED}{name}: {type(error).__name__}: {error}"

    def describe(self, sequence: int) -> str:
        """Return why, in words."""
        return self.words


class Engine:
    """Runs one group's calls. Any thread may submit; calls run one at a time in the order of issue.

    Attributes:
        broken: The error that broke the group, or None.
        before: Called first in every call, in the caller's thread, or None.
        queue: The order of the calls.
        device: The backend of tensors that are on a device, or None.
        check_device: Whether the ranks agree before each call of it.
        timeout_s: How long a call waits for other ranks.
    """

    def __init__(
        self,
        name: str,
        rank: int,
        control: Control | None,
        needs_agreement: bool,
        timeout_s: float,
        agreeing: AgreeingBackend | None = None,
        piggybacking: PiggybackingBackend | None = None,
        crosses: bool = False,
    ) -> None:
        self._name = name
        self._rank = rank
        self._control = control
        self._needs_agreement = needs_agreement
        self._agreeing = agreeing
        self._piggybacking = piggybacking
        self._crosses = crosses
        self._alone = control is None
        self.timeout_s = timeout_s
        self.queue = OperationQueue(name, None if agreeing is None else agreeing.queue, rank)
        if agreeing is not None:
            self.queue.is_in_fast_call = self._is_in_fast_call
        self._sequence = 0
        self._kept: list[object] = []
        self.device: QueueingBackend | None = None
        self.check_device = False
        self._device_sequence = 0
        self.broken: CollectiveError | None = None
        self._unraised: CollectiveError | None = None
        self.before: Callable[[], None] | None = None
        _engines.add(self)

    def run(
        self,
        async_op: bool,
        name: str,
        argument: Buffers | None,
        op: ReduceOp | None,
        root: int,
        fused: bool,
        buffers: Sequence[Buffers],
        move: Callable[..., Any],
        arguments: tuple[Any, ...],
        result: Callable[[], Any],
        transfers: Sequence[Transfer] | None = None,
    ) -> Any:
        """Run a call, whose parts are ``Call``'s attributes.

        Returns:
            What the call returns, or with ``async_op`` the Work that will have it.
        """
        if self.before is not None:
            self.before()
        device = self.device
        if device is not None and buffers and _is_on(device, buffers[0]):
            call = Call(
                name, argument, op, root, fused, buffers, move, arguments, result, transfers
            )
            return self._run_on_device(call, device, async_op)
        queue = self.queue
        # one rank: nobody to agree with or to notify
        if self._alone and not async_op and queue.enter():
            try:
                for buffer in buffers:
                    buffer.allocate_result()
                    buffer.load()
                move(*arguments, _NEVER)
                for buffer in buffers:
                    buffer.store()
                return result()
            finally:
                queue.turn.release()
                queue.pass_on()
        return self._submit(
            Call(name, argument, op, root, fused, buffers, move, arguments, result, transfers),
            async_op,
        )

    def refuse(self, name: str, root: int, argument: Buffers | None, error: BaseException) -> None:
        """Notify the other ranks that this one refuses its part of a call, over which theirs then end in MismatchError.

        For what this rank alone can get wrong, by its role in the call. Waits for nobody: it is a call in the
        background, and what this rank calls next comes after it.

        Args:
            name: The operation.
            root: The call's root.
            argument: What this rank has in common with the others, None where it is no tensor.
            error: Why.
        """
        device = self.device
        if self._control is None or self.broken is not None:
            return
        if device is not None and argument is not None and _is_on(device, argument):
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
        """Return the handle of a call that waits for its turn, which transfers with other peers or directions share."""
        transfers, control = call.transfers, self._control
        if not self._crosses or transfers is None or len(transfers) != 1 or control is None:
            return Work(call.name, lambda: self._execute_queued(call))
        work = Work(call.name, lambda: self._execute_beside(call, transfers[0], control))
        work.lane = transfers[0].source, transfers[0].destination
        return work

    def _run_on_device(self, call: Call, device: QueueingBackend, async_op: bool) -> Any:
        """Queue a call on a device, in this thread unless others are before it."""
        if self.broken is not None:
            raise self._refusal(call.name)
        if not async_op and self.queue.enter():
            try:
                pending = self._launch(call, device, False)
            finally:
                self.queue.turn.release()
                self.queue.pass_on()
            pending.order(call.streams())
            return call.result()
        work = QueuedWork(
            call.name,
            lambda: self._launch_queued(call, device, async_op),
            call.streams,
            call.result,
        )
        if not async_op or not self.queue.enter():
            work.postpone()
            return self.queue.put(work) if async_op else self.queue.run(work)
        try:
            work.queue_here()
        finally:
            self.queue.turn.release()
            self.queue.pass_on()
        return work

    def _launch_queued(self, call: Call, device: QueueingBackend, apart: bool) -> PendingOperation:
        if self.broken is not None:
            raise self._consequence(call.name)
        return self._launch(call, device, apart)

    def _launch(self, call: Call, device: QueueingBackend, apart: bool) -> PendingOperation:
        if self.broken is not None:
            raise self._refusal(call.name)
        deadline = time.monotonic() + self.timeout_s
        peers = None
        if call.transfers is not None:
            peers = [t.destination if t.source == self._rank else t.source for t in call.transfers]
        try:
            if self._control is not None and self.check_device:
                device.refuse(
                    call.name, [view for buffers in call.buffers for view in buffers.views], peers
                )
                self._agree_on_device(call, device, self._control, deadline)
            call.allocate_result()
            move = functools.partial(call.move, *call.arguments, deadline)
            return _queue(device, call, call.buffers, peers, apart, move, deadline)
        except (MismatchError, DeviceError):
            # nothing was queued; a tensor's device concerns this rank alone
            raise
        except BaseException as error:
            self._kept.append(call)
            self._break(call.name, error)
            raise

    def allreduce_at_once(self, buffers: Buffers, op: ReduceOp) -> bool:
        """Queue an allreduce of one tensor on a device with as little as it takes; False if it needs ``run``."""
        if self.before is not None:
            self.before()
        device = self.device
        if (
            device is None
            or self.check_device
            or self.broken is not None
            or buffers.allocates
            or buffers.staged
            or not _is_on(device, buffers)
            or not self.queue.enter()
        ):
            return False
        try:
            pending = device.allreduce_at_once(buffers.views[0], op)
            if pending is not None:
                buffers.store()
        except BaseException as error:
            self._kept.append(buffers)
            self._break("allreduce", error)
            raise
        finally:
            self.queue.turn.release()
            self.queue.pass_on()
        if pending is None:
            return False
        pending.order(buffers.streams())
        return True

    def _agree_on_device(
        self, call: Call, device: QueueingBackend, control: Control, deadline: float
    ) -> None:
        """Let the ranks agree on a call before it is queued; counted apart from the calls of host tensors."""
        if call.transfers is not None:
            self._agree_on_transfers(call, call.transfers, control, deadline, device)
            return
        self._device_sequence += 1
        sequence = self._device_sequence
        control.position(sequence, call.name)
        try:
            control.agree(call.signature(sequence), lambda: call.describe(sequence), deadline)
        finally:
            control.position(sequence, None)

    def device_failed(self, error: CollectiveError) -> None:
        """Break the group over what went wrong on a device after a call had returned; the next call raises it."""
        if self.broken is None:
            self.broken, self._unraised = without_frames(error), error
            _log.info("group %r (rank %d): broken: %s", self._name, self._rank, error)
        self._notify_all(error)

    def _notify_all(self, error: CollectiveError) -> None:
        """Let the call of every rank that waits end with an error, and the group be broken for it."""
        if self._control is not None:
            self._control.fail(error)
        if self._agreeing is not None:
            self._agreeing.propagate_failure(error)

    def _is_in_call(self) -> bool:
        """Return whether a call of host tensors has begun and not ended, in whichever thread."""
        if self._control is not None and self._control.is_in_call():
            return True
        return self._agreeing is not None and self._agreeing.progress() >= 0

    def progress(self) -> tuple[int, ...] | None:
        """Return None while no call of host tensors runs or waits, else what changes from call to call."""
        fast = -1 if self._agreeing is None else self._agreeing.progress()
        if fast < 0 and not self.queue.is_busy():
            return None
        return fast, self._sequence, 0 if self._control is None else self._control.pairs()

    def close(self, how: str) -> None:
        """Fail what waits and drop everything; a call that runs in another thread ends with an error that says how."""
        gone = GroupError(f"group '{self._name}' (rank {self._rank}) {how}")
        self._alone = False
        leaves = self.broken is None and self._is_in_call()
        # in a signal's handler: the call goes on, and ends, when this returns
        inside = self.queue.is_inside()
        self.broken = self.broken or gone
        self._unraised = None
        if self._control is not None:
            if leaves:  # the others do not all wait for this rank, and would not notice
                self._notify_all(
                    PeerLostError(
                        f"group '{self._name}': rank {self._rank} left the group in the middle of a call",
                        (self._rank,),
                    )
                )
            self._control.close(waits=not inside)
        self.queue.close(gone, 0.0 if inside else _CLOSE_TIMEOUT_S)
        self._kept.clear()

    def _execute_queued(self, call: Call) -> Any:
        if self.broken is not None:
            raise self._consequence(call.name)
        return self._execute(call)

    def _execute(self, call: Call) -> Any:
        if self.broken is not None:
            raise self._refusal(call.name)
        deadline = time.monotonic() + self.timeout_s
        agreeing, piggybacking = self._agreeing, self._piggybacking
        combine: Callable[[], None] | None = None
        inside = False
        try:
            if self._control is not None:
                if agreeing is not None:
                    held = agreeing.hold(deadline)
                    inside = not held and self._is_in_fast_call()
                    if inside:
                        raise nested(call.name, self._name)
                    if not held:
                        raise GroupError(
                            f"{call.name}: group '{self._name}' (rank {self._rank}): a call was interrupted before it "
                            "ended; make one at a time"
                        )
                    self._sign(call, self._control, agreeing, deadline)
                elif (
                    piggybacking is not None
                    and call.name == "allreduce"
                    and piggybacking.piggybacks(*call.arguments)
                ):
                    combine = self._agree_and_gather(call, self._control, piggybacking, deadline)
                elif self._needs_agreement or not call.buffers:
                    self._agree(call, self._control, deadline)
            if agreeing is None:
                call.allocate_result()
            if combine is not None:
                combine()
            else:
                for buffers in call.buffers:
                    buffers.load()
                call.move(*call.arguments, deadline)
            for buffers in call.buffers:
                buffers.store()
        except MismatchError:
            raise
        except BaseException as error:
            if not inside:
                # a provider may still write to the memory of a call that failed
                self._kept.append(call)
                self._break(call.name, error)
            raise
        finally:
            if not inside:
                if agreeing is not None:
                    agreeing.release()
                if self._control is not None:
                    self._control.position(self._sequence, None)
        return call.result()

    def _execute_beside(self, call: Call, transfer: Transfer, control: Control) -> Any:
        """Run a send or a recv while other threads run others; nothing else runs meanwhile."""
        if self.broken is not None:
            raise self._consequence(call.name)
        deadline = time.monotonic() + self.timeout_s
        source, destination, buffers, move = transfer
        agreeing, joined = self._agreeing, False
        peer, signature, describe = self._transfer_signature(transfer, call.fused, control)
        control.cross(source, destination, f"{call.name} with rank {peer}")
        try:
            if agreeing is None:
                control.agree_beside(peer, signature, describe, deadline, source)
                buffers.allocate_result()
            else:
                agreeing.join(deadline)
                joined = True
                allocate_result = buffers.allocate_result if buffers.allocates else None
                agreeing.set_transfer_signature(
                    source, destination, signature, describe, allocate_result
                )
            buffers.load()
            move(deadline)
            buffers.store()
        except MismatchError:
            raise
        except BaseException as error:
            self._kept.append(call)
            self._break(call.name, error)
            raise
        finally:
            if joined and agreeing is not None:
                agreeing.part(source, destination)
            control.cross(source, destination, None)
        return call.result()

    def _is_in_fast_call(self) -> bool:
        """Return whether this thread is in a call that took no turn of the queue's, and that will go on."""
        agreeing = self._agreeing
        assert agreeing is not None
        return agreeing.is_inside() or (agreeing.is_pending() and self._has_call_above())

    def _has_call_above(self) -> bool:
        """Return whether a call of the group is further up the stack, beyond what has called this one."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        while frame is not None:
            ours = frame.f_code.co_filename.startswith(_PACKAGE)
            if ours and getattr(frame.f_locals.get("self"), "_engine", None) is self:
                return True
            frame = frame.f_back
        return False

    def check(self, name: str) -> None:
        """Raise GroupError if the group is broken or destroyed."""
        if self.broken is not None:
            raise self._refusal(name)

    def check_issued(self, name: str) -> None:
        """Raise what a call fails with that was issued before the group broke, or was destroyed, if it is."""
        if self.broken is not None:
            raise self._consequence(name)

    def signatures(
        self, transfers: Sequence[Transfer]
    ) -> list[tuple[int, int, bytes, Callable[[], str]]]:
        """Return source, destination, signature and words of transfers that were made already."""
        return [
            (
                transfer.source,
                transfer.destination,
                *self._transfer_signature(transfer, True, None)[1:],
            )
            for transfer in transfers
        ]

    def abort(self, name: str, error: BaseException) -> NoReturn:
        """Break the group over what a fast call raised, and raise what the caller gets."""
        found = self._verdict(name, error)
        if self._agreeing is not None:
            self._agreeing.abandon_pending()
        if found is error:
            raise error
        raise found from error

    def _agree(self, call: Call, control: Control, deadline: float) -> None:
        """Let the ranks concerned agree on a call; returns once they have all arrived.

        Raises:
            MismatchError: On every rank; no data was changed.
            PeerLostError: A rank died or left.
            CollectiveTimeoutError: A rank did not come before the deadline.
        """
        if call.transfers is not None:
            self._agree_on_transfers(call, call.transfers, control, deadline)
            return
        self._sequence += 1
        sequence = self._sequence
        control.position(sequence, call.name, control.others)
        control.agree(call.signature(sequence), lambda: call.describe(sequence), deadline)

    def _agree_and_gather(
        self, call: Call, control: Control, piggybacking: PiggybackingBackend, deadline: float
    ) -> Callable[[], None]:
        """Let all ranks agree on an allreduce whose payload travels with the signature; return what combines it.

        Nothing was written to but staging memory: results are allocated in between.

        Raises:
            CollectiveError: As ``_agree``.
        """
        self._sequence += 1
        sequence = self._sequence
        control.position(sequence, call.name, control.others)
        for buffers in call.buffers:
            buffers.check()
            buffers.load()
        transfers, op = call.arguments
        contributions = control.agree_and_gather(
            call.signature(sequence),
            piggybacking.pack(transfers),
            lambda: call.describe(sequence),
            deadline,
        )
        return lambda: piggybacking.unpack(transfers, op, contributions)

    def _sign(
        self, call: Call, control: Control, agreeing: AgreeingBackend, deadline: float
    ) -> None:
        """Hand the backend what the ranks concerned must agree on, because it compares while they arrive.

        What moves on the control plane is agreed through the backend as well, so that it meets every other call.
        """
        allocate_result = (
            call.allocate_result if any(buffers.allocates for buffers in call.buffers) else None
        )
        if call.transfers is None:
            sequence = self._sequence = agreeing.calls() + 1  # fast calls are counted there alone
            control.position(sequence, call.name)
            agreeing.set_signature(
                call.signature(sequence), lambda: call.describe(sequence), allocate_result
            )
            if not call.buffers and call.name != "barrier":
                agreeing.agree(deadline)
            return
        for transfer in call.transfers:
            peer, signature, describe = self._transfer_signature(transfer, call.fused, control)
            control.position(self._sequence, f"{call.name} with rank {peer}")
            agreeing.set_transfer_signature(
                transfer.source, transfer.destination, signature, describe, allocate_result
            )

    def _transfer_signature(
        self, transfer: Transfer, fused: bool, control: Control | None
    ) -> tuple[int, bytes, Callable[[], str]]:
        """Return the peer of a transfer, its signature, and the signature in words."""
        source, destination, buffers, _ = transfer
        fused = fused or len(buffers.views) == 1  # one tensor travels alone either way
        peer = destination if source == self._rank else source
        if self._agreeing is not None:  # fast calls are counted there alone
            number = self._agreeing.transfers(source, destination) + 1
        else:
            number = 1 if control is None else control.transfers(peer, source) + 1
        signature = _SIGNATURE.pack(
            number, CODES["transfer"], _NO_OP, source, fused, buffers.count(), buffers.leaves_hash()
        )
        return peer, signature, _describer(number, transfer, fused)

    def _agree_on_transfers(
        self,
        call: Call,
        transfers: Sequence[Transfer],
        control: Control,
        deadline: float,
        device: QueueingBackend | None = None,
    ) -> None:
        """Start all agreements before waiting for one; both ends of a pair take them in one order.

        Where one of two transfers is agreed and the other is not, the agreed one is made, because its other end
        goes on with it; then the mismatch is raised.
        """
        started = []
        peers = [t.destination if t.source == self._rank else t.source for t in transfers]
        for transfer in sorted(transfers, key=lambda transfer: transfer[:2]):
            peer, signature, describe = self._transfer_signature(transfer, call.fused, control)
            control.position(self._sequence, f"{call.name} with rank {peer}", peers)
            # else this rank both sends and receives: no peer waits for what it lacks
            bound = peers.count(peer) == 1
            control.start_pair(peer, signature, describe, deadline, transfer.source, bound)
            started.append((transfer, peer, signature, describe))
        mismatch: MismatchError | None = None
        agreed = []
        for transfer, peer, signature, describe in started:
            try:
                control.finish_pair(
                    peer, signature, describe, deadline, transfer.source, peers.count(peer) == 1
                )
                agreed.append(transfer)
            except MismatchError as error:
                mismatch = error
        if mismatch is not None:
            for transfer in agreed:
                self._make_alone(call, transfer, deadline, device)
            raise mismatch

    def _make_alone(
        self, call: Call, transfer: Transfer, deadline: float, device: QueueingBackend | None
    ) -> None:
        """Make one transfer of a call; on a device, what this thread queues next comes after it."""
        source, destination, buffers, move = transfer
        buffers.allocate_result()
        peers = [destination if source == self._rank else source]
        if device is not None:
            pending = _queue(
                device, call, (buffers,), peers, False, functools.partial(move, deadline), deadline
            )
            pending.order(buffers.streams())
            return
        buffers.load()
        move(deadline)
        buffers.store()

    def _refusal(self, name: str) -> CollectiveError:
        """Return what a call on a broken group raises: once what has broken it, if no call has raised that."""
        unraised, self._unraised = self._unraised, None
        if unraised is not None:
            return unraised
        error = GroupError(
            f"{name}: group '{self._name}' (rank {self._rank}) cannot be used any more: {self.broken}; destroy it "
            "and make it again on all ranks"
        )
        error.__cause__ = self.broken
        return error

    def _consequence(self, name: str) -> CollectiveError:
        """Return what a call fails with that was issued before the group broke: the same class, with the same ranks."""
        lost = (
            None
            if self._unraised is not None
            else consequence(name, self._name, self._rank, self.broken)
        )
        return lost or self._refusal(name)

    def _break(self, name: str, error: BaseException) -> None:
        """Break the group over ``error``; raises what the caller gets unless it is that."""
        found = self._verdict(name, error)
        if found is not error:
            raise found from error

    def _verdict(self, name: str, error: BaseException) -> BaseException:
        """Break the group over ``error``, notify the peers, and return what the caller gets."""
        control = self._control
        if control is None:
            return error
        if self.broken is not None:
            return without_frames(self.broken)
        found = verdict(control, name, error)
        if isinstance(found, CollectiveTimeoutError):
            say_timed_out(found, self.timeout_s)
        self.broken = without_frames(found)
        _log.info("group %r (rank %d): broken: %s", self._name, self._rank, self.broken)
        self._notify_all(found)
        interrupted = not isinstance(error, (RuntimeError, OSError)) or is_from_handler(error)
        return error if interrupted else found


def verdict(control: Control, operation: str, error: BaseException) -> CollectiveError:
    """Return what a failure of a backend means for the group; asks the other ranks where it does not say."""
    if not is_from_handler(error):
        if isinstance(error, CollectiveError):
            return error
        if isinstance(error, (RuntimeError, OSError)):
            return control.diagnose(operation, None if isinstance(error, TimeoutError) else error)
    return GroupError(
        f"{operation}: rank {control.rank} was interrupted by {type(error).__name__} {error}".rstrip()
    )


def _queue(
    device: QueueingBackend,
    call: Call,
    arguments: Sequence[Buffers],
    peers: Sequence[int] | None,
    apart: bool,
    move: Callable[[], Any],
    deadline: float,
) -> PendingOperation:
    """Queue a call, or the part of it that concerns some of its arguments, on a device."""
    views = (
        arguments[0].views
        if len(arguments) == 1
        else [view for buffers in arguments for view in buffers.views]
    )
    stages = any(buffers.staged for buffers in arguments)
    try:
        pending = device.begin(call.name, views, peers, apart, call, stages, deadline)
        for buffers in arguments:
            buffers.load()
        move()
        for buffers in arguments:
            buffers.store()
        device.end()
    except BaseException as error:
        device.cancel(error)
        raise
    return pending


def _is_on(device: QueueingBackend, buffers: Buffers) -> bool:
    return bool(buffers.views) and buffers.views[0].device.type in device.device_types


def _describer(number: int, transfer: Transfer, fused: bool) -> Callable[[], str]:
    source, destination, buffers, _ = transfer
    how = "" if fused else ", copy=False"
    return lambda: (
        f"transfer #{number} from rank {source} to rank {destination}, {buffers.describe()}{how}"
    )


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _disown() -> None:
    """Refuse the parent's groups in a forked child, which shares their sockets and must not use them."""
    for engine in _engines:
        engine._alone = False
        engine.queue.disown()
        engine._unraised = None
        engine.broken = GroupError(
            "it belongs to the parent process; a forked child makes groups of its own"
        )


os.register_at_fork(after_in_child=_disown)
