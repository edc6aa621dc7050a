"""Every operation between hosts, simulated on this one: several ranks on each, uneven numbers, ranks interleaved.

The cases are those of the other modules, over the hierarchical backend.
"""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from oracle import Array, combined, in_another_order, numpy_dtype, reduced
from pool import RankPool
from samples import Sample, dense
from test_asynchronous import every_operation, order_of_issue, threads_on_one_group
from test_containers import average_of_halves, sum_containers
from test_groups import exchange_objects, forked_child, ranks_belong_to_their_group, split_every_way
from test_layouts import work_on_layouts
from test_moves import gather_in_place, move_all, move_from_every_root, move_large
from test_reductions import (
    accumulate_halves,
    allreduce_all,
    reduce_all,
    reduce_specials,
    reducescatter_all,
)
from test_stacks import work_on_stacks
from test_zero_copy import addresses_stay, nothing_is_kept, refuse_copies
from worlds import Report, World, assert_same_bits, stop_tracing

import colltensor as col
from colltensor.backends import is_available, reason

pytestmark = [
    pytest.mark.gloo,
    pytest.mark.skipif(not is_available("shm"), reason=str(reason("shm"))),
]

PLACEMENTS = ("aabb", "abb", "aaab", "abab", "abcbb")
"""The host of each rank."""

NUMPY = ("numpy",)
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "allreduce": (allreduce_all, (NUMPY,)),
    "reduce": (reduce_all, (NUMPY,)),
    "reducescatter": (reducescatter_all, (NUMPY,)),
    "special values": (reduce_specials, (NUMPY,)),
    "moves": (move_all, (NUMPY, 0)),
    "moves of other sizes": (move_all, (NUMPY, 3)),
    "moves from every root": (move_from_every_root, ()),
    "moves of many megabytes": (move_large, (NUMPY,)),
    "layouts": (work_on_layouts, (NUMPY,)),
    "gather in place": (gather_in_place, ()),
    "stacks": (work_on_stacks, (NUMPY,)),
    "containers": (sum_containers, ()),
    "fused halves": (average_of_halves, ()),
    "objects": (exchange_objects, ()),
    "split": (split_every_way, ()),
    "ranks of a part": (ranks_belong_to_their_group, ()),
    "asynchronous": (every_operation, (NUMPY,)),
    "order of issue": (order_of_issue, ()),
    "threads": (threads_on_one_group, ()),
    "addresses": (addresses_stay, ("numpy",)),
    "nothing kept": (nothing_is_kept, ("numpy",)),
}
BITS = ("allreduce", "special values", "layouts")
"""The cases that return digests, to be equal on all ranks."""
SLOW = ("moves of many megabytes",)
"""The cases that run where hosts are uneven only; the small blocks take the same ways everywhere."""


def world_of(hosts: str, provider: str) -> World:
    return World(len(hosts), "hierarchical", provider, hosts)


def in_order_of_hosts(
    rank: int, world_size: int, world: World, function: Callable[..., Any], *arguments: Any
) -> Any:
    with in_another_order():
        return function(rank, world_size, world, *arguments)


@pytest.mark.parametrize(
    ("hosts", "case"),
    [(hosts, case) for hosts in PLACEMENTS for case in CASES if case not in SLOW or hosts == "abb"],
)
def test_every_case(pool: RankPool, provider: str, hosts: str, case: str) -> None:
    function, arguments = CASES[case]
    results = pool.run(
        len(hosts), in_order_of_hosts, world_of(hosts, provider), function, *arguments, timeout_s=90
    )
    if case in BITS:
        assert_same_bits(results)


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    """Cut buffers into slices of 4 KiB, so that a few elements take the way of many."""
    from colltensor.backends.hierarchical import reductions, shards

    before = shards.SHARD_NBYTES, reductions.LEADER_NBYTES
    shards.SHARD_NBYTES, reductions.LEADER_NBYTES = 4096, 0  # type: ignore[misc]
    try:
        yield
    finally:
        shards.SHARD_NBYTES, reductions.LEADER_NBYTES = before  # type: ignore[misc]


def in_small_blocks(
    rank: int, world_size: int, world: World, function: Callable[..., Any], *arguments: Any
) -> Any:
    with small_blocks(), in_another_order():
        return function(rank, world_size, world, *arguments)


@pytest.mark.parametrize(
    "case", ["allreduce", "reduce", "special values", "moves", "moves of other sizes", "layouts"]
)
@pytest.mark.parametrize("hosts", PLACEMENTS)
def test_every_case_in_small_blocks(pool: RankPool, provider: str, hosts: str, case: str) -> None:
    function, arguments = CASES[case]
    results = pool.run(
        len(hosts), in_small_blocks, world_of(hosts, provider), function, *arguments, timeout_s=90
    )
    if case in BITS:
        assert_same_bits(results)


def reduce_many_blocks(
    rank: int, world_size: int, world: World, dtype: str, op: str
) -> dict[str, str]:
    """A count that leaves something over, of more than a block."""
    group = world.group()
    report = Report(group)
    count = (17 << 20) // numpy_dtype(dtype).itemsize + 5
    inputs: list[Array] = [reduced(dtype, count, peer) for peer in range(world_size)]
    with in_another_order():
        expected, tolerance = combined(dtype, op, inputs)
    with report.case("allreduce", dtype, op) as name:
        sample = Sample("numpy", dtype, dense(count), inputs[rank])
        got = sample.check_result(
            group.allreduce(sample.tensor, col.ReduceOp[op]), expected, tolerance
        )
        report.same_everywhere(name, got.tobytes())
    for root in (0, world_size - 1):
        with report.case("reduce", dtype, op, "to", root):
            sample = Sample("numpy", dtype, dense(count), inputs[rank])
            group.reduce(sample.tensor, root, col.ReduceOp[op])
            if rank == root:
                sample.check_result(sample.tensor, expected, tolerance)
            else:
                sample.check_untouched()
    return report.done()


@pytest.mark.parametrize(
    ("hosts", "dtype", "op"),
    [
        *((hosts, "float32", "SUM") for hosts in PLACEMENTS),
        *((hosts, "int16", "MAX") for hosts in ("aabb", "abcbb")),
        # numpy takes seconds for what is expected
        *((hosts, "bfloat16", "AVERAGE") for hosts in ("abb", "abab")),
    ],
)
def test_more_than_one_block(
    pool: RankPool, provider: str, hosts: str, dtype: str, op: str
) -> None:
    reports = pool.run(
        len(hosts), reduce_many_blocks, world_of(hosts, provider), dtype, op, timeout_s=90
    )
    assert_same_bits(reports)


@pytest.mark.parametrize("hosts", ["aabb", "abab", "aaab"])
def test_halves_accumulate_in_float32(pool: RankPool, provider: str, hosts: str) -> None:
    for found in pool.run(4, accumulate_halves, world_of(hosts, provider)):
        assert found == [[2050.0] * 2] * 2 + [[258.0] * 2] * 2


@pytest.mark.parametrize("hosts", ["aabb", "abb"])
def test_copy_false_refuses_staging(pool: RankPool, provider: str, hosts: str) -> None:
    for found in pool.run(len(hosts), refuse_copies, world_of(hosts, provider)):
        assert found == [
            *(
                f"strided {what}: refused"
                for what in ("allreduce", "broadcast", "leaf", "entry", "source")
            ),
            "emulated allreduce: refused",
            "emulated reduce: refused",
        ]


def memory_of_second_calls(rank: int, world_size: int, world: World) -> dict[str, int]:
    """Return the peak of Python's and numpy's allocations in bytes."""
    group = world.group()
    arrays = [np.full(2 << 20, rank + entry, np.float32) for entry in range(world_size + 1)]
    calls: dict[str, Callable[[], Any]] = {
        "allreduce": lambda: group.allreduce(arrays[0]),
        "reduce": lambda: group.reduce(arrays[0], 1),
        "broadcast": lambda: group.broadcast(arrays[0]),
        "allgather": lambda: group.allgather(arrays[1:], arrays[0]),
    }
    peaks = {}
    for name, call in calls.items():
        call()
        tracemalloc.start()
        call()
        peaks[name] = tracemalloc.get_traced_memory()[1]
        stop_tracing()
    return peaks


@pytest.mark.parametrize("hosts", ["aabb", "abb"])
def test_memory_is_kept_for_the_next_call(pool: RankPool, provider: str, hosts: str) -> None:
    for peaks in pool.run(len(hosts), memory_of_second_calls, world_of(hosts, provider)):
        assert all(peak < 100_000 for peak in peaks.values()), peaks


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_child_does_not_own_the_group(pool: RankPool, provider: str) -> None:
    pool.run(4, forked_child, world_of("aabb", provider))


def sums_of_floats(rank: int, world_size: int, world: World) -> list[Array]:
    group = world.group()
    given = [
        np.float32(np.sin(np.arange(300_001) * 1.3 + peer * 2.1)) * 10 ** (peer % 3)
        for peer in range(world_size)
    ]
    total = given[rank].copy()
    group.allreduce(total)
    again = given[rank].copy()
    group.allreduce(again)
    assert total.tobytes() == again.tobytes()
    return [total, *given]


@pytest.mark.parametrize("hosts", ["aabb", "abab"])
def test_sums_are_of_the_hosts_sums(pool: RankPool, provider: str, hosts: str) -> None:
    """Bit by bit: the ranks of a host in their order, then the hosts in theirs."""
    for total, *given in pool.run(4, sums_of_floats, world_of(hosts, provider)):
        first, second = (
            [given[rank] for rank, host in enumerate(hosts) if host == name] for name in "ab"
        )
        assert total.tobytes() == ((first[0] + first[1]) + (second[0] + second[1])).tobytes()
