"""Where no thread can be started: what begins leaves nothing behind, and what must be told is told all the same."""

from __future__ import annotations

import threading
import time

import pytest

from colltensor.control import links
from colltensor.work import OperationQueue, Work


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    return monkeypatch


def test_a_queue_without_a_thread_keeps_nothing(no_threads: pytest.MonkeyPatch) -> None:
    queue, seen = OperationQueue("queue"), []
    queue.watch = seen.append
    with pytest.raises(RuntimeError, match="can't start"):
        queue.put(Work("lost", lambda: seen.append(True)))
    assert queue.idle
    assert seen == []
    assert queue.enter()
    queue.leave()
    no_threads.undo()
    assert queue.put(Work("later", lambda: 5)).result() == 5


def test_peers_are_called_without_threads(no_threads: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    links.in_parallel([3, 1, 2], called.append, time.monotonic() + 5.0)
    assert called == [3, 1, 2]


def test_a_call_from_inside_another_is_known(no_threads: pytest.MonkeyPatch) -> None:
    queue = OperationQueue("queue")
    assert not queue.is_inside()
    assert queue.enter()
    assert queue.is_inside()
    queue.leave()
    assert not queue.is_inside()
