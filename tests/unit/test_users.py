"""Whose process is at the other end of a connection."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator

import pytest

from colltensor import net
from colltensor.rendezvous.users import is_own

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")


@pytest.fixture(params=["127.0.0.1", "", "::1"])
def listener(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    try:
        sock = net.listen(request.param)
    except OSError:
        pytest.skip("this host has no IPv6")
    with sock:
        yield sock


def connected(
    listener: socket.socket, user: int | None = None
) -> tuple[socket.socket, socket.socket]:
    """Return both ends of a connection, of which the one that dialled is ``user``'s."""
    is_v6 = listener.getsockname()[0] == "::1"
    if user is not None:
        os.seteuid(user)
    try:
        near = socket.socket(socket.AF_INET6 if is_v6 else socket.AF_INET)
    finally:
        if user is not None:
            os.seteuid(0)
    near.connect(("::1" if is_v6 else "127.0.0.1", listener.getsockname()[1]))
    return near, listener.accept()[0]


def test_a_process_of_this_user_is_known(listener: socket.socket) -> None:
    near, far = connected(listener)
    with near, far:
        assert is_own(far)


@pytest.mark.skipif(
    os.geteuid() != 0, reason="takes a socket of another user, which root alone can make"
)
def test_another_user_is_not_taken_for_this_one(listener: socket.socket) -> None:
    near, far = connected(listener, 65534)
    with near, far:
        assert not is_own(far)


def test_a_connection_that_is_closed_has_no_user(listener: socket.socket) -> None:
    """The kernel writes 0, which is root's, for a socket that belongs to nobody any more."""
    near, far = connected(listener)
    with far:
        near.close()
        deadline = time.monotonic() + 5
        while is_own(far) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_own(far)
