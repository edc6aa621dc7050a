"""Shared memory between real processes: every operation against numpy, and every way in which a rank can fail."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
from pool import RankPool, group_of
from shm_ranks import fresh, open_descriptors, own_group, shared_mappings, strided, values

import colltensor as col

pytestmark = pytest.mark.shm

WORLD_SIZES = (1, 2, *(pytest.param(size, marks=pytest.mark.slow) for size in (3, 4)))
COUNTS = (0, 1, 7, 1024, 1025, 20_001, 300_007, 1_300_003)
"""Inline, direct, in blocks, and more than all staging together."""
PAIRS = (
    ("float32", "SUM"),
    ("float64", "AVERAGE"),
    ("int16", "PRODUCT"),
    ("uint8", "BXOR"),
    ("float16", "SUM"),
)


def move_all(rank: int, size: int) -> None:
    """Every operation that moves bytes, at every size, on dense and strided memory."""
    group = group_of(size, "shm")
    for count, dtype in itertools.product(COUNTS, ("float32", "uint8", "complex128", "bfloat16")):
        way = (count + len(dtype)) % 5
        root = count % size
        given = [values(source, count, dtype) for source in range(size)]
        parts = [
            [values(source, count, dtype, salt=1 + part) for part in range(size)]
            for source in range(size)
        ]
        label = f"{dtype}[{count}] way {way} root {root}"

        mine = strided(given[rank].copy(), way)
        group.broadcast(mine, root)
        np.testing.assert_array_equal(mine.ravel(), given[root], err_msg=f"broadcast {label}")

        outputs = [strided(np.zeros_like(given[0]), (way + other) % 5) for other in range(size)]
        group.allgather(outputs, strided(given[rank], way))
        for source, output in enumerate(outputs):
            np.testing.assert_array_equal(
                output.ravel(), given[source], err_msg=f"allgather {label}"
            )

        outputs = [np.zeros_like(given[0]) for _ in range(size)]
        group.gather(outputs if rank == root else None, strided(given[rank], way), root)
        for source, output in enumerate(outputs):
            wanted = given[source] if rank == root else np.zeros_like(given[0])
            np.testing.assert_array_equal(output, wanted, err_msg=f"gather {label}")

        target = strided(np.zeros_like(given[0]), way)
        group.scatter(
            target, [strided(part, way) for part in parts[root]] if rank == root else None, root
        )
        np.testing.assert_array_equal(target.ravel(), parts[root][rank], err_msg=f"scatter {label}")

        outputs = [strided(np.zeros_like(given[0]), way) for _ in range(size)]
        group.alltoall(outputs, [strided(part, (way + 1) % 5) for part in parts[rank]])
        for source, output in enumerate(outputs):
            np.testing.assert_array_equal(
                output.ravel(), parts[source][rank], err_msg=f"alltoall {label}"
            )

        if size > 1:
            target = strided(np.zeros_like(given[0]), way)
            group.sendrecv(strided(given[rank], way), (rank + 1) % size, target, (rank - 1) % size)
            np.testing.assert_array_equal(
                target.ravel(), given[(rank - 1) % size], err_msg=f"sendrecv {label}"
            )
            if rank == root:
                group.send(strided(given[rank], way), (rank + 1) % size)
            elif rank == (root + 1) % size:
                target = strided(np.zeros_like(given[0]), way)
                group.recv(target, root)
                np.testing.assert_array_equal(target.ravel(), given[root], err_msg=f"send {label}")
        group.barrier()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_moves(pool: RankPool, world_size: int) -> None:
    pool.run(world_size, move_all, timeout_s=110.0)


def reduce_all(rank: int, size: int) -> None:
    """Reductions of a few types at every size, dense and strided, bit for bit as numpy in rank order."""
    group = group_of(size, "shm")
    for count, (dtype, op) in itertools.product(COUNTS, PAIRS):
        way = (count + len(op)) % 5
        root = count % size
        given = [values(source, count, dtype) for source in range(size)]
        wide = [array.astype(np.float32) if dtype == "float16" else array for array in given]
        function = {
            "SUM": np.add,
            "AVERAGE": np.add,
            "PRODUCT": np.multiply,
            "BXOR": np.bitwise_xor,
        }[op]
        wanted = wide[0].copy()
        for array in wide[1:]:
            wanted = function(wanted, array)
        wanted = (wanted / size if op == "AVERAGE" else wanted).astype(given[0].dtype)
        label = f"{op} of {dtype}[{count}] way {way} on {size}"
        for layout in (4, way):
            mine = strided(given[rank].copy(), layout)
            group.allreduce(mine, col.ReduceOp[op])
            np.testing.assert_array_equal(mine.ravel(), wanted, err_msg=f"allreduce {label}")
            mine = strided(given[rank].copy(), layout)
            group.reduce(mine, root, col.ReduceOp[op])
            there = wanted if rank == root else given[rank]
            np.testing.assert_array_equal(mine.ravel(), there, err_msg=f"reduce {label}")
            target = strided(np.zeros_like(given[0]), layout)
            sources = [strided(given[(rank + part) % size].copy(), layout) for part in range(size)]
            group.reducescatter(target, sources, col.ReduceOp[op])
            # those depend on the order, which differs from rank to rank here
            if op != "SUM" and op != "AVERAGE":
                np.testing.assert_array_equal(
                    target.ravel(), wanted, err_msg=f"reducescatter {label}"
                )
            else:
                np.testing.assert_allclose(
                    target.ravel().astype(float),
                    wanted.astype(float),
                    rtol=2e-3 if dtype == "float16" else 1e-6,
                )


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_reductions(pool: RankPool, world_size: int) -> None:
    pool.run(world_size, reduce_all, timeout_s=110.0)


def call_often(rank: int, size: int, name: str) -> None:
    """Large messages, read, then staged, and then for hundreds of calls the faster way: the same bits always."""
    with own_group(rank, size, name) as group:
        given = [values(source, 600_001, "float32") for source in range(size)]
        parts = [values(source, 70_003, "float64") for source in range(size)]
        first = None
        for turn in range(280):
            # that cannot be read
            mine = strided(given[rank].copy(), 1) if turn % 50 == 49 else given[rank].copy()
            group.allreduce(mine)
            first = mine.copy() if first is None else first
            np.testing.assert_array_equal(mine.ravel(), first.ravel(), err_msg=f"allreduce {turn}")
            outputs = [np.zeros_like(parts[0]) for _ in range(size)]
            group.allgather(outputs, parts[rank])
            np.testing.assert_array_equal(outputs, parts, err_msg=f"allgather {turn}")
            received = np.zeros_like(parts[0])
            group.sendrecv(parts[rank], (rank + 1) % size, received, (rank - 1) % size)
            np.testing.assert_array_equal(
                received, parts[(rank - 1) % size], err_msg=f"sendrecv {turn}"
            )
        np.testing.assert_allclose(first.ravel(), np.sum(given, axis=0), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_whichever_way_is_faster_the_bits_are_the_same(pool: RankPool, world_size: int) -> None:
    pool.run(world_size, call_often, fresh())


def call_oddly(group: Any, mine: np.ndarray[Any, Any], change: str, root: int) -> None:
    if change == "count":
        group.allreduce(mine[:-1])
    elif change == "dtype":
        group.allreduce(mine.view(np.int32))
    elif change == "op":
        group.allreduce(mine, col.ReduceOp.MAX)
    elif change in ("operation", "root"):
        group.broadcast(mine, root)
    else:
        group.allreduce(mine)


def disagree(rank: int, size: int) -> list[tuple[int, ...]]:
    group = group_of(size, "shm")
    found = []
    odd = size - 1
    for large, change in itertools.product(
        (8, 2_000_000), ("count", "dtype", "op", "operation", "root")
    ):
        mine = np.full(large, rank + 1.0, np.float32)
        kept = mine.copy()
        with pytest.raises(col.MismatchError) as caught:
            call_oddly(
                group, mine, change if rank == odd or change == "root" else "", int(rank == odd)
            )
        np.testing.assert_array_equal(mine, kept)
        found.append(caught.value.ranks)
        assert "float32" in str(caught.value)
        total = np.full(large, 1.0, np.float32)
        group.allreduce(total)
        assert (total == size).all(), "the group goes on"
    return found


@pytest.mark.parametrize("world_size", [3, 4])
def test_disagreement_is_found_everywhere_before_anything_is_written(
    pool: RankPool, world_size: int
) -> None:
    for found in pool.run(world_size, disagree):
        assert set(found) == {(world_size - 1,)}


def disagree_in_pairs(rank: int, size: int) -> None:
    group = group_of(size, "shm")
    for count in (3, 400_000):
        target = np.zeros(count + (rank == 1), np.float32)
        source = np.full(count, rank, np.float32)
        if rank == 0:
            with pytest.raises(col.MismatchError):
                group.send(source, 1)
        elif rank == 1:
            with pytest.raises(col.MismatchError):
                group.recv(target, 0)
        assert not target.any()
        # Rank 0's send to 1 differs; the two other transfers of the ring are made.
        target = np.zeros(count + (rank == 1), np.float32)
        if rank in (0, 1):
            with pytest.raises(col.MismatchError):
                group.sendrecv(source, (rank + 1) % size, target, (rank - 1) % size)
        else:
            group.sendrecv(source, (rank + 1) % size, target, (rank - 1) % size)
        assert (target == (0 if rank == 1 else (rank - 1) % size)).all()
        group.barrier()


def test_transfers_that_disagree(pool: RankPool) -> None:
    pool.run(3, disagree_in_pairs)


def repeat(group: Any, data: np.ndarray[Any, Any]) -> None:
    """Reduce until something goes wrong."""
    while True:
        data[:] = 1
        group.allreduce(data)


def lose_a_rank(
    rank: int, size: int, name: str, large: int
) -> tuple[float, tuple[int, ...], str] | None:
    with own_group(rank, size, name) as group:
        data = np.ones(large, np.float32)
        group.allreduce(data)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(col.PeerLostError) as caught:
            repeat(group, data)
        took = time.monotonic() - began
        with pytest.raises(col.GroupError):
            group.allreduce(data)
        return took, caught.value.ranks, str(caught.value)


@pytest.mark.parametrize("large", [4, 4_000_000])
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_killed_rank_is_named_within_a_second(
    pool: RankPool, world_size: int, large: int
) -> None:
    results = pool.run(world_size, lose_a_rank, fresh(), large, may_die=[1])
    for rank, result in enumerate(results):
        if rank != 1:
            assert result[0] < 1.5
            assert result[1] == (1,), result


def come_late(rank: int, size: int, name: str) -> tuple[float, tuple[int, ...]] | None:
    with own_group(rank, size, name, timeout_s=1.0) as group:
        group.barrier()
        if rank == 1:
            time.sleep(2.5)
            with pytest.raises(col.CollectiveTimeoutError) as caught:
                group.allreduce(np.ones(3))
            return 0.0, caught.value.ranks
        began = time.monotonic()
        with pytest.raises(col.CollectiveTimeoutError) as caught:
            group.allreduce(np.ones(3))
        return time.monotonic() - began, caught.value.ranks


@pytest.mark.slow
def test_a_late_rank_is_named_on_every_rank(pool: RankPool) -> None:
    for took, ranks in pool.run(3, come_late, fresh()):
        assert took < 1.5
        assert ranks == (1,)


def stop_a_rank(rank: int, size: int, name: str) -> tuple[int, ...]:
    """Rank 2 is stopped in the middle of large allreduces, by a thread that cannot continue it itself."""
    with own_group(rank, size, name, timeout_s=1.5) as group:
        data = np.ones(2_000_000, np.float32)
        pids = group.allgather_object(os.getpid())
        if rank == 0:
            threading.Timer(0.2, os.kill, (pids[2], signal.SIGSTOP)).start()
            threading.Timer(3.5, os.kill, (pids[2], signal.SIGCONT)).start()
        with pytest.raises(col.CollectiveTimeoutError) as caught:
            repeat(group, data)
        if rank == 0:
            time.sleep(2.5)
        return caught.value.ranks


@pytest.mark.slow
def test_a_stopped_rank_is_late(pool: RankPool) -> None:
    assert pool.run(3, stop_a_rank, fresh()) == [(2,)] * 3


def interrupt(rank: int, size: int, name: str, operation: str) -> tuple[str, float]:
    with own_group(rank, size, name) as group:
        group.barrier()
        began = time.monotonic()
        if rank == 0:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                group.barrier() if operation == "barrier" else group.recv(np.zeros(3), 1)
            return "interrupted", time.monotonic() - began
        time.sleep(1.0)
        with pytest.raises(col.GroupError, match="rank 0") as caught:
            group.allreduce(np.zeros(3))
        return str(caught.value), 0.0


@pytest.mark.parametrize("operation", ["barrier", "recv"])
def test_an_interrupt_ends_the_wait_and_the_group(pool: RankPool, operation: str) -> None:
    results = pool.run(2, interrupt, fresh(), operation)
    assert results[0][1] < 1.3, results


def leave(rank: int, size: int, name: str) -> tuple[int, ...]:
    with own_group(rank, size, name) as group:
        group.barrier()
        if rank == 2:
            return ()
        with pytest.raises(col.PeerLostError) as caught:
            group.allreduce(np.zeros(3))
        return caught.value.ranks


def test_a_rank_that_leaves_is_named(pool: RankPool) -> None:
    assert pool.run(3, leave, fresh()) == [(2,), (2,), ()]


def destroy_in_another_thread(rank: int, size: int, name: str) -> None:
    with own_group(rank, size, name) as group:
        group.barrier()
        if rank == 0:
            threading.Timer(0.3, group.destroy).start()
            began = time.monotonic()
            with pytest.raises(col.CollectiveError):
                group.allreduce(np.zeros(3))
            assert time.monotonic() - began < 2.0
        else:
            time.sleep(0.6)


def test_destroying_ends_a_call_of_another_thread(pool: RankPool) -> None:
    pool.run(2, destroy_in_another_thread, fresh())


def fork_and_use(rank: int, size: int, name: str) -> None:
    with own_group(rank, size, name) as group:
        data = np.ones(100_000, np.float32)
        group.allreduce(data)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                group.allreduce(data)
            except col.GroupError:
                group.destroy()
                code = 0 if shared_mappings() == 0 else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        group.allreduce(data)
        assert (data == size * size).all()


def test_a_forked_child_has_no_part_in_it(pool: RankPool) -> None:
    pool.run(2, fork_and_use, fresh())


def make_and_destroy(rank: int, size: int, names: list[str]) -> None:
    for name in names[:2]:
        with own_group(rank, size, name) as group:
            group.barrier()
    before = open_descriptors(), shared_mappings()
    for name in names[2:]:
        with own_group(rank, size, name) as group, own_group(rank, size, name + "b") as other:
            assert shared_mappings() >= 2
            for member in (group, other, group):
                data = np.ones(5000)
                member.allreduce(data)
                assert (data == size).all()
    assert (open_descriptors(), shared_mappings()) == before


def test_nothing_is_left_of_a_group(pool: RankPool) -> None:
    pool.run(2, make_and_destroy, [fresh() for _ in range(6)])


def split_it(rank: int, size: int, name: str) -> None:
    with own_group(rank, size, name) as group:
        part = group.split(rank % 2)
        data = np.full(70_000, rank, np.int64)
        part.allreduce(data)
        assert (data == (2 if rank % 2 == 0 else 4)).all()
        assert part.backend == "shm"
        part.destroy()
        group.barrier()


def test_parts_share_memory_of_their_own(pool: RankPool) -> None:
    pool.run(4, split_it, fresh())


def other_hosts(rank: int, size: int, name: str) -> Any:
    os.environ["COLLTENSOR_HOST_ID"] = f"host{rank}"
    try:
        with (
            pytest.raises(col.BackendUnavailableError, match=r"host0.*host1"),
            own_group(rank, size, name),
        ):
            pass
    finally:
        del os.environ["COLLTENSOR_HOST_ID"]


def test_ranks_of_different_hosts_are_refused(pool: RankPool) -> None:
    pool.run(2, other_hosts, fresh())


def with_instructions(rank: int, size: int, name: str) -> list[str]:
    from colltensor.backends.shm import library

    native = library.load()
    best, ran = str(native.shm_instructions()), []
    group = group_of(size, "shm")
    try:
        for instructions in ("portable", "avx2", "avx512", "neon"):
            if not native.shm_limit_instructions(instructions):
                continue
            ran.append(instructions)
            for dtype in ("float16", "bfloat16"):
                bits = np.arange(1 << 16, dtype=np.uint16)
                given = [
                    np.roll(bits, 7 * source).view(values(0, 1, dtype).dtype)
                    for source in range(size)
                ]
                for op, function in (("SUM", np.add), ("MAX", np.maximum)):
                    mine = given[rank].copy()
                    group.allreduce(mine, col.ReduceOp[op])
                    with np.errstate(all="ignore"):
                        wanted = given[0].astype(np.float32)
                        for array in given[1:]:
                            wanted = function(wanted, array.astype(np.float32))
                        wanted = wanted.astype(mine.dtype)
                    nan = np.isnan(wanted.astype(np.float32))
                    np.testing.assert_array_equal(np.isnan(mine.astype(np.float32)), nan)
                    same = mine.view(np.uint16) == wanted.view(np.uint16)
                    zeros = (mine.astype(np.float32) == 0) & (wanted.astype(np.float32) == 0)
                    assert (same | nan | zeros).all(), f"{op} of {dtype} with {instructions}"
    finally:
        native.shm_limit_instructions(best)
    return ran


def test_every_16_bit_float_with_every_instruction_set(pool: RankPool) -> None:
    ran = pool.run(2, with_instructions, fresh())
    assert ran[0]
