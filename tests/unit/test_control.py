"""The parts of the control plane: the tree, frames on a link, what is told and what is concluded."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator

import pytest

from colltensor import errors, net
from colltensor.control.failure_detector import FailureDetector
from colltensor.control.frames import (
    DIFFERS,
    EXCHANGE,
    FAILURE,
    GOODBYE,
    HEAD_NBYTES,
    PAIR,
    Link,
    pack,
    propagate_failure,
)
from colltensor.control.listener import ControlListener
from colltensor.control.messages import Absence, Failure, Status, differing_ranks, judge, mismatch
from colltensor.control.tree import neighbours, read_alike, read_same
from colltensor.errors import (
    CollectiveError,
    CollectiveTimeoutError,
    GroupError,
    MismatchError,
    PeerLostError,
)
from colltensor.rendezvous import Meeting


@pytest.fixture
def ends() -> Iterator[tuple[Link, socket.socket]]:
    ours, theirs = socket.socketpair()
    with theirs:
        link = Link(ours, peer=3)
        yield link, theirs
        link.close()


# The tree.


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 7, 8, 9, 64, 100])
def test_every_rank_is_the_child_of_its_parent_and_near_the_root(world_size: int) -> None:
    for rank in range(world_size):
        parent, children = neighbours(rank, world_size)
        assert all(
            rank < child < world_size and neighbours(child, world_size)[0] == rank
            for child in children
        )
        depth = 0
        while parent is not None:
            assert rank in neighbours(parent, world_size)[1]
            rank, depth = parent, depth + 1
            parent = neighbours(rank, world_size)[0]
        assert rank == 0
        assert depth <= (world_size - 1).bit_length()


# Frames.


def test_a_frame_that_equals_the_expected_one_is_agreement(
    ends: tuple[Link, socket.socket],
) -> None:
    link, other = ends
    frame = pack(EXCHANGE, 0, 7, b"signature")
    other.send(frame)
    assert read_same(link, frame, EXCHANGE)
    assert not link.inbox[EXCHANGE]


@pytest.mark.parametrize(
    "came", [pack(EXCHANGE, DIFFERS, 7, b"s"), pack(EXCHANGE, 0, 8, b"s"), pack(PAIR, 0, 7, b"s")]
)
def test_another_frame_goes_to_the_inbox(ends: tuple[Link, socket.socket], came: bytes) -> None:
    link, other = ends
    other.send(came)
    assert not read_same(link, pack(EXCHANGE, 0, 7, b"s"), EXCHANGE)
    assert [head for head, _ in link.inbox[came[0]]] == [came]


def test_agreement_that_was_given_up_is_none(ends: tuple[Link, socket.socket]) -> None:
    link, other = ends
    frame = pack(EXCHANGE, 0, 7, b"s")
    body = Failure("PeerLostError", "m" * 500, (1,), 1).encode()
    other.send(frame + pack(FAILURE, 0, 0, b"", len(body)) + body)
    assert not read_same(link, frame, EXCHANGE)
    assert link.failure == Failure.decode(body)


def test_a_frame_with_the_expected_head_is_agreement(ends: tuple[Link, socket.socket]) -> None:
    link, other = ends
    head = pack(EXCHANGE, 0, 7, b"s", 4)
    other.send(head + b"body")
    assert read_alike(link, head, len(head) + 4, EXCHANGE) == b"body"
    assert not link.inbox[EXCHANGE]


@pytest.mark.parametrize("nbytes", [3, 4])
def test_a_frame_of_another_head_or_size_goes_to_the_inbox(
    ends: tuple[Link, socket.socket], nbytes: int
) -> None:
    link, other = ends
    came = pack(EXCHANGE, 0, 7, b"t", nbytes)
    other.send(came + b"body"[:nbytes])
    assert read_alike(link, pack(EXCHANGE, 0, 7, b"s", 4), len(came) + 4, EXCHANGE) is None
    assert list(link.inbox[EXCHANGE]) == [(came, b"body"[:nbytes])]


def test_a_payload_that_was_given_up_is_no_agreement(ends: tuple[Link, socket.socket]) -> None:
    link, other = ends
    head = pack(EXCHANGE, 0, 7, b"s", 4)
    body = Failure("PeerLostError", "m", (1,), 1).encode()
    other.send(head + b"body" + pack(FAILURE, 0, 0, b"", len(body)) + body)
    assert read_alike(link, head, len(head) + 4, EXCHANGE) is None
    assert link.failure == Failure.decode(body)


@pytest.mark.parametrize("step", [1, 7, 47, 48, 49, 1000])
def test_frames_in_pieces(ends: tuple[Link, socket.socket], step: int) -> None:
    link, other = ends
    bodies = [b"", b"x", os.urandom(300), b""]
    stream = b"".join(pack(PAIR, 0, n, b"", len(body)) + body for n, body in enumerate(bodies))
    stream += pack(GOODBYE, 0, 0, b"")
    for start in range(0, len(stream), step):
        other.send(stream[start : start + step])
        link.pump()
    assert list(link.inbox[PAIR]) == [
        (pack(PAIR, 0, n, b"", len(b)), b) for n, b in enumerate(bodies)
    ]
    assert link.goodbye
    assert link.clean
    assert link.ended_at is None
    other.close()
    link.pump()
    assert link.ended_at is not None


def test_a_frame_of_no_known_kind_ends_the_link(ends: tuple[Link, socket.socket]) -> None:
    link, other = ends
    other.send(pack(99, 0, 0, b""))
    link.pump()
    assert link.ended_at is not None


def test_sending_never_waits(ends: tuple[Link, socket.socket]) -> None:
    link, other = ends
    sent = [link.send(b"x" * 100_000) for _ in range(100)]
    assert sent[0] > 0
    assert sent[-1] == 0
    other.close()
    assert link.send(b"the end is for the reader to propagate_failure") > 0


def test_counters_wrap() -> None:
    assert pack(EXCHANGE, 0, 2**32 + 5, b"s") == pack(EXCHANGE, 0, 5, b"s")
    assert len(pack(EXCHANGE, 0, 0, b"s" * 32)) == HEAD_NBYTES


def test_a_signature_is_never_cut_short() -> None:
    with pytest.raises(ValueError, match=r"\b32\b.*\b33\b"):
        pack(EXCHANGE, 0, 0, b"s" * 33)


# Failures and their journey.


@pytest.mark.parametrize(
    "error",
    [
        PeerLostError("gone", (1, 5)),
        CollectiveTimeoutError("late", (2,)),
        GroupError("interrupted"),
        errors.BackendUnavailableError("not here"),
        errors.OptionError("wrong"),
    ],
)
def test_a_failure_arrives_as_the_same_class_with_the_same_ranks(error: CollectiveError) -> None:
    failure = Failure.decode(Failure.of(error, origin=2).encode())
    here, there = failure.exception(2), failure.exception(0)
    assert type(here) is type(there) is type(error)
    assert (
        getattr(here, "ranks", None)
        == getattr(there, "ranks", None)
        == getattr(error, "ranks", None)
    )
    assert str(here) == str(error)
    assert str(there) == f"{error} (rank 2 told rank 0)"


@pytest.mark.parametrize("name", ["Iterable", "annotations", "NoSuchError"])
def test_a_failure_of_no_class_of_ours_is_a_group_error(name: str) -> None:
    assert type(Failure(name, "m", (), 1).exception(0)) is GroupError


class SlowToHear:
    """A rank that another one tells of a failure while it has other things to do."""

    def __init__(self) -> None:
        self.heard: list[Failure] = []

    def status(self) -> Status:
        raise AssertionError("nobody asks")

    def arrive(self, link: Link) -> None:
        raise AssertionError("nobody connects")

    def hear(self, failure: Failure) -> None:
        time.sleep(0.1)
        self.heard.append(failure)


def test_who_has_told_a_failure_knows_that_it_was_heard() -> None:
    """It may leave then. Whoever misses it but has not heard would say that it died as well."""
    with net.listen("127.0.0.1") as listener:
        address = listener.getsockname()[:2]
        meeting = Meeting(0, 2, "g", b"12345678", b"s" * 32, (address,) * 2, ("h",) * 2, listener)
        host, failure = SlowToHear(), Failure("PeerLostError", "m", (1,), 0)
        listener = ControlListener(meeting, host)
        try:
            propagate_failure(meeting, 0, failure, time.monotonic() + 5.0)
            assert host.heard == [failure]
        finally:
            listener.close()


def test_a_rank_that_told_a_failure_before_it_went_is_not_the_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 1 waited for rank 2 in vain and has ended; rank 0, which waits for it, asks who knows why."""
    told = Failure("CollectiveTimeoutError", "late", (2,), 1)

    def ask(meeting: Meeting, peer: int, deadline: float) -> Status:
        if peer == 1:
            raise ConnectionRefusedError
        return Status(peer, 0, None, 0, {}, failure=told)

    monkeypatch.setattr("colltensor.control.frames.ask", ask)
    with net.listen("127.0.0.1") as listener:
        address = listener.getsockname()[:2]
        meeting = Meeting(0, 3, "g", b"12345678", b"s" * 32, (address,) * 3, ("h",) * 3, listener)
        detector = FailureDetector(meeting)
        try:
            with pytest.raises(CollectiveTimeoutError) as caught:
                detector.overdue(detector.partner(1, -1), lambda: False)
            assert caught.value.ranks == (2,)
        finally:
            detector.connections.close()


def test_a_failure_of_a_class_of_somebody_else_travels_as_its_nearest_relative_of_ours() -> None:
    class NetworkDownError(PeerLostError):
        pass

    found = Failure.of(NetworkDownError("down", (4,)), origin=0).exception(1)
    assert type(found) is PeerLostError
    assert found.ranks == (4,)


def test_a_status_survives_the_journey() -> None:
    failure = Failure("PeerLostError", 'it said "no"', (3,), 1)
    waiting = Status(3, 1, "recv", 0, {1: 2}, 0.5, None, {-1: 4}, (1, 2))
    broken = Status(2, 9, "send(dst_rank=0)", 7, {0: 3, 5: 1}, -0.25, failure)
    for status in (Status(1, 0, None, 0, {}), waiting, broken):
        assert Status.decode(status.encode()) == status


def test_where_a_rank_is() -> None:
    for status, place in (
        (Status(2, 4, "send(dst_rank=0)", 4, {}), r"rank 2 .*send\(dst_rank=0\) #4"),
        (Status(1, 3, None, 3, {}), r"rank 1 .*#3"),
        (Status(1, 0, None, 0, {}), r"rank 1 [^#]*"),
    ):
        assert re.fullmatch(place, status.place())


# Conclusions.


def test_the_gone_are_named_before_the_late() -> None:
    answers = {
        1: Absence.SILENT,
        2: Absence.GONE,
        3: Status(3, 0, None, 0, {}),
        4: Status(4, 0, None, 9, {}),
    }
    found = judge("allreduce", answers, lambda status: status.exchange < 9)
    assert isinstance(found, PeerLostError)
    assert found.ranks == (2,)
    del answers[2]
    found = judge("allreduce", answers, lambda status: status.exchange < 9)
    assert isinstance(found, CollectiveTimeoutError)
    assert found.ranks == (1, 3)
    assert re.search(rf"rank 1 .*; {re.escape(answers[3].place())}", str(found))
    del answers[1], answers[3]
    assert judge("allreduce", answers, lambda status: status.exchange < 9) is None


def waiting(rank: int, awaits: int, answered: int) -> Status:
    """A rank that has entered more exchanges with another than that one with it."""
    return Status(rank, 0, "recv", 0, {awaits: 1 + answered}, 0.5, awaits=(awaits,))


def test_who_waits_for_another_is_not_to_blame() -> None:
    def found(*others: Status | Absence) -> tuple[type[CollectiveError] | None, tuple[int, ...]]:
        answers = dict(enumerate(others, start=1))
        error = judge("recv", {1: others[0]}, lambda status: True, answers)
        return type(error), getattr(error, "ranks", ())

    idle = Status(3, 0, None, 0, {})
    assert found(waiting(1, 2, 0), waiting(2, 3, 0), idle) == (CollectiveTimeoutError, (3,))
    assert found(waiting(1, 2, 0), waiting(2, 3, 0), Absence.SILENT) == (
        CollectiveTimeoutError,
        (3,),
    )
    assert found(waiting(1, 2, 0), waiting(2, 3, 0), Absence.GONE) == (PeerLostError, (3,))
    assert found(waiting(1, 2, 0), waiting(2, 1, 0), idle) == (CollectiveTimeoutError, (1,)), (
        "they wait for each other"
    )
    assert found(waiting(1, 0, 0), idle, idle) == (CollectiveTimeoutError, (1,)), (
        "and for the one that asks"
    )
    assert found(waiting(1, 2, 0), waiting(2, 3, 0), Status(3, 0, "recv", 0, {2: 1})) == (
        CollectiveTimeoutError,
        (1,),
    ), "rank 3 has come"


@pytest.mark.parametrize(
    ("signatures", "named"),
    [
        ("AB", (1,)), ("AAB", (2,)), ("BAA", (0,)), ("ABC", (1, 2)), ("ABBA", (1, 2)), ("ABBC", (1, 2, 3)),
        ("BAAAC", (0, 4)), ("AABB", (2, 3)),
    ],
)  # fmt: skip
def test_who_differs(signatures: str, named: tuple[int, ...]) -> None:
    assert differing_ranks([letter.encode() for letter in signatures]) == named


def test_a_mismatch_says_what_both_sides_call() -> None:
    said = ["allreduce, float32[4]", "allreduce, int32[4]", "allreduce, float32[4]"]
    error = mismatch("group 'g', rank 1 of 3", range(3), [b"A", b"B", b"A"], said)
    assert isinstance(error, MismatchError)
    assert error.ranks == (1,)
    assert "ranks 0, 2: allreduce, float32[4]" in str(error)
    assert "rank 1: allreduce, int32[4]" in str(error)
