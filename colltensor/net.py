"""Sockets between ranks: frames, mutual authentication, listening, dialling, and host names.

Everything that travels between two processes of the package goes through here first. A connection
begins with a mutual challenge and response over a shared secret. Then it is a sequence of frames:
one byte that says the kind, eight that say the length, and the payload. Until the other side has
proved itself no more than a few kilobytes of it are read, and nothing of it is interpreted.

Deadlines are values of ``time.monotonic()``.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import hmac
import ipaddress
import math
import os
import secrets
import socket
import struct
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from colltensor.errors import OptionError

UNPROVEN_LIMIT = 8192
"""Largest payload, in bytes, that is read from somebody who has not proved to know the secret."""

FRAME_LIMIT = 1 << 40
"""Largest payload, in bytes, that is read from somebody who has."""

_PROTOCOL = b"colltensor/1"
_HEADER = struct.Struct("!BQ")
_NONCE_NBYTES = 32
_CHUNK_NBYTES = 1 << 20
OPENING_NBYTES = _HEADER.size + len(_PROTOCOL) + _NONCE_NBYTES
"""How many bytes who dials sends at least, at once, before it hears anything."""

_JOINED_NBYTES = 1 << 16
_BACKLOG = 4096
_ATTEMPTS, _PAUSE_S = 5, 0.02

_WRONG_SECRET = b"the secret is wrong"
_OPENING, _CHALLENGE, _PROOF, _ACCEPTED, _REFUSED = 0xC1, 0xC2, 0xC3, 0xC4, 0xC5


class FrameError(ConnectionError):
    """The other side speaks something else than this protocol, or another version of it."""


class AuthenticationError(ConnectionError):
    """The other side does not know the secret, or says that this one does not."""


class WrongSecretError(AuthenticationError):
    """The listening side says that this one's secret is not its own."""


def send_frame(
    sock: socket.socket, kind: int, payload: bytes = b"", deadline: float | None = None
) -> None:
    """Send one frame.

    Args:
        sock: A connected socket.
        kind: What the payload is, 0 to 255.
        payload: Any number of bytes.
        deadline: When to give up; None leaves the socket's own timeout as it is.

    Raises:
        ConnectionError: The other side is gone.
        TimeoutError: The other side did not read in time.
    """
    if deadline is not None:
        sock.settimeout(time_left(deadline))

    header = _HEADER.pack(kind, len(payload))
    if len(payload) <= _JOINED_NBYTES:
        sock.sendall(header + payload)
    else:
        sock.sendall(header)
        sock.sendall(payload)


def recv_frame(sock: socket.socket, deadline: float, limit: int = FRAME_LIMIT) -> tuple[int, bytes]:
    """Receive one frame; memory grows with what arrives, not with what its header promises.

    Args:
        sock: A connected socket.
        deadline: When to give up. A frame given up halfway leaves the connection unusable.
        limit: Largest payload to accept, in bytes.

    Returns:
        The kind and the payload.

    Raises:
        ConnectionError: The other side closed the connection, or it broke.
        FrameError: The payload would be larger than ``limit``.
        TimeoutError: The frame was not complete at the deadline.
    """
    kind, nbytes = _HEADER.unpack(_recv_exactly(sock, _HEADER.size, deadline))
    if nbytes > limit:
        raise FrameError(
            f"expected a frame of at most {limit} bytes, got a header that says {nbytes}"
        )

    if nbytes <= _CHUNK_NBYTES:
        return kind, bytes(_recv_exactly(sock, nbytes, deadline))
    sizes = [_CHUNK_NBYTES] * (nbytes // _CHUNK_NBYTES) + [nbytes % _CHUNK_NBYTES]
    return kind, b"".join([_recv_exactly(sock, size, deadline) for size in sizes])


def _recv_exactly(sock: socket.socket, nbytes: int, deadline: float) -> bytearray:
    data = bytearray(nbytes)
    view = memoryview(data)
    done = 0
    while done < nbytes:
        sock.settimeout(time_left(deadline))
        received = sock.recv_into(view[done:])
        if not received:
            raise ConnectionResetError(
                f"the other side closed the connection after {done} of {nbytes} bytes"
            )
        done += received
    return data


class Backoff:
    """The pauses of a loop that looks for something.

    Each is half as long again as the one before, up to a longest.
    """

    def __init__(self, first_s: float, longest_s: float, deadline: float = math.inf) -> None:
        self._next_s = first_s
        self._longest_s = longest_s
        self._deadline = deadline

    def pause(self) -> bool:
        """Sleep, until the deadline at most; return False at once where it has passed."""
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            return False
        time.sleep(min(self._next_s, left_s))
        self._next_s = min(1.5 * self._next_s, self._longest_s)
        return True


def time_left(deadline: float) -> float:
    """Return the seconds until ``deadline``, always more than 0.

    Raises:
        TimeoutError: The deadline has passed.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline has passed")
    return left


def prove(sock: socket.socket, secret: bytes, context: bytes, deadline: float) -> None:
    """Authenticate both sides of a connection, as the one that dialled.

    The proofs are HMAC-SHA256 (RFC 2104) of the context and one fresh nonce of each side, with a
    label for the direction. So neither an old proof nor the other side's can be played back. The
    side that dialled proves itself first: a stranger who connects learns nothing that depends on
    the secret.

    Args:
        sock: A connected socket.
        secret: What both sides know. Empty proves nothing but that the other side speaks this
            protocol.
        context: Names the secret for the other side, such as a group. At most 4096 bytes, sent in
            the clear.
        deadline: When to give up.

    Raises:
        AuthenticationError: The other side refuses, or its own proof is wrong.
        FrameError: The other side speaks something else.
        ConnectionError: The connection broke.
        TimeoutError: The other side did not answer in time.
    """
    if len(context) > UNPROVEN_LIMIT // 2:
        raise ValueError(f"context must be at most {UNPROVEN_LIMIT // 2} bytes, got {len(context)}")

    mine = secrets.token_bytes(_NONCE_NBYTES)
    send_frame(sock, _OPENING, _PROTOCOL + mine + context, deadline)
    theirs = _recv_step(sock, _CHALLENGE, deadline)
    transcript = mine + theirs + context

    send_frame(sock, _PROOF, _proof(secret, b"dial", transcript), deadline)
    if not hmac.compare_digest(
        _recv_step(sock, _ACCEPTED, deadline), _proof(secret, b"accept", transcript)
    ):
        raise AuthenticationError("the listening side does not know the secret")


def verify(
    sock: socket.socket, secret_of: Callable[[bytes], bytes | None], deadline: float
) -> bytes:
    """Authenticate both sides of a connection, as the one that accepted it.

    Args:
        sock: A connected socket.
        secret_of: Gives the secret for the context that the other side names, or None to refuse it.
        deadline: When to give up; keep it short, the other side may be anybody.

    Returns:
        The context that the other side named.

    Raises:
        AuthenticationError: The context is refused, or the other side's proof is wrong.
        FrameError: The other side speaks something else.
        ConnectionError: The connection broke.
        TimeoutError: The other side did not answer in time.
    """
    tune(sock)
    opening = _recv_step(sock, _OPENING, deadline)
    start = len(_PROTOCOL) + _NONCE_NBYTES
    if not opening.startswith(_PROTOCOL) or len(opening) < start:
        raise FrameError(f"expected an opening of {_PROTOCOL!r}, got {opening[:16]!r}")

    context = opening[start:]
    secret = secret_of(context)
    if secret is None:
        refuse(sock, b"it does not know the group that was named", deadline)
        raise AuthenticationError(f"the other side named {context[:64]!r}, which nobody here knows")

    mine = secrets.token_bytes(_NONCE_NBYTES)
    transcript = opening[len(_PROTOCOL) : start] + mine + context
    send_frame(sock, _CHALLENGE, mine, deadline)
    if not hmac.compare_digest(
        _recv_step(sock, _PROOF, deadline), _proof(secret, b"dial", transcript)
    ):
        refuse(sock, _WRONG_SECRET, deadline)
        raise WrongSecretError("the side that dialled does not know the secret")

    send_frame(sock, _ACCEPTED, _proof(secret, b"accept", transcript), deadline)
    return context


def _recv_step(sock: socket.socket, expected: int, deadline: float) -> bytes:
    kind, payload = recv_frame(sock, deadline, UNPROVEN_LIMIT)
    if kind == _REFUSED:
        if payload == _WRONG_SECRET:
            raise WrongSecretError("the listening side refuses: the secret is wrong")
        raise AuthenticationError(
            f"the listening side refuses: {payload[:200].decode(errors='replace')}"
        )
    if kind != expected:
        raise FrameError(f"expected handshake step {expected:#x}, got {kind:#x}")
    return payload


def refuse(sock: socket.socket, reason: bytes, deadline: float) -> None:
    """Let the side that dialled know, in place of a challenge, why it is turned away."""
    with contextlib.suppress(OSError):
        send_frame(sock, _REFUSED, reason, deadline)


def _proof(secret: bytes, direction: bytes, transcript: bytes) -> bytes:
    return hmac.new(
        secret, _PROTOCOL + b"/" + direction + b"/" + transcript, hashlib.sha256
    ).digest()


def tune(sock: socket.socket) -> None:
    """Set the options of a TCP connection between ranks: no delay of small frames, keep-alive."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def listen(host: str, port: int = 0) -> socket.socket:
    """Return a listening TCP socket.

    Args:
        host: A literal IPv4 or IPv6 address of this host; empty for every address of both kinds.
        port: 0 takes any free port.

    Raises:
        OSError: The address is not this host's, or the port is taken (``errno`` says which).
    """
    if not host:
        if socket.has_dualstack_ipv6():
            with contextlib.suppress(OSError):
                return _bound(socket.AF_INET6, "::", port)
        host = "0.0.0.0"
    return _bound(socket.AF_INET6 if ":" in host else socket.AF_INET, host, port)


def _bound(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def defer_silent(sock: socket.socket, seconds: float) -> None:
    """Let the kernel keep those who connect to a listening socket and say nothing.

    It does so for ``seconds``, where it can. Linux then hands over a connection once it has data. A
    silent one takes a few hundred bytes of the kernel's memory and no place in the queue of those
    to be accepted (tcp(7), TCP_DEFER_ACCEPT). The seconds become a number of retransmissions: 5 are
    7.

    Args:
        sock: A listening socket of any family; only one of TCP is changed.
        seconds: At least 1.
    """
    option = getattr(socket, "TCP_DEFER_ACCEPT", None)
    if (
        option is None
        or sock.family not in (socket.AF_INET, socket.AF_INET6)
        or not _has_syn_cookies()
    ):
        return

    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, option, int(seconds))


@functools.lru_cache(maxsize=1)
def _has_syn_cookies() -> bool:
    """Return whether the kernel takes connections when it holds as many silent ones as it may."""
    try:
        return Path("/proc/sys/net/ipv4/tcp_syncookies").read_text(encoding="ascii").strip() != "0"
    except OSError:
        return False


def dial(address: tuple[str, int], deadline: float) -> socket.socket:
    """Connect once to a listening socket; retries nothing.

    All addresses of a name share the time that there is.

    Args:
        address: A host name or literal address, and a port.
        deadline: When to give up.

    Raises:
        ConnectionError: Nobody listens there, the network says no, or the name cannot be resolved.
        TimeoutError: Nobody answered in time.
        OSError: This process can open no more files.
    """
    host, port = address
    try:
        sock = _connected(host, port, deadline)
    except (ConnectionError, TimeoutError):
        raise
    except (socket.gaierror, UnicodeError) as error:
        raise ConnectionError(f"cannot resolve the host name {host!r}: {error}") from error
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # of this process, and nothing is known of the other side
        raise ConnectionError(
            error.errno, f"cannot reach {host}:{port}: {error.strerror}"
        ) from error

    if sock.getsockname()[:2] == sock.getpeername()[:2]:
        # Dialling a free port of the ephemeral range on one's own host can connect a socket to
        # itself.
        sock.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, f"nobody listens at {host}:{port}")

    tune(sock)
    return sock


def _connected(host: str, port: int, deadline: float) -> socket.socket:
    """Connect to the first address of a host that answers.

    ``socket.create_connection`` gives each address all of the time.
    """
    failure: OSError = ConnectionError(f"the host name {host!r} has no address")
    places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for number, (family, kind, protocol, _, address) in enumerate(places):
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as error:  # this host may have no such family
            failure = error
            continue

        try:
            sock.settimeout(time_left(deadline) / (len(places) - number))
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise

    raise failure


def reach(
    address: tuple[str, int],
    secret: bytes,
    context: bytes,
    deadline: float,
    keep: Callable[[socket.socket], object] | None = None,
) -> socket.socket:
    """Dial and ``prove``; again, a few times, where the connection is lost before it is proved.

    Strangers may have taken its place among those who have proved nothing yet (``Listener``).

    Args:
        address: As for ``dial``.
        secret: As for ``prove``.
        context: As for ``prove``.
        deadline: When to give up.
        keep: Hears of each connection before it is proved, so that another thread can end it. May
            raise.

    Raises:
        ConnectionError, TimeoutError: As ``dial`` and ``prove``.
    """
    for left in reversed(range(_ATTEMPTS)):
        sock = dial(address, deadline)
        try:
            if keep is not None:
                keep(sock)
            prove(sock, secret, context, deadline)
            return sock
        except (ConnectionResetError, BrokenPipeError):
            sock.close()
            if not left:
                raise
            time.sleep(min(_PAUSE_S, time_left(deadline)))
        except BaseException:
            sock.close()
            raise

    # The last attempt has returned or raised.
    raise AssertionError


def plain_address(address: str) -> str:
    """Return an address as its own family spells it, without a scope.

    ``::ffff:10.0.0.1`` is ``10.0.0.1``.
    """
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return str(mapped or parsed)


@functools.lru_cache(maxsize=1024)  # every rank asks it of every rank
def is_loopback(address: str) -> bool:
    """Return whether a literal address reaches this host only."""
    return ipaddress.ip_address(plain_address(address)).is_loopback


@functools.lru_cache(maxsize=1)
def _found_host_id() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # the same process would be called otherwise later
        return f"{uuid.getnode():x}/{socket.gethostname()}"


def host_id() -> str:
    """Return a name that two processes share if, and only if, they reach each other over 127.0.0.1.

    It is the boot's random id and the network namespace. The variable ``COLLTENSOR_HOST_ID``
    replaces it.
    """
    return os.environ.get("COLLTENSOR_HOST_ID") or _found_host_id()


def local_addresses() -> list[str]:
    """Return this host's addresses, but for link-local ones.

    That of the default route comes first, loopback last.
    """
    found = [address for _, address in interfaces()]
    primary = primary_address()
    return sorted(dict.fromkeys(found), key=lambda a: (is_loopback(a), a != primary, ":" in a))


def interface_address(interface: str) -> str:
    """Return the address of a network interface of this host.

    Args:
        interface: A name such as ``"eth0"`` or ``"lo"`` (IPv4 is preferred), or a literal address.

    Raises:
        OptionError: This host has no such interface or address; the message lists what there is.
    """
    found = list(interfaces())

    if isinstance(interface, str):
        named = sorted(
            (address for name, address in found if name == interface), key=lambda a: ":" in a
        )
        if named:
            return named[0]
        with contextlib.suppress(ValueError):
            literal = plain_address(interface)
            if _can_bind(literal):
                return literal

    listing = ", ".join(f"{name} ({address})" for name, address in found) or "none"
    raise OptionError(
        f"interface must be the name or the address of a network interface of this host, got {interface!r}; "
        f"this host has: {listing}"
    )


def _can_bind(address: str) -> bool:
    try:
        with socket.socket(
            socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM
        ) as sock:
            sock.bind((address, 0))
    except OSError:
        return False
    return not ipaddress.ip_address(address).is_unspecified


def primary_address() -> str | None:
    """Return the address of the default route; connecting a UDP socket sends nothing."""
    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((target, 9))
            return str(sock.getsockname()[0])
    return None


def interfaces() -> Iterator[tuple[str, str]]:
    """Yield (name, address) of every interface that has one."""
    if sys.platform != "linux":
        for address in sorted(
            {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)}
        ):
            yield "?", plain_address(str(address))
        return
    yield from _ipv4_interfaces()
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines():
            digits, _, _, _, _, name = line.split()
            address = ipaddress.IPv6Address(int(digits, 16))
            if not address.is_link_local:
                yield name, str(address)


def _ipv4_interfaces() -> Iterator[tuple[str, str]]:
    """Yield (name, address) by the ioctl SIOCGIFADDR (netdevice(7))."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(sock.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))
                yield name, socket.inet_ntoa(answer[20:24])
