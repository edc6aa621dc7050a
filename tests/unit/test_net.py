"""Sockets between ranks: frames, authentication, dialling, addresses. Two threads stand for two processes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import hashlib
import hmac
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from colltensor import net
from colltensor.errors import OptionError


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a TCP connection, the dialling one first."""
    with net.listen("127.0.0.1") as listener:
        near = net.dial(listener.getsockname(), soon())
        far, _ = listener.accept()
    with near, far:
        yield near, far


def together(*calls: Callable[[], object]) -> list[object]:
    """Run calls at the same time; what one raises is its result."""

    def run(call: Callable[[], object]) -> object:
        try:
            return call()
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


@pytest.mark.parametrize("nbytes", [0, 1, 1 << 16, (1 << 16) + 1, (1 << 20) + 3, 5 << 20])
def test_frame_arrives_as_sent(pair: tuple[socket.socket, socket.socket], nbytes: int) -> None:
    near, far = pair
    payload = random.Random(nbytes).randbytes(nbytes)
    _, received = together(
        lambda: net.send_frame(near, 7, payload, soon()), lambda: net.recv_frame(far, soon())
    )
    assert received == (7, payload)


def test_frames_keep_their_order_and_borders(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    for number in range(50):
        net.send_frame(near, number, b"x" * number)
    assert [net.recv_frame(far, soon()) for _ in range(50)] == [
        (number, b"x" * number) for number in range(50)
    ]


def test_end_of_connection_is_a_connection_error(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    near.sendall(b"\x01\0\0")
    near.close()
    with pytest.raises(ConnectionError, match="3 of 9"):
        net.recv_frame(far, soon())


def test_deadline_holds_against_one_who_sends_a_byte_at_a_time(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, far = pair
    stop = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.02):
                near.sendall(b"\0")

    thread = threading.Thread(target=drip)
    thread.start()
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        net.recv_frame(far, soon(0.1))
    assert time.monotonic() - began < 1.0
    stop.set()
    thread.join()


def test_sending_to_one_who_does_not_read_times_out(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, _ = pair
    with pytest.raises(TimeoutError):
        net.send_frame(near, 1, bytes(64 << 20), soon(0.2))


def test_frame_above_the_limit_is_refused_unread(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    near.sendall(struct.pack("!BQ", 1, 1 << 60))
    with pytest.raises(net.FrameError, match=r"\b1152921504606846976\b"):
        net.recv_frame(far, soon())
    near.sendall(struct.pack("!BQ", 1, 101))
    with pytest.raises(net.FrameError, match=r"\b101\b.*\b100\b|\b100\b.*\b101\b"):
        net.recv_frame(far, soon(), limit=100)


def test_promised_length_takes_no_memory(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    near.sendall(struct.pack("!BQ", 1, 1 << 39) + b"x")
    near.close()
    with pytest.raises(ConnectionError):
        net.recv_frame(far, soon())


@pytest.mark.parametrize("secret", [b"", b"s", os.urandom(32)], ids=["empty", "short", "random"])
def test_both_sides_prove_themselves(
    pair: tuple[socket.socket, socket.socket], secret: bytes
) -> None:
    near, far = pair
    asked: list[bytes] = []

    def secret_of(context: bytes) -> bytes:
        asked.append(context)
        return secret

    results = together(
        lambda: net.prove(near, secret, b"a group", soon()),
        lambda: net.verify(far, secret_of, soon()),
    )
    assert results == [None, b"a group"]
    assert asked == [b"a group"]
    net.send_frame(near, 3, b"after")
    assert net.recv_frame(far, soon()) == (3, b"after")


@pytest.mark.parametrize("known", [b"another", None])
def test_wrong_secret_fails_on_both_sides(
    pair: tuple[socket.socket, socket.socket], known: bytes | None
) -> None:
    near, far = pair
    results = together(
        lambda: net.prove(near, b"mine", b"g", soon()),
        lambda: net.verify(far, lambda _: known, soon()),
    )
    assert [type(result) for result in results] == [
        net.WrongSecretError if known else net.AuthenticationError
    ] * 2
    assert "refuses" in str(results[0])


def test_listener_without_the_secret_is_found_out(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """One that accepts any proof, and plays the dialler's own proof back as its own."""
    near, far = pair

    def impostor() -> None:
        net.recv_frame(far, soon())
        net.send_frame(far, 0xC2, bytes(32))
        _, proof = net.recv_frame(far, soon())
        net.send_frame(far, 0xC4, proof)

    results = together(lambda: net.prove(near, b"mine", b"g", soon()), impostor)
    assert isinstance(results[0], net.AuthenticationError)


def test_old_proof_is_worth_nothing(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    opening = b"colltensor/1" + bytes(32) + b"g"

    def replay() -> None:
        net.send_frame(near, 0xC1, opening)
        net.recv_frame(near, soon())
        transcript = bytes(64) + b"g"
        net.send_frame(
            near, 0xC3, hmac.new(b"s", b"colltensor/1/dial/" + transcript, hashlib.sha256).digest()
        )

    results = together(replay, lambda: net.verify(far, lambda _: b"s", soon()))
    assert isinstance(results[1], net.AuthenticationError)


@pytest.mark.parametrize("seed", range(40))
def test_garbage_ends_a_handshake_with_an_os_error(
    pair: tuple[socket.socket, socket.socket], seed: int
) -> None:
    near, far = pair
    rng = random.Random(seed)
    garbage = rng.choice(
        [
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            rng.randbytes(rng.randrange(1, 100)),
            struct.pack("!BQ", rng.randrange(256), rng.randrange(64)) + rng.randbytes(64),
            struct.pack("!BQ", 0xC1, 44) + b"colltensor/1" + rng.randbytes(31),
            struct.pack("!BQ", 0xC1, 12) + b"colltensor/2",
            struct.pack("!BQ", 0xC1, 44)
            + b"colltensor/1"
            + bytes(32)
            + struct.pack("!BQ", 0xC3, 5)
            + b"wrong",
        ]
    )
    near.sendall(garbage)
    near.shutdown(socket.SHUT_WR)
    with pytest.raises((ConnectionError, TimeoutError)):
        net.verify(far, lambda _: b"secret", soon())


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-Open\r\n", struct.pack("!BQ", 9, 0)]
)
def test_dialling_a_stranger_is_a_frame_error(
    pair: tuple[socket.socket, socket.socket], answer: bytes
) -> None:
    near, far = pair
    far.sendall(answer)
    with pytest.raises(net.FrameError):
        net.prove(near, b"", b"g", soon())


def test_silent_side_times_out(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    with pytest.raises(TimeoutError):
        net.prove(near, b"", b"g", soon(0.1))
    with pytest.raises(TimeoutError):
        net.verify(far, lambda _: b"", soon(0.0))


def test_context_has_a_limit(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(ValueError, match=r"\b4096\b"):
        net.prove(pair[0], b"", b"g" * 4097, soon())


def test_nobody_listens() -> None:
    with net.listen("127.0.0.1") as listener:
        address = listener.getsockname()
    with pytest.raises(ConnectionRefusedError):
        net.dial(address, soon())


def test_dialling_a_name_with_addresses_that_are_silent_ends_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(2):  # one more than it keeps: who comes next is not answered
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        listening = stack.enter_context(net.listen("127.0.0.1"))
        silent, good = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", sock.getsockname())
            for sock in (full, listening)
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [silent] * 3)
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            net.dial(("several", 1), began + 0.3)
        assert time.monotonic() - began < 0.6
        # the first leaves it some time
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [silent, good])
        net.dial(("several", 1), time.monotonic() + 0.3).close()
        # as IPv6 is to a host that has none
        unknown = (max(socket.AddressFamily) + 1000, *silent[1:])
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [unknown, good])
        net.dial(("several", 1), time.monotonic() + 0.3).close()


def test_dialling_never_connects_a_socket_to_itself() -> None:
    """Linux connects a socket to itself where its own ephemeral port happens to be the one that is dialled."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = sock.getsockname()
        sock.connect(address)
        assert sock.getsockname() == sock.getpeername()

    with net.listen("127.0.0.1") as listener:
        free_port = listener.getsockname()[1]

    class Selfish(socket.socket):
        def connect(self, address: object) -> None:
            self.bind(address)  # type: ignore[arg-type]
            super().connect(address)  # type: ignore[arg-type]

    original = socket.socket
    socket.socket = Selfish  # type: ignore[misc]
    try:
        with pytest.raises(ConnectionRefusedError, match=rf"\b{free_port}\b"):
            net.dial(("127.0.0.1", free_port), soon())
    finally:
        socket.socket = original  # type: ignore[misc]


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 70 + ".invalid", ""])
def test_unusable_host_names_are_connection_errors(host: str) -> None:
    with pytest.raises((ConnectionError, TimeoutError)):
        net.dial((host, 9 if host else 1), soon(8.0))


def test_passed_deadline_is_a_timeout() -> None:
    with pytest.raises(TimeoutError):
        net.dial(("127.0.0.1", 9), time.monotonic() - 1)


def test_listening_on_all_addresses_reaches_every_local_one() -> None:
    with net.listen("") as listener:
        for address in net.local_addresses():
            net.dial((address, listener.getsockname()[1]), soon()).close()


def test_port_is_free_again_at_once() -> None:
    with net.listen("127.0.0.1") as listener:
        port = listener.getsockname()[1]
        near = net.dial(("127.0.0.1", port), soon())
        far, _ = listener.accept()
        with pytest.raises(OSError, match=rf"\[Errno {errno.EADDRINUSE}\]"):
            net.listen("127.0.0.1", port)
    far.close()
    near.close()
    net.listen("127.0.0.1", port).close()


def test_interface_by_name_and_by_address() -> None:
    assert net.interface_address("lo") == "127.0.0.1"
    assert net.interface_address("127.0.0.1") == "127.0.0.1"
    for address in net.local_addresses():
        assert net.interface_address(address) == address


@pytest.mark.parametrize(
    "interface", ["eth99", "", "192.0.2.77", "not an interface", "0.0.0.0", "::", 3, None]
)
def test_unknown_interface_lists_what_there_is(interface: object) -> None:
    with pytest.raises(OptionError, match=r"\binterface .*\blo \(127\.0\.0\.1\)"):
        net.interface_address(interface)  # type: ignore[arg-type]


def test_local_addresses_end_with_the_loopback() -> None:
    addresses = net.local_addresses()
    flags = [net.is_loopback(address) for address in addresses]
    assert flags == sorted(flags)
    assert "127.0.0.1" in addresses


def test_host_id_is_stable_and_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLLTENSOR_HOST_ID", raising=False)
    assert net.host_id() == net.host_id()
    monkeypatch.setenv("COLLTENSOR_HOST_ID", "elsewhere")
    assert net.host_id() == "elsewhere"


def test_plain_address() -> None:
    assert net.plain_address("::ffff:10.1.2.3") == "10.1.2.3"
    assert net.plain_address("fe80::1%eth0") == "fe80::1"
    assert net.is_loopback("::ffff:127.0.0.1")
    assert not net.is_loopback("10.0.0.1")


def test_pauses_grow_and_never_outlast_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    backoff = net.Backoff(1.0, 2.0, time.monotonic() + 60)
    assert [backoff.pause() for _ in range(4)] == [True] * 4
    assert slept == [1.0, 1.5, 2.0, 2.0]
    assert net.Backoff(1.0, 2.0, time.monotonic() + 0.5).pause()
    assert 0.4 < slept[-1] <= 0.5
    assert not net.Backoff(1.0, 2.0, time.monotonic()).pause()
    assert len(slept) == 5
