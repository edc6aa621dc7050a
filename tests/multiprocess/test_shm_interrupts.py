"""Signals while a rank waits in shared memory: Ctrl-C ends the wait at whatever moment it comes, others hear of it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from pool import RankPool
from shm_ranks import fresh, own_group

import colltensor as col

pytestmark = pytest.mark.shm


class Usr2Error(Exception):
    """What a handler of a test raises."""


def interrupt_soon(seconds: float = 0.3, number: int = signal.SIGINT) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


def for_ever(group: Any, count: int) -> None:
    data = np.ones(count, np.float32)
    while True:
        data[:] = 1
        group.allreduce(data)


WAITS: dict[str, Callable[[Any], Any]] = {
    "barrier": lambda group: group.barrier(),
    "small": lambda group: group.allreduce(np.zeros(3)),
    "large": lambda group: group.allreduce(np.zeros(1_000_000)),
    "tree": lambda group: group.allreduce(
        [np.zeros(300_000), np.zeros(3), np.zeros(300_000, np.int32)]
    ),
    "broadcast": lambda group: group.broadcast(np.zeros(1_000_000), 1),
    "reduce": lambda group: group.reduce(np.zeros(1_000_000), 0),
    "send": lambda group: group.send(np.zeros(1_000_000), 1),
    "recv": lambda group: group.recv(np.zeros(3), 1),
    "async": lambda group: group.allreduce(np.zeros(3), async_op=True).wait(),
}


def interrupt_one(rank: int, size: int, name: str, way: str) -> tuple[float, str]:
    """Rank 0 waits and is interrupted; the others wait for it in another call, of which they must hear at once."""
    # They wait in a circle, which would be told first.
    patient = mock.patch("colltensor.engine.deadlock._FIRST_PAUSE_S", 60.0)
    with patient, own_group(rank, size, name) as group:
        group.barrier()
        began = time.monotonic()
        if rank == 0:
            interrupt_soon()
            with pytest.raises(KeyboardInterrupt):
                WAITS[way](group)
            took = time.monotonic() - began
            if way == "async":  # the operation itself goes on; leaving the group ends it
                return took, "rank 0"
            with pytest.raises(col.GroupError):
                group.barrier()
            return took, "rank 0"
        # Rank 1 waits for a third rank, which waits for rank 0 on the control plane alone.
        with pytest.raises(col.CollectiveError) as caught:
            group.recv(np.zeros(7), 2 if rank == 1 else 0)
        return time.monotonic() - began, str(caught.value)


@pytest.mark.parametrize("way", WAITS)
def test_ctrl_c_ends_every_wait_and_the_others_hear_of_it(pool: RankPool, way: str) -> None:
    found = pool.run(3, interrupt_one, fresh(), way)
    assert all(took < 1.3 and "rank 0" in words for took, words in found), found


def interrupt_behind_another_call(rank: int, size: int, name: str) -> float:
    """Rank 0 waits for its turn, which another thread's call has that waits for rank 1."""
    with own_group(rank, size, name) as group:
        group.allreduce(np.zeros(1))  # the first call with a type goes the slow path
        if rank == 1:
            time.sleep(1.5)
            with pytest.raises(col.GroupError, match="rank 0"):
                group.barrier()
            return 0.0
        failures: list[BaseException] = []

        def waits() -> None:
            try:
                group.allreduce(np.ones(3))
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=waits)
        thread.start()
        time.sleep(0.2)
        interrupt_soon()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            group.allreduce(np.ones(3))
        took = time.monotonic() - began
        thread.join()
        assert [type(failure) for failure in failures] == [col.GroupError]
        return took


def test_ctrl_c_while_another_thread_has_the_turn(pool: RankPool) -> None:
    assert max(pool.run(2, interrupt_behind_another_call, fresh())) < 1


def interrupt_in_the_middle(rank: int, size: int, name: str, count: int) -> tuple[float, str]:
    with own_group(rank, size, name) as group:
        group.barrier()
        began = time.monotonic()
        if rank == 1:
            interrupt_soon(0.2)
            with pytest.raises(KeyboardInterrupt):
                for_ever(group, count)
            return time.monotonic() - began, "rank 1"
        # Between two calls nobody but the caller knows of it; then rank 1 leaves.
        with pytest.raises((col.GroupError, col.PeerLostError)) as caught:
            for_ever(group, count)
        return time.monotonic() - began, str(caught.value)


@pytest.mark.parametrize("count", [3, 3_000_000])
def test_ctrl_c_between_and_in_payloads(pool: RankPool, count: int) -> None:
    found = pool.run(3, interrupt_in_the_middle, fresh(), count)
    assert all(took < 1.3 and "rank 1" in words for took, words in found), found


def come_while_the_handler_runs(rank: int, size: int, name: str, sign: str) -> str:
    """The others arrive while rank 0's handler runs, which then raises: that must not be mixed up with a success."""
    with own_group(rank, size, name) as group:
        group.barrier()
        if rank == 0:

            def handler(*_: Any) -> None:
                Path(sign).touch()
                time.sleep(0.4)
                raise Usr2Error

            previous = signal.signal(signal.SIGUSR2, handler)
            interrupt_soon(number=signal.SIGUSR2)
            try:
                group.barrier()
            except Exception as error:
                return type(error).__name__
            finally:
                signal.signal(signal.SIGUSR2, previous)
            return "nothing"
        while not Path(sign).exists():
            time.sleep(0.01)
        with pytest.raises(col.GroupError, match="rank 0"):
            for_ever(group, 3)
        return "GroupError"


def test_a_handler_that_raises_when_all_have_come(pool: RankPool, tmp_path: Path) -> None:
    found = pool.run(2, come_while_the_handler_runs, fresh(), str(tmp_path / "sign"))
    assert found == ["Usr2Error", "GroupError"]


class Interrupting:
    """A control plane that gets Ctrl-C while it is asked whether the group is broken."""

    def __init__(self, control: Any, after: float) -> None:
        self._control = control
        self._after = after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._control, name)

    def check(self) -> None:
        if time.monotonic() > self._after:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0)  # somewhere for the handler to run
        self._control.check()


def interrupt_the_question(rank: int, size: int, name: str) -> float:
    with own_group(rank, size, name) as group:
        group.barrier()
        began = time.monotonic()
        if rank == 0:
            outcomes = group._backend._error_mapping
            outcomes._control = Interrupting(outcomes._control, began + 0.2)
            with pytest.raises(KeyboardInterrupt):
                group.barrier()
        else:
            time.sleep(0.6)
            with pytest.raises(col.GroupError, match="rank 0"):
                group.barrier()
        return time.monotonic() - began


def test_ctrl_c_while_the_library_asks_python(pool: RankPool) -> None:
    assert max(pool.run(2, interrupt_the_question, fresh())) < 1.3


def survive_signals(rank: int, size: int, name: str) -> int:
    """A handler that returns disturbs nobody, however often the signal comes."""
    seen = []
    previous = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    try:
        with own_group(rank, size, name) as group:
            signal.setitimer(signal.ITIMER_REAL, 0.001 * (rank + 1), 0.0013)
            for step in range(30):
                data = np.full(1 + 50_000 * (step % 4), rank + 1.0)
                if step % 10 == rank:
                    time.sleep(0.12)
                group.allreduce(data)
                assert (data == size * (size + 1) / 2).all()
                if rank < 2:
                    group.send(data, 1) if rank == 0 else group.recv(data, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    return len(seen)


def test_signals_that_are_handled_disturb_nobody(pool: RankPool) -> None:
    assert min(pool.run(3, survive_signals, fresh())) > 50


def count_while_waiting(rank: int, size: int, name: str) -> int:
    """Another thread of the process counts on while the main one waits."""
    with own_group(rank, size, name) as group:
        group.barrier()
        if rank == 0:
            time.sleep(0.5)
            group.allreduce(np.ones(3))
            return 1 << 30
        stop, counted = threading.Event(), 0

        def count() -> None:
            nonlocal counted
            while not stop.is_set():
                counted += 1
                time.sleep(0.001)

        counter = threading.Thread(target=count)
        counter.start()
        before = counted
        group.allreduce(np.ones(3))
        during = counted - before
        stop.set()
        counter.join()
        return during


def test_a_wait_holds_no_interpreter_lock(pool: RankPool) -> None:
    assert min(pool.run(3, count_while_waiting, fresh())) > 100
