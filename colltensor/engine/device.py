"""Calls that are queued on a device.

The caller goes on, and the device, or the host, waits later.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

from colltensor.backends.base import PendingOperation, QueueingBackend
from colltensor.buffers import Buffers
from colltensor.control import Control
from colltensor.engine.agreement import Agreement
from colltensor.engine.call import Call, Transfer
from colltensor.engine.failure import Breakable
from colltensor.errors import DeviceError, MismatchError
from colltensor.operation_queue import OperationQueue
from colltensor.types import ReduceOp
from colltensor.work import QueuedWork


class DeviceCalls(Breakable):
    """The part of the engine that queues calls on a device.

    Attributes:
        before: Called first in every call, in the caller's thread, or None.
        queue: The order of the calls.
        device: The backend of tensors that are on a device, or None.
        check_device: Whether the ranks agree before each call of it.
    """

    def __init__(
        self,
        name: str,
        rank: int,
        control: Control | None,
        agreement: Agreement,
        timeout_s: float,
        queue: OperationQueue,
    ) -> None:
        super().__init__(name, rank, control, agreement, timeout_s)
        self.queue = queue
        self.before: Callable[[], None] | None = None
        self.device: QueueingBackend | None = None
        self.check_device = False
        self._device_sequence = 0

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
            peers = [self._agreement.peer(transfer) for transfer in call.transfers]

        try:
            if self._control is not None and self.check_device:
                views = [view for buffers in call.buffers for view in buffers.views]
                device.refuse(call.name, views, peers)
                self._agree_on_device(call, device, self._control, deadline)
            call.allocate_result()
            move = functools.partial(call.move, *call.arguments, deadline)
            return _queue_on(device, call, call.buffers, peers, apart, move, deadline)
        except (MismatchError, DeviceError):
            # nothing was queued; a tensor's device concerns this rank alone
            raise
        except BaseException as error:
            self._break(call.name, error, call)
            raise

    def allreduce_at_once(self, buffers: Buffers, op: ReduceOp) -> bool:
        """Queue an allreduce of one tensor on a device with as little as it takes.

        Returns False if the call needs ``run``.
        """
        if self.before is not None:
            self.before()

        device = self.device
        if (
            device is None
            or self.check_device
            or self.broken is not None
            or buffers.allocates
            or buffers.staged
            or not is_on(device, buffers)
            or not self.queue.enter()
        ):
            return False

        try:
            pending = device.allreduce_at_once(buffers.views[0], op)
            if pending is not None:
                buffers.store()
        except BaseException as error:
            self._break("allreduce", error, buffers)
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
        """Let the ranks agree on a call before it is queued.

        It is counted apart from the calls of host tensors.
        """
        if call.transfers is not None:
            make_alone = functools.partial(_queue_alone, self._agreement, device, call, deadline)
            self._agreement.agree_on_transfers(call, call.transfers, deadline, make_alone)
            return
        self._device_sequence += 1
        sequence = self._device_sequence
        control.position(sequence, call.name, None)
        try:
            control.agree(call.signature(sequence), lambda: call.describe(sequence), deadline)
        finally:
            control.position(sequence, None, None)


def _queue_on(
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


def is_on(device: QueueingBackend, buffers: Buffers) -> bool:
    """Return whether an argument lies on a device of the backend's."""
    return bool(buffers.views) and buffers.views[0].device.type in device.device_types


def _queue_alone(
    agreement: Agreement, device: QueueingBackend, call: Call, deadline: float, transfer: Transfer
) -> None:
    """Queue one transfer of a call; what this thread queues next comes after it."""
    _, _, buffers, move = transfer
    buffers.allocate_result()
    peers = [agreement.peer(transfer)]
    move_it = functools.partial(move, deadline)
    pending = _queue_on(device, call, (buffers,), peers, False, move_it, deadline)
    pending.order(buffers.streams())
