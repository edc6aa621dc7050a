"""Ranks that wait for each other in a circle are told in a moment; those that only come late are not."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
from pool import RankPool
from shm_ranks import fresh
from test_pairs import TRANSPORTS, Transport, wired

import colltensor as col

CALLS: dict[str, Callable[[Any, int], object]] = {
    "late": lambda group, peer: time.sleep(0.7),
    "send": lambda group, peer: group.send(np.ones(3), peer),
    "recv": lambda group, peer: group.recv(np.ones(3), peer),
    "isend": lambda group, peer: group.send(np.ones(3), peer, async_op=True),
    "irecv": lambda group, peer: group.recv(np.ones(3), peer, async_op=True),
    "isend wait": lambda group, peer: group.send(np.ones(3), peer, async_op=True).wait(),
    "irecv wait": lambda group, peer: group.recv(np.ones(3), peer, async_op=True).wait(),
    "large send": lambda group, peer: group.send(np.ones(300_000), peer),
    "barrier": lambda group, peer: group.barrier(),
    "allreduce": lambda group, peer: group.allreduce(np.ones(3)),
    "iallreduce wait": lambda group, peer: group.allreduce(np.ones(3), async_op=True).wait(),
    "tree": lambda group, peer: group.broadcast({"a": np.ones(3), "b": np.ones(4)}, 0),
}
CIRCLES = {
    "sends behind sends": [["isend", "send"]] * 2,
    "receives behind receives": [["irecv", "recv"]] * 2,
    "waits for sends": [["isend wait"]] * 2,
    "a send behind another, and a send": [["isend", "send"], ["large send"]],
    "a wait, and a receive": [["irecv wait"], ["recv"]],
    "a send, and a barrier": [["send"], ["barrier"]],
    "a collective, and a receive": [["allreduce"], ["recv"]],
    "a tree, and a send": [["tree"], ["large send"]],
    "an asynchronous collective, and a receive": [["iallreduce wait"], ["recv"]],
    "a collective behind a send": [["isend", "allreduce"], ["isend", "allreduce"]],
    "three sends around": [["send"]] * 3,
    "three receives around, one late": [["recv"], ["recv"], ["late", "recv"]],
    "a barrier and two sends": [["send"], ["send"], ["barrier"]],
}


def wait_in_a_circle(
    rank: int, size: int, transport: Transport, name: str, circle: str
) -> tuple[str, tuple[int, ...], float, str]:
    """Make the calls of a circle, of which the last does not end; then one more, which a broken group refuses."""
    soon = mock.patch("colltensor.engine.engine.SETTLED_S", 0.3)
    with soon, wired(rank, size, transport, name, 8.0) as group:
        group.barrier()
        began = time.monotonic()
        *before, last = CIRCLES[circle][rank]
        for call in before:
            CALLS[call](group, (rank + 1) % size)
        with pytest.raises(col.CollectiveError) as caught:
            CALLS[last](group, (rank + 1) % size)
        took = time.monotonic() - began
        with pytest.raises(col.GroupError):
            group.barrier()
        return (
            type(caught.value).__name__,
            getattr(caught.value, "ranks", ()),
            took,
            str(caught.value),
        )


ALWAYS = [
    "sends behind sends",
    "a wait, and a receive",
    "a send, and a barrier",
    "three sends around",
]
NATIVE = ("shm", "native")


@pytest.mark.parametrize(
    ("transport", "circle"),
    [
        pytest.param(
            *transport.values,
            circle,
            id=f"{transport.id}-{circle}",
            marks=transport.marks
            if transport.id in NATIVE and circle in ALWAYS
            else [*transport.marks, pytest.mark.slow],
        )
        for transport in TRANSPORTS
        for circle in (CIRCLES if transport.id in NATIVE else ALWAYS)
    ],
)
def test_ranks_that_wait_for_each_other_are_told(
    pool: RankPool, transport: Transport, circle: str
) -> None:
    size = len(CIRCLES[circle])
    for kind, ranks, took, words in pool.run(size, wait_in_a_circle, transport, fresh(), circle):
        assert (kind, ranks) == ("MismatchError", tuple(range(size))), words
        assert took < 5.0
        assert "sendrecv" in words
        assert "async_op=True" in words


def come_late(rank: int, size: int, transport: Transport, name: str) -> list[float]:
    """What is no circle: a rank that computes, that waits for a while only, whose other thread makes the call."""
    with wired(rank, size, transport, name, 8.0) as group:
        found = []
        # a rank that computes while the other waits, in a send and behind one
        mine = np.full(3, float(rank))
        if rank == 0:
            group.send(mine, 1, async_op=True)
            group.send(mine + 1, 1)
        else:
            time.sleep(0.7)
            for _ in range(2):
                group.recv(mine, 0)
                found.append(mine[0])
        # one that waits with a timeout of its own, and then makes the call
        work = group.send(np.full(3, rank + 5.0), 1 - rank, async_op=True)
        if rank == 0:
            with pytest.raises(col.CollectiveTimeoutError):
                work.wait(0.9)
            group.recv(mine, 1)
            work.wait()
        else:
            work.wait()
            group.recv(mine, 0)
        found.append(mine[0])
        return found


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_ranks_that_come_late_are_waited_for(pool: RankPool, transport: Transport) -> None:
    assert pool.run(2, come_late, transport, fresh()) == [[6.0], [0.0, 1.0, 5.0]]


def help_each_other(
    rank: int, size: int, transport: Transport, name: str, how: str
) -> tuple[float, list[str]]:
    """Wait for a send that something else of the other rank takes after a while."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("colltensor").addHandler(handler)
    try:
        with wired(rank, size, transport, name, 8.0) as group:
            other = group.split(0)
            taken = np.zeros(3)
            works: list[Any] = []

            def take(*_: object) -> None:
                if how == "slow callback":
                    time.sleep(0.7)
                works.append(group.recv(taken, 1 - rank, async_op=True))

            if how == "thread":
                helper = threading.Thread(target=lambda: (time.sleep(0.9), take()))
                helper.start()
            elif how == "signal":
                handled = signal.signal(signal.SIGALRM, take)
                signal.setitimer(signal.ITIMER_REAL, 0.9)
            elif rank == 0:
                source = other if how == "another group's callback" else group
                source.recv(np.zeros(1), 2, async_op=True).add_done_callback(take)
            if rank == 2:
                time.sleep(0.1 if how == "slow callback" else 0.9)
                (other if how == "another group's callback" else group).send(np.zeros(1), 0)
            else:
                sent = group.send(np.full(3, 5.0 + rank), 1 - rank, async_op=True)
                sent.wait()
                if "callback" in how and rank == 1:
                    take()
                if how == "thread":
                    helper.join()
                if how == "signal":
                    while not works:
                        time.sleep(0.01)
                    signal.signal(signal.SIGALRM, handled)
                works[0].wait()
            other.destroy()
            return float(taken[0]), said
    finally:
        logging.getLogger("colltensor").removeHandler(handler)


@pytest.mark.parametrize(
    ("how", "size"),
    [
        ("thread", 2),
        ("signal", 2),
        ("callback", 3),
        ("slow callback", 3),
        ("another group's callback", 3),
    ],
)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_something_else_may_make_the_missing_call(
    pool: RankPool, transport: Transport, how: str, size: int
) -> None:
    found = pool.run(size, help_each_other, transport, fresh(), how)
    assert [taken for taken, _ in found[:2]] == [6.0, 5.0]
    if how == "thread":
        assert any("sendrecv" in line for line in found[0][1])
