"""DeadlockDetector: ends circles of ranks that wait for each other, so that none can go on.

Two ranks that block in sends to each other are refused when they agree. Other circles show in no
message. Three ranks may all send to the next one. A send may stand against a barrier, or a call
behind an asynchronous one that nobody takes.

A rank whose transfer waits for longer than usual asks the others what they wait for, in a thread of
its own. It follows the answers. If they lead back to it, and are the same once more, the group is
broken with MismatchError a moment later.

Waits only count where the rank's caller is blocked. Nothing goes past a call that has the group's
turn, so that a circle of such calls is certain. Past one that waits for its turn, or for an
asynchronous one, others may call: a thread, a done callback, a signal's handler. Threads and
callbacks can be seen, so that one line is logged instead. Handlers cannot, nor threads of C++'s
that sleep: such a circle must stand for a while before it counts.
"""

from __future__ import annotations

import enum
import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from colltensor.control import Control
from colltensor.control.messages import REMEDY
from colltensor.errors import MismatchError
from colltensor.work import Lane, callers

COLLECTIVE: Final[Lane] = (-1, -1)
"""Stands for the calls of all ranks, where a transfer has its source and destination."""
_QUESTION: Final = b"w"
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.2, 5.0
_LOOK_S: Final = 3.0
SETTLED_S: Final = 5.0
"""So long must a circle stand that something unseen may still end; half of the timeout at most."""
_log: Final = logging.getLogger(__name__)


class Certainty(enum.IntEnum):
    """Whether something else of a rank's may still make the call that ends its wait."""

    NEVER = 0
    SETTLED = 1
    NOW = 2

    @classmethod
    def of_turn(cls, thread: int) -> Certainty:
        """Return that of a call which has the turn, made in ``thread``."""
        is_main = thread == threading.main_thread().ident
        return cls.NOW if is_main or is_only_caller() else cls.NEVER

    @classmethod
    def of_wait(cls) -> Certainty:
        """Return that of a wait for another call of this rank's."""
        return cls.SETTLED if is_only_caller() else cls.NEVER


class Waits(NamedTuple):
    """What a rank waits for, none of whose callers can do anything else.

    Attributes:
        certainty: A ``Certainty``.
        awaited: Which calls must be begun by the other ranks: source, destination and number of a
            transfer, or COLLECTIVE and the number of a collective.
        begun: How many transfers it has begun of each source and destination, and of COLLECTIVE.
        queued: What it has issued but not begun.
    """

    certainty: int
    awaited: list[list[int]]
    begun: list[list[int]]
    queued: list[list[int]]

    def has_transfer(self) -> bool:
        """Return whether it waits for a transfer, and not only for collectives."""
        return any(source >= 0 for source, _, _ in self.awaited)

    def peers(self, rank: int, world_size: int) -> set[int]:
        """Return the other ranks for which ``rank`` waits."""
        if not self.has_transfer():
            return set(range(world_size)) - {rank}
        return {end for source, destination, _ in self.awaited for end in (source, destination)} - {
            rank,
            -1,
        }

    def lacks(self, other: Waits, peer: int) -> bool:
        """Return whether this rank waits for a call that ``other`` has neither begun nor issued.

        ``other`` is what rank ``peer`` said.
        """
        begun = {(source, destination): count for source, destination, count in other.begun}
        for source, destination, count in self.awaited:
            lane = (source, destination)
            concerns_peer = lane == COLLECTIVE or peer in lane
            if concerns_peer and begun.get(lane, 0) < count and [*lane] not in other.queued:
                return True
        return False

    def describe(self, rank: int) -> str:
        """Return for what ``rank`` waits, in words."""
        calls = {
            "all ranks to join its collective"
            if source < 0
            else f"rank {destination} to call recv"
            if source == rank
            else f"rank {source} to call send"
            for source, destination, _ in self.awaited
        }
        return f"rank {rank} waits for {' and '.join(sorted(calls))}"


class DeadlockDetector:
    """Finds the circles of waits that one rank of a group is part of.

    Attributes:
        waiting_thread: The thread that was seen to wait last.
    """

    def __init__(
        self,
        name: str,
        control: Control,
        waits: Callable[[], Waits | None],
        progress: Callable[[], object],
        settled_s: Callable[[], float],
        end: Callable[[MismatchError], None],
    ) -> None:
        """Begin to answer, and to look whenever the control plane says that a call waits.

        Args:
            name: The group's name.
            control: Its control plane.
            waits: Returns what this rank waits for; called in any thread.
            progress: Returns what changes with every call.
            settled_s: Returns how long a circle must stand that is not certain at once.
            end: Breaks the group.
        """
        self._name = name
        self._control = control
        self._rank = control.rank
        self._waits = waits
        self._progress = progress
        self._settled_s = settled_s
        self._end = end

        self.waiting_thread = 0
        self._seen: object = None
        self._pause_s = self._next_look = 0.0
        self._is_looking = self._has_warned = False
        self._standing: dict[int, Waits] = {}
        self._since = 0.0

        control.answer_with(_QUESTION, self._answer)
        control.watch_waits(self._consider)

    def _answer(self, asker: int, question: bytes) -> bytes:
        return json.dumps(self._waits()).encode()

    def _consider(self) -> None:
        """Look, in a thread of its own, if this rank's call has waited for long.

        Called while the call waits.
        """
        self.waiting_thread = threading.get_ident()
        now, progress = time.monotonic(), self._progress()
        if progress != self._seen:
            self._seen, self._pause_s = progress, _FIRST_PAUSE_S
            self._next_look = now + self._pause_s

        if now < self._next_look or self._is_looking:
            return
        self._pause_s = min(2 * self._pause_s, _LAST_PAUSE_S)
        self._next_look = now + self._pause_s

        waits = self._waits()
        if waits is None or not waits.has_transfer():
            return  # every circle has a transfer, and the rank in that one looks

        self._is_looking = True
        try:
            threading.Thread(
                target=self._look, name=f"colltensor {self._name}", daemon=True
            ).start()
        except RuntimeError:  # no thread can be started: the timeout remains
            self._is_looking = False

    def _look(self) -> None:
        try:
            deadline = time.monotonic() + _LOOK_S
            circle = self._circle(deadline)

            # The lowest rank with a transfer tells all, so that all raise the same error.
            if not circle or self._rank != min(
                rank for rank in circle if circle[rank].has_transfer()
            ):
                return

            if any(self._ask(rank) != waits for rank, waits in circle.items()):
                return  # one of them has gone on

            certainty = min(waits.certainty for waits in circle.values())
            if certainty == Certainty.NEVER:
                self._warn(circle)
            elif certainty == Certainty.NOW or self._has_stood(circle):
                where = f"group '{self._name}' (rank {self._rank})"
                facts = _describe(circle)
                self._end(MismatchError(f"{where}: {facts}. {REMEDY}", sorted(circle)))
        finally:
            self._is_looking = False

    def _has_stood(self, circle: dict[int, Waits]) -> bool:
        """Return whether a circle has been there for a while; if not, look again when it has."""
        now, settled_s = time.monotonic(), self._settled_s()
        if circle != self._standing:
            self._standing, self._since = circle, now
        self._next_look = min(self._next_look, self._since + settled_s)
        return now >= self._since + settled_s

    def _warn(self, circle: dict[int, Waits]) -> None:
        if not self._has_warned:
            self._has_warned = True
            _log.warning(
                "group %r (rank %d): %s; another thread may still make the call that ends it",
                self._name,
                self._rank,
                _describe(circle),
            )

    def _circle(self, deadline: float) -> dict[int, Waits]:
        """Return the ranks that wait for this one and for which it waits, with their waits.

        They may do so by way of any other ranks.
        """
        known: dict[int, Waits | None] = {self._rank: self._waits()}
        lacking: dict[int, set[int]] = {}
        frontier = [self._rank]

        while frontier and time.monotonic() < deadline:
            rank = frontier.pop()
            waits = known[rank]
            if waits is None:
                continue

            for peer in sorted(waits.peers(rank, self._control.world_size)):
                if peer not in known:
                    known[peer] = self._ask(peer)
                    frontier.append(peer)
                theirs = known[peer]
                if theirs is not None and waits.lacks(theirs, peer):
                    lacking.setdefault(rank, set()).add(peer)

        ahead = _reached(self._rank, lacking)
        return {
            rank: waits
            for rank, waits in known.items()
            if waits is not None and rank in ahead and self._rank in _reached(rank, lacking)
        }

    def _ask(self, rank: int) -> Waits | None:
        if rank == self._rank:
            return self._waits()
        said = self._control.inquire(rank, _QUESTION)
        fields: list[Any] | None = None if said is None else json.loads(said)
        return None if fields is None else Waits(*fields)


def _describe(circle: dict[int, Waits]) -> str:
    ranks = sorted(circle)
    facts = "; ".join(circle[rank].describe(rank) for rank in ranks)
    return (
        f"ranks {', '.join(map(str, ranks))} wait for each other, and none can go on: {facts}. Use sendrecv, let one "
        "of them begin with the other call, or pass async_op=True and wait for all works at the end"
    )


def _reached(start: int, lacking: dict[int, set[int]]) -> set[int]:
    """Return the ranks that lie on a way from ``start``, in one step or more."""
    found: set[int] = set()
    frontier = [start]
    while frontier:
        for rank in lacking.get(frontier.pop(), ()):
            if rank not in found:
                found.add(rank)
                frontier.append(rank)
    return found


def is_only_caller() -> bool:
    """Return whether one thread of this process makes calls, as far as Python can tell.

    There is no other thread but the package's, and nothing pending that will call the user's code.
    Threads that C++ has made, as those of Ray's actors, are known by their frames alone.
    """
    ours = {found.ident for found in threading.enumerate() if found.name.startswith("colltensor")}
    return len(sys._current_frames().keys() - ours) == 1 and not any(calls() for calls in callers)
