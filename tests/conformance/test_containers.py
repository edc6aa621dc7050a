"""Pytrees: every kind of container, in any insertion order, fused or not, equals leaf by leaf."""

from __future__ import annotations

import importlib
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import numpy as np
import pytest
from oracle import combined, moved, numpy_dtype, reduced
from pool import RankPool
from samples import LAYOUTS, Layout, Sample, as_numpy, dense, library_for
from worlds import Report, Transport, World, assert_same_bits

import colltensor as col

Pair = namedtuple("Pair", ["weight", "bias"])  # the plain kind is what optree must know


def _array(rank: int, number: int, count: int = 3) -> Any:
    return np.full(count, (rank + 1) * 10.0**number)


def _containers(rank: int) -> dict[str, tuple[Any, list[Any]]]:
    """Containers of arrays, and their leaves in the order in which they were made."""
    made: dict[str, tuple[Any, list[Any]]] = {}

    def leaves(number: int) -> list[Any]:
        return [_array(rank, index) for index in range(number)]

    a, b, c, d = found = leaves(4)
    made["nested dicts"] = {"z": a, "a": {"y": [b, (c,)], "x": None}, "m": [[], {}, d]}, found
    a, b = found = leaves(2)
    made["list"] = [a, b], found
    a, b = found = leaves(2)
    made["tuple"] = (a, b), found
    a, b = found = leaves(2)
    made["namedtuple"] = Pair(a, b), found
    a, b, c = found = leaves(3)
    made["OrderedDict"] = OrderedDict([("b", a), ("a", b), ("c", c)]), found
    a, b = found = leaves(2)
    made["defaultdict"] = defaultdict(list, {"k": a, "j": [b]}), found
    a, b = found = leaves(2)
    made["integer keys"] = {10: a, 2: b}, found
    made["None in a list"] = [None, _array(rank, 0), None], []
    made["nothing"] = {}, []
    made["an empty list"] = [], []
    made["only None"] = {"a": None}, []
    a, b = found = leaves(2)
    made["one array in a list"] = [a], [a]
    return made


def sum_containers(rank: int, world_size: int, world: World) -> None:
    group = world.group()
    report = Report(group)
    total = sum(range(1, world_size + 1))
    for name, (container, leaves) in _containers(rank).items():
        with report.case(name):
            assert group.allreduce(container) is container
            for number, leaf in enumerate(leaves):
                assert leaf.tolist() == [total * 10.0**number] * 3
        with report.case("broadcast", name):
            assert group.broadcast(container, world_size - 1) is container
        with report.case("reduce", name):
            assert group.reduce(container, 0) is container
            for number, leaf in enumerate(leaves):
                factor = total * (world_size if rank == 0 else 1)
                assert leaf.tolist() == [factor * 10.0**number] * 3
        if world_size > 1 and rank < 2:
            with report.case("send", name):
                group.send(container, 1) if rank == 0 else group.recv(container, 0)
                for number, leaf in enumerate(leaves):
                    assert leaf.tolist() == [total * world_size * 10.0**number] * 3
    report.done()


def test_every_kind_of_container(pool: RankPool, world: World) -> None:
    pool.run(world.size, sum_containers, world)


def insertion_orders(rank: int, world_size: int, world: World) -> dict[str, float]:
    group = world.group()
    names = ["w", "b", "a", "z"]
    order = names[rank % 4 :] + names[: rank % 4]
    tree = {name: np.full(2, 100.0 * names.index(name) + rank) for name in order}
    if rank % 2:
        tree = OrderedDict(sorted(tree.items()))
    group.allreduce(tree)
    return {name: float(leaf[0]) for name, leaf in tree.items()}


def test_insertion_order_does_not_matter(pool: RankPool, transport: Transport) -> None:
    """Plain dicts in any order; the OrderedDicts of odd ranks keep theirs, so they were made in sorted order."""
    for found in pool.run(4, insertion_orders, World(4, *transport)):
        assert found == {
            name: 400.0 * number + 6 for number, name in enumerate(("w", "b", "a", "z"))
        }


LEAVES: tuple[tuple[str, Layout], ...] = (
    ("float32", dense(3)),
    ("float32", dense(400_000)),
    ("int16", dense(5)),
    ("float32", dense()),
    ("bfloat16", dense(7)),
    ("float32", LAYOUTS[4]),
    ("float64", LAYOUTS[2]),
    ("int16", dense(0)),
    ("bool", dense(9)),
    ("float32", dense(2, 3)),
    ("int16", LAYOUTS[6]),
    ("bfloat16", dense(600_001)),
    ("uint64", dense(1)),
    ("complex64", dense(4)),
    ("float16", dense(11)),
    ("float32", dense(300_000)),
)
"""Small, large, strided, empty, of many dtypes."""


def leaf_by_leaf(
    rank: int, world_size: int, world: World, libraries: tuple[str, ...]
) -> dict[str, str]:
    group = world.group()
    report = Report(group)

    def samples(give: Any, peer: int) -> list[Sample]:
        made = []
        for number, (dtype, layout) in enumerate(LEAVES):
            choice = (libraries[(rank + number) % len(libraries)], "numpy")
            library = library_for(choice, 0, dtype, layout) or "numpy"
            made.append(Sample(library, dtype, layout, give(dtype, layout.count, peer, number)))
        return made

    with report.case("allreduce") as name:
        made = samples(reduced, rank)
        tree = {f"k{number:02}": sample.tensor for number, sample in enumerate(made)}
        result = group.allreduce(tree)
        assert (result is tree) == (not any(sample.immutable for sample in made))
        for number, (sample, (dtype, layout)) in enumerate(zip(made, LEAVES, strict=True)):
            inputs = [reduced(dtype, layout.count, peer, number) for peer in range(world_size)]
            got = sample.check_result(result[f"k{number:02}"], *combined(dtype, "SUM", inputs))
            report.same_everywhere(f"{name} {number}", got.tobytes())
    with report.case("broadcast"):
        made = samples(moved, rank)
        result = group.broadcast([sample.tensor for sample in made], 0)
        for number, (sample, (dtype, layout)) in enumerate(zip(made, LEAVES, strict=True)):
            if rank:
                sample.check_result(result[number], moved(dtype, layout.count, 0, number))
            else:
                sample.check_untouched()
    with report.case("send and recv"):
        made = samples(moved, rank)
        tensors = [sample.tensor for sample in made]
        if world_size > 1 and rank == 0:
            group.send(tensors, 1)
            [sample.check_untouched() for sample in made]
        elif world_size > 1 and rank == 1:
            result = group.recv(tensors, 0)
            for number, (sample, (dtype, layout)) in enumerate(zip(made, LEAVES, strict=True)):
                sample.check_result(result[number], moved(dtype, layout.count, 0, number))
    with report.case("reduce"):
        made = samples(reduced, rank)
        result = group.reduce(tuple(sample.tensor for sample in made), 0)
        for number, (sample, (dtype, layout)) in enumerate(zip(made, LEAVES, strict=True)):
            inputs = [reduced(dtype, layout.count, peer, number) for peer in range(world_size)]
            if rank == 0:
                sample.check_result(result[number], *combined(dtype, "SUM", inputs))
            else:
                sample.check_untouched()
    return report.done()


def test_fusion_equals_leaf_by_leaf(pool: RankPool, world: World, arrays: tuple[str, ...]) -> None:
    assert_same_bits(pool.run(world.size, leaf_by_leaf, world, arrays))


def many_small_leaves(rank: int, world_size: int, world: World) -> None:
    """More than one bucket: 300 leaves of up to 0.4 MB."""
    group = world.group()
    counts = [1 + (number * 7919) % 45_000 for number in range(300)]
    tree = {
        number: np.full(count, rank + number, np.float32) for number, count in enumerate(counts)
    }
    group.allreduce(tree)
    base = sum(range(world_size))
    for number, count in enumerate(counts):
        assert (tree[number] == base + world_size * number).all(), number
        assert len(tree[number]) == count


def test_more_leaves_than_one_bucket(pool: RankPool, transport: Transport) -> None:
    pool.run(2, many_small_leaves, World(2, *transport))


def mixed_tree(rank: int, world_size: int, world: World, libraries: tuple[str, ...]) -> None:
    """Each rank has each leaf in another library, in one tree; JAX leaves are new in the result."""
    group = world.group()
    tree: dict[str, Any] = {}
    for number, name in enumerate("abcd"):
        library = libraries[(rank + number) % len(libraries)]
        tree[name] = Sample(
            library, "float32", dense(5), np.full(5, rank + number, np.float32)
        ).tensor
    given = dict(tree)
    result = group.allreduce(tree, col.ReduceOp.MAX)
    assert list(result) == list(tree)
    assert tree == given or all(tree[name] is given[name] for name in tree)
    for number, name in enumerate("abcd"):
        assert (as_numpy(result[name], "float32") == world_size - 1 + number).all()
        assert type(result[name]) is type(tree[name])


def test_mixed_libraries_in_one_tree(
    pool: RankPool, world: World, libraries: tuple[str, ...]
) -> None:
    pool.run(world.size, mixed_tree, world, libraries)


def jax_nodes(rank: int, world_size: int, world: World) -> None:
    """Containers that only jax knows."""
    group = world.group()
    jax = importlib.import_module("jax")
    state = jax.tree_util.Partial(max, np.full(2, rank + 1.0), key=np.full(3, rank + 2.0))
    result = group.allreduce({"state": state, "x": np.ones(1)})
    assert result["state"] is state
    assert state.args[0].tolist() == [sum(range(1, world_size + 1))] * 2
    assert state.keywords["key"].tolist() == [sum(range(2, world_size + 2))] * 3
    arrays = jax.tree_util.Partial(max, jax.numpy.full(2, rank + 1.0))
    summed = group.allreduce(arrays)
    assert isinstance(summed, jax.tree_util.Partial)
    assert summed.args[0].tolist() == [sum(range(1, world_size + 1))] * 2


@pytest.mark.needs("jax")
def test_containers_that_jax_knows(pool: RankPool, world: World) -> None:
    pool.run(world.size, jax_nodes, world)


def sparse_moves(rank: int, world_size: int, world: World) -> None:
    """A sparse array moves as a whole, indices and all, where all ranks' have one form."""
    group = world.group()
    jax = importlib.import_module("jax")
    sparse = importlib.import_module("jax.experimental.sparse")
    dense = np.zeros((3, 3), np.float32)
    dense[rank % 3, 1] = dense[2, 2] = rank + 1
    given = sparse.BCOO.fromdense(jax.numpy.array(dense), nse=2)
    result = group.broadcast({"w": given}, world_size - 1)["w"]
    expected = np.zeros((3, 3), np.float32)
    expected[(world_size - 1) % 3, 1] = expected[2, 2] = world_size
    assert np.asarray(result.todense()).tolist() == expected.tolist()
    assert np.asarray(given.todense()).tolist() == dense.tolist()


@pytest.mark.needs("jax")
def test_sparse_arrays_of_jax_move(pool: RankPool, world: World) -> None:
    pool.run(world.size, sparse_moves, world)


def average_of_halves(rank: int, world_size: int, world: World) -> None:
    group = world.group()
    inputs = [reduced("bfloat16", 1001, peer) for peer in range(world_size)]
    tree = {"a": inputs[rank].copy(), "b": inputs[rank][:500].copy()}
    group.allreduce(tree, col.ReduceOp.AVERAGE)
    expected, _ = combined("bfloat16", "AVERAGE", inputs)
    assert tree["a"].tobytes() == expected.tobytes()
    assert tree["b"].tobytes() == expected[:500].tobytes()
    assert tree["a"].dtype == numpy_dtype("bfloat16")


def test_a_fused_leaf_has_the_bits_of_a_single_one(pool: RankPool, world: World) -> None:
    pool.run(world.size, average_of_halves, world)
