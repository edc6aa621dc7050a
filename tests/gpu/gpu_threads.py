"""Ranks as threads of one process that share a device: one context, no time slicing between their kernels.

Each thread works on streams of its own. They may not be the legacy default stream, on which all threads would wait for
each other, so that JAX, which is told of no other, is not among the libraries here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_cases import CASES
from worlds import Report

from colltensor.group import connect
from colltensor.options import GroupOptions
from colltensor.rendezvous import Introduction, meet, open_directory

JOIN_S = 400.0


def own_streams(libraries: tuple[str, ...]) -> contextlib.ExitStack:
    """Make new streams of CuPy, and of torch if it is used, this thread's current ones until it is closed."""
    stack = contextlib.ExitStack()
    cupy = importlib.import_module("cupy")
    stack.enter_context(cupy.cuda.Device(0))
    if "torch" in libraries:
        torch = importlib.import_module("torch")
        stack.enter_context(torch.cuda.stream(torch.cuda.Stream(0)))
    stack.enter_context(cupy.cuda.Stream(non_blocking=True))
    return stack


def run(
    size: int,
    folder: Path,
    function: Callable[[Any], Any],
    timeout_s: float = 60.0,
    *,
    check: bool = False,
    libraries: tuple[str, ...] = ("torch", "cupy"),
) -> list[Any]:
    """Return what ``function(group)`` returns on every rank of a new group, each a thread of this process."""
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def rank_main(rank: int) -> None:
        try:
            directory, _, _ = open_directory(f"file://{folder}", rank, size)
            deadline = time.monotonic() + timeout_s
            part = Introduction(
                group_name=f"threads-{size}", world_size=size, rank=rank, backend="nccl"
            )
            meeting = meet(directory, part, deadline)
            group = connect(meeting, GroupOptions("nccl", timeout_s, check=check), deadline)
            try:
                with own_streams(libraries):
                    results[rank] = function(group)
            finally:
                group.destroy()
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_S)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return results


def run_cases(
    rank: int, world_size: int, size: int, name: str, libraries: tuple[str, ...], folder: str
) -> list[Any]:
    """Run one set of cases in threads of this one process.

    First one rank alone as each of the libraries, so that no kernel is compiled while another rank's waits.
    """

    def cases(group: Any, order: tuple[str, ...] = libraries) -> dict[str, str]:
        report = Report(group)
        CASES[name](group, report, order)
        return report.done()

    for place in range(len(libraries)):
        order = libraries[place:] + libraries[:place]
        run(1, Path(folder) / f"alone-{place}", functools.partial(cases, order=order))
    return run(size, Path(folder) / "together", cases)
