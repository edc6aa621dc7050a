"""JAX arrays: never written behind anybody's back; with ``donate=True`` the same memory under a new array."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pool import RankPool
from worlds import Report, World

import colltensor as col

pytestmark = pytest.mark.needs("jax")

COUNT = 1024
SHAPE = (32, 32)


def _jax() -> Any:
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    return jax


def _fresh(value: float, shape: tuple[int, ...] = SHAPE) -> Any:
    """Return an array that owns its memory, ready."""
    return (_jax().numpy.zeros(shape, "float32") + value).block_until_ready()


def leaves_arrays_alone(rank: int, world_size: int, world: World) -> None:
    group = world.group()
    total = sum(range(1, world_size + 1))
    x = _fresh(rank + 1)
    pointer = x.unsafe_buffer_pointer()
    y = group.allreduce(x)
    assert y is not x
    assert not x.is_deleted()
    assert y.unsafe_buffer_pointer() != pointer
    assert x.unsafe_buffer_pointer() == pointer
    assert (np.asarray(x) == rank + 1).all()
    assert (np.asarray(y) == total).all()
    assert (np.asarray(group.broadcast(x, 0)) == 1).all()
    assert (np.asarray(x) == rank + 1).all()
    given = [x] * world_size
    result = group.allgather(given, x)  # one array as every entry: each gets an array of its own
    assert [int(entry[0, 0]) for entry in result] == list(range(1, world_size + 1))
    assert (np.asarray(x) == rank + 1).all()
    assert (np.asarray(group.reduce(x, 0)) == (total if rank == 0 else rank + 1)).all()
    tree = {"a": x, "b": x}
    summed = group.allreduce(tree)
    assert summed is not tree
    assert tree["a"] is x
    assert (np.asarray(summed["a"]) == total).all()
    assert (np.asarray(summed["b"]) == total).all()
    assert (np.asarray(x) == rank + 1).all()


def test_arrays_are_left_alone(pool: RankPool, world: World) -> None:
    pool.run(world.size, leaves_arrays_alone, world)


def donate(rank: int, world_size: int, world: World) -> None:
    """Every operation that takes ``donate`` gives the address back and deletes what it was given."""
    group = world.group()
    size = world_size
    report = Report(group)
    calls: dict[str, Callable[[Any], Any]] = {
        "allreduce": lambda x: group.allreduce(x, donate=True),
        "scatter": lambda x: group.scatter(
            x, [_fresh(5)] * size if rank == 0 else None, donate=True
        ),
        "reducescatter": lambda x: group.reducescatter(x, [_fresh(5)] * size, donate=True),
        "tree": lambda x: group.allreduce({"k": [x]}, donate=True)["k"][0],
    }
    if rank:
        calls["broadcast"] = lambda x: group.broadcast(x, 0, donate=True)
    for name, call in calls.items():
        with report.case(name):
            x = _fresh(5)
            pointer = x.unsafe_buffer_pointer()
            y = call(x)
            assert x.is_deleted()
            assert y.unsafe_buffer_pointer() == pointer
            assert y.shape == SHAPE
            expected = 5 * size if name in ("allreduce", "reducescatter", "tree") else 5
            assert (np.asarray(y) == expected).all()
    if rank == 0:
        with report.case("the root of a broadcast, which is only read"):
            x = _fresh(5)
            assert group.broadcast(x, 0, donate=True) is x
            assert not x.is_deleted()
    with report.case("reduce"):
        x = _fresh(5)
        y = group.reduce(x, 0, donate=True)
        assert x.is_deleted() == (rank == 0)
        assert (np.asarray(y) == (5 * size if rank == 0 else 5)).all()
    with report.case("sendrecv"):
        if size > 1:
            x, to, of = _fresh(0), (rank + 1) % size, (rank - 1) % size
            pointer = x.unsafe_buffer_pointer()
            y = group.sendrecv(_fresh(rank), to, x, of, donate=True)
            assert x.is_deleted()
            assert y.unsafe_buffer_pointer() == pointer
            assert (np.asarray(y) == of).all()
    with report.case("large, and small"):
        for shape in ((3 << 20,), (1,), ()):
            x = _fresh(rank, shape)
            pointer = x.unsafe_buffer_pointer()
            y = group.allreduce(x, donate=True)
            assert x.is_deleted()
            assert y.unsafe_buffer_pointer() == pointer
            assert float(y.reshape(-1)[-1]) == sum(range(size))
    with report.case("empty"):
        x = _fresh(0, (0, 3))
        assert group.allreduce(x, donate=True).shape == (0, 3)
        assert x.is_deleted()
    report.done()


def test_donation_keeps_the_address(pool: RankPool, world: World) -> None:
    pool.run(world.size, donate, world)


def sharers_keep_their_values(rank: int, world_size: int, world: World) -> None:
    """Whoever else holds the memory (an export, numpy memory, a sibling) never sees the result."""
    group = world.group()
    jax = _jax()
    total = sum(range(1, world_size + 1))
    report = Report(group)
    with report.case("a live DLPack export"):
        x = _fresh(rank + 1)
        export = np.from_dlpack(x)
        y = group.allreduce(x, donate=True)
        assert (np.asarray(y) == total).all()
        assert (export == rank + 1).all()
    with report.case("numpy's view"):
        x = _fresh(rank + 1)
        view = np.asarray(x)
        y = group.allreduce(x, donate=True)
        assert (np.asarray(y) == total).all()
        assert (view == rank + 1).all()
    with report.case("numpy memory that the array aliases"):
        raw = np.empty(COUNT * 4 + 64, np.uint8)
        start = -raw.ctypes.data % 64
        host = raw[start : start + COUNT * 4].view(np.float32)
        host[:] = rank + 1
        x = jax.device_put(host)
        y = group.allreduce(x, donate=True)
        assert (np.asarray(y) == total).all()
        assert (host == rank + 1).all()
    with report.case("an array imported through DLPack"):
        host[:] = rank + 1
        x = jax.dlpack.from_dlpack(host, copy=False)
        y = group.allreduce(x, donate=True)
        assert (np.asarray(y) == total).all()
        assert (host == rank + 1).all()
    imports = {
        "as it is": lambda x: x,
        "by clone": lambda x: x.clone(),
        "by addressable_data": lambda x: x.addressable_data(0),
        "by reshape to its shape": lambda x: x.reshape(x.shape),
        "by jnp.asarray": jax.numpy.asarray,
    }
    for name, derive in imports.items():
        with report.case(
            f"an array imported with copy=True, which JAX 0.10.2 does not copy, {name}"
        ):
            host[:] = rank + 1
            x = derive(jax.dlpack.from_dlpack(host, copy=True))
            y = group.allreduce(x, donate=True)
            assert x.is_deleted()
            assert (np.asarray(y) == total).all()
            assert (host == rank + 1).all()
    with report.case("a sibling by device_put"):
        x = _fresh(rank + 1)
        sibling = jax.device_put(x, x.sharding)
        y = group.allreduce(x, donate=True)
        assert (np.asarray(y) == total).all()
        assert sibling.is_deleted() or (np.asarray(sibling) == rank + 1).all()
    with report.case("a result that is donated in turn"):
        x = _fresh(rank + 1)
        y = group.allreduce(x)
        pointer = y.unsafe_buffer_pointer()
        z = group.allreduce(y, donate=True)
        assert z.unsafe_buffer_pointer() == pointer
        assert (np.asarray(z) == total * world_size).all()
        assert (np.asarray(x) == rank + 1).all()
    report.done()


def test_donation_changes_nobody_elses_values(pool: RankPool, world: World) -> None:
    pool.run(world.size, sharers_keep_their_values, world)


def waits_for_pending_work(rank: int, world_size: int, world: World) -> None:
    """The array is still being computed when the call is made."""
    group = world.group()
    jax = _jax()

    @jax.jit
    def slow(x: Any) -> Any:
        return jax.lax.fori_loop(0, 30, lambda _, y: y @ y / 512, x)

    for options in ({}, {"donate": True}):
        pending = slow(jax.numpy.full((512, 512), 1.0, "float32"))
        result = group.allreduce(pending, **options)
        assert (np.asarray(result) == world_size).all()


def test_pending_computation_is_waited_for(pool: RankPool, world: World) -> None:
    pool.run(world.size, waits_for_pending_work, world)


def results_are_ordinary_arrays(rank: int, world_size: int, world: World) -> None:
    group = world.group()
    jax = _jax()
    x = _fresh(rank)
    y = group.allreduce(x)
    assert isinstance(y, jax.Array)
    assert y.sharding == x.sharding
    assert y.dtype == x.dtype
    assert float(jax.jit(lambda a: (a * 2).sum())(y)) == 2 * COUNT * sum(range(world_size))
    assert float(jax.grad(lambda a: (a * y).sum())(y)[0, 0]) == sum(range(world_size))
    work = group.allreduce(x, async_op=True)
    assert (np.asarray(work.result()) == sum(range(world_size))).all()
    donated = _fresh(rank)
    pointer = donated.unsafe_buffer_pointer()
    work = group.allreduce(donated, async_op=True, donate=True)
    assert work.result().unsafe_buffer_pointer() == pointer
    weak = jax.numpy.asarray(1.0)
    assert float(group.allreduce(weak)) == world_size
    assert col.ReduceOp.SUM == 0


def test_results_are_ordinary_arrays(pool: RankPool, world: World) -> None:
    pool.run(world.size, results_are_ordinary_arrays, world)


def a_mismatch_leaves_a_donated_array(rank: int, world_size: int, world: World) -> None:
    group = world.group()
    x = _fresh(rank, (8 + rank,))
    with pytest.raises(col.MismatchError):
        group.allreduce(x, donate=True)
    assert not x.is_deleted()
    assert (np.asarray(x) == rank).all()


def test_a_mismatch_does_not_consume_a_donated_array(pool: RankPool, ranks: World) -> None:
    pool.run(ranks.size, a_mismatch_leaves_a_donated_array, ranks)


def arrays_that_cannot_be_used(rank: int, world_size: int, world: World) -> None:
    """What was deleted, or is met while JAX traces, is refused before the ranks meet; the group goes on."""
    group = world.group()
    jax = _jax()
    deleted = _fresh(1.0)
    deleted.delete()
    given = jax.dlpack.from_dlpack(np.ones(64, "float32"))
    group.allreduce(given, donate=True)
    for gone in (deleted, given):
        for tree in (gone, {"a": gone, "b": _fresh(1.0)}):
            for donate in (False, True):
                with pytest.raises(col.UnsupportedTensorError, match="deleted"):
                    group.allreduce(tree, donate=donate)
    concrete = _fresh(1.0)
    for tree in (concrete, {"a": concrete}):
        for donate in (False, True):

            def call(v: Any, tree: Any = tree, donate: bool = donate) -> Any:
                group.allreduce(tree, donate=donate)
                return v

            with pytest.raises(col.UnsupportedTensorError, match=r"colltensor\.jax"):
                jax.jit(call)(1.0)
    assert not concrete.is_deleted()
    assert (np.asarray(group.allreduce(concrete)) == world_size).all()


def test_arrays_that_cannot_be_used(pool: RankPool, world: World) -> None:
    pool.run(world.size, arrays_that_cannot_be_used, world)


def wide_objects(rank: int, world_size: int, world: World) -> None:
    """What is 64 bits wide on one rank is so on all, whether or not they make such arrays themselves."""
    group = world.group()
    jax = _jax()
    x64 = (
        jax.enable_x64
        if hasattr(jax, "enable_x64")
        else importlib.import_module("jax.experimental").enable_x64
    )
    with x64(rank == 0):
        mine = jax.numpy.array([2**40 + 5, 7]) if rank == 0 else jax.numpy.array([rank, 7])
        everyone = group.allgather_object({"x": mine})
        found = group.broadcast_object(mine, 0)
    assert found.dtype == everyone[0]["x"].dtype == "int64"
    assert np.asarray(found).tolist() == np.asarray(everyone[0]["x"]).tolist() == [2**40 + 5, 7]
    assert [entry["x"].dtype.name for entry in everyone[1:]] == ["int32"] * (world_size - 1)


def test_objects_keep_64_bits(pool: RankPool, world: World) -> None:
    pool.run(world.size, wide_objects, world)
