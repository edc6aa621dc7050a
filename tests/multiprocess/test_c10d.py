"""The torch.distributed backend: every operation beside Gloo's, DDP and FSDP2 beside both, failures, and the ends."""

from __future__ import annotations

import gc
import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from c10d_ranks import plain, values, world
from pool import RankPool, on_host

import colltensor as col

pytestmark = [pytest.mark.needs("torch"), pytest.mark.shm, pytest.mark.slow]

Case = Callable[[Any, Any, Any, int, int], Any]


def all_reduces(torch: Any, dist: Any, group: Any, rank: int, size: int) -> Any:
    found = []
    for dtype in (
        torch.float32,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.float16,
        torch.bfloat16,
    ):
        for op in (dist.ReduceOp.SUM, dist.ReduceOp.PRODUCT, dist.ReduceOp.MIN, dist.ReduceOp.MAX):
            tensor = values(torch, rank, dtype=dtype)
            dist.all_reduce(tensor, op, group=group)
            found.append(tensor)
    for op in (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR):
        tensor = values(torch, rank, dtype=torch.int32)
        dist.all_reduce(tensor, op, group=group)
        found.append(tensor)
    whole = torch.view_as_complex(values(torch, rank, 8).view(4, 2).clone())
    dist.all_reduce(whole, group=group)
    parameter = torch.nn.Parameter(values(torch, rank))
    dist.all_reduce(parameter, group=group)
    empty = torch.empty(0)
    dist.all_reduce(empty, group=group)
    scalar = torch.tensor(float(rank))
    dist.all_reduce(scalar, group=group)
    return [*found, whole, parameter.detach(), empty, scalar]


def asynchronous(torch: Any, dist: Any, group: Any, rank: int, size: int) -> Any:
    tensors = [values(torch, rank, 10 * (i + 1)) for i in range(8)]
    works = [dist.all_reduce(tensor, group=group, async_op=True) for tensor in tensors]
    works.append(dist.broadcast(tensors[0], src=1, group=group, async_op=True))
    future = works[3].get_future().then(lambda done: done.value()[0].sum())
    for work in reversed(works):
        assert work.wait(timedelta(seconds=10))
        assert (work.is_completed(), work.is_success(), work.exception()) == (True, True, None)
    assert works[2].result()[0].data_ptr() == tensors[2].data_ptr()
    dist.barrier(group=group, async_op=True).wait()
    return [*tensors, future.wait()]


def broadcasts(torch: Any, dist: Any, group: Any, rank: int, size: int) -> Any:
    tensors = [
        values(torch, rank, dtype=dtype)
        for dtype in (torch.float32, torch.bool, torch.int8, torch.complex64)
    ]
    for root, tensor in enumerate(tensors):
        dist.broadcast(tensor, src=root % size, group=group)
    objects = [{"rank": rank}, rank * "x"] if rank == 1 else [None, None]
    dist.broadcast_object_list(objects, src=1, group=group)
    return [*tensors, objects]


def reduces(torch: Any, dist: Any, group: Any, rank: int, size: int) -> Any:
    tensor = values(torch, rank)
    dist.reduce(tensor, dst=size - 1, op=dist.ReduceOp.MAX, group=group)
    return tensor if rank == size - 1 else None  # Gloo overwrites the others'


def gathers(torch: Any, dist: Any, group: Any, rank: int, size: int) -> Any:
    everywhere = [torch.empty(2, 3) for _ in range(size)]
    dist.all_gather(everywhere, values(torch, rank).view(2, 3), group=group)
    at_root = [torch.empty(6) for _ in range(size)] if rank == 1 else None
    dist.gather(values(torch, rank), at_root, dst=1, group=group)
    objects: list[Any] = [None] * size
    dist.all_gather_object(objects, {"from": rank, "long": "x" * (100 * rank)}, group=group)
    objects_at_root = [None] * size if rank == 0 else None
    dist.gather_object((rank,), objects_at_root, dst=0, group=group)
    single, stacked = torch.empty(size * 6), torch.empty(size * 2, 3)
    dist.all_gather_into_tensor(single, values(torch, rank), group=group)
    dist.all_gather_into_tensor(stacked, values(torch, rank).view(2, 3), group=group)
    within = torch.zeros(size * 4)
    part = within.narrow(0, 4 * rank, 4)
    part.copy_(values(torch, rank, 4))
    dist.all_gather_into_tensor(within, part, group=group)
    return [everywhere, at_root, objects, objects_at_root, single, stacked, within]


def scatters(torch: Any, dist: Any, group: Any, rank: int, size: int) -> Any:
    target = torch.empty(3)
    dist.scatter(
        target,
        [values(torch, r, 3) for r in range(size)] if rank == 2 else None,
        src=2,
        group=group,
    )
    objects: list[Any] = [None]
    dist.scatter_object_list(
        objects, [f"to {r}" for r in range(size)] if rank == 0 else None, src=0, group=group
    )
    chunks = list(values(torch, rank, 4 * size).view(size, 4))
    dist.scatter(chunks[rank], chunks if rank == 1 else None, src=1, group=group)
    return [target, objects, chunks]


def reduce_scatters(torch: Any, dist: Any, group: Any, rank: int, size: int) -> Any:
    target, single, rowwise = torch.empty(3), torch.empty(4), torch.empty(2, 5)
    dist.reduce_scatter(target, [values(torch, rank + r, 3) for r in range(size)], group=group)
    dist.reduce_scatter_tensor(single, values(torch, rank, 4 * size), group=group)
    dist.reduce_scatter_tensor(
        rowwise, values(torch, rank, 10 * size).view(2 * size, 5), group=group
    )
    uneven = torch.empty(rank + 1)
    dist.reduce_scatter(uneven, [values(torch, rank + r, r + 1) for r in range(size)], group=group)
    return [target, single, rowwise, uneven]


def all_to_alls(torch: Any, dist: Any, group: Any, rank: int, size: int) -> Any:
    even = torch.empty(2 * size, 2)
    dist.all_to_all_single(even, values(torch, rank, 4 * size).view(2 * size, 2), group=group)
    # rank 0 gives itself nothing
    given, taken = [rank + r for r in range(size)], [r + rank for r in range(size)]
    uneven = torch.empty(sum(taken), 3)
    dist.all_to_all_single(
        uneven, values(torch, rank, 3 * sum(given)).view(-1, 3), taken, given, group=group
    )
    mixed = torch.empty(size)  # one rank spells out what the others leave to be equal
    dist.all_to_all_single(
        mixed, values(torch, rank, size), [1] * size if rank else None, None, group=group
    )
    return [even, uneven, mixed]


def lists_to_all(torch: Any, dist: Any, group: Any, rank: int, size: int) -> Any:
    outputs = [torch.empty(3) for r in range(size)]
    dist.all_to_all(outputs, [values(torch, rank * 10 + r, 3) for r in range(size)], group=group)
    return outputs


def coalesced(torch: Any, dist: Any, group: Any, rank: int, size: int) -> Any:
    c10d = importlib.import_module("torch._C._distributed_c10d")
    several = [values(torch, rank, 3), values(torch, rank, 5)]
    group.allreduce_coalesced(several, c10d.AllreduceCoalescedOptions()).wait()
    outputs = [torch.empty(2 * size), torch.empty(size)]
    group.allgather_into_tensor_coalesced(
        outputs, [values(torch, rank, 2), values(torch, rank, 1)]
    ).wait()
    parts = [torch.empty(2), torch.empty(1)]
    options = c10d.ReduceScatterOptions()
    group.reduce_scatter_tensor_coalesced(
        parts, [values(torch, rank, 2 * size), values(torch, rank, size)], options
    ).wait()
    lists = [[torch.empty(2), torch.empty(3)] for _ in range(size)]
    group.allgather_coalesced(lists, [values(torch, rank, 2), values(torch, rank + 5, 3)]).wait()
    return [several, outputs, parts, lists]


def short_spellings(torch: Any, dist: Any, group: Any, rank: int, size: int) -> Any:
    tensor, other, third = values(torch, rank), values(torch, rank), values(torch, rank)
    group.allreduce(tensor, dist.ReduceOp.MAX).wait()
    group.allreduce([other], op=dist.ReduceOp.MIN, timeout=timedelta(seconds=9)).wait()
    group.broadcast(third, root=1).wait()
    outputs = [torch.empty(6) for _ in range(size)]
    group.allgather(outputs, values(torch, rank)).wait()
    part = torch.empty(2)
    group.reduce_scatter(
        part, [values(torch, rank + r, 2) for r in range(size)], dist.ReduceOp.SUM
    ).wait()
    group.barrier(timeout=timedelta(seconds=9)).wait()
    return [tensor, other, third, outputs, part, group.rank(), group.size()]


def sparse(torch: Any, dist: Any, group: Any, rank: int, size: int) -> Any:
    found = []
    # another number of elements on each rank, none on one, none at all
    for count in (rank + 1, rank, 0):
        place = torch.arange(count) * 2 % 5
        tensor = torch.sparse_coo_tensor(
            place[None], values(torch, rank, 3 * count).view(count, 3), (5, 3)
        )
        dist.all_reduce(tensor, group=group)
        found.append(tensor.to_dense())
    return found


def passed_round(torch: Any, dist: Any, group: Any, rank: int, size: int) -> Any:
    after, before = (rank + 1) % size, (rank - 1) % size
    found = []
    for first in (dist.isend, dist.irecv):  # all send first, then all receive first
        received = torch.empty(6)
        operations = [
            dist.P2POp(dist.isend, values(torch, rank), after, group=group),
            dist.P2POp(dist.irecv, received, before, group=group),
        ]
        if first is dist.irecv:
            operations.reverse()
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        found.append(received)
    strided = torch.zeros(6, 2)[:, 0] if rank % 2 else torch.zeros(6)
    request = dist.isend(values(torch, rank, 6), after, group=group)
    if not strided.is_contiguous() and type(group).__name__ == "ProcessGroup":
        strided = torch.zeros(6)  # Gloo takes no strided tensor
    assert dist.recv(strided, before, group=group) == before
    request.wait()
    return [*found, strided.contiguous()]


def lengths(torch: Any, dist: Any, group: Any, rank: int, size: int) -> Any:
    """Messages about as long as travel in their header, and longer ones, taken in another order than they are sent."""
    after, before = (rank + 1) % size, (rank - 1) % size
    counts = [0, 1, 511, 512, 513, 100_000]
    sends = [
        dist.isend(values(torch, rank, count), after, group=group, tag=count) for count in counts
    ]
    found = {count: torch.empty(count) for count in counts}
    for count in (513, 512, 0, 100_000, 1, 511):
        dist.recv(found[count], before, group=group, tag=count)
    for send in sends:
        send.wait()
    return list(found.values())


def tagged(torch: Any, dist: Any, group: Any, rank: int, size: int) -> Any:
    if rank == 0:
        sends = [
            dist.isend(values(torch, tag, count), 1, group=group, tag=tag)
            for tag, count in ((7, 5), (8, 3), (7, 5), (9, 0))
        ]
        dist.recv(answer := torch.empty(1), 1, group=group)
        for send in sends:
            send.wait()
        return answer
    if rank == 1:
        later, none, first, second = torch.empty(3), torch.empty(0), torch.empty(5), torch.empty(5)
        # sent after one with another tag, which nobody waits for yet
        dist.recv(later, 0, group=group, tag=8)
        dist.recv(none, 0, group=group, tag=9)
        dist.recv(first, 0, group=group, tag=7)
        dist.recv(second, 0, group=group, tag=7)
        dist.send(torch.ones(1), 0, group=group)
        return [later, none, first, second]
    return None


def from_anybody(torch: Any, dist: Any, group: Any, rank: int, size: int) -> Any:
    if rank:
        dist.send(values(torch, rank, 4), 0, group=group)
        return None
    found = {}
    for _ in range(size - 1):
        received = torch.empty(4)
        source = dist.recv(received, group=group)
        found[source] = received
    return [found[source] for source in sorted(found)]


CASES: list[Case] = [
    all_reduces,
    asynchronous,
    broadcasts,
    reduces,
    gathers,
    scatters,
    reduce_scatters,
    all_to_alls,
    lists_to_all,
    coalesced,
    short_spellings,
    sparse,
    passed_round,
    lengths,
    tagged,
    from_anybody,
]


def beside_gloo(
    rank: int, world_size: int, path: Path, transport: str = "shm"
) -> list[tuple[str, Any, Any]]:
    """Run every case on our backend and on Gloo, in one process."""
    with world(rank, world_size, path) as (torch, dist):
        ours, gloo = dist.new_group(), dist.new_group(backend="gloo")
        assert (ours.name(), ours._group.backend) == ("colltensor", transport)
        return [
            (
                case.__name__,
                *(plain(case(torch, dist, group, rank, world_size)) for group in (ours, gloo)),
            )
            for case in CASES
        ]


def on_two_hosts(rank: int, world_size: int, path: Path) -> list[tuple[str, Any, Any]]:
    with on_host(f"host {rank % 2}"):
        return beside_gloo(rank, world_size, path, "hierarchical")


@pytest.mark.parametrize("run", [beside_gloo, on_two_hosts])
def test_every_operation_gives_what_gloo_gives(pool: RankPool, tmp_path: Path, run: Any) -> None:
    for rank, results in enumerate(pool.run(3, run, tmp_path / "store")):
        assert [name for name, _, _ in results] == [case.__name__ for case in CASES]
        for name, ours, gloo in results:
            assert ours == gloo, f"{name} on rank {rank}"


def chained(rank: int, world_size: int, path: Path) -> list[float]:
    """Callbacks wait for operations issued before and after their own; works may be forgotten."""
    with world(rank, world_size, path) as (torch, dist):
        first, second, third = torch.ones(1 << 22), torch.full((1,), 2.0), torch.full((1,), 3.0)
        # still under way when it gets its callback
        long = dist.all_reduce(first, async_op=True).get_future()
        later = dist.all_reduce(second, async_op=True).get_future()

        def waits(done: Any) -> Any:
            nested = dist.all_reduce(third, async_op=True).get_future()
            return done.value()[0][0] + later.wait()[0] + nested.wait()[0]

        total = long.then(waits)
        found = total.wait().item()
        before = threading.active_count()
        for _ in range(50):
            dist.all_reduce(second, async_op=True).get_future().then(
                lambda done: done.value()
            ).wait()
        # threads that told of an end while others ran go when they have
        deadline = time.monotonic() + 5
        while threading.active_count() > before + 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threading.active_count() <= before + 1
        for _ in range(3):
            dist.all_reduce(second, async_op=True)
        if rank:
            dist.isend(third, 0)
        else:
            dist.recv(third, 1)
        return [found, third.item()]


def test_a_callback_may_wait_for_another_operation(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(2, chained, tmp_path / "store") == [[2.0 + 4.0 + 6.0, 6.0]] * 2


def test_no_file_is_left(pool: RankPool, tmp_path: Path) -> None:
    pool.run(2, ended, tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def ended(rank: int, world_size: int, path: Path) -> None:
    with world(rank, world_size, path) as (torch, dist):
        dist.all_reduce(torch.ones(1))


def beyond_gloo(rank: int, world_size: int, path: Path) -> list[Any]:
    with world(rank, world_size, path) as (torch, dist):
        average = values(torch, rank)
        dist.all_reduce(average, dist.ReduceOp.AVG)
        memory = torch.zeros(4, 2)
        memory[:, 0] = rank + 1
        dist.all_reduce(memory[:, 0])
        short = values(torch, rank, dtype=torch.int16)
        dist.all_reduce(short)
        eighth = values(torch, rank).to(torch.float8_e4m3fn)
        dist.broadcast(eighth, 1)
        uneven = [torch.empty(r + rank + 1) for r in range(world_size)]
        dist.all_to_all(
            uneven, [torch.full((r + rank + 1,), float(10 * rank + r)) for r in range(world_size)]
        )
        whole = values(torch, rank, 2 * world_size)
        dist.reduce_scatter_tensor(whole.narrow(0, 2 * rank, 2), whole)  # into the input itself
        with torch.inference_mode():
            inferred = torch.full((2,), float(rank))
        for async_op in (False, True):
            with torch.inference_mode():
                work = dist.all_reduce(inferred, async_op=async_op)
                if async_op:
                    work.wait()
        if rank < 2:
            (dist.send if rank else dist.recv)(inferred.view(2), 1 - rank)
        # torch's own functions refuse conjugate views, and Gloo sends what they are views of
        if rank < 2:
            conjugate = torch.full((3,), 1 + 2j).conj()
            taken = torch.zeros(3, dtype=conjugate.dtype)
            group = dist.group.WORLD
            (
                group.send([conjugate], 1, 0) if rank == 0 else group.recv([taken.conj()], 0, 0)
            ).wait()
            assert rank == 0 or taken.tolist() == [1 + 2j] * 3
        with pytest.raises(col.OptionError, match="PREMUL_SUM"):
            dist.all_reduce(torch.ones(2), torch._C._distributed_c10d._make_nccl_premul_sum(2.0))
        with pytest.raises(col.DeviceError, match="meta"):
            dist.all_reduce(torch.ones(2, device="meta"))
        with pytest.raises(col.RankError):
            dist.group.WORLD.send([torch.ones(2)], world_size, 0)
        with pytest.raises(col.ShapeError, match=rf"reduce_scatter: .*\b{rank + 1} .*\b7\b"):
            dist.reduce_scatter(torch.ones(7), [torch.ones(r + 1) for r in range(world_size)])
        dist.group.WORLD.monitored_barrier(timedelta(seconds=5))
        return plain(
            [average, memory, short, eighth.float(), uneven, whole.narrow(0, 2 * rank, 2), inferred]
        )


def test_what_gloo_does_not_take(pool: RankPool, tmp_path: Path) -> None:
    found = pool.run(3, beyond_gloo, tmp_path / "store")
    own = np.arange(6) % 4 + 1.0
    for rank, (average, memory, short, eighth, uneven, part, inferred) in enumerate(found):
        assert average[2] == (own + 1).tolist()
        assert memory[2] == [6.0, 0.0] * 4
        assert short[2] == (3 * own + 3).tolist()
        assert eighth[2] == (own + 1).tolist()
        assert [entry[2] for entry in uneven] == [
            [10.0 * r + rank] * (r + rank + 1) for r in range(3)
        ]
        assert part[2] == (3 * own + 3)[2 * rank : 2 * rank + 2].tolist()
        assert inferred[2] == [9.0, 9.0]


def averaging(rank: int, world_size: int, path: Path) -> list[Any]:
    with world(rank, world_size, path) as (torch, dist):
        found = []
        average = dist.ReduceOp.AVG
        for dtype in INTEGERS:
            low = -100 if getattr(torch, dtype).is_signed else 100
            own = torch.tensor([rank, 100, low + rank, 3 * rank + 1]).to(getattr(torch, dtype))
            everywhere, at_root, part = own.clone(), own.clone(), torch.empty(2, dtype=own.dtype)
            dist.all_reduce(everywhere, average)
            dist.reduce(at_root, 1, op=average)
            dist.reduce_scatter_tensor(part, own.repeat(world_size // 2), op=average)
            assert rank == 1 or torch.equal(at_root, own)
            assert rank != 1 or torch.equal(at_root, everywhere)
            strided = torch.zeros(4, 2, dtype=own.dtype)
            strided[:, 0] = own
            dist.all_reduce(strided[:, 0], average)
            assert torch.equal(strided[:, 0], everywhere)
            assert not strided[:, 1].any()
            uneven = torch.empty(rank + 1, dtype=own.dtype)
            dist.reduce_scatter(uneven, [own[: r + 1] for r in range(world_size)], average)
            assert torch.equal(uneven, everywhere[: rank + 1])
            found.append((everywhere.tolist(), part.tolist()))
        flags = torch.tensor([True, rank == 1, False])
        work = dist.all_reduce(flags, average, async_op=True)
        work.wait()
        mixed = [values(torch, rank), values(torch, rank, dtype=torch.int64)]
        opts = torch._C._distributed_c10d.AllreduceCoalescedOptions()
        opts.reduceOp = average  # torch's own function refuses several dtypes
        dist.group.WORLD.allreduce_coalesced(mixed, opts).wait()
        narrow = [torch.int8, torch.int32][rank % 2]
        for dtype, op in ((torch.int64, dist.ReduceOp.SUM if rank else average), (narrow, average)):
            kept = values(torch, rank, dtype=dtype)
            with pytest.raises(col.MismatchError):
                dist.all_reduce(kept, op)
            assert torch.equal(kept, values(torch, rank, dtype=dtype))
        with pytest.raises(col.ShapeError):
            dist.group.WORLD.reduce_scatter(
                [torch.ones(3, dtype=torch.int32)],
                [[torch.ones(2, dtype=torch.int32)] * world_size],
                op=average,
            ).wait()
        return [found, flags.tolist(), [entry.tolist() for entry in mixed]]


INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def test_integers_and_bools_are_averaged_as_nccl_averages_them(
    pool: RankPool, tmp_path: Path
) -> None:
    for rank, (found, flags, mixed) in enumerate(pool.run(4, averaging, tmp_path / "store")):
        for dtype, (everywhere, part) in zip(INTEGERS, found, strict=True):
            low = 101 if dtype.startswith("u") else -98  # -394 / 4, towards zero
            assert everywhere == [1, 100, low, 5]
            assert part == everywhere[rank % 2 * 2 :][:2]
        assert flags == [True, False, False]
        own = np.arange(6) % 4 + 2.5
        assert mixed == [own.tolist(), np.trunc(own).tolist()]


def received_over(rank: int, world_size: int, path: Path, count: int) -> None:
    """A tensor that autograd keeps is received over: what is derived from it would be wrong."""
    with world(rank, world_size, path) as (torch, dist):
        kept, weight = torch.ones(count), torch.ones(count, requires_grad=True)
        loss = (weight * kept).sum()
        if rank == 0:
            dist.send(kept, 1)
            loss.backward()
        else:
            dist.recv(kept, 0)
            with pytest.raises(RuntimeError, match="inplace"):
                loss.backward()


@pytest.mark.parametrize("count", [4, 4000])
def test_autograd_hears_of_what_was_received(pool: RankPool, tmp_path: Path, count: int) -> None:
    pool.run(2, received_over, tmp_path / "store", count)


def forgetful(rank: int, world_size: int, path: Path) -> int:
    """Return how many tensors are kept that were sent and received, and dropped."""
    with world(rank, world_size, path) as (torch, dist):
        alive = []
        for count in (3, 100_000) * 3:
            tensor = torch.ones(count)
            alive.append(weakref.ref(tensor))
            dist.recv(tensor, 1 - rank) if rank else dist.send(tensor, 1 - rank)
            work = dist.irecv(tensor, 1 - rank) if rank else dist.isend(tensor, 1 - rank)
            work.wait()
            del tensor, work
        until = time.monotonic() + 2.0  # the threads may still return from what they did
        while any(tensor() is not None for tensor in alive) and time.monotonic() < until:
            time.sleep(0.001)
        dist.barrier()
        return sum(tensor() is not None for tensor in alive)


def test_what_was_sent_and_received_is_not_kept(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(2, forgetful, tmp_path / "store") == [0, 0]


def disagreeing(rank: int, world_size: int, path: Path) -> list[float]:
    with world(rank, world_size, path) as (torch, dist):
        tensor = torch.ones(4 if rank else 5)
        with pytest.raises(col.MismatchError):
            dist.all_reduce(tensor)
        with pytest.raises(col.MismatchError):
            dist.all_reduce(tensor, async_op=True).wait()
        future = dist.all_reduce(tensor, async_op=True).get_future()
        with pytest.raises(RuntimeError, match="MismatchError"):
            future.wait()
        if rank:
            dist.send(torch.ones(3), 0)
        else:
            with pytest.raises(col.MismatchError, match="float64"):
                dist.recv(torch.ones(3, dtype=torch.float64), 1)
        if rank:
            dist.send(torch.full((3,), 2.0), 0)
            return []
        dist.recv(received := torch.ones(3), 1)  # and the two go on
        return [*received.tolist(), *tensor.tolist()]


def test_a_mismatch_is_an_error_on_all_ranks_and_the_group_goes_on(
    pool: RankPool, tmp_path: Path
) -> None:
    assert pool.run(2, disagreeing, tmp_path / "store")[0] == [2.0] * 3 + [1.0] * 5


def net(torch: Any) -> Any:
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 40),
        torch.nn.Tanh(),
        torch.nn.Linear(40, 40),
        torch.nn.Tanh(),
        torch.nn.Linear(40, 3),
    )


def train(torch: Any, model: Any, rank: int, steps: int = 3) -> list[Any]:
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 * step + rank)
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=generator)).square().mean().backward()
        optimizer.step()
    return list(model.parameters())


def data_parallel(rank: int, world_size: int, path: Path) -> list[tuple[Any, Any]]:
    with world(rank, world_size, path) as (torch, dist):
        hooks = importlib.import_module("torch.distributed.algorithms.ddp_comm_hooks.default_hooks")
        power = importlib.import_module("torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook")
        parallel = torch.nn.parallel.DistributedDataParallel
        found = []
        for case in ("plain", "buckets", "fp16", "power", "embedding"):
            both = []
            for group in (dist.new_group(), dist.new_group(backend="gloo")):
                model = net(torch)
                if case == "embedding":
                    model = torch.nn.Sequential(
                        torch.nn.Embedding(20, 6, sparse=True), torch.nn.Linear(6, 3)
                    )
                    torch.nn.init.constant_(model[0].weight, 0.1 * rank)  # DDP starts from rank 0's
                wrapped = parallel(
                    model, process_group=group, bucket_cap_mb=0.002 if case == "buckets" else 25
                )
                if case == "fp16":
                    wrapped.register_comm_hook(group, hooks.fp16_compress_hook)
                if case == "power":
                    state = power.PowerSGDState(
                        group, matrix_approximation_rank=1, start_powerSGD_iter=2
                    )
                    wrapped.register_comm_hook(state, power.powerSGD_hook)
                if case == "embedding":
                    wrapped(torch.tensor([rank, 3, 2 * rank + 1])).square().sum().backward()
                    both.append([p.grad.to_dense() for p in model.parameters()])
                else:
                    both.append(train(torch, wrapped, rank))
            found.append(
                (case, *(plain([tensor.detach() for tensor in tensors]) for tensors in both))
            )
        return found


def test_ddp_gives_the_bits_that_gloo_gives(pool: RankPool, tmp_path: Path) -> None:
    """With two ranks, whose sums have one order. PowerSGD waits for a collective in the callback of another."""
    first, second = pool.run(2, data_parallel, tmp_path / "store")
    for case, ours, gloo in first:
        assert ours == gloo, case
    assert [(case, ours) for case, ours, _ in first] == [(case, ours) for case, ours, _ in second]


def fully_sharded(rank: int, world_size: int, path: Path) -> list[Any]:
    with world(rank, world_size, path) as (torch, dist):
        fully_shard = importlib.import_module("torch.distributed.fsdp").fully_shard
        found = []
        for backend in ("colltensor", "gloo"):
            group = dist.new_group(backend=backend)
            mesh = dist.device_mesh.DeviceMesh.from_group(group, "cpu")
            model = net(torch)
            for layer in model:
                if isinstance(layer, torch.nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            found.append(
                [parameter.full_tensor().detach() for parameter in train(torch, model, rank)]
            )
        return plain([*found, one_process(torch, world_size)])


def one_process(torch: Any, world_size: int) -> list[Any]:
    """Train on the batches of all ranks together."""
    model = net(torch)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(3):
        seeds = [100 * step + rank for rank in range(world_size)]
        batch = torch.cat(
            [torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def test_fsdp2_trains_as_with_gloo_and_as_one_process(pool: RankPool, tmp_path: Path) -> None:
    for ours, gloo, alone in pool.run(2, fully_sharded, tmp_path / "store"):
        assert ours == gloo
        for (_, _, found), (_, _, expected) in zip(ours, alone, strict=True):
            np.testing.assert_allclose(found, expected, 1e-4, 1e-5)


def meshes(rank: int, world_size: int, path: Path) -> list[Any]:
    with world(rank, world_size, path, backend="colltensor") as (torch, dist):
        functional = importlib.import_module("torch.distributed._functional_collectives")
        tensors = importlib.import_module("torch.distributed.tensor")
        mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        along = values(torch, rank, 4)
        dist.all_reduce(along, group=mesh.get_group("b"))
        summed = functional.all_reduce(values(torch, rank, 4), "sum", mesh["a"]) + 0
        gathered = functional.all_gather_tensor(values(torch, rank, 2), 0, mesh["b"]) + 0
        scattered = (
            functional.reduce_scatter_tensor(values(torch, rank, 4), "sum", 0, mesh["a"]) + 0
        )
        given = torch.arange(24.0).view(8, 3)
        sharded = tensors.distribute_tensor(given, mesh, [tensors.Shard(0), tensors.Replicate()])
        product = (
            sharded @ tensors.distribute_tensor(torch.ones(3, 2), mesh, [tensors.Replicate()] * 2)
        ).full_tensor()
        world_group = dist.group.WORLD
        part = world_group.split_group([0, 3] if rank in (0, 3) else [1, 2])
        dist.all_reduce(own := values(torch, rank, 1), group=part)
        own_group, _ = dist.new_subgroups_by_enumeration([[0, 1, 2], [3]])
        dist.all_reduce(subgroup := values(torch, rank, 1), group=own_group)
        part.shutdown()
        assert dist.get_backend() == "colltensor"
        assert (dist.get_rank(), dist.get_world_size()) == (rank, world_size)
        assert world_group._get_backend(torch.device("cpu")).name() == "colltensor"
        return plain([along, summed, gathered, scattered, product, own, subgroup])


def test_meshes_subgroups_and_functional_collectives(pool: RankPool, tmp_path: Path) -> None:
    product = np.repeat(np.arange(24).reshape(8, 3).sum(1), 2).tolist()
    base = np.arange(4) + 1.0
    for rank, found in enumerate(pool.run(4, meshes, tmp_path / "store")):
        row, column = divmod(rank, 2)
        along, summed, gathered, scattered, whole, own, subgroup = (entry[2] for entry in found)
        assert along == (2 * base + 4 * row + 1).tolist()
        assert summed == (2 * base + 2 * column + 2).tolist()
        assert gathered == [2.0 * row + 1, 2.0 * row + 2, 2.0 * row + 2, 2.0 * row + 3]
        assert scattered == (2 * base + 2 * column + 2)[2 * row : 2 * row + 2].tolist()
        assert whole == product
        assert own == [5.0]
        assert subgroup == [6.0 if rank < 3 else 4.0]


def dying(rank: int, world_size: int, path: Path, how: str) -> tuple[float, str]:
    """Rank 1 dies while rank 0 waits for it; then the rest make a group again."""
    with world(rank, world_size, path, timeout_s=30.0) as (torch, dist):
        dist.all_reduce(torch.ones(2))
        if how == "another message":  # on a direction that has been in use, and has its thread
            (dist.send if rank == 1 else dist.recv)(torch.ones(1), 1 - rank) if rank < 2 else None
        dist.barrier()
        wrapped = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        if rank == 1:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        tensor = torch.ones(2)
        calls = {
            "now": lambda: dist.all_reduce(tensor),
            "async": lambda: dist.all_reduce(tensor, async_op=True).wait(),
            "future": lambda: dist.all_reduce(tensor, async_op=True).get_future().wait(),
            "first message": lambda: dist.recv(tensor, 1),
            "another message": lambda: dist.recv(tensor, 1),
            "ddp": lambda: wrapped(tensor).sum().backward(),
        }
        with pytest.raises(RuntimeError, match="rank 1") as caught:
            calls[how]()
        took_s = time.monotonic() - began - 0.2
        if how == "now":
            with pytest.raises(col.GroupError):
                dist.all_reduce(tensor)
        dist.destroy_process_group()
        return took_s, type(caught.value).__name__


@pytest.mark.parametrize(
    "how", ["now", "async", "future", "first message", "another message", "ddp"]
)
def test_a_dead_rank_is_an_error_within_a_second(pool: RankPool, tmp_path: Path, how: str) -> None:
    took_s, kind = pool.run(2, dying, tmp_path / "store", how, may_die=(1,))[0]
    assert took_s < 1.5
    assert kind == ("RuntimeError" if how in ("future", "ddp") else "PeerLostError")


def lose_a_peer(
    rank: int, world_size: int, path: Path, sends: bool, acquainted: bool
) -> tuple[tuple[int, ...], str]:
    """Rank 2 dies while rank 0 waits for it in a transfer; return whom rank 0 names."""
    with world(rank, world_size, path) as (torch, dist):
        tensor = torch.ones(100_000)
        if acquainted and rank != 1:
            (dist.send if (rank == 0) is sends else dist.recv)(tensor, 2 - rank)
        dist.barrier()
        if rank == 2:
            time.sleep(0.3)
            os._exit(1)
        if rank == 1:
            return (), ""
        with pytest.raises(col.PeerLostError) as caught:
            (dist.send if sends else dist.recv)(tensor, 2)
        return caught.value.ranks, str(caught.value)


@pytest.mark.parametrize("sends", [True, False])
@pytest.mark.parametrize("acquainted", [True, False])
def test_the_dead_end_of_a_transfer_has_its_rank_in_the_process_group(
    pool: RankPool, tmp_path: Path, sends: bool, acquainted: bool
) -> None:
    found = pool.run(3, lose_a_peer, tmp_path / "store", sends, acquainted, may_die=(2,))
    ranks, message = found[0]
    assert ranks == (2,)
    behind = re.split(r"\brank 0(?:\)| of 3): ", message)[1]
    assert set(re.findall(r"rank (\d)", behind)) == {"2"}, message


def late(rank: int, world_size: int, path: Path) -> list[str]:
    found = []
    with world(rank, world_size, path) as (torch, dist):
        dist.group.WORLD.set_timeout(timedelta(seconds=0.6))
        if rank:
            time.sleep(2.5)
            return []
        began = time.monotonic()
        for call in (lambda: dist.recv(torch.ones(1), 1), lambda: dist.all_reduce(torch.ones(1))):
            with pytest.raises(col.CollectiveTimeoutError) as caught:
                call()
            assert caught.value.ranks == (1,)
            assert "timed out after 0.6 s" in str(caught.value)
            found.append(str(caught.value))
        with pytest.raises(col.GroupError):
            dist.isend(torch.ones(1), 1)
        assert 1.1 < time.monotonic() - began < 2.2
    return found


def test_a_late_rank_is_an_error_at_the_timeout(pool: RankPool, tmp_path: Path) -> None:
    assert len(pool.run(2, late, tmp_path / "store")[0]) == 2


def waiting(rank: int, world_size: int, path: Path) -> float:
    with world(rank, world_size, path, timeout_s=30.0) as (torch, dist):
        c10d = importlib.import_module("torch._C._distributed_c10d")
        group = dist.group.WORLD
        if rank:
            time.sleep(1.0)
            dist.all_reduce(torch.ones(1))
            time.sleep(1.0)
            return 0.0
        work = dist.all_reduce(torch.ones(1), async_op=True)
        with pytest.raises(col.CollectiveTimeoutError, match=r"wait\(\).*\b0\.2 s"):
            work.wait(timedelta(seconds=0.2))
        assert not work.is_completed()
        work.wait()
        began = time.monotonic()
        options = c10d.AllreduceOptions()
        options.timeout = timedelta(seconds=0.3)
        with pytest.raises(col.CollectiveTimeoutError):
            group.allreduce([torch.ones(1)], options).wait()
        return time.monotonic() - began


def test_a_call_and_a_wait_have_timeouts_of_their_own(pool: RankPool, tmp_path: Path) -> None:
    assert 0.2 < pool.run(2, waiting, tmp_path / "store")[0] < 0.9


def leaving(
    rank: int, world_size: int, path: Path, how: str, asynchronous: bool
) -> tuple[float, str]:
    """Rank 0 leaves in the middle of a call, which waits for rank 2, who does not come; or drops its group."""
    with world(rank, world_size, path, timeout_s=20.0) as (torch, dist):
        from colltensor.torch.c10d.process_group import ColltensorProcessGroup

        store = dist.PrefixStore("leaving", dist.distributed_c10d._get_default_store())
        group = ColltensorProcessGroup(store, rank, world_size, timedelta(seconds=20), "leaving")
        options = importlib.import_module("torch._C._distributed_c10d").BroadcastOptions()
        options.rootRank, options.asyncOp = 2, asynchronous
        began = time.monotonic()
        if rank == 2:
            dist.barrier()
            return 0.0, ""
        if rank == 0 and how == "dropped":
            time.sleep(0.2)
            del group
            error = ""
        else:
            if rank == 0:
                threading.Timer(0.2, getattr(group, how)).start()
            with pytest.raises(RuntimeError) as caught:
                group.broadcast([torch.ones(3)], options).wait()
            error = f"{type(caught.value).__name__}: {caught.value}"
        took_s = time.monotonic() - began
        dist.barrier()
        return took_s, error


@pytest.mark.parametrize(
    ("how", "asynchronous"), [("abort", True), ("shutdown", False), ("dropped", False)]
)
def test_a_rank_that_leaves_in_a_call_ends_it_at_once(
    pool: RankPool, tmp_path: Path, how: str, asynchronous: bool
) -> None:
    found = pool.run(3, leaving, tmp_path / "store", how, asynchronous)
    assert max(took_s for took_s, _ in found) < 4.0
    assert re.match(r"PeerLostError: .*rank 0 .*Connection closed by peer", found[1][1]), found
    # what happened to it is in the error, and is no loss of a rank
    assert how == "dropped" or re.match(r"GroupError: .*'leaving' \(rank 0\)", found[0][1]), found


def broken_and_dropped(rank: int, world_size: int, path: Path) -> list[str]:
    """Drop process groups whose other rank has left in calls of several kinds; return which of them stay."""
    torch = importlib.import_module("torch")
    made = importlib.import_module("colltensor.torch.c10d.process_group").ColltensorProcessGroup
    dist, kept = torch.distributed, []
    store = dist.FileStore(str(path), world_size)

    def fail(group: Any, how: str) -> None:
        opts = dist.AllreduceOptions()
        opts.asyncOp = how == "asynchronous"
        tensor = torch.ones(3)
        with pytest.raises(col.PeerLostError):
            (group.recv([tensor], 1) if how == "recv" else group.allreduce([tensor], opts)).wait()
        if how == "synchronous":
            with pytest.raises(col.GroupError, match="Connection closed by peer"):
                group.allreduce([torch.ones(3)], opts)

    for how in ("synchronous", "asynchronous", "recv"):
        group = made(dist.PrefixStore(how, store), rank, world_size, timedelta(seconds=10), how)
        group.barrier().wait()
        if rank:
            group.abort()
            continue
        fail(group, how)
        alive = weakref.ref(group)
        del group
        until = time.monotonic() + 2.0  # a thread may still return from what it did
        while gc.collect() >= 0 and alive() is not None and time.monotonic() < until:
            time.sleep(0.01)
        kept += [how] * (alive() is not None)
    return kept


def test_a_broken_process_group_that_is_dropped_is_gone(pool: RankPool, tmp_path: Path) -> None:
    """Its threads and its end keep what broke it, but no frames, in which it is itself."""
    assert pool.run(2, broken_and_dropped, tmp_path / "store") == [[], []]


def again(rank: int, world_size: int, path: Path, port: int) -> list[float]:
    """Make and destroy groups through one store that stays, as torchrun's does."""
    torch = importlib.import_module("torch")
    importlib.import_module("colltensor.torch")
    dist = torch.distributed
    store = dist.TCPStore("127.0.0.1", port, world_size, rank == 0, timeout=timedelta(seconds=20))
    found = []
    for turn in range(3):
        dist.init_process_group(
            "cpu:colltensor,cuda:gloo", store=store, rank=rank, world_size=world_size
        )
        dist.all_reduce(tensor := torch.full((1,), rank + 1.0))
        dist.isend(tensor, (rank + 1) % world_size)
        dist.recv(tensor, (rank - 1) % world_size)
        if not turn:  # Gloo finds its old keys when it is made again
            assert (
                type(dist.group.WORLD._get_backend(torch.device("cuda"))).__name__
                == "ProcessGroupGloo"
            )
        assert {device.type for device in dist.group.WORLD._device_types} == {"cpu", "cuda"}
        found.append(tensor.item())
        dist.barrier()
        dist.destroy_process_group()
    assert not [
        key for key in store.list_keys() if "colltensor" in key or ">" in key or "/all/" in key
    ]
    store.set(f"done {rank}", "")
    store.wait([f"done {other}" for other in range(world_size)])
    if rank == 0:
        time.sleep(0.2)  # the store goes with this process's, after the others have looked
    return found


def test_groups_are_made_again_through_one_store(pool: RankPool, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert pool.run(3, again, tmp_path, port) == [[6.0] * 3] * 3


def test_the_program_of_the_documentation_under_torchrun(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "torch_distributed.md").read_text()
    program = tmp_path / "program.py"
    program.write_text(page.split("```python\n")[1].split("```")[0])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(program),
    ]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert ran.stdout.count("[3.0, 3.0]") == 2, ran.stderr
