"""The fast path of calls in shared memory: it meets the general one, refuses what it must, and reads large messages."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from pool import RankPool, group_of
from shm_ranks import own_group, values

import colltensor as col
from colltensor.backends.shm.error_mapping import PENDING
from colltensor.gradients import Synchronizer

COUNTS = (0, 1, 6, 7, 1024, 1025, 5000, 20_001, 300_007, 1_200_001)
"""Elements of four bytes: in the signature's line, inline, direct, in blocks, and read from the other's memory."""


def fresh() -> str:
    return f"shm-{uuid4().hex[:8]}"


def every_operation(
    rank: int, size: int, count: int, step: int, way: bool | None, group: Any
) -> None:
    """Run and check all operations; ``way`` None is the fast path, True the general one."""
    given = [values(source, count, "float32") for source in range(size)]
    parts = [
        [values(source, count, "float32", salt=1 + part) for part in range(size)]
        for source in range(size)
    ]
    root, up, down = step % size, (rank + 1) % size, (rank - 1) % size
    total = given[0].copy()
    for array in given[1:]:
        total = total + array

    data = given[rank].copy()
    assert group.allreduce(data, copy=way) is data
    np.testing.assert_array_equal(data, total)
    data = given[rank].copy()
    assert group.reduce(data, root, copy=way) is data
    np.testing.assert_array_equal(data, total if rank == root else given[rank])
    data = given[rank].copy()
    group.broadcast(data, root, copy=way)
    np.testing.assert_array_equal(data, given[root])
    outputs = [np.zeros(count, np.float32) for _ in range(size)]
    assert group.allgather(outputs, given[rank], copy=way) is outputs
    np.testing.assert_array_equal(outputs, given)
    outputs[rank] = given[rank].copy()  # an entry may be the tensor itself
    group.allgather(outputs, outputs[rank], copy=way)
    np.testing.assert_array_equal(outputs, given)
    outputs = [np.zeros(count, np.float32) for _ in range(size)]
    group.gather(outputs if rank == root else None, given[rank], root, copy=way)
    if rank == root:
        np.testing.assert_array_equal(outputs, given)
    target = np.zeros(count, np.float32)
    group.scatter(target, parts[root] if rank == root else None, root, copy=way)
    np.testing.assert_array_equal(target, parts[root][rank])
    group.reducescatter(target, parts[rank], copy=way)
    wanted = parts[0][rank].copy()
    for source in range(1, size):
        wanted = wanted + parts[source][rank]
    np.testing.assert_array_equal(target, wanted)
    group.alltoall(outputs, parts[rank], copy=way)
    np.testing.assert_array_equal(outputs, [parts[source][rank] for source in range(size)])
    whole, stacked = np.zeros((size, count), np.float32), np.stack(parts[rank])
    assert group.allgather(whole, given[rank], copy=way) is whole
    np.testing.assert_array_equal(whole, given)
    whole[rank] = given[rank]
    group.gather(whole if rank == root else None, whole[rank], root, copy=way)
    np.testing.assert_array_equal(whole, given)
    group.scatter(target, stacked if rank == root else None, root, copy=way)
    np.testing.assert_array_equal(target, parts[root][rank])
    assert group.alltoall(whole, stacked, copy=way) is whole
    np.testing.assert_array_equal(whole, outputs)
    group.reducescatter(target, stacked, copy=way)
    np.testing.assert_array_equal(target, wanted)
    if size > 1:
        group.sendrecv(given[rank], up, target, down, copy=way)
        np.testing.assert_array_equal(target, given[down])
        if rank == root:
            group.send(given[rank], up, copy=way)
        elif rank == (root + 1) % size:
            group.recv(target, root, copy=way)
            np.testing.assert_array_equal(target, given[root])
    group.barrier()


def both_ways(rank: int, size: int) -> None:
    group = group_of(size, "shm")
    for step, count in enumerate(COUNTS):
        for turn in range(3):
            every_operation(
                rank, size, count, step, True if (step + rank + turn) % 3 == 0 else None, group
            )


@pytest.mark.parametrize(
    "world_size", [1, 2, *(pytest.param(size, marks=pytest.mark.slow) for size in (3, 4))]
)
def test_the_short_way_meets_the_general_one(pool: RankPool, world_size: int) -> None:
    pool.run(world_size, both_ways, timeout_s=110.0)


def shortly(rank: int, size: int, name: str) -> None:
    """Lists and stacks alike need nothing of the slow path."""
    with own_group(rank, size, name) as group:
        group._arguments = None
        block, blocks, others = (
            np.full(5, rank, np.int64),
            np.zeros((size, 5), np.int64),
            np.ones((size, 5), np.int64),
        )
        for given, taken in ((list(others), list(blocks)), (others, blocks)):
            blocks[:] = 0
            group.allgather(taken, block)
            assert blocks[:, 0].tolist() == list(range(size))
            group.alltoall(taken, given)
            assert blocks.all()
            group.gather(taken if rank == 0 else None, block, 0)
            group.scatter(block, given if rank == 0 else None, 0)
            group.reducescatter(block, given)
            assert (block == size).all()
            block[:] = rank


def test_lists_and_stacks_go_the_short_way(pool: RankPool) -> None:
    pool.run(2, shortly, fresh())


def without_reading(rank: int, size: int, name: str) -> None:
    # one rank that does not want to is enough
    os.environ["COLLTENSOR_READ_PEERS"] = "0" if rank == 0 else "1"
    try:
        with own_group(rank, size, name) as group:
            for step, count in enumerate(COUNTS[-3:]):
                every_operation(rank, size, count, step, None, group)
    finally:
        del os.environ["COLLTENSOR_READ_PEERS"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_large_messages_where_ranks_may_not_read_each_other(
    pool: RankPool, world_size: int
) -> None:
    pool.run(world_size, without_reading, fresh())


def strided_on_one_rank(rank: int, size: int) -> None:
    """A strided array cannot be read as it lies: then all ranks go through staging."""
    group = group_of(size, "shm")
    count = 1_500_000
    for odd in range(size):
        room = np.zeros((count, 2), np.float32)
        data = room[:, 0] if rank == odd else np.zeros(count, np.float32)
        data[:] = rank + 1
        group.allreduce(data)
        assert (data == size * (size + 1) / 2).all()
        assert not room[:, 1].any()
        outputs = [np.zeros(count, np.float32) for _ in range(size)]
        data[:] = rank
        group.allgather(outputs, data)
        assert all((output == source).all() for source, output in enumerate(outputs))


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_strided_array_among_readable_ones(pool: RankPool, world_size: int) -> None:
    pool.run(world_size, strided_on_one_rank)


def refused(rank: int, size: int, name: str) -> None:
    """What the fast path does not take is explained by the general one, before anything is sent."""
    with own_group(rank, size, name) as group:
        data = np.ones(6, np.float32)
        locked = data.copy()
        locked.flags.writeable = False
        with pytest.raises(col.ReadOnlyError):
            group.allreduce(locked)
        with pytest.raises(col.ReadOnlyError):
            group.allgather([data, locked], data)
        with pytest.raises(col.UnsupportedDTypeError):
            group.allreduce(np.ones(3, np.int32), col.ReduceOp.AVERAGE)
        with pytest.raises(col.UnsupportedTensorError):
            group.broadcast(object(), 0)
        with pytest.raises(col.RankError):
            group.broadcast(data, 2)
        with pytest.raises(col.ShapeError):
            group.allgather([data], data)
        with pytest.raises(col.ShapeError):
            group.alltoall([data, data.copy()], [np.ones(6), np.ones(6)])
        with pytest.raises(col.AliasError):
            group.allgather([data, data], np.ones(6, np.float32))
        with pytest.raises(col.AliasError):
            group.reducescatter(data[:3], [data[1:4], data[3:]])
        with pytest.raises(col.AliasError):
            group.sendrecv(data[:4], 1 - rank, data[2:], 1 - rank)
        if rank == 0:
            group.send(locked, 1)  # only read: allowed, by the slow path
        else:
            group.recv(data, 0)
        strided = np.ones((4, 4), np.float32).T[1:]
        group.allreduce(strided)
        assert (strided == size).all()
        assert group.allreduce(data) is data


def test_what_is_refused(pool: RankPool) -> None:
    pool.run(2, refused, fresh())


def disagreeing(rank: int, size: int, name: str) -> list[str]:
    """Calls that differ, each way against each: MismatchError on both ranks with both sides' words, and on it goes."""
    found = []
    with own_group(rank, size, name) as group:
        x, y = np.full(3 + rank, 1.0 + rank), np.full(4, 1.0 + rank, np.float32)
        calls: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
            (lambda **way: group.allreduce(x, **way), lambda **way: group.allreduce(x, **way)),
            (
                lambda **way: group.allreduce(y, col.ReduceOp.MAX, **way),
                lambda **way: group.allreduce(y, **way),
            ),
            (
                lambda **way: group.broadcast(y, 0, **way),
                lambda **way: group.broadcast(y, 1, **way),
            ),
            (lambda **way: group.barrier(), lambda **way: group.allreduce(y, **way)),
            (
                lambda **way: group.reduce(y, 0, **way),
                lambda **way: group.allgather([y.copy(), y], y, **way),
            ),
            (lambda **way: group.send(x, 1, **way), lambda **way: group.recv(x, 0, **way)),
            (
                lambda **way: group.broadcast_object("word", 0),
                lambda **way: group.allreduce(y, **way),
            ),
        ]
        for number, pair in enumerate(calls):
            for ways in ((None, None), (None, True), (True, None)):
                call = pair[rank]
                with pytest.raises(col.MismatchError) as caught:
                    call(copy=ways[rank])
                found.append(str(caught.value))
                assert (x == 1.0 + rank).all(), number
                assert (y == 1.0 + rank).all(), number
                total = np.full(9, 1, np.int64)
                group.allreduce(total)
                assert (total == size).all()
    return found


def test_mismatches_are_explained(pool: RankPool) -> None:
    for message in zip(*pool.run(2, disagreeing, fresh()), strict=True):
        assert all("rank 0" in side or "ranks 0" in side or "rank 1" in side for side in message)
        assert "float64[3]" in message[0] or "float32[4]" in message[0]


def counted(rank: int, size: int, name: str) -> str:
    """Calls of all kinds are numbered alike, whichever way they went."""
    with own_group(rank, size, name) as group:
        data = np.ones(3, np.float32)
        for step in range(5):
            group.allreduce(data, copy=True if step % 2 == rank else None)
        with pytest.raises(col.MismatchError) as caught:
            group.allreduce(np.ones(1 + rank))
    return str(caught.value)


def test_the_number_of_a_call_is_the_same_on_all_ranks(pool: RankPool) -> None:
    for message in pool.run(2, counted, fresh()):
        assert message.count("allreduce #6") == 2, message


def calls_in_a_handler(rank: int, size: int, name: str) -> None:
    """A signal's handler calls another group while a fast call waits with tensors of its own."""
    with own_group(rank, size, name) as group, own_group(rank, size, f"{name}-2") as other:
        group.allreduce(np.zeros(1))  # the first call with a type goes the slow path
        outputs = [np.zeros(5, np.float32) for _ in range(size)]
        inner: list[list[float]] = []

        def handler(number: int, frame: object) -> None:
            found = [np.zeros(3) for _ in range(size)]
            other.allgather(found, np.full(3, 10.0 + rank))
            inner.append([float(array[0]) for array in found])

        if rank == 0:
            before = signal.signal(signal.SIGALRM, handler)
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.3)
                group.allgather(outputs, np.full(5, 1.0 + rank, np.float32))
            finally:
                signal.signal(signal.SIGALRM, before)
        else:
            handler(0, None)
            time.sleep(0.2)
            group.allgather(outputs, np.full(5, 1.0 + rank, np.float32))
        assert inner == [[10.0 + source for source in range(size)]]
        assert [array.tolist() for array in outputs] == [
            [1.0 + source] * 5 for source in range(size)
        ]


def test_a_signal_handler_calls_another_group(pool: RankPool) -> None:
    pool.run(2, calls_in_a_handler, fresh())


def beside_a_waiting_call(rank: int, size: int, name: str) -> None:
    """A tensor that one thread may not pass is its own matter, while a call of another thread waits."""
    with own_group(rank, size, name) as group:
        group.allreduce(np.zeros(1))
        data, failures = np.full(3, 1.0 + rank), list[BaseException]()

        def waits() -> None:
            try:
                group.allreduce(data)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=waits)
        if rank == 0:
            thread.start()
            time.sleep(0.2)
            locked = np.zeros(2)
            locked.flags.writeable = False
            for call in (group.allreduce, lambda array: group.recv(array, 1)):
                with pytest.raises(col.ReadOnlyError):
                    call(locked)
        else:
            time.sleep(0.6)
            thread.start()
        thread.join()
        assert not failures
        assert data.tolist() == [3.0] * 3
        assert group.broken is None
        assert group.allreduce(np.ones(1)).tolist() == [size]


def test_a_bad_tensor_beside_a_waiting_call(pool: RankPool) -> None:
    pool.run(2, beside_a_waiting_call, fresh())


def has_steps(group: Any) -> bool:
    """Make a first call, and return whether one can be left between its steps: not where the ranks share a core."""
    group.allreduce(np.zeros(1))
    return not group._agreeing._crowded


def begin(group: Any, data: np.ndarray) -> Any:
    """Begin an allreduce that the other ranks do not come to, and return what finishes it."""
    call = group._fastpath.allreduce[col.ReduceOp.SUM]
    assert call.function(data) == PENDING
    return call


def left_between_steps(rank: int, size: int, name: str) -> bool:
    """A call whose first step has met the others, and whose thread then finds the group destroyed."""
    with own_group(rank, size, name) as group:
        if not has_steps(group):
            return False
        if rank == 0:
            data = np.ones(3)
            call = begin(group, data)
            began = time.monotonic()
            thread = threading.Thread(target=group.destroy)
            thread.start()
            thread.join()
            assert time.monotonic() - began < 2
            with pytest.raises(col.GroupError, match=r"init_collective_group\(\)"):
                call.finish((data,), PENDING)
        else:
            time.sleep(0.5)
            with pytest.raises(col.PeerLostError):
                group.barrier()
    return True


def test_a_group_is_destroyed_between_the_steps_of_a_call(pool: RankPool) -> None:
    if not all(pool.run(2, left_between_steps, fresh())):
        pytest.skip("the ranks share a core, where a call has one step")


def left_pending(rank: int, size: int, name: str) -> bool:
    """A call that was interrupted where nothing could notice: the next one says so, to all ranks and at once."""
    with own_group(rank, size, name) as group:
        if not has_steps(group):
            return False
        data = np.ones(3)
        if rank == 0:
            begin(group, data)
            time.sleep(0.6)
        else:
            time.sleep(0.2)
            group.allreduce(data)  # rank 0 has come to this one
        began = time.monotonic()
        with pytest.raises(col.GroupError, match=r"^barrier: group '"):
            group.barrier()
        assert time.monotonic() - began < 2
    return True


def test_a_call_that_was_left_between_its_steps(pool: RankPool) -> None:
    if not all(pool.run(2, left_pending, fresh())):
        pytest.skip("the ranks share a core, where a call has one step")


def call_between_steps(rank: int, size: int, name: str) -> bool:
    """A signal's handler that calls between the steps of a call is refused, and the call goes on."""
    with own_group(rank, size, name) as group:
        if not has_steps(group):
            return False
        data = np.ones(3)
        if rank == 0:
            steps = group._fastpath.allreduce[col.ReduceOp.SUM]
            finish, refused = steps.finish, []

            class Steps:
                function = steps.function

                def finish(self, tensors: Any, code: int) -> bool:
                    signal.raise_signal(signal.SIGUSR2)
                    return bool(finish(tensors, code))

            def handle(*_: Any) -> None:
                with pytest.raises(col.GroupError, match="__del__"):
                    group.barrier()
                refused.append(True)

            previous = signal.signal(signal.SIGUSR2, handle)
            group._allreduce = [Steps()]
            try:
                group.allreduce(data)
            finally:
                signal.signal(signal.SIGUSR2, previous)
                group._allreduce = group._fastpath.allreduce
            assert refused == [True]
        else:
            time.sleep(0.3)
            group.allreduce(data)
        assert (data == size).all()
        group.barrier()
    return True


def test_a_handler_that_calls_between_the_steps_of_a_call(pool: RankPool) -> None:
    if not all(pool.run(2, call_between_steps, fresh())):
        pytest.skip("the ranks share a core, where a call has one step")


def raising_after_the_call(rank: int, size: int, name: str, operation: str) -> None:
    """A handler's ValueError that comes when the call is done is not taken for a tensor that cannot be exported."""
    with own_group(rank, size, name) as group:
        group.allreduce(np.zeros(1))
        direct = group._fastpath
        call = {
            "allreduce": direct.allreduce[col.ReduceOp.SUM],
            "barrier": direct.barrier,
            "broadcast": direct.broadcast[0],
        }[operation]
        arguments = {"allreduce": (np.ones(3),), "barrier": (), "broadcast": (np.ones(3), 0)}[
            operation
        ]
        run = getattr(group, operation)
        if rank == 0:
            function = call.function

            def raises(*tensors: Any) -> int:
                code = function(*tensors)
                raise ValueError(f"handler {code}")

            call.function = raises
            time.sleep(0.2)
            with pytest.raises(ValueError, match=r"^handler \d+$"):
                run(*arguments)
            with pytest.raises(col.GroupError):
                group.barrier()
        else:
            run(*arguments)
            with pytest.raises(col.GroupError, match="rank 0"):
                run(*arguments)


@pytest.mark.parametrize("operation", ["allreduce", "barrier", "broadcast"])
def test_a_handler_raises_when_a_call_is_done(pool: RankPool, operation: str) -> None:
    pool.run(2, raising_after_the_call, fresh(), operation)


def torch_tensors(rank: int, size: int, name: str) -> None:
    import torch

    with own_group(rank, size, name) as group:
        plain = torch.full((5,), 1.0 + rank)
        version = plain._version
        assert group.allreduce(plain) is plain
        assert plain.tolist() == [3.0] * 5
        assert plain._version > version
        version = plain._version
        group.broadcast(plain, 0)
        assert (plain._version > version) == (rank != 0)
        parameter = torch.nn.Parameter(torch.ones(2))
        with pytest.raises(col.ReadOnlyError):
            group.allreduce(parameter)
        conjugate = torch.ones(2, dtype=torch.complex64).conj()
        with pytest.raises(col.UnsupportedTensorError):
            group.allreduce(conjugate)
        with pytest.raises(col.UnsupportedTensorError):
            group.allreduce(torch.ones(2, 2).to_sparse())
        half = torch.full((3,), 1.5, dtype=torch.bfloat16)
        group.allreduce(half)
        assert half.tolist() == [3.0] * 3
        with torch.no_grad():
            group.allreduce(parameter)
        assert parameter.tolist() == [2.0, 2.0]


@pytest.mark.needs("torch")
def test_torch_tensors_go_the_short_way(pool: RankPool) -> None:
    pool.run(2, torch_tensors, fresh())


def donated(rank: int, size: int, name: str) -> None:
    """A donated array outlives a mismatch, and keeps its address where the ranks agree."""
    import jax.numpy as jnp

    with own_group(rank, size, name) as group:
        for count in (5, 2000, 700_000):
            array = jnp.full(count, 1.0 + rank)
            with pytest.raises(col.MismatchError):
                group.allreduce(array, col.ReduceOp.MAX if rank else col.ReduceOp.SUM, donate=True)
            assert not array.is_deleted()
            assert (array == 1.0 + rank).all()
            address = array.unsafe_buffer_pointer()
            result = group.allreduce(array, donate=True)
            assert array.is_deleted()
            assert result.unsafe_buffer_pointer() == address
            assert (result == 3.0).all()
            kept = jnp.full(count, 1.0 + rank)
            assert (group.allreduce(kept) == 3.0).all()
            assert (kept == 1.0 + rank).all()
            # somebody else holds the memory: it is copied, and they see no change
            shared = np.asarray(kept)
            assert (group.allreduce(kept, donate=True) == 3.0).all()
            assert (shared == 1.0 + rank).all()
            if rank == 0:
                with pytest.raises(col.MismatchError):
                    group.send(jnp.ones(count), 1)
                group.send(jnp.full(count, 7.0), 1)
            else:
                target = jnp.zeros(count)
                with pytest.raises(col.MismatchError):
                    group.recv(jnp.zeros(count + 1), 0, donate=True)
                assert (group.recv(target, 0, donate=True) == 7.0).all()
                assert target.is_deleted()
            tree = {"a": jnp.full(count, 1.0 + rank), "b": np.full(3, 1.0 + rank)}
            result = group.allreduce(tree, donate=True)
            assert (result["a"] == 3.0).all()
            assert (result["b"] == 3.0).all()


@pytest.mark.needs("jax")
def test_donated_arrays(pool: RankPool) -> None:
    pool.run(2, donated, fresh())


def given_away(rank: int, size: int, name: str) -> str:
    """Rank 0 deletes an array while its call waits for rank 1, so that there is nothing to put the result into."""
    jnp = pytest.importorskip("jax.numpy")
    with own_group(rank, size, name) as group:
        array = jnp.full(5, 1.0 + rank)
        assert (group.allreduce(array, donate=True) == 3.0).all()
        array = jnp.full(5, 1.0 + rank)
        if rank == 0:
            timer = threading.Timer(0.3, array.delete)
            timer.start()
        else:  # what rank 0 had brought before is right
            time.sleep(1.0)
            assert (group.allreduce(array, donate=True) == 3.0).all()
            assert array.is_deleted()
        with pytest.raises(col.CollectiveError) as caught:
            group.allreduce(array if rank == 0 else jnp.ones(5), donate=True)
        assert group.broken is not None
        return f"{caught.value} / {caught.value.__cause__!r}"


@pytest.mark.needs("jax")
def test_an_array_that_is_given_away_while_its_call_waits(pool: RankPool) -> None:
    first, second = pool.run(2, given_away, fresh())
    assert "deleted" in first
    assert "rank 0" in second


def immutable_beside_others(rank: int, size: int, name: str) -> None:
    """JAX's fast path meets numpy's and the general one, and takes its turn after an asynchronous call."""
    jnp = pytest.importorskip("jax.numpy")
    with own_group(rank, size, name) as group:
        # JAX's fast path needs nothing of the engine
        group._engine.run = _never if rank == 0 else group._engine.run
        for donate in (False, True):
            x = jnp.full(7, 1.0 + rank, jnp.float32)
            y = (
                group.allreduce(x, donate=donate)
                if rank == 0
                else group.allreduce(np.full(7, 2.0, np.float32))
            )
            assert y.tolist() == [3.0] * 7
            if rank == 0:
                assert x.is_deleted() == donate
        del group._engine.__dict__["run"]
        large = jnp.full(1_000_003, 1.0 + rank)
        work = group.allreduce(jnp.full(3, 1.0 + rank), async_op=True)
        assert float(group.allreduce(large, col.ReduceOp.MAX)[-1]) == 2.0
        assert work.result().tolist() == [3.0] * 3
        with pytest.raises(col.MismatchError, match=r"float32\[3\].*MAX|MAX.*float32\[3\]"):
            group.allreduce(
                jnp.ones(3, jnp.float32), col.ReduceOp.MAX if rank else col.ReduceOp.SUM
            )
        assert group.allreduce(jnp.ones(0)).shape == (0,)
        assert group.allreduce(jnp.ones((), jnp.bfloat16)).dtype == jnp.bfloat16
        assert group.allreduce({"a": jnp.ones(3, jnp.float32)})["a"].tolist() == [2.0] * 3


def _never(*arguments: Any) -> None:
    raise AssertionError("the slow path")


@pytest.mark.needs("jax")
def test_arrays_that_their_framework_never_changes_go_a_short_way(pool: RankPool) -> None:
    pool.run(2, immutable_beside_others, fresh())


def immutable_moved(rank: int, size: int, name: str, other: str) -> str:
    """Rank 0's JAX arrays go the short way in every operation on trees; rank 1 has others, or goes the general one."""
    jax, jnp = pytest.importorskip("jax"), pytest.importorskip("jax.numpy")
    made = jnp.array if rank == 0 or other != "numpy" else np.array
    with own_group(rank, size, name) as group:
        if rank == 0 or other != "general":
            group._engine.run = _never
        way = True if rank and other == "general" else None

        def given(scale: float) -> dict[str, Any]:
            rows = np.arange(6, dtype=np.float32).reshape(2, 3) * scale
            return {
                "tree": {"a": made(rows), "b": [made(rows[0] + 1), made(np.full((), 7, np.int32))]},
                "one": made(rows),
                "empty": made(rows[:0]),
            }

        def check(result: Any, scale: float) -> None:
            wanted = given(scale)
            jax.tree.map(np.testing.assert_array_equal, result, wanted)
            for leaf in jax.tree.leaves(result):
                assert type(leaf) is type(wanted["one"])

        for root, donate in ((0, False), (1, False), (1, True)):
            donates = donate and rank == 0
            mine = given(rank + 1.0)
            leaves = jax.tree.leaves(mine)
            got = {
                key: group.broadcast(x, root, donate=donates, copy=way) for key, x in mine.items()
            }
            check(got, root + 1.0)
            if rank == 0:
                assert [leaf.is_deleted() for leaf in leaves] == [donate] * len(leaves)
                assert (got["tree"] is mine["tree"]) == (root == 0)
            mine = given(rank + 1.0)
            del mine["tree"]["b"][1]
            got = {key: group.reduce(x, root, copy=way) for key, x in mine.items()}
            expected = {"a": got["tree"]["a"], "b": got["one"]}
            wanted = np.arange(6).reshape(2, 3) * (3 if rank == root else rank + 1)
            for leaf in expected.values():
                np.testing.assert_array_equal(leaf, wanted)
            mine = given(rank + 1.0)
            if rank == root:
                for x in mine.values():
                    assert group.send(x, 1 - rank, copy=way) is x
            else:
                received = {key: group.recv(x, root, copy=way) for key, x in mine.items()}
                check(received, root + 1.0)
                if rank == 0:
                    check(mine, 1.0)  # JAX's own stay as they were
        message = ""
        for operation in ("broadcast", "transfer"):
            # the number of elements of one leaf differs
            tree = {"x": made(np.ones(3 + rank, np.float32)), "y": made(np.ones(2, np.float32))}
            call = (group.send, group.recv)[rank] if operation == "transfer" else group.broadcast
            with pytest.raises(col.MismatchError) as caught:
                call(tree, 1 - rank if operation == "transfer" else 0)
            message += str(caught.value)
        group._engine.__dict__.pop("run", None)
        if rank == 0:
            with pytest.raises(col.UnsupportedTensorError, match=r"jax\.jit"):
                jax.jit(lambda x: group.broadcast(tree, 0) and x)(1.0)
            eight = jnp.ones(3, jnp.float8_e4m3fn)
            group.send({"e": eight}, 1)
        else:
            eight = group.recv({"e": jnp.zeros(3, jnp.float8_e4m3fn)}, 0)["e"]
        assert eight.astype(jnp.float32).tolist() == [1.0] * 3
        return message


@pytest.mark.needs("jax")
@pytest.mark.parametrize("other", ["jax", "numpy", "general"])
def test_arrays_of_jax_move_the_short_way(pool: RankPool, other: str) -> None:
    for message in pool.run(2, immutable_moved, fresh(), other):
        assert message.count("['x'] float32[3]") == message.count("['x'] float32[4]") >= 2


def trees_sent(rank: int, size: int, name: str) -> str:
    """Trees go the fast path in both directions, meet the slow path, and are compared leaf by leaf."""

    def tree(scale: float) -> Any:
        grid = np.arange(24, dtype=np.float32).reshape(4, 6) * scale
        return {
            "a": grid.T,
            "b": [np.full(300, scale), np.full(3, scale, np.int32)],
            "c": grid[:, ::2].copy(),
        }

    to, source = (rank + 1) % size, (rank - 1) % size
    with own_group(rank, size, name) as group:
        general = group._engine.run
        for slow in ((), (0,), (1,), range(size)):
            group._engine.run = general if rank in slow else _never
            way = True if rank in slow else None
            sent, received = tree(rank + 1.0), tree(0.0)
            if rank % 2:
                assert group.recv(received, source, copy=way) is received
                assert group.send(sent, to, copy=way) is sent
            else:
                group.send(sent, to, copy=way)
                group.recv(received, source, copy=way)
            wanted = tree(source + 1.0)
            for key in ("a", "c"):
                np.testing.assert_array_equal(received[key], wanted[key])
            for one, other in zip(received["b"], wanted["b"], strict=True):
                np.testing.assert_array_equal(one, other)
        group._engine.run = general
        overlapping = np.zeros(4, np.float32)
        if rank == 0:
            with pytest.raises(col.MismatchError) as caught:
                group.send({"x": np.ones(3)}, 1)
            group.send([overlapping, overlapping], 1)
        elif rank == 1:
            with pytest.raises(col.MismatchError) as caught:
                group.recv({"x": np.ones(4)}, 0)
            with pytest.raises(col.AliasError):
                group.recv([overlapping, overlapping], 0)
            group.recv([np.ones(4, np.float32), np.ones(4, np.float32)], 0)
        group.barrier()
        return str(caught.value) if rank < 2 else ""


@pytest.mark.parametrize("world_size", [2, 4])
def test_trees_are_sent_the_short_way(pool: RankPool, world_size: int) -> None:
    sent, received, *_ = pool.run(world_size, trees_sent, fresh())
    for message in (sent, received):
        assert "['x'] float64[3]" in message
        assert "['x'] float64[4]" in message


def steps(rank: int, size: int, name: str, library: str) -> float:
    """What a Synchronizer compares is compared by native code, and its calls wait as long as the group's."""
    made: Any = pytest.importorskip("jax.numpy" if library == "jax" else library)
    with own_group(rank, size, name) as group:
        tree = {"a": made.ones((2, 6)), "b": [made.ones(3)]}
        kept = Synchronizer(tree, group=group, average=False)
        kept.check = _never  # type: ignore[method-assign]
        for _ in range(2):
            assert kept.sync(tree)["a"].shape == (2, 6)
        del kept.check
        for wrong in (
            {"a": made.ones((3, 4)), "b": [made.ones(3)]},
            {"a": made.ones(12), "b": [made.ones(3)]},
        ):
            with pytest.raises(col.ShapeError, match=r"leaf \['a'\]"):
                kept.sync(wrong)
        with pytest.raises(col.ShapeError):
            kept.sync(tree["a"])
        group.set_timeout(0.2)
        group.barrier()
        began = time.monotonic()
        if rank == 0:
            with pytest.raises(col.CollectiveTimeoutError):
                kept.sync(tree)
        else:
            time.sleep(0.5)
        return time.monotonic() - began


@pytest.mark.parametrize("library", ["numpy", pytest.param("jax", marks=pytest.mark.needs("jax"))])
def test_steps_of_a_synchronizer_go_the_short_way(pool: RankPool, library: str) -> None:
    assert max(pool.run(2, steps, fresh(), library)) < 5


def interrupted_claim(rank: int, size: int, name: str) -> str:
    """Ctrl-C while a JAX array's call waits breaks the group, and is raised."""
    jnp = pytest.importorskip("jax.numpy")
    with own_group(rank, size, name) as group:
        x = jnp.ones(5)
        group.allreduce(x)
        if rank == 0:
            timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                group.allreduce(x)
            assert not x.is_deleted()
            return str(group.broken)
        time.sleep(1.0)
        with pytest.raises(col.CollectiveError) as caught:
            group.allreduce(x)
        return str(caught.value)


@pytest.mark.needs("jax")
def test_an_interrupt_while_a_claim_waits(pool: RankPool) -> None:
    broken, told = pool.run(2, interrupted_claim, fresh())
    assert "KeyboardInterrupt" in broken
    assert "rank 0" in told


def strided_on_the_fast_path(rank: int, size: int, name: str, library: str) -> None:
    """One tensor of any positive steps goes as it is, whatever the layouts of the others."""

    def made(array: np.ndarray[Any, Any]) -> Any:
        if library == "numpy":
            return array
        import torch

        return torch.from_numpy(array)

    with own_group(rank, size, name) as group:
        group._engine.run = _never

        # the same layout on both ranks, in another order than row by row; and two layouts
        for layout in (lambda x: x.T, lambda x: x[:, ::2], lambda x: x[1::2]):
            given = made(layout(np.full((4, 4), rank + 1.0)))
            assert group.allreduce(given) is given
            assert np.unique(np.asarray(given)).tolist() == [3.0]
        base = np.full((4, 4), rank + 1.0)
        part = base[:, 1:3] if rank else base[:2].T
        group.allreduce(made(part))
        assert np.unique(part).tolist() == [3.0]
        assert base[:, 3].tolist() == ([2.0] * 4 if rank else [3.0, 3.0, 1.0, 1.0])

        # what is between the elements stays
        base = np.arange(12, dtype=np.int16).reshape(3, 4) * (rank + 1)
        group.broadcast(made(base[:, ::2]), 1)
        assert base[:, ::2].tolist() == [[0, 4], [8, 12], [16, 20]]
        assert base[0, 1::2].tolist() == [1 * (rank + 1), 3 * (rank + 1)]
        group.reduce(made(base[:, ::2]), 0)
        assert base[2, 2] == (40 if rank == 0 else 20)
        (group.send if rank == 0 else group.recv)(made(base[:, 1::2]), 1 - rank)
        assert base[0, 1::2].tolist() == [1, 3]

        halves = made(np.full((4, 4), rank + 0.5, np.float16)[:, 1:3])
        work = group.allreduce(halves, async_op=True)
        assert np.asarray(work.result()).tolist() == [[2.0, 2.0]] * 4
        del group._engine.__dict__["run"]

        shared = np.lib.stride_tricks.as_strided(np.ones(5), (3, 3), (8, 8))
        with pytest.raises(col.AliasError):
            group.allreduce(made(shared))
        with pytest.raises(col.MismatchError, match="float64"):
            group.allreduce(made(np.ones((3, 8))[:, :: 2 + 2 * rank]))
        group.barrier()


@pytest.mark.parametrize(
    "library", ["numpy", pytest.param("torch", marks=pytest.mark.needs("torch"))]
)
def test_a_strided_tensor_goes_the_fast_path(pool: RankPool, library: str) -> None:
    pool.run(2, strided_on_the_fast_path, fresh(), library)
