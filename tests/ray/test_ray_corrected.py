"""What ``ray.util.collective`` 2.60 gets wrong, each seen by running it: here, one test each, that it is right.

Where one of its calls gave an error or killed a worker, the group must work afterwards.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import ray
from crew import Crew, Member, errors_of, join, kill_process, leave, named_actors, new_name, outcome

import colltensor as col

Spawn = Callable[..., Any]


def total(rank: int, name: str) -> list[float]:
    return col.allreduce(np.full(2, rank + 1.0), name).tolist()


def assert_group_works(crew: Crew, world_size: int, name: str) -> None:
    assert crew.run(world_size, total, name) == [[sum(range(world_size + 1))] * 2] * world_size


def test_gloo_timeout_bounds_the_wait_for_a_missing_peer(crew: Crew) -> None:
    began = time.monotonic()
    error = outcome(crew.actors[0].run.remote(join, 0, 2, new_name(), gloo_timeout=1500))
    assert isinstance(error, col.CollectiveTimeoutError)
    assert error.ranks == (1,)
    assert 1.5 <= time.monotonic() - began < 10


def test_gloo_timeout_bounds_every_operation(crew: Crew) -> None:
    with crew.group(2):
        pass  # now Gloo's provider is imported, for which the next group has little time
    with crew.group(2, gloo_timeout=1500) as name:
        began = time.monotonic()
        error = outcome(crew.actors[0].run.remote(total, 0, name))
        assert isinstance(error, col.CollectiveTimeoutError)
        assert error.ranks == (1,)
        assert 1.5 <= time.monotonic() - began < 10


def broadcast_own(rank: int, name: str, src_rank: int) -> float:
    return float(col.broadcast(np.full(3, 100.0 + rank), src_rank, name)[0])


def test_src_rank_is_a_rank_of_this_group(crew: Crew) -> None:
    """In the second group the ranks are others than in the first."""
    with crew.group(3) as first:
        second = new_name()
        group = col.create_collective_group([crew.actors[2], crew.actors[1]], group_name=second)
        assert crew.run(3, broadcast_own, first, 0) == [100.0] * 3
        for src_rank, whose in ((0, 102.0), (1, 101.0)):
            calls = [
                crew.actors[rank].run.remote(broadcast_own, rank, second, src_rank)
                for rank in (1, 2)
            ]
            assert ray.get(calls, timeout=60) == [whose] * 2
        error = outcome(crew.actors[1].run.remote(broadcast_own, 1, second, 2))
        assert isinstance(error, col.RankError)
        group.destroy()


def test_a_group_of_some_of_the_workers(crew: Crew) -> None:
    name = new_name()
    some = [crew.actors[1], crew.actors[3]]
    ray.get([actor.run.remote(join, rank, 2, name) for rank, actor in enumerate(some)], timeout=60)
    calls = [actor.run.remote(total, rank, name) for rank, actor in ((1, some[0]), (3, some[1]))]
    assert ray.get(calls, timeout=60) == [[6.0, 6.0]] * 2
    ray.get([actor.run.remote(leave, rank, name) for rank, actor in enumerate(some)], timeout=60)


def test_groups_of_different_world_sizes(crew: Crew) -> None:
    with crew.group(2) as two, crew.group(4) as four, crew.group(1) as one, crew.group(3) as three:
        for _ in range(2):
            for world_size, name in ((4, four), (1, one), (3, three), (2, two)):
                assert_group_works(crew, world_size, name)


def test_a_group_is_made_again_after_an_actor_died(crew: Crew, spawn: Spawn) -> None:
    name = new_name()
    mortal = spawn(Member)
    col.create_collective_group([mortal, crew.actors[0]], group_name=name)
    kill_process(mortal, ray.get(mortal.pid.remote(), timeout=60))
    error = outcome(crew.actors[0].run.remote(total, 1, name))
    assert isinstance(error, col.PeerLostError)
    assert error.ranks == (0,)
    crew.run(1, leave, name)
    group = col.create_collective_group(crew.actors[:2], group_name=name)
    assert_group_works(crew, 2, name)
    group.destroy()


def test_no_named_actor_is_left(crew: Crew) -> None:
    with crew.group(2):
        assert named_actors() == []
    name = new_name()
    crew.run(2, join, 2, name)
    assert named_actors() == []
    crew.run(2, leave, name)


def sum_strided(rank: int, name: str) -> None:
    memory = np.arange(24, dtype=np.float64).reshape(4, 6) * (rank + 1)
    expected = memory.copy()
    for part in (np.s_[::2, 1::3], np.s_[::-1, 2], np.s_[3, 0:6:5]):
        expected[part] = np.arange(24.0).reshape(4, 6)[part] * 3
        found = col.allreduce(memory[part], name)
        np.testing.assert_array_equal(found, expected[part])
        np.testing.assert_array_equal(memory, expected)


def test_memory_between_the_elements_of_a_strided_array(crew: Crew) -> None:
    with crew.group(2) as name:
        crew.run(2, sum_strided, name)


def write_to_the_store(rank: int, name: str, references: list[Any]) -> str:
    array = ray.get(references[0])
    assert not array.flags.writeable
    spare = np.zeros_like(array)
    for call in (
        lambda: col.allreduce(array, name),
        lambda: col.broadcast(array, 1 - rank, name),
        lambda: col.recv(array, 1 - rank, name),
        lambda: col.allgather([spare, array], spare.copy(), name),
        lambda: col.reducescatter(array, [spare, spare], name),
    ):
        with pytest.raises(col.ReadOnlyError, match=r"\bcopy\(\)"):
            call()
    return str(np.asarray(ray.get(references[0])).sum())


def read_the_store(rank: int, name: str, references: list[Any]) -> tuple[float, float]:
    """Read-only arrays are good wherever a call only reads them."""
    array = ray.get(references[0])
    found = col.broadcast(array if rank == 0 else np.zeros_like(array), 0, name)
    gathered = [np.zeros_like(array) for _ in range(2)]
    col.allgather(gathered, array, name)
    return float(found.sum()), float(np.sum(gathered))


def test_read_only_arrays_of_the_object_store(crew: Crew) -> None:
    content = np.arange(100_000, dtype=np.float64)
    reference = ray.put(content)
    with crew.group(2) as name:
        assert crew.run(2, write_to_the_store, name, [reference]) == [str(content.sum())] * 2
        assert (
            crew.run(2, read_the_store, name, [reference])
            == [(content.sum(), 2 * content.sum())] * 2
        )
        assert_group_works(crew, 2, name)
    np.testing.assert_array_equal(ray.get(reference), content)


def disagree(
    rank: int, name: str, arrays: list[np.ndarray[Any, Any]], ops: list[col.ReduceOp]
) -> None:
    """Call with this rank's array and op; whatever happens, the array stays as it was."""
    array = arrays[rank].copy()
    try:
        col.allreduce(array, name, ops[rank])
    finally:
        np.testing.assert_array_equal(array, arrays[rank])


FLOATS = np.arange(4, dtype=np.float32)
DISAGREEMENTS = {
    "float32 against int32": (
        [FLOATS, FLOATS.astype(np.int32)],
        [col.ReduceOp.SUM] * 2,
        ("float32", "int32"),
    ),
    "MAX against SUM": ([FLOATS, FLOATS], [col.ReduceOp.MAX, col.ReduceOp.SUM], ("MAX", "SUM")),
    "shape 4 against 8": (
        [FLOATS, np.arange(8, dtype=np.float32)],
        [col.ReduceOp.SUM] * 2,
        ("4", "8"),
    ),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_ranks_that_disagree(crew: Crew, case: str) -> None:
    arrays, ops, words = DISAGREEMENTS[case]
    with crew.group(2) as name:
        pids = ray.get([actor.pid.remote() for actor in crew.actors[:2]])
        for error in errors_of(crew.outcomes(2, disagree, name, arrays, ops), col.MismatchError):
            assert error.ranks == (1,)
            assert all(word in str(error) for word in words)
        assert ray.get([actor.pid.remote() for actor in crew.actors[:2]]) == pids
        assert_group_works(crew, 2, name)


def test_a_world_size_that_is_not_the_number_of_actors(crew: Crew) -> None:
    for world_size in (1, 3):
        with pytest.raises(col.RankError, match=rf"world_size: .*\b2, .*\b{world_size}$"):
            col.create_collective_group(crew.actors[:2], world_size, [0, 1], "gloo", new_name())


def work_while_meeting(rank: int, name: str, awaited: str, other: str) -> None:
    """On rank 0, use a group, make and destroy another, all while a thread waits for the other rank to come."""
    waiting = threading.Thread(target=join, args=(0, 2, awaited))
    if rank == 0:
        waiting.start()
        time.sleep(0.5)
    total(rank, name)
    join(rank, 2, other)
    total(rank, other)
    leave(rank, other)
    is_waiting = waiting.is_alive()
    col.barrier(name)
    if rank == 0:
        assert is_waiting
        waiting.join()
    else:
        join(1, 2, awaited)
    total(rank, awaited)
    leave(rank, awaited)


def test_no_lock_is_held_during_a_rendezvous(crew: Crew) -> None:
    with crew.group(2) as name:
        crew.run(2, work_while_meeting, name, new_name(), new_name())


def reduce_and_scatter(rank: int, name: str) -> list[list[float]]:
    blocks = [np.full(3, 10.0 * rank + block) for block in range(2)]
    target = col.reducescatter(np.zeros(3), blocks, name)
    assert target.tolist() == [10.0 + 2 * rank] * 3
    return [block.tolist() for block in blocks]


def test_reducescatter_leaves_its_inputs_alone(crew: Crew) -> None:
    with crew.group(2) as name:
        assert crew.run(2, reduce_and_scatter, name) == [
            [[10.0 * r] * 3, [10.0 * r + 1] * 3] for r in range(2)
        ]


def change_ops(rank: int, name: str) -> list[float]:
    """Every operation with an op, then without."""
    maximum = col.ReduceOp.MAX
    for _ in range(2):
        found = [
            col.allreduce(np.array([rank + 1.0]), name, maximum),
            col.allreduce(np.array([rank + 1.0]), name),
            col.reduce(np.array([rank + 1.0]), 0, name, maximum),
            col.reduce(np.array([rank + 1.0]), 0, name),
            col.reducescatter(np.zeros(1), [np.array([rank + 1.0])] * 2, name, maximum),
            col.reducescatter(np.zeros(1), [np.array([rank + 1.0])] * 2, name),
        ]
    return [float(array[0]) for array in found]


def test_the_op_of_one_call_is_not_the_default_of_the_next(crew: Crew) -> None:
    with crew.group(2) as name:
        found = crew.run(2, change_ops, name)
    assert found == [[2.0, 3.0, 2.0, 3.0, 2.0, 3.0], [2.0, 3.0, 2.0, 2.0, 2.0, 3.0]]


def gather_into_one_array(rank: int, name: str) -> None:
    target = np.zeros(4)
    for outputs in ([target, target], [target[:3], target[1:]], [target[1:], target[:3]]):
        with pytest.raises(col.AliasError):
            col.allgather(outputs, np.ones(outputs[0].size), name)
    assert target.tolist() == [0.0] * 4
    source = np.full(2, rank + 1.0)
    outputs = [target[:2], target[2:]]
    col.allgather(outputs, source, name)
    assert target.tolist() == [1.0, 1.0, 2.0, 2.0]


def test_outputs_that_share_memory(crew: Crew) -> None:
    with crew.group(2) as name:
        crew.run(2, gather_into_one_array, name)
        assert_group_works(crew, 2, name)


def sum_of_jax_arrays(rank: int, name: str) -> tuple[str, list[float]]:
    import jax.numpy as jnp

    array = jnp.arange(3.0) + rank
    found = col.allreduce(array, name)
    assert array.tolist() == [rank, rank + 1.0, rank + 2.0]
    return type(found).__module__.partition(".")[0], found.tolist()


@pytest.mark.needs("jax")
def test_jax_arrays_are_accepted(crew: Crew) -> None:
    with crew.group(2) as name:
        assert crew.run(2, sum_of_jax_arrays, name) == [("jaxlib", [1.0, 3.0, 5.0])] * 2
