"""Collectives inside ``jax.jit`` in unusual company: several devices, threads, no jit, closures, axis names."""

from __future__ import annotations

import functools
import importlib
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import RankPool
from test_jax_jit import _jax
from worlds import World

import colltensor as col

pytestmark = [
    pytest.mark.needs("jax"),
    pytest.mark.shm,
    pytest.mark.skipif(
        sys.version_info < (3, 11), reason="jax-tvm-ffi has no wheel for Python 3.10"
    ),
]
SHARED = World(2, "shm", None)


def closures(rank: int, size: int, world: World) -> None:
    group = world.group()
    jax, jnp, cj = _jax()
    x = jnp.arange(1.0, 4.0) * (rank + 1)
    total = sum(range(1, size + 1))

    def within(w: Any, y: Any) -> Any:
        return cj.ordered(lambda z: (cj.allreduce(z * w, group) * jnp.arange(1.0, 4.0)).sum())(y)

    for wrap in (lambda f: f, jax.jit):
        value = wrap(within)(x, jnp.ones(3))
        assert np.allclose(value, total * 14)
        gradient = wrap(jax.grad(within))(x, 2 * jnp.ones(3))
        assert np.allclose(gradient, 2 * size * np.arange(1.0, 4.0))
        gradient = wrap(jax.grad(lambda w: within(w, 2 * w)))(x)
        assert np.allclose(gradient, 4 * size * np.asarray(x) * np.arange(1.0, 4.0))
        values = wrap(jax.vmap(within, in_axes=(0, None)))(jnp.stack([x, 2 * x]), jnp.ones(3))
        assert np.allclose(values, [total * 14, total * 28])


def test_an_ordered_function_may_close_over_what_is_traced(pool: RankPool) -> None:
    pool.run(2, closures, SHARED)


def replicated(rank: int, size: int, world: World) -> None:
    group = world.group()
    jax, jnp, cj = _jax()
    page = (Path(__file__).parents[2] / "docs" / "jax.md").read_text()
    [options] = re.findall(r"```python\n(@functools.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"functools": functools, "jax": jax, "cj": cj}
    exec(options, names)
    x = jnp.arange(3.0) + rank
    summed = sum(np.arange(3.0) + other for other in range(size))
    for function, factor in ((names["replicated_sum"], 1), (cj.allreduce, size)):
        for wrap in (lambda f: f, jax.jit):
            value, gradient = wrap(
                jax.value_and_grad(lambda y, f=function: (f(y, group) ** 2).sum())
            )(x)
            assert np.allclose(value, (summed**2).sum())
            assert np.allclose(gradient, factor * 2 * summed)


def test_the_documented_recipe_for_the_gradients_of_mpi4jax(pool: RankPool) -> None:
    pool.run(2, replicated, SHARED)


def sparse_operands(rank: int, size: int, world: World) -> None:
    group = world.group()
    jax, jnp, cj = _jax()
    array = importlib.import_module("jax.experimental.sparse").BCOO.fromdense(jnp.eye(2))
    calls = {
        "allreduce": lambda x: cj.allreduce(x, group),
        "reduce": lambda x: cj.reduce(x, 0, group),
        "allgather": lambda x: cj.allgather([x], group),
        "mean": lambda x: cj.allreduce({"a": x}, group, col.ReduceOp.AVERAGE),
        "tree_allreduce": lambda x: cj.tree_allreduce({"a": [x]}, group),
        "sync_gradients": lambda x: cj.sync_gradients(group).update({"a": x}, None),
    }
    for call in calls.values():
        for wrap in (lambda f: f, jax.jit):
            with pytest.raises(col.UnsupportedTensorError, match=r"BCOO.*todense\(\)"):
                wrap(call)(array)


def test_sparse_operands_are_refused(pool: RankPool) -> None:
    pool.run(2, sparse_operands, SHARED)


def axis_names(rank: int, size: int, world: World) -> None:
    group = world.group()
    jax, jnp, cj = _jax()
    for wrap in (lambda f: f, cj.ordered):
        mapped = jax.vmap(
            wrap(lambda a: jax.lax.psum(cj.allreduce(a, group), "batch")), axis_name="batch"
        )
        assert np.allclose(mapped(jnp.ones((3, 2))), 3 * size)
        assert np.allclose(jax.jit(mapped)(jnp.ones((3, 2))), 3 * size)


def test_a_vectorised_axis_has_its_name_in_an_ordered_function(pool: RankPool) -> None:
    pool.run(2, axis_names, SHARED)


def without_jit(rank: int, size: int, world: World) -> None:
    group = world.group()
    jax, jnp, cj = _jax()
    with jax.disable_jit():
        for function in (
            lambda a: cj.allreduce(a, group),
            cj.ordered(lambda a: cj.allreduce(a, group)),
        ):
            assert np.allclose(function(jnp.full(3, rank + 1.0)), sum(range(1, size + 1)))
            assert np.allclose(jax.grad(lambda a, f=function: f(a).sum())(jnp.ones(3)), size)


def test_with_jit_disabled(pool: RankPool) -> None:
    pool.run(2, without_jit, SHARED)


def wrong_ranks(rank: int, size: int, world: World) -> None:
    group = world.group()
    jax, jnp, cj = _jax()
    x = jnp.ones(3)
    calls = [
        lambda r: cj.broadcast(x, r, group),
        lambda r: cj.reduce(x, r, group),
        lambda r: cj.send(x, r, group),
        lambda r: cj.recv(x, r, group),
        lambda r: cj.sendrecv(x, r, rank, group),
        lambda r: cj.sendrecv(x, rank, r, group),
    ]
    for call in calls:
        for wrong in (-1, size, 1.0, "0"):
            with pytest.raises(col.RankError, match=rf"\b0 to {size - 1}\b"):
                call(wrong)
        with pytest.raises(col.RankError, match="static_argnums"):
            jax.jit(call)(0)
    assert float(cj.broadcast(x, np.int64(size - 1), group)[0]) == 1


def test_ranks_that_there_are_not(pool: RankPool) -> None:
    """Minus one stood for "no rank", and ended the process inside of XLA."""
    pool.run(2, wrong_ranks, SHARED)


def nothing_to_move(rank: int, size: int, world: World) -> None:
    group = world.group()
    jax, jnp, cj = _jax()
    tree = {"a": jnp.full(2, rank + 1.0), "n": jnp.ones(2, "int32"), "none": None}
    gradients = jax.grad(lambda t: (t["a"] ** 2).sum(), allow_int=True)(tree)
    found = cj.tree_allreduce(gradients, group, col.ReduceOp.AVERAGE)
    assert np.allclose(found["a"], size + 1)
    assert found["n"].dtype == jax.dtypes.float0
    assert found["none"] is None


def test_gradients_of_integers(pool: RankPool) -> None:
    pool.run(2, nothing_to_move, SHARED)


def trees(rank: int, size: int, world: World) -> None:
    """A list is a list of leaves, as in ``jax.tree``, in every collective; leaves of several shapes and dtypes."""
    group = world.group()
    jax, jnp, cj = _jax()

    def tree(of: int) -> Any:
        return [
            jnp.full((2, 3), of + 1.0),
            {"b": jnp.arange(4.0) + of, "c": jnp.full((), of + 3)},
            (jnp.int32(of),),
        ]

    def lists(of: int) -> Any:
        return [
            jnp.arange(2.0 * size).reshape(size, 2) + of,
            jnp.arange(6.0 * size).reshape(size, 3, 2) * (of + 1),
        ]

    to, source = (rank + 1) % size, (rank - 1) % size
    everyone = [tree(of) for of in range(size)]
    total = jax.tree.map(lambda *leaves: sum(leaves), *everyone)
    part = jax.tree.map(lambda *leaves: sum(leaves)[rank], *(lists(of) for of in range(size)))
    calls = {
        "allreduce": (lambda x: cj.allreduce(x, group), total),
        "reduce": (lambda x: cj.reduce(x, 0, group), everyone[rank] if rank else total),
        "broadcast": (lambda x: cj.broadcast(x, 1, group), everyone[1]),
        "allgather": (
            lambda x: cj.allgather(x, group),
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *everyone),
        ),
        "sendrecv": (lambda x: cj.sendrecv(x, to, source, group), everyone[source]),
        "send and recv": (
            (lambda x: cj.send(x, 1, group)) if rank == 0 else (lambda x: cj.recv(x, 0, group)),
            everyone[0],
        ),
    }
    for wrap in (lambda f: f, jax.jit):
        for name, (call, expected) in calls.items():
            found = wrap(call)(everyone[rank])
            assert jax.tree.structure(found) == jax.tree.structure(expected), name
            for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                assert got.dtype == wanted.dtype, name
                np.testing.assert_array_equal(got, wanted, name)
        found = wrap(lambda x: cj.reducescatter(x, group))(lists(rank))
        for got, wanted in zip(found, part, strict=True):
            np.testing.assert_array_equal(got, wanted)
    gradient = jax.grad(lambda x: sum(leaf.sum() for leaf in cj.allreduce(x, group)))(
        [jnp.ones(2), jnp.ones((2, 2))]
    )
    assert [leaf.shape for leaf in gradient] == [(2,), (2, 2)]
    assert all((np.asarray(leaf) == size).all() for leaf in gradient)


def test_every_collective_takes_a_tree(pool: RankPool) -> None:
    pool.run(2, trees, SHARED)


def numbers_of_jax(rank: int, size: int, world: World) -> None:
    """Weak types stay weak, and 64-bit integers are not cut to 32 bits without a word."""
    group = world.group()
    jax, jnp, cj = _jax()
    one = jnp.bfloat16(1)
    for wrap in (lambda f: f, jax.jit):
        found = wrap(lambda x: cj.allreduce(x, group))(2.0)
        assert found.weak_type
        assert (found * one).dtype == one.dtype
        found = wrap(lambda x: cj.allreduce(x, group))({"a": 2.0, "b": jnp.ones(3, "float64")})
        assert [found["a"].weak_type, found["b"].weak_type] == [True, False]
        assert (found["a"] * one).dtype == one.dtype
        assert not wrap(lambda x: cj.allreduce(x, group))(jnp.float32(2)).weak_type
    large, wide = np.array([2**40 + 5, 7]), np.array([1e300])
    assert cj.allreduce(large, group).tolist() == [size * (2**40 + 5), 7 * size]
    jax.config.update("jax_enable_x64", False)
    try:
        for given in (large, {"a": large}, [wide], np.array([2**40], "uint64")):
            for wrap in (lambda f: f, jax.jit):
                with pytest.raises(col.UnsupportedDTypeError, match="jax_enable_x64"):
                    wrap(lambda given=given: cj.allreduce(given, group))()
        assert cj.allreduce(np.array([5, 7]), group).tolist() == [5 * size, 7 * size]
    finally:
        jax.config.update("jax_enable_x64", True)


def test_jax_keeps_weak_types_and_large_integers(pool: RankPool) -> None:
    pool.run(2, numbers_of_jax, SHARED)


def _alone(script: str) -> str:
    """Run a script in a process of its own, with two devices of JAX's; return what it prints."""
    options = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **options},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_computation_over_several_devices_is_refused() -> None:
    """Inside of an ordered function JAX did not see it: both devices called, in any order."""
    found = _alone("""
        import jax, jax.numpy as jnp, numpy as np
        import colltensor as col, colltensor.jax as cj
        from jax.sharding import Mesh, NamedSharding, PartitionSpec
        group = col.init_collective_group(1, 0)
        mesh, parts = Mesh(np.array(jax.devices()), ("i",)), PartitionSpec("i")
        x = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, parts))
        both = lambda f: jax.jit(jax.shard_map(f, mesh=mesh, in_specs=parts, out_specs=parts, check_vma=False))
        reduce = lambda a: cj.allreduce(a, group)
        for name, call in {
            "eager": reduce, "jit": jax.jit(reduce), "ordered": jax.jit(cj.ordered(reduce)), "mapped": both(reduce),
            "mapped ordered": both(cj.ordered(reduce)), "pmap": lambda a: jax.pmap(cj.ordered(reduce))(a.reshape(2, 4)),
        }.items():
            try:
                print(name, call(x))
            except (ValueError, col.DeviceError) as error:
                print(name, "refused:", error)
        print(jax.jit(reduce)(jax.device_put(jnp.arange(3.0), jax.devices()[1])))
    """)
    *refused, last = found.strip().splitlines()
    assert len(refused) == 6
    assert all("refused:" in line and "device" in line for line in refused), found
    assert last == "[0. 1. 2.]"


def test_threads_that_come_first_together() -> None:
    found = _alone("""
        import threading
        import jax, jax.numpy as jnp
        import colltensor as col, colltensor.jax as cj
        groups = [col.init_collective_group(1, 0, group_name=str(number)) for number in range(8)]
        start, found = threading.Barrier(8), []
        def call(group):
            start.wait()
            found.append(float(jax.jit(lambda a: cj.allreduce(a, group))(jnp.ones(3))[0]))
        threads = [threading.Thread(target=call, args=(group,)) for group in groups]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        print(*found)
    """)
    assert found.split() == ["1.0"] * 8


def test_a_call_leaves_no_memory_behind() -> None:
    """jax-tvm-ffi keeps what it decodes of a call's attributes: 144 bytes a call, 14 MB here."""
    found = _alone("""
        import jax, jax.numpy as jnp
        import colltensor as col, colltensor.jax as cj
        group = col.init_collective_group(1, 0)
        step = jax.jit(lambda a: jax.lax.fori_loop(0, 1000, lambda _, b: cj.allreduce(b, group), a))
        x = jnp.ones(4)
        def resident():
            with open("/proc/self/statm") as statm:
                return int(statm.read().split()[1]) * 4096
        def run(times):
            for _ in range(times):
                step(x).block_until_ready()
        run(5)
        before = resident()
        run(100)
        print(resident() - before)
    """)
    assert int(found) < 4 << 20


def test_the_first_call_disturbs_no_other_thread() -> None:
    """What is known of tensors' types stays: a call in another thread may be between two looks at it."""
    found = _alone("""
        import jax, jax.numpy as jnp
        import colltensor as col, colltensor.jax as cj
        from colltensor import adapters
        group = col.init_collective_group(1, 0)
        class Tensor:  # of another thread's
            pass
        adapters.known[Tensor] = adapters.find_adapter(type(jnp.ones(3)))
        adapters.exporters[Tensor] = (None, None)
        jax.jit(lambda a: cj.allreduce(a, group))(jnp.ones(3))
        print(Tensor in adapters.known, Tensor in adapters.exporters)
    """)
    assert found.split() == ["True", "True"]


def test_a_call_without_its_attributes_is_an_error() -> None:
    """As where another version of JAX or XLA passes them another way: the target says so and reads nothing."""
    found = _alone("""
        import jax, jax.numpy as jnp, numpy as np
        import colltensor as col, colltensor.jax as cj
        cj.allreduce(jnp.ones(3), col.init_collective_group(1, 0))
        names = ("dtype", "handle", "itemsize", "number", "op", "operation", "root", "sources")
        for given in (names[:0], names[:7], names):
            call = jax.ffi.ffi_call("colltensor", jax.ShapeDtypeStruct((3,), jnp.float32))
            try:
                print(call(jnp.ones(3), **{name: np.int64(1) for name in given}))
            except jax.errors.JaxRuntimeError as error:
                print(str(error).splitlines()[0])
    """)
    assert found.count("attribute dtype") == 2
    assert found.count("attribute source") == 1


def test_the_first_failure_is_as_cheap_as_the_next() -> None:
    """An exception that crosses tvm-ffi makes it read the symbols of the whole process: 0.4 s of the processor here."""
    found = _alone("""
        import time
        import jax, jax.numpy as jnp
        import colltensor as col, colltensor.jax as cj
        step = jax.jit(lambda a: cj.allreduce(a, group))
        for name in ("first", "next"):
            group = col.init_collective_group(1, 0)
            x = step(jnp.ones(len(name))).block_until_ready()
            group.destroy()
            before = time.process_time()
            try:
                step(x).block_until_ready()
            except jax.errors.JaxRuntimeError as error:
                print(time.process_time() - before, "is not initialized" in str(error) or "destroyed" in str(error))
    """)
    first, told, following, told_again = found.split()
    assert told == told_again == "True"
    assert float(first) < float(following) + 0.1
