"""The port at which rank 0 receives the others; several meetings of one process may share it.

A server listens and lets whoever speaks authenticate in a thread of its own (``Listener``). It
hands the connection to the meeting of the group that was named. One who comes for a group that is
not meeting (yet) is told to try again.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass
from typing import TypeAlias

from colltensor import net
from colltensor.errors import CollectiveError, RankError, remedy_for_system
from colltensor.listener import Listener
from colltensor.rendezvous.protocol import JoinRequest, Message, encode_error, taken, unpack
from colltensor.rendezvous.users import is_own

_LOG = logging.getLogger(__name__)
_RANKS_AT_ONCE = 256
_STRANGER_S = 0.5
_JOIN_S = 2.0
_MEMORY_S = 3600.0

Address = tuple[str, int]


@dataclass(eq=False, slots=True)
class Joiner:
    """A rank that came: its connection, authenticated, and what it said.

    Attributes:
        sock: The connection.
        request: What it said.
        deadline: When it will give up, by this process's clock.
        place: What it said in the second round; empty before it did.
    """

    sock: socket.socket
    request: JoinRequest
    deadline: float
    place: bytes = b""


@dataclass(frozen=True, slots=True)
class Stranger:
    """A process with another secret.

    Attributes:
        request: What it says.
        is_own: Whether it is this user's, on this host: then it means no harm.
    """

    request: JoinRequest
    is_own: bool


Item: TypeAlias = Joiner | Stranger | str
"""What comes to a meeting; the name of a process is one that claims rank 0."""


class JoinerQueue:
    """Carries joiners from the server's threads to the thread that meets; readable, for a selector.

    Attributes:
        scope: Within which the group's name is unique.
    """

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self._lock = threading.Lock()
        self._items: collections.deque[Item] = collections.deque()
        self._open = True
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        """Return the descriptor that is readable while something may be there."""
        return self._reader.fileno()

    def put(self, item: Item) -> bool:
        """Leave what came; False once closed."""
        with self._lock:
            if self._open:
                self._items.append(item)
                with contextlib.suppress(BlockingIOError):
                    self._writer.send(b"\0")
            return self._open

    def take(self) -> list[Item]:
        """Return what came since the last call."""
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)
        with self._lock:
            items = list(self._items)
            self._items.clear()
        return items

    def close(self) -> list[Item]:
        """Take nothing more; return what was left."""
        with self._lock:
            if self._open:
                self._open = False
                self._reader.close()
                self._writer.close()
            items = list(self._items)
            self._items.clear()
        return items


class RendezvousServer:
    """One listening port and its meetings, by group name.

    Attributes:
        address: The address that it was opened for, and the port.
        secret: What those who come must know.
        obstacle: What the system last refused this process while somebody came, and what to do.
            Empty for nothing.
    """

    def __init__(self, listener: socket.socket, host: str, secret: bytes) -> None:
        self.address: Address = host, listener.getsockname()[1]
        self.obstacle = ""
        self._listener = listener
        self.secret = secret
        self._lock = threading.Lock()
        self._meetings: dict[str, JoinerQueue] = {}
        name = f"colltensor-rendezvous-{self.address[1]}"
        self._greeter = Listener(listener, self._greet, self._note, name, _RANKS_AT_ONCE)

    def start(self) -> None:
        """Begin to accept connections."""
        self._greeter.start()

    def add(self, group_name: str, meeting: JoinerQueue) -> None:
        """Serve a meeting.

        Raises:
            RankError: A group of this name is meeting already.
        """
        with self._lock:
            if group_name in self._meetings:
                raise taken(0, [f"two threads of process {os.getpid()}"])
            self._meetings[group_name] = meeting

    def remove(self, group_name: str) -> bool:
        """Serve a meeting no more; return whether it was the last one."""
        with self._lock:
            self._meetings.pop(group_name, None)
            return not self._meetings

    def stop(self) -> None:
        """Stop listening.

        The port is free from here on, and the thread that waits in accept() ends.
        """
        self._greeter.stop()

    def close(self) -> None:
        """Close the descriptor, once no thread can use its number any more.

        The number may soon be another descriptor's.
        """
        try:
            self._greeter.join(_JOIN_S)
        finally:
            self._listener.close()

    def disown(self) -> None:
        """Close the descriptors only, in a forked child: the port is the parent's."""
        self._greeter.disown()
        self._listener.close()

    def _note(self, what: str, error: Exception) -> None:
        if not isinstance(error, (ConnectionError, TimeoutError)):
            self.obstacle = f"{error}; {remedy_for_system(error, 'free memory')}"
        # several groups may meet at one port; whoever listens there is rank 0
        names, port = ", ".join(list(self._meetings)), self.address[1]
        _LOG.debug("group %r (rank %d): port %d: %s: %s", names, 0, port, what, error)

    def _greet(self, sock: socket.socket) -> bool:
        """Authenticate one connection; return whether it was handed on."""
        try:
            context, deadline = self._greeter.verify(sock, lambda _: self.secret)
        except net.WrongSecretError:
            self._hear_stranger(sock)
            raise
        group_name = context.decode(errors="replace")
        kind, payload = net.recv_frame(sock, deadline, net.UNPROVEN_LIMIT)
        if kind == Message.JOIN:
            return self._introduce(sock, group_name, JoinRequest.decode(payload), deadline)
        if kind != Message.CLAIM:
            raise net.FrameError(f"expected a request, got a frame of kind {kind}")
        self._contest(sock, group_name, str(unpack(payload, who=str)["who"]), deadline)
        return False

    def _introduce(
        self, sock: socket.socket, group_name: str, request: JoinRequest, deadline: float
    ) -> bool:
        if request.group_name != group_name:
            raise net.FrameError(
                f"a request for {request.group_name!r:.80} came where {group_name!r:.80} was named"
            )
        meeting = self._meetings.get(group_name)
        if meeting is not None:
            now = time.monotonic()
            refusal = _left_over(meeting.scope, request, now)
            if refusal is not None:
                net.send_frame(sock, Message.FAILED, encode_error(refusal), deadline)
                return False
            if meeting.put(Joiner(sock, request, now + request.patience_s)):
                return True
        net.send_frame(sock, Message.RETRY, b"", deadline)
        return False

    def _hear_stranger(self, sock: socket.socket) -> None:
        """Let a meeting know of a process with another secret.

        What that process says may be true, and counts if it is ours.
        """
        kind, payload = net.recv_frame(sock, time.monotonic() + _STRANGER_S, net.UNPROVEN_LIMIT)
        if kind == Message.JOIN:
            request = JoinRequest.decode(payload)
            meeting = self._meetings.get(request.group_name)
            if meeting is not None:
                meeting.put(Stranger(request, is_own(sock)))

    def _contest(self, sock: socket.socket, group_name: str, who: str, deadline: float) -> None:
        """Answer another process that wants to be rank 0: the two of them cannot both be right."""
        meeting = self._meetings.get(group_name)
        if meeting is not None and meeting.put(who):
            error = taken(0, [f"process {os.getpid()} on {socket.gethostname()}", who])
            net.send_frame(sock, Message.FAILED, encode_error(error), deadline)
        else:
            net.send_frame(sock, Message.RETRY, b"", deadline)


_LOCK = threading.Lock()
_SERVERS: dict[Address, RendezvousServer] = {}
_FINISHED: dict[str, tuple[float, int]] = {}


def open_server(
    host: str, port: int, secret: bytes, group_name: str, meeting: JoinerQueue
) -> RendezvousServer:
    """Return a server that serves the meeting.

    Meetings at one given port of this process share their server.

    Args:
        host: A literal address of this host; empty for all of them.
        port: 0 takes a free port, for this meeting alone.
        secret: What those who come must know.
        group_name: The group that meets.
        meeting: Where its joiners go.

    Raises:
        RankError: A group of this name is meeting here already.
        OSError: The port is taken by somebody else.
    """
    with _LOCK:
        server = _SERVERS.get((host, port))
        if server is None:
            server = RendezvousServer(net.listen(host, port), host, secret)
            try:
                server.start()
            except RuntimeError:
                # no thread can be started; whoever keeps the error would keep the port
                server.close()
                raise
            _SERVERS[server.address] = server
        elif server.secret != secret:
            raise OSError(
                errno.EADDRINUSE,
                "another meeting of this process has the port, with another secret",
            )

        server.add(group_name, meeting)
    return server


def leave_server(server: RendezvousServer, group_name: str) -> None:
    """End the server's service to a meeting; the last one closes the port."""
    with _LOCK:
        if not server.remove(group_name):
            return
        _SERVERS.pop(server.address, None)
        server.stop()
    server.close()


def remember(scope: str, group_name: str, world_size: int) -> None:
    """Note that a meeting is complete, before its ranks hear of it: see ``_left_over``."""
    if scope:
        now = time.monotonic()
        with _LOCK:
            for key in [key for key, (when, _) in _FINISHED.items() if now - when > _MEMORY_S]:
                del _FINISHED[key]
            _FINISHED[f"{scope} {group_name}"] = (now, world_size)


def _left_over(scope: str, request: JoinRequest, now: float) -> CollectiveError | None:
    """Refuse a process that the last meeting of this name left out because its rank was taken.

    It began to ask before that meeting was complete. The rank it wants belonged to somebody else,
    whose own next attempt can only begin later. Only lengths of time are compared, no two clocks.
    """
    with _LOCK:
        when, world_size = (
            _FINISHED.get(f"{scope} {request.group_name}", (0.0, 0)) if scope else (0.0, 0)
        )
    if request.rank < world_size and now - request.age_s < when:
        return RankError(
            f"rank {request.rank} was taken by another process when {request.who} asked for it, and the group met "
            f"without {request.who}; give every process its own rank, and see that none of an earlier run is left"
        )
    return None


def _after_fork() -> None:
    """Give up the parent's ports in a forked child.

    They would stay taken after the parent closed them.
    """
    global _LOCK
    _LOCK = threading.Lock()
    for server in _SERVERS.values():
        server.disown()
    _SERVERS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
