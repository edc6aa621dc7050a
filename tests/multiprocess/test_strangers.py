"""Meetings and groups while strangers hold connections to every port that there is, and say nothing, or next to it."""

from __future__ import annotations

import os
import re
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import RankPool
from shm_ranks import fresh

import colltensor as col
from colltensor.backends.shm import segment

STRANGERS = 150
"""More than there are places for those who say nothing, at each port."""


@contextmanager
def strangers(connect: Any, number: int) -> Iterator[list[socket.socket]]:
    """So many connections; one that is closed is made again."""
    held: list[socket.socket] = []
    over = threading.Event()

    def keep() -> None:
        while not over.is_set():
            for index, sock in enumerate(held):
                try:
                    assert sock.recv(1, socket.MSG_DONTWAIT) == b""
                except BlockingIOError:
                    continue
                except OSError:  # a reset, because its word was never read
                    pass
                sock.close()
                with suppress(OSError):
                    held[index] = connect()
            over.wait(0.02)

    until = time.monotonic() + 10
    while len(held) < number:
        try:
            held.append(connect())
        except ConnectionRefusedError:
            assert time.monotonic() < until
            time.sleep(0.01)
    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield held
    finally:
        over.set()
        thread.join()
        for sock in held:
            sock.close()


def stranger(address: tuple[str, int]) -> socket.socket:
    """Connect and say a byte, without which the kernel keeps the connection from the listener."""
    sock = socket.create_connection(address)
    sock.sendall(b"?")
    return sock


def meet_among_strangers(rank: int, size: int, name: str, port: int) -> tuple[float, int]:
    """Rank 0 listens; rank 1 lets the strangers in first and comes after them."""
    os.environ["COLLTENSOR_SECRET"] = "a secret of this test"
    try:

        def connect() -> socket.socket:
            return stranger(("127.0.0.1", port))

        with strangers(connect, STRANGERS if rank == 1 else 0):
            began = time.monotonic()
            group = col.init_collective_group(
                size, rank, "gloo", name, init_method=f"tcp://127.0.0.1:{port}", timeout_s=15.0
            )
            took = time.monotonic() - began
        total = int(group.allreduce(np.ones(3))[0])
        group.destroy()
        return took, total
    finally:
        del os.environ["COLLTENSOR_SECRET"]


@pytest.mark.gloo
def test_a_meeting_among_strangers(pool: RankPool) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    found = pool.run(2, meet_among_strangers, fresh(), port)
    assert [total for _, total in found] == [2, 2]
    assert found[1][0] < 3.0


def work_among_strangers(rank: int, size: int, name: str, backend: str) -> int:
    """Every control port has strangers while the group calls, sends and splits; descriptors come back.

    Returns:
        How many threads there were more than before the strangers came.
    """
    group = col.init_collective_group(
        size,
        rank,
        backend,
        name,
        init_method=f"file://{Path(tempfile.gettempdir()) / name}",
        timeout_s=15.0,
    )
    group.allreduce(np.ones(3))
    before = len(os.listdir("/proc/self/fd"))
    threads_before = threading.active_count()  # the pool keeps groups of earlier tests
    addresses = group._control._detector.meeting.addresses

    def connect() -> socket.socket:
        return stranger(addresses[rank])

    with strangers(connect, STRANGERS):
        group.barrier()
        for turn in range(20):
            assert int(group.allreduce(np.ones(1000))[0]) == size
            taken = np.zeros(5)
            group.sendrecv(np.full(5, float(rank)), (rank + 1) % size, taken, (rank - 1) % size)
            assert taken[0] == (rank - 1) % size
            if turn % 10 == 0:
                part = group.split(0)
                assert part.world_size == size
                part.destroy()
        threads = threading.active_count() - threads_before
        group.barrier()
    deadline = time.monotonic() + 5
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(os.listdir("/proc/self/fd")) <= before
    group.destroy()
    return threads


@pytest.mark.parametrize(
    "backend",
    [pytest.param("gloo", marks=pytest.mark.gloo), pytest.param("shm", marks=pytest.mark.shm)],
)
def test_a_group_among_strangers(pool: RankPool, backend: str) -> None:
    assert max(pool.run(3, work_among_strangers, fresh(), backend)) < 20


def share_among_strangers(rank: int, size: int, name: str) -> float:
    """Rank 1 takes all places of the memory's hand-over socket with silent clients, before it fetches the memory."""
    if rank == 1:
        fetch = segment._fetch

        def late(*arguments: Any) -> int:
            [place] = {
                found
                for found in re.findall(r"@(colltensor-\w+)", Path("/proc/net/unix").read_text())
                if found in offered
            }
            clients = []
            for _ in range(STRANGERS):
                clients.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                clients[-1].connect(b"\0" + place.encode())
            try:
                return fetch(*arguments)
            finally:
                for client in clients:
                    client.close()

        offered: set[str] = set()
        reach = segment._reach

        def noted(where: bytes, deadline: float) -> socket.socket:
            offered.add(where[1:].decode())
            return reach(where, deadline)

        segment._fetch, segment._reach = late, noted
    began = time.monotonic()
    try:
        group = col.init_collective_group(
            size,
            rank,
            "shm",
            name,
            init_method=f"file://{Path(tempfile.gettempdir()) / name}",
            timeout_s=15.0,
        )
    finally:
        if rank == 1:
            segment._fetch, segment._reach = fetch, reach
    took = time.monotonic() - began
    assert int(group.allreduce(np.ones(3))[0]) == size
    group.destroy()
    return took


@pytest.mark.shm
def test_shared_memory_is_handed_out_side_by_side(pool: RankPool) -> None:
    assert max(pool.run(3, share_among_strangers, fresh())) < 3.0


def go_without_memory(rank: int, size: int, name: str) -> str:
    """Rank 1 does not get the memory: all take Gloo, in the half of the time that is left for it."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:

            def fail(*arguments: Any) -> int:
                time.sleep(max(0.0, arguments[-1] - time.monotonic()) + 0.05)
                raise TimeoutError("it did not come")

            patch.setattr(segment, "_fetch", fail)
        group = col.init_collective_group(
            size,
            rank,
            "auto",
            name,
            init_method=f"file://{Path(tempfile.gettempdir()) / name}",
            timeout_s=2.5,
        )
    assert int(group.allreduce(np.ones(3))[0]) == size
    group.destroy()
    return f"{group.backend}: {group.why}"


@pytest.mark.shm
@pytest.mark.gloo
def test_without_the_memory_of_one_rank_all_take_gloo(pool: RankPool) -> None:
    for words in pool.run(2, go_without_memory, fresh()):
        assert words.startswith("gloo: ")
        assert "ranks [1]" in words


class Link:
    """A connection from a process of some user."""

    def __init__(self, user: int) -> None:
        self.user = user

    def getsockopt(self, *_: int) -> bytes:
        return struct.pack("3i", 1, self.user, self.user)


@pytest.mark.shm
def test_another_users_process_gets_no_shared_memory() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert segment._may_be_a_rank(ours)
    users = (os.geteuid(), 0, segment._OVERFLOW_UID, 12345)
    assert [segment._may_be_a_rank(Link(user)) for user in users] == [True, True, True, False]  # type: ignore[arg-type]
