"""TCP connections between all ranks of a group for Gloo.

Each end of a connection has proved to know the group's secret. Gloo takes whoever comes first to
one of its ports for the rank that it waits for, so strangers are turned away here. They keep no
rank out and end nothing, and nobody but ``net`` reads what they send. The higher of two ranks
dials.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import socket
import struct
import threading
import time
from collections import deque
from typing import Final

from colltensor import net
from colltensor.backends.base import ControlPlane
from colltensor.backends.gloo.provider import expired
from colltensor.listener import Listener
from colltensor.rendezvous import Meeting

_HANDSHAKE_S: Final = 4.0
"""How long one connection may take until it is taken; then its rank dials again."""
_DIALLERS: Final = 8
_PAUSE_S: Final = 0.05
_JOIN_S: Final = 2.0
_LOOK_S: Final = 0.1

_JOIN, _TAKEN = range(2)
_ENDS: Final = struct.Struct("!II")
_ATTEMPT: Final = struct.Struct("!I")

_log = logging.getLogger(__name__)


def connect(
    control: ControlPlane, meeting: Meeting, address: str, deadline: float
) -> dict[int, socket.socket]:
    """Return a connection to each other rank. All ranks call.

    Args:
        control: The group's control plane, through which the ranks learn each other's addresses.
        meeting: Where the ranks met.
        address: The address of this host to listen at, by which the other ranks reach it.
        deadline: When to give up.

    Raises:
        OSError: One cannot listen at the address.
        TimeoutError: Some connection was not made before ``deadline``.
        CollectiveError: Another rank has broken the group.
    """
    with net.listen(address) as listener:
        mesh = _Mesh(control, meeting, listener)
        try:
            mesh.make(deadline)

            # Until all ranks have all connections, one may dial again because its last attempt was
            # taken too late.
            control.allgather(b"", deadline)
        except BaseException:
            mesh.end(kept=False)
            raise
        return mesh.end(kept=True)


class _Mesh:
    """The connections of one rank while they are made."""

    def __init__(self, control: ControlPlane, meeting: Meeting, listener: socket.socket) -> None:
        self._control = control
        self._rank, self._size = control.rank, control.world_size
        self._key = hmac.new(
            meeting.secret, b"connections of Gloo/" + meeting.generation, hashlib.sha256
        ).digest()
        self._listener = listener
        self._addresses: list[tuple[str, int]] = []
        self._to_dial = deque(range(self._rank))
        self._taken: dict[int, tuple[int, socket.socket]] = {}
        self._dialled: set[socket.socket] = set()  # and not taken
        name = f"colltensor-{control.group_name}-accepting"
        self._door = Listener(listener, self._receive, self._note, name, self._size)
        self._changed = threading.Condition()
        self._over = False

    def make(self, deadline: float) -> None:
        """Return once there is a connection to each other rank."""
        self._door.start()  # before strangers can fill the kernel's queue
        own = json.dumps(self._listener.getsockname()[:2]).encode()
        self._addresses = [
            (host, port) for host, port in map(json.loads, self._control.allgather(own, deadline))
        ]
        for _ in range(min(self._rank, _DIALLERS)):
            name = f"colltensor-{self._control.group_name}-connecting"
            threading.Thread(target=self._dial, name=name, daemon=True).start()
        while True:
            with self._changed:
                if self._changed.wait_for(self._is_complete, _LOOK_S):
                    return
            self._control.check()
            if time.monotonic() > deadline:
                raise expired("connecting", self._control)

    def end(self, kept: bool) -> dict[int, socket.socket]:
        """Accept and dial no more; return what there is, or close that too."""
        self._over = True
        self._door.stop()
        self._door.join(_JOIN_S)  # before the listener's number may be another's
        self._door.end_strangers()
        with self._changed:
            for sock in self._dialled:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)  # its thread waits for it, and closes it
            taken = {peer: sock for peer, (_, sock) in self._taken.items()}
        if kept:
            return taken
        for sock in taken.values():
            sock.close()
        return {}

    def _is_complete(self) -> bool:
        return len(self._taken) == self._size - 1

    def _receive(self, sock: socket.socket) -> bool:
        """Take a connection that a higher rank has dialled."""
        context, until = self._door.verify(sock, self._key_of)
        caller, _ = _ENDS.unpack(context)
        kind, attempt = net.recv_frame(sock, until, net.UNPROVEN_LIMIT)
        if kind != _JOIN:
            raise net.FrameError(f"expected a request to join, got {kind}")
        self._take(caller, _ATTEMPT.unpack(attempt)[0], sock)
        net.send_frame(sock, _TAKEN, b"", until)
        return True

    def _key_of(self, context: bytes) -> bytes | None:
        """Return the key if the other side names a higher rank and this one as its two ends."""
        if len(context) != _ENDS.size:
            return None
        caller, called = _ENDS.unpack(context)
        return self._key if called == self._rank < caller < self._size else None

    def _dial(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._reach(self._to_dial.popleft())

    def _reach(self, peer: int) -> None:
        """Connect to a lower rank, in as many attempts as it takes."""
        attempt = 0
        while not self._over:
            attempt += 1
            try:
                self._take(
                    peer, attempt, self._joined(peer, attempt, time.monotonic() + _HANDSHAKE_S)
                )
            except OSError as error:  # whether the rank is gone the control plane finds out
                self._note(f"cannot connect to rank {peer}", error)
                time.sleep(_PAUSE_S)
            else:
                return

    def _joined(self, peer: int, attempt: int, until: float) -> socket.socket:
        sock = net.dial(self._addresses[peer], until)
        with self._changed:
            self._dialled.add(sock)
        try:
            net.prove(sock, self._key, _ENDS.pack(self._rank, peer), until)
            net.send_frame(sock, _JOIN, _ATTEMPT.pack(attempt), until)
            kind, _ = net.recv_frame(sock, until, net.UNPROVEN_LIMIT)
            if kind != _TAKEN:
                raise net.FrameError(f"expected to be taken, got {kind}")
        except BaseException:
            self._drop(sock)
            raise
        return sock

    def _take(self, peer: int, attempt: int, sock: socket.socket) -> None:
        """Keep a connection, which the rank's last attempt has made.

        Raises:
            ConnectionError: It was not the last, or comes too late.
        """
        with self._changed:
            last, replaced = self._taken.get(peer, (0, None))
            if self._over or attempt <= last:
                raise ConnectionAbortedError(
                    f"rank {peer} has another connection, or needs none any more"
                )
            self._dialled.discard(sock)
            self._taken[peer] = attempt, sock
            self._changed.notify_all()
            if replaced is not None:
                replaced.close()

    def _drop(self, sock: socket.socket) -> None:
        with self._changed:
            self._dialled.discard(sock)
            sock.close()  # inside, so that nobody shuts a number that is another's by now

    def _note(self, what: str, error: Exception) -> None:
        _log.debug("group %r (rank %d): %s: %s", self._control.group_name, self._rank, what, error)
