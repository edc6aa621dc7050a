"""Transfers between ranks that wait for each other: who is named, what passes, what is refused; over every backend."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
from pool import RankPool, on_host
from shm_ranks import fresh

import colltensor as col
from colltensor.backends.gloo.native_provider import NativeProvider


class Transport(NamedTuple):
    """A backend, its provider, and the host of each rank, by letter."""

    backend: str
    provider: str | None = None
    hosts: str = ""

    def __str__(self) -> str:
        return self.hosts or self.provider or self.backend


TRANSPORTS = [
    pytest.param(Transport("shm"), id="shm", marks=pytest.mark.shm),
    pytest.param(Transport("gloo", "native"), id="native", marks=pytest.mark.gloo),
    pytest.param(
        Transport("gloo", "torch"), id="torch", marks=[pytest.mark.gloo, pytest.mark.needs("torch")]
    ),
    pytest.param(
        Transport("hierarchical", None, "aabb"),
        id="aabb",
        marks=[pytest.mark.gloo, pytest.mark.shm],
    ),
    pytest.param(
        Transport("hierarchical", None, "abab"),
        id="abab",
        marks=[pytest.mark.gloo, pytest.mark.shm],
    ),
]


@contextmanager
def wired(rank: int, size: int, transport: Transport, name: str, timeout_s: float) -> Iterator[Any]:
    """A group over a transport that the test may break; destroyed when it ends."""
    folder = Path(tempfile.gettempdir()) / name
    folder.mkdir(exist_ok=True)
    # of three ranks on two hosts one is alone, of two ranks both share one
    hosts = transport.hosts and f"{transport.hosts}c"
    with ExitStack() as stack:
        if hosts:
            stack.enter_context(on_host(f"{name} {hosts[rank]}"))
        group = col.init_collective_group(
            size,
            rank,
            transport.backend,
            name,
            init_method=f"file://{folder}",
            timeout_s=20.0,
            provider=transport.provider,
            **({} if transport.backend == "shm" else {"interface": "lo"}),
        )
        group.set_timeout(timeout_s)
        try:
            yield group
        finally:
            col.destroy_collective_group(name)


# Who is named.


def wait_in_a_chain(
    rank: int, size: int, transport: Transport, name: str, first: int, how: str
) -> tuple[tuple[int, ...], float]:
    """Rank 2 does not come, rank 0 waits for it, and rank 1 for rank 0; rank ``first`` began before the other."""
    with wired(rank, size, transport, name, 1.0) as group:
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
        # so that rank 2 can hear of it, and not of their end
        time.sleep(max(0.0, began + 4.2 - time.monotonic()))
        return caught.value.ranks, took


@pytest.mark.slow
@pytest.mark.parametrize(("first", "how"), [(0, "late"), (1, "late"), (1, "stopped")])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_who_waits_for_another_is_not_named(
    pool: RankPool, transport: Transport, first: int, how: str
) -> None:
    found = pool.run(3, wait_in_a_chain, transport, fresh(), first, how)
    assert [ranks for ranks, _ in found] == [(2,)] * 3
    assert max(took for _, took in found) < 3.4, found


def wait_for_late_ranks(group: Any, calls: str) -> None:
    """Rank 0 waits for rank 2, and rank 1 for rank 0 or with it."""
    rank = group.rank
    if calls == "large" and rank < 2:
        group.sendrecv(np.ones(2_000_000), 1 - rank, np.ones(2_000_000), 1 - rank)
        group.allreduce(np.ones(2_000_000))
    elif rank == 2:
        group.send(np.ones(3), 0)
    else:
        group.recv(np.ones(3), 2 if rank == 0 else 0)


def leave_at_the_timeout(
    rank: int, size: int, transport: Transport, name: str, delay_s: float, calls: str
) -> tuple[str, tuple[int, ...]]:
    """Rank 2 does not come, rank 0 times out and its process ends at once; rank 1 waits for either or both."""
    with wired(rank, size, transport, name, 1.0) as group:
        group.barrier()
        if rank == 2:
            time.sleep(2.5)
        elif rank == 1:
            time.sleep(delay_s)
        with pytest.raises(col.CollectiveError) as caught:
            wait_for_late_ranks(group, calls)
        if rank == 0:
            os._exit(3)
        return type(caught.value).__name__, getattr(caught.value, "ranks", ())


@pytest.mark.slow
@pytest.mark.parametrize("calls", ["recv", "large"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rank_that_leaves_at_its_timeout_is_not_the_one_to_name(
    pool: RankPool, transport: Transport, calls: str
) -> None:
    for delay_s in (0.0, 0.3):
        found = pool.run(3, leave_at_the_timeout, transport, fresh(), delay_s, calls, may_die={0})
        assert found[1:] == [("CollectiveTimeoutError", (2,))] * 2, delay_s


def shift(group: Any, times: int) -> None:
    for _ in range(times):
        group.sendrecv(
            np.ones(50_000),
            (group.rank + 1) % group.world_size,
            np.ones(50_000),
            (group.rank - 1) % group.world_size,
        )


def come_late_to_a_ring(rank: int, size: int, transport: Transport, name: str) -> tuple[int, ...]:
    """Rank 2 takes part in a gather and not in the shift along the ring that follows."""
    with wired(rank, size, transport, name, 1.0) as group:
        group.gather([np.ones(3) for _ in range(size)] if rank == 0 else None, np.ones(3), 0)
        if rank == 2:
            time.sleep(3.0)
        with pytest.raises(col.CollectiveTimeoutError) as caught:
            shift(group, 3)
        return caught.value.ranks


@pytest.mark.slow
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_ring_names_the_rank_that_does_not_come(pool: RankPool, transport: Transport) -> None:
    assert pool.run(4, come_late_to_a_ring, transport, fresh()) == [(2,)] * 4


# What passes.


def exchange_in_order(
    rank: int, size: int, transport: Transport, name: str, orders: tuple[str, str], count: int
) -> list[float]:
    """Each of two ranks sends and receives in an order of its own: S and R wait, s and r do not."""
    with wired(rank, size, transport, name, 5.0) as group:
        found = []
        for turn in range(3):
            given, taken = np.full(count, rank + 10.0 * turn), np.zeros(count)
            calls = {
                "s": lambda given=given, **how: group.send(given, 1 - rank, **how),
                "r": lambda taken=taken, **how: group.recv(taken, 1 - rank, **how),
            }
            works = []
            for letter in orders[rank]:
                if letter.isupper():
                    calls[letter.lower()]()
                else:
                    works.append(calls[letter](async_op=True))
            for work in works:
                work.wait()
            found += [taken.min(), taken.max()]
        assert group.allreduce(np.ones(2)).tolist() == [2.0, 2.0]
        return found


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 300_000])
@pytest.mark.parametrize(
    "orders", ["sr sr", "rs rs", "sr rs", "sR sR", "rS rS", "sR SR", "sr SR", "rs SR"]
)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_transfers_in_both_directions_pass_each_other(
    pool: RankPool, transport: Transport, orders: str, count: int
) -> None:
    first, second = orders.split()
    found = pool.run(2, exchange_in_order, transport, fresh(), (first, second), count)
    assert found == [[1.0, 1.0, 11.0, 11.0, 21.0, 21.0], [0.0, 0.0, 10.0, 10.0, 20.0, 20.0]]


def exchange_around(
    rank: int, size: int, transport: Transport, name: str, count: int
) -> list[tuple[int, float]]:
    """All send to all and receive from all, every rank in an order of its own, before any waits; trees among them."""
    with wired(rank, size, transport, name, 10.0) as group:
        others = [peer for peer in range(size) if peer != rank]
        chance = random.Random(rank)
        found = []
        for _ in range(4):
            given = {"a": np.full(count, float(rank)), "b": [np.full(7, float(rank))]}
            taken = {peer: {"a": np.zeros(count), "b": [np.zeros(7)]} for peer in others}
            calls = [partial(group.send, given, peer, async_op=True) for peer in others]
            calls += [partial(group.recv, taken[peer], peer, async_op=True) for peer in others]
            chance.shuffle(calls)
            works = [call() for call in calls]
            total = group.allreduce(np.ones(1), async_op=True)  # behind them
            for work in works:
                work.wait()
            assert total.result().tolist() == [size]
            found += [
                (peer, float(part.min()))
                for peer in others
                for part in (taken[peer]["a"], taken[peer]["b"][0])
            ]
        assert all(peer == value for peer, value in found)
        return found


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 400_000])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_everybody_sends_before_anybody_receives(
    pool: RankPool, transport: Transport, count: int
) -> None:
    assert [len(found) for found in pool.run(4, exchange_around, transport, fresh(), count)] == [
        24
    ] * 4


def disagree_in_both_directions(rank: int, size: int, transport: Transport, name: str) -> None:
    """Transfers that differ are told while others pass."""
    with wired(rank, size, transport, name, 5.0) as group:
        for turn in range(3):
            works = [
                group.send(np.ones(4 + rank), 1 - rank, async_op=True),
                group.recv(np.ones(4 + rank), 1 - rank, async_op=True),
            ]
            for work in works[:: 1 if turn else -1]:
                with pytest.raises(col.MismatchError, match=r"transfer #\d"):
                    work.wait()
            group.send(np.ones(4), 1 - rank, async_op=True)
            mine = group.recv(np.zeros(4), 1 - rank, async_op=True).result()
            assert mine.tolist() == [1.0] * 4
        assert group.allreduce(np.ones(1)).tolist() == [2.0]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_transfers_that_differ_are_told_while_others_pass(
    pool: RankPool, transport: Transport
) -> None:
    pool.run(2, disagree_in_both_directions, transport, fresh())


def lose_a_rank(
    rank: int, size: int, transport: Transport, name: str, how: str
) -> tuple[str, tuple[int, ...], float]:
    """Rank 2 dies or does not come while the others have transfers with it and each other under way."""
    with wired(rank, size, transport, name, 1.5) as group:
        others = [peer for peer in range(size) if peer != rank]
        group.barrier()
        if rank == 2:
            time.sleep(0.3)
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(3.0)
            with pytest.raises(col.CollectiveTimeoutError) as caught:
                group.barrier()
            return "CollectiveTimeoutError", caught.value.ranks, 0.0
        began = time.monotonic()
        works = [group.recv(np.ones(9), peer, async_op=True) for peer in others]
        works += [group.send(np.ones(9), peer, async_op=True) for peer in others]
        with pytest.raises((col.PeerLostError, col.CollectiveTimeoutError)) as caught:
            works[1].wait()  # with rank 2
        took = time.monotonic() - began
        time.sleep(max(0.0, began + 4.0 - time.monotonic()) if how == "late" else 0.0)
        return type(caught.value).__name__, caught.value.ranks, took


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "late"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rank_that_is_missing_among_many_transfers_is_named(
    pool: RankPool, transport: Transport, how: str
) -> None:
    found = pool.run(
        3, lose_a_rank, transport, fresh(), how, may_die={2} if how == "killed" else ()
    )
    kind, limit = ("PeerLostError", 2.3) if how == "killed" else ("CollectiveTimeoutError", 3.5)
    for name, ranks, took in found[:2]:
        assert (name, ranks) == (kind, (2,)), found
        assert took < limit


def leave(rank: int, size: int, transport: Transport, name: str) -> float:
    """Transfers that nobody takes end with the group."""
    with wired(rank, size, transport, name, 20.0) as group:
        works = [
            group.send(np.ones(9), 1 - rank, async_op=True),
            group.send(np.ones(9), 1 - rank, async_op=True),
        ]
        time.sleep(0.2)
        began = time.monotonic()
        group.destroy()
        for work in works:
            with pytest.raises(col.CollectiveError):
                work.wait(3.0)
        return time.monotonic() - began


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_transfers_under_way_end_with_the_group(pool: RankPool, transport: Transport) -> None:
    assert max(pool.run(2, leave, transport, fresh())) < 3.0


# What is refused.


def block_each_other(
    rank: int, size: int, transport: Transport, name: str, call: str
) -> tuple[str, float]:
    """Both send, or both receive: an error at once, and the group goes on."""
    with wired(rank, size, transport, name, 5.0) as group:
        for count in (3, 300_000, 3):
            began = time.monotonic()
            with pytest.raises(col.MismatchError) as caught:
                getattr(group, call)(np.ones(count), 1 - rank)
            took = time.monotonic() - began
            if rank:
                time.sleep(0.05)
            mine = np.full(count, float(rank))
            group.recv(mine, 1) if rank == 0 else group.send(mine, 0)
            assert (mine == 1).all()
            group.send(mine, 1) if rank == 0 else group.recv(mine, 0)
        assert group.allreduce(np.ones(2)).tolist() == [2.0, 2.0]
        return str(caught.value), took


@pytest.mark.parametrize("call", ["send", "recv"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_two_that_block_each_other_are_told_at_once(
    pool: RankPool, transport: Transport, call: str
) -> None:
    for words, took in pool.run(2, block_each_other, transport, fresh(), call):
        assert took < 1.0
        assert "sendrecv" in words
        assert "rank 0 to rank 1" in words
        assert "rank 1 to rank 0" in words


IN_ORDER = [
    pytest.param(Transport("gloo", "native"), id="native", marks=pytest.mark.gloo),
    pytest.param(
        Transport("gloo", "pygloo"),
        id="pygloo",
        marks=[
            pytest.mark.gloo,
            pytest.mark.skipif(find_spec("pygloo") is None, reason="no pygloo"),
        ],
    ),
]
"""Providers whose transfers run in the order of issue; the native one is told to."""


def cross_in_order(rank: int, size: int, transport: Transport, name: str) -> list[str]:
    """Both send first, both receive first; then one of them does either."""
    with (
        mock.patch.object(NativeProvider, "crosses", False),
        wired(rank, size, transport, name, 5.0) as group,
    ):
        taken, found = np.zeros(3), []
        for first, agrees in ((0, False), (1, False), (rank, True)):
            began = time.monotonic()
            calls = [
                partial(group.send, np.full(3, float(rank)), 1 - rank, async_op=True),
                partial(group.recv, taken, 1 - rank, async_op=True),
            ]
            for work in [call() for call in (calls[first], calls[1 - first])]:
                if agrees:
                    work.wait()
                else:
                    with pytest.raises(col.MismatchError) as caught:
                        work.wait()
                    found.append(str(caught.value))
            assert time.monotonic() - began < 1.0
        assert taken.tolist() == [1.0 - rank] * 3
        assert group.allreduce(np.ones(2)).tolist() == [2.0, 2.0]
        return found


@pytest.mark.parametrize("transport", IN_ORDER)
def test_where_transfers_do_not_pass_both_are_told_at_once(
    pool: RankPool, transport: Transport
) -> None:
    for found in pool.run(2, cross_in_order, transport, fresh()):
        assert ["sendrecv" in words and "pygloo" in words for words in found] == [True] * 4
