"""The control plane between real processes: agreement, disagreement, and every way in which a rank can go missing."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from control_rank import SECRET, Outcome, Rank

from colltensor import net
from colltensor.control.frames import ASK

pytestmark = pytest.mark.slow

SOON_S = 2.0
"""Within what a failure must be known everywhere: about a second, and some patience for a busy machine."""


class Pool:
    """Processes that are used again by the next test, unless a test has spoilt them."""

    def __init__(self) -> None:
        self.idle: list[Rank] = []

    def take(self, count: int) -> list[Rank]:
        while len(self.idle) < count:
            self.idle.append(Rank())
        taken, self.idle = self.idle[:count], self.idle[count:]
        return taken

    def give_back(self, rank: Rank) -> None:
        if rank.process.poll() is None and not rank.stopped and not rank.pipe.poll():
            self.idle.append(rank)
        else:
            rank.end()
            self.idle.append(Rank())  # starts while the next test runs


class Group:
    """A group of ranks in processes of their own."""

    def __init__(self, pool: Pool, world_size: int) -> None:
        self.pool = pool
        self.ranks = pool.take(world_size)
        self.busy: set[int] = set()
        self.generation = os.urandom(8)
        self.addresses = tuple(rank.do("listen") for rank in self.ranks)

    def join(self, timeout_s: float = 10.0, ranks: list[int] | None = None) -> None:
        for rank in self.all() if ranks is None else ranks:
            self.start(rank, "join", rank, self.addresses, self.generation, timeout_s)

    def all(self, *but: int) -> list[int]:
        return [rank for rank in range(len(self.ranks)) if rank not in but]

    def start(self, rank: int, command: str, *args: Any) -> None:
        assert rank not in self.busy
        self.busy.add(rank)
        self.ranks[rank].start(command, *args)

    def result(self, rank: int, limit_s: float = 20.0) -> Outcome:
        outcome = self.ranks[rank].result(limit_s)
        self.busy.discard(rank)
        return outcome

    def results(self, ranks: list[int] | None = None) -> dict[int, Outcome]:
        return {rank: self.result(rank) for rank in (self.all() if ranks is None else ranks)}

    def values(self, ranks: list[int] | None = None) -> list[Any]:
        outcomes = self.results(ranks)
        wrong = {rank: f"{o.error}: {o.message}" for rank, o in outcomes.items() if o.error}
        assert not wrong, wrong
        return [outcome.value for outcome in outcomes.values()]

    def do(self, rank: int, command: str, *args: Any) -> Any:
        self.start(rank, command, *args)
        return self.values([rank])[0]

    def everywhere(self, command: str, *args: Any) -> list[Any]:
        for rank in self.all():
            self.start(rank, command, *args)
        return self.values()

    def agree(self) -> None:
        self.everywhere("agree", b"all well", "all well", 10.0)

    def wait(self, ranks: list[int], timeout_s: float = 10.0) -> None:
        """Let some ranks wait for the others."""
        for rank in ranks:
            self.start(rank, "agree", b"wait", "wait", timeout_s)
        time.sleep(0.2)

    def end(self) -> None:
        for number, rank in enumerate(self.ranks):
            if rank.process.poll() is None and not rank.stopped and number not in self.busy:
                rank.start("close")
                rank.result()
            if number in self.busy:
                rank.end()
            self.pool.give_back(rank)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    for rank in pool.idle:
        rank.end()


@pytest.fixture
def group(request: pytest.FixtureRequest, pool: Pool) -> Iterator[Group]:
    group = Group(pool, request.param)
    group.join()
    group.values()
    yield group
    group.end()


def of(*sizes: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("group", sizes, indirect=True, ids=lambda size: f"{size}-ranks")


def assert_named(outcomes: dict[int, Outcome], error: str, ranks: tuple[int, ...]) -> None:
    found = {rank: (outcome.error, outcome.ranks) for rank, outcome in outcomes.items()}
    assert found == dict.fromkeys(outcomes, (error, ranks)), [
        outcome.message for outcome in outcomes.values()
    ]


def assert_soon(outcomes: dict[int, Outcome], since: float, limit_s: float = SOON_S) -> None:
    assert max(outcome.at for outcome in outcomes.values()) - since < limit_s


# Agreement.


@of(1, 2, 3, 5, 8)
def test_agree_and_allgather(group: Group) -> None:
    for _ in range(3):
        group.agree()
    for rank in group.all():
        group.start(rank, "allgather", b"ab" * rank, 10.0)
    expected = [b"ab" * rank for rank in group.all()]
    assert group.values() == [expected] * len(group.ranks)
    group.agree()


@of(2, 3, 5)
def test_allgather_of_more_than_a_socket_holds(group: Group) -> None:
    for rank in group.all():
        group.start(rank, "allgather_sizes", 6_000_000 + rank, 20.0)
    assert group.values() == [[(6_000_000 + rank, rank) for rank in group.all()]] * len(group.ranks)
    group.agree()


@of(1, 2, 3, 5, 8)
def test_payloads_travel_with_an_agreement(group: Group) -> None:
    for nbytes in (0, 7, 1000, 300_000):
        for rank in group.all():
            group.start(rank, "agree_and_gather", b"same", "same", bytes([rank]) * nbytes, 10.0)
        assert group.values() == [[bytes([rank]) * nbytes for rank in group.all()]] * len(
            group.ranks
        )
    group.agree()


@of(2, 5)
def test_nobody_returns_before_all_have_arrived(group: Group) -> None:
    group.wait(group.all(1))
    arrived = time.monotonic()
    group.start(1, "agree", b"wait", "wait", 10.0)
    outcomes = group.results()
    assert not any(outcome.error for outcome in outcomes.values())
    assert min(outcome.at for outcome in outcomes.values()) >= arrived


@of(2, 3, 6)
def test_ranks_that_run_ahead_of_each_other(group: Group) -> None:
    assert group.everywhere("skewed", 60, 7, 10.0) == [60] * len(group.ranks)
    group.agree()


# Disagreement.


@pytest.mark.parametrize(
    ("group", "signatures", "named"),
    [
        (2, "AB", (1,)),
        (3, "BAA", (0,)),
        (3, "ABC", (1, 2)),
        (4, "AABA", (2,)),
        (4, "BBAA", (2, 3)),
        (5, "ABBCC", (1, 2, 3, 4)),
        (5, "CAABA", (0, 3)),
        (8, "AAAAAAAB", (7,)),
        (8, "ABAACADA", (1, 4, 6)),
    ],
    indirect=["group"],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mismatch_names_the_same_ranks_everywhere_and_the_group_goes_on(
    group: Group, signatures: str, named: tuple[int, ...]
) -> None:
    for _ in range(2):
        for rank, letter in enumerate(signatures):
            group.start(rank, "agree", letter.encode(), f"call-{letter}-{rank}", 10.0)
        outcomes = group.results()
        assert_named(outcomes, "MismatchError", named)
        for outcome in outcomes.values():
            for rank in named:
                assert f"rank {rank}: call-{signatures[rank]}-{rank}" in outcome.message
        group.agree()


@of(2, 3, 4)
@pytest.mark.parametrize("command", ["agree", "agree_and_gather"])
@pytest.mark.parametrize("odd", [0, 1])
def test_no_payload_is_taken_from_ranks_that_differ(group: Group, odd: int, command: str) -> None:
    for rank in group.all(odd):
        group.start(rank, "agree_and_gather", b"even", "even", b"x" * 5000, 10.0)
    group.start(
        odd, command, b"odd", "odd", *([b"y" * 70] if command == "agree_and_gather" else []), 10.0
    )
    outcomes = group.results()
    assert_named(outcomes, "MismatchError", (1,) if len(group.ranks) == 2 else (odd,))
    assert all(
        f"rank {odd}: odd" in o.message or f"rank {1 - odd}: even" in o.message
        for o in outcomes.values()
    )
    group.agree()


@of(2, 4)
@pytest.mark.parametrize("odd", [0, 1])
def test_mismatch_of_an_agreement_and_an_allgather(group: Group, odd: int) -> None:
    group.do(odd, "position", 3, "allgather_object")
    for rank in group.all(odd):
        group.start(rank, "agree", b"agree", "allreduce", 10.0)
    group.start(odd, "allgather", b"x" * 500_000, 10.0)
    outcomes = group.results()
    assert_named(outcomes, "MismatchError", (1,) if len(group.ranks) == 2 else (odd,))
    assert all(
        "allgather_object #3" in o.message and "allreduce" in o.message for o in outcomes.values()
    )
    group.agree()


# Two ranks.


@of(2, 3, 6)
def test_pairs_around_a_ring_started_from_both_sides_at_once(group: Group) -> None:
    group.everywhere("ring", 20, 10.0)
    group.agree()


@of(5)
def test_every_pair(group: Group) -> None:
    for low in group.all():
        for high in range(low + 1, len(group.ranks)):
            for rank, peer in ((low, high), (high, low)):
                group.start(rank, "pair", peer, b"pair", "pair", 10.0, 3)
            group.values([low, high])
    group.agree()


@of(4)
@pytest.mark.parametrize("low", [0, 1])
def test_mismatch_of_a_pair(group: Group, low: int) -> None:
    for _ in range(2):
        group.start(low, "pair", 3, b"send", "send(dst_rank=3) of float32[4]", 10.0)
        group.start(3, "pair", low, b"recv", "recv(src_rank=0) of float32[8]", 10.0)
        outcomes = group.results([low, 3])
        assert_named(outcomes, "MismatchError", (3,))
        assert all(
            "float32[4]" in o.message and "float32[8]" in o.message for o in outcomes.values()
        )
    group.start(low, "pair", 3, b"same", "", 10.0)
    group.start(3, "pair", low, b"same", "", 10.0)
    group.values([low, 3])
    group.agree()


@of(3)
@pytest.mark.parametrize("peer", [-1, 1, 3])
def test_a_peer_that_is_no_other_rank(group: Group, peer: int) -> None:
    group.start(1, "pair", peer, b"pair", "pair", 10.0)
    outcome = group.result(1)
    assert outcome.error == "RankError"
    assert re.search(rf"peer .*{peer}\b", outcome.message)
    group.agree()


# Death.


@pytest.mark.parametrize(
    ("group", "victim"), [(2, 0), (2, 1), (5, 4), *((8, r) for r in range(8))], indirect=["group"]
)
def test_a_killed_rank_is_named_everywhere(group: Group, victim: int) -> None:
    others = group.all(victim)
    group.wait(others)
    killed = time.monotonic()
    group.ranks[victim].signal(signal.SIGKILL)
    outcomes = group.results(others)
    assert_named(outcomes, "PeerLostError", (victim,))
    assert_soon(outcomes, killed)
    assert all(f"rank {victim} " in outcome.message for outcome in outcomes.values())


@of(8)
def test_a_killed_rank_is_named_although_a_rank_between_is_not_waiting(group: Group) -> None:
    waiting = [0, 3, 4, 5, 6, 7]
    group.wait(waiting)
    killed = time.monotonic()
    group.ranks[1].signal(signal.SIGKILL)
    outcomes = group.results(waiting)
    assert_named(outcomes, "PeerLostError", (1,))
    assert_soon(outcomes, killed)
    # the news travels by itself
    while group.do(2, "broken") is None and time.monotonic() < killed + 2:
        time.sleep(0.01)
    assert group.do(2, "broken") == ("PeerLostError", (1,))
    for error in ("PeerLostError", "GroupError"):
        group.start(2, "agree", b"wait", "wait", 10.0)
        outcome = group.result(2)
        assert (outcome.error, outcome.seconds < 0.5) == (error, True)


@of(8)
@pytest.mark.parametrize("victims", [(1, 6), (2, 3), (0, 7)], ids=str)
def test_ranks_killed_together_are_named_together(group: Group, victims: tuple[int, int]) -> None:
    others = group.all(*victims)
    group.wait(others)
    for victim in victims:
        group.ranks[victim].process.send_signal(signal.SIGKILL)
    assert_named(group.results(others), "PeerLostError", victims)


@of(4)
@pytest.mark.parametrize("acquainted", [True, False], ids=["linked", "no-link"])
@pytest.mark.parametrize(("waiter", "victim"), [(1, 2), (2, 1)])
def test_a_rank_killed_before_its_half_of_a_pair(
    group: Group, acquainted: bool, waiter: int, victim: int
) -> None:
    if acquainted:
        group.everywhere("ring", 1, 10.0)
    group.start(waiter, "pair", victim, b"pair", "pair", 10.0)
    time.sleep(0.2)
    killed = time.monotonic()
    group.ranks[victim].signal(signal.SIGKILL)
    outcomes = group.results([waiter])
    assert_named(outcomes, "PeerLostError", (victim,))
    assert_soon(outcomes, killed)


@of(4)
def test_a_rank_killed_during_a_payload(group: Group) -> None:
    for rank in (0, 1, 2):
        group.start(rank, "watch", 10.0)
    time.sleep(0.2)
    killed = time.monotonic()
    group.ranks[3].signal(signal.SIGKILL)
    outcomes = group.results([0, 1, 2])
    assert_named(outcomes, "PeerLostError", (3,))
    assert_soon(outcomes, killed, 1.0 + SOON_S)


# Lateness.


@pytest.mark.parametrize(("group", "stopped"), [(2, 0), (2, 1), (5, 0), (8, 4)], indirect=["group"])
def test_a_stopped_rank_is_named_at_the_timeout_and_hears_of_it(group: Group, stopped: int) -> None:
    others = group.all(stopped)
    group.ranks[stopped].signal(signal.SIGSTOP)
    start = time.monotonic()
    group.wait(others, 0.7)
    outcomes = group.results(others)
    assert_named(outcomes, "CollectiveTimeoutError", (stopped,))
    assert_soon(outcomes, start, 0.7 + 1.0 + SOON_S)
    # nothing is known of its calls
    assert all(re.search(rf"rank {stopped} [^#;.]*[;.]", o.message) for o in outcomes.values())
    group.ranks[stopped].signal(signal.SIGCONT)
    group.start(stopped, "agree", b"wait", "wait", 10.0)
    outcomes = group.results([stopped])
    assert_named(outcomes, "CollectiveTimeoutError", (stopped,))
    assert outcomes[stopped].seconds < 1.0


@pytest.mark.parametrize(("group", "late"), [(2, 0), (2, 1), (4, 0), (8, 6)], indirect=["group"])
def test_a_late_rank_is_named_with_what_it_does_and_gets_the_same_error(
    group: Group, late: int
) -> None:
    others = group.all(late)
    for rank in group.all():
        group.do(rank, "position", 3, None)
    start = time.monotonic()
    group.wait(others, 0.7)
    outcomes = group.results(others)
    assert_named(outcomes, "CollectiveTimeoutError", (late,))
    assert_soon(outcomes, start, 0.7 + SOON_S)
    assert all(re.search(rf"rank {late} [^;.]*#3\b", o.message) for o in outcomes.values())
    group.start(late, "agree", b"wait", "wait", 10.0)
    outcomes = group.results([late])
    assert_named(outcomes, "CollectiveTimeoutError", (late,))
    assert outcomes[late].seconds < 0.5


@of(4)
def test_several_late_ranks_and_different_timeouts(group: Group) -> None:
    group.do(1, "position", 4, "send(dst_rank=0)")
    group.start(0, "agree", b"wait", "wait", 8.0)
    group.start(2, "agree", b"wait", "wait", 0.5)
    outcomes = group.results([0, 2])
    assert_named(outcomes, "CollectiveTimeoutError", (1, 3))
    assert all(
        re.search(r"rank 1 .*send\(dst_rank=0\) #4", outcome.message)
        for outcome in outcomes.values()
    )
    assert outcomes[0].seconds < 0.5 + 2 * SOON_S


@of(3)
def test_a_late_rank_gets_the_same_error_when_the_others_are_gone(group: Group) -> None:
    group.wait([0, 1], 0.5)
    assert_named(group.results([0, 1]), "CollectiveTimeoutError", (2,))
    for rank in (0, 1):
        group.start(rank, "leave_process")
        group.ranks[rank].process.wait(5)
    outcomes = {}
    group.start(2, "agree", b"wait", "wait", 5.0)
    outcomes[2] = group.result(2)
    assert_named(outcomes, "CollectiveTimeoutError", (2,))


@of(3)
@pytest.mark.parametrize(("waiter", "late"), [(1, 2), (2, 1)])
def test_a_late_half_of_a_pair(group: Group, waiter: int, late: int) -> None:
    group.start(waiter, "pair", late, b"pair", "pair", 0.7)
    outcomes = group.results([waiter])
    assert_named(outcomes, "CollectiveTimeoutError", (late,))
    assert re.search(rf"rank {late} [^;.]*[;.]", outcomes[waiter].message)
    for rank in group.all(waiter):
        group.start(rank, "agree", b"wait", "wait", 5.0)
    outcomes = group.results(group.all(waiter))
    assert_named(outcomes, "CollectiveTimeoutError", (late,))


# Interruption, failures of the payload, the end.


@pytest.mark.parametrize(("group", "interrupted"), [(2, 0), (2, 1), (5, 3)], indirect=["group"])
def test_an_interrupt_ends_the_wait_and_is_told(group: Group, interrupted: int) -> None:
    missing = 1 if interrupted == 0 else 0
    waiting = group.all(missing)
    group.wait(waiting)
    sent = time.monotonic()
    group.ranks[interrupted].signal(signal.SIGINT)
    outcomes = group.results(waiting)
    assert_soon(outcomes, sent, 1.0)
    assert outcomes.pop(interrupted).error == "KeyboardInterrupt"
    group.start(missing, "agree", b"wait", "wait", 5.0)
    outcomes[missing] = group.result(missing)
    assert {outcome.error for outcome in outcomes.values()} == {"GroupError"}
    assert all(
        f"rank {interrupted} of" in o.message and "KeyboardInterrupt" in o.message
        for o in outcomes.values()
    )


@of(5)
def test_a_failure_between_exchanges_is_raised_by_the_next_one(group: Group) -> None:
    group.do(4, "fail", "PeerLostError", "lost-2", (2,))
    time.sleep(0.3)
    for rank in group.all(4):
        group.start(rank, "agree", b"next", "next", 10.0)
    outcomes = group.results(group.all(4))
    assert_named(outcomes, "PeerLostError", (2,))
    assert max(outcome.seconds for outcome in outcomes.values()) < 0.5
    group.start(4, "agree", b"next", "next", 10.0)
    outcome = group.result(4)
    assert outcome.error == "GroupError"
    assert "lost-2" in outcome.message


@of(5)
def test_a_failure_is_seen_during_a_payload(group: Group) -> None:
    for rank in group.all(3):
        group.start(rank, "watch", 10.0)
    time.sleep(0.2)
    start = time.monotonic()
    group.do(3, "fail", "CollectiveTimeoutError", "too late", (0, 3))
    outcomes = group.results(group.all(3))
    assert_named(outcomes, "CollectiveTimeoutError", (0, 3))
    assert_soon(outcomes, start, 1.0)


@pytest.mark.parametrize(("group", "leaver"), [(2, 0), (2, 1), (5, 2)], indirect=["group"])
@pytest.mark.parametrize("how", ["close", "leave_process"])
def test_a_rank_that_leaves_while_others_wait(group: Group, leaver: int, how: str) -> None:
    others = group.all(leaver)
    group.wait(others)
    start = time.monotonic()
    group.start(leaver, how)
    outcomes = group.results(others)
    assert_named(outcomes, "PeerLostError", (leaver,))
    assert_soon(outcomes, start)
    assert all(f"rank {leaver} " in outcome.message for outcome in outcomes.values())
    if how == "close":
        group.result(leaver)
        group.start(leaver, "agree", b"wait", "wait", 1.0)
        assert group.result(leaver).error == "GroupError"


@of(3)
def test_leaving_in_good_order_disturbs_no_payload_and_no_pair(group: Group) -> None:
    for rank in (0, 1):
        group.start(rank, "watch", 2.0)
    group.start(2, "leave_process")
    group.values([0, 1])
    for rank, peer in ((0, 1), (1, 0)):
        group.start(rank, "pair", peer, b"pair", "pair", 5.0)
    group.values([0, 1])


@of(3)
def test_a_process_that_just_ends_is_a_death(group: Group) -> None:
    for rank in (0, 1):
        group.start(rank, "watch", 6.0)
    group.start(2, "exit_at_once", 0)
    outcomes = group.results([0, 1])
    assert_named(outcomes, "PeerLostError", (2,))
    assert min(outcome.seconds for outcome in outcomes.values()) > 0.9


@of(2, 3)
def test_close_while_another_thread_waits(group: Group) -> None:
    error, seconds = group.do(0, "close_while_waiting", 10.0)
    assert error == "GroupError"
    assert seconds < 1.0


@of(2)
def test_two_threads_at_once(group: Group) -> None:
    group.start(0, "two_threads", 10.0)
    time.sleep(0.5)
    group.do(1, "agree", b"first", "first", 10.0)
    assert group.values([0]) == ["GroupError"]
    group.agree()


# Forks, strangers, leaks.


@of(3)
def test_a_forked_child_is_told_so_and_disturbs_nobody(group: Group) -> None:
    for rank in (0, 1):
        said = group.do(rank, "in_child", 0.0)
        assert said.startswith("GroupError")
        assert "fork" in said
    group.agree()
    group.everywhere("ring", 2, 10.0)


@of(3)
def test_a_killed_rank_is_missed_although_its_forked_child_lives(group: Group) -> None:
    group.do(2, "in_child", 5.0)
    group.wait([0, 1])
    killed = time.monotonic()
    group.ranks[2].signal(signal.SIGKILL)
    outcomes = group.results([0, 1])
    assert_named(outcomes, "PeerLostError", (2,))
    assert_soon(outcomes, killed)


@of(3)
def test_strangers_at_the_listener(group: Group) -> None:
    held = []
    for address in group.addresses:
        for noise in (b"", b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 5000):
            sock = socket.create_connection(address)
            sock.sendall(noise)
            held.append(sock)
        deadline = time.monotonic() + 2
        context = b"tested\0" + group.generation
        for secret, named in ((b"wrong", context), (SECRET, b"tested\0another!")):
            with pytest.raises(ConnectionError), net.dial(address, deadline) as sock:
                net.prove(sock, secret, named, deadline)
        with net.dial(address, deadline) as sock:
            net.prove(sock, SECRET, context, deadline)
            net.send_frame(sock, ASK + 50, b"what is this", deadline)
            with pytest.raises(ConnectionError):
                net.recv_frame(sock, deadline)
    group.everywhere("ring", 2, 5.0)
    group.agree()
    group.wait([0, 1], 0.5)
    assert_named(group.results([0, 1]), "CollectiveTimeoutError", (2,))
    for sock in held:
        sock.close()


@of(3)
def test_thousands_of_exchanges_leak_nothing(group: Group) -> None:
    group.everywhere("ring", 1, 10.0)
    group.agree()
    before = group.everywhere("census")
    group.everywhere("agree", b"again", "again", 10.0, 3000)
    group.everywhere("ring", 500, 10.0)
    assert group.everywhere("census") == before


@pytest.mark.parametrize("world_size", [1, 3])
def test_groups_made_and_closed_leak_nothing(pool: Pool, world_size: int) -> None:
    counts = []
    for _ in range(6):
        group = Group(pool, world_size)
        group.join()
        group.values()
        group.agree()
        if world_size > 1:
            group.everywhere("ring", 1, 10.0)
        group.everywhere("close")
        counts.append(group.everywhere("census", 1))
        group.end()
    assert counts[1:] == counts[:-1]


# Making the group, and asking.


def test_a_rank_that_does_not_come_when_the_group_is_made(pool: Pool) -> None:
    group = Group(pool, 4)
    group.join(0.7, [0, 1, 3])
    outcomes = group.results([0, 1, 3])
    assert_named(outcomes, "CollectiveTimeoutError", (2,))
    group.end()


def test_a_rank_that_dies_before_the_group_is_made(pool: Pool) -> None:
    group = Group(pool, 4)
    group.ranks[2].signal(signal.SIGKILL)
    group.join(5.0, [0, 1, 3])
    outcomes = group.results([0, 1, 3])
    assert_named(outcomes, "PeerLostError", (2,))
    assert max(outcome.seconds for outcome in outcomes.values()) < SOON_S
    group.end()


@of(4)
def test_diagnosis(group: Group) -> None:
    group.agree()
    error, ranks, message = group.do(0, "diagnose", "allreduce", "ECONNRESET")
    assert (error, ranks) == ("GroupError", ())
    assert "ECONNRESET" in message
    assert group.do(0, "diagnose", "allreduce", None)[:2] == ("CollectiveTimeoutError", ())
    group.ranks[2].signal(signal.SIGSTOP)
    assert group.do(0, "diagnose", "allreduce", None)[:2] == ("CollectiveTimeoutError", (2,))
    group.ranks[2].signal(signal.SIGCONT)
    group.agree()
    group.ranks[3].signal(signal.SIGKILL)
    for rank in (0, 1):
        assert group.do(rank, "diagnose", "allreduce", None)[:2] == ("PeerLostError", (3,))
    group.do(1, "fail", "CollectiveTimeoutError", "reported", (2,))
    time.sleep(0.3)
    assert group.do(0, "diagnose", "allreduce", None)[:2] == ("CollectiveTimeoutError", (2,))
