"""Groups whose ranks are threads of one process and whose tensors are on a fake device; see ``device``."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import device
import numpy as np
import pytest
from device import DeviceAdapter, DeviceArray, Driver, FrozenAdapter, Machine

from colltensor import adapters
from colltensor.backends.nccl import communicators
from colltensor.backends.nccl.backend import NcclBackend
from colltensor.backends.nccl.communicators import CommunicatorCache
from colltensor.group import Group, connect
from colltensor.options import GroupOptions
from colltensor.rendezvous import Introduction, meet, open_directory

JOIN_S = 60.0
COUNT = 37


class Spec:
    """The table's entry ``nccl``, with the fake device in CUDA's place."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.drivers: dict[int, Driver] = {}

    def available(self) -> str | None:
        return None

    def create(
        self, control: Any, meeting: Any, *, timeout_s: float, interface: Any, provider: Any
    ) -> NcclBackend:
        driver = self.drivers[control.rank if control else 0] = Driver(self.machine)
        return NcclBackend(control, timeout_s, driver)


@dataclass
class Raised:
    """What a rank raised."""

    error: BaseException


class World:
    """Runs a function on every rank of a new group, each in a thread."""

    def __init__(self, machine: Machine, spec: Spec, folder: Path) -> None:
        self.machine = machine
        self.spec = spec
        self._folder = folder
        self._made = 0

    def run(
        self,
        size: int,
        function: Callable[[Group], Any],
        *,
        backend: str = "nccl",
        timeout_s: float = 20.0,
        check: bool = False,
    ) -> list[Any]:
        """Return what the function returned, or raised, on every rank."""
        self._made += 1
        meeting_place = f"file://{self._folder}/{self._made}"
        results: list[Any] = [None] * size

        def rank_main(rank: int) -> None:
            device.enter(self.machine)
            device.frozen_stream(self.machine)
            options = GroupOptions(backend, timeout_s, check=check)
            try:
                directory, _, _ = open_directory(meeting_place, rank, size)
                deadline = time.monotonic() + timeout_s
                part = Introduction(
                    group_name="tested", world_size=size, rank=rank, backend=backend
                )
                meeting = meet(directory, part, deadline)
                group = connect(meeting, options, deadline)
                try:
                    with device.use(device.new_stream(self.machine)):
                        results[rank] = function(group)
                finally:
                    group.destroy()
            except BaseException as error:
                results[rank] = Raised(error)

        threads = [
            threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(JOIN_S)
        assert not any(thread.is_alive() for thread in threads), "a rank hangs"
        return results

    def values(self, size: int, function: Callable[[Group], Any], **options: Any) -> list[Any]:
        """Return what the function returned on every rank; raise what one raised."""
        results = self.run(size, function, **options)
        for result in results:
            if isinstance(result, Raised):
                raise result.error
        return results


@contextlib.contextmanager
def world(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[World]:
    """Give a world; takes the fake device out of the tables afterwards."""
    machine = Machine(seed)
    spec = Spec(machine)
    monkeypatch.setitem(adapters._MEMORIES, "cuda", "device")
    monkeypatch.setattr("colltensor.backends._registered", {"nccl": spec})
    monkeypatch.setattr(adapters, "_registered", [DeviceAdapter(), FrozenAdapter()])
    for kind in (device.DeviceArray, device.FrozenArray):
        adapters.known.pop(kind, None)
    random.seed(seed)
    try:
        yield World(machine, spec, folder)
    finally:
        for kind in (device.DeviceArray, device.FrozenArray):
            adapters.known.pop(kind, None)
        machine.close()
    assert communicators._local == {}  # nothing is kept of communicators that are made


def values(rank: int, count: int = COUNT, dtype: str = "float32") -> np.ndarray:
    return (np.arange(count) % 11 + rank + 1).astype(dtype)


def on_device(rank: int, count: int = COUNT, dtype: str = "float32") -> DeviceArray:
    """Return an array that gets its values only when the stream comes to them."""
    tensor = DeviceArray(np.full(count, 77, dtype))
    tensor.write(values(rank, count, dtype))
    return tensor


def as_if_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let synchronous calls go on the frameworks' streams, which they do not where ranks are threads."""
    connect = CommunicatorCache._connect
    monkeypatch.setattr(
        CommunicatorCache, "_connect", lambda *arguments: connect(*arguments)._replace(shared=False)
    )
