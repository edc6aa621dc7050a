"""What comes after what on the device: each of these gives wrong values, or blocks, where the order is wrong.

A kernel that takes a good part of a second stands before whatever must be waited for.
"""

from __future__ import annotations

import gc
import importlib
import threading
import time
from typing import Any

import numpy as np
import pytest
from gpu_streams import COUNT, Queue, shared_group
from pool import RankPool

import colltensor as col
from colltensor.gradients import Synchronizer

LONG_S = 0.5
GIB = 1 << 30
PRODUCTS = 4000
"""Of a matrix of 2048 rows: a tenth of a second or so on a large GPU, a hundred times what a call takes the host."""


def comes_after(rank: int, world_size: int, library: str, async_op: bool) -> None:
    """The values are written behind a long kernel, and read at once; the host goes on meanwhile."""
    group = shared_group(world_size)
    with Queue(library) as queue:
        tensor = queue.full(-1.0)
        # connects, and makes the group's own stream
        found = group.allreduce(queue.full(0.0), async_op=async_op)
        if async_op:
            found.wait()
        queue.synchronize()
        group.barrier()
        queue.sleep(LONG_S)
        late = queue.mark()
        tensor += 2.0 + rank
        found = group.allreduce(tensor, async_op=async_op)
        if async_op:
            found.wait()
        assert not queue.passed(late), "the host waited"
        assert queue.read(tensor) == {sum(range(1, world_size + 1))}


@pytest.mark.parametrize("async_op", [False, True])
def test_a_call_comes_after_the_current_stream(
    gpu_pool: RankPool, size: int, library: str, async_op: bool
) -> None:
    gpu_pool.run(size, comes_after, library, async_op)


def gradients_come_after(rank: int, world_size: int, library: str) -> None:
    """As above, for leaves that share a transfer and one that does not: they are packed on the current stream too."""
    group = shared_group(world_size)
    with Queue(library) as queue:
        leaves = [queue.full(0.0, count) for count in (1000, COUNT, 3000)]
        kept = Synchronizer(leaves, group=group, average=False)
        kept.sync(leaves)  # connects and compiles
        queue.synchronize()
        group.barrier()
        queue.sleep(LONG_S)
        late = queue.mark()
        for leaf in leaves:
            leaf += 1.0 + rank
        kept.sync(leaves)
        assert not queue.passed(late), "the host waited"
        for leaf in leaves:
            leaf *= 2.0
            assert queue.read(leaf) == {2.0 * sum(range(1, world_size + 1))}


def test_gradients_come_after_the_current_stream(
    gpu_pool: RankPool, size: int, library: str
) -> None:
    gpu_pool.run(size, gradients_come_after, library)


def alone(rank: int, world_size: int, library: str) -> None:
    """A group of one rank that was not asked for NCCL: what is packed or copied is so after the current stream."""
    group = col.init_collective_group(1, 0, group_name="alone")
    with Queue(library) as queue:
        tree = {"a": queue.full(0.0), "b": [queue.full(0.0), queue.full(0.0)]}
        outputs, work_outputs = [queue.full(0.0)], [queue.full(0.0)]
        queue.sleep(LONG_S)
        for leaf in (tree["a"], *tree["b"]):
            leaf += 1.0
        assert group.allreduce(tree) is tree
        group.broadcast(tree, async_op=True).wait()
        group.allgather(outputs, tree["a"])
        queue.sleep(LONG_S)
        tree["a"] += 1.0
        group.allgather(work_outputs, tree["a"], async_op=True).wait()
        values = (
            (tree["a"], 2.0),
            (tree["b"][0], 1.0),
            (tree["b"][1], 1.0),
            (outputs[0], 1.0),
            (work_outputs[0], 2.0),
        )
        for tensor, value in values:
            assert queue.read(tensor) == {value}
    group.destroy()


def test_one_rank_alone(gpu_pool: RankPool, library: str) -> None:
    gpu_pool.run(1, alone, library)


def is_waited_for(rank: int, world_size: int, library: str, async_op: bool) -> None:
    """Rank 1 comes late, so that rank 0's reading is too early unless its stream waits."""
    group = shared_group(2)
    with Queue(library) as queue:
        tensor = queue.full(1.0 + rank)
        group.allreduce(queue.full(0.0))
        queue.synchronize()
        group.barrier()
        if rank == 1:
            queue.sleep(LONG_S)
        found = group.allreduce(tensor, async_op=async_op)
        if async_op:
            found.wait()
        tensor *= 2.0
        assert queue.read(tensor) == {6.0}


@pytest.mark.parametrize("async_op", [False, True])
def test_the_current_stream_waits_for_the_call(
    pair: RankPool, library: str, async_op: bool
) -> None:
    pair.run(2, is_waited_for, library, async_op)


def runs_beside(rank: int, world_size: int, library: str) -> None:
    """While an asynchronous call waits for rank 1, rank 0's stream computes on."""
    group = shared_group(2)
    with Queue(library) as queue:
        tensor, other = queue.full(1.0 + rank), queue.full(0.0)
        group.allreduce(queue.full(0.0), async_op=True).wait()
        queue.synchronize()
        group.barrier()
        if rank == 1:
            queue.sleep(4 * LONG_S)
        work = group.allreduce(tensor, async_op=True)
        other += 1.0
        if rank == 0:
            queue.synchronize()
            assert not work.done(), "the stream waited for the call before wait()"
        work.wait()
        assert queue.read(tensor) == {3.0}
        assert queue.read(other) == {1.0}
        assert work.done()


def test_an_asynchronous_call_runs_beside_the_stream(pair: RankPool, library: str) -> None:
    pair.run(2, runs_beside, library)


def on_two_streams(rank: int, world_size: int, library: str) -> None:
    """Calls on two streams keep the order of issue, so that the ranks do not meet crosswise."""
    group = shared_group(world_size)
    with Queue(library) as first:
        a = first.full(1.0 + rank)
        first.synchronize()
        with Queue(library) as second:
            b = second.full(10.0 + rank)
            second.synchronize()
            for turn in range(6):
                (first, second)[(turn + rank) % 2].sleep(0.05)
                for queue, tensor in ((first, a), (second, b)):
                    with queue.current():
                        group.allreduce(tensor, col.ReduceOp.MAX if turn else col.ReduceOp.SUM)
            total = sum(range(1, world_size + 1))
            assert second.read(b) == {total + 9.0 * world_size}
        assert first.read(a) == {total}


def test_calls_on_two_streams_keep_their_order(gpu_pool: RankPool, size: int, library: str) -> None:
    gpu_pool.run(size, on_two_streams, library)


def jax_is_ready(rank: int, world_size: int) -> None:
    """The argument is still being computed at the call; the result is used by XLA at once."""
    jax = importlib.import_module("jax")
    group = shared_group(world_size)

    @jax.jit
    def slow(x: Any) -> Any:  # doubly stochastic, so that the rows' sums stay
        matrix = jax.numpy.full((2048, 2048), 1 / 2048, jax.numpy.float32)
        return jax.lax.fori_loop(0, PRODUCTS, lambda _, y: matrix @ y, x)

    start = jax.numpy.full((2048, 256), 1.0 + rank, jax.numpy.float32)
    slow(start).block_until_ready()
    double = jax.jit(lambda x: x * 2)
    total = 2.0 * sum(range(1, world_size + 1))
    for _ in range(3):
        result = double(group.allreduce(slow(start)))
        np.testing.assert_allclose(np.asarray(result), total, rtol=1e-3)
        work = group.allreduce(slow(start), async_op=True)
        np.testing.assert_allclose(np.asarray(double(work.result())), total, rtol=1e-3)


@pytest.mark.needs("jax")
def test_jax_arrays_are_ready(gpu_pool: RankPool, size: int) -> None:
    gpu_pool.run(size, jax_is_ready)


def stays_current(rank: int, world_size: int) -> None:
    """CuPy computes keys and packs strided arrays on streams of our choice; the caller's is the current one after."""
    cupy = importlib.import_module("cupy")
    group = shared_group(world_size)
    mine = cupy.cuda.Stream(non_blocking=True)
    mine.use()
    try:
        for async_op in (False, True):
            for op in (col.ReduceOp.SUM, col.ReduceOp.MAX):
                for array in (
                    cupy.full(COUNT, rank),
                    cupy.full(COUNT, rank, "float32"),
                    cupy.zeros((8, 8)).T[::2],
                ):
                    found = group.allreduce(array, op, async_op=async_op)
                    if async_op:
                        found.wait()
                    assert cupy.cuda.get_current_stream() == mine
            parts = [cupy.zeros(COUNT) for _ in range(world_size)]
            group.allgather(parts, cupy.ones(COUNT))
            assert cupy.cuda.get_current_stream() == mine
    finally:
        cupy.cuda.Stream.null.use()


def test_a_stream_in_use_stays_the_current_one(gpu_pool: RankPool, size: int) -> None:
    gpu_pool.run(size, stays_current)


def memory_is_kept(rank: int, world_size: int) -> None:
    """The tensor of an asynchronous call that nobody holds any more is not handed out again before it is done."""
    torch = importlib.import_module("torch")
    group = shared_group(2)
    with Queue("torch") as queue:
        group.allreduce(queue.full(0.0), async_op=True).wait()
        queue.synchronize()
        group.barrier()
        # so that the tensor's block is no part of a larger one that earlier tests left
        torch.cuda.empty_cache()
        tensor = queue.full(1.0 + rank)
        address = tensor.data_ptr()
        if rank == 1:
            queue.sleep(4 * LONG_S)
        group.allreduce(tensor, async_op=True)
        if rank == 1:
            group.synchronize()
            assert queue.read(tensor) == {3.0}, "rank 0's memory had another's values"
            return
        del tensor
        gc.collect()
        others = [torch.full((COUNT,), 7.0, device="cuda:0") for _ in range(4)]
        queue.synchronize()
        assert address not in [other.data_ptr() for other in others]
        group.synchronize()
        time.sleep(0.2)  # the watchdog lets go of it when it looks next
        gc.collect()
        fresh = [torch.empty(COUNT, device="cuda:0") for _ in range(8)]
        assert address in [tensor.data_ptr() for tensor in fresh], "it is never handed out again"


@pytest.mark.needs("torch")
def test_torch_does_not_reuse_memory_in_flight(pair: RankPool) -> None:
    pair.run(2, memory_is_kept)


def peak_of_a_large_call(rank: int, world_size: int) -> int:
    """Return by how many bytes the device's free memory fell below what it was before the call."""
    torch, cupy = importlib.import_module("torch"), importlib.import_module("cupy")
    group = shared_group(world_size)
    tensor = torch.full((GIB // 4,), 1.0 + rank, device="cuda:0")
    group.allreduce(torch.ones(GIB // 64, device="cuda:0"))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    group.barrier()
    before, pooled = torch.cuda.mem_get_info(0)[0], cupy.get_default_memory_pool().total_bytes()
    group.barrier()
    lowest, stop = [before], threading.Event()

    def sample() -> None:
        while not stop.is_set():
            lowest[0] = min(lowest[0], torch.cuda.mem_get_info(0)[0])

    thread = threading.Thread(target=sample)
    thread.start()
    for _ in range(3):
        group.allreduce(tensor)
        group.synchronize()
    stop.set()
    thread.join()
    assert cupy.get_default_memory_pool().total_bytes() == pooled
    factor = float(world_size) ** 2 * sum(range(1, world_size + 1))
    assert float(tensor[0]) == float(tensor[-1]) == factor
    return int(before - lowest[0])


@pytest.mark.needs("torch")
def test_a_large_call_in_place_needs_no_memory(gpu_pool: RankPool, size: int) -> None:
    """A copy of the tensor would take 1 GiB for each rank; NCCL's own buffers take less than a quarter of one."""
    peaks = gpu_pool.run(size, peak_of_a_large_call, timeout_s=500)
    print(f"peak of {size} ranks: {max(peaks) / 2**20:.0f} MiB")
    assert max(peaks) < GIB // 4, peaks


def synchronized(rank: int, world_size: int, library: str) -> None:
    """``synchronize`` returns on the host when what was queued is done, and not before."""
    group = shared_group(world_size)
    with Queue(library) as queue:
        tensor = queue.full(1.0)
        group.allreduce(tensor)
        queue.synchronize()
        queue.sleep(4 * LONG_S)
        group.allreduce(tensor)
        behind = queue.mark()
        timeout_s = group.timeout_s
        group.set_timeout(LONG_S / 2)
        with pytest.raises(col.CollectiveTimeoutError, match="synchronize"):
            group.synchronize(0)
        group.set_timeout(timeout_s)
        assert not queue.passed(behind)
        group.synchronize(0)
        queue.synchronize()
        assert queue.read(tensor) == {float(world_size) ** 2}


def test_synchronize(gpu_pool: RankPool, size: int, library: str) -> None:
    gpu_pool.run(size, synchronized, library)
