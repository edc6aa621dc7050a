"""Asynchronous calls in shared memory: at once or by the native queue, in the order of issue, whatever goes wrong."""

from __future__ import annotations

import functools
import gc
import os
import signal
import threading
import time
import weakref

import numpy as np
import pytest
from pool import RankPool
from shm_ranks import fresh, own_group

import colltensor as col
from colltensor.work import EndedWork, IssuedWork, Work


def both_ways(rank: int, size: int, name: str, seed: int) -> None:
    """Calls that do not commute, of all sizes and kinds, some awaited, between ranks that come early and late."""
    random, own = np.random.default_rng(seed), np.random.default_rng(100 + rank)
    first = np.arange(1.0, size + 1)[:, None] * np.ones(70_000)
    with own_group(rank, size, name) as group:
        group.allreduce(np.zeros(1))
        for _ in range(10):
            expected, x, works = first.copy(), first[rank].copy(), []
            for _ in range(40):
                part = x[: int(random.choice((1, 300, 3000, 70_000)))]
                ranks = expected[:, : len(part)]
                kind, root, async_op = (
                    random.integers(5),
                    int(random.integers(size)),
                    bool(random.random() < 0.8),
                )
                if own.random() < 0.02:
                    time.sleep(0.002)
                if kind == 0:
                    strided = part[::-1] if random.random() < 0.2 else part
                    work = group.allreduce(strided, async_op=async_op)
                    ranks[:] = functools.reduce(np.add, ranks)
                elif kind == 1:
                    work = group.broadcast(part, root, async_op=async_op)
                    ranks[:] = ranks[root]
                elif kind == 2:
                    work = group.reduce(part, root, async_op=async_op)
                    ranks[root] = functools.reduce(np.add, ranks)
                elif kind == 3:
                    work = group.allreduce([part, np.zeros(3)], col.ReduceOp.MIN, async_op=async_op)
                    ranks[:] = ranks.min(0)
                else:
                    for work in works:
                        work.wait(20)
                    part *= rank + 1
                    work = group.allreduce(part, col.ReduceOp.MAX, async_op=async_op)
                    ranks *= np.arange(1.0, size + 1)[:, None]
                    ranks[:] = ranks.max(0)
                if async_op:
                    assert isinstance(work, Work)
                    works.append(work)
                    if own.random() < 0.1:
                        works.pop(int(own.integers(len(works)))).wait(20)
            for work in works:
                work.wait(20)
                assert work.done()
            np.testing.assert_array_equal(x, expected[rank])


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_at_all_paces_keep_one_order(pool: RankPool, size: int) -> None:
    pool.run(size, both_ways, fresh(), size)


def order_of_issue(rank: int, size: int, name: str, late: int) -> list[str]:
    """What rank ``late`` comes to late waits in the native queue, and what is synchronous behind it."""
    with own_group(rank, size, name) as group:
        group.allreduce(np.zeros(1))
        for count in (1, 3000, 300_000):
            group.barrier()
            if rank == late:
                time.sleep(0.1)
            x, works = np.full(count, rank + 1.0), []
            for _ in range(6):
                works.append(group.allreduce(x, async_op=True))
                works.append(group.broadcast(x, size - 1, async_op=True))
            kinds = {type(work).__name__ for work in works}
            group.allreduce(x)
            assert all(work.done() for work in works)
            np.testing.assert_array_equal(
                x, np.full(count, sum(range(1, size + 1)) * float(size) ** 6)
            )
        outputs = [np.zeros(5) for _ in range(size)]
        stack = np.zeros((size, 5))
        parts = [np.full(5, 10.0 * rank + part) for part in range(size)]
        target, turned, got = np.zeros(5), [np.zeros(5) for _ in range(size)], np.zeros(5)
        works = [
            group.allgather(outputs, np.full(5, 1.0 * rank), async_op=True),
            group.allgather(stack, np.full(5, 1.0 * rank), async_op=True),
            group.reducescatter(target, parts, async_op=True),
            group.alltoall(turned, parts, async_op=True),
            group.recv(got, 1, async_op=True) if rank == 0 else None,
            group.send(parts[1], 0, async_op=True) if rank == 1 else None,
        ]
        results = [work.result() for work in works if work is not None]
        assert results[:4] == [outputs, stack, target, turned] or results[0] is outputs
        np.testing.assert_array_equal(outputs, stack)
        np.testing.assert_array_equal(stack[:, 0], np.arange(size))
        np.testing.assert_array_equal(
            target, np.full(5, sum(10.0 * peer + rank for peer in range(size)))
        )
        np.testing.assert_array_equal(
            [array[0] for array in turned], [10.0 * peer + rank for peer in range(size)]
        )
        assert rank != 0 or (got == 11.0).all()
        return sorted(kinds)


@pytest.mark.parametrize("late", [0, 1])
def test_calls_behind_a_late_rank_keep_their_order(pool: RankPool, late: int) -> None:
    kinds = pool.run(2, order_of_issue, fresh(), late)
    assert IssuedWork.__name__ in kinds[1 - late]


def mismatched(rank: int, size: int, name: str, late: int) -> None:
    """A mismatch among queued calls is that call's alone; the words name both sides, and its data is intact."""
    with own_group(rank, size, name) as group:
        group.allreduce(np.zeros(1))
        for step in range(5):
            group.barrier()
            if rank == late:
                time.sleep(0.05)
            before, odd, after = np.ones(3), np.ones(3 + rank), np.ones(3)
            works = [group.allreduce(array, async_op=True) for array in (before, odd, after)]
            told: list[col.Work] = []
            works[1].add_done_callback(told.append)
            works[0].wait()
            for _ in range(2):
                with pytest.raises(
                    col.MismatchError,
                    match=r"float64\[3\].*float64\[4\]|float64\[4\].*float64\[3\]",
                ):
                    works[1].wait()
            works[2].wait()
            assert before.tolist() == after.tolist() == [size] * 3, step
            assert (odd == 1).all()
            deadline = time.monotonic() + 5
            while not told and time.monotonic() < deadline:
                time.sleep(0.001)
            assert isinstance(told[0].exception(), col.MismatchError)


@pytest.mark.parametrize("late", [0, 1])
def test_a_mismatch_in_the_queue(pool: RankPool, late: int) -> None:
    pool.run(2, mismatched, fresh(), late)


def lost(rank: int, size: int, name: str, way: str) -> None:
    """The other rank destroys the group, or comes too late, while calls wait in the queue."""
    with own_group(rank, size, name, timeout_s=1.0 if way == "late" else 20.0) as group:
        group.allreduce(np.zeros(1))
        if rank == 1:
            time.sleep(2.0 if way == "late" else 0.2)
            return
        works = [group.allreduce(np.ones(3), async_op=True) for _ in range(3)]
        with pytest.raises(
            col.CollectiveTimeoutError if way == "late" else col.PeerLostError
        ) as caught:
            works[0].wait()
        assert caught.value.ranks == (1,)
        for work in works[1:]:
            with pytest.raises(col.CollectiveError):
                work.wait(5)
        with pytest.raises(col.GroupError):
            group.allreduce(np.ones(3), async_op=True)


@pytest.mark.parametrize("way", ["late", "left"])
def test_a_failure_reaches_every_call_in_the_queue(pool: RankPool, way: str) -> None:
    pool.run(2, lost, fresh(), way)


def destroyed(rank: int, size: int, name: str) -> None:
    with own_group(rank, size, name) as group:
        group.allreduce(np.zeros(1))
        if rank == 1:
            time.sleep(0.5)
            return
        works = [group.allreduce(np.ones(3), async_op=True) for _ in range(100)]
        told: list[col.Work] = []
        works[-1].add_done_callback(told.append)
        began = time.monotonic()
        group.destroy()
        assert time.monotonic() - began < 2
        for work in works:
            with pytest.raises(col.CollectiveError):
                work.wait(1)
            assert work.done()
        assert isinstance(told[0].exception(), col.GroupError)
        while any(thread.name == f"colltensor {group.name}" for thread in threading.enumerate()):
            assert time.monotonic() - began < 5
            time.sleep(0.001)


def test_destroying_ends_what_waits_in_the_queue(pool: RankPool) -> None:
    pool.run(2, destroyed, fresh())


def forked(rank: int, size: int, name: str) -> None:
    """A child does not wait for its parent's calls, and the parent's go on."""
    with own_group(rank, size, name) as group:
        group.allreduce(np.zeros(1))
        group.barrier()
        if rank == 1:
            time.sleep(0.3)
        x = np.ones(3)
        works = [group.allreduce(x, async_op=True) for _ in range(3)]
        if rank == 0:
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    signal.alarm(5)
                    try:
                        works[-1].wait()
                    except col.GroupError:
                        code = 0
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        for work in works:
            work.wait(20)
        assert x.tolist() == [size**3] * 3


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_child_waits_for_nothing(pool: RankPool) -> None:
    pool.run(2, forked, fresh())


def memory(rank: int, size: int, name: str) -> None:
    """What nobody keeps lives until its call has ended, and then no longer than the next calls."""
    with own_group(rank, size, name) as group:
        group.allreduce(np.zeros(1))
        group.barrier()
        if rank == 1:
            time.sleep(0.2)
        total, seen = np.zeros(50_000), []
        for _ in range(20):
            given = np.full(50_000, rank + 1.0)
            seen.append(weakref.ref(given))
            group.allreduce(given, async_op=True)
            del given
        group.allreduce(total)
        gc.collect()
        assert sum(ref() is not None for ref in seen) == 0


def test_a_call_keeps_its_memory_no_longer_than_it_must(pool: RankPool) -> None:
    pool.run(2, memory, fresh())


def interrupted(rank: int, size: int, name: str) -> None:
    """Ctrl-C ends a wait and not the call."""
    with own_group(rank, size, name) as group:
        group.allreduce(np.zeros(1))
        group.barrier()
        x = np.ones(3)
        if rank == 1:
            time.sleep(0.6)
            group.allreduce(x)
        else:

            def handler(number: int, frame: object) -> None:
                raise KeyboardInterrupt

            work = group.allreduce(x, async_op=True)
            before = signal.signal(signal.SIGALRM, handler)
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                began = time.monotonic()
                with pytest.raises(KeyboardInterrupt):
                    work.wait()
                assert time.monotonic() - began < 0.5
            finally:
                signal.signal(signal.SIGALRM, before)
            work.wait()
        assert x.tolist() == [size] * 3
        assert group.broken is None


def test_an_interrupted_wait_leaves_the_call_alone(pool: RankPool) -> None:
    pool.run(2, interrupted, fresh())


def torch_versions(rank: int, size: int, name: str) -> None:
    """A write is noted in torch's version counter when the call is seen to have ended."""
    torch = pytest.importorskip("torch")
    with own_group(rank, size, name) as group:
        group.allreduce(torch.zeros(1))
        for late in (0, 1, None):
            group.barrier()
            if rank == late:
                time.sleep(0.05)
            x = torch.ones(5)
            version = x._version
            assert group.allreduce(x, async_op=True).result() is x
            assert x._version > version
            assert x.tolist() == [size] * 5


@pytest.mark.needs("torch")
def test_torch_is_told_of_the_write(pool: RankPool) -> None:
    pool.run(2, torch_versions, fresh())


def crossed(rank: int, size: int, name: str) -> None:
    """Sends and receives pass each other behind what the queue has, and what follows waits for them."""
    with own_group(rank, size, name) as group:
        for count in (3, 300_000):
            if rank == 1:
                time.sleep(0.2)
            sums = [np.ones(7) for _ in range(3)]
            got, last = np.zeros(count), np.ones(7)
            works = [group.allreduce(x, async_op=True) for x in sums]
            works.append(group.send(np.full(count, 1.0 + rank), 1 - rank, async_op=True))
            works.append(group.recv(got, 1 - rank, async_op=True))
            works.append(group.allreduce(last, async_op=True))
            for work in works:
                work.wait()
            assert all((x == size).all() for x in (*sums, last))
            assert (got == 2.0 - rank).all()


def test_sends_and_receives_pass_each_other_behind_the_queue(pool: RankPool) -> None:
    pool.run(2, crossed, fresh())


def overtaken(rank: int, size: int, name: str) -> None:
    """A call that has begun is never put behind another thread's, which would wait for its turn."""
    with own_group(rank, size, name, timeout_s=5.0) as group:
        data = [np.ones(3), np.ones(3)]
        group.allreduce(np.ones(3))
        group.barrier()
        if rank == 1:
            time.sleep(0.5)
            for x in data:
                group.allreduce(x)
        else:
            works: list[Work] = []
            issue = group._queue.issue

            def late(*arguments: object, first: bool = False) -> bool:
                if first:
                    group._queue.issue = issue
                    other = threading.Thread(
                        target=lambda: works.append(group.allreduce(data[1], async_op=True))
                    )
                    other.start()
                    other.join()
                return issue(*arguments, first=first)

            group._queue.issue = late
            works.append(group.allreduce(data[0], async_op=True))
            assert len(works) == 2
            for work in works:
                work.wait()
        assert all((x == size).all() for x in data)


def test_a_call_that_has_begun_is_not_overtaken(pool: RankPool) -> None:
    pool.run(2, overtaken, fresh())


def test_a_work_that_has_ended() -> None:
    work, told = EndedWork("sum"), list[Work]()
    work.add_done_callback(told.append)
    assert (work.wait(), work.done(), work.result(), told) == (None, True, "sum", [work])
    assert work.exception() is None


def drop_what_nobody_asks_about(rank: int, size: int, name: str) -> int:
    """Rank 0 issues a burst before rank 1 comes, and keeps nothing of it."""
    with own_group(rank, size, name) as group:
        group.allreduce(np.zeros(1))
        made: list[weakref.ref[np.ndarray]] = []
        if rank == 1:
            time.sleep(0.3)
        for _ in range(500):
            array = np.zeros(8)
            made.append(weakref.ref(array))
            group.allreduce(array, async_op=True)
        del array
        native = group._engine.queue._native
        assert native.wait(native.issued(), 20.0)
        deadline = time.monotonic() + 5
        while (
            alive := sum(ref() is not None for ref in made)
        ) > 15 and time.monotonic() < deadline:
            time.sleep(0.01)
        return alive


def test_calls_that_nobody_asks_about_let_go_of_their_tensors(pool: RankPool) -> None:
    assert max(pool.run(2, drop_what_nobody_asks_about, fresh())) <= 15


def call_from_a_finalizer(rank: int, size: int, name: str) -> list[str]:
    """A tensor that is let go of when its call is awaited calls the group."""
    found: list[str] = []

    def call(group: col.Group) -> None:
        try:
            group.barrier()
        except col.CollectiveError as error:
            found.append(str(error))

    with own_group(rank, size, name) as group:
        group.allreduce(np.zeros(1))
        if rank == 1:
            time.sleep(0.2)
        array = np.zeros(8)
        if rank == 0:  # the late one's call ends at once
            weakref.finalize(array, call, group)
        group.allreduce(array, async_op=True)
        del array
        group.allreduce(np.zeros(8), async_op=True).wait(10)
        group.allreduce(np.zeros(1))
    return found


@pytest.mark.timeout(60)
def test_a_finalizer_that_calls_while_a_call_is_awaited_is_refused(pool: RankPool) -> None:
    results = pool.run(2, call_from_a_finalizer, fresh(), timeout_s=30)
    assert len(results[0]) == 1
    assert "__del__" in results[0][0]


def leave_a_done_callback(rank: int, size: int, name: str) -> None:
    """A callback raises what ends a thread; what comes after it in the queue is done all the same."""

    def leave(_: object) -> None:
        raise SystemExit(3)

    with own_group(rank, size, name) as group:
        group.allreduce(np.zeros(1))
        if rank == 1:
            time.sleep(0.2)
        work = group.allreduce(np.zeros(8), async_op=True)
        if rank == 0:  # the late one's call has ended, so that it would be called at once
            work.add_done_callback(leave)
        time.sleep(0.5 * (1 - rank))
        group.barrier()
        if rank == 1:
            time.sleep(0.2)
        for _ in range(3):
            group.allreduce(np.zeros(8), async_op=True).wait(10)
        group.allreduce(np.zeros(8))


def test_a_done_callback_that_raises_systemexit_ends_no_queue(pool: RankPool) -> None:
    pool.run(2, leave_a_done_callback, fresh(), timeout_s=30)
