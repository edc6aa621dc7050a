"""What the tests of several hosts run in their ranks: groups of their own on simulated hosts."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pool import on_host

import colltensor as col


@contextlib.contextmanager
def group_on(
    hosts: str, rank: int, name: str, backend: str = "auto", timeout_s: float = 20.0, **options: Any
) -> Iterator[Any]:
    """A group that the test may break, every rank on the simulated host that ``hosts`` has for it."""
    folder = Path(tempfile.gettempdir()) / name
    folder.mkdir(exist_ok=True)
    with on_host(hosts[rank]):
        group = col.init_collective_group(
            len(hosts),
            rank,
            backend,
            name,
            init_method=f"file://{folder}",
            timeout_s=timeout_s,
            **options,
        )
    try:
        yield group
    finally:
        col.destroy_collective_group(name)


def held() -> tuple[int, int, int]:
    """Return how many descriptors, shared mappings of ours and threads of ours this process has."""
    mappings = Path("/proc/self/maps").read_text().count("memfd:colltensor")
    threads = sum(thread.name.startswith("colltensor") for thread in threading.enumerate())
    return len(os.listdir("/proc/self/fd")), mappings, threads
