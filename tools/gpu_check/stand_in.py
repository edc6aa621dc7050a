"""A fake device in the place of the card: ``tests/device.py`` and what goes with it.

It is for machines without a card. It puts the library ``device`` in the place of torch and CuPy,
and JAX on the CPU in that of JAX on CUDA, so that the checks, this program and the functions of
``tests/gpu`` are run where they are written.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import device
import gpu_arrays
import gpu_streams
import gpu_threads
import numpy as np
from device import DeviceAdapter, DeviceArray, Machine
from nccl_world import Spec
from samples import Layout, host_memory, host_view

from colltensor import adapters, backends

LONG_S = 0.05
_COUNT = 1000


class FakeQueue:
    """As ``gpu_streams.Queue``, of the fake device."""

    machine: Machine

    def __init__(self, library: str) -> None:
        self.stream = device.new_stream(self.machine)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> FakeQueue:
        self._stack.enter_context(device.use(self.stream))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def current(self) -> contextlib.AbstractContextManager[None]:
        """Make the stream the current one inside another queue's."""
        return device.use(self.stream)

    def full(self, value: float, count: int = _COUNT) -> DeviceArray:
        """Return an array that has its values once the stream comes to it."""
        tensor = DeviceArray(np.full(min(count, 1 << 16), 77, np.float32))
        tensor.write(np.full_like(tensor.memory, value))
        return tensor

    def sleep(self, seconds: float) -> None:
        """Queue a kernel that takes so long."""
        until: list[float] = []

        def step() -> bool:
            if not until:
                until.append(time.monotonic() + seconds)
            return time.monotonic() >= until[0]

        self.machine.queue(self.stream, step)

    def mark(self) -> threading.Event:
        """Return an event behind all that is queued now."""
        event = threading.Event()
        self.machine.queue(self.stream, event.set)
        return event

    def passed(self, event: threading.Event) -> bool:
        """Return whether the stream has come past an event."""
        return event.is_set()

    def read(self, tensor: DeviceArray) -> set[float]:
        """Read an array as the stream comes to it."""
        with self.current():
            return set(tensor.read().tolist())

    def synchronize(self) -> None:
        """Wait, on the host, for the stream."""
        self.machine.synchronize(self.stream)


class _Memory:
    """The bytes around a sample, as CuPy's array has them."""

    def __init__(self, machine: Machine, raw: Any) -> None:
        self._machine, self._raw = machine, raw

    def get(self) -> Any:
        self._machine.synchronize(device.current())
        return self._raw.copy()


class FakeSeams:
    """What the checks of failures do to a device, done to the fake one."""

    machine: Machine

    @staticmethod
    @contextlib.contextmanager
    def replaced_connect(connect: Callable[..., Any]) -> Iterator[None]:
        """Let another function stand for the driver's ``connect``."""
        original = device.Driver.connect
        device.Driver.connect = lambda self, *given: connect(original, self, *given)  # type: ignore[method-assign]
        try:
            yield
        finally:
            device.Driver.connect = original  # type: ignore[method-assign]

    @classmethod
    def write_to_nowhere(cls) -> None:
        """Break the device."""
        cls.machine.broken = RuntimeError("an illegal memory access was encountered")


def install() -> None:
    """Put the fake device in the place of all that needs a card, for the rest of this process."""
    machine = Machine(seed=1)
    device.enter(machine)
    FakeQueue.machine = FakeSeams.machine = machine
    backends.register_backend("nccl", Spec(machine))
    adapters._MEMORIES["cuda"] = "device"  # type: ignore[index]
    adapters.add_adapter(DeviceAdapter())
    gpu_streams.Queue = FakeQueue  # type: ignore[assignment,misc]
    gpu_streams.PLATFORM = "cpu"
    gpu_arrays.DeviceSample._device = _sample(machine)  # type: ignore[attr-defined]
    gpu_arrays.supports = _supports(gpu_arrays.supports)
    gpu_threads.own_streams = _own_streams(machine)
    importlib.import_module("test_gpu_streams").LONG_S = LONG_S
    importlib.import_module("colltensor.backends.nccl.backend")._CLOSE_TIMEOUT_S = LONG_S
    jit = importlib.import_module("test_gpu_jit")
    jit.DTYPES, jit.SHAPES_OF, jit.PRODUCTS, jit.TURNS = ("float32",), {"float32": ((7,),)}, 1, 3
    cases = importlib.import_module("gpu_cases")
    cases.REDUCIBLE, cases.DTYPES = (
        ("bool", "int32", "float32", "bfloat16"),
        ("uint8", "float32", "complex64"),
    )
    cases.LARGE = 1 << 12
    failures = importlib.import_module("failures")
    failures.seams = FakeSeams
    failures.TIMEOUT_S, failures.HOLD_S = 0.4, 0.3


def _sample(machine: Machine) -> Callable[[Any, Any], DeviceArray]:
    def made(sample: Any, view: Any) -> DeviceArray:
        raw = host_memory(sample._dtype, sample._layout)
        raw[...] = sample._before
        sample._memory = _Memory(machine, raw)
        return DeviceArray(host_view(raw, sample._dtype, sample._layout), sample._dtype)

    return made


def _supports(others: Callable[[str, str, Layout], bool]) -> Callable[[str, str, Layout], bool]:
    def supports(library: str, dtype: str, layout: Layout) -> bool:
        if library == "device":
            return not dtype.startswith("float8")
        return others(library, dtype, layout)

    return supports


def _own_streams(machine: Machine) -> Callable[[tuple[str, ...]], contextlib.ExitStack]:
    def own_streams(libraries: tuple[str, ...]) -> contextlib.ExitStack:
        device.enter(machine)
        stack = contextlib.ExitStack()
        stack.enter_context(device.use(device.new_stream(machine)))
        return stack

    return own_streams
