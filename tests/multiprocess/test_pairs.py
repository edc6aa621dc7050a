"""Transfers between ranks that wait for each other: who is named, what passes, what is refused; over every backend."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from pool import RankPool, on_host
from shm_ranks import fresh

import colltensor as col


class Wire(NamedTuple):
    """A backend, its provider, and the host of each rank, by letter."""

    backend: str
    provider: str | None = None
    hosts: str = ""

    def __str__(self) -> str:
        return self.hosts or self.provider or self.backend


WIRES = [
    pytest.param(Wire("shm"), id="shm", marks=pytest.mark.shm),
    pytest.param(Wire("gloo", "native"), id="native", marks=pytest.mark.gloo),
    pytest.param(Wire("gloo", "torch"), id="torch", marks=[pytest.mark.gloo, pytest.mark.needs("torch")]),
    pytest.param(Wire("hierarchical", None, "aabb"), id="aabb", marks=[pytest.mark.gloo, pytest.mark.shm]),
    pytest.param(Wire("hierarchical", None, "abab"), id="abab", marks=[pytest.mark.gloo, pytest.mark.shm]),
]


@contextmanager
def wired(rank: int, size: int, wire: Wire, name: str, timeout_s: float) -> Iterator[Any]:
    """A group over a wire that the test may break; destroyed when it ends."""
    folder = Path(tempfile.gettempdir()) / name
    folder.mkdir(exist_ok=True)
    hosts = wire.hosts and f"{wire.hosts}c"  # of three ranks on two hosts one is alone, of two ranks both share one
    with ExitStack() as stack:
        if hosts:
            stack.enter_context(on_host(f"{name} {hosts[rank]}"))
        group = col.init_collective_group(
            size, rank, wire.backend, name, init_method=f"file://{folder}", timeout_s=timeout_s,
            provider=wire.provider, **({} if wire.backend == "shm" else {"interface": "lo"}),
        )
        try:
            yield group
        finally:
            col.destroy_collective_group(name)


# Who is named.


def wait_in_a_chain(
    rank: int, size: int, wire: Wire, name: str, first: int, how: str
) -> tuple[tuple[int, ...], float]:
    """Rank 2 does not come, rank 0 waits for it, and rank 1 for rank 0; rank ``first`` began before the other."""
    with wired(rank, size, wire, name, 1.0) as group:
        pids = group.allgather_object(os.getpid())
        began = time.monotonic()
        if rank == 0 and how == "stopped":
            time.sleep(0.2)
            os.kill(pids[2], signal.SIGSTOP)
            threading.Timer(3.5, os.kill, (pids[2], signal.SIGCONT)).start()
        if rank == 2:
            time.sleep(3.0 if how == "late" else 0.7)
            with pytest.raises(col.CollectiveTimeoutError) as caught:
                group.send(np.ones(4), 0)
            return caught.value.ranks, 0.0
        time.sleep(0.0 if rank == first else 0.4)
        with pytest.raises(col.CollectiveTimeoutError) as caught:
            group.recv(np.ones(4), 2 if rank == 0 else 0)
        took = time.monotonic() - began
        time.sleep(max(0.0, began + 4.2 - time.monotonic()))  # so that rank 2 can hear of it, and not of their end
        return caught.value.ranks, took


@pytest.mark.slow
@pytest.mark.parametrize(("first", "how"), [(0, "late"), (1, "late"), (1, "stopped")])
@pytest.mark.parametrize("wire", WIRES)
def test_who_waits_for_another_is_not_named(pool: RankPool, wire: Wire, first: int, how: str) -> None:
    found = pool.run(3, wait_in_a_chain, wire, fresh(), first, how)
    assert [ranks for ranks, _ in found] == [(2,)] * 3
    assert max(took for _, took in found) < 3.4, found


def shift(group: Any, times: int) -> None:
    for _ in range(times):
        group.sendrecv(
            np.ones(50_000), (group.rank + 1) % group.world_size,
            np.ones(50_000), (group.rank - 1) % group.world_size,
        )


def come_late_to_a_ring(rank: int, size: int, wire: Wire, name: str) -> tuple[int, ...]:
    """Rank 2 takes part in a gather and not in the shift along the ring that follows."""
    with wired(rank, size, wire, name, 1.0) as group:
        group.gather([np.ones(3) for _ in range(size)] if rank == 0 else None, np.ones(3), 0)
        if rank == 2:
            time.sleep(3.0)
        with pytest.raises(col.CollectiveTimeoutError) as caught:
            shift(group, 3)
        return caught.value.ranks


@pytest.mark.slow
@pytest.mark.parametrize("wire", WIRES)
def test_a_ring_names_the_rank_that_does_not_come(pool: RankPool, wire: Wire) -> None:
    assert pool.run(4, come_late_to_a_ring, wire, fresh()) == [(2,)] * 4
