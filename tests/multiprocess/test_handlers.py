"""A signal's handler that raises in the middle of a call: its exception comes out as itself, whatever its class."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from c10d_ranks import world
from pool import RankPool, on_host

import colltensor as col
from colltensor.errors import is_from_handler

pytestmark = [pytest.mark.shm, pytest.mark.slow]

SOON_S, LATE_S = 0.04, 0.12
CLASSES = (
    TimeoutError,
    OSError,
    ConnectionResetError,
    RuntimeError,
    ValueError,
    col.CollectiveTimeoutError,
)
CALLS: dict[str, Callable[[Any], Any]] = {
    "small": lambda group: group.allreduce(np.zeros(3, np.float32)),
    "large": lambda group: group.allreduce(np.zeros(1_000_000, np.float32)),
    "tree": lambda group: group.allreduce([np.zeros(3), np.zeros(300_000)[::2]]),
    "barrier": lambda group: group.barrier(),
    "recv": lambda group: group.recv(np.zeros(3), 1),
    "object": lambda group: group.allgather_object(1),
    "wait": lambda group: group.allreduce(np.zeros(3), async_op=True).wait(),
}


WAYS = [("small", kind) for kind in CLASSES] + [
    (name, CLASSES[number % 4]) for number, name in enumerate(CALLS) if name != "small"
]
"""Every class in one call (in shared memory alone), and every call with one class; all pairs go the same ways."""


def alarm(error: BaseException) -> None:
    def handler(number: int, frame: object) -> None:
        raise error

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, SOON_S)


def interrupted(
    rank: int, size: int, path: Path, backend: str, provider: str | None, hosts: str
) -> None:
    options = {"provider": provider, "interface": "lo"} if provider else {}
    for number, (name, kind) in enumerate(WAYS if backend == "shm" else WAYS[len(CLASSES) - 1 :]):
        label = f"{path.name}-{name}-{number}"
        with on_host(hosts[rank] if hosts else None):
            group = col.init_collective_group(
                size,
                rank,
                backend,
                label,
                init_method=f"file://{path.parent / label}",
                timeout_s=10,
                **options,
            )
        if rank == 0:
            mine = kind("mine")
            alarm(mine)
            with pytest.raises(kind) as caught:
                CALLS[name](group)
            assert caught.value is mine, (name, caught.value)
            if name != "wait":  # whose operation goes on
                with pytest.raises(col.GroupError, match="interrupted"):
                    group.barrier()
        else:
            time.sleep(LATE_S)
        col.destroy_collective_group(label)


@pytest.mark.parametrize(("backend", "hosts"), [("shm", ""), ("hierarchical", "aab")])
def test_a_handlers_exception_comes_out_as_itself(
    pool: RankPool, tmp_path: Path, backend: str, hosts: str
) -> None:
    pool.run(len(hosts) or 2, interrupted, tmp_path / "meet", backend, None, hosts)


@pytest.mark.gloo
def test_a_handlers_exception_comes_out_of_gloo(
    pool: RankPool, tmp_path: Path, provider: str
) -> None:
    pool.run(2, interrupted, tmp_path / "meet", "gloo", provider, "")


def interrupted_in_c10d(rank: int, size: int, path: Path) -> None:
    for number, kind in enumerate(CLASSES[:4]):
        for name in ("small", "wait", "recv") if number == 0 else ("small",):
            with world(rank, size, path.with_name(f"{name}{number}")) as (torch, dist):
                calls = {
                    "small": lambda: dist.all_reduce(torch.zeros(3)),
                    "wait": lambda: dist.all_reduce(torch.zeros(3), async_op=True).wait(),
                    "recv": lambda: dist.recv(torch.zeros(3), 1),
                }
                if rank == 0:
                    mine = kind("mine")
                    alarm(mine)
                    with pytest.raises(kind) as caught:
                        calls[name]()
                    assert caught.value is mine, (name, caught.value)
                else:
                    time.sleep(LATE_S)


@pytest.mark.needs("torch")
def test_a_handlers_exception_comes_out_of_torch_distributed(
    pool: RankPool, tmp_path: Path
) -> None:
    pool.run(2, interrupted_in_c10d, tmp_path / "store")


def raise_in(error: BaseException, *arguments: object) -> None:
    raise error


@pytest.mark.parametrize("is_given_its_frame", [True, False])
def test_a_handler_is_known_by_its_callers_frame(is_given_its_frame: bool) -> None:
    error = TimeoutError()
    with pytest.raises(TimeoutError):
        raise_in(error, signal.SIGALRM, sys._getframe() if is_given_its_frame else None)
    assert is_from_handler(error) is is_given_its_frame
