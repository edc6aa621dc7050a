"""Strangers at a listening socket: bounded, and no rank waits for them."""

from __future__ import annotations

import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from colltensor import listener as module
from colltensor import net
from colltensor.listener import Listener

SECRET = b"x" * 32
OPENING = struct.pack("!BQ", 0xC1, 44) + b"colltensor/1" + bytes(32)
"""What one who dials says first."""
WORD = b"?"
"""Less than that. Who says nothing at all is kept by the kernel for the first seconds."""


class Door:
    """A listener that proves whoever comes, and holds who has until told to let go."""

    def __init__(self, ranks: int = 0) -> None:
        self.sock = net.listen("127.0.0.1")
        self.address = self.sock.getsockname()[:2]
        self.proven = 0
        self.notes: list[str] = []
        self.hold = threading.Event()
        self.listener = Listener(
            self.sock, self.serve, lambda what, error: self.notes.append(what), "test-door", ranks
        )
        self.listener.start()

    def serve(self, sock: socket.socket) -> None:
        self.listener.verify(sock, lambda _: SECRET)
        self.proven += 1
        self.hold.wait(5)

    def threads(self) -> int:
        return sum(thread.name == "test-door-one" for thread in threading.enumerate())

    def rank(self) -> socket.socket:
        sock = net.dial(self.address, time.monotonic() + 5)
        net.prove(sock, SECRET, b"", time.monotonic() + 5)
        return sock

    def stranger(self, words: bytes = b"") -> socket.socket:
        sock = socket.create_connection(self.address)
        sock.sendall(words)
        return sock


@contextmanager
def door(ranks: int = 0) -> Iterator[Door]:
    """A door for so many ranks; afterwards nothing of it is left."""
    before = len(os.listdir("/proc/self/fd"))
    made = Door(ranks)
    try:
        yield made
    finally:
        made.hold.set()
        made.listener.stop()
        made.listener.join(2)
        made.sock.close()
        deadline = time.monotonic() + 5
        while (
            made.threads() or len(os.listdir("/proc/self/fd")) > before
        ) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert made.threads() == 0
        assert len(os.listdir("/proc/self/fd")) == before


def eventually(condition: object, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def is_let_go(stranger: socket.socket) -> bool:
    """Wait until a connection ends; by a reset where its word was never read."""
    stranger.settimeout(5)
    try:
        return stranger.recv(1) == b""
    except ConnectionResetError:
        return True


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_silent_strangers_have_no_thread_and_no_rank_waits_for_them() -> None:
    before = descriptors()
    with door() as made, ExitStack() as stack:
        strangers = [stack.enter_context(made.stranger(WORD)) for _ in range(200)]
        began = time.monotonic()
        ranks = [stack.enter_context(made.rank()) for _ in range(5)]
        assert time.monotonic() - began < 2
        assert eventually(lambda: made.proven == 5)
        assert made.threads() == 5
        # The oldest were let go, the others may still speak.
        assert is_let_go(strangers[0])
        assert descriptors() - before < 200 + 5 + 5 + module._STRANGERS + 5
        net.send_frame(strangers[-1], 1, b"no opening" * 10)
        strangers[-1].settimeout(5)
        with pytest.raises((ConnectionError, AssertionError)):
            assert strangers[-1].recv(1)
        del ranks


@pytest.mark.skipif(
    not net._has_syn_cookies(), reason="the kernel would keep ranks out with the strangers"
)
def test_who_says_nothing_takes_no_place() -> None:
    with door() as made, ExitStack() as stack:
        strangers = [stack.enter_context(made.stranger()) for _ in range(200)]
        with made.rank():
            assert eventually(lambda: made.proven == 1)
            assert made.listener._silent == {}
        strangers[0].sendall(OPENING)  # whoever speaks after all is heard
        strangers[0].settimeout(5)
        assert net.recv_frame(strangers[0], time.monotonic() + 5)[0] == 0xC2


def test_silent_ones_are_not_kept_where_the_kernel_would_drop_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(net, "_has_syn_cookies", lambda: False)
    with door() as made, made.stranger():
        assert eventually(lambda: len(made.listener._silent) == 1)


def test_strangers_who_leave_again_have_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    with door() as made:
        served: list[socket.socket] = []

        def serve(sock: socket.socket) -> None:
            served.append(sock)
            made.serve(sock)

        monkeypatch.setattr(made.listener, "_serve", serve)
        for _ in range(50):
            made.stranger().close()
        reset = made.stranger()
        reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reset.close()
        with made.rank():  # comes after them
            assert eventually(lambda: made.proven == 1 and not made.listener._silent)
            assert len(served) == 1


def test_strangers_that_speak_and_prove_nothing_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STRANGERS", 8)
    with door() as made, ExitStack() as stack:
        for _ in range(24):
            stack.enter_context(made.stranger(OPENING))
        began = time.monotonic()
        # more than there are places: they have proved
        ranks = [stack.enter_context(made.rank()) for _ in range(20)]
        assert time.monotonic() - began < 10
        assert eventually(lambda: made.proven == 20)
        assert made.threads() <= 20 + 8
        del ranks


def test_who_says_nothing_is_let_go_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANDSHAKE_S", 0.2)
    with door() as made, made.stranger(WORD) as stranger:
        began = time.monotonic()
        assert is_let_go(stranger)
        assert time.monotonic() - began > 0.1


def test_a_process_with_few_descriptors_keeps_some_back() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    strangers: list[socket.socket] = []
    with door():  # for what it imports
        pass
    try:
        with ExitStack() as stack:
            used = descriptors()
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 120, hard))
            made = stack.enter_context(door())
            strangers += [made.stranger(WORD) for _ in range(60)]
            assert eventually(lambda: len(made.listener._silent) == max(4, (used + 120) // 16))
            with open(os.devnull):
                pass
            with made.rank():
                assert eventually(lambda: made.proven == 1)
            for stranger in strangers:
                stranger.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("words", [WORD, OPENING], ids=["silent", "at their proof"])
def test_places_for_many_ranks_leave_a_process_its_descriptors(words: bytes) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        stack.enter_context(door())  # for what it imports
        made = stack.enter_context(door(ranks=256))  # as a meeting's
        strangers = [socket.socket() for _ in range(80)]
        for stranger in strangers:
            stack.enter_context(stranger)
        # more than two quarters of it are free: for those who are silent, and for those at their proof
        limit = 2 * descriptors() + 40
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for stranger in strangers:
            stranger.connect(made.address)
            stranger.send(words)
        listener = made.listener
        assert eventually(lambda: len(listener._silent) + len(listener._speaking) > 10)
        with made.rank():
            assert eventually(lambda: made.proven == 1)
            assert len(listener._silent) + len(listener._speaking) <= limit // 4
            assert set(made.notes) <= {
                "turned a connection away"
            }  # there was always a descriptor for it


def test_without_a_thread_the_next_one_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    refused: list[str] = []

    def refuse_once(thread: threading.Thread) -> None:
        if thread.name == "test-door-one" and not refused:
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    with door() as made:
        monkeypatch.setattr(threading.Thread, "start", refuse_once)
        with pytest.raises(ConnectionError):
            made.rank()
        with made.rank():
            assert eventually(lambda: made.proven == 1)
        assert made.notes == ["cannot serve a connection"]
