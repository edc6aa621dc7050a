"""The control plane of a group.

Ranks agree on a call before its data moves, and learn who is late or dead.

No exchange outlasts its deadline by more than a few seconds. Then, or when a connection breaks, one
error is found. It is propagated to every rank over the links and through the listeners, and the
group is broken.

    Control                   what the group and its backend call
    ├── tree                  how ranks agree: the tree of all, and pairs
    ├── failure_detector      waiting, and who is to blame for a wait in vain
    ├── connections           all links of this rank at once, and the failure that ends them
    ├── listener              the thread that answers other ranks
    ├── exit_hooks            goodbye when the process ends, silence in a forked child
    └── frames, messages      one connection and its frames; what ranks tell about themselves
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from colltensor.control.failure_detector import ALL_RANKS, FailureDetector
from colltensor.control.frames import NO_LANE
from colltensor.control.messages import REMEDY, pair_key
from colltensor.control.tree import Describe, Pairs, Tree
from colltensor.errors import CollectiveError, GroupError, PeerLostError, RankError

if TYPE_CHECKING:
    from colltensor.rendezvous import Meeting

_LOSS_GRACE_S = 1.0


class Control:
    """The control plane of one group on one rank.

    One thread at a time may be in ``agree``, ``agree_and_gather``, ``start_pair``, ``finish_pair``,
    ``swap`` or ``allgather``; or several in ``agree_beside``, each with another peer or lane. Every
    other method may be called by any thread at any time. Deadlines are values of
    ``time.monotonic()``.

    Attributes:
        rank: This rank.
        world_size: The number of ranks.
        group_name: The name of the group.
        others: All other ranks.
    """

    def __init__(self, meeting: Meeting, deadline: float) -> None:
        """Connect to the neighbours in the tree.

        Every rank must call. The control plane owns ``meeting.listener`` from now on.

        Raises:
            PeerLostError: A rank died or gave up.
            CollectiveTimeoutError: A rank did not come before ``deadline``.
        """
        self.rank = meeting.rank
        self.world_size = meeting.world_size
        self.group_name = meeting.group_name
        self._alone = meeting.world_size == 1

        self._detector = FailureDetector(meeting)
        self._board = self._detector.connections
        self._pairs = Pairs(self._detector)
        self._working = _Working(self._detector)
        # See ``FailureDetector.begin``: what other ranks hear when they ask. Given when an
        # operation begins, and None at its end. A bound method, since every call makes it twice.
        self.position = self._detector.begin

        self.others = self._detector.everyone.ranks
        self._detector.operation = "creating the group"
        try:
            with self._working.until(deadline):
                self._tree = None if self._alone else Tree(self._detector, deadline)
        except BaseException:
            self.close()
            raise
        self._detector.operation = None

    @property
    def host_id(self) -> str:
        """This rank's host, by the name with which the ranks met."""
        return self._detector.meeting.host_ids[self.rank]

    @property
    def broken(self) -> CollectiveError | None:
        """The error that broke the group, None while it works."""
        failure = self._board.failure
        return failure.exception(self.rank) if failure else None

    def set_timeout(self, timeout_s: float) -> None:
        """Note how long calls wait from now on, for the messages of those that wait in vain."""
        self._detector.timeout_s = timeout_s

    def is_in_call(self) -> bool:
        """Return whether an operation, or a transfer in a thread of its own, is under way."""
        return self._detector.operation is not None or bool(self._detector.crossing)

    def agree(self, signature: bytes, describe: Describe, deadline: float, order: int = 0) -> bool:
        """Return once every rank has called with the same signature.

        Every rank must call, in the same order.

        Args:
            signature: At most 32 bytes; what the ranks must agree on.
            describe: Says in words what the signature stands for; called only where ranks differ.
            deadline: When to give up.
            order: Another number, of 64 bits, in which ranks may differ.

        Returns:
            Whether it is the same on all ranks, on all of them alike.

        Raises:
            MismatchError: The signatures differ; raised on every rank, and the group goes on.
            PeerLostError: A rank died or left.
            CollectiveTimeoutError: A rank did not call before ``deadline``.
            GroupError: A rank was interrupted, or the group is broken or closed.
        """
        tree = self._tree
        if tree is None:
            return True
        self._working.deadline = deadline
        with self._working:
            return tree.agree(signature, describe, deadline, order)

    def agree_and_gather(
        self, signature: bytes, payload: bytes, describe: Describe, deadline: float
    ) -> list[bytes]:
        """Agree, and return every rank's payload, by rank, in one exchange.

        Every rank must call, in the same order.

        Args:
            signature: As for ``agree``, with which it is no match: all ranks call this, or all the
                other.
            payload: Bytes of any number, for each rank its own.
            describe: As for ``agree``.
            deadline: When to give up.

        Raises:
            CollectiveError: As ``agree``.
        """
        tree = self._tree
        if tree is None:
            return [payload]
        self._working.deadline = deadline
        with self._working:
            return tree.agree_and_gather(signature, payload, describe, deadline)

    def allgather(self, payload: bytes, deadline: float) -> list[bytes]:
        """Return every rank's payload, by rank; sizes may differ.

        Every rank must call, in the same order.

        Raises:
            MismatchError: Another rank called something else. Raised on every rank, and the group
                goes on.
            CollectiveError: As ``agree``.
        """
        with self._working.until(deadline):
            return [payload] if self._tree is None else self._tree.allgather(payload, deadline)

    def start_pair(
        self,
        peer: int,
        signature: bytes,
        describe: Describe,
        deadline: float,
        lane: int = NO_LANE,
        bound: bool = False,
        order: int = 0,
    ) -> None:
        """Begin an agreement with one other rank, which must do so too.

        Does not wait for the other rank to call. Every start needs one ``finish_pair`` with the
        same peer, also after an agreement with another peer ended in ``MismatchError``. Several
        with one peer are finished in the order in which they were started.

        Args:
            peer: The other rank.
            signature: At most 32 bytes; what the two must agree on.
            describe: Says in words what the signature stands for; called only where they differ.
            deadline: When to give up.
            lane: The rank that sends, of an agreement on a transfer: it meets the others of its
                lane alone.
            bound: Whether this rank does nothing else with ``peer`` until then. Where both are
                bound to different lanes that is a mismatch.
            order: As for ``agree``.

        Raises:
            RankError: ``peer`` is no other rank of the group.
            CollectiveError: As ``agree``.
        """
        if not 0 <= peer < self.world_size or peer == self.rank:
            raise RankError(
                f"{self._detector.where}: peer must be another rank in range({self.world_size}), got {peer}: "
                "pass its rank within this group"
            )
        with self._working.until(deadline):
            self._pairs.start(peer, signature, deadline, b"", lane, bound, order)

    def finish_pair(
        self,
        peer: int,
        signature: bytes,
        describe: Describe,
        deadline: float,
        lane: int = NO_LANE,
        bound: bool = False,
        order: int = 0,
    ) -> bool:
        """Wait for the other rank and compare.

        The arguments are those of ``start_pair``, the result is that of ``agree``.

        Raises:
            CollectiveError: As ``agree``.
        """
        with self._working.until(deadline):
            return self._pairs.finish(peer, signature, describe, deadline, lane, bound, order)

    def agree_beside(
        self,
        peer: int,
        signature: bytes,
        describe: Describe,
        deadline: float,
        lane: int,
        order: int = 0,
    ) -> bool:
        """Agree with one other rank in a thread of a lane's own, while others do.

        Nothing else may be called meanwhile.

        Raises:
            CollectiveError: As ``agree``.
        """
        return self._pairs.agree_beside(
            peer, signature, describe, deadline, lane, self._working.until, order
        )

    def transfers(self, peer: int, lane: int) -> int:
        """Return how many agreements of a lane this rank has started with ``peer``."""
        return self._detector.pairs.get(pair_key(peer, lane), 0)

    def pairs(self) -> int:
        """Return how many agreements with single other ranks this rank has started."""
        return sum(list(self._detector.pairs.values()))

    def cross(self, source: int, destination: int, operation: str | None) -> None:
        """Note, for those who ask, a transfer that runs in a thread of its own; None at its end."""
        if operation is None:
            self._detector.crossing.pop((source, destination), None)
        else:
            self._detector.crossing[source, destination] = operation

    def check(self) -> None:
        """Read without waiting what the neighbours say, while a payload runs.

        Raises:
            PeerLostError: A rank died: it said so, or its connection ended more than a second ago.
            CollectiveError: What another rank has reported.
        """
        self._board.peek(_LOSS_GRACE_S)
        self._board.notify_wait()

    def diagnose(self, operation: str, cause: BaseException | None = None) -> CollectiveError:
        """Find out why a payload did not end, by asking every rank; takes about a second at most.

        Does not break the group: pass the result to ``fail``.

        Args:
            operation: The operation that failed, for the message.
            cause: What the provider raised; None after a timeout.

        Returns:
            What another rank reported; else ``PeerLostError`` naming the ranks that are gone; else
            ``CollectiveTimeoutError`` naming those that do not answer or have not arrived. Where
            nothing is wrong with any rank: ``GroupError`` with ``cause``, or
            ``CollectiveTimeoutError`` naming none.
        """
        try:
            self.check()
        except CollectiveError as error:
            if not self._board.usable:
                return self.broken or error
        return self._detector.diagnose(operation, cause)

    def queue(self, peers: Sequence[int] | None) -> int:
        """Note that this rank has queued a call on a device, which other ranks hear when they ask.

        Args:
            peers: The ranks of a point-to-point call; None for a call of all ranks.

        Returns:
            How many calls it has queued with all ranks, or with the first peer; 0 without one.
        """
        queued = self._detector.queued
        concerned = (ALL_RANKS,) if peers is None else peers
        for peer in concerned:
            queued[peer] = queued.get(peer, 0) + 1
        return queued[concerned[0]] if concerned else 0

    def diagnose_queued(
        self,
        operation: str,
        peers: Sequence[int] | None,
        number: int,
        cause: BaseException | None = None,
    ) -> CollectiveError:
        """Find out, as ``diagnose``, why a queued call did not end.

        The cause is a rank that is gone, or one that has not queued it yet.

        Args:
            operation: The operation, for the message.
            peers: As for ``queue``.
            number: What ``queue`` returned for the call.
            cause: What the provider raised; None after a timeout.
        """
        try:
            self.check()
        except CollectiveError as error:
            if not self._board.usable:
                return self.broken or error
        return self._detector.diagnose(operation, cause, self._detector.queuing(peers, number))

    def gone(self, operation: str, peers: Sequence[int] | None) -> PeerLostError | None:
        """Ask ``peers``, None for all ranks, whether they are there.

        Returns the error that names those that are gone. Does not break the group: pass the result
        to ``fail``. Takes a second at most.
        """
        return self._detector.gone(operation, peers)

    def inquire(self, peer: int, question: bytes) -> bytes | None:
        """Return what ``answer_with`` has on rank ``peer`` for a question.

        Returns None if it does not come within a second.
        """
        return self._detector.inquire(peer, question)

    def answer_with(self, kind: bytes, answer: Callable[[int, bytes], bytes]) -> None:
        """Have other ranks' questions answered that begin with ``kind``, one byte.

        ``answer`` runs in another thread. It gets the rank that asks and the question, and must not
        wait.
        """
        self._board.answers[kind] = answer

    def watch_waits(self, look: Callable[[], None]) -> None:
        """Have ``look`` called a few times a second while a call waits for other ranks.

        It must not wait or raise.
        """
        self._board.on_wait = look

    def swap(self, peer: int, payload: bytes, deadline: float) -> bytes:
        """Return the payload of rank ``peer``, which must call this with this rank as its peer.

        Raises:
            CollectiveError: As ``agree``.
        """
        with self._working.until(deadline):
            return self._pairs.swap(peer, payload, deadline)

    def fail(self, error: CollectiveError, raises: bool = True) -> None:
        """Break the group with ``error`` and notify every rank.

        So all ranks raise the same class, naming the same ranks. Does nothing if the group is
        broken already: the first error stays.

        Args:
            error: The error.
            raises: Whether the caller raises it. Otherwise the first call of this rank that finds
                the group broken does.
        """
        self._board.fail(error, raises)

    def close(self, waits: bool = True) -> None:
        """Say goodbye to the other ranks and close everything.

        A thread that waits here raises. May be repeated.

        Args:
            waits: Wait for that thread, a second at most. Not where it is this one, in a signal's
                handler.
        """
        self._board.close(waits)


class _Working:
    """The context of one thread's work on the links.

    Whatever ends it, other than an error of ours, breaks the group.

    It is a context, not ``try`` and ``finally``. So no signal's handler can raise between entering
    and the code that undoes it.

    Attributes:
        deadline: When a wait for another rank times out; set before it is entered.
    """

    __slots__ = ("_board", "_detector", "deadline")

    def __init__(self, detector: FailureDetector) -> None:
        self._detector = detector
        self._board = detector.connections
        self.deadline = 0.0

    def until(self, deadline: float) -> _Working:
        self.deadline = deadline
        return self

    def __enter__(self) -> None:
        self._board.enter(self.deadline)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            if error is not None and not isinstance(error, CollectiveError):
                detector = self._detector
                during = (
                    f" during {detector.operation} #{detector.sequence}"
                    if detector.operation
                    else ""
                )
                self._board.fail(
                    GroupError(
                        f"{detector.where}: this rank was interrupted by {error!r}{during}. {REMEDY}"
                    )
                )
        finally:
            self._board.leave()
