"""The links of one rank: how to wait on all of them, and what happens when one fails.

One thread at a time works the links, the one that has entered. Others leave their request and wake
it: the listener's threads, or a thread that closes the group or reports a failure. It serves them
when it looks or leaves. A thread that watches what is queued on a device may ``peek`` while nobody
has entered.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from colltensor.control import exit_hooks, frames
from colltensor.control.frames import FAILURE, Link
from colltensor.control.listener import ControlListener
from colltensor.control.messages import REMEDY, Failure, Status
from colltensor.errors import CollectiveError, GroupError, PeerLostError

if TYPE_CHECKING:
    from colltensor.rendezvous import Meeting

SILENCE_S = 1.0
"""How long, in seconds, a rank may take to answer a question before it counts as stopped."""
_PROPAGATION_S = 0.5
_HEARD_S = 0.2
_LOOK_S = 5.0
"""How long a thread that enters waits for one that looks.

The latter asks who died, for about a second at most.
"""

_POLL_S = 0.25


class ConnectionsOwner(Protocol):
    """What Connections works for."""

    def status(self) -> Status:
        """Return what this rank does at the moment; called by any thread."""

    def lost(self, peer: int, how: str) -> PeerLostError:
        """Return the error for a rank whose link has ended."""


class Connections:
    """The links of one rank, and the one failure that ends them.

    Attributes:
        links: The link to each rank that has one. Only the thread that has entered may use it.
        until: When the present wait times out, None while nobody waits.
        answers: What answers other ranks' questions, by their first byte.
        on_wait: Called now and then while a call waits for other ranks, or None.
        usable: False once the group is closed, broken or another process's.
    """

    def __init__(self, meeting: Meeting, owner: ConnectionsOwner) -> None:
        """Prepare to work for ``owner``; ``open`` begins."""
        self.links: dict[int, Link] = {}
        self.until: float | None = None
        self.answers: dict[bytes, Callable[[int, bytes], bytes]] = {}
        self.on_wait: Callable[[], None] | None = None
        self.usable = True

        self._owner = owner
        self._meeting = meeting
        self._pid = os.getpid()
        self._failures: list[Failure] = []
        self._reported = self._flooded = self._closed = self._shut = self._disowned = False

        self._turn = threading.Lock()
        """The mark of the thread that has entered; only ever tried."""
        self._baton = threading.Lock()
        """The mark of the thread that works the links.

        That is the thread that has entered, or for a moment one that looks or serves.
        """

        self._done = threading.Event()
        self._arrivals: deque[Link] = deque()
        self._deferred: dict[int, list[bytes]] = {}

        self._waker, self._wakened = socket.socketpair()
        self._waker.setblocking(False)
        self._wakened.setblocking(False)
        self._poller = select.poll()
        self._poller.register(self._wakened, select.POLLIN)
        self._polled: dict[int, Link] = {}

        self._control_listener: ControlListener | None = None
        self._spreading: threading.Thread | None = None

    def open(self) -> None:
        """Start to receive links and to answer questions."""
        exit_hooks.register(self)
        if self._meeting.world_size > 1:
            try:
                self._control_listener = ControlListener(self._meeting, self)
            except RuntimeError:  # no thread can be started
                self.close()
                raise

    @property
    def failure(self) -> Failure | None:
        """Why the group is broken; the first failure that this rank came to know."""
        return self._failures[0] if self._failures else None

    def enter(self, until: float | None = None) -> None:
        """Begin to work the links.

        Raises:
            CollectiveError: The group is broken, as on the other ranks.
            GroupError: The group is closed, another process's, or another thread is at work.
        """
        if not self.usable:
            raise self.obstacle()

        if not self._turn.acquire(blocking=False):
            raise GroupError(
                f"group {self._meeting.group_name!r}: two threads use its control plane at once; "
                "let one of them finish before the other calls"
            )

        try:
            if not self._baton.acquire(timeout=_LOOK_S):
                raise GroupError(
                    f"group {self._meeting.group_name!r}: another thread holds its control plane"
                )
        except BaseException:
            self._turn.release()
            raise

        self.until = until

        # The group may have broken while this thread waited for the baton.
        if not self.usable:
            self.leave()
            raise self.obstacle()

    def leave(self) -> None:
        """End working the links, and do what other threads have asked for meanwhile."""
        self.until = None
        self._baton.release()
        self._turn.release()
        if not self.usable:
            self._serve()

    def peek(self, grace_s: float) -> None:
        """Read without waiting what has come, and ``look``.

        Does nothing if another thread works the links: that one looks itself.

        Raises:
            CollectiveError: As ``enter`` and ``look``.
        """
        if not self.usable:
            raise self.obstacle()
        if not self._baton.acquire(blocking=False):
            return
        try:
            self.glance()
            self.look(grace_s)
        finally:
            self._baton.release()
            if not self.usable:
                self._serve()

    def obstacle(self) -> CollectiveError:
        """Return why the group cannot be used.

        That is the failure itself the first time, and that the group is broken afterwards.
        """
        name, rank = self._meeting.group_name, self._meeting.rank
        if self._disowned:
            return GroupError(
                f"group {name!r} belongs to process {self._pid}, this is its forked child {os.getpid()}: "
                "create a group of its own in the child"
            )

        if self._closed or not self._failures:
            return GroupError(f"group {name!r} is destroyed on rank {rank}: create it again")

        error = self._failures[0].exception(rank)
        if not self._reported:
            self._reported = True
            return error

        broken = GroupError(
            f"group {name!r} is broken on rank {rank}. {REMEDY}. It broke with: {error}"
        )
        broken.__cause__ = error
        return broken

    # What other threads may call.

    def status(self) -> Status:
        """Return what this rank does at the moment."""
        return self._owner.status()

    def answer(self, caller: int, question: bytes) -> bytes:
        """Return the answer to another rank's question.

        A connection without one says that nobody answers.
        """
        answer = self.answers.get(question[:1])
        if answer is None:
            raise ValueError("nobody answers such questions here")
        return answer(caller, question[1:])

    def arrive(self, link: Link) -> None:
        """Take over a link that another rank has opened."""
        self._arrivals.append(link)
        self.wake()
        if self._shut:
            link.close()

    def hear(self, failure: Failure) -> None:
        """Note a failure that another rank has found; the first one counts."""
        self._failures.append(failure)
        self.usable = False
        self._serve()

    def fail(self, error: CollectiveError, raises: bool = True) -> CollectiveError:
        """Break the group with an error that this rank has found, and notify every other rank.

        Args:
            error: The error.
            raises: Whether the caller raises it. Otherwise the first call that finds the group
                broken raises it.

        Returns:
            The error to raise: this one, or the one with which the group was broken before.
        """
        failure = Failure.of(error, self._meeting.rank)
        self._failures.append(failure)
        self.usable = False

        # Only the first failure is propagated, so that all ranks name the same one.
        if self._failures[0] is not failure:
            self._serve()
            return self.obstacle()

        self._reported = raises
        if not self._closed and not self._disowned:
            self._spread(failure)
        self._serve()
        return error

    def close(self, waits: bool = True) -> None:
        """Say goodbye and close everything; a thread that waits meanwhile raises.

        In a forked child say nothing.
        """
        self._closed = True
        self.usable = False
        exit_hooks.unregister(self)
        if self._disowned:
            return
        # whoever hears of it late asks this rank, and would find it gone as well
        if self._spreading is not None:
            self._spreading.join(_PROPAGATION_S)
        self._serve()
        if waits:
            self._done.wait(SILENCE_S)

    def disown(self) -> None:
        """Close the copies of all sockets, in a forked child.

        So the parent's end is still an end for the other ranks.
        """
        self._disowned = True
        self.usable = False
        if self._control_listener is not None:
            self._control_listener.disown()
        self._meeting.listener.close()
        for link in [*self.links.values(), *self._arrivals]:
            link.sock.close()
        self._waker.close()
        self._wakened.close()

    # What the thread that has entered may call.

    def add(self, link: Link) -> None:
        """Work a new link from now on, and send what was deferred for it."""
        if link.peer in self.links or self._shut:
            link.close()
            return
        self.links[link.peer] = link
        self._polled[link.sock.fileno()] = link
        self._poller.register(link.sock, select.POLLIN)
        for frame in self._deferred.pop(link.peer, ()):
            link.send(frame)

    def defer(self, peer: int, frame: bytes) -> None:
        """Send a short frame once ``peer`` has opened its link."""
        self._deferred.setdefault(peer, []).append(frame)

    def send(self, link: Link, frame: bytes, until: float) -> bool:
        """Send a frame of any size.

        While it does not fit, read what comes, so that two senders cannot block each other.

        Returns:
            Whether it was sent before ``until``.

        Raises:
            CollectiveError: The group broke meanwhile.
        """
        sent = link.send(frame)
        if sent == len(frame):
            return True

        rest = memoryview(frame)[sent:]
        link.stuck = True
        try:
            while rest and link.ended_at is None:
                self.look()
                left = until - time.monotonic()
                if left <= 0:
                    return False
                self._poller.modify(link.sock, select.POLLIN | select.POLLOUT)
                self._poll(left)
                rest = rest[link.send(rest) :]
            link.stuck = False
        finally:
            # POLLOUT must go: a link with room to write would end every sleep at once.
            if link.ended_at is None:
                self._poller.modify(link.sock, select.POLLIN)

        return True

    def wait(
        self, ready: Callable[[], object], until: float, needed: Sequence[Link] = (), kind: int = 0
    ) -> bool:
        """Read what all links say until ``ready()`` holds.

        Args:
            ready: The condition, checked whenever something has come.
            until: When to give up.
            needed: Links on which a frame of ``kind`` must still come. A goodbye there is a
                failure.
            kind: The kind of frame.

        Returns:
            Whether ``ready()`` held before ``until``.

        Raises:
            CollectiveError: The group broke meanwhile.
            GroupError: Another thread closed the group.
        """
        while True:
            self._absorb()
            self._hear_links()

            # A frame that is complete counts even if a link failed after it.
            if ready():
                return True

            self.look()
            for link in needed:
                if link.goodbye and not link.inbox[kind]:
                    raise self.fail(self._owner.lost(link.peer, "has destroyed the group or ended"))

            left = until - time.monotonic()
            if left <= 0:
                return False
            self._poll(left)
            self.notify_wait()

    def notify_wait(self) -> None:
        """Let whoever watches know that a call waits; see ``Control.watch_waits``."""
        if self.on_wait is not None and self.usable:
            self.on_wait()

    def look(self, grace_s: float = 0.0) -> None:
        """Raise if the group is broken or closed, or if a link has ended.

        A link counts as ended if that happened without goodbye, more than ``grace_s`` ago.

        Raises:
            CollectiveError: What is wrong, after the neighbours were notified.
        """
        self._hear_links()
        for link in self.links.values():
            if (
                link.ended_at is not None
                and not link.goodbye
                and time.monotonic() - link.ended_at >= grace_s
            ):
                raise self.fail(
                    self._owner.lost(link.peer, "has died: its connection ended without a goodbye")
                )

    def _hear_links(self) -> None:
        for link in self.links.values():
            if link.failure is not None:
                self.hear(link.failure)
                link.failure = None
        if not self.usable:
            raise self.obstacle()

    def glance(self) -> None:
        """Read what has come on all links, without waiting."""
        self._absorb()
        self._poll(0.0)

    def listen(self) -> None:
        """Read what has come on all links, without waiting, and raise if it is bad news.

        Raises:
            CollectiveError: As ``look``.
        """
        self.glance()
        self.look()

    def _absorb(self) -> None:
        while self._arrivals:
            self.add(self._arrivals.popleft())

    def _poll(self, left_s: float) -> None:
        """Sleep until a link or another thread has news, at most ``left_s``, and read it."""
        for fd, _ in self._poller.poll(math.ceil(min(left_s, _POLL_S) * 1000)):
            link = self._polled.get(fd)
            if link is None:
                with contextlib.suppress(BlockingIOError):
                    self._wakened.recv(4096)
                continue
            link.pump()
            if link.ended_at is not None:
                del self._polled[fd]
                self._poller.unregister(fd)

    def wake(self) -> None:
        """Let the thread that waits look again."""
        with contextlib.suppress(OSError):
            self._waker.send(b"\0")

    def _serve(self) -> None:
        """Do what is due after a failure or a close.

        If another thread works the links, wake it to do this when it leaves.
        """
        while not self._disowned and self._due():
            if not self._baton.acquire(blocking=False):
                self.wake()
                return
            try:
                if self._failures and not self._flooded:
                    self._flood()
                if self._closed and not self._shut:
                    self._shut_down()
            finally:
                self._baton.release()

    def _due(self) -> bool:
        return bool(self._failures and not self._flooded) or (self._closed and not self._shut)

    def _flood(self) -> None:
        """Propagate the failure to everyone this rank has a link to; they do the same."""
        self._flooded = True
        body = self._failures[0].encode()
        frame = frames.pack(FAILURE, 0, 0, b"", len(body)) + body
        for link in self.links.values():
            if not link.stuck:
                link.stuck = link.send(frame) < len(frame)

    def _spread(self, failure: Failure) -> None:
        """Propagate the failure to every rank's listener too.

        The flood over the links ends at a rank that is stopped or computes.

        The thread is no daemon, so that a process that ends because of the failure still propagates
        it.
        """
        peers = [rank for rank in range(self._meeting.world_size) if rank != self._meeting.rank]
        if failure.error == PeerLostError.__name__:
            peers = [rank for rank in peers if rank not in failure.ranks]

        if not peers:
            return

        def spread() -> None:
            until = time.monotonic() + SILENCE_S
            frames.in_parallel(
                peers,
                lambda peer: frames.propagate_failure(self._meeting, peer, failure, until),
                until,
            )

        thread = threading.Thread(
            target=spread, name=f"colltensor-{self._meeting.group_name}-failure"
        )
        try:
            thread.start()
        except RuntimeError:
            # there are too many, or the interpreter ends: told here, which takes a second at most
            spread()
        else:
            self._spreading = thread
            # whoever ends its process at the error would be missed in place of what it found out
            thread.join(_HEARD_S)

    def _shut_down(self) -> None:
        self._shut = True
        if self._control_listener is not None:
            self._control_listener.close()
        self._meeting.listener.close()
        self._absorb()
        for link in self.links.values():
            link.close()
        self._waker.close()
        self._wakened.close()
        self._done.set()
