"""The thread that answers a group's listener: links, questions about status, news of failures.

Every connection that speaks is handled in a short-lived thread of its own (``Listener``), so that
strangers keep nobody waiting.
"""

from __future__ import annotations

import hmac
import logging
import socket
from typing import TYPE_CHECKING, Protocol

from colltensor import net
from colltensor.control.frames import (
    ANSWER,
    ASK,
    CALLER,
    CONFIRM,
    FAILURE_NEWS,
    INQUIRE,
    LINK,
    WELCOME,
    Link,
    context_of,
)
from colltensor.control.messages import Failure, Status
from colltensor.listener import Listener

if TYPE_CHECKING:
    from colltensor.rendezvous import Meeting

_REQUEST_LIMIT = 1 << 20
_log = logging.getLogger("colltensor")


class ListenerOwner(Protocol):
    """Whom the listener works for. Each method may be called from any thread and must not wait."""

    def status(self) -> Status:
        """Return what this rank does at the moment."""

    def arrive(self, link: Link) -> None:
        """Take over a link that another rank has opened."""

    def answer(self, caller: int, question: bytes) -> bytes:
        """Return the answer to another rank's question."""

    def hear(self, failure: Failure) -> None:
        """Note that another rank says the group is broken."""


class ControlListener:
    """Accepts, authenticates and answers whoever connects to a group's listener."""

    def __init__(self, meeting: Meeting, owner: ListenerOwner) -> None:
        """Start the thread."""
        self._meeting = meeting
        self._owner = owner
        self._context = context_of(meeting)
        self._closed = False
        name = f"colltensor-{meeting.group_name}"
        self._listener = Listener(
            meeting.listener, self._serve, self._note, name, meeting.world_size
        )
        self._listener.start()

    def close(self) -> None:
        """End the thread; afterwards the listener may be closed."""
        self._closed = True
        self._listener.stop()
        self._listener.join(1.0)

    def disown(self) -> None:
        """Close the copies of the sockets in a forked child, which has no such thread.

        Only closes them: shutting down would end the parent's connections too.
        """
        self._closed = True
        self._listener.disown()

    def _note(self, what: str, error: Exception) -> None:
        meeting = self._meeting
        _log.debug("group %r (rank %d): %s: %s", meeting.group_name, meeting.rank, what, error)

    def _secret_of(self, context: bytes) -> bytes | None:
        return self._meeting.secret if hmac.compare_digest(context, self._context) else None

    def _serve(self, sock: socket.socket) -> bool:
        """Do what a rank asks that proves itself; return whether its connection stays open."""
        _, deadline = self._listener.verify(sock, self._secret_of)
        wish, request = net.recv_frame(sock, deadline, _REQUEST_LIMIT)
        if len(request) < CALLER.size:
            raise net.FrameError(
                f"expected a request of at least {CALLER.size} bytes, got {len(request)}"
            )

        [caller] = CALLER.unpack_from(request)
        if wish == ASK:
            net.send_frame(sock, ANSWER, self._owner.status().encode(), deadline)
        elif wish == INQUIRE and caller < self._meeting.world_size:
            net.send_frame(
                sock, ANSWER, self._owner.answer(caller, request[CALLER.size :]), deadline
            )
        elif wish == FAILURE_NEWS:
            self._owner.hear(Failure.decode(request[CALLER.size :]))
        elif wish == LINK and self._meeting.rank < caller < self._meeting.world_size:
            # Only the higher rank of a pair dials, so that the two cannot open two links at once.
            net.send_frame(sock, WELCOME, b"", deadline)
            kind, _ = net.recv_frame(sock, deadline, _REQUEST_LIMIT)
            if kind == CONFIRM and not self._closed:
                self._owner.arrive(Link(sock, caller))
                return True
        else:
            raise net.FrameError(f"expected a request that is known, got {wish} of rank {caller}")
        return False
