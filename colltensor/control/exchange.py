"""How ranks agree: up and down a binomial tree of all of them, or between two.

In the tree the parent of rank r is ``r & (r - 1)``, so that an exchange takes 2 log2(world_size) steps and
world_size - 1 connections. Two ranks need one step: both send, then both read. Agreement is the frame itself:
whoever gets the very bytes that it sent knows that the ranks behind that link agree, without unpacking them.

Imports links, lookout, status and the errors of the package, and no framework.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

from colltensor.control.links import (
    DIFFERS,
    EXCHANGE,
    HEAD,
    HEAD_NBYTES,
    PAIR,
    PAIR_TEXT,
    READ_NBYTES,
    SIGNATURE_NBYTES,
    TEXT,
    Link,
    pack,
)
from colltensor.control.lookout import Lookout, Suspects
from colltensor.control.status import REMEDY, mismatch
from colltensor.errors import GroupError

Describe = Callable[[], str]

_PART: Final = struct.Struct("!IQ")
_GATHER: Final = b"allgather of bytes"
_TEXT_LIMIT: Final = 4096


def neighbours(rank: int, world_size: int) -> tuple[int | None, list[int]]:
    """Return the parent (None for rank 0) and the children of a rank in the tree."""
    lowest_bit = rank & -rank or world_size
    steps = [1 << k for k in range(world_size.bit_length())]
    return rank & (rank - 1) if rank else None, [rank + s for s in steps if s < lowest_bit and rank + s < world_size]


class Tree:
    """Exchanges of all ranks. Every rank must do the same ones in the same order."""

    def __init__(self, lookout: Lookout, deadline: float) -> None:
        """Connect to the neighbours, and return when all ranks have.

        Raises:
            CollectiveError: A rank died, or did not come before ``deadline``.
        """
        self._lookout = lookout
        lookout.exchange += 1
        links, meeting = lookout.board.links, lookout.meeting
        parent, children = neighbours(meeting.rank, meeting.world_size)
        self._parent: Link | None = None
        if parent is not None:
            self._parent = lookout.connect(parent, deadline, lookout.everyone)
        for child in children:
            lookout.await_link(child, deadline, lookout.everyone)
        self._children = [links[child] for child in children]
        self._twin = (self._parent or self._children[0]) if meeting.world_size == 2 else None
        self._needed = [*self._children, *([self._parent] if self._parent else [])]
        if not self._all_send(pack(EXCHANGE, 0, lookout.exchange, b"begin"), deadline):
            raise lookout.board.fail(_out_of_step(lookout))

    def agree(self, signature: bytes, describe: Describe, deadline: float) -> None:
        """Return once all ranks have called with the same signature.

        Raises:
            MismatchError: They differ.
            CollectiveError: The group broke.
        """
        self._lookout.exchange += 1
        frame = pack(EXCHANGE, 0, self._lookout.exchange, signature)
        if not self._all_send(frame, deadline):
            self._raise_mismatch(signature, describe, deadline)

    def agree_and_gather(self, signature: bytes, payload: bytes, describe: Describe, deadline: float) -> list[bytes]:
        """Return the payloads of all ranks, by rank, once all have called with the same signature.

        Raises:
            MismatchError: They differ.
            CollectiveError: The group broke.
        """
        self._lookout.exchange += 1
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
        lookout = self._lookout
        what = f"{lookout.operation or 'allgather of bytes'} #{lookout.sequence}"
        return self.agree_and_gather(_GATHER, payload, lambda: what, deadline)

    def _all_send(self, frame: bytes, deadline: float) -> bool:
        """Return whether every rank sent this very frame."""
        twin, parent = self._twin, self._parent
        if twin is not None:
            self._send(twin, frame, deadline)
            return self._came(twin, frame, deadline, self._needed)
        same = True
        for step, child in enumerate(self._children):
            same = self._came(child, frame, deadline, self._needed[step:]) and same
        if parent is not None:
            self._send(parent, frame if same else _differing(frame), deadline)
            same = self._came(parent, frame, deadline, (parent,)) and same
        for child in self._children:
            self._send(child, frame if same else _differing(frame), deadline)
        return same

    def _came(self, link: Link, frame: bytes, deadline: float, needed: Sequence[Link]) -> bool:
        if read_same(link, frame, EXCHANGE):
            return True
        return self._lookout.receive(link, EXCHANGE, deadline, needed, self._lookout.everyone)[0] == frame

    def _send(self, link: Link, frame: bytes, deadline: float) -> None:
        self._lookout.send(link, frame, deadline, self._lookout.everyone)

    def _gather(self, kind: int, signature: bytes, payload: bytes, deadline: float) -> list[bytes] | None:
        """Return the payloads of all ranks, or None on every rank where one of them sent another kind of frame."""
        lookout, parent = self._lookout, self._parent
        frame = pack(kind, 0, lookout.exchange, signature)
        parts = [_PART.pack(lookout.meeting.rank, len(payload)), payload]
        if self._twin is not None:
            mine = _with_body(frame, parts)
            self._send(self._twin, mine, deadline)
            theirs = read_alike(self._twin, mine[:HEAD_NBYTES], len(mine), kind)
            if theirs is None:
                came, theirs = lookout.receive(self._twin, kind, deadline, self._needed, lookout.everyone)
                if not _alike(came, frame) or not theirs:  # nothing follows where the other rank only agrees
                    return None
            return _payloads(b"".join((*parts, theirs)), 2)
        same = True
        for step, child in enumerate(self._children):
            came, body = lookout.receive(child, kind, deadline, self._needed[step:], lookout.everyone)
            same = _alike(came, frame) and body != b"" and same
            parts.append(body)
        if parent is not None:
            self._send(parent, _with_body(frame, parts) if same else _differing(frame), deadline)
            came, body = lookout.receive(parent, kind, deadline, (parent,), lookout.everyone)
            same = _alike(came, frame) and same
            parts = [body]
        answer = _with_body(frame, parts) if same else _differing(frame)
        for child in self._children:
            self._send(child, answer, deadline)
        return _payloads(b"".join(parts), lookout.meeting.world_size) if same else None

    def _raise_mismatch(self, signature: bytes, describe: Describe, deadline: float) -> NoReturn:
        said = self._gather(TEXT, b"", _padded(signature) + _text(describe), deadline)
        if said is None:
            raise self._lookout.board.fail(_out_of_step(self._lookout))
        signatures = [part[:SIGNATURE_NBYTES] for part in said]
        texts = [part[SIGNATURE_NBYTES:].decode(errors="replace") for part in said]
        raise mismatch(self._lookout.where, range(len(said)), signatures, texts)


_SWAP: Final = b"swap"
"""The signature of an exchange of payloads."""


class Pairs:
    """Exchanges of this rank with single other ranks, over a link between the two."""

    def __init__(self, lookout: Lookout) -> None:
        self._lookout = lookout
        self._finished: dict[int, int] = {}

    def start(self, peer: int, signature: bytes, deadline: float, payload: bytes = b"") -> None:
        """Send this rank's half, with a payload if ``swap`` receives it.

        The higher rank opens the link: so two cannot open two of them at once.

        Raises:
            CollectiveError: The group broke.
        """
        lookout = self._lookout
        count = lookout.pairs[peer] = lookout.pairs.get(peer, 0) + 1
        frame = pack(PAIR, 0, count, signature, len(payload)) + payload
        link = lookout.board.links.get(peer)
        if link is None and lookout.meeting.rank < peer:
            lookout.board.defer(peer, frame)
            return
        suspects = lookout.partner(peer)
        lookout.send(link or lookout.connect(peer, deadline, suspects), frame, deadline, suspects)

    def finish(self, peer: int, signature: bytes, describe: Describe, deadline: float) -> None:
        """Wait for the other rank's half and compare.

        Raises:
            MismatchError: They differ.
            CollectiveError: The group broke.
        """
        lookout = self._lookout
        count = self._finished[peer] = self._finished.get(peer, 0) + 1
        frame = pack(PAIR, 0, count, signature)
        link = lookout.board.links.get(peer) or lookout.await_link(peer, deadline, lookout.partner(peer))
        if read_same(link, frame, PAIR):
            return
        suspects = lookout.partner(peer)
        came, _ = lookout.receive(link, PAIR, deadline, (link,), suspects)
        if came != frame:
            self._raise_mismatch(link, signature, _text(describe), deadline, suspects)

    def swap(self, peer: int, payload: bytes, deadline: float) -> bytes:
        """Send this rank's payload and return the other's.

        Raises:
            GroupError: The other rank agrees on a call instead.
            CollectiveError: The group broke.
        """
        lookout = self._lookout
        self.start(peer, _SWAP, deadline, payload)
        count = self._finished[peer] = self._finished.get(peer, 0) + 1
        link = lookout.board.links.get(peer) or lookout.await_link(peer, deadline, lookout.partner(peer))
        came, theirs = lookout.receive(link, PAIR, deadline, (link,), lookout.partner(peer))
        if not _alike(came, pack(PAIR, 0, count, _SWAP)):
            raise _out_of_step(lookout)
        return theirs

    def _raise_mismatch(
        self, link: Link, signature: bytes, text: bytes, deadline: float, suspects: Suspects
    ) -> NoReturn:
        lookout = self._lookout
        body = _padded(signature) + text
        lookout.send(link, pack(PAIR_TEXT, 0, 0, b"", len(body)) + body, deadline, suspects)
        _, theirs = lookout.receive(link, PAIR_TEXT, deadline, (link,), suspects)
        ranks, said = zip(*sorted({lookout.meeting.rank: body, link.peer: theirs}.items()), strict=True)
        texts = [part[SIGNATURE_NBYTES:].decode(errors="replace") for part in said]
        raise mismatch(lookout.where, ranks, [part[:SIGNATURE_NBYTES] for part in said], texts)


def read_same(link: Link, frame: bytes, kind: int) -> bool:
    """Return whether the next frame of a link, read at once or within a short slice, is ``frame`` and the last so far.

    Anything else that comes goes to the inbox. A frame that the other side has followed up with the news that it
    gave up is no agreement.
    """
    data = _read(link, kind, READ_NBYTES)
    if data == frame:
        return True
    _put_back(link, data)
    return False


def read_alike(link: Link, head: bytes, nbytes: int, kind: int) -> bytes | None:
    """Return what follows the head of such a frame of ``nbytes`` in all; else None, as ``read_same``."""
    data = _read(link, kind, nbytes + 1)
    if data is not None and len(data) == nbytes and data.startswith(head):
        return data[HEAD_NBYTES:]
    _put_back(link, data)
    return None


def _read(link: Link, kind: int, nbytes: int) -> bytes | None:
    """Return what comes at once or within a short slice where a frame begins, None if nothing does."""
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


def _differing(frame: bytes) -> bytes:
    return frame[:1] + bytes([DIFFERS]) + frame[2:]


def _with_body(frame: bytes, parts: Sequence[bytes]) -> bytes:
    kind, _, counter, _, signature = HEAD.unpack(frame)
    return b"".join((pack(kind, 0, counter, signature, sum(map(len, parts))), *parts))


def _alike(came: bytes, frame: bytes) -> bool:
    """Return whether two heads are the same but for the number of bytes that follow."""
    one, other = HEAD.unpack(came), HEAD.unpack(frame)
    return one[:3] == other[:3] and one[4] == other[4]


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


def _out_of_step(lookout: Lookout) -> GroupError:
    return GroupError(f"{lookout.where}: the control planes are out of step, which is a defect of colltensor. {REMEDY}")
