"""Gradients kept in step: the same as a mean by numpy, whatever the leaves are like."""

from __future__ import annotations

import gc
import importlib
import os
import re
import signal
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import Array, combined, reduced
from pool import RankPool
from samples import LAYOUTS, Layout, Sample, as_numpy, dense, library_for
from worlds import Report, Transport, World, assert_same_bits, stop_tracing

import colltensor as col
from colltensor.gradients import Synchronizer, sync_gradients

LEAVES: tuple[tuple[str, Layout], ...] = (
    ("float32", dense(3)),
    ("float32", dense(20_000)),
    ("float64", dense(5)),
    ("float32", dense()),
    ("bfloat16", dense(7)),
    ("float32", LAYOUTS[4]),
    ("float64", LAYOUTS[2]),
    ("float16", dense(0)),
    ("float32", dense(2, 3)),
    ("float32", LAYOUTS[6]),
    ("float32", dense(3, 0, 2)),
    ("complex64", dense(4)),
    ("float16", dense(11)),
    ("float64", LAYOUTS[8]),
    ("float32", Layout("gaps", (130, 140), (200, 1), 3, 26_003)),
)
"""Small, large, strided, empty, of many dtypes."""


class Gradients:
    """One step's gradients in this rank, leaf by leaf of any library, and what must come out."""

    def __init__(self, rank: int, world_size: int, libraries: tuple[str, ...], step: int) -> None:
        self.inputs: list[list[Array]] = []
        self.samples: list[Sample] = []
        for number, (dtype, layout) in enumerate(LEAVES):
            self.inputs.append(
                [reduced(dtype, layout.count, peer, number + step) for peer in range(world_size)]
            )
            choice = (libraries[(rank + number + step) % len(libraries)], "numpy")
            library = library_for(choice, 0, dtype, layout) or "numpy"
            self.samples.append(Sample(library, dtype, layout, self.inputs[-1][rank]))
        self.tree = {f"k{number:02}": sample.tensor for number, sample in enumerate(self.samples)}

    def check(self, report: Report, name: str, result: Any, op: str) -> None:
        assert (result is self.tree) == (not any(sample.immutable for sample in self.samples))
        for number, (sample, (dtype, _)) in enumerate(zip(self.samples, LEAVES, strict=True)):
            expected = combined(dtype, op, self.inputs[number])
            got = sample.check_result(result[f"k{number:02}"], *expected)
            report.same_everywhere(f"{name} {number}", got.tobytes())


def step_by_step(
    rank: int, world_size: int, world: World, libraries: tuple[str, ...]
) -> dict[str, str]:
    group = world.group()
    report = Report(group)
    for average, op in ((True, "AVERAGE"), (False, "SUM")):
        with report.case("Synchronizer", op) as name:
            like = Gradients(rank, world_size, libraries, 0).tree
            kept = Synchronizer(like, group=group, average=average, compare=False)
            for step in range(2):
                gradients = Gradients(rank, world_size, libraries, step)
                gradients.check(report, f"{name} {step}", kept.sync(gradients.tree), op)
        with report.case("sync_gradients", op) as name:
            gradients = Gradients(rank, world_size, libraries, 7)
            result = sync_gradients(gradients.tree, group=group, average=average)
            gradients.check(report, name, result, op)
    return report.done()


def test_gradients_become_the_mean(
    pool: RankPool, transport: Transport, arrays: tuple[str, ...]
) -> None:
    assert_same_bits(pool.run(3, step_by_step, World(3, *transport), arrays))


def test_the_mean_of_one_rank(pool: RankPool, libraries: tuple[str, ...]) -> None:
    pool.run(1, step_by_step, World(1, "loopback", None), libraries)


def many_leaves(rank: int, world_size: int, world: World) -> None:
    """300 leaves of many sizes; one tensor that is no tree."""
    group = world.group()
    counts = [1 + (number * 7919) % 20_000 for number in range(300)]
    tree = [np.full(count, rank + number, np.float32) for number, count in enumerate(counts)]
    kept = Synchronizer(tree, group=group, average=False, compare=False)
    assert kept.sync(tree) is tree
    for number, leaf in enumerate(tree):
        assert (leaf == sum(range(world_size)) + world_size * number).all(), number
    lone = np.full((3, 2), float(rank))
    assert Synchronizer(lone, group=group, compare=False).sync(lone) is lone
    assert (lone == (world_size - 1) / 2).all()
    assert Synchronizer({}, group=group).sync({}) == {}


def test_many_leaves(pool: RankPool, transport: Transport) -> None:
    pool.run(2, many_leaves, World(2, *transport))


def train(
    parameters: dict[str, Any],
    inputs: Array,
    targets: Array,
    sync: Callable[[Any], Any],
    steps: int,
) -> Array:
    """A linear model with two layers, trained; returns the losses."""
    losses = []
    for _ in range(steps):
        hidden = inputs @ parameters["first"]
        error = hidden @ parameters["second"] - targets
        losses.append(float((error**2).mean()))
        back = 2 * error / error.size
        gradients = {"first": inputs.T @ (back @ parameters["second"].T), "second": hidden.T @ back}
        for name, gradient in sync(gradients).items():
            parameters[name] -= 0.05 * gradient
    return np.array(losses)


def train_on_part(rank: int, world_size: int, world: World, steps: int) -> tuple[Array, Array]:
    """Return the mean losses of training on a part each, and of training on everything in one process."""
    random = np.random.default_rng(0)
    inputs, targets = random.normal(size=(12, 5)), random.normal(size=(12, 2))
    first, second = random.normal(size=(5, 4)), random.normal(size=(4, 2))
    start = {"first": first, "second": second}
    own = {name: values.copy() for name, values in start.items()}
    kept = Synchronizer(own, group=world.group())
    losses = train(own, inputs[rank::world_size], targets[rank::world_size], kept.sync, steps)
    world.group().allreduce(losses, col.ReduceOp.AVERAGE)
    return losses, train(start, inputs, targets, lambda gradients: gradients, steps)


def test_training_is_that_of_one_process(pool: RankPool, ranks: World) -> None:
    for losses, alone in pool.run(ranks.size, train_on_part, ranks, 60):
        np.testing.assert_allclose(losses, alone, rtol=1e-9)
        assert losses[-1] < losses[0] / 2


def thousand_steps(rank: int, world_size: int, world: World, library: str) -> tuple[int, int]:
    """Return by how much Python's and numpy's memory grew in the last 900 of 1,000 steps, and its highest peak."""
    group = world.group()
    layouts = [dense(3), dense(0), LAYOUTS[4], dense(300_000), LAYOUTS[6], *[dense(60, 100)] * 20]
    samples = [
        Sample(
            library if layout.dense else "numpy",
            "float32",
            layout,
            np.ones(layout.count, np.float32),
        )
        for layout in layouts
    ]
    tree = [sample.tensor for sample in samples]
    kept = Synchronizer(tree, group=group)
    for step in range(1000):
        if step == 100:
            gc.collect()
            tracemalloc.start()
        kept.sync(tree)
    gc.collect()
    grown, peak = tracemalloc.get_traced_memory()
    stop_tracing()
    assert (as_numpy(tree[-1], "float32") == 1).all()
    return grown, peak


@pytest.mark.slow
def test_a_thousand_steps_allocate_nothing(
    pool: RankPool, transport: Transport, libraries: tuple[str, ...]
) -> None:
    """A step takes its views and messages, which are far less than the 1.7 MB of the leaves, 0.5 MB of them fused."""
    library = "torch" if "torch" in libraries else "numpy"
    for grown, peak in pool.run(2, thousand_steps, World(2, *transport), library):
        assert grown < 20_000
        assert peak < 250_000


def other_leaves(rank: int, world_size: int, world: World) -> list[str]:
    """Make Synchronizers that fit on the last rank only; return the errors, the same on every rank."""
    group = world.group()
    last = rank == world_size - 1
    usual = {"a": np.ones(3), "b": [np.ones((2, 4), np.float32), np.ones(2)]}
    cases: list[tuple[Any, dict[str, Any]]] = [
        ({**usual, "a": np.ones(4)}, {}),
        ({**usual, "b": [np.ones((4, 2), np.float32), np.ones(2)]}, {}),
        ({**usual, "b": usual["b"][::-1]}, {}),
        ({**usual, "b": [np.ones((2, 4), np.float16), np.ones(2)]}, {}),
        ({"a": usual["a"], "c": usual["b"]}, {}),
        ({**usual, "c": np.ones(1)}, {}),
        (usual, {"average": False}),
    ]
    messages = []
    for tree, options in cases:
        with pytest.raises(col.MismatchError) as caught:
            Synchronizer(tree if last else usual, group=group, **(options if last else {}))
        assert caught.value.ranks == (world_size - 1,)
        messages.append(str(caught.value).replace(f"(rank {rank})", "(here)"))
    assert Synchronizer(usual, group=group).sync(usual) is usual
    return messages


def test_ranks_that_differ_are_named_with_the_leaf(pool: RankPool, ranks: World) -> None:
    found = pool.run(ranks.size, other_leaves, ranks)
    assert all(messages == found[0] for messages in found)
    last = ranks.size - 1
    for message, (here, there) in zip(
        found[0],
        (
            (r"\['a'\] .*float64\[4\]", r"float64\[3\]"),
            (r"\['b'\]\[0\] .*float32\[4, 2\]", r"float32\[2, 4\]"),
            (r"\['b'\]\[0\] .*float64\[2\]", r"float32\[2, 4\]"),
            (r"\['b'\]\[0\] .*float16\[2, 4\]", r"float32\[2, 4\]"),
            (r"\['c'\]\[0\]", ""),
            (r"\b4\b", r"\b3\b"),
            (r"\baverage .*False\b", r"True\b"),
        ),
        strict=True,
    ):
        assert re.search(rf"rank {last} .*{here} .*rank {last}\b.*{there} .*rank 0\b", message), (
            message
        )


def wrong_step(rank: int, world_size: int, world: World) -> None:
    """What does not fit the Synchronizer is refused with the leaf's path, before anything moves; the loop goes on."""
    kept = Synchronizer({"a": np.ones(3), "b": [np.ones((2, 4), np.float32)]}, group=world.group())
    whole = np.full(9, float(rank))
    locked = np.ones(3)
    locked.flags.writeable = False
    good = np.full((2, 4), rank, np.float32)
    cases: list[tuple[Any, type[Exception], str]] = [
        (
            {"a": whole[:4], "b": [good]},
            col.ShapeError,
            r"leaf \['a'\]: .*float64\[3\].*float64\[4\]",
        ),
        ({"a": whole[:3], "b": [good.T]}, col.ShapeError, r"leaf \['b'\]\[0\]: .*float32\[2, 4\]"),
        (
            {"a": whole[:3], "b": [good.astype(float)]},
            col.UnsupportedDTypeError,
            r"leaf \['b'\]\[0\]: .* float64",
        ),
        ({"a": whole[:3]}, col.ShapeError, r"leaf \['b'\]\[0\]"),
        ({"a": whole[:3], "b": [good, good]}, col.ShapeError, r"leaf \['b'\]\[1\]"),
        ({"a": None, "b": [good]}, col.ShapeError, r"leaf \['a'\]"),
        ({"a": locked, "b": [good]}, col.ReadOnlyError, r"leaf \['a'\]: "),
        ({"a": [1.0, 2.0, 3.0], "b": [good]}, col.ShapeError, r"leaf \['a'\]"),
        ({"a": 3.0, "b": [good]}, col.ShapeError, r"leaf \['a'\]: .*float64\[3\].*float64\[\]"),
    ]
    for tree, kind, message in cases:
        with pytest.raises(kind, match=message):
            kept.sync(tree)
    assert (whole == rank).all()
    assert (good == rank).all()
    tree = {"a": whole[:3], "b": [good]}
    assert kept.sync(tree) is tree
    assert (good == (world_size - 1) / 2).all()
    assert whole.tolist() == [(world_size - 1) / 2] * 3 + [float(rank)] * 6
    ordered = Synchronizer(OrderedDict(a=np.ones(3), b=np.ones(3)), group=world.group())
    with pytest.raises(col.ShapeError, match=r"leaf \['b'\] .*\['a'\]"):
        ordered.sync(OrderedDict(b=whole[:3], a=whole[3:6]))
    both = Synchronizer([np.ones(3), np.ones(3)], group=world.group())
    with pytest.raises(col.AliasError, match=r"leaf \[0\] .*leaf \[1\]"):
        both.sync([whole[:3], whole[2:5]])
    with pytest.raises(col.UnsupportedDTypeError, match=r"leaf \['n'\]: .*int64"):
        Synchronizer({"n": np.ones(3, np.int64)}, group=world.group())


def test_a_step_that_does_not_fit(pool: RankPool, world: World) -> None:
    pool.run(world.size, wrong_step, world)


def die_in_a_step(
    rank: int, world_size: int, world: World, url: str, victim: int
) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """The victim is killed in its fourth step; return the others' error, and the ranks behind their next one."""
    group = col.init_collective_group(
        world_size,
        rank,
        world.backend,
        "mortal",
        init_method=url,
        provider=world.provider,
        timeout_s=20,
    )
    gradients = {"a": np.ones(1000, np.float32), "b": np.ones((300, 700), np.float32)}
    kept = Synchronizer(gradients, group=group)
    for _ in range(3):
        kept.sync(gradients)
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(col.CollectiveError) as caught:
        kept.sync(gradients)
    with pytest.raises(col.GroupError) as later:
        kept.sync(gradients)
    group.destroy()
    return (
        type(caught.value).__name__,
        getattr(caught.value, "ranks", ()),
        getattr(later.value.__cause__, "ranks", ()),
    )


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_dies_is_named(
    pool: RankPool, transport: Transport, victim: int, tmp_path: Path
) -> None:
    url = (tmp_path / "mortal").as_uri()
    found = pool.run(3, die_in_a_step, World(3, *transport), url, victim, may_die={victim})
    for rank, outcome in enumerate(found):
        if rank != victim:
            assert outcome == ("PeerLostError", (victim,), (victim,))


def jax_nodes(rank: int, world_size: int, world: World) -> None:
    """Containers that only jax knows."""
    jax = importlib.import_module("jax")
    state = jax.tree_util.Partial(
        max, np.full(2, float(rank)), key=jax.numpy.full(3, rank + 1.0, "float32")
    )
    kept = Synchronizer({"state": state}, group=world.group(), average=False, compare=False)
    result = kept.sync({"state": state})["state"]
    assert isinstance(result, jax.tree_util.Partial)
    assert result.args[0].tolist() == [sum(range(world_size))] * 2
    assert result.keywords["key"].tolist() == [sum(range(1, world_size + 1))] * 3


@pytest.mark.needs("jax")
def test_containers_that_jax_knows(pool: RankPool, ranks: World) -> None:
    pool.run(ranks.size, jax_nodes, ranks)


def by_name(rank: int, world_size: int) -> None:
    group = col.init_collective_group(1, 0, group_name="by name")
    try:
        gradients = [np.full(3, 5.0)]
        kept = Synchronizer(gradients, group="by name")
        assert kept.group is group
        assert kept.sync(gradients) is sync_gradients(gradients, group="by name") is gradients
        assert gradients[0].tolist() == [5.0] * 3
    finally:
        group.destroy()
    with pytest.raises(col.GroupError):
        Synchronizer(gradients, group="by name")


def test_groups_are_found_by_name(pool: RankPool) -> None:
    pool.run(1, by_name)
