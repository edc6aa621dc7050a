"""Work and the queue that keeps a group's operations in order."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from colltensor.errors import CollectiveTimeoutError, GroupError, MismatchError
from colltensor.operation_queue import OperationQueue
from colltensor.work import Work


@pytest.fixture
def queue() -> Iterator[OperationQueue]:
    made = OperationQueue("tested")
    yield made
    made.close(GroupError("over"), 5.0)


def leave(queue: OperationQueue) -> None:
    """Give the turn back as the engine does."""
    queue.turn.release()
    queue.pass_on()


def test_result_and_done(queue: OperationQueue) -> None:
    go = threading.Event()
    work = queue.put(Work("allreduce", lambda: go.wait(10) and "sum"))
    assert not work.done()
    with pytest.raises(CollectiveTimeoutError, match=r"allreduce: wait\(\) .*\b0\.01 s"):
        work.wait(0.01)
    go.set()
    assert work.result() == "sum"
    assert work.done()
    assert work.wait() is None
    assert work.result() == "sum"


def test_an_error_is_raised_each_time(queue: OperationQueue) -> None:
    error = MismatchError("different", (1,))

    def fail() -> None:
        raise error

    work = queue.put(Work("allreduce", fail))
    for _ in range(3):
        with pytest.raises(MismatchError) as caught:
            work.wait()
        assert caught.value is error
    assert work.done()
    assert queue.put(Work("barrier", lambda: 1)).result() == 1


def test_operations_run_in_order_and_one_at_a_time(queue: OperationQueue) -> None:
    order: list[int] = []
    running = threading.Lock()

    def run(number: int) -> None:
        assert running.acquire(blocking=False)
        time.sleep(0.001)
        order.append(number)
        running.release()

    works = [queue.put(Work("op", lambda number=number: run(number))) for number in range(20)]
    assert not queue.enter() or (leave(queue) or all(work.done() for work in works))
    for work in works:
        work.wait(10)
    assert order == list(range(20))


def test_a_synchronous_call_takes_the_turn_when_nobody_waits(queue: OperationQueue) -> None:
    assert queue.enter()
    assert not queue.enter()
    ran = threading.Event()
    work = queue.put(Work("op", ran.set))
    assert not ran.wait(0.05)
    assert not work.done()
    leave(queue)
    work.wait(10)
    assert ran.is_set()


def test_closing_fails_what_waits() -> None:
    queue = OperationQueue("tested")
    assert queue.enter()
    works = [queue.put(Work("op", lambda: None)) for _ in range(3)]
    gone = GroupError("destroyed")
    assert not queue.close(gone, 0.05)  # the operation that has the turn does not end in time
    for work in works:
        with pytest.raises(GroupError) as caught:
            work.wait(5)
        assert caught.value is gone
    leave(queue)


def test_a_queue_is_busy_while_a_work_runs_although_the_next_could_not_be_put(
    queue: OperationQueue,
) -> None:
    began, go = threading.Event(), threading.Event()
    runs = queue.put(Work("op", lambda: began.set() or go.wait(10.0)))
    assert began.wait(5.0)

    def fail(_: bool) -> None:
        raise MemoryError

    queue.watch = fail
    with pytest.raises(MemoryError):
        queue.put(Work("lost", lambda: None))
    queue.watch = None
    assert queue.busy
    assert not queue.idle
    go.set()
    assert runs.result()
    assert queue.put(Work("next", lambda: 5)).result() == 5


def test_the_thread_of_the_native_queue_is_gone_when_the_queue_is_closed() -> None:
    """The interpreter's end would end it in native code, and the process with it."""

    class Native:
        def __init__(self) -> None:
            self.closed = threading.Event()

        def wait(self, number: int, timeout_s: float | None) -> bool:
            return True

        def serve(self, patient: bool) -> int:
            self.closed.wait()
            time.sleep(0.2)  # until it has the interpreter lock
            return 0

        def close(self) -> int:
            self.closed.set()
            return 1

        def issued(self) -> int:
            return 0

        ended = issued

        def cancel(self) -> None:
            pass

    queue = OperationQueue("tested", Native())  # type: ignore[arg-type]
    queue.man_native()
    assert any(thread.name == "colltensor tested" for thread in threading.enumerate())
    queue.close(GroupError("the group was destroyed"), 5.0)
    assert not any(thread.name == "colltensor tested" for thread in threading.enumerate())


def test_nothing_waits_in_a_queue_that_was_closed(queue: OperationQueue) -> None:
    queue.close(GroupError("group 'tested'"), 5.0)
    with pytest.raises(GroupError, match=r"^allreduce: group 'tested'$"):
        queue.put(Work("allreduce", lambda: None))
    assert not queue.is_busy()


def test_closing_waits_for_the_operation_that_runs() -> None:
    queue = OperationQueue("tested")
    work = queue.put(Work("op", lambda: time.sleep(0.1)))
    assert queue.close(GroupError("destroyed"), 5.0)
    assert work.done()


def test_an_idle_queue_has_no_thread() -> None:
    before = threading.active_count()
    queue = OperationQueue("tested")
    assert queue.enter()
    leave(queue)
    assert queue.close(GroupError("over"), 1.0)
    assert threading.active_count() == before


def test_the_worker_ends_when_the_queue_is_closed() -> None:
    queue = OperationQueue("named-group")
    queue.put(Work("op", lambda: None)).wait(5)
    names = [thread.name for thread in threading.enumerate()]
    assert any("named-group" in name for name in names)
    queue.close(GroupError("over"), 5.0)
    deadline = time.monotonic() + 5
    while any("named-group" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_work_lets_go_of_its_operation(queue: OperationQueue) -> None:
    class Held:
        pass

    held = Held()
    alive = weakref.ref(held)
    work = queue.put(Work("op", lambda held=held: None))
    work.wait(5)
    del held
    queue.put(Work("op", lambda: None)).wait(5)
    assert alive() is None
    assert work.done()


class Interruption(BaseException):
    """What a signal's handler raises."""


class Interrupter:
    """Has a handler raise a few microseconds after each ``arm``, until ``armed`` is False; a statement sets it."""

    def __init__(self, seed: int) -> None:
        self.armed = False
        self._chance = random.Random(seed)

    def handle(self, *_: object) -> None:
        if self.armed:
            raise Interruption

    def arm(self) -> None:
        self.armed = True
        signal.setitimer(signal.ITIMER_REAL, self._chance.uniform(1e-6, 60e-6))


@contextlib.contextmanager
def interrupter(seed: int) -> Iterator[Interrupter]:
    """Give one whose handler is in place; what it raises where nobody can catch it is not shown."""
    made = Interrupter(seed)
    previous = signal.signal(signal.SIGALRM, made.handle)
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield made
    finally:
        made.armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        sys.unraisablehook = hook


before_3_11 = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="a handler may come between any two instructions"
)


def interrupt_turns(queue: Any) -> None:
    with interrupter(1) as interrupts:
        for _ in range(1500):
            try:
                interrupts.arm()
                for _ in range(1000):
                    if queue.enter():
                        try:
                            pass
                        finally:
                            queue.turn.release()
                            queue.pass_on()
            except Interruption:
                pass
            interrupts.armed = False
            assert queue.turn.owner() == 0


@before_3_11
def test_an_interrupt_at_any_moment_leaves_no_turn_taken(queue: OperationQueue) -> None:
    interrupt_turns(queue)


@before_3_11
@pytest.mark.needs("torch")
def test_an_interrupt_at_any_moment_leaves_no_turn_of_torch_distributed_taken() -> None:
    line = c10d("work").ProcessGroupQueue("tested")
    interrupt_turns(line)
    line.close(GroupError("over"))


def c10d(name: str) -> Any:
    """Return a module of the process group's."""
    return importlib.import_module(f"colltensor.torch.c10d.{name}")


@pytest.mark.needs("torch")
def test_a_thread_of_torch_distributed_that_waits_keeps_no_operation() -> None:
    """Its error has the frames of what has failed, and those the process group, which could never be collected."""
    line = c10d("work").ProcessGroupQueue("tested")

    def fail(held: object) -> None:
        raise GroupError("broken")

    held = Interrupter(0)
    alive = weakref.ref(held)
    operation = c10d("work").QueuedCall("op", functools.partial(fail, held))
    del held
    line.put(operation)
    with pytest.raises(GroupError):
        operation.wait(5.0)
    del operation
    deadline = time.monotonic() + 2.0
    while gc.collect() >= 0 and alive() is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert alive() is None
    line.close(GroupError("over"))


@pytest.mark.needs("torch")
def test_a_thread_that_began_although_its_start_was_interrupted_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work, start = c10d("work"), threading.Thread.start
    line = work.ProcessGroupQueue("tested")

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise Interruption

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(Interruption):
        line.put(work.QueuedCall("lost"))
    monkeypatch.undo()
    time.sleep(0.01)
    operation = work.QueuedCall("op")
    line.put(operation)
    assert operation.is_done_within(2.0)
    line.close(GroupError("over"))


@pytest.mark.needs("torch")
def test_a_deadline_keeps_no_operation() -> None:
    deadlines, expired = c10d("transfers"), []
    made = deadlines.Deadlines(lambda entry: expired.append(entry.operation()))
    done, late = (c10d("work").QueuedCall("op") for _ in range(2))
    alive = weakref.ref(done)
    made.add(done, 60.0, ())
    del done
    assert alive() is None
    made.add(late, 0.001, ())
    deadline = time.monotonic() + 2.0
    while not expired and time.monotonic() < deadline:
        time.sleep(0.001)
    assert expired == [late]
    made.close()


@before_3_11
def test_an_interrupt_at_any_moment_leaves_no_lock_taken(queue: OperationQueue) -> None:
    queue.put(Work("first", lambda: None)).wait(5.0)  # with which the thread begins
    with interrupter(2) as interrupts:
        for _ in range(400):
            try:
                interrupts.arm()
                for _ in range(20):
                    queue.put(Work("op", lambda: None))
            except Interruption:
                pass
            interrupts.armed = False
            assert queue.put(Work("next", lambda: 5)).wait(5.0) is None
    deadline = time.monotonic() + 5.0
    while not queue.idle and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not queue.is_busy()


def test_a_worker_sees_a_turn_that_was_given_back_without_a_word(queue: OperationQueue) -> None:
    assert queue.enter()
    work = queue.put(Work("op", lambda: 5))
    queue.turn.release()  # and a handler raised
    assert work.wait(2.0) is None


def test_a_work_says_how_it_ended_as_a_future_does() -> None:
    """The names and the meaning are those of ``concurrent.futures``; a timeout is no error of the operation."""
    release = threading.Event()
    queue = OperationQueue("tested")
    called: list[Work] = []

    def fail() -> None:
        release.wait(5)
        raise ValueError("no")

    try:
        failed = queue.put(Work("a call", fail))
        good = queue.put(Work("another", lambda: "result"))
        for work in (failed, good):
            work.add_done_callback(called.append)
        for wait in (failed.exception, failed.result):
            with pytest.raises(CollectiveTimeoutError, match=r"a call: .*\b0\.01 s"):
                wait(0.01)
        release.set()
        assert (good.exception(), good.result(5), good.exception(5)) == (None, "result", None)
        assert isinstance(failed.exception(), ValueError)
        with pytest.raises(ValueError, match="no"):
            failed.result(5)
        assert called == [failed, good]
    finally:
        release.set()
        queue.close(GroupError("over"), 5)
