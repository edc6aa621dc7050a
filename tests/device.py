"""A fake CUDA device and a fake NCCL, on host memory: for the logic of streams, groups and failures without a GPU.

Work is queued on streams and done later by a thread, in an order drawn at random among all orders that the streams and
events permit, of all ranks together: what is not ordered goes wrong sooner or later. The communicators compute real
results from the ranks' memory once all of them have come, as NCCL's kernels do, and record what was called. Ranks are
threads of one process.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from colltensor.types import DTYPES, Device, DType
from colltensor.view import BufferView

LEGACY = 1
_TYPES = [
    "int8",
    "uint8",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float16",
    "float32",
    "float64",
    "bfloat16",
]
_OPS = [np.add, np.multiply, np.fmax, np.fmin]  # as NCCL's, these lose a NaN
_AVERAGE = 4


class NcclError(RuntimeError):
    """What the communicators raise."""


class Work:
    """Something queued on a stream: done when ``step`` returns True, which it is asked again and again."""

    def __init__(self, step: Callable[[], bool]) -> None:
        self.step = step


class Machine:
    """The devices of all ranks: their streams, events and communicators."""

    def __init__(self, seed: int) -> None:
        self.lock = threading.RLock()
        self.streams: dict[int, deque[Work]] = {LEGACY: deque()}
        self.events: dict[int, int] = {}
        """By event: how often it was recorded."""
        self.reached: dict[int, int] = {}
        """By event: the last of its records whose work is done."""
        self.names = itertools.count(100)
        self.worlds: dict[bytes, World] = {}
        self.calls: list[tuple[int, tuple[str, ...]]] = []
        """What was queued: the communicator's rank, and the names of the calls of one group."""
        self.refuses: BaseException | None = None
        self.broken: RuntimeError | None = None
        """What is said from now on of every event that is not done."""
        self.captured: set[int] = set()
        """Streams that are captured into a graph."""
        self.kept: list[np.ndarray] = []
        """Freed memory is given away in the order of its stream only: here never."""
        self._random = random.Random(seed)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the device."""
        self._closed.set()
        self._thread.join(5)
        assert not self._thread.is_alive()

    def queue(self, stream: int, step: Callable[[], Any]) -> None:
        """Queue a function; one that returns False is called again later."""
        with self.lock:
            self.streams[stream].append(Work(lambda: step() is not False))

    def synchronize(self, stream: int, timeout_s: float = 20.0) -> None:
        """Return when all that is on a stream now is done."""
        done = threading.Event()
        self.queue(stream, done.set)
        assert done.wait(timeout_s), f"stream {stream} does not end"

    def hold(self, stream: int) -> threading.Event:
        """Queue a kernel that ends when the event that is returned is set."""
        release = threading.Event()
        self.queue(stream, release.is_set)
        return release

    def _run(self) -> None:
        while not self._closed.is_set():
            with self.lock:
                heads = [stream for stream, works in self.streams.items() if works]
                self._random.shuffle(heads)
                moved = False
                for stream in heads[: self._random.randint(1, len(heads)) if heads else 0]:
                    works = self.streams[stream]
                    if works[0].step():
                        works.popleft()
                        moved = True
            time.sleep(0 if moved else 0.0005)


class World:
    """What the communicators of one unique id share."""

    def __init__(self) -> None:
        self.members: dict[int, Communicator] = {}
        self.posted: dict[int, dict[int, Part]] = {}
        self.sent: dict[tuple[int, int], deque[Part]] = {}
        self.wanted: dict[tuple[int, int], deque[Part]] = {}


class Part:
    """One call of a group: where it is, what it moves, whether it is done."""

    def __init__(
        self,
        communicator: Communicator,
        name: str,
        given: int,
        result: int,
        count: int,
        datatype: int,
        op: int = -1,
        root: int = -1,
    ) -> None:
        self.communicator = communicator
        self.name, self.given, self.result, self.count, self.datatype = (
            name,
            given,
            result,
            count,
            datatype,
        )
        self.op, self.root = op, root
        self.begun = self.done = False

    def elements(self, pointer: int, count: int) -> np.ndarray:
        return memory(pointer, count, _TYPES[self.datatype])

    def begin(self) -> None:
        """Let the other ranks see the call."""
        self.begun = True
        world, rank = self.communicator.world, self.communicator.rank
        if self.name == "send":
            world.sent.setdefault((rank, self.root), deque()).append(self)
            _match(world, rank, self.root)
        elif self.name == "recv":
            world.wanted.setdefault((self.root, rank), deque()).append(self)
            _match(world, self.root, rank)
        else:
            index = self.communicator.index
            self.communicator.index += 1
            parts = world.posted.setdefault(index, {})
            parts[rank] = self
            if len(parts) == self.communicator.size:
                _combine([parts[r] for r in range(self.communicator.size)])
                del world.posted[index]


def _match(world: World, source: int, target: int) -> None:
    sent, wanted = world.sent.get((source, target)), world.wanted.get((source, target))
    while sent and wanted:
        send, recv = sent.popleft(), wanted.popleft()
        assert (send.count, send.datatype) == (recv.count, recv.datatype), (
            "the ends of a transfer differ"
        )
        recv.elements(recv.result, recv.count)[...] = send.elements(send.given, send.count)
        send.done = recv.done = True


def _combine(parts: list[Part]) -> None:
    first = parts[0]
    assert len({(p.name, p.count, p.datatype, p.op, p.root) for p in parts}) == 1, (
        "the ranks' calls differ"
    )
    size, count = len(parts), first.count
    if first.name == "broadcast":
        root = parts[first.root]
        for part in parts:
            part.elements(part.result, count)[...] = root.elements(root.given, count)
    elif first.name == "allGather":
        for part in parts:
            for rank, other in enumerate(parts):
                part.elements(part.result, size * count)[rank * count : (rank + 1) * count] = (
                    other.elements(other.given, count)
                )
    else:
        given = count * size if first.name == "reduceScatter" else count
        values = [wide(part.elements(part.given, given), first.datatype) for part in parts]
        result = values[0]
        for value in values[1:]:
            result = (
                np.add(result, value) if first.op == _AVERAGE else _OPS[first.op](result, value)
            )
        result = result / size if first.op == _AVERAGE else result
        for rank, part in enumerate(parts):
            if first.name == "reduce" and rank != first.root:
                continue
            mine = (
                result[rank * count : (rank + 1) * count]
                if first.name == "reduceScatter"
                else result
            )
            part.elements(part.result, count)[...] = narrow(mine, first.datatype)
    for part in parts:
        part.done = True


def wide(array: np.ndarray, datatype: int) -> np.ndarray:
    """Return 16-bit floats as float32, and the rest as it is."""
    if _TYPES[datatype] == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32) if _TYPES[datatype] == "float16" else array.copy()


def narrow(array: np.ndarray, datatype: int) -> np.ndarray:
    """Undo ``wide``; values are whole and small, so that nothing is rounded."""
    if _TYPES[datatype] == "bfloat16":
        return (array.view(np.uint32) >> 16).astype(np.uint16)
    return array


def memory(pointer: int, count: int, dtype: str) -> np.ndarray:
    """Return the elements at an address; bfloat16 as uint16."""
    kind = np.dtype("uint16" if dtype == "bfloat16" else dtype)
    raw = (ctypes.c_char * (count * kind.itemsize)).from_address(pointer)
    return np.frombuffer(raw, kind)


class Communicator:
    """What ``cupy.cuda.nccl.NcclCommunicator`` offers."""

    def __init__(self, driver: Driver, world: World, size: int, rank: int) -> None:
        self.driver, self.world, self.size, self.rank = driver, world, size, rank
        self.index = 0
        self.aborted = False
        self.error: NcclError | None = None

    # NCCL's names are CuPy's.
    def allReduce(
        self, given: int, result: int, count: int, datatype: int, op: int, stream: int
    ) -> None:
        self._add(Part(self, "allReduce", given, result, count, datatype, op), stream)

    def reduce(
        self, given: int, result: int, count: int, datatype: int, op: int, root: int, stream: int
    ) -> None:
        assert (result != 0) == (root == self.rank)
        self._add(Part(self, "reduce", given, result, count, datatype, op, root), stream)

    def broadcast(
        self, given: int, result: int, count: int, datatype: int, root: int, stream: int
    ) -> None:
        self._add(Part(self, "broadcast", given, result, count, datatype, root=root), stream)

    def allGather(self, given: int, result: int, count: int, datatype: int, stream: int) -> None:
        self._add(Part(self, "allGather", given, result, count, datatype), stream)

    def reduceScatter(
        self, given: int, result: int, count: int, datatype: int, op: int, stream: int
    ) -> None:
        self._add(Part(self, "reduceScatter", given, result, count, datatype, op), stream)

    def send(self, given: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._add(Part(self, "send", given, 0, count, datatype, root=peer), stream)

    def recv(self, result: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._add(Part(self, "recv", 0, result, count, datatype, root=peer), stream)

    def abort(self) -> None:
        self.aborted = True

    def _add(self, part: Part, stream: int) -> None:
        if self.driver.machine.refuses is not None:
            raise self.driver.machine.refuses
        assert not self.aborted, "a call on an aborted communicator"
        self.driver.add(part, stream)


class Driver:
    """What ``colltensor.backends.nccl.driver.CupyDriver`` offers, for one rank."""

    error = NcclError

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._local = threading.local()
        self.made: list[Communicator] = []
        self.apart: list[str] = []
        """Threads that mind no other thread's captures."""
        self.refuses: BaseException | None = None

    def unique_id(self) -> bytes:
        return next(self.machine.names).to_bytes(128, "little")

    def connect(self, size: int, unique_id: bytes, rank: int) -> Communicator:
        if self.refuses is not None:
            raise self.refuses
        with self.machine.lock:
            world = self.machine.worlds.setdefault(unique_id, World())
            made = world.members[rank] = Communicator(self, world, size, rank)
            self.made.append(made)
        until = time.monotonic() + 20
        while len(world.members) < size and getattr(self._local, "group", None) is None:
            assert time.monotonic() < until
            time.sleep(0.001)
        return made

    def error_of(self, communicator: Communicator) -> BaseException | None:
        return communicator.error

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        self._local.group = []
        try:
            yield
        finally:
            group, self._local.group = self._local.group, None
        self._submit(group)

    def ungroup(self) -> None:
        self._local.group = None

    def add(self, part: Part, stream: int) -> None:
        group = getattr(self._local, "group", None)
        if group is None:
            self._submit([(part, stream)])
        else:
            group.append((part, stream))

    def _submit(self, group: list[tuple[Part, int]]) -> None:
        if not group:
            return
        self.machine.calls.append(
            (group[0][0].communicator.rank, tuple(part.name for part, _ in group))
        )
        for stream in {stream for _, stream in group}:
            self._launch([part for part, where in group if where == stream], stream)

    def _launch(self, parts: list[Part], stream: int) -> None:
        """Queue what a group does on one stream, as one kernel."""

        def step() -> bool:
            for part in parts:
                if not part.begun:
                    part.begin()
            return all(part.done or part.communicator.aborted for part in parts)

        self.machine.queue(stream, step)

    def enter(self, device: int) -> int:
        before = int(getattr(_LOCAL, "device", 0))
        _LOCAL.device = device
        return before

    def leave(self, before: int) -> None:
        _LOCAL.device = before

    @contextlib.contextmanager
    def on(self, device: int, stream: int | None = None) -> Iterator[None]:
        before, device_before = current(), self.enter(device)
        if stream is not None:
            _LOCAL.stream = stream
        try:
            yield
        finally:
            _LOCAL.stream = before
            self.leave(device_before)

    def new_stream(self) -> int:
        return new_stream(self.machine)

    def new_event(self) -> int:
        with self.machine.lock:
            event = next(self.machine.names)
            self.machine.events[event] = self.machine.reached[event] = 0
        return event

    def capturing(self, stream: int) -> bool:
        return stream in self.machine.captured

    def record(self, event: int, stream: int) -> None:
        machine = self.machine
        with machine.lock:
            machine.events[event] += 1
            number = machine.events[event]
            machine.queue(
                stream,
                lambda: machine.reached.__setitem__(event, max(machine.reached[event], number)),
            )

    def wait(self, stream: int, event: int) -> None:
        machine = self.machine
        with machine.lock:
            number = machine.events[event]
            machine.queue(stream, lambda: machine.reached[event] >= number)

    def done(self, event: int) -> bool:
        with self.machine.lock:
            return self.machine.reached[event] >= self.machine.events[event]

    def mind_own_captures(self) -> None:
        self.apart.append(threading.current_thread().name)

    def check(self, event: int) -> None:
        if self.machine.broken is not None:
            raise self.machine.broken

    def free(self, streams: list[int], events: list[int]) -> None:
        pass

    def allocate(self, nbytes: int, like: BufferView) -> BufferView:
        return MEMORY.allocate(nbytes, like)

    def copy(self, target: BufferView, source: BufferView, stream: int) -> None:
        with use(stream):
            MEMORY.copy(target, source)

    def to_keys(
        self, keys: BufferView, bits: BufferView, mask: int, infinity: int, nan: int
    ) -> None:
        to, of = elements(keys), elements(bits)
        _machine().queue(
            current(),
            lambda: to.__setitem__(..., keys_of(of.astype(to.dtype), mask, infinity, nan)),
        )

    def from_keys(self, bits: BufferView, keys: BufferView, mask: int) -> None:
        to, of = elements(bits), elements(keys)
        _machine().queue(current(), lambda: to.__setitem__(..., bits_of(of, mask).astype(to.dtype)))


def keys_of(bits: np.ndarray, mask: int, infinity: int, nan: int) -> np.ndarray:
    """Return keys of floats; see ``colltensor.backends.nccl.reductions.OrderEncoding``."""
    return np.where(
        (bits & mask) > infinity, bits.dtype.type(nan), np.where(bits < 0, bits ^ mask, bits)
    )


def bits_of(keys: np.ndarray, mask: int) -> np.ndarray:
    """Undo ``keys_of``."""
    return np.where(keys < 0, keys ^ mask, keys)


_LOCAL = threading.local()
"""Of each thread: the machine, and the current stream as CuPy and torch have it."""


def _machine() -> Machine:
    machine: Machine = _LOCAL.machine
    return machine


def enter(machine: Machine) -> None:
    """Make a machine this thread's, with the legacy default stream as the current one."""
    _LOCAL.machine, _LOCAL.stream = machine, LEGACY


def current() -> int:
    """Return this thread's current stream."""
    return int(getattr(_LOCAL, "stream", LEGACY))


def new_stream(machine: Machine) -> int:
    """Return a new stream."""
    with machine.lock:
        stream = next(machine.names)
        machine.streams[stream] = deque()
    return stream


@contextlib.contextmanager
def use(stream: int) -> Iterator[None]:
    """Make a stream the current one of this thread."""
    before = current()
    _LOCAL.stream = stream
    try:
        yield
    finally:
        _LOCAL.stream = before


def elements(view: BufferView) -> np.ndarray:
    """Return the elements of a view of the device's memory."""
    low, high = view.span()
    item = view.dtype.itemsize
    raw = memory(low, high - low, "uint8")
    strides = None if view.strides is None else tuple(step * item for step in view.strides)
    kind = "uint16" if view.dtype.name == "bfloat16" else view.dtype.name
    return np.ndarray(view.shape, kind, raw, view.pointer - low, strides)


class DeviceMemory:
    """The memory functions of the device, in place of CuPy's."""

    def allocate(self, nbytes: int, like: BufferView) -> BufferView:
        raw = np.full(max(nbytes, 1), 0xAB, np.uint8)
        _machine().kept.append(raw)
        return BufferView.from_address(
            raw.ctypes.data,
            (nbytes,),
            DTYPES["uint8"],
            device=like.device,
            owner=raw,
            stream=like.stream,
        )

    def copy(self, target: BufferView, source: BufferView) -> None:
        to, of = elements(target), elements(source)
        _machine().queue(current(), lambda: to.__setitem__(..., of.reshape(to.shape)))

    def overlap(self, first: BufferView, second: BufferView) -> bool:
        (low, high), (other_low, other_high) = first.span(), second.span()
        return low < other_high and other_low < high


MEMORY = DeviceMemory()


class DeviceArray:
    """A framework's mutable array on the device; its own work is queued on the current stream."""

    def __init__(self, values: np.ndarray, dtype: str | None = None, device: int = 0) -> None:
        self.memory = values
        _machine().kept.append(values)
        self.dtype: DType = DTYPES[dtype or str(values.dtype)]
        self.device = device
        self.bumps = 0

    def write(self, values: Any) -> None:
        """Queue overwriting the elements."""
        source = np.array(values, self.memory.dtype)
        _machine().queue(current(), lambda: self.memory.__setitem__(..., source))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.memory.shape

    def data_ptr(self) -> int:
        return int(self.memory.ctypes.data)

    def __iadd__(self, number: float) -> DeviceArray:
        _machine().queue(current(), lambda: np.add(self.memory, number, out=self.memory))
        return self

    def __imul__(self, number: float) -> DeviceArray:
        _machine().queue(current(), lambda: np.multiply(self.memory, number, out=self.memory))
        return self

    def read(self) -> np.ndarray:
        """Return the elements as they are after what is on the current stream."""
        found: list[np.ndarray] = []
        _machine().queue(current(), lambda: found.append(self.memory.copy()))
        _machine().synchronize(current())
        return found[0]

    def later(self) -> list[np.ndarray]:
        """Queue reading the elements; they are in the list that is returned when the stream has come there."""
        found: list[np.ndarray] = []
        _machine().queue(current(), lambda: found.append(self.memory.copy()))
        return found


class FrozenArray(DeviceArray):
    """An array of an immutable framework, which works on a stream of its own that nobody can name."""


class DeviceAdapter:
    """The adapter of ``DeviceArray``."""

    name = "device"
    immutable = False

    def claims(self, kind: type) -> bool:
        return kind is DeviceArray

    def source(self, tensor: Any) -> BufferView:
        return view_of(tensor, current())

    def target(self, tensor: Any) -> BufferView:
        return view_of(tensor, current())

    def allocate_result(self, tensor: Any, donate: bool) -> tuple[Any, BufferView]:
        return tensor, view_of(tensor, current())

    def written(self, tensor: Any) -> None:
        tensor.bumps += 1

    def stream(self, index: int) -> int:
        return current()


class FrozenAdapter(DeviceAdapter):
    """The adapter of ``FrozenArray``, as JAX's."""

    name = "frozen"
    immutable = True

    def claims(self, kind: type) -> bool:
        return kind is FrozenArray

    def source(self, tensor: Any) -> BufferView:
        _machine().synchronize(_LOCAL.xla)
        return view_of(tensor, LEGACY)

    target = source

    def allocate_result(self, tensor: Any, donate: bool) -> tuple[Any, BufferView]:
        result = FrozenArray(np.empty_like(tensor.memory), tensor.dtype.name, tensor.device)
        machine, before = _machine(), tensor.memory
        machine.queue(_LOCAL.xla, lambda: result.memory.__setitem__(..., before))
        machine.synchronize(_LOCAL.xla)
        return result, view_of(result, LEGACY)

    def written(self, tensor: Any) -> None:
        pass

    def stream(self, index: int) -> None:
        return None


def frozen_stream(machine: Machine) -> int:
    """Give this thread a stream for the immutable framework."""
    _LOCAL.xla = new_stream(machine)
    return int(_LOCAL.xla)


def view_of(tensor: DeviceArray, stream: int) -> BufferView:
    """View a device array."""
    array = tensor.memory
    strides = (
        None
        if array.flags.c_contiguous
        else tuple(step // array.itemsize for step in array.strides)
    )
    return BufferView(
        array.ctypes.data,
        array.size,
        tensor.dtype,
        Device("cuda", tensor.device),
        array.shape,
        strides,
        False,
        None,
        tensor,
        stream,
    )
