"""The connection between two control planes: its frames, and how it is opened, read and written.

A link is one authenticated TCP connection. Its frames have a head of fixed size. So the ranks agree
on a call with one ``send`` and one ``recv`` of 56 bytes. The answer is compared without being
unpacked. Frames that come early wait in the link's inbox. A link belongs to one thread at a time;
see ``connections``.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from colltensor import net
from colltensor.control.messages import Failure, Status

if TYPE_CHECKING:
    from colltensor.rendezvous import Meeting

SIGNATURE_NBYTES: Final = 32

HEAD: Final = struct.Struct("!BBHIQ32sQ")
"""The fields of a frame's head.

They are kind, flags, lane, counter of the exchange, bytes that follow the head, and signature. The
last field is what ranks may differ in: the order in which their elements lie (``Buffers.order``).
"""

HEAD_NBYTES: Final = HEAD.size

READ_NBYTES: Final = 2 * HEAD_NBYTES
"""How much to read at once where a frame without a body is expected.

What follows it closely, such as news of a failure, is seen together with it.
"""

EXCHANGE, TEXT, PAIR, PAIR_TEXT, FAILURE, GOODBYE = range(6)
"""Kinds of frames.

EXCHANGE is a step of an agreement of all ranks. TEXT is the description that follows where they
differ. PAIR and PAIR_TEXT are the same between two ranks. FAILURE is news of a failure. GOODBYE
announces an orderly end.
"""

DIFFERS: Final = 1
"""Flag: some rank below (or, on the way down, anywhere) differs."""

BOUND: Final = 2
"""Flag: the rank does nothing else with this peer before this exchange of the two has ended."""

UNLIKE: Final = 4
"""Flag: some rank below has another order, and all else is the same.

On the way down it is some rank anywhere.
"""

NO_LANE: Final = -1
"""The lane of exchanges between two ranks that are no transfers; those have the rank that sends."""

LINK, WELCOME, CONFIRM, ASK, ANSWER, FAILURE_NEWS, INQUIRE = range(7)
"""Kinds of ``net`` frames with which a connection begins: requests and replies."""

CALLER: Final = struct.Struct("!I")

_KINDS_QUEUED = PAIR_TEXT + 1
_SLICE_S: Final = 0.02
_TIMEVAL: Final = struct.pack("ll", 0, int(_SLICE_S * 1_000_000))

Frame = tuple[bytes, bytes]
"""A head, still packed, and the bytes that follow it."""


def pack(
    kind: int,
    flags: int,
    counter: int,
    signature: bytes,
    nbytes: int = 0,
    lane: int = NO_LANE,
    order: int = 0,
) -> bytes:
    """Return the head of a frame.

    Counters wrap at 32 bits. Signatures are padded with zeros to 32 bytes.
    """
    if len(signature) > SIGNATURE_NBYTES:
        raise ValueError(
            f"signature must be at most {SIGNATURE_NBYTES} bytes, got {len(signature)}: hash it"
        )
    return HEAD.pack(kind, flags, lane + 1, counter & 0xFFFFFFFF, nbytes, signature, order)


def lane_of(frame: Frame) -> int:
    """Return the lane of a frame."""
    lane: int = HEAD.unpack(frame[0])[2]
    return lane - 1


class Link:
    """One established connection to the control plane of another rank.

    Attributes:
        peer: The rank at the other end.
        inbox: Complete frames that nobody has taken yet, oldest first, by kind.
        failure: What the other side reported, or None.
        goodbye: Whether the other side announced an orderly end.
        ended_at: When (``time.monotonic()``) the connection was seen to have ended, or None.
        clean: Whether the next byte to read begins a frame.
        stuck: Whether a frame of ours was given up halfway, so that no other can follow it.
    """

    __slots__ = (
        "_body", "_filled", "_head", "clean", "ended_at", "failure", "goodbye", "inbox", "peer", "sock", "stuck",
    )  # fmt: skip

    def __init__(self, sock: socket.socket, peer: int) -> None:
        """Take over a connection whose handshake is complete.

        Blocking reads end after a short slice (SO_RCVTIMEO), so that a waiting thread soon looks at
        its other links too. Unlike ``settimeout`` this costs no second system call a read.
        """
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL)
        self.sock = sock
        self.peer = peer
        self.inbox: tuple[deque[Frame], ...] = tuple(deque() for _ in range(_KINDS_QUEUED))
        self.failure: Failure | None = None
        self.goodbye = False
        self.ended_at: float | None = None
        self.clean = True
        self.stuck = False
        self._head = b""
        self._body: bytearray | None = None
        self._filled = 0

    def send(self, data: bytes | memoryview) -> int:
        """Hand bytes to the system without waiting.

        Returns:
            How many it took. A broken connection takes all: reading tells why it broke, often with
            a last word.
        """
        try:
            return self.sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)

    def pump(self) -> None:
        """Read what has come, without waiting, and sort complete frames into the inbox."""
        while self.ended_at is None:
            try:
                if self._body is None:
                    self.feed(self.sock.recv(READ_NBYTES, socket.MSG_DONTWAIT))
                else:
                    self._fill(self._body)
            except BlockingIOError:
                return
            except OSError:
                self.end()

    def feed(self, data: bytes) -> None:
        """Take bytes that were read from the socket; none mean the end."""
        if not data:
            self.end()
        rest = memoryview(data)
        while rest and self.ended_at is None:
            if self._body is None:
                missing = HEAD_NBYTES - len(self._head)
                self._head += rest[:missing]
                rest = rest[missing:]
                self.clean = False
                if len(self._head) == HEAD_NBYTES:
                    self._body, self._filled = bytearray(HEAD.unpack(self._head)[4]), 0
            else:
                taken = min(len(rest), len(self._body) - self._filled)
                self._body[self._filled : self._filled + taken] = rest[:taken]
                self._filled += taken
                rest = rest[taken:]
            self._deliver_if_complete()

    def _fill(self, body: bytearray) -> None:
        with memoryview(body) as view:
            received = self.sock.recv_into(view[self._filled :], 0, socket.MSG_DONTWAIT)
        self._filled += received
        if not received:
            self.end()
        self._deliver_if_complete()

    def _deliver_if_complete(self) -> None:
        if self._body is None or self._filled < len(self._body):
            return
        head, body = self._head, bytes(self._body)
        self._head, self._body, self.clean = b"", None, True
        kind = head[0]
        if kind < _KINDS_QUEUED:
            self.inbox[kind].append((head, body))
        elif kind == FAILURE:
            self.failure = Failure.decode(body)
        elif kind == GOODBYE:
            self.goodbye = True
        else:
            self.end()

    def end(self) -> None:
        """Note that the connection has ended."""
        if self.ended_at is None:
            self.ended_at = time.monotonic()

    def close(self) -> None:
        """Say goodbye, as far as the other side can still be told, and close the connection."""
        if not self.stuck:
            self.send(pack(GOODBYE, 0, 0, b""))
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        # Unread bytes would turn the close into a reset, which can overtake the goodbye.
        self.pump()
        self.sock.close()


def context_of(meeting: Meeting) -> bytes:
    """Return what a caller names to prove that it means this incarnation of this group."""
    return meeting.group_name.encode() + b"\0" + meeting.generation


def _call(meeting: Meeting, peer: int, wish: int, payload: bytes, deadline: float) -> socket.socket:
    sock = net.reach(meeting.addresses[peer], meeting.secret, context_of(meeting), deadline)
    try:
        net.send_frame(sock, wish, CALLER.pack(meeting.rank) + payload, deadline)
    except BaseException:
        sock.close()
        raise
    return sock


def _reply(sock: socket.socket, expected: int, deadline: float) -> bytes:
    kind, payload = net.recv_frame(sock, deadline)
    if kind != expected:
        raise net.FrameError(f"expected reply {expected}, got {kind}")
    return payload


def open_link(meeting: Meeting, peer: int, deadline: float) -> Link:
    """Dial a rank's control plane.

    The link stands once ``CONFIRM`` is sent: an attempt given up before leaves none.

    Raises:
        ConnectionError: The rank is gone, or its address is somebody else's by now.
        TimeoutError: It did not answer in time; another attempt is allowed.
    """
    sock = _call(meeting, peer, LINK, b"", deadline)
    try:
        _reply(sock, WELCOME, deadline)
        net.send_frame(sock, CONFIRM)
        return Link(sock, peer)
    except BaseException:
        sock.close()
        raise


def ask(meeting: Meeting, peer: int, deadline: float) -> Status:
    """Ask a rank what it does.

    Its listener's thread answers, even while its other threads compute or wait.

    Raises:
        ConnectionError: The rank is gone.
        TimeoutError: It did not answer in time.
    """
    with _call(meeting, peer, ASK, b"", deadline) as sock:
        return Status.decode(_reply(sock, ANSWER, deadline))


def inquire(meeting: Meeting, peer: int, question: bytes, deadline: float) -> bytes:
    """Ask a rank something of which the control plane knows nothing.

    Its listener's thread has the question answered.

    Raises:
        ConnectionError: The rank is gone, or nobody answers there.
        TimeoutError: It did not answer in time.
    """
    with _call(meeting, peer, INQUIRE, question, deadline) as sock:
        return _reply(sock, ANSWER, deadline)


def propagate_failure(meeting: Meeting, peer: int, failure: Failure, deadline: float) -> None:
    """Tell a rank's listener that the group is broken; return when it has noted that.

    Raises:
        ConnectionError: The rank is gone.
        TimeoutError: It did not answer in time.
    """
    with _call(meeting, peer, FAILURE_NEWS, failure.encode(), deadline) as sock:
        # Who leaves before it was heard is taken for dead itself.
        sock.settimeout(net.time_left(deadline))
        sock.recv(1)  # ends when the listener has closed the connection


def in_parallel(
    peers: Iterable[int], call: Callable[[int], None], until: float, width: int = 32
) -> None:
    """Call a function that handles its own time limit for every peer, at most ``width`` at once.

    Returns at ``until`` at the latest. What ``call`` raises as OSError is dropped: it concerns one
    peer.
    """
    waiting = deque(peers)

    def work() -> None:
        while waiting and time.monotonic() < until:
            with contextlib.suppress(IndexError, OSError):
                call(waiting.popleft())

    count = min(width, len(waiting))
    threads = [
        threading.Thread(target=work, name="colltensor-call", daemon=True) for _ in range(count)
    ]

    try:
        for thread in threads:
            thread.start()
    except RuntimeError:  # there are too many, or the interpreter ends: this one does what is left
        work()

    for thread in threads:
        if thread.ident is not None:
            thread.join(max(0.0, until - time.monotonic()))
