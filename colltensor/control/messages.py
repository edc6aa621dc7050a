"""What ranks tell each other about themselves and about failures, and what is concluded from it.

Everything here is plain data and pure functions; the connections are in ``links``.
"""

from __future__ import annotations

import enum
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from colltensor import errors
from colltensor.errors import CollectiveError, CollectiveTimeoutError, MismatchError, PeerLostError

_LANE = 1 << 16
REFUSED = "refused its part of "
"""The beginning of a rank's description of its call, if it refused that call.

The other ranks have made theirs.
"""
REMEDY = "The group is broken: destroy it and create it again"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a group is broken, in a form that travels.

    Attributes:
        error: Name of the exception's class in ``colltensor.errors``.
        message: Its message.
        ranks: The ranks it names.
        origin: The rank that found it out.
    """

    error: str
    message: str
    ranks: tuple[int, ...]
    origin: int

    @classmethod
    def of(cls, error: CollectiveError, origin: int) -> Failure:
        """Return the failure that ``error`` stands for."""
        ranks = tuple(getattr(error, "ranks", ()))
        return cls(errors.class_name(error), str(error), ranks, origin)

    def encode(self) -> bytes:
        """Return the failure as bytes."""
        return json.dumps([self.error, self.message, self.ranks, self.origin]).encode()

    @classmethod
    def decode(cls, data: bytes) -> Failure:
        """Return the failure that ``encode`` made these bytes of."""
        error, message, ranks, origin = json.loads(data)
        return cls(str(error), str(message), tuple(int(rank) for rank in ranks), int(origin))

    def exception(self, reader: int) -> CollectiveError:
        """Return a new exception that says this to rank ``reader``.

        Its class and ranks are the same on every rank.
        """
        message = (
            self.message
            if reader == self.origin
            else f"{self.message} (rank {self.origin} told rank {reader})"
        )
        return errors.rebuilt(self.error, message, self.ranks)


@dataclass(frozen=True, slots=True)
class Status:
    """What one rank does at the moment.

    Attributes:
        rank: The rank.
        sequence: Sequence number of its current or last operation.
        operation: Its current operation, None between operations.
        exchange: How many exchanges of all ranks it has entered.
        pairs: How many exchanges it has entered with single other ranks, by ``pair_key``.
        remaining_s: Seconds until its present wait times out, None when it does not wait.
        failure: Why the group is broken for it, or None.
        queued: How many calls it has queued on a device: with single other ranks, by rank, and with
            all under -1.
        awaits: The ranks on which its present wait depends, None when it does not wait.
    """

    rank: int
    sequence: int
    operation: str | None
    exchange: int
    pairs: Mapping[int, int]
    remaining_s: float | None = None
    failure: Failure | None = None
    queued: Mapping[int, int] = field(default_factory=dict)
    awaits: tuple[int, ...] | None = None

    def encode(self) -> bytes:
        """Return the status as bytes."""
        failure = self.failure.encode().decode() if self.failure else None
        pairs, queued = list(self.pairs.items()), list(self.queued.items())
        fields = [
            self.rank,
            self.sequence,
            self.operation,
            self.exchange,
            pairs,
            self.remaining_s,
            failure,
            queued,
            self.awaits,
        ]
        return json.dumps(fields).encode()

    @classmethod
    def decode(cls, data: bytes) -> Status:
        """Return the status that ``encode`` made these bytes of."""
        rank, sequence, operation, exchange, pairs, remaining_s, failure, queued, awaits = (
            json.loads(data)
        )
        known = Failure.decode(failure.encode()) if failure else None
        awaited = None if awaits is None else tuple(awaits)
        return cls(
            rank,
            sequence,
            operation,
            exchange,
            _counts(pairs),
            remaining_s,
            known,
            _counts(queued),
            awaited,
        )

    def waits_for(self, other: Status) -> bool:
        """Return whether this rank has entered an exchange that ``other`` has not."""
        return other.exchange < self.exchange or any(
            other.pairs.get(pair_key(self.rank, lane), 0) < count
            for (peer, lane), count in ((_ends(key), count) for key, count in self.pairs.items())
            if peer == other.rank
        )

    def place(self) -> str:
        """Return where the rank is, in words."""
        if self.operation is not None:
            return f"rank {self.rank} is in {self.operation} #{self.sequence}"
        queued = sum(self.queued.values())
        if queued:
            return (
                f"rank {self.rank} has not called yet: it has queued {queued} calls on its device"
            )
        if self.sequence:
            return f"rank {self.rank} has not called yet: its last operation was #{self.sequence}"
        return f"rank {self.rank} has not called yet: it has done no operation on the group"


def pair_key(peer: int, lane: int) -> int:
    """Return the key that counts the exchanges with a rank by lane.

    The lane is the rank that sends, or -1.
    """
    return peer + (lane + 1) * _LANE


def _ends(key: int) -> tuple[int, int]:
    return key % _LANE, key // _LANE - 1


def _counts(pairs: Sequence[Sequence[int]]) -> dict[int, int]:
    return {int(rank): int(count) for rank, count in pairs}


class Absence(enum.Enum):
    """Why a rank gave no status."""

    GONE = "has died or left: nobody answers at its address"
    SILENT = "does not answer: stopped, unreachable, or busy without releasing the interpreter lock"
    UNASKED = "cannot be asked, because the rank that asks can open no more files: raise their limit (ulimit -n)"


Answers = Mapping[int, "Status | Absence"]


def gone_ranks(answers: Answers) -> tuple[int, ...]:
    """Return the ranks that do not exist any more."""
    return tuple(rank for rank, answer in sorted(answers.items()) if answer is Absence.GONE)


def late_ranks(answers: Answers, is_late: Callable[[Status], bool]) -> tuple[int, ...]:
    """Return the ranks that are silent, or late by their own account."""
    return tuple(
        rank
        for rank, answer in sorted(answers.items())
        if answer in (Absence.SILENT, Absence.UNASKED)
        or (isinstance(answer, Status) and is_late(answer))
    )


def followed(late: Sequence[int], answers: Answers) -> tuple[int, ...]:
    """Return the ranks at the ends of the chains of waiting that begin at late ranks.

    Late ranks may wait for others themselves, these for others again, and so on.

    Args:
        late: The ranks that have not come.
        answers: What all ranks said.

    Returns:
        The ranks at the ends of the chains, which are silent, gone, or wait for nobody. None where
        all wait for each other, or for ranks that have come.
    """
    known, chain, ends = set(late), list(late), []

    while chain:
        rank = chain.pop()
        answer = answers.get(rank)
        if not isinstance(answer, Status) or answer.awaits is None:
            if answer is not None:  # None: the rank that asks
                ends.append(rank)
            continue

        for other in answer.awaits:
            said = answers.get(other)
            if (
                other not in known
                and said is not None
                and (not isinstance(said, Status) or answer.waits_for(said))
            ):
                known.add(other)
                chain.append(other)

    return tuple(sorted(ends))


def judge(
    where: str, answers: Answers, is_late: Callable[[Status], bool], others: Answers | None = None
) -> CollectiveError | None:
    """Return the error that the answers amount to.

    Returns None if every rank that was asked is where it should be.

    Args:
        where: The operation, rank and group, as the beginning of the message.
        answers: What each rank that was asked said.
        is_late: Whether a rank's status means that the others wait for it.
        others: What those said for whom these may wait, where that is known.
    """
    late = late_ranks(answers, is_late)
    answers = {**(others or {}), **answers} if late else answers
    ends = followed(late, answers)
    gone = gone_ranks({rank: answers[rank] for rank in ends} if others and ends else answers)
    if gone:
        facts = "; ".join(f"rank {rank} {Absence.GONE.value}" for rank in gone)
        return PeerLostError(f"{where}: {facts}. {REMEDY}", gone)
    return accuse(where, ends or late, answers) if late else None


def accuse(where: str, late: Sequence[int], answers: Answers) -> CollectiveTimeoutError:
    """Return the error for ranks that are late, with what they said."""
    facts = "; ".join(_fact(rank, answers[rank]) for rank in late)
    return CollectiveTimeoutError(
        f"{where}: not all ranks arrived before the timeout: {facts}. {REMEDY}, with a longer timeout_s "
        f"if {'these ranks' if len(late) > 1 else 'this rank'} may need longer",
        late,
    )


def _fact(rank: int, answer: Status | Absence) -> str:
    return answer.place() if isinstance(answer, Status) else f"rank {rank} {answer.value}"


def differing_ranks(signatures: Sequence[bytes]) -> tuple[int, ...]:
    """Return the indices that differ from the majority.

    Where more than half agree on nothing, they are those that differ from index 0.
    """
    [(common, votes)] = Counter(signatures).most_common(1)
    reference = common if 2 * votes > len(signatures) else signatures[0]
    return tuple(index for index, signature in enumerate(signatures) if signature != reference)


def mismatch(
    where: str,
    ranks: Sequence[int],
    signatures: Sequence[bytes],
    texts: Sequence[str],
    remedy: str | None = None,
) -> MismatchError:
    """Return the error for ranks that do not agree about a call.

    Args:
        where: The group and rank, as the beginning of the message.
        ranks: The ranks that take part, in ascending order.
        signatures: The signature of each.
        texts: The description of each.
        remedy: What to do, if it is not to make the same call.
    """
    refusing = [rank for rank, text in zip(ranks, texts, strict=True) if text.startswith(REFUSED)]
    if refusing:
        words = next(text for text in texts if text.startswith(REFUSED))
        return MismatchError(
            f"{where}: {_several(refusing)} {words}. No data was changed and the group goes on: call again on every "
            "rank",
            refusing,
        )

    odd = differing_ranks(signatures)
    [reference] = {signatures[i] for i in range(len(ranks)) if i not in odd}

    said: dict[tuple[bytes, str], list[int]] = {}
    for rank, signature, text in zip(ranks, signatures, texts, strict=True):
        said.setdefault((signature, text), []).append(rank)

    expected = "; ".join(
        f"{_several(who)}: {text}" for (sig, text), who in said.items() if sig == reference
    )
    came = "; ".join(
        f"{_several(who)}: {text}" for (sig, text), who in said.items() if sig != reference
    )

    return MismatchError(
        f"{where}: the ranks disagree about the call. Expected what {expected}. Got from {came}. No data was changed "
        f"and the group goes on: {remedy or 'make the same call, with the same dtypes and counts, on every rank'}",
        (ranks[i] for i in odd),
    )


def _several(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
