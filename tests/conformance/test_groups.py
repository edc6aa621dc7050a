"""Objects, splits, many groups, groups made again, and forked children."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import RankPool
from worlds import Report, World

import colltensor as col


@dataclass
class Note:
    """Something of the user's to send."""

    text: str
    values: dict[str, Any]


def exchange_objects(rank: int, world_size: int, world: World) -> None:
    group = world.group()
    mine = Note(f"from {rank}", {"rank": rank, "array": np.arange(rank + 2)})
    everyone = group.allgather_object(mine)
    assert everyone[rank] is mine
    assert [note.text for note in everyone] == [f"from {peer}" for peer in range(world_size)]
    assert [len(note.values["array"]) for note in everyone] == [
        peer + 2 for peer in range(world_size)
    ]
    for root in range(world_size):
        found = group.broadcast_object(mine if rank == root else None, root)
        assert found.text == f"from {root}"
        assert (found is mine) == (rank == root)
    big = group.broadcast_object(b"x" * 3_000_001 if rank == 0 else None)
    assert len(big) == 3_000_001
    assert group.allgather_object(None) == [None] * world_size
    assert col.broadcast_object(rank, world_size - 1, group.name) == world_size - 1
    assert col.allgather_object(rank, group.name) == list(range(world_size))


def test_objects(pool: RankPool, world: World) -> None:
    pool.run(world.size, exchange_objects, world)


def refuse_to_pickle(rank: int, world_size: int, world: World) -> None:
    """What cannot be pickled fails on the rank that has it, before anything is sent."""
    group = world.group()
    with pytest.raises((AttributeError, TypeError)):
        group.allgather_object(lambda: rank)
    assert group.allgather_object(rank) == list(range(world_size))


def test_objects_that_cannot_be_pickled(pool: RankPool, world: World) -> None:
    pool.run(world.size, refuse_to_pickle, world)


def split_every_way(rank: int, world_size: int, world: World) -> None:
    group = world.group()
    report = Report(group)
    with report.case("by parity"):
        part = group.split(rank % 2)
        members = [peer for peer in range(world_size) if peer % 2 == rank % 2]
        assert (part.rank, part.world_size) == (members.index(rank), len(members))
        assert float(part.allreduce(np.full(3, rank + 1.0))[0]) == sum(peer + 1 for peer in members)
        assert part.allgather_object(rank) == members
        part.destroy()
    with report.case("reversed by key"):
        part = group.split(7, -rank)
        assert part.rank == world_size - 1 - rank
        assert part.allgather_object(rank) == list(reversed(range(world_size)))
        x = np.full(2, float(rank))
        part.broadcast(x, 0)  # the part's rank 0
        assert x.tolist() == [world_size - 1.0] * 2
        part.destroy()
    with report.case("some ranks in none"):
        part = group.split(None if rank == 0 else 3, group_name="the rest")
        assert (part is None) == (rank == 0)
        if part is not None:
            assert part.name == "the rest"
            assert part.world_size == world_size - 1
            nested = part.split(0)
            part.destroy()
            assert float(nested.allreduce(np.ones(1))[0]) == world_size - 1
            nested.destroy()
    with report.case("nobody"):
        assert group.split(None) is None
    with report.case("each on its own"):
        part = group.split(rank)
        assert (part.rank, part.world_size, part.backend) == (0, 1, part.backend)
        assert part.allreduce(np.full(2, 5.0)).tolist() == [5.0, 5.0]
        part.destroy()
    with report.case("the whole still works"):
        assert float(group.allreduce(np.ones(2))[0]) == world_size
    report.done()


def test_split(pool: RankPool, world: World) -> None:
    pool.run(world.size, split_every_way, world)


def ranks_belong_to_their_group(rank: int, world_size: int, world: World) -> None:
    """src_rank is the group's own, also where a process has another rank in another group."""
    group = world.group()
    backwards = group.split(0, -rank)
    x, y = np.full(2, float(rank)), np.full(2, float(rank))
    group.broadcast(x, 0)
    backwards.broadcast(y, 0)
    assert (x[0], y[0]) == (0, world_size - 1)
    assert col.get_rank(group.name) == rank
    assert col.get_collective_group_size(group.name) == world_size
    assert col.get_group_handle(group.name) is group
    backwards.destroy()


def test_ranks_belong_to_their_group(pool: RankPool, world: World) -> None:
    pool.run(world.size, ranks_belong_to_their_group, world)


def make_and_destroy(rank: int, world_size: int, world: World, url: str) -> None:
    for round_number in range(3):
        assert not col.is_group_initialized("again")
        group = col.init_collective_group(
            world_size,
            rank,
            world.backend,
            "again",
            init_method=url,
            provider=world.provider,
            timeout_s=20,
        )
        assert col.is_group_initialized("again")
        assert float(col.allreduce(np.full(2, rank + round_number), "again")[0]) == (
            sum(range(world_size)) + round_number * world_size
        )
        assert group.timeout_s == 20
        group.barrier()
        col.destroy_collective_group("again")
        col.destroy_collective_group("again")
        group.destroy()
        assert col.get_rank("again") == -1
        assert col.get_collective_group_size("again") == -1


def test_groups_are_made_again_under_one_name(pool: RankPool, world: World) -> None:
    url = f"file://{pool.folder / 'rendezvous'}"
    pool.run(world.size, make_and_destroy, world, url)


def wait_for_ever(rank: int, world_size: int, world: World, url: str) -> None:
    for timeout_s in (1e10, 1e300):
        group = col.init_collective_group(
            world_size,
            rank,
            world.backend,
            "patient",
            init_method=url,
            provider=world.provider,
            timeout_s=timeout_s,
        )
        tensor = np.full(3, float(rank))
        group.allreduce(tensor)
        group.allreduce([tensor, tensor.copy()], async_op=True).wait()
        group.barrier()
        assert tensor[0] == sum(range(world_size)) * world_size
        group.destroy()


def test_a_timeout_of_centuries(pool: RankPool, world: World, tmp_path: Path) -> None:
    pool.run(world.size, wait_for_ever, world, f"file://{tmp_path}")


@contextlib.contextmanager
def busy_thread(group: Any) -> Iterator[None]:
    """Have another thread hold the queue's lock, as the worker has it for a moment after each operation."""
    held, end = threading.Event(), threading.Event()

    def hold() -> None:
        with group._engine.queue._changed:
            held.set()
            end.wait(10.0)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10.0)
    try:
        yield
    finally:
        end.set()


def forked_child(rank: int, world_size: int, world: World) -> None:
    """A child refuses the parent's group, by every way to it, and exits; the parent's group goes on."""
    group = world.group()
    group.allreduce(np.ones(3))
    work = group.allreduce(np.ones(3), async_op=True)
    work.wait()
    reader, writer = os.pipe()
    with busy_thread(group):
        child = os.fork()
    if child == 0:
        try:
            words = []
            for call in (
                lambda: group.allreduce(np.ones(3)),
                group.barrier,
                lambda: group.allreduce(np.ones(3), async_op=True),
                lambda: col.allreduce(np.ones(3), group.name),
                lambda: group.allgather_object(1),
            ):
                try:
                    call()
                    words.append("it worked")
                except col.GroupError as error:
                    words.append("refused" if "fork" in str(error) else str(error))
            group.destroy()
            os.write(writer, ",".join(words).encode())
        finally:
            os._exit(0)
    os.close(writer)
    assert group.allreduce(np.full(2, rank + 1.0)).tolist() == [sum(range(1, world_size + 1))] * 2
    assert _exit_status(child) == 0
    with os.fdopen(reader) as lines:
        assert lines.read() == ",".join(["refused"] * 5)
    assert group.allreduce(np.full(2, 2.0)).tolist() == [2.0 * world_size] * 2


def _exit_status(child: int) -> int:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the forked child did not end")


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_child_does_not_own_the_groups(pool: RankPool, world: World) -> None:
    pool.run(world.size, forked_child, world)
