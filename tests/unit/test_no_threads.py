"""Where no thread can be started: what begins leaves nothing behind, and what must be told is told all the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from colltensor.control import frames
from colltensor.operation_queue import OperationQueue
from colltensor.work import Work


def _refuse(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(threading.Thread, "start", _refuse)
    return monkeypatch


def test_a_queue_without_a_thread_keeps_nothing(no_threads: pytest.MonkeyPatch) -> None:
    queue, seen = OperationQueue("queue"), []
    queue.watch = seen.append
    with pytest.raises(RuntimeError, match="thread"):
        queue.put(Work("lost", lambda: seen.append(True)))
    assert queue.idle
    assert seen == []
    assert queue.enter()
    queue.turn.release()
    no_threads.undo()
    assert queue.put(Work("later", lambda: 5)).result() == 5


def test_a_lane_has_its_thread_before_its_turn_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else transfers that must pass each other would wait for one another, and nobody could be told why."""
    queue, go, went = OperationQueue("queue"), threading.Event(), threading.Event()

    def transfer(lane: tuple[int, int], run: Callable[[], object]) -> Work:
        work = Work("transfer", run)
        work.lane = lane
        return queue.put(work)

    first = queue.put(Work("before", lambda: go.wait(10.0)))
    waits = transfer((0, 1), lambda: went.wait(10.0))
    passes = transfer((1, 0), went.set)
    monkeypatch.setattr(threading.Thread, "start", _refuse)
    with pytest.raises(RuntimeError, match="thread"):
        transfer((0, 2), go.set)
    go.set()
    for work in (first, waits, passes):
        work.wait(2.0)
    assert waits.result()
    monkeypatch.undo()
    assert transfer((0, 2), lambda: 5).result() == 5


def test_peers_are_called_without_threads(no_threads: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    frames.in_parallel([3, 1, 2], called.append, time.monotonic() + 5.0)
    assert called == [3, 1, 2]


def test_a_call_from_inside_another_is_known(no_threads: pytest.MonkeyPatch) -> None:
    queue = OperationQueue("queue")
    assert not queue.is_inside()
    assert queue.enter()
    assert queue.is_inside()
    queue.turn.release()
    assert not queue.is_inside()
