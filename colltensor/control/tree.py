"""How ranks agree: up and down a binomial tree of all of them, or between two.

In the tree the parent of rank r is ``r & (r - 1)``. So an exchange takes 2 log2(world_size) steps
and world_size - 1 connections. Two ranks need one step: both send, then both read. Agreement is the
frame itself. Whoever gets the very bytes that it sent knows that the ranks behind that link agree,
without unpacking them.
"""

from __future__ import annotations

import contextlib
import struct
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Final, NoReturn, TypeVar

from colltensor.control.failure_detector import FailureDetector
from colltensor.control.frames import (
    BOUND,
    DIFFERS,
    EXCHANGE,
    HEAD,
    HEAD_NBYTES,
    NO_LANE,
    PAIR,
    PAIR_TEXT,
    READ_NBYTES,
    SIGNATURE_NBYTES,
    TEXT,
    UNLIKE,
    Frame,
    Link,
    lane_of,
    pack,
)
from colltensor.control.messages import REMEDY, mismatch, pair_key
from colltensor.errors import GroupError

Describe = Callable[[], str]

_PART: Final = struct.Struct("!IQ")
_GATHER: Final = b"allgather of bytes"
_TEXT_LIMIT: Final = 4096


def neighbours(rank: int, world_size: int) -> tuple[int | None, list[int]]:
    """Return the parent (None for rank 0) and the children of a rank in the tree."""
    lowest_bit = rank & -rank or world_size
    steps = [1 << k for k in range(world_size.bit_length())]
    return rank & (rank - 1) if rank else None, [
        rank + s for s in steps if s < lowest_bit and rank + s < world_size
    ]


class Tree:
    """Exchanges of all ranks. Every rank must do the same ones in the same order."""

    def __init__(self, detector: FailureDetector, deadline: float) -> None:
        """Connect to the neighbours, and return when all ranks have.

        Raises:
            CollectiveError: A rank died, or did not come before ``deadline``.
        """
        self._detector = detector
        detector.exchange += 1

        links, meeting = detector.connections.links, detector.meeting
        parent, children = neighbours(meeting.rank, meeting.world_size)
        self._parent: Link | None = None
        if parent is not None:
            self._parent = detector.connect(parent, deadline, detector.everyone)
        for child in children:
            detector.await_link(child, deadline, detector.everyone)

        self._children = [links[child] for child in children]
        self._twin = (self._parent or self._children[0]) if meeting.world_size == 2 else None
        self._needed = [*self._children, *([self._parent] if self._parent else [])]

        # All ranks begin with the same frame, so that none goes on before the last is there.
        if self._all_send(pack(EXCHANGE, 0, detector.exchange, b"begin"), deadline):
            raise detector.connections.fail(_out_of_step(detector))

    def agree(self, signature: bytes, describe: Describe, deadline: float, order: int = 0) -> bool:
        """Return once all ranks have called with the same signature.

        Returns True where ``order`` is the same, too.

        Raises:
            MismatchError: They differ.
            CollectiveError: The group broke.
        """
        self._detector.exchange += 1
        frame = pack(EXCHANGE, 0, self._detector.exchange, signature, order=order)
        found = self._all_send(frame, deadline)
        if found & DIFFERS:
            self._raise_mismatch(signature, describe, deadline)
        return not found

    def agree_and_gather(
        self, signature: bytes, payload: bytes, describe: Describe, deadline: float
    ) -> list[bytes]:
        """Return the payloads of all ranks, by rank, once all have called with the same signature.

        Raises:
            MismatchError: They differ.
            CollectiveError: The group broke.
        """
        self._detector.exchange += 1
        payloads = self._gather(EXCHANGE, signature, payload, deadline)
        if payloads is None:
            self._raise_mismatch(signature, describe, deadline)
        return payloads

    def allgather(self, payload: bytes, deadline: float) -> list[bytes]:
        """Return the payloads of all ranks, by rank.

        Raises:
            MismatchError: Some rank calls something else.
            CollectiveError: The group broke.
        """
        detector = self._detector
        what = f"{detector.operation or 'allgather of bytes'} #{detector.sequence}"
        return self.agree_and_gather(_GATHER, payload, lambda: what, deadline)

    def _all_send(self, frame: bytes, deadline: float) -> int:
        """Return 0 where every rank sent this very frame.

        Otherwise returns DIFFERS, or UNLIKE if all but the order is the same.
        """
        twin, parent = self._twin, self._parent
        if twin is not None:
            self._send(twin, frame, deadline)
            return self._came(twin, frame, deadline, self._needed)
        found = 0
        for step, child in enumerate(self._children):
            found |= self._came(child, frame, deadline, self._needed[step:])
        if parent is not None:
            self._send(parent, _flagged(frame, found) if found else frame, deadline)
            found |= self._came(parent, frame, deadline, (parent,))
        for child in self._children:
            self._send(child, _flagged(frame, found) if found else frame, deadline)
        return found

    def _came(self, link: Link, frame: bytes, deadline: float, needed: Sequence[Link]) -> int:
        if read_same(link, frame, EXCHANGE):
            return 0
        detector = self._detector
        return _difference(
            detector.receive(link, EXCHANGE, deadline, needed, detector.everyone)[0], frame
        )

    def _send(self, link: Link, frame: bytes, deadline: float) -> None:
        self._detector.send(link, frame, deadline, self._detector.everyone)

    def _gather(
        self, kind: int, signature: bytes, payload: bytes, deadline: float
    ) -> list[bytes] | None:
        """Return the payloads of all ranks.

        Returns None on every rank where one of them sent another kind of frame.
        """
        detector, parent = self._detector, self._parent
        parts = [_PART.pack(detector.meeting.rank, len(payload)), payload]

        if self._twin is not None:
            frame = pack(kind, 0, detector.exchange, signature, _PART.size + len(payload))
            mine = b"".join((frame, *parts))
            detector.send(self._twin, mine, deadline, detector.everyone)
            theirs = read_alike(self._twin, mine[:HEAD_NBYTES], len(mine), kind)
            if theirs is None:
                came, theirs = detector.receive(
                    self._twin, kind, deadline, self._needed, detector.everyone
                )
                # nothing follows where the other rank only agrees
                if not _alike(came, frame) or not theirs:
                    return None
            return _payloads(b"".join((*parts, theirs)), 2)

        frame = pack(kind, 0, detector.exchange, signature)
        same = True
        for step, child in enumerate(self._children):
            came, body = detector.receive(
                child, kind, deadline, self._needed[step:], detector.everyone
            )
            same = _alike(came, frame) and body != b"" and same
            parts.append(body)

        if parent is not None:
            answer = _with_body(frame, parts) if same else _flagged(frame, DIFFERS)
            self._send(parent, answer, deadline)
            came, body = detector.receive(parent, kind, deadline, (parent,), detector.everyone)
            same = _alike(came, frame) and same
            parts = [body]

        answer = _with_body(frame, parts) if same else _flagged(frame, DIFFERS)
        for child in self._children:
            self._send(child, answer, deadline)
        return _payloads(b"".join(parts), detector.meeting.world_size) if same else None

    def _raise_mismatch(self, signature: bytes, describe: Describe, deadline: float) -> NoReturn:
        said = self._gather(TEXT, b"", _padded(signature) + _text(describe), deadline)
        if said is None:
            raise self._detector.connections.fail(_out_of_step(self._detector))
        signatures = [part[:SIGNATURE_NBYTES] for part in said]
        texts = [part[SIGNATURE_NBYTES:].decode(errors="replace") for part in said]
        raise mismatch(self._detector.where, range(len(said)), signatures, texts)


_Begun = TypeVar("_Begun")
_Ended = TypeVar("_Ended")
Awaited = tuple[int, int, int]
"""What a thread waits for: a frame of a peer's, by its lane and kind."""

_SWAP: Final = b"swap"
"""The signature of an exchange of payloads."""


class Pairs:
    """Exchanges of this rank with single other ranks, over a link between the two, and by lanes.

    A lane is a direction of a pair. What is exchanged about transfers of one lane meets in the
    order in which it was started. It passes what is about the other lane. Exchanges of different
    lanes may wait in several threads at once (``agree_beside``), of which one works the links for
    all.
    """

    def __init__(self, detector: FailureDetector) -> None:
        self._detector = detector
        self._finished: dict[int, int] = {}
        self._changed = threading.Condition()
        self._led = False  # one of the threads works the links
        self._newcomers = 0  # threads that want to
        self._followers: set[Awaited] = set()  # what the others wait for

    def start(
        self,
        peer: int,
        signature: bytes,
        deadline: float,
        payload: bytes = b"",
        lane: int = NO_LANE,
        bound: bool = False,
        order: int = 0,
    ) -> None:
        """Send this rank's half, with a payload if ``swap`` receives it.

        The higher rank opens the link: so two cannot open two of them at once.

        Raises:
            CollectiveError: The group broke.
        """
        detector = self._detector
        key = pair_key(peer, lane)
        count = detector.pairs[key] = detector.pairs.get(key, 0) + 1
        flags = BOUND if bound else 0
        frame = pack(PAIR, flags, count, signature, len(payload), lane, order) + payload

        link = detector.connections.links.get(peer)
        if link is None and detector.meeting.rank < peer:
            detector.connections.defer(peer, frame)
            return

        awaited_peers = detector.partner(peer, lane)
        detector.send(
            link or detector.connect(peer, deadline, awaited_peers), frame, deadline, awaited_peers
        )

    def finish(
        self,
        peer: int,
        signature: bytes,
        describe: Describe,
        deadline: float,
        lane: int = NO_LANE,
        bound: bool = False,
        order: int = 0,
    ) -> bool:
        """Wait for the other rank's half and compare; return whether its order is the same, too.

        Raises:
            MismatchError: They differ; or both ranks only send to each other, or only receive, and
                are bound to.
            CollectiveError: The group broke.
        """
        theirs, alike = self._compare(peer, signature, deadline, lane, bound, order)
        if theirs is not None:
            said = self._say(peer, signature, describe, deadline, lane)
            self._raise_mismatch(
                peer, said, self._hear(peer, deadline, lane, theirs), theirs != lane
            )
        return alike

    def agree_beside(
        self,
        peer: int,
        signature: bytes,
        describe: Describe,
        deadline: float,
        lane: int,
        working: Callable[[float], contextlib.AbstractContextManager[None]],
        order: int = 0,
    ) -> bool:
        """Start and finish an exchange of a lane, while other threads do with other lanes.

        Nothing else may be called meanwhile.

        Raises:
            CollectiveError: As ``finish``.
        """
        theirs, alike = self._take_part(
            (peer, lane, PAIR),
            deadline,
            working,
            lambda: self.start(peer, signature, deadline, b"", lane, order=order),
            lambda _: self._compare(peer, signature, deadline, lane, False, order),
        )

        if theirs is not None:
            said, heard = self._take_part(
                (peer, lane, PAIR_TEXT),
                deadline,
                working,
                lambda: self._say(peer, signature, describe, deadline, lane),
                lambda said: (said, self._hear(peer, deadline, lane, lane)),
            )
            self._raise_mismatch(peer, said, heard, False)

        return alike

    def _take_part(
        self,
        me: Awaited,
        deadline: float,
        working: Callable[[float], contextlib.AbstractContextManager[None]],
        begin: Callable[[], _Begun],
        end: Callable[[_Begun], _Ended],
    ) -> _Ended:
        """Begin, wait for a frame or the deadline, and end.

        Does so while working the links for every thread that waits.
        """
        begun: list[_Begun] = []
        connections = self._detector.connections
        self._lead()

        while True:
            try:
                with working(deadline):
                    if not begun:
                        begun.append(begin())
                    connections.wait(
                        lambda: self._newcomers or any(map(self._has_come, (me, *self._followers))),
                        deadline,
                    )
                    if self._has_come(me) or time.monotonic() >= deadline:
                        return end(begun[0])
            finally:
                self._stand_back()
            self._follow(me, deadline)

    def _lead(self) -> None:
        """Become the thread that works the links, which whoever does is asked to leave."""
        with self._changed:
            self._newcomers += 1
            self._detector.connections.wake()
            self._changed.wait_for(lambda: not self._led)
            self._newcomers -= 1
            self._led = True

    def _stand_back(self) -> None:
        with self._changed:
            self._led = False
            self._changed.notify_all()

    def _follow(self, me: Awaited, deadline: float) -> None:
        """Wait until there is something to do on the links.

        That is for this thread, or for none of those that wait.
        """

        def turn_has_come() -> bool:
            if self._led or self._newcomers:
                return False
            return self._has_come(me) or not any(map(self._has_come, self._followers))

        with self._changed:
            self._followers.add(me)
            # after the leader's last look, who did not count this thread yet
            if self._led and self._has_come(me):
                self._detector.connections.wake()
            try:
                came = self._changed.wait_for(turn_has_come, max(0.0, deadline - time.monotonic()))
                self._led = self._led or came
            finally:
                self._followers.discard(me)

        if not came:
            self._lead()

    def _has_come(self, me: Awaited) -> bool:
        peer, lane, kind = me
        link = self._detector.connections.links.get(peer)
        return link is not None and (
            link.goodbye or _in_lane(link.inbox[kind], lane, False) is not None
        )

    def swap(self, peer: int, payload: bytes, deadline: float) -> bytes:
        """Send this rank's payload and return the other's.

        Raises:
            GroupError: The other rank agrees on a call instead.
            CollectiveError: The group broke.
        """
        detector = self._detector
        self.start(peer, _SWAP, deadline, payload)
        key = pair_key(peer, NO_LANE)
        count = self._finished[key] = self._finished.get(key, 0) + 1
        awaited_peers = detector.partner(peer, NO_LANE)
        link = detector.connections.links.get(peer) or detector.await_link(
            peer, deadline, awaited_peers
        )
        came, theirs = detector.receive(link, PAIR, deadline, (link,), awaited_peers)
        if not _alike(came, pack(PAIR, 0, count, _SWAP)):
            raise _out_of_step(detector)
        return theirs

    def _compare(
        self, peer: int, signature: bytes, deadline: float, lane: int, bound: bool, order: int
    ) -> tuple[int | None, bool]:
        """Wait for the other rank's half, and compare it.

        Returns None if it is the same, else its lane; and whether the order is the same.
        """
        detector = self._detector
        key = pair_key(peer, lane)
        count = self._finished.get(key, 0) + 1
        frame = pack(PAIR, BOUND if bound else 0, count, signature, lane=lane, order=order)

        awaited_peers = detector.partner(peer, lane)
        link = detector.connections.links.get(peer) or detector.await_link(
            peer, deadline, awaited_peers
        )

        if not read_same(link, frame, PAIR):
            came = detector.receive_of(
                link, PAIR, deadline, awaited_peers, lambda inbox: _in_lane(inbox, lane, bound)
            )
            if lane_of(came) != lane:
                detector.pairs[key] -= 1  # neither transfer has a counterpart
                return lane_of(came), False
            found = _difference(_flagged(came[0], 0), _flagged(frame, 0))
            self._finished[key] = count
            return (lane, False) if found & DIFFERS else (None, not found)

        self._finished[key] = count
        return None, True

    def _say(
        self, peer: int, signature: bytes, describe: Describe, deadline: float, lane: int
    ) -> bytes:
        """Tell the other rank what this one calls, where they differ."""
        detector = self._detector
        body = _padded(signature) + _text(describe)
        frame = pack(PAIR_TEXT, 0, 0, b"", len(body), lane) + body
        detector.send(
            detector.connections.links[peer], frame, deadline, detector.partner(peer, lane)
        )
        return body

    def _hear(self, peer: int, deadline: float, lane: int, other_lane: int) -> bytes:
        """Return what the other rank tells."""
        detector = self._detector
        return detector.receive_of(
            detector.connections.links[peer],
            PAIR_TEXT,
            deadline,
            detector.partner(peer, lane),
            lambda inbox: _in_lane(inbox, other_lane, False),
        )[1]

    def _raise_mismatch(self, peer: int, said: bytes, heard: bytes, crossed: bool) -> NoReturn:
        detector = self._detector
        ranks, both = zip(*sorted({detector.meeting.rank: said, peer: heard}.items()), strict=True)
        texts = [part[SIGNATURE_NBYTES:].decode(errors="replace") for part in both]
        signatures = [part[:SIGNATURE_NBYTES] for part in both]
        raise mismatch(detector.where, ranks, signatures, texts, _CROSSED if crossed else None)


_CROSSED: Final = (
    "both ranks send, or both receive, and would wait for each other: use sendrecv, let one of them begin with the "
    "other, or pass async_op=True (which does not help over pygloo and nccl)"
)


def _in_lane(inbox: Collection[Frame], lane: int, bound: bool) -> Frame | None:
    """Return the first frame of a lane.

    For a rank that is bound to its own lane, return also the peer's that is bound to another.
    """
    frames = list(inbox)
    found = next((frame for frame in frames if lane_of(frame) == lane), None)
    if found is None and bound:
        found = next((frame for frame in frames if frame[0][1] & BOUND), None)
    return found


def read_same(link: Link, frame: bytes, kind: int) -> bool:
    """Return whether the next frame of a link is ``frame``, and the last so far.

    It is read at once or within a short slice. Anything else that comes goes to the inbox. A frame
    that the other side has followed up with the news that it gave up is no agreement.
    """
    data = _read(link, kind, READ_NBYTES)
    if data == frame:
        return True
    _put_back(link, data)
    return False


def read_alike(link: Link, head: bytes, nbytes: int, kind: int) -> bytes | None:
    """Return what follows the head of such a frame of ``nbytes`` in all, else None.

    It is read as in ``read_same``.
    """
    data = _read(link, kind, nbytes + 1)
    if data is not None and len(data) == nbytes and data.startswith(head):
        return data[HEAD_NBYTES:]
    _put_back(link, data)
    return None


def _read(link: Link, kind: int, nbytes: int) -> bytes | None:
    """Return what comes at once or within a short slice where a frame begins.

    Returns None if nothing comes.
    """
    if link.inbox[kind] or not link.clean:
        return None
    try:
        return link.sock.recv(nbytes)
    except BlockingIOError:
        return None
    except OSError:
        link.end()
        return None


def _put_back(link: Link, data: bytes | None) -> None:
    if data is not None:
        link.feed(data)
        link.pump()


def _flagged(frame: bytes, flags: int) -> bytes:
    return frame[:1] + bytes([flags]) + frame[2:]


def _difference(came: bytes, frame: bytes) -> int:
    """Return how a head differs from this one, which has no flags.

    Returns 0, or DIFFERS, or UNLIKE if they differ by the order alone.
    """
    theirs, own = HEAD.unpack(came), HEAD.unpack(frame)
    if theirs[0] != own[0] or theirs[2:6] != own[2:6]:
        return DIFFERS
    flags: int = theirs[1]
    return flags if theirs[6] == own[6] else flags | UNLIKE


def _with_body(frame: bytes, parts: Sequence[bytes]) -> bytes:
    kind, _, _, counter, _, signature, _ = HEAD.unpack(frame)
    return b"".join((pack(kind, 0, counter, signature, sum(map(len, parts))), *parts))


def _alike(came: bytes, frame: bytes) -> bool:
    """Return whether two heads are the same but for the number of bytes that follow."""
    one, other = HEAD.unpack(came), HEAD.unpack(frame)
    return bool(one[:4] == other[:4] and one[5] == other[5])


def _payloads(body: bytes, world_size: int) -> list[bytes]:
    payloads = [b""] * world_size
    start = 0
    while start < len(body):
        rank, nbytes = _PART.unpack_from(body, start)
        start += _PART.size
        payloads[rank] = body[start : start + nbytes]
        start += nbytes
    return payloads


def _padded(signature: bytes) -> bytes:
    return signature.ljust(SIGNATURE_NBYTES, b"\0")


def _text(describe: Describe) -> bytes:
    return describe().encode()[:_TEXT_LIMIT]


def _out_of_step(detector: FailureDetector) -> GroupError:
    return GroupError(
        f"{detector.where}: the control planes are out of step, which is a defect of colltensor. {REMEDY}"
    )
