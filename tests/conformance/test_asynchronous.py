"""Work: order, waiting, results, errors, and threads that share groups."""

from __future__ import annotations

import functools
import threading
import time
from typing import Any

import numpy as np
import pytest
from pool import RankPool
from samples import Sample, as_numpy, dense
from worlds import World

import colltensor as col


def order_of_issue(rank: int, world_size: int, world: World) -> None:
    """The operations do not commute: only the order of issue gives these numbers."""
    group = world.group()
    x = np.full(4, rank + 1.0)
    works = []
    for _ in range(5):
        works.append(group.allreduce(x, async_op=True))
        works.append(group.broadcast(x, world_size - 1, async_op=True))
    group.allreduce(x)  # synchronous, behind those ten
    assert all(work.done() for work in works)
    works.append(group.allreduce(x, col.ReduceOp.AVERAGE, async_op=True))
    assert works[-1].result() is x
    assert works[0].result() is x
    assert x.tolist() == [sum(range(1, world_size + 1)) * world_size**5] * 4


def test_operations_run_in_the_order_of_issue(pool: RankPool, world: World) -> None:
    pool.run(world.size, order_of_issue, world)


def every_operation(rank: int, world_size: int, world: World, libraries: tuple[str, ...]) -> None:
    group = world.group()

    def array(value: float) -> Any:
        return Sample(
            libraries[rank % len(libraries)], "float32", dense(3), np.full(3, value, np.float32)
        ).tensor

    total = sum(range(1, world_size + 1))
    works = {
        "allreduce": (group.allreduce(array(rank + 1), async_op=True), total),
        "reduce": (
            group.reduce(array(rank + 1), 0, async_op=True),
            total if rank == 0 else rank + 1,
        ),
        "broadcast": (group.broadcast(array(rank + 1), 0, async_op=True), 1),
        "scatter": (
            group.scatter(
                array(0),
                [array(peer) for peer in range(world_size)] if rank == 0 else None,
                async_op=True,
            ),
            rank,
        ),
        "reducescatter": (
            group.reducescatter(
                array(0), [array(peer) for peer in range(world_size)], async_op=True
            ),
            rank * world_size,
        ),
    }
    lists = {
        "allgather": group.allgather(
            [array(0) for _ in range(world_size)], array(rank), async_op=True
        ),
        "alltoall": group.alltoall(
            [array(0) for _ in range(world_size)],
            [array(rank) for _ in range(world_size)],
            async_op=True,
        ),
    }
    if world_size > 1:
        before, after = (rank - 1) % world_size, (rank + 1) % world_size
        works["sendrecv"] = (
            group.sendrecv(array(rank), after, array(0), before, async_op=True),
            before,
        )
    for name, (work, expected) in works.items():
        assert isinstance(work, col.Work)
        assert as_numpy(work.result(), "float32").tolist() == [expected] * 3, name
        assert work.done()
    for name, work in lists.items():
        assert [float(as_numpy(entry, "float32")[0]) for entry in work.result()] == list(
            range(world_size)
        ), name


def test_every_operation_runs_asynchronously(
    pool: RankPool, world: World, arrays: tuple[str, ...]
) -> None:
    pool.run(world.size, every_operation, world, arrays)


def waits_and_timeouts(rank: int, world_size: int, world: World) -> None:
    group = world.group()
    side = group.split(0)
    x = np.full(3, rank + 1.0)
    if rank == 0:
        work = group.allreduce(x, async_op=True)
        began = time.monotonic()
        with pytest.raises(col.CollectiveTimeoutError, match=r"allreduce: wait\(\).*0\.2 s"):
            work.wait(0.2)
        assert 0.15 < time.monotonic() - began < 5
        assert not work.done()
        give_up_again(work)
        side.barrier()
        work.wait()
        work.wait(0)
        assert work.result() is x
    else:
        side.barrier()  # only now do the others come
        group.allreduce(x)
    assert x.tolist() == [sum(range(1, world_size + 1))] * 3
    side.destroy()


def give_up_again(work: Any) -> None:
    """A wait that gave up changes nothing: giving up twice is no error of its own."""
    with pytest.raises(TimeoutError):
        work.wait(timeout_s=0.01)


def test_wait_gives_up_and_the_operation_goes_on(pool: RankPool, ranks: World) -> None:
    pool.run(ranks.size, waits_and_timeouts, ranks)


def errors_of_a_work(rank: int, world_size: int, world: World) -> None:
    group = world.group()
    x = np.full(3 + rank, 1.0)
    work = group.allreduce(x, async_op=True)
    for wait in (work.wait, work.result, work.wait):
        with pytest.raises(col.MismatchError):
            wait()
    assert work.done()
    assert x.tolist() == [1.0] * (3 + rank)
    with pytest.raises(col.UnsupportedTensorError):  # what is wrong here alone is said at the call
        group.allreduce("abc", async_op=True)
    assert group.allreduce(np.ones(1), async_op=True).result().tolist() == [world_size]


def test_a_work_that_failed_says_so_each_time(pool: RankPool, ranks: World) -> None:
    pool.run(ranks.size, errors_of_a_work, ranks)


def threads_on_one_group(rank: int, world_size: int, world: World) -> None:
    """Four threads a rank; each issues a hundred calls, in an order that a lock of ours makes the same on all ranks."""
    group = world.group()
    arrays = [np.full(2, thread + rank + 1.0) for thread in range(4)]
    turn = threading.Condition()
    state = {"next": 0}
    errors: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            for _ in range(25):
                with turn:
                    assert turn.wait_for(lambda: state["next"] % 4 == thread, 20)
                    issued = group.allreduce(arrays[thread], col.ReduceOp.MAX, async_op=True)
                    state["next"] += 1
                    turn.notify_all()
                issued.wait()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert not errors, errors
    assert [array.tolist() for array in arrays] == [
        [thread + float(world_size)] * 2 for thread in range(4)
    ]


def test_several_threads_on_one_group(pool: RankPool, world: World) -> None:
    pool.run(world.size, threads_on_one_group, world)


def threads_with_groups(rank: int, world_size: int, world: World) -> None:
    """One thread a group, at different paces on different ranks: no group waits for another.

    pygloo holds the GIL while a payload waits for its peers, so its groups must be used in one order on all ranks.
    """
    parent = world.group()
    groups = [parent.split(0, rank if number % 2 else -rank) for number in range(3)]
    results: dict[int, list[float]] = {}
    turn = threading.Condition()
    calls = [0]

    def my_turn(number: int) -> bool:
        return calls[0] % 3 == number

    def work(number: int) -> None:
        found = []
        for step in range(20):
            if (step + number + rank) % 7 == 0:
                time.sleep(0.005)
            x = np.full(3, float(number * 100 + step + rank))
            if world.provider != "pygloo":
                found.append(float(groups[number].allreduce(x)[0]))
                continue
            with turn:
                assert turn.wait_for(functools.partial(my_turn, number), 20)
                found.append(float(groups[number].allreduce(x)[0]))
                calls[0] += 1
                turn.notify_all()
        results[number] = found

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    base = sum(range(world_size))
    assert results == {
        number: [world_size * (number * 100 + step) + base for step in range(20)]
        for number in range(3)
    }
    for group in groups:
        group.destroy()


def test_several_groups_at_once(pool: RankPool, world: World) -> None:
    pool.run(world.size, threads_with_groups, world)


def groups_do_not_wait(rank: int, world_size: int, world: World) -> None:
    """Rank 1 comes to one group last of all; the other group's calls come through before that."""
    slow = world.group()
    quick = slow.split(0)
    work = None if rank == 1 else slow.allreduce(np.ones(1), async_op=True)
    for _ in range(10):
        quick.allreduce(np.ones(1))
    assert work is None or not work.done()
    quick.barrier()
    if work is None:
        slow.allreduce(np.ones(1))
    else:
        work.wait()
    quick.destroy()


def test_a_waiting_group_holds_up_no_other(pool: RankPool, ranks: World) -> None:
    pool.run(ranks.size, groups_do_not_wait, ranks)


def destroyed_while_waiting(rank: int, world_size: int, world: World) -> None:
    """The Work of a group that is destroyed fails; nobody hangs."""
    parent = world.group()
    group = parent.split(0)
    if rank == 0:
        first = group.allreduce(np.ones(3), async_op=True)
        second = group.allreduce(np.ones(3), async_op=True)
        time.sleep(0.1)
        group.destroy()
        for work in (first, second):
            with pytest.raises(col.CollectiveError):
                work.wait(20)
        with pytest.raises(col.GroupError, match="destroyed"):
            group.allreduce(np.ones(3))
    parent.barrier()
    group.destroy()


def test_destroying_a_group_fails_its_pending_works(pool: RankPool, ranks: World) -> None:
    pool.run(ranks.size, destroyed_while_waiting, ranks)
