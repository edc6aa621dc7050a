"""Two ranks of torch.distributed that wait in sends to each other, or in receives from each other."""

from __future__ import annotations

import _thread
import functools
import importlib
import logging
import re
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from c10d_ranks import world
from pool import RankPool

import colltensor as col

pytestmark = [pytest.mark.shm, pytest.mark.needs("torch")]


def refused(call: Callable[[], object]) -> tuple[float, str]:
    """Return how long a call takes to be refused, and the words."""
    began = time.monotonic()
    with pytest.raises(col.MismatchError) as caught:
        call()
    assert caught.value.ranks == (0, 1)
    return time.monotonic() - began, str(caught.value)


def block_each_other(rank: int, size: int, path: Path, calls: str) -> list[tuple[float, str]]:
    """Make calls that cannot end, in which a rank comes late or both at once; then what each has left goes through."""
    with world(rank, size, path) as (torch, dist):
        found = []
        if rank == 2:
            dist.barrier()
            return []
        for count in (3, 100_000):
            for letter in calls:
                mine = torch.full((count,), 100.0 + rank)
                pending = {
                    "s": lambda mine=mine: dist.send(mine, 1 - rank),
                    "r": lambda mine=mine: dist.recv(mine, 1 - rank),
                    "w": lambda mine=mine: dist.isend(mine, 1 - rank).wait(),
                }
                found.append(refused(pending[letter]))
                assert (mine == 100.0 + rank).all()
                time.sleep(0.1 * rank)
            for _ in range(2):  # nothing of what was refused comes later
                mine = torch.full((count,), float(rank))
                dist.recv(mine, 1) if rank == 0 else dist.send(mine, 0)
                assert (mine == 1).all()
                mine = torch.full((count,), 7.0 + rank)
                dist.send(mine, 1) if rank == 0 else dist.recv(mine, 0)
                assert (mine == 7).all()
        dist.barrier()
        return found


@pytest.mark.parametrize("calls", ["ss", "rr", "wsr"])
def test_two_that_block_each_other_are_told_at_once(
    pool: RankPool, tmp_path: Path, calls: str
) -> None:
    for found in pool.run(3, block_each_other, tmp_path / "meet", calls)[:2]:
        assert len(found) == 2 * len(calls)
        for took, words in found:
            assert took < 2.0  # the timeout is 20
            assert "batch_isend_irecv" in words


def block_behind(
    rank: int, size: int, path: Path, senders: tuple[int, ...]
) -> list[tuple[float, str]]:
    """Make blocking sends that cannot end, behind others that are not done: those remain, and go through."""
    with world(rank, size, path) as (torch, dist):
        found = []
        for count in (3, 100_000):
            for waits in (False, True):
                before = [
                    torch.full((count,), 10.0 + number)
                    for number in range(2 if rank in senders else 0)
                ]
                works = [dist.isend(tensor, 1 - rank) for tensor in before]
                mine = torch.full((count,), 100.0)
                found.append(
                    refused(
                        lambda mine=mine, waits=waits: (
                            dist.isend(mine, 1 - rank).wait()
                            if waits
                            else dist.send(mine, 1 - rank)
                        )
                    )
                )
                theirs = [torch.zeros(count) for _ in range(2 if 1 - rank in senders else 0)]
                for number, tensor in enumerate(theirs):
                    dist.recv(tensor, 1 - rank)
                    assert (tensor == 10.0 + number).all()
                for work in works:
                    work.wait()
                mine = torch.full((count,), float(rank))  # nothing of what was refused comes later
                dist.recv(mine, 1) if rank == 0 else dist.send(mine, 0)
                assert (mine == 1).all()
                mine = torch.full((count,), 7.0 + rank)
                dist.send(mine, 1) if rank == 0 else dist.recv(mine, 0)
                assert (mine == 7).all()
        dist.barrier()
        return found


@pytest.mark.parametrize("senders", [(0, 1), (0,), (1,)])
def test_two_that_block_each_other_behind_other_sends(
    pool: RankPool, tmp_path: Path, senders: tuple[int, ...]
) -> None:
    for found in pool.run(2, block_behind, tmp_path / "meet", senders):
        assert len(found) == 4
        for took, words in found:
            assert took < 2.0  # the timeout is 20
            assert "batch_isend_irecv" in words


def leave_behind_a_refused_send(rank: int, size: int, path: Path, number: int) -> float:
    """Leave the group: what was refused does not keep it, but what rank 0 sent before does until it is received."""
    with world(rank, size, path) as (torch, dist):
        works = [dist.isend(torch.ones(3), 1) for _ in range(number if rank == 0 else 0)]
        refused(lambda: dist.send(torch.ones(3), 1 - rank))
        for _ in range(number if rank == 1 else 0):
            time.sleep(0.1)
            dist.recv(torch.zeros(3), 0)
        began = time.monotonic()
        dist.destroy_process_group()
        took = time.monotonic() - began
        for work in works:
            work.wait()
        return took


@pytest.mark.parametrize("number", [0, 2])
def test_a_refused_send_does_not_hold_up_the_end(
    pool: RankPool, tmp_path: Path, number: int
) -> None:
    assert max(pool.run(2, leave_behind_a_refused_send, tmp_path / "meet", number)) < 3.0


def refuse_again_and_again(rank: int, size: int, path: Path) -> tuple[int, int, int]:
    """Return how many numbers of refused messages, and operations, this rank keeps; in the end how many numbers."""
    with world(rank, size, path) as (torch, dist):
        made = dist.group.WORLD
        made = getattr(made, "_get_backend", lambda device: made)(torch.device("cpu"))
        inbox = made._transfers._inbox
        for _ in range(6):
            refused(lambda: dist.send(torch.ones(3), 1 - rank))
        kept = len(inbox._withdrawn[1 - rank])
        waiting = len(made._transfers._outboxes[1 - rank]._waiting)
        mine = torch.zeros(1)
        dist.send(torch.ones(1), 1 - rank) if rank else dist.recv(mine, 1 - rank)
        dist.recv(mine, 1 - rank) if rank else dist.send(torch.ones(1), 1 - rank)
        assert mine.item() == 1
        return kept, waiting, len(inbox._withdrawn)


def test_what_was_refused_is_not_kept_for_ever(pool: RankPool, tmp_path: Path) -> None:
    """Numbers that follow each other are one run, and a message that comes ends those before it."""
    for kept, waiting, left in pool.run(2, refuse_again_and_again, tmp_path / "meet"):
        assert (kept, waiting, left) == (1, 0, 0)


def test_the_waits_that_were_refused_are_forgotten() -> None:
    standoffs = importlib.import_module("colltensor.torch.c10d.standoffs")
    made = standoffs.Standoffs("tested", 1, print, print, print)
    made._refused.extend(range(10_000))
    assert made.answer(0, b"[9999, 1, 0]") == b"true"
    assert made.answer(0, b"[1, 1, 0]") == b"false"


def wait_for_another_tag(rank: int, size: int, path: Path, count: int) -> str:
    """Rank 0 sends with one tag, rank 1 waits for another one, in vain: rank 0 does something else meanwhile."""
    with world(rank, size, path) as (torch, dist):
        dist.barrier()
        if rank == 0:
            dist.send(torch.ones(count), 1, tag=5)
            time.sleep(0.6)
            return ""
        torch.distributed.group.WORLD._get_backend(torch.device("cpu")).set_timeout(
            timedelta(seconds=0.3)
        )
        with pytest.raises(col.CollectiveTimeoutError) as caught:
            dist.recv(torch.zeros(count), 0, tag=7)
        assert caught.value.ranks == (0,)
        return str(caught.value)


@pytest.mark.parametrize("count", [3, 100_000])
def test_a_timeout_says_which_tags_came(pool: RankPool, tmp_path: Path, count: int) -> None:
    message = pool.run(2, wait_for_another_tag, tmp_path / "meet", count)[1]
    assert re.search(r"rank 0 .*\btag\b.*\b5\b", message), message


def waiting(made: Any, peer: int, operation: Any, release: Callable[[], None]) -> threading.Thread:
    """Begin to wait in a send to ``peer``, of which nothing is taken."""
    progress = importlib.import_module("colltensor.torch.c10d.standoffs").Progress(1, 0)
    arguments = operation, True, peer, lambda: progress, lambda: None, release, lambda *_: None
    thread = threading.Thread(target=made.wait_for, args=arguments)
    thread.start()
    return thread


def test_two_that_something_else_may_end_ask_each_other_now_and_then() -> None:
    """Here it is another thread; each question used to have the other rank ask back at once."""
    standoffs = importlib.import_module("colltensor.torch.c10d.standoffs")
    operations = [
        importlib.import_module("colltensor.torch.c10d.work").QueuedCall("send") for _ in range(2)
    ]
    ranks: list[Any] = []
    questions: list[int] = []

    def ask(asker: int, peer: int, question: bytes) -> bytes:
        questions.append(asker)
        answer: bytes = ranks[peer].answer(asker, question)
        return answer

    ranks += [
        standoffs.Standoffs("tested", rank, functools.partial(ask, rank), print, print)
        for rank in range(2)
    ]
    threads = [waiting(ranks[rank], 1 - rank, operations[rank], lambda: None) for rank in range(2)]
    time.sleep(0.3)
    for operation, thread in zip(operations, threads, strict=True):
        operation.end()
        thread.join(5.0)
    assert sorted(set(questions)) == [0, 1]
    assert len(questions) < 20


def test_one_that_dies_when_it_was_asked_is_not_asked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waited for it goes on, and fails as any other does; it was asked without a pause for 30 s, and not named."""
    standoffs = importlib.import_module("colltensor.torch.c10d.standoffs")
    monkeypatch.setattr(standoffs, "is_only_caller", lambda: True)
    operation = importlib.import_module("colltensor.torch.c10d.work").QueuedCall("send")
    answers = [b"[1, true, true, 1, 0]", None, None, None]
    asked: list[int] = []
    failures: list[Exception] = []

    def ask(peer: int, question: bytes) -> bytes | None:
        asked.append(peer)
        return answers[len(asked) - 1]

    def lost(peer: int) -> col.PeerLostError | None:
        return col.PeerLostError("it died", (peer,)) if len(asked) == 3 else None

    made = standoffs.Standoffs("tested", 0, ask, lost, failures.append)
    waiting(made, 1, operation, operation.end).join(5.0)
    assert operation.done()
    assert asked == [1, 1, 1]
    assert failures == []


def take_later(receive: Callable[[], object], received: threading.Event) -> None:
    """Receive in a thread that ``threading`` does not know, as those that C++ makes."""
    time.sleep(0.5)
    receive()
    received.set()


def pass_in_the_end(rank: int, size: int, path: Path, how: str) -> list[str]:
    """Both wait in a send for longer than it takes to look; what ends it comes from elsewhere."""
    words: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            words.append(record.getMessage())

    handler = Kept(logging.WARNING)
    with world(rank, size, path) as (torch, dist):
        logging.getLogger("colltensor").addHandler(handler)
        mine, theirs = torch.full((3,), float(rank)), torch.zeros(3)
        receive: Any = None
        if how == "thread":
            receive = threading.Timer(0.5, dist.recv, (theirs, 1 - rank))
            receive.start()
        elif how == "foreign thread":
            receive = threading.Event()
            _thread.start_new_thread(take_later, (lambda: dist.recv(theirs, 1 - rank), receive))
        elif how == "issued":
            receive = dist.irecv(theirs, 1 - rank)
        elif rank:  # the other rank is late, that is all
            time.sleep(0.5)
            receive = dist.irecv(theirs, 0)
        try:
            dist.send(mine, 1 - rank)
            if receive is None:
                dist.recv(theirs, 1)
            else:
                receive.join() if how == "thread" else receive.wait()
        finally:
            logging.getLogger("colltensor").removeHandler(handler)
        assert (theirs == 1 - rank).all()
        dist.barrier()
    return words


@pytest.mark.parametrize("how", ["thread", "foreign thread", "issued", "late"])
def test_what_another_call_ends_is_not_refused(pool: RankPool, tmp_path: Path, how: str) -> None:
    for words in pool.run(2, pass_in_the_end, tmp_path / "meet", how):
        assert ["thread" in said for said in words] in ([], [True])
        assert words == [] or "thread" in how


@pytest.mark.needs("torch")
def test_a_receive_that_is_held_keeps_its_place() -> None:
    """A message that comes meanwhile is not another receive's, issued later: it waits for the one before."""
    torch = pytest.importorskip("torch")
    inbox_of = importlib.import_module("colltensor.torch.c10d.inbox")
    work = importlib.import_module("colltensor.torch.c10d.work")
    inbox = inbox_of.Inbox("tested", 0, 2, lambda source, destination: None)
    inbox._read_from = lambda sources: None  # no other rank
    first, second = (
        inbox_of.Receive(1, 5, torch.zeros(2), work.QueuedCall("recv")) for _ in range(2)
    )
    inbox.add(first)
    inbox.add(second)
    inbox.hold(first)
    assert inbox._match(1, 5) is None
    inbox._messages.append(inbox_of.Message(1, 5, torch.float32, torch.ones(2).view(torch.uint8)))
    third = inbox_of.Receive(1, 5, torch.zeros(2), work.QueuedCall("recv"))
    inbox.add(third)
    assert not third.operation.is_done_within(0)
    inbox.release(first)
    assert first.operation.is_done_within(5)
    assert first.tensor.tolist() == [1.0, 1.0]
    assert inbox._match(1, 5) is second
