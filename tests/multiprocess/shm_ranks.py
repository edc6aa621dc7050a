"""What the tests of shared memory run in their ranks: groups of their own, and the ways in which a rank can go."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np

import colltensor as col
from colltensor.types import DTYPES, DType

Array = np.ndarray[Any, Any]


def fresh() -> str:
    """A group name that nobody has."""
    return f"shm-{uuid4().hex[:8]}"


@contextlib.contextmanager
def own_group(
    rank: int, world_size: int, name: str, timeout_s: float = 20.0, backend: str = "shm"
) -> Iterator[Any]:
    """A group that the test may break, in shared memory or of the native Gloo; destroyed when it ends."""
    folder = Path(tempfile.gettempdir()) / name
    folder.mkdir(exist_ok=True)
    over = {"provider": "native", "interface": "lo"} if backend == "gloo" else {}
    group = col.init_collective_group(
        world_size, rank, backend, name, init_method=f"file://{folder}", timeout_s=timeout_s, **over
    )
    try:
        yield group
    finally:
        col.destroy_collective_group(name)


def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    if dtype.name in np.sctypeDict:
        return np.dtype(dtype.name)
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, dtype.name))


def values(rank: int, count: int, dtype: str, salt: int = 0) -> Array:
    """Bytes that no other rank, index or salt has, as far as the type can tell them apart; small numbers."""
    kind = DTYPES[dtype]
    numbers = np.arange(count) * 7 + rank * 31 + salt * 101 + 1
    if kind.kind == "b":
        return numbers % 3 == 0
    if kind.itemsize == 1:
        numbers = numbers % 61
    if kind.kind == "f" and kind.itemsize == 2:
        numbers = numbers % 61 / 8
    return numbers.astype(numpy_dtype(kind))


def strided(array: Array, way: int) -> Array:
    """Return an array of the same elements in row-major order in another memory layout."""
    count = len(array)
    if way == 0:
        room = np.zeros((count, 3), array.dtype)
        room[:, 1] = array
        return room[:, 1]
    if way == 1:
        room = np.zeros(count, array.dtype)[::-1]
        room[:] = array
        return room
    if way == 2 and count % 4 == 0:
        return np.asfortranarray(array.reshape(4, count // 4))
    if way == 3 and count % 6 == 0:
        room = np.zeros((3, 2, count // 6 + 5, 2), array.dtype)[:, :, 2:-3, 0]
        room[...] = array.reshape(3, 2, count // 6)
        return room
    return array


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def shared_mappings() -> int:
    """Count the mappings of this process that are ours."""
    return Path("/proc/self/maps").read_text().count("memfd:colltensor")


class Held(NamedTuple):
    """What a process holds that a group could leave behind."""

    descriptors: tuple[str, ...]
    mappings: int
    threads: int

    @classmethod
    def now(cls) -> Held:
        kinds = []
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the listing's own
                kinds.append(os.readlink(f"/proc/self/fd/{number}").partition("[")[0])
        return cls(tuple(sorted(kinds)), shared_mappings(), len(os.listdir("/proc/self/task")))

    def left_behind(self) -> list[str]:
        """Return what is held beyond this, once threads that were told to end have ended.

        Less than this may be held: what an earlier test had told to end.
        """
        deadline = time.monotonic() + 2.0
        while (more := Held.now()._beyond(self)) and time.monotonic() < deadline:
            time.sleep(0.01)
        return more

    def _beyond(self, before: Held) -> list[str]:
        kinds = Counter(self.descriptors) - Counter(before.descriptors)
        more = [f"descriptor of {kind}" for kind in kinds.elements()]
        for name in ("mappings", "threads"):
            had, has = getattr(before, name), getattr(self, name)
            more += [f"{has - had} {name}"] if has > had else []
        return more
