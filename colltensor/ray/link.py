"""The receiver's side of a direct transfer: links to the sources.

A link is made on first use and kept for the next. It is an authenticated connection, which carries
the requests, and a group of two on it, which carries the arrays. One transfer at a time has a link;
the next that finds none idle makes its own.
"""

from __future__ import annotations

import contextlib
import enum
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from colltensor import net
from colltensor.control import exit_hooks
from colltensor.errors import CollectiveError, CollectiveTimeoutError, GroupError, PeerLostError
from colltensor.group import Group, connect
from colltensor.options import GroupOptions
from colltensor.ray.rendezvous import address_in_ray, node_host_id
from colltensor.rendezvous import Introduction, meet_through
from colltensor.rendezvous.protocol import decode_error

CONTEXT: Final = b"colltensor direct transport"
TIMEOUT_S: Final = 30.0
"""How long either side waits for the other.

It is as long as a group waits by default; Ray gives up after 60 s.
"""
IDLE_S: Final = 60.0
"""How long a link is kept for the next transfer."""
_KEPT: Final = 4
"""How many idle links to one source are kept."""


class Step(enum.IntEnum):
    """The kinds of frames on a link."""

    MEET = 0x21
    WANTED = 0x22
    READY = 0x23
    FAILED = 0x24


@dataclass(frozen=True, slots=True)
class SourceAddress:
    """Where a source answers.

    It travels with the metadata of each object, which Ray shows to its holders only.

    Attributes:
        address: The source's address in Ray's network.
        port: Its port.
        secret: What its connections are authenticated with.
        who: The source, for messages.
        lane: Which CUDA devices the arrays go between, empty for none. NCCL ties a group to one
            device a rank, so each pair of devices has links of its own.
    """

    address: str
    port: int
    secret: bytes = field(repr=False)
    who: str
    lane: str = ""


def group_name(who: str) -> str:
    """Return the name that a source's groups have in messages."""
    return f"direct transport from {who}"


def form_group(sock: socket.socket, rank: int, who: str, deadline: float) -> Group:
    """Make the group of two, over a connection that is authenticated.

    The source is rank 0, the receiver rank 1.

    Args:
        sock: The connection; the other side makes the same call with the other rank.
        rank: 0 or 1.
        who: The source, for the messages of the group.
        deadline: When to give up.

    Raises:
        CollectiveError: The two cannot be a group: no backend for where they are, an address that
            is not reached.
        OSError: The connection broke, or the other side is late.
    """
    part = Introduction(group_name=group_name(who), world_size=2, rank=rank, address=address_in_ray(),
                        host_id=node_host_id())  # fmt: skip
    meeting = meet_through(lambda mine: _swap(sock, rank, mine, deadline), part)
    return connect(meeting, GroupOptions(timeout_s=TIMEOUT_S), deadline)


def _swap(sock: socket.socket, rank: int, mine: bytes, deadline: float) -> list[bytes]:
    """Give the other side some bytes for its own; return both in rank order."""
    net.send_frame(sock, Step.MEET, mine, deadline)
    kind, theirs = net.recv_frame(sock, deadline, net.UNPROVEN_LIMIT)
    if kind != Step.MEET:
        raise net.FrameError(f"expected the other side's introduction, got a frame of kind {kind}")
    return [mine, theirs] if rank == 0 else [theirs, mine]


class Link:
    """A connection to one source. One thread uses it; any may close it, which ends the use."""

    def __init__(self, endpoint: SourceAddress) -> None:
        self.endpoint = endpoint
        self.idle_since = 0.0
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._group: Group | None = None
        self._is_closed = False

    @property
    def is_open(self) -> bool:
        """Whether the link was made, and nobody has closed it."""
        return self._group is not None and not self._is_closed

    def open(self, deadline: float) -> None:
        """Connect and form the group.

        Raises:
            CollectiveError: See ``form_group``.
            OSError: Nobody answers, or somebody else.
        """
        endpoint = self.endpoint
        where = endpoint.address, endpoint.port
        sock = net.reach(where, endpoint.secret, CONTEXT, deadline, self._own)
        self._group = self._own(form_group(sock, 1, endpoint.who, deadline))

    def request(self, obj_id: str, deadline: float) -> None:
        """Ask for an object; on return the source is about to send it.

        Raises:
            CollectiveError: The source says why it cannot; the link goes on.
            OSError: The connection broke, or the source is late.
        """
        assert self._sock is not None
        net.send_frame(self._sock, Step.WANTED, obj_id.encode(), deadline)
        kind, payload = net.recv_frame(self._sock, deadline)
        if kind == Step.FAILED:
            raise decode_error(payload)
        if kind != Step.READY:
            raise net.FrameError(f"expected the source's answer, got a frame of kind {kind}")

    def receive(self, buffers: list[Any], on_device: bool) -> list[Any]:
        """Receive the object that was asked for into the buffers; they are ready on return.

        Raises:
            CollectiveError: As ``Group.recv``.
        """
        assert self._group is not None
        received: list[Any] = self._group.recv(buffers, 0, donate=on_device)
        if on_device:
            self._group.synchronize()
        return received

    def close(self) -> None:
        """Give the link up, from any thread; a transfer on it fails. Idempotent."""
        with self._lock:
            self._is_closed = True
            sock, group = self._sock, self._group
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes who waits on it
            sock.close()
        if group is not None:
            group.destroy()

    def disown(self) -> None:
        """Forget the parent's connection in a forked child, without a word to the source."""
        if self._sock is not None:
            self._sock.close()

    def _own(self, part: Any) -> Any:
        """Keep a part of the link, unless the link was closed meanwhile."""
        with self._lock:
            if isinstance(part, Group):
                self._group = part
            else:
                self._sock = part
            is_closed = self._is_closed
        if is_closed:
            self.close()
            raise GroupError("the transfer was aborted")
        return part


class Links:
    """This process's links, by source; no thread waits for another one's transfer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[SourceAddress, list[Link]] = {}
        self._busy: dict[Link, str] = {}
        exit_hooks.register(self)

    def fetch(
        self, obj_id: str, endpoint: SourceAddress, buffers: list[Any], on_device: bool
    ) -> list[Any]:
        """Receive an object from its source.

        Args:
            obj_id: Ray's number of the object.
            endpoint: The source.
            buffers: Arrays of the shapes and dtypes of the object's, on one type of device;
                written.
            on_device: They are on a GPU.

        Returns:
            The arrays received, ready; the buffers themselves but for JAX arrays.

        Raises:
            PeerLostError: The source is dead, or died meanwhile.
            CollectiveTimeoutError: It did not answer in time.
            CollectiveError: It does not have the object any more, or the transfer failed in another
                way.
        """
        where = f"direct transport: object {obj_id} from {endpoint.who}"
        try:
            with self._ready(obj_id, endpoint, time.monotonic() + TIMEOUT_S) as link:
                return link.receive(buffers, on_device)
        except CollectiveError as error:
            error.args = (f"{where}: {error}",)
            raise
        except TimeoutError as error:
            late = f"{where}: timed out after {TIMEOUT_S:g} s: it did not answer"
            raise CollectiveTimeoutError(late, (0,)) from error
        except OSError as error:
            words = f"{where}: it is dead, or cannot be reached: {error}"
            raise PeerLostError(words, (0,)) from error

    def abort(self, obj_id: str) -> None:
        """End the transfers of an object that are under way here; they raise."""
        with self._lock:
            links = [link for link, busy_with in self._busy.items() if busy_with == obj_id]
        for link in links:
            link.close()

    def close(self) -> None:
        """Close every link; transfers under way raise, later ones make new links."""
        with self._lock:
            links = [*self._busy, *(link for kept in self._idle.values() for link in kept)]
            self._idle.clear()
        for link in links:
            link.close()

    def disown(self) -> None:
        """Forget the parent's links in a forked child, which may make its own."""
        for link in [*self._busy, *(link for kept in self._idle.values() for link in kept)]:
            link.disown()
        # The lock may be held by a thread that the child does not have.
        self.__init__()  # type: ignore[misc]

    @contextlib.contextmanager
    def _ready(self, obj_id: str, endpoint: SourceAddress, deadline: float) -> Iterator[Link]:
        """A link whose source is about to send the object; kept afterwards unless it failed."""
        link = self._take(obj_id, endpoint)
        try:
            while link.is_open:
                try:
                    link.request(obj_id, deadline)
                    break
                except CollectiveError:
                    self._give_back(link)
                    raise
                except ConnectionError:
                    # the source gave up a link that was idle, or died; or somebody aborts
                    if not link.is_open:
                        raise GroupError("the transfer was aborted") from None
                    self._drop(link)
                    link = self._take(obj_id, endpoint)
            else:
                link.open(deadline)
                link.request(obj_id, deadline)

            yield link
            self._give_back(link)
        finally:
            self._drop(link)

    def _take(self, obj_id: str, endpoint: SourceAddress) -> Link:
        """Return an idle link, or a new one to be opened; busy with the object from now on."""
        now = time.monotonic()
        old: list[Link] = []
        with self._lock:
            for source in list(self._idle):
                fresh = [link for link in self._idle[source] if now - link.idle_since < IDLE_S]
                old += [link for link in self._idle[source] if link not in fresh]
                if fresh:
                    self._idle[source] = fresh
                else:
                    del self._idle[source]
            kept = self._idle.get(endpoint)
            link = kept.pop() if kept else Link(endpoint)
            self._busy[link] = obj_id
        for expired in old:
            expired.close()
        return link

    def _give_back(self, link: Link) -> None:
        with self._lock:
            kept = self._idle.setdefault(link.endpoint, [])
            if link.is_open and len(kept) < _KEPT and self._busy.pop(link, None) is not None:
                link.idle_since = time.monotonic()
                kept.append(link)

    def _drop(self, link: Link) -> None:
        """Close a link that was not given back."""
        with self._lock:
            is_busy = self._busy.pop(link, None) is not None
        if is_busy:
            link.close()


LINKS: Final = Links()
"""This process's."""
