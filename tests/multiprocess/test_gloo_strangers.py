"""Strangers that connect to a rank's ports before its peers do: Gloo's connections are those of the ranks alone."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from fake_control import FakeControl
from host_ranks import group_on
from pool import RankPool
from shm_ranks import fresh, own_group

from colltensor import net
from colltensor.backends import get_backend
from colltensor.backends.gloo import library
from colltensor.control import Control

pytestmark = [
    pytest.mark.gloo,
    pytest.mark.skipif(library.reason() is not None, reason="the library was built without Gloo"),
]

GREETINGS = (
    b"",
    b"GET / HTTP/1.0\r\n\r\n",
    struct.pack("=6Q", 48, 3, 0, 0, 8, 0),  # how a message of Gloo's begins
    os.urandom(4096),
)
FLOOD = 80
"""Connections that say next to nothing: more than are kept open at a time."""


def listening() -> set[int]:
    """Return the ports at which this process listens, on IPv4."""
    own = set()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            own.add(os.readlink(f"/proc/self/fd/{entry}"))
    ports = set()
    for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
            ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


class Siege:
    """Strangers at all ports that this process opens, but for the control plane's, which are open at first."""

    def __init__(self) -> None:
        self.strangers: list[tuple[int, socket.socket]] = []
        self._known: set[int] = set()

    def go_on(self) -> None:
        """Connect to the ports that are new."""
        self._known = self._known or listening()
        for port in sorted(listening() - self._known):
            self._known.add(port)
            for greeting in (*GREETINGS, *[b"?"] * FLOOD):
                with contextlib.suppress(OSError):
                    sock = socket.create_connection(("127.0.0.1", port), timeout=0.2)
                    self.strangers.append((port, sock))
                    sock.sendall(greeting)
            threading.Thread(target=self._guess, args=(port,), daemon=True).start()

    def _guess(self, port: int) -> None:
        with (
            contextlib.suppress(OSError),
            net.dial(("127.0.0.1", port), time.monotonic() + 0.5) as sock,
        ):
            net.prove(sock, b"wrong", struct.pack("!II", 1, 0), time.monotonic() + 0.5)

    def turned_away(self) -> int:
        """Return how many strangers found their connection closed at a port that is open no more."""
        closed, still = 0, listening()
        for port, sock in self.strangers:
            if port not in still:
                sock.settimeout(1.0)
                with contextlib.suppress(ConnectionError):
                    sock.sendall(b"?")  # one that the kernel kept hears of it when it speaks
                    while sock.recv(4096):
                        pass
                closed += 1
            sock.close()
        return closed


def meet_besieged(rank: int, size: int, name: str, hosts: str) -> int:
    """Make a group, of which every exchange on the control plane lets strangers come before the peers."""
    siege, allgather = Siege(), Control.allgather

    def besieged(control: Control, payload: bytes, deadline: float) -> list[bytes]:
        siege.go_on()
        return allgather(control, payload, deadline)

    with contextlib.ExitStack() as stack:
        with mock.patch.object(Control, "allgather", besieged):
            if hosts:
                group = stack.enter_context(
                    group_on(hosts, rank, name, "hierarchical", 8.0, interface="lo")
                )
            else:
                group = stack.enter_context(own_group(rank, size, name, 8.0, "gloo"))
        for count in (5, 300_000):
            assert (group.allreduce(np.full(count, rank + 1.0)) == size * (size + 1) / 2).all()
            target = np.zeros(count)
            group.sendrecv(
                np.full(count, float(rank)), (rank + 1) % size, target, (rank - 1) % size
            )
            assert (target == (rank - 1) % size).all()
        return siege.turned_away()


@pytest.mark.parametrize("hosts", ["", "aab"])
def test_strangers_that_come_first_are_turned_away(pool: RankPool, hosts: str) -> None:
    turned_away = pool.run(3, meet_besieged, fresh(), hosts)
    assert min(turned_away) >= len(GREETINGS) + FLOOD


def differ_in_the_secret(rank: int, size: int, path: str) -> str:
    control = FakeControl(path, rank, size)
    control.secret = b"%d" % rank
    with pytest.raises(TimeoutError) as caught:
        get_backend("gloo").create(
            control, control, timeout_s=0.4, interface="lo", provider="native"
        )
    control.close()
    return str(caught.value)


def test_ranks_with_different_secrets_do_not_connect(pool: RankPool) -> None:
    for message in pool.run(2, differ_in_the_secret, str(pool.folder / fresh())):
        assert "connecting" in message
