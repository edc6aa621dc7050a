"""The nccl backend: operations are calls of NCCL, queued on the tensors' own memory.

Nothing waits for them. A call on lists of tensors is one group of NCCL calls (ncclGroupStart,
ncclGroupEnd), so that no list is copied into one buffer first.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from colltensor.backends.base import BackendBase, PendingOperation
from colltensor.backends.nccl import reductions
from colltensor.backends.nccl.communicators import CommunicatorCache, Communicators
from colltensor.backends.nccl.reductions import BYTE, NcclReduction
from colltensor.backends.nccl.streams import PendingOperations, QueuedOperation, StreamManager
from colltensor.backends.nccl.watchdog import Watchdog
from colltensor.errors import CollectiveError, GroupError
from colltensor.operations import REDUCTIONS
from colltensor.types import DType, ReduceOp
from colltensor.view import BufferView, in_a_row

_DEVICE_TYPES: Final = frozenset({"cuda"})
_CLOSE_TIMEOUT_S: Final = 5.0
_ALONE: Final = contextlib.nullcontext()


class _Part(NamedTuple):
    """What NCCL reduces for one buffer.

    Attributes:
        buffer: The buffer.
        pointer: Where the elements are that NCCL reduces.
        number: How many of NCCL's elements they are.
        reduction: Of which type, and how they are combined.
        keys: The memory of the keys that stand for the buffer's elements, or None.
    """

    buffer: BufferView
    pointer: int
    number: int
    reduction: NcclReduction
    keys: BufferView | None


class NcclBackend(BackendBase):
    """NCCL between the ranks of one group.

    Payload methods are called after ``begin``, one call at a time.
    """

    name = "nccl"
    device_types = _DEVICE_TYPES
    packs_small_leaves = False
    copies_lists = frozenset({"allgather", "reducescatter"})
    needs_agreement = False

    def __init__(self, control: Any, timeout_s: float, driver: Any) -> None:
        """Make the backend of one rank; connects nothing.

        Args:
            control: The group's ControlPlane; None for one rank on its own.
            timeout_s: How long a call may be under way on the device, in seconds.
            driver: ``CupyDriver``, or what a test puts in its place.
        """
        self._driver = driver
        self._rank = 0 if control is None else control.rank
        self._size = 1 if control is None else control.world_size
        self._communicators = CommunicatorCache(control, driver)
        self._stream_manager = StreamManager(driver)
        self._watchdog = Watchdog(
            control, self._stream_manager, timeout_s, self._communicators.error, self._failed
        )

        self._communicators_of: Communicators | None = None
        self._devices: tuple[int, ...] = ()
        self._streams: list[int] = []
        self._pending: list[QueuedOperation] = []
        self._left: list[int | None] = []
        self._staging = contextlib.ExitStack()
        self._closed = False

        self.on_failure: Callable[[CollectiveError], None] | None = None

    require = staticmethod(reductions.require)

    def stages_dtype(self, operation: str, dtype: DType, op: ReduceOp | None) -> bool:
        """Return True for MIN and MAX of floats, which travel as integers.

        See ``reductions.OrderEncoding``.
        """
        if op is None or operation not in REDUCTIONS:
            return False
        reduction = reductions.reduction(dtype, op)
        return reduction is not None and reduction.encoded

    def begin(
        self,
        name: str,
        views: Sequence[BufferView],
        peers: Sequence[int] | None,
        apart: bool,
        keep: object,
        stages: bool,
        deadline: float,
    ) -> PendingOperation:
        """Begin to queue one call; see ``QueueingBackend``.

        Connects the ranks first where this is their first such call.
        """
        self._watchdog.check()
        if self._closed:
            raise GroupError(f"{name}: the group was destroyed")

        stream_manager, driver = self._stream_manager, self._driver
        stream_manager.refuse_capture(name, views)
        devices = (
            (views[0].device.index,)
            if len(views) == 1
            else tuple({view.device.index: None for view in views})
        )

        if peers is not None:
            for peer in sorted(set(peers)):
                apart = self._communicators.pair(peer, devices[0], deadline).shared or apart
        elif views[0].count or any(view.count for view in views):
            self._communicators_of = self._communicators.all(devices, deadline)
            apart = self._communicators_of.shared or apart

        self._devices = devices
        pending = self._pending = []
        self._streams = []
        for device in devices:
            there = (
                views
                if len(devices) == 1
                else [view for view in views if view.device.index == device]
            )
            self._left.append(driver.enter(device))
            operation = stream_manager.begin(name, there, peers, apart, keep)
            pending.append(operation)
            self._watchdog.add(operation)
            self._streams.append(operation.stream)
            if stages:
                self._staging.enter_context(driver.on(device, operation.stream))

        return pending[0] if len(pending) == 1 else PendingOperations(pending)

    def end(self) -> None:
        """End what was begun: the call is queued."""
        self._staging.close()
        for operation in reversed(self._pending):
            self._stream_manager.end(operation)
            self._driver.leave(self._left.pop())
        self._pending = []

    def cancel(self, error: BaseException) -> None:
        """End what was begun because of an error.

        Raises the failure of the group where that is its reason.
        """
        self._driver.ungroup()
        self._staging.close()
        while self._left:
            self._driver.leave(self._left.pop())
        pending, self._pending = self._pending, []
        self._drop(pending, error)

    def _drop(self, pending: Sequence[QueuedOperation], error: BaseException) -> None:
        """Stop watching operations that were not queued; raises what their error comes from."""
        for operation in pending:
            self._watchdog.abandon(operation)
        # NCCL connects the ranks of an algorithm when it is first used and waits for them inside
        # the call, which ends with an error of its own when the watchdog ends the communicators.
        failure = self._watchdog.failure
        if failure is not None and isinstance(error, self._driver.error):
            raise failure from error

    def allreduce_at_once(self, view: BufferView, op: ReduceOp) -> QueuedOperation | None:
        """Queue an allreduce of a tensor that needs NCCL's call alone.

        See ``QueueingBackend``.
        """
        index, stream = view.device.index, view.stream
        communicators = self._communicators.communicators((index,))
        reduction = reductions.reduction(view.dtype, op)
        if (
            communicators is None
            or communicators.shared
            or stream is None
            or reduction is None
            or reduction.encoded
            or not view.count
        ):
            return None

        stream_manager, driver = self._stream_manager, self._driver
        if not stream_manager.follows_itself(index, stream) or driver.capturing(stream):
            return None

        self._watchdog.check()
        before = driver.enter(index)
        operation: QueuedOperation | None = None
        try:
            operation = stream_manager.begin_alone("allreduce", index, stream)
            self._watchdog.add(operation)
            communicators.handles[0].allReduce(
                view.pointer,
                view.pointer,
                view.count * reduction.parts,
                reduction.datatype,
                reduction.op,
                stream,
            )
            stream_manager.end(operation)
        except BaseException as error:
            self._drop(() if operation is None else (operation,), error)
            raise
        finally:
            driver.leave(before)

        return operation

    def set_timeout(self, timeout_s: float) -> None:
        """Give the calls that begin from now on so long; see ``QueueingBackend``."""
        self._watchdog.timeout_s = timeout_s

    def refuse(self, name: str, views: Sequence[BufferView], peers: Sequence[int] | None) -> None:
        """Raise if the streams are captured, or this rank has used other devices.

        See ``QueueingBackend``.
        """
        self._stream_manager.refuse_capture(name, views)
        devices = tuple({view.device.index: None for view in views})
        for peer in set(peers or ()):
            self._communicators.refuse_pair(peer, devices[0])
        if peers is None:
            self._communicators.refuse(devices)

    def disown(self) -> None:
        """Forget everything in a forked child; see ``QueueingBackend``."""
        self._closed = True
        self._communicators.disown()

    def drain(self, deadline: float, index: int | None = None) -> None:
        """Return, on the host, when what this rank has queued is done, on one device or all.

        Raises if it failed.
        """
        self._watchdog.drain(deadline, index)

    def allreduce(self, buffers: Sequence[BufferView], op: ReduceOp, deadline: float) -> None:
        """Queue the combination of each buffer, in place."""
        parts = self._parts(buffers, op)
        with self._together(parts):
            for part in parts:
                self._all.allReduce(
                    part.pointer,
                    part.pointer,
                    part.number,
                    part.reduction.datatype,
                    part.reduction.op,
                    self._stream,
                )
        self._store(parts)

    def reduce(
        self, buffers: Sequence[BufferView], root: int, op: ReduceOp, deadline: float
    ) -> None:
        """Queue the combination of each buffer into ``root``'s, in place; others are only read."""
        parts = self._parts(buffers, op)
        is_root = root == self._rank
        with self._together(parts):
            for part in parts:
                result = part.pointer if is_root else 0
                self._all.reduce(
                    part.pointer,
                    result,
                    part.number,
                    part.reduction.datatype,
                    part.reduction.op,
                    root,
                    self._stream,
                )

        if is_root:
            self._store(parts)

    def broadcast(self, buffers: Sequence[BufferView], root: int, deadline: float) -> None:
        """Queue the copy of ``root``'s bytes to all."""
        moved = [buffer for buffer in buffers if buffer.count]
        with self._together(moved):
            for buffer in moved:
                self._all.broadcast(
                    buffer.pointer, buffer.pointer, buffer.nbytes, BYTE, root, self._stream
                )

    def allgather(self, outputs: Sequence[BufferView], source: BufferView, deadline: float) -> None:
        """Queue one allgather; outputs that are not contiguous get copies from its own memory.

        How they lie is each rank's own affair, but NCCL's calls must be the same on all of them.
        """
        if not source.count:
            return
        if in_a_row(outputs):
            self._all.allGather(
                source.pointer, outputs[0].pointer, source.nbytes, BYTE, self._stream
            )
            return
        row = self._room(source, source.dtype, len(outputs)).blocks(len(outputs))
        self._all.allGather(source.pointer, row[0].pointer, source.nbytes, BYTE, self._stream)
        for output, place in zip(outputs, row, strict=True):
            self._driver.copy(output, place, self._stream)

    def gather(
        self, outputs: Sequence[BufferView] | None, source: BufferView, root: int, deadline: float
    ) -> None:
        """Queue a transfer from every rank to ``root``, itself included."""
        if not source.count:
            return
        with self._driver.together():
            if outputs is None or outputs[root].pointer != source.pointer:
                self._all.send(source.pointer, source.nbytes, BYTE, root, self._stream)
            for rank, output in enumerate(outputs or ()):
                if rank != root or output.pointer != source.pointer:
                    self._all.recv(output.pointer, output.nbytes, BYTE, rank, self._stream)

    def scatter(
        self, target: BufferView, sources: Sequence[BufferView] | None, root: int, deadline: float
    ) -> None:
        """Queue a transfer from ``root`` to every rank, itself included."""
        if not target.count:
            return
        with self._driver.together():
            for rank, source in enumerate(sources or ()):
                self._all.send(source.pointer, source.nbytes, BYTE, rank, self._stream)
            self._all.recv(target.pointer, target.nbytes, BYTE, root, self._stream)

    def reducescatter(
        self, target: BufferView, sources: Sequence[BufferView], op: ReduceOp, deadline: float
    ) -> None:
        """Queue one reduce-scatter, of copies where sources are not contiguous.

        See ``allgather``.
        """
        reduction = reductions.reduction(target.dtype, op)
        if not target.count or reduction is None:
            return

        number, result = len(sources), target
        row: Sequence[BufferView] = sources
        if reduction.encoded:
            *row, result = self._room(
                target, reductions.order_encoding(target.dtype).keys, number + 1
            ).blocks(number + 1)
            for source, keys in zip(sources, row, strict=True):
                self._keys(source, op, keys)
        elif not in_a_row(sources):
            row = self._room(target, target.dtype, number).blocks(number)
            for source, place in zip(sources, row, strict=True):
                self._driver.copy(place, source, self._stream)

        self._all.reduceScatter(
            row[0].pointer,
            result.pointer,
            target.count * reduction.parts,
            reduction.datatype,
            reduction.op,
            self._stream,
        )
        if reduction.encoded:
            self._from_keys(target, result)

    def alltoall(
        self, outputs: Sequence[BufferView], sources: Sequence[BufferView], deadline: float
    ) -> None:
        """Queue a transfer between every two ranks."""
        if not sources[0].count:
            return
        with self._driver.together():
            for rank, (output, source) in enumerate(zip(outputs, sources, strict=True)):
                self._all.send(source.pointer, source.nbytes, BYTE, rank, self._stream)
                self._all.recv(output.pointer, output.nbytes, BYTE, rank, self._stream)

    def send(self, buffers: Sequence[BufferView], peer: int, deadline: float) -> None:
        """Queue sending each buffer to ``peer``."""
        moved = [buffer for buffer in buffers if buffer.count]
        if not moved:
            return
        communicator, other = self._pair(peer, moved)
        with self._together(moved):
            for buffer in moved:
                communicator.send(buffer.pointer, buffer.nbytes, BYTE, other, self._stream)

    def recv(self, buffers: Sequence[BufferView], peer: int, deadline: float) -> None:
        """Queue receiving each buffer from ``peer``."""
        moved = [buffer for buffer in buffers if buffer.count]
        if not moved:
            return
        communicator, other = self._pair(peer, moved)
        with self._together(moved):
            for buffer in moved:
                communicator.recv(buffer.pointer, buffer.nbytes, BYTE, other, self._stream)

    def sendrecv(
        self, source: BufferView, dst: int, target: BufferView, src: int, deadline: float
    ) -> None:
        """Queue both transfers as one; to and from this very rank it is a copy."""
        if dst == self._rank:
            self._driver.copy(target, source, self._stream)
            return
        with self._driver.together():
            if source.count:
                communicator, other = self._pair(dst, [source])
                communicator.send(source.pointer, source.nbytes, BYTE, other, self._stream)
            if target.count:
                communicator, other = self._pair(src, [target])
                communicator.recv(target.pointer, target.nbytes, BYTE, other, self._stream)

    def barrier(self, deadline: float) -> None:
        """Return when what this rank has queued is done.

        That all have called is what the group agrees on.
        """
        self.drain(deadline)

    def close(self) -> None:
        """End the communicators, once what is queued is done or some seconds have passed.

        Idempotent.
        """
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(TimeoutError, CollectiveError):
            self._watchdog.drain(time.monotonic() + _CLOSE_TIMEOUT_S)
        undone = self._watchdog.close(
            GroupError("the group was destroyed before the call was done"),
            self._communicators.abort,
        )
        self._communicators.end(undone)  # where there is no watchdog
        self._stream_manager.close()

    def allreduce_multigpu(
        self, buffers: Sequence[BufferView], op: ReduceOp, deadline: float
    ) -> None:
        """Queue the combination of all devices' buffers, in place, as one group of calls."""
        with self._reduced_each(buffers, op, range(len(buffers))) as parts:
            for communicator, stream, (pointer, count, reduction) in parts:
                communicator.allReduce(
                    pointer, pointer, count, reduction.datatype, reduction.op, stream
                )

    def reduce_multigpu(
        self, buffers: Sequence[BufferView], root: int, index: int, op: ReduceOp, deadline: float
    ) -> None:
        """Queue the combination of all devices' buffers into one."""
        mine = self._rank == root
        to = root * len(buffers) + index
        with self._reduced_each(buffers, op, [index] if mine else []) as parts:
            for place, (communicator, stream, (pointer, count, reduction)) in enumerate(parts):
                result = pointer if mine and place == index else 0
                communicator.reduce(
                    pointer, result, count, reduction.datatype, reduction.op, to, stream
                )

    def broadcast_multigpu(
        self, buffers: Sequence[BufferView], root: int, index: int, deadline: float
    ) -> None:
        """Queue the copy of one device's bytes to all."""
        of = root * len(buffers) + index
        with self._each(buffers) as calls:
            for communicator, stream, buffer in calls:
                communicator.broadcast(
                    buffer.pointer, buffer.pointer, buffer.nbytes, BYTE, of, stream
                )

    def allgather_multigpu(
        self,
        outputs: Sequence[Sequence[BufferView]],
        sources: Sequence[BufferView],
        deadline: float,
    ) -> None:
        """Queue the copy of every device's bytes to all, root by root."""
        first = self._rank * len(sources)
        with self._each(sources) as calls:
            for place, (communicator, stream, source) in enumerate(calls):
                for root, output in enumerate(outputs[place]):
                    given = source.pointer if root == first + place else output.pointer
                    communicator.broadcast(given, output.pointer, source.nbytes, BYTE, root, stream)

    def reducescatter_multigpu(
        self,
        targets: Sequence[BufferView],
        sources: Sequence[Sequence[BufferView]],
        op: ReduceOp,
        deadline: float,
    ) -> None:
        """Queue a reduction to each device."""
        first, count = self._rank * len(targets), len(sources[0])
        flat = [source for inputs in sources for source in inputs]

        with self._reduced_each(flat, op, [], targets) as parts:
            for place in range(len(targets) if parts else 0):
                result = parts[len(flat) + place][2][0]
                for root, (communicator, stream, (pointer, number, reduction)) in enumerate(
                    parts[place * count : (place + 1) * count]
                ):
                    to = result if root == first + place else 0
                    communicator.reduce(
                        pointer, to, number, reduction.datatype, reduction.op, root, stream
                    )

    @property
    def _all(self) -> Any:
        assert self._communicators_of is not None
        return self._communicators_of.handles[0]

    @property
    def _stream(self) -> int:
        return self._streams[0]

    @contextlib.contextmanager
    def _each(self, buffers: Sequence[BufferView]) -> Iterator[list[tuple[Any, int, BufferView]]]:
        """Give communicator and stream of each buffer's device, and the buffer.

        Calls made inside are one.
        """
        if not buffers[0].count:
            yield []
            return
        assert self._communicators_of is not None
        places = [self._devices.index(buffer.device.index) for buffer in buffers]
        communicators, streams = self._communicators_of.handles, self._streams
        with self._driver.together():
            yield [
                (communicators[place], streams[place], buffer)
                for place, buffer in zip(places, buffers, strict=True)
            ]

    @contextlib.contextmanager
    def _reduced_each(
        self,
        buffers: Sequence[BufferView],
        op: ReduceOp,
        written: Iterable[int],
        targets: Sequence[BufferView] = (),
    ) -> Iterator[list[tuple[Any, int, tuple[int, int, NcclReduction]]]]:
        """Do as ``_reduced``, each buffer on its own device.

        ``targets`` follow the buffers and are only written.
        """
        reduction = reductions.reduction(buffers[0].dtype, op)
        assert reduction is not None

        encoded: list[BufferView] = []
        everything = [*buffers, *targets]
        if reduction.encoded and buffers[0].count:
            for number, buffer in enumerate(everything):
                dtype = reductions.order_encoding(buffer.dtype).keys
                encoded.append(
                    self._keys(buffer, op) if number < len(buffers) else self._room(buffer, dtype)
                )

        with self._each(everything) as calls:
            count = buffers[0].count * reduction.parts
            yield [
                (
                    communicator,
                    stream,
                    ((encoded[number] if encoded else buffer).pointer, count, reduction),
                )
                for number, (communicator, stream, buffer) in enumerate(calls)
            ]

        for number in [*written, *range(len(buffers), len(everything))] if encoded else ():
            self._from_keys(everything[number], encoded[number])

    def _pair(self, peer: int, buffers: Sequence[BufferView]) -> tuple[Any, int]:
        """Return the communicator with ``peer``, and its rank in it."""
        communicators = self._communicators.pair(peer, buffers[0].device.index, 0.0)
        return communicators.handles[0], 1 if self._rank < peer else 0

    def _together(self, calls: Sequence[object]) -> contextlib.AbstractContextManager[None]:
        """Queue several calls as one."""
        return self._driver.together() if len(calls) > 1 else _ALONE

    def _parts(self, buffers: Sequence[BufferView], op: ReduceOp) -> list[_Part]:
        """Return what is reduced for each buffer: its own elements, or keys of them."""
        parts = []
        for buffer in buffers:
            reduction = reductions.reduction(buffer.dtype, op)
            if buffer.count and reduction is not None:
                keys = self._keys(buffer, op) if reduction.encoded else None
                pointer = buffer.pointer if keys is None else keys.pointer
                parts.append(
                    _Part(buffer, pointer, buffer.count * reduction.parts, reduction, keys)
                )
        return parts

    def _store(self, parts: Sequence[_Part]) -> None:
        """Queue writing the results back that are keys."""
        for part in parts:
            if part.keys is not None:
                self._from_keys(part.buffer, part.keys)

    def _keys(self, buffer: BufferView, op: ReduceOp, into: BufferView | None = None) -> BufferView:
        """Queue the conversion of floats to ordered integers, into memory of their own."""
        way = reductions.order_encoding(buffer.dtype)
        if into is None:
            into = self._room(buffer, way.keys)
        with self._on(buffer):
            self._driver.to_keys(into, buffer.cast(way.bits), way.mask, way.infinity, way.nan(op))
        return into

    def _room(self, like: BufferView, dtype: DType, number: int = 1) -> BufferView:
        """Return memory for ``number`` views that are like one of the call's, of another type."""
        with self._on(like):
            room: BufferView = self._driver.allocate(number * like.count * dtype.itemsize, like)
        return room.cast(dtype)

    def _from_keys(self, buffer: BufferView, keys: BufferView) -> None:
        way = reductions.order_encoding(buffer.dtype)
        with self._on(buffer):
            self._driver.from_keys(buffer.cast(way.bits), keys, way.mask)

    def _on(self, buffer: BufferView) -> contextlib.AbstractContextManager[None]:
        """Make the stream of the call on a buffer's device the one on which the driver computes."""
        index = buffer.device.index
        on: contextlib.AbstractContextManager[None] = self._driver.on(
            index, self._streams[self._devices.index(index)]
        )
        return on

    def _failed(self, error: CollectiveError, undone: Sequence[QueuedOperation]) -> None:
        """End what waits in NCCL, then notify the group."""
        self._communicators.end(undone)
        if self.on_failure is not None:
            self.on_failure(error)
