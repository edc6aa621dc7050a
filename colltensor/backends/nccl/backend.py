"""The nccl backend: every operation as calls of NCCL on the tensors' own memory, queued and not waited for.

A call on lists of tensors is one group of NCCL calls (ncclGroupStart, ncclGroupEnd), so that no list is copied into
one buffer first. Imports no framework: CUDA and NCCL come with the driver.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

from colltensor.backends.base import REDUCTIONS, Flight
from colltensor.backends.nccl import elements
from colltensor.backends.nccl.elements import BYTE, Spelling
from colltensor.backends.nccl.lanes import Flights, Lanes, QueuedFlight
from colltensor.backends.nccl.members import Crew, Members
from colltensor.backends.nccl.watcher import Watcher
from colltensor.errors import CollectiveError, GroupError
from colltensor.types import DType, ReduceOp
from colltensor.view import BufferView, in_a_row

_DEVICE_TYPES: Final = frozenset({"cuda"})
_CLOSE_TIMEOUT_S: Final = 5.0


class NcclBackend:
    """NCCL between the ranks of one group. Payload methods are called inside ``launch``, one call at a time."""

    name = "nccl"
    device_types = _DEVICE_TYPES
    takes_strided = False
    fuses = False
    joins = frozenset({"allgather", "reducescatter"})
    agrees = False

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
        self._members = Members(control, driver)
        self._lanes = Lanes(driver)
        self._watcher = Watcher(control, self._lanes, timeout_s, self._members.error, self._failed)
        self._crew: Crew | None = None
        self._devices: tuple[int, ...] = ()
        self._streams: list[int] = []
        self._closed = False
        self.on_failure: Callable[[CollectiveError], None] | None = None

    require = staticmethod(elements.require)

    def emulates(self, operation: str, dtype: DType, op: ReduceOp | None) -> bool:
        """Return True for the least and greatest of floats, which travel as integers; see ``elements.Keying``."""
        if op is None or operation not in REDUCTIONS:
            return False
        spelling = elements.spelling(dtype, op)
        return spelling is not None and spelling.keyed

    @contextlib.contextmanager
    def launch(
        self, name: str, views: Sequence[BufferView], peers: Sequence[int] | None, apart: bool, keep: object,
        deadline: float,
    ) -> Iterator[Flight]:
        """Queue one call; see ``QueueingBackend``. Connects the ranks first where this is their first such call."""
        self._watcher.check()
        if self._closed:
            raise GroupError(f"{name}: the group was destroyed")
        devices = tuple(dict.fromkeys(view.device.index for view in views))
        self._lanes.refuse_capture(name, views)
        crews = [self._members.pair(peer, devices[0], deadline) for peer in sorted(set(peers or ()))]
        if peers is None and any(view.count for view in views):
            self._crew = self._members.all(devices, deadline)
            crews.append(self._crew)
        apart = apart or any(crew.shared for crew in crews)
        entered: list[QueuedFlight] = []

        def added(flight: QueuedFlight) -> None:
            self._watcher.add(flight)
            entered.append(flight)

        try:
            with contextlib.ExitStack() as lanes:
                for device in devices:
                    there = [view for view in views if view.device.index == device]
                    lanes.enter_context(self._lanes.open(name, there, peers, apart, keep, added))
                self._streams = [flight.stream for flight in entered]
                self._devices = devices
                yield entered[0] if len(entered) == 1 else Flights(entered)
        except BaseException as error:
            for flight in entered:
                self._watcher.drop(flight)
            failure = self._watcher.failure
            # NCCL connects the ranks of an algorithm when it is first used and waits for them inside the call, which
            # ends with an error of its own when the watcher ends the communicators.
            if failure is not None and isinstance(error, self._driver.error):
                raise failure from error
            raise

    def drain(self, deadline: float, index: int | None = None) -> None:
        """Return, on the host, when what this rank has queued, on one device or all, is done; raises if it failed."""
        self._watcher.drain(deadline, index)

    def allreduce(self, buffers: Sequence[BufferView], op: ReduceOp, deadline: float) -> None:
        """Queue the combination of each buffer, in place."""
        with self._reduced(buffers, op) as parts, self._together(parts):
            for pointer, count, spelling in parts:
                self._all.allReduce(pointer, pointer, count, spelling.datatype, spelling.op, self._stream)

    def reduce(self, buffers: Sequence[BufferView], root: int, op: ReduceOp, deadline: float) -> None:
        """Queue the combination of each buffer into ``root``'s, in place; others are only read."""
        is_root = root == self._rank
        with self._reduced(buffers, op, is_root) as parts, self._together(parts):
            for pointer, count, spelling in parts:
                result = pointer if is_root else 0
                self._all.reduce(pointer, result, count, spelling.datatype, spelling.op, root, self._stream)

    def broadcast(self, buffers: Sequence[BufferView], root: int, deadline: float) -> None:
        """Queue the copy of ``root``'s bytes to all."""
        moved = [buffer for buffer in buffers if buffer.count]
        with self._together(moved):
            for buffer in moved:
                self._all.broadcast(buffer.pointer, buffer.pointer, buffer.nbytes, BYTE, root, self._stream)

    def allgather(self, outputs: Sequence[BufferView], source: BufferView, deadline: float) -> None:
        """Queue one allgather, into memory of its own where outputs do not lie in a row, and copies from there.

        How they lie is each rank's own affair, but NCCL's calls must be the same on all of them.
        """
        if not source.count:
            return
        if in_a_row(outputs):
            self._all.allGather(source.pointer, outputs[0].pointer, source.nbytes, BYTE, self._stream)
            return
        row = self._room(source, source.dtype, len(outputs)).blocks(len(outputs))
        self._all.allGather(source.pointer, row[0].pointer, source.nbytes, BYTE, self._stream)
        for output, place in zip(outputs, row, strict=True):
            self._driver.copy(output, place)

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
        """Queue one reduce-scatter, of copies where sources do not lie in a row; see ``allgather``."""
        spelling = elements.spelling(target.dtype, op)
        if not target.count or spelling is None:
            return
        if spelling.keyed:
            self._reducescatter_keys(target, sources, op)
            return
        row: Sequence[BufferView] = sources
        if not in_a_row(sources):
            row = self._room(target, target.dtype, len(sources)).blocks(len(sources))
            for source, place in zip(sources, row, strict=True):
                self._driver.copy(place, source)
        self._reduce_to_each(target.pointer, row[0].pointer, target, spelling)

    def alltoall(self, outputs: Sequence[BufferView], sources: Sequence[BufferView], deadline: float) -> None:
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

    def sendrecv(self, source: BufferView, dst: int, target: BufferView, src: int, deadline: float) -> None:
        """Queue both transfers as one; to and from this very rank it is a copy."""
        if dst == self._rank:
            self._driver.copy(target, source)
            return
        with self._driver.together():
            if source.count:
                communicator, other = self._pair(dst, [source])
                communicator.send(source.pointer, source.nbytes, BYTE, other, self._stream)
            if target.count:
                communicator, other = self._pair(src, [target])
                communicator.recv(target.pointer, target.nbytes, BYTE, other, self._stream)

    def barrier(self, deadline: float) -> None:
        """Return when what this rank has queued is done; that all have called is what the group agrees on."""
        self.drain(deadline)

    def close(self) -> None:
        """End the communicators, once what is queued is done or some seconds have passed; idempotent."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(TimeoutError, CollectiveError):
            self._watcher.drain(time.monotonic() + _CLOSE_TIMEOUT_S)
        undone = self._watcher.close(GroupError("the group was destroyed before the call was done"))
        self._members.end(undone)
        self._lanes.close()

    def allreduce_multigpu(self, buffers: Sequence[BufferView], op: ReduceOp, deadline: float) -> None:
        """Queue the combination of all devices' buffers, in place, as one group of calls."""
        with self._reduced_each(buffers, op, range(len(buffers))) as parts:
            for communicator, stream, (pointer, count, spelling) in parts:
                communicator.allReduce(pointer, pointer, count, spelling.datatype, spelling.op, stream)

    def reduce_multigpu(
        self, buffers: Sequence[BufferView], root: int, index: int, op: ReduceOp, deadline: float
    ) -> None:
        """Queue the combination of all devices' buffers into one."""
        mine = self._rank == root
        to = root * len(buffers) + index
        with self._reduced_each(buffers, op, [index] if mine else []) as parts:
            for place, (communicator, stream, (pointer, count, spelling)) in enumerate(parts):
                result = pointer if mine and place == index else 0
                communicator.reduce(pointer, result, count, spelling.datatype, spelling.op, to, stream)

    def broadcast_multigpu(self, buffers: Sequence[BufferView], root: int, index: int, deadline: float) -> None:
        """Queue the copy of one device's bytes to all."""
        of = root * len(buffers) + index
        with self._each(buffers) as calls:
            for communicator, stream, buffer in calls:
                communicator.broadcast(buffer.pointer, buffer.pointer, buffer.nbytes, BYTE, of, stream)

    def allgather_multigpu(
        self, outputs: Sequence[Sequence[BufferView]], sources: Sequence[BufferView], deadline: float
    ) -> None:
        """Queue the copy of every device's bytes to all, root by root."""
        first = self._rank * len(sources)
        with self._each(sources) as calls:
            for place, (communicator, stream, source) in enumerate(calls):
                for root, output in enumerate(outputs[place]):
                    given = source.pointer if root == first + place else output.pointer
                    communicator.broadcast(given, output.pointer, source.nbytes, BYTE, root, stream)

    def reducescatter_multigpu(
        self, targets: Sequence[BufferView], sources: Sequence[Sequence[BufferView]], op: ReduceOp, deadline: float
    ) -> None:
        """Queue a reduction to each device."""
        first, count = self._rank * len(targets), len(sources[0])
        flat = [source for inputs in sources for source in inputs]
        with self._reduced_each(flat, op, [], targets) as parts:
            for place in range(len(targets) if parts else 0):
                result = parts[len(flat) + place][2][0]
                for root, (communicator, stream, (pointer, number, spelling)) in enumerate(
                    parts[place * count : (place + 1) * count]
                ):
                    to = result if root == first + place else 0
                    communicator.reduce(pointer, to, number, spelling.datatype, spelling.op, root, stream)

    @property
    def _all(self) -> Any:
        assert self._crew is not None
        return self._crew.communicators[0]

    @property
    def _stream(self) -> int:
        return self._streams[0]

    @contextlib.contextmanager
    def _each(self, buffers: Sequence[BufferView]) -> Iterator[list[tuple[Any, int, BufferView]]]:
        """Give communicator and stream of each buffer's device, and the buffer; calls made inside are one."""
        if not buffers[0].count:
            yield []
            return
        assert self._crew is not None
        places = [self._devices.index(buffer.device.index) for buffer in buffers]
        communicators, streams = self._crew.communicators, self._streams
        with self._driver.together():
            yield [
                (communicators[place], streams[place], buffer) for place, buffer in zip(places, buffers, strict=True)
            ]

    @contextlib.contextmanager
    def _reduced_each(
        self, buffers: Sequence[BufferView], op: ReduceOp, written: Iterable[int], targets: Sequence[BufferView] = ()
    ) -> Iterator[list[tuple[Any, int, tuple[int, int, Spelling]]]]:
        """As ``_reduced``, each buffer on its own device; ``targets`` follow the buffers and are only written."""
        spelling = elements.spelling(buffers[0].dtype, op)
        assert spelling is not None
        keyed: list[BufferView] = []
        everything = [*buffers, *targets]
        if spelling.keyed and buffers[0].count:
            for number, buffer in enumerate(everything):
                with self._driver.on(buffer.device.index, self._streams[self._devices.index(buffer.device.index)]):
                    dtype = elements.keying(buffer.dtype).keys
                    keyed.append(self._keys(buffer, op) if number < len(buffers) else self._room(buffer, dtype))
        with self._each(everything) as calls:
            count = buffers[0].count * spelling.parts
            yield [
                (communicator, stream, ((keyed[number] if keyed else buffer).pointer, count, spelling))
                for number, (communicator, stream, buffer) in enumerate(calls)
            ]
        for number in [*written, *range(len(buffers), len(everything))] if keyed else ():
            buffer = everything[number]
            with self._driver.on(buffer.device.index, self._streams[self._devices.index(buffer.device.index)]):
                self._from_keys(buffer, keyed[number])

    def _pair(self, peer: int, buffers: Sequence[BufferView]) -> tuple[Any, int]:
        """Return the communicator with ``peer``, and its rank in it."""
        crew = self._members.pair(peer, buffers[0].device.index, 0.0)
        return crew.communicators[0], 1 if self._rank < peer else 0

    def _together(self, calls: Sequence[object]) -> contextlib.AbstractContextManager[None]:
        """Queue several calls as one."""
        driver_together: contextlib.AbstractContextManager[None] = self._driver.together()
        return driver_together if len(calls) > 1 else contextlib.nullcontext()

    @contextlib.contextmanager
    def _reduced(
        self, buffers: Sequence[BufferView], op: ReduceOp, written: bool = True
    ) -> Iterator[list[tuple[int, int, Spelling]]]:
        """Give address, count and spelling of what is reduced for each buffer: its own elements, or its keys."""
        parts, keyed = [], []
        for buffer in buffers:
            spelling = elements.spelling(buffer.dtype, op)
            if not buffer.count or spelling is None:
                continue
            pointer = buffer.pointer
            if spelling.keyed:
                keys = self._keys(buffer, op)
                keyed.append((buffer, keys))
                pointer = keys.pointer
            parts.append((pointer, buffer.count * spelling.parts, spelling))
        yield parts
        for buffer, keys in keyed:
            if written:
                self._from_keys(buffer, keys)

    def _keys(self, buffer: BufferView, op: ReduceOp, into: BufferView | None = None) -> BufferView:
        """Queue the conversion of floats to ordered integers, into memory of their own."""
        way = elements.keying(buffer.dtype)
        if into is None:
            into = self._room(buffer, way.keys)
        self._driver.to_keys(into, buffer.cast(way.bits), way.mask, way.infinity, way.nan(op))
        return into

    def _room(self, like: BufferView, dtype: DType, number: int = 1) -> BufferView:
        """Return memory for elements, of another type, of ``number`` views that are like one of the call's."""
        stream = self._streams[self._devices.index(like.device.index)]
        room: BufferView = self._driver.allocate(number * like.count * dtype.itemsize, _on(like, stream))
        return room.cast(dtype)

    def _from_keys(self, buffer: BufferView, keys: BufferView) -> None:
        way = elements.keying(buffer.dtype)
        self._driver.from_keys(buffer.cast(way.bits), keys, way.mask)

    def _reducescatter_keys(self, target: BufferView, sources: Sequence[BufferView], op: ReduceOp) -> None:
        spelling = elements.spelling(target.dtype, op)
        assert spelling is not None
        dtype, count = elements.keying(target.dtype).keys, target.count
        room = self._driver.allocate((len(sources) + 1) * count * dtype.itemsize, _on(target, self._stream)).cast(dtype)
        places = [room.slice(index * count, (index + 1) * count) for index in range(len(sources) + 1)]
        for source, place in zip(sources, places, strict=False):
            self._keys(source, op, place)
        self._reduce_to_each(places[-1].pointer, places[0].pointer, places[-1], spelling)
        self._from_keys(target, places[-1])

    def _reduce_to_each(self, result: int, row: int, like: BufferView, spelling: Spelling) -> None:
        count = like.count * spelling.parts
        self._all.reduceScatter(row, result, count, spelling.datatype, spelling.op, self._stream)

    def _failed(self, error: CollectiveError, undone: Sequence[QueuedFlight]) -> None:
        """End what waits in NCCL, then tell the group."""
        self._members.end(undone)
        if self.on_failure is not None:
            self.on_failure(error)


def _on(view: BufferView, stream: int) -> BufferView:
    """Return a view of the same memory for use on another stream."""
    return BufferView.from_address(
        view.pointer, (view.count,), view.dtype, device=view.device, owner=view, stream=stream
    )
