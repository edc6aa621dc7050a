"""Waiting for other ranks, and finding out who is to blame where the wait was in vain.

At a deadline every rank that waits asks the others what they do, and for whom they wait. Who waits
for somebody else is not to blame, but whoever is at the end of the chain. The lowest of the ranks
whose time is up tells all what was found, so that every rank names the same ranks. The others wait
a moment for its word.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from colltensor import net
from colltensor.control import frames
from colltensor.control.connections import SILENCE_S, Connections
from colltensor.control.frames import Frame, Link
from colltensor.control.messages import (
    REMEDY,
    Absence,
    Status,
    accuse,
    followed,
    gone_ranks,
    judge,
    pair_key,
)
from colltensor.errors import (
    CollectiveError,
    CollectiveTimeoutError,
    GroupError,
    PeerLostError,
    say_timed_out,
)

if TYPE_CHECKING:
    from colltensor.rendezvous import Meeting

ALL_RANKS = -1
_ATTEMPT_S = 1.0
_PROBE_S = 0.5
_GRACE_S = 1.0
_VERDICT_S = 2.0
_SETTLE_S = 0.02
_CENSUS_S = 0.3
# Another OSError, such as a network that is unreachable, leaves open whether the rank lives.
_GONE = (
    ConnectionRefusedError,
    ConnectionResetError,
    BrokenPipeError,
    net.FrameError,
    net.AuthenticationError,
)


@dataclass(frozen=True, slots=True)
class AwaitedPeers:
    """Whom a wait depends on.

    Attributes:
        ranks: The ranks to ask when it takes too long.
        is_late: Whether what one of them says of itself means that it has not arrived.
    """

    ranks: Sequence[int]
    is_late: Callable[[Status], bool]


class FailureDetector:
    """What one rank knows and tells about where the ranks of its group are.

    Attributes:
        meeting: What the ranks know of each other.
        where: The group and this rank, for messages.
        sequence: Sequence number of the current or last operation.
        operation: The current operation, None between operations.
        peers: The ranks on which the payload of the current operation depends, None if unknown.
        exchange: How many exchanges of all ranks this rank has entered.
        pairs: How many exchanges it has entered with single other ranks, by ``pair_key``.
        crossing: The transfers that run in threads of their own, by source and destination.
        queued: How many calls it has queued on a device: with single other ranks and, under
            ALL_RANKS, with all.
        everyone: The peers that an exchange waits for of all ranks.
        connections: The links.
        timeout_s: How long calls wait, for messages; None while the group is made.
    """

    def __init__(self, meeting: Meeting) -> None:
        self.meeting = meeting
        self.where = f"group {meeting.group_name!r}, rank {meeting.rank} of {meeting.world_size}"
        self.sequence = 0
        self.operation: str | None = None
        self.peers: Sequence[int] | None = None
        self.exchange = 0
        self.pairs: dict[int, int] = {}
        self.crossing: dict[tuple[int, int], str] = {}
        self.queued: dict[int, int] = {}
        others = [rank for rank in range(meeting.world_size) if rank != meeting.rank]
        self.everyone = AwaitedPeers(others, lambda status: status.exchange < self.exchange)
        self._waited: AwaitedPeers | None = None
        self.timeout_s: float | None = None
        self.connections = Connections(meeting, self)
        self.connections.open()

    def partner(self, peer: int, lane: int) -> AwaitedPeers:
        """Return the peers awaited in an exchange with one other rank."""
        mine, theirs = pair_key(peer, lane), pair_key(self.meeting.rank, lane)
        return AwaitedPeers(
            [peer], lambda status: status.pairs.get(theirs, 0) < self.pairs.get(mine, 0)
        )

    def status(self) -> Status:
        """Return what this rank answers when it is asked; may be called by any thread."""
        until, waited, peers = self.connections.until, self._waited, self.peers
        awaits = waited.ranks if waited is not None and until is not None else peers
        crossing, operation = list(self.crossing.items()), self.operation
        if crossing:
            operation = ", ".join(text for _, text in crossing)
            awaits = [rank for ends, _ in crossing for rank in ends if rank != self.meeting.rank]
        return Status(
            rank=self.meeting.rank,
            sequence=self.sequence,
            operation=operation,
            exchange=self.exchange,
            pairs=dict(self.pairs),
            queued=dict(self.queued),
            remaining_s=None if until is None else until - time.monotonic(),
            failure=self.connections.failure,
            awaits=None if awaits is None else tuple(awaits),
        )

    def begin(self, sequence: int, operation: str | None, peers: Sequence[int] | None) -> None:
        """Note what this rank does from now on, and on which ranks it depends.

        Args:
            sequence: Sequence number of the operation.
            operation: Its name, with the arguments that matter to a reader. None between
                operations.
            peers: The ranks on which its payload depends, where it depends on any.
        """
        self.sequence, self.operation, self.peers, self._waited = sequence, operation, peers, None

    def send(self, link: Link, frame: bytes, deadline: float, awaited_peers: AwaitedPeers) -> None:
        """Send a frame of any size.

        Raises:
            CollectiveError: The group broke, or the frame was not sent before ``deadline``.
        """
        self._waited = awaited_peers
        if not self.connections.send(link, frame, deadline):
            self.overdue(awaited_peers, lambda: False)

    def receive(
        self,
        link: Link,
        kind: int,
        deadline: float,
        needed: Sequence[Link],
        awaited_peers: AwaitedPeers,
    ) -> Frame:
        """Return the next frame of ``kind`` on a link.

        Args:
            link: The link.
            kind: The kind of frame.
            deadline: When to look for who is late.
            needed: All links from which this exchange still needs a frame of that kind.
            awaited_peers: Whom the wait depends on.

        Raises:
            CollectiveError: The group broke, or the frame did not come before ``deadline``.
        """
        inbox = link.inbox[kind]
        self._waited = awaited_peers
        if not self.connections.wait(lambda: inbox, deadline, needed, kind):
            self.overdue(awaited_peers, lambda: inbox, needed, kind)
        return inbox.popleft()

    def receive_of(
        self,
        link: Link,
        kind: int,
        deadline: float,
        awaited_peers: AwaitedPeers,
        choose: Callable[[Collection[Frame]], Frame | None],
    ) -> Frame:
        """Return the frame of ``kind`` that ``choose`` finds among those that have come on a link.

        Raises:
            CollectiveError: The group broke, or none came before ``deadline``.
        """
        inbox = link.inbox[kind]
        self._waited = awaited_peers

        def ready() -> bool:
            if choose(inbox) is not None:
                return True
            if link.goodbye:
                raise self.connections.fail(
                    self.lost(link.peer, "has destroyed the group or ended")
                )
            return False

        if not self.connections.wait(ready, deadline):
            self.overdue(awaited_peers, ready)
        found = choose(inbox)
        assert found is not None
        inbox.remove(found)
        return found

    def connect(self, peer: int, deadline: float, awaited_peers: AwaitedPeers) -> Link:
        """Open the link to a lower rank, in attempts short enough to hear of failures in between.

        Raises:
            CollectiveError: The group broke, the rank is gone, or it did not answer before
                ``deadline``.
        """
        self._waited = awaited_peers

        while True:
            try:
                link = frames.open_link(
                    self.meeting, peer, min(deadline, time.monotonic() + _ATTEMPT_S)
                )
            except TimeoutError:
                self.connections.listen()
                if time.monotonic() >= deadline:
                    self.overdue(awaited_peers, lambda: False)
            except ConnectionError:
                self.connections.listen()
                raise self.connections.fail(self.lost(peer, Absence.GONE.value)) from None
            else:
                self.connections.add(link)
                return link

    def await_link(self, peer: int, deadline: float, awaited_peers: AwaitedPeers) -> Link:
        """Wait until a higher rank has opened its link; ask now and then whether it still lives.

        Raises:
            CollectiveError: The group broke, the rank is gone, or did not come before ``deadline``.
        """
        connections = self.connections
        self._waited = awaited_peers
        while not connections.wait(
            lambda: peer in connections.links, min(deadline, time.monotonic() + _PROBE_S)
        ):
            if time.monotonic() >= deadline:
                self.overdue(awaited_peers, lambda: peer in connections.links)
            elif self.ask([peer], _PROBE_S)[peer] is Absence.GONE:
                connections.listen()
                raise self.connections.fail(self.lost(peer, Absence.GONE.value))
        return connections.links[peer]

    def overdue(
        self,
        awaited_peers: AwaitedPeers,
        ready: Callable[[], object],
        needed: Sequence[Link] = (),
        kind: int = 0,
    ) -> None:
        """Find out who keeps this rank waiting, and break the group.

        Returns if ``ready()`` comes to hold meanwhile.

        Raises:
            CollectiveError: What was found, by this rank or by another.
        """
        answers = self.ask(awaited_peers.ranks)
        others = self._awaited(answers)
        self.connections.glance()
        found = judge(self.where_in(self.operation), answers, awaited_peers.is_late, others)

        # Another rank's verdict may be on its way; all ranks should raise the same error.
        patience_s = 0.0
        if found is None:
            patience_s = _GRACE_S
        elif isinstance(found, CollectiveTimeoutError) and self._others_decide(
            answers, awaited_peers
        ):
            patience_s = _VERDICT_S

        if not self.connections.wait(ready, time.monotonic() + patience_s, needed, kind):
            raise self.connections.fail(self._timed(found or self._unexplained()))

    def _awaited(self, answers: Mapping[int, Status | Absence]) -> dict[int, Status | Absence]:
        """Ask all ranks that were not asked yet, if one of ``answers`` waits for others or is gone.

        A rank may be gone because of a failure that it told the others. Those are a better witness
        of it than its absence.
        """
        rest = [rank for rank in self.everyone.ranks if rank not in answers]
        told = any(
            answer is Absence.GONE or (isinstance(answer, Status) and answer.awaits)
            for answer in answers.values()
        )
        return self.ask(rest) if rest and told else {}

    def _behind_the_payload(
        self, where: str, answers: Mapping[int, Status | Absence]
    ) -> CollectiveError | None:
        """Return the error for ranks that this rank's peers wait for, before these can take part.

        The peers are those of this rank's payload.
        """
        said = {rank: answers.get(rank) for rank in self.peers or ()}
        waiting = [
            rank for rank, answer in said.items() if isinstance(answer, Status) and answer.awaits
        ]
        ends = followed(waiting, answers)
        return accuse(where, ends, answers) if ends else None

    def ask(self, ranks: Sequence[int], limit_s: float = SILENCE_S) -> dict[int, Status | Absence]:
        """Ask ranks what they do, all at once; take over a failure that one of them knows of."""
        until = time.monotonic() + limit_s
        answers: dict[int, Status | Absence] = dict.fromkeys(ranks, Absence.SILENT)

        def ask_one(rank: int) -> None:
            try:
                answers[rank] = frames.ask(self.meeting, rank, until)
            except _GONE:
                answers[rank] = Absence.GONE
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    answers[rank] = Absence.UNASKED

        frames.in_parallel(ranks, ask_one, until)
        answers = dict(answers)
        for answer in answers.values():
            if isinstance(answer, Status) and answer.failure is not None:
                self.connections.hear(answer.failure)
        return answers

    def inquire(self, peer: int, question: bytes) -> bytes | None:
        """Return a rank's answer to a question; see ``Control.inquire``."""
        try:
            return frames.inquire(self.meeting, peer, question, time.monotonic() + SILENCE_S)
        except OSError:
            return None

    def lost(self, peer: int, how: str) -> PeerLostError:
        """Return the error for a rank that is gone.

        Looks who died with it, so that all ranks name the same ones.
        """
        time.sleep(_SETTLE_S)
        gone = gone_ranks(
            self.ask([rank for rank in self.everyone.ranks if rank != peer], _CENSUS_S)
        )
        facts = [f"rank {peer} {how}", *(f"rank {rank} {Absence.GONE.value}" for rank in gone)]
        return PeerLostError(
            f"{self.where_in(self.operation)}: {'; '.join(facts)}. {REMEDY} among the ranks that live",
            sorted((peer, *gone)),
        )

    def queuing(self, peers: Sequence[int] | None, number: int) -> AwaitedPeers:
        """Return the peers awaited in a call on a device.

        The call is this rank's ``number``-th with ``peers``, or with all.
        """
        with_whom = ALL_RANKS if peers is None else self.meeting.rank
        concerned = self.everyone.ranks if peers is None else peers[:1]
        return AwaitedPeers(concerned, lambda status: status.queued.get(with_whom, 0) < number)

    def gone(self, operation: str, peers: Sequence[int] | None) -> PeerLostError | None:
        """Return the error for those of ``peers``, None for all, that are gone, or None."""
        answers = self.ask(self.everyone.ranks if peers is None else peers, _CENSUS_S)
        found = judge(self.where_in(operation), answers, lambda status: False)
        return found if isinstance(found, PeerLostError) else None

    def diagnose(
        self, operation: str, cause: BaseException | None, awaited_peers: AwaitedPeers | None = None
    ) -> CollectiveError:
        """Return the error for a payload that did not end; see ``Control.diagnose``."""
        where = self.where_in(operation)

        found = None
        if self.connections.usable:
            concerned = awaited_peers or self.everyone
            answers = self.ask(concerned.ranks)
            found = judge(where, answers, concerned.is_late) or self._behind_the_payload(
                where, answers
            )

        # What another rank has reported explains more than what this one can see.
        if self.connections.failure is not None:
            return self.connections.failure.exception(self.meeting.rank)
        if found is not None:
            return self._timed(found)

        alive = f"{where}: every rank is alive and has arrived, but"
        if cause is not None:
            return GroupError(f"{alive} the provider failed: {cause}. {REMEDY}")
        return self._timed(
            CollectiveTimeoutError(
                f"{alive} the data did not move in time. {REMEDY}, with a longer timeout_s if the network is slow"
            )
        )

    def _timed(self, error: CollectiveError) -> CollectiveError:
        """Return an error, which says how long the timeout was if it is one."""
        if isinstance(error, CollectiveTimeoutError) and self.timeout_s is not None:
            say_timed_out(error, self.timeout_s)
        return error

    def where_in(self, operation: str | None) -> str:
        """Return the beginning of a message about an operation."""
        return f"{operation}: {self.where}" if operation else self.where

    def _others_decide(
        self, answers: dict[int, Status | Absence], awaited_peers: AwaitedPeers
    ) -> bool:
        """Return whether a lower rank waits in vain too, and will tell everyone."""
        return any(
            rank < self.meeting.rank
            and isinstance(answer, Status)
            and answer.remaining_s is not None
            and answer.remaining_s < SILENCE_S
            and not awaited_peers.is_late(answer)
            for rank, answer in answers.items()
        )

    def _unexplained(self) -> CollectiveError:
        return CollectiveTimeoutError(
            f"{self.where_in(self.operation)}: the wait timed out, but every rank that was asked has arrived by now. "
            f"{REMEDY}, with a longer timeout_s"
        )
