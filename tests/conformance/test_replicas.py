"""Replicas that start unequal are told apart before training, bit for bit, whatever their leaves are like."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from oracle import Array
from pool import RankPool
from samples import EMPTY, LAYOUTS, SCALARS, Sample, dense, library_for
from worlds import Transport, World

import colltensor as col
from colltensor.gradients import Synchronizer, compare_parameters

LEAVES = [
    *[
        (dtype, layout)
        for dtype in ("float32", "bfloat16")
        for layout in (*LAYOUTS, *SCALARS, *EMPTY)
    ],
    *[
        (dtype, dense(5))
        for dtype in ("bool", "uint8", "int64", "float16", "float64", "complex64", "float8_e4m3fn")
    ],
]


def parameters_of(rank: int, libraries: tuple[str, ...], seed: int) -> list[Any]:
    """The same values on all ranks, in the rank's library and layouts, which differ where the leaves allow it."""
    leaves = []
    for number, (dtype, layout) in enumerate(LEAVES):
        random = np.random.default_rng((seed, number))
        values = random.permutation(layout.count) + 30 * seed
        if dtype == "bool":
            values = values % 2 == seed
        own = layout if (rank + number) % 2 else dense(*layout.shape)
        choice = (libraries[(rank + number) % len(libraries)], "numpy")
        library = library_for(choice, 0, dtype, own) or "numpy"
        leaves.append(Sample(library, dtype, own, values.astype(np.dtype(ml_dtype(dtype)))).tensor)
    return leaves


def ml_dtype(name: str) -> Any:
    return getattr(importlib.import_module("ml_dtypes"), name, name)


def alike(rank: int, world_size: int, world: World, libraries: tuple[str, ...]) -> None:
    group = world.group()
    compare_parameters(parameters_of(rank, libraries, 0), group=group)
    last = rank == world_size - 1
    for wrong in range(len(LEAVES)):
        if not LEAVES[wrong][1].count:
            continue
        parameters = parameters_of(rank, libraries, 0)
        if last:
            parameters[wrong] = parameters_of(rank, libraries, 1)[wrong]
        with pytest.raises(
            col.MismatchError, match=rf"leaf \[{wrong}\] .*colltensor\.broadcast"
        ) as caught:
            compare_parameters(parameters, group=group)
        assert caught.value.ranks == (world_size - 1,)


def test_any_library_and_layout_compare_alike(
    pool: RankPool, transport: Transport, arrays: tuple[str, ...]
) -> None:
    pool.run(2, alike, World(2, *transport), arrays)


def unequal_start(rank: int, world_size: int, world: World) -> str:
    """Return the error of a Synchronizer of parameters that differ, the same on every rank."""
    group = world.group()
    parameters = {
        "scale": np.ones(4),
        "weights": [np.full((2, 3), float(rank)), np.full(3, rank, np.float32)],
    }
    with pytest.raises(col.MismatchError) as caught:
        Synchronizer(parameters, group=group)
    assert caught.value.ranks == tuple(range(1, world_size))
    with pytest.raises(
        col.MismatchError, match=r"\['weights'\]\[0\], \['weights'\]\[1\] .*colltensor\.broadcast"
    ):
        compare_parameters(parameters, group=group)
    gradients = {
        "scale": np.ones(4),
        "weights": [np.full((2, 3), float(rank)), np.full(3, rank, np.float32)],
    }
    # as a template, or on purpose
    Synchronizer(parameters, group=group, compare=False).sync(gradients)
    assert gradients["weights"][0].tolist() == [[(world_size - 1) / 2] * 3] * 2
    with pytest.raises(col.MismatchError, match=r"compare .*False"):
        Synchronizer(np.ones(3), group=group, compare=rank != 0)
    assert group.broadcast(parameters) is parameters  # the remedy
    Synchronizer(parameters, group=group).sync(gradients)
    compare_parameters(parameters, group=group)
    return str(caught.value).replace(f"(rank {rank})", "(here)")


def test_a_synchronizer_of_unequal_parameters(pool: RankPool, ranks: World) -> None:
    """They stayed unequal for ever, without a word."""
    found = pool.run(ranks.size, unequal_start, ranks)
    assert all(message == found[0] for message in found)
    assert "['weights'][0], ['weights'][1] " in found[0]
    assert "colltensor.broadcast(parameters)" in found[0]
    assert "compare=False" in found[0]


def bits(rank: int, world_size: int, world: World) -> None:
    """NaN is equal to itself, 0.0 is not -0.0, and another NaN is another value; numbers of Python's count too."""
    group = world.group()
    compare_parameters(
        {"a": np.array([np.nan, np.inf, -0.0]), "step": 3, "name": "adam", "none": None},
        group=group,
    )
    last = rank == world_size - 1
    payload = np.array([0x7FC00001 if last else 0x7FC00000], np.uint32).view(np.float32)
    cases: list[Any] = [
        np.array([-0.0 if last else 0.0]),
        payload,
        {"step": 4 if last else 3},
        {"step": 3.0 if last else 3},
    ]
    for parameters in cases:
        with pytest.raises(col.MismatchError):
            compare_parameters(parameters, group=group)
    with pytest.raises(
        col.MismatchError, match=r"\['a'\] .*float64\[4\] .*rank \d, float64\[3\] .*rank 0"
    ):
        compare_parameters({"a": np.ones(4 if last else 3)}, group=group)
    with pytest.raises(
        col.UnsupportedTensorError, match=r"compare_parameters of group '.*: leaf \['f'\]: "
    ):
        compare_parameters({"a": np.ones(3), "f": print}, group=group)
    compare_parameters({}, group=group)
    step, rate = (np.int64(3), np.float64(0.5)) if last else (3, 0.5)  # as a checkpoint has them
    compare_parameters({"step": step, "rate": rate, "big": 2**70}, group=group)


def test_what_is_equal(pool: RankPool, ranks: World) -> None:
    pool.run(ranks.size, bits, ranks)


def counted(rank: int, world_size: int, world: World) -> tuple[list[str], list[str]]:
    """Return which operations making a Synchronizer takes, and which a step."""
    group = world.group()
    names: list[str] = []

    def observe(operation: col.Operation) -> None:
        names.append(operation.name)

    parameters = [np.ones(100_000), np.ones(3), np.ones(5)]
    col.add_observer(observe)
    try:
        kept = Synchronizer(parameters, group=group)
        made, names[:] = list(names), []
        kept.sync(parameters)
        return made, names
    finally:
        col.remove_observer(observe)


def test_comparing_is_one_exchange_and_steps_have_none(pool: RankPool, ranks: World) -> None:
    for made, step in pool.run(ranks.size, counted, ranks):
        assert made == ["allgather_object"]
        assert set(step) == {"allreduce"}


def resumed(rank: int, world_size: int, world: World) -> None:
    """Only rank 0 has read the checkpoint: its parameters, the optimiser's state, and what is no array."""
    group = world.group()
    state: Any = {"parameters": [np.full(3, float(rank))], "velocity": [np.full(3, rank + 10.0)]}
    step = 1000 if rank == 0 else 0
    with pytest.raises(col.MismatchError):
        Synchronizer(state["parameters"], group=group)
    state = group.broadcast(state)
    step = group.broadcast_object(step)
    compare_parameters((state, step), group=group)
    assert state["velocity"][0].tolist() == [10.0] * 3
    assert step == 1000


def test_resuming_from_a_checkpoint_of_rank_0(pool: RankPool, ranks: World) -> None:
    pool.run(ranks.size, resumed, ranks)


def mixed(rank: int, world_size: int, world: World) -> None:
    """A torch module's parameters on even ranks, and JAX arrays on odd ones."""
    torch, jnp = importlib.import_module("torch"), importlib.import_module("jax.numpy")
    values = {
        "bias": np.arange(3, dtype=np.float32),
        "weight": np.arange(6, dtype=np.float32).reshape(3, 2),
    }
    if rank % 2:
        parameters: dict[str, Any] = {name: jnp.asarray(value) for name, value in values.items()}
    else:
        linear = torch.nn.Linear(2, 3)
        with torch.no_grad():
            linear.bias.copy_(torch.from_numpy(values["bias"]))
            linear.weight = torch.nn.Parameter(
                torch.from_numpy(values["weight"]).t().contiguous().t()
            )
        assert not linear.weight.is_contiguous()
        parameters = dict(linear.named_parameters())
    Synchronizer(parameters, group=world.group())
    if rank == world_size - 1:
        parameters = {**parameters, "bias": np.zeros(3, np.float32)}
    with pytest.raises(col.MismatchError, match=r"leaf \['bias'\] .*colltensor\.broadcast"):
        Synchronizer(parameters, group=world.group())


@pytest.mark.needs("torch", "jax")
def test_torch_on_some_ranks_and_jax_on_others(pool: RankPool, ranks: World) -> None:
    pool.run(ranks.size, mixed, ranks)


# The transformation of optax.

in_jax = pytest.mark.needs("jax")
jitted = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="jax-tvm-ffi has no wheel for Python 3.10"
)


def _jax() -> tuple[Any, Any]:
    """Return jax and its part of the package, set alike in all ranks."""
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    return jax, importlib.import_module("colltensor.jax")


def _optax(group: Any, **options: Any) -> tuple[Any, Any, Any]:
    jax, cj = _jax()
    optax = importlib.import_module("optax")
    return jax, optax, optax.chain(cj.sync_gradients(group, **options), optax.adam(0.1))


def _parameters(jax: Any, rank: int) -> Any:
    jnp = jax.numpy
    return {
        "a": jnp.arange(6.0, dtype="float32").reshape(2, 3),
        "b": [jnp.full(3, rank + 1, "bfloat16"), None],
        "n": jnp.full((), jnp.nan, "float32"),
    }


@contextmanager
def _warnings() -> Iterator[list[str]]:
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("colltensor")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def _run(jax: Any, function: Any, *arguments: Any) -> None:
    """Call a function to its end, whenever JAX raises what happens in it."""
    jax.block_until_ready(function(*arguments))
    jax.effects_barrier()


def initialised(rank: int, world_size: int, world: World, inside: bool) -> list[str]:
    """Return the errors of ``init``, with parameters of which one leaf differs."""
    group = world.group()
    jax, optax, transform = _optax(group)
    init = jax.jit(transform.init) if inside else transform.init
    errors = []
    for _ in range(2):
        with pytest.raises(jax.errors.JaxRuntimeError if inside else col.MismatchError) as caught:
            _run(jax, init, _parameters(jax, rank))
        errors.append(str(caught.value).replace(f"(rank {rank})", "(here)"))
    importlib.import_module("colltensor.jax").forget_failures()
    params = group.broadcast(_parameters(jax, rank))
    state = init(params)
    with _warnings() as warned:
        for _ in range(3):
            updates, state = jax.jit(transform.update)(params, state, params)
            params = optax.apply_updates(params, updates)
    assert not warned
    compare_parameters(params, group=group)
    return errors


@in_jax
@jitted
@pytest.mark.parametrize("inside", [False, True])
def test_init_compares_parameters(pool: RankPool, ranks: World, inside: bool) -> None:
    """0.268 against 1.268 after three steps in step, without a word."""
    for errors in pool.run(ranks.size, initialised, ranks, inside):
        for error in errors:
            assert "leaf ['b'][0] " in error
            assert "colltensor.broadcast(parameters)" in error
            assert "compare=False" in error


def by_majority(rank: int, world_size: int, world: World, inside: bool) -> None:
    jax, _, transform = _optax(world.group())
    init = jax.jit(transform.init) if inside else transform.init
    odd = world_size - 1
    kind = jax.errors.JaxRuntimeError if inside else col.MismatchError
    with pytest.raises(kind, match=rf"rank {odd} .*leaf \['b'\]\[0\] .*rank 0"):
        _run(jax, init, _parameters(jax, int(rank == odd)))
    importlib.import_module("colltensor.jax").forget_failures()


@in_jax
@jitted
@pytest.mark.parametrize("inside", [False, True])
def test_the_rank_that_differs_is_named(pool: RankPool, ranks: World, inside: bool) -> None:
    pool.run(ranks.size, by_majority, ranks, inside)


def without_init(rank: int, world_size: int, world: World) -> None:
    """The group is made after ``init``, or the state comes from a checkpoint: the first update tells."""
    jax, _, transform = _optax("late")
    params = _parameters(jax, rank)
    state = transform.init(params)  # a program without a group may do that
    assert jax.eval_shape(transform.init, params)
    group = col.init_collective_group(
        world_size,
        rank,
        world.backend,
        "late",
        init_method=f"file://{os.environ['TMPDIR']}",
        provider=world.provider,
    )
    try:
        with pytest.raises(col.MismatchError, match=r"leaf \['b'\]\[0\]"):
            transform.update(params, state, params)
        for options, expected in (({}, 1), ({"compare": False}, 0)):
            _, _, transform = _optax("late", **options)
            with _warnings() as warned:
                for _ in range(2):
                    jax.jit(transform.update)(params, state)
                    jax.clear_caches()
            assert len(warned) == expected
            assert all("compare_parameters(parameters)" in line for line in warned)
        _, _, transform = _optax("late", compare=False)
        transform.init(params)
    finally:
        group.destroy()


@in_jax
@jitted
def test_an_update_without_init(pool: RankPool, ranks: World) -> None:
    pool.run(ranks.size, without_init, ranks)


def hashes(rank: int, world_size: int) -> None:
    """Every bit of every element counts, and its place, and what the array is called."""
    jax, _ = _jax()
    from colltensor.jax.replicas import _hash

    def of(array: Array, path: str = "x") -> bytes:
        return np.asarray(
            jax.jit(_hash, static_argnums=1)(jax.numpy.asarray(array), path)
        ).tobytes()

    for dtype in (
        "float32",
        "bfloat16",
        "float16",
        "float64",
        "int8",
        "int64",
        "uint16",
        "complex64",
        "complex128",
        "float8_e4m3fn",
    ):
        kind = np.dtype(ml_dtype(dtype))
        array = np.arange(7).astype(kind)
        found = {of(array), of(array, "y"), of(array[::-1]), of(array[:6]), of(array.reshape(7, 1))}
        for place in (0, 6):
            for bit in range(8 * kind.itemsize):
                raw = bytearray(array.tobytes())
                raw[place * kind.itemsize + bit // 8] ^= 1 << bit % 8
                found.add(of(np.frombuffer(bytes(raw), kind)))
        assert len(found) == 5 + 2 * 8 * kind.itemsize, dtype
    assert of(np.zeros(0, np.float32)) == of(np.zeros(0, np.float32))
    assert of(np.array([True, False])) != of(np.array([False, True]))


@in_jax
@jitted
def test_the_hash_of_a_computation(pool: RankPool) -> None:
    pool.run(1, hashes)


def through_python(rank: int, world_size: int, world: World) -> list[str]:
    group = world.group()
    jax, cj = _jax()
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("colltensor.jax")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    importlib.import_module("colltensor.jax._targets")._notified.clear()
    deadline = time.monotonic() + 5
    # the worker of a call of the test before may be late
    while not group._queue.idle and time.monotonic() < deadline:
        time.sleep(0.001)
    try:
        for _ in range(3):
            jax.block_until_ready(jax.jit(lambda x: cj.broadcast(x, 0, group))(jax.numpy.ones(3)))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    return found


@in_jax
@jitted
def test_jitted_calls_that_go_through_python_are_logged_once(pool: RankPool, ranks: World) -> None:
    for lines in pool.run(ranks.size, through_python, ranks):
        assert len(lines) == (ranks.backend != "shm")
        assert all("broadcast" in line and "'gloo'" in line for line in lines)
