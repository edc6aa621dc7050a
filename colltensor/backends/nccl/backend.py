"""The nccl backend: every operation as calls of NCCL on the tensors' own memory, queued and not waited for.

A call on lists of tensors is one group of NCCL calls (ncclGroupStart, ncclGroupEnd), so that no list is copied into
one buffer first. Imports no framework: CUDA and NCCL come with the driver.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

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
_ALONE: Final = contextlib.nullcontext()


class _Part(NamedTuple):
    """What NCCL reduces for one buffer.

    Attributes:
        buffer: The buffer.
        pointer: Where the elements are that NCCL reduces.
        number: How many of NCCL's elements they are.
        spelling: Of which type, and how they are combined.
        keys: The memory of the keys that stand for the buffer's elements, or None.
    """

    buffer: BufferView
    pointer: int
    number: int
    spelling: Spelling
    keys: BufferView | None


class NcclBackend:
    """NCCL between the ranks of one group. Payload methods are called after ``begin``, one call at a time."""

    name = "nccl"
    device_types = _DEVICE_TYPES
    takes_strided = False
    fuses = False
    joins = frozenset({"allgather", "reducescatter"})
    agrees = False
    crosses = False

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
        self._flights: list[QueuedFlight] = []
        self._left: list[int | None] = []
        self._staging = contextlib.ExitStack()
        self._closed = False
        self.on_failure: Callable[[CollectiveError], None] | None = None

    require = staticmethod(elements.require)

    def emulates(self, operation: str, dtype: DType, op: ReduceOp | None) -> bool:
        """Return True for the least and greatest of floats, which travel as integers; see ``elements.Keying``."""
        if op is None or operation not in REDUCTIONS:
            return False
        spelling = elements.spelling(dtype, op)
        return spelling is not None and spelling.keyed

    def begin(
        self, name: str, views: Sequence[BufferView], peers: Sequence[int] | None, apart: bool, keep: object,
        stages: bool, deadline: float,
    ) -> Flight:
        """Begin to queue one call; see ``QueueingBackend``. Connects the ranks first where this is their first such."""
        self._watcher.check()
        if self._closed:
            raise GroupError(f"{name}: the group was destroyed")
        lanes, driver = self._lanes, self._driver
        lanes.refuse_capture(name, views)
        devices = (views[0].device.index,) if len(views) == 1 else tuple({view.device.index: None for view in views})
        if peers is not None:
            for peer in sorted(set(peers)):
                apart = self._members.pair(peer, devices[0], deadline).shared or apart
        elif views[0].count or any(view.count for view in views):
            self._crew = self._members.all(devices, deadline)
            apart = self._crew.shared or apart
        self._devices = devices
        flights = self._flights = []
        self._streams = []
        for device in devices:
            there = views if len(devices) == 1 else [view for view in views if view.device.index == device]
            self._left.append(driver.enter(device))
            flight = lanes.begin(name, there, peers, apart, keep)
            flights.append(flight)
            self._watcher.add(flight)
            self._streams.append(flight.stream)
            if stages:
                self._staging.enter_context(driver.on(device, flight.stream))
        return flights[0] if len(flights) == 1 else Flights(flights)

    def end(self) -> None:
        """End what was begun: the call is queued."""
        self._staging.close()
        for flight in reversed(self._flights):
            self._lanes.end(flight)
            self._driver.leave(self._left.pop())
        self._flights = []

    def cancel(self, error: BaseException) -> None:
        """End what was begun because of an error; raises the failure of the group where that is its reason."""
        self._driver.ungroup()
        self._staging.close()
        while self._left:
            self._driver.leave(self._left.pop())
        flights, self._flights = self._flights, []
        self._drop(flights, error)

    def _drop(self, flights: Sequence[QueuedFlight], error: BaseException) -> None:
        """Watch flights no longer that were not queued; raises what their error comes from."""
        for flight in flights:
            self._watcher.drop(flight)
        # NCCL connects the ranks of an algorithm when it is first used and waits for them inside the call, which
        # ends with an error of its own when the watcher ends the communicators.
        failure = self._watcher.failure
        if failure is not None and isinstance(error, self._driver.error):
            raise failure from error

    def allreduce_at_once(self, view: BufferView, op: ReduceOp) -> QueuedFlight | None:
        """Queue an allreduce of one tensor that needs nothing but NCCL's call; see ``QueueingBackend``."""
        index, stream = view.device.index, view.stream
        crew = self._members.crew((index,))
        spelling = elements.spelling(view.dtype, op)
        if crew is None or crew.shared or stream is None or spelling is None or spelling.keyed or not view.count:
            return None
        lanes, driver = self._lanes, self._driver
        if not lanes.follows_itself(index, stream) or driver.capturing(stream):
            return None
        self._watcher.check()
        before = driver.enter(index)
        flight: QueuedFlight | None = None
        try:
            flight = lanes.begin_alone("allreduce", index, stream)
            self._watcher.add(flight)
            crew.communicators[0].allReduce(
                view.pointer, view.pointer, view.count * spelling.parts, spelling.datatype, spelling.op, stream
            )
            lanes.end(flight)
        except BaseException as error:
            self._drop(() if flight is None else (flight,), error)
            raise
        finally:
            driver.leave(before)
        return flight

    def set_timeout(self, timeout_s: float) -> None:
        """Give the calls that begin from now on so long; see ``QueueingBackend``."""
        self._watcher.timeout_s = timeout_s

    def refuse(self, name: str, views: Sequence[BufferView], peers: Sequence[int] | None) -> None:
        """Raise if the streams are captured, or this rank has used other devices; see ``QueueingBackend``."""
        self._lanes.refuse_capture(name, views)
        devices = tuple({view.device.index: None for view in views})
        for peer in set(peers or ()):
            self._members.refuse_pair(peer, devices[0])
        if peers is None:
            self._members.refuse(devices)

    def disown(self) -> None:
        """Forget everything in a forked child; see ``QueueingBackend``."""
        self._closed = True
        self._members.disown()

    def drain(self, deadline: float, index: int | None = None) -> None:
        """Return, on the host, when what this rank has queued, on one device or all, is done; raises if it failed."""
        self._watcher.drain(deadline, index)

    def allreduce(self, buffers: Sequence[BufferView], op: ReduceOp, deadline: float) -> None:
        """Queue the combination of each buffer, in place."""
        parts = self._parts(buffers, op)
        with self._together(parts):
            for part in parts:
                self._all.allReduce(
                    part.pointer, part.pointer, part.number, part.spelling.datatype, part.spelling.op, self._stream
                )
        self._store(parts)

    def reduce(self, buffers: Sequence[BufferView], root: int, op: ReduceOp, deadline: float) -> None:
        """Queue the combination of each buffer into ``root``'s, in place; others are only read."""
        parts = self._parts(buffers, op)
        is_root = root == self._rank
        with self._together(parts):
            for part in parts:
                result = part.pointer if is_root else 0
                self._all.reduce(
                    part.pointer, result, part.number, part.spelling.datatype, part.spelling.op, root, self._stream
                )
        if is_root:
            self._store(parts)

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
        """Queue one reduce-scatter, of copies where sources do not lie in a row; see ``allgather``."""
        spelling = elements.spelling(target.dtype, op)
        if not target.count or spelling is None:
            return
        number, result = len(sources), target
        row: Sequence[BufferView] = sources
        if spelling.keyed:
            *row, result = self._room(target, elements.keying(target.dtype).keys, number + 1).blocks(number + 1)
            for source, keys in zip(sources, row, strict=True):
                self._keys(source, op, keys)
        elif not in_a_row(sources):
            row = self._room(target, target.dtype, number).blocks(number)
            for source, place in zip(sources, row, strict=True):
                self._driver.copy(place, source, self._stream)
        self._all.reduceScatter(
            row[0].pointer, result.pointer, target.count * spelling.parts, spelling.datatype, spelling.op, self._stream
        )
        if spelling.keyed:
            self._from_keys(target, result)

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
        """Return when what this rank has queued is done; that all have called is what the group agrees on."""
        self.drain(deadline)

    def close(self) -> None:
        """End the communicators, once what is queued is done or some seconds have passed; idempotent."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(TimeoutError, CollectiveError):
            self._watcher.drain(time.monotonic() + _CLOSE_TIMEOUT_S)
        undone = self._watcher.close(
            GroupError("the group was destroyed before the call was done"), self._members.abort
        )
        self._members.end(undone)  # where there is no watcher
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
                dtype = elements.keying(buffer.dtype).keys
                keyed.append(self._keys(buffer, op) if number < len(buffers) else self._room(buffer, dtype))
        with self._each(everything) as calls:
            count = buffers[0].count * spelling.parts
            yield [
                (communicator, stream, ((keyed[number] if keyed else buffer).pointer, count, spelling))
                for number, (communicator, stream, buffer) in enumerate(calls)
            ]
        for number in [*written, *range(len(buffers), len(everything))] if keyed else ():
            self._from_keys(everything[number], keyed[number])

    def _pair(self, peer: int, buffers: Sequence[BufferView]) -> tuple[Any, int]:
        """Return the communicator with ``peer``, and its rank in it."""
        crew = self._members.pair(peer, buffers[0].device.index, 0.0)
        return crew.communicators[0], 1 if self._rank < peer else 0

    def _together(self, calls: Sequence[object]) -> contextlib.AbstractContextManager[None]:
        """Queue several calls as one."""
        return self._driver.together() if len(calls) > 1 else _ALONE

    def _parts(self, buffers: Sequence[BufferView], op: ReduceOp) -> list[_Part]:
        """Return what is reduced for each buffer: its own elements, or keys of them."""
        parts = []
        for buffer in buffers:
            spelling = elements.spelling(buffer.dtype, op)
            if buffer.count and spelling is not None:
                keys = self._keys(buffer, op) if spelling.keyed else None
                pointer = buffer.pointer if keys is None else keys.pointer
                parts.append(_Part(buffer, pointer, buffer.count * spelling.parts, spelling, keys))
        return parts

    def _store(self, parts: Sequence[_Part]) -> None:
        """Queue writing the results back that are keys."""
        for part in parts:
            if part.keys is not None:
                self._from_keys(part.buffer, part.keys)

    def _keys(self, buffer: BufferView, op: ReduceOp, into: BufferView | None = None) -> BufferView:
        """Queue the conversion of floats to ordered integers, into memory of their own."""
        way = elements.keying(buffer.dtype)
        if into is None:
            into = self._room(buffer, way.keys)
        with self._on(buffer):
            self._driver.to_keys(into, buffer.cast(way.bits), way.mask, way.infinity, way.nan(op))
        return into

    def _room(self, like: BufferView, dtype: DType, number: int = 1) -> BufferView:
        """Return memory for elements, of another type, of ``number`` views that are like one of the call's."""
        with self._on(like):
            room: BufferView = self._driver.allocate(number * like.count * dtype.itemsize, like)
        return room.cast(dtype)

    def _from_keys(self, buffer: BufferView, keys: BufferView) -> None:
        way = elements.keying(buffer.dtype)
        with self._on(buffer):
            self._driver.from_keys(buffer.cast(way.bits), keys, way.mask)

    def _on(self, buffer: BufferView) -> contextlib.AbstractContextManager[None]:
        """Make the stream of the call on a buffer's device the one on which the driver computes."""
        index = buffer.device.index
        on: contextlib.AbstractContextManager[None] = self._driver.on(index, self._streams[self._devices.index(index)])
        return on

    def _failed(self, error: CollectiveError, undone: Sequence[QueuedFlight]) -> None:
        """End what waits in NCCL, then tell the group."""
        self._members.end(undone)
        if self.on_failure is not None:
            self.on_failure(error)
