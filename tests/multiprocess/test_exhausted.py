"""What the system refuses one rank while a group is made is told by that rank, as what it is."""

from __future__ import annotations

import os
import re
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import RankPool

import colltensor as col
from colltensor.backends.gloo import sockets

TIMEOUT_S = 1.0


@contextmanager
def lack_of(what: str, left: int) -> Iterator[None]:
    """Leave this process so many descriptors or threads, or take memfd_create away, or /proc."""
    with pytest.MonkeyPatch.context() as patch:
        if what == "files":
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            lowest = os.dup(0)
            os.close(lowest)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + left, limits[1]))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            return
        if what == "threads":
            begin, budget = threading.Thread.start, [left]

            def start(thread: threading.Thread) -> None:
                budget[0] -= 1
                if budget[0] < 0:
                    raise RuntimeError("can't start new thread")
                begin(thread)

            patch.setattr(threading.Thread, "start", start)
        elif what == "memfd":
            patch.setattr(os, "memfd_create", _refuse)
        elif what == "proc":
            patch.setattr(os, "listdir", _refuse)
        yield


def _refuse(*arguments: Any) -> Any:
    raise PermissionError(1, "Operation not permitted")


def enter(
    rank: int, world_size: int, url: str, what: str, left: int, who: int, backend: str
) -> str:
    """Make a group on ranks of which one lacks something; return what came of it."""
    if backend == "gloo":
        col.is_backend_available("gloo")  # loads the library, which takes a descriptor for a moment
    try:
        with lack_of(what if rank == who else "", left):
            group = col.init_collective_group(
                world_size, rank, backend, "exhausted", init_method=url, timeout_s=TIMEOUT_S
            )
        result = group.allreduce(np.ones(1)).tolist()
        group.destroy()
    except col.CollectiveError as error:
        return f"{type(error).__name__}: {error}"
    return str(result)


@pytest.mark.shm
@pytest.mark.parametrize(
    ("what", "left", "who", "words"),
    [
        ("files", 0, 1, r"\w+Error: .*\(ulimit -n\)"),
        ("files", 1, 1, r"\w+Error: .*\(ulimit -n\)"),
        ("files", 2, 1, r"\w+Error: .*\(ulimit -n\)"),
        ("files", 3, 0, r"GroupError: .*\(ulimit -n\)"),
        ("threads", 0, 0, r"GroupError: init_collective_group\(.*\(ulimit -u"),
        ("threads", 0, 1, r"GroupError: group '.*\(ulimit -u"),
        ("threads", 1, 0, r"CollectiveTimeoutError: .*rank 0 .*\bthread\b"),
        ("memfd", 0, 0, r"BackendUnavailableError: .*\[Errno 1\]"),
    ],
)
def test_the_rank_that_lacks_something_says_so(
    pool: RankPool, tmp_path: Path, what: str, left: int, who: int, words: str
) -> None:
    outcomes = pool.run(2, enter, f"file://{tmp_path}/x", what, left, who, "shm")
    assert re.match(words, outcomes[who]), outcomes
    assert pool.run(2, enter, f"file://{tmp_path}/x", "", 0, 0, "shm") == ["[2.0]", "[2.0]"]


@pytest.mark.gloo
def test_gloo_without_proc(pool: RankPool, tmp_path: Path) -> None:
    """It failed for want of /proc/self/task."""
    assert pool.run(2, enter, f"file://{tmp_path}/x", "proc", 0, 1, "gloo") == ["[2.0]", "[2.0]"]


def test_descriptors_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "listdir", _refuse)
    assert {0, 1, 2} <= set(sockets._descriptors())
