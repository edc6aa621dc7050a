"""Trees as one call: any structure, dtypes, layouts and frameworks, from call to call the same or others."""

from __future__ import annotations

import collections
import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pool import RankPool
from test_between_hosts import PLACEMENTS, world_of
from worlds import Report, World, assert_same_bits

import colltensor as col
from colltensor.backends import is_available, reason

DTYPES = ("float32", "float64", "int32", "uint8", "bool", "complex64", "float16", "int64")
Array = np.ndarray[Any, Any]


def _values(generator: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    values = generator.integers(0, 2 if dtype == "bool" else 9, shape)
    return values.astype(dtype)


def _strided(values: Array, kind: int) -> Array:
    """Return an array of these values in another layout: as it is, transposed, every second one, or reversed."""
    if kind == 1 and values.ndim:
        return np.array(values.T, order="C").T
    if kind == 2 and values.ndim:
        room = np.zeros((*values.shape[:-1], 2 * values.shape[-1]), values.dtype)
        room[..., ::2] = values
        return room[..., ::2]
    if kind == 3 and values.ndim:
        return np.array(values[::-1], order="C")[::-1]
    return values.copy()


def _structure(generator: np.random.Generator, depth: int) -> Any:
    """Return a random structure whose leaves are shapes and dtypes, the same on all ranks."""
    kind = generator.integers(0, 5) if depth else 4
    if kind == 4:
        shape = ((), (3,), (0,), (2, 3), (4, 1, 5), (700,), (40_000,))[generator.integers(0, 7)]
        return shape, DTYPES[generator.integers(0, len(DTYPES))]
    children = [_structure(generator, depth - 1) for _ in range(generator.integers(1, 5))]
    names = [f"n{int(number)}" for number in generator.permutation(len(children))]
    if kind == 0:
        return dict(zip(names, children, strict=True))
    if kind == 1:
        return collections.OrderedDict(zip(names, children, strict=True))
    return children if kind == 2 else _Nest(*children[:1]) if kind == 3 else children


_Nest = collections.namedtuple("_Nest", "inner")
"""A node of optree's that is no builtin container."""


def _is_leaf(node: Any) -> bool:
    return isinstance(node, tuple) and len(node) == 2 and isinstance(node[1], str)


def _map(function: Callable[..., Any], node: Any, *others: Any) -> Any:
    if isinstance(node, dict):
        return type(node)(
            (name, _map(function, child, *(o[name] for o in others)))
            for name, child in node.items()
        )
    if isinstance(node, _Nest):
        return _Nest(_map(function, node.inner, *(other.inner for other in others)))
    if isinstance(node, list):
        return [_map(function, *children) for children in zip(node, *others, strict=True)]
    return function(node, *others)


def _tensor(library: str, layouts: np.random.Generator, values: Array) -> Any:
    kind = int(layouts.integers(0, 4))
    array = _strided(values, kind)
    if library == "torch" and kind != 3:
        return importlib.import_module("torch").from_numpy(array)
    if library == "jax":
        jax = importlib.import_module("jax")
        jax.config.update("jax_enable_x64", True)
        return jax.numpy.asarray(values)
    return array


def random_trees(
    rank: int, size: int, world: World, libraries: tuple[str, ...], seed: int
) -> dict[str, str]:
    group = world.group()
    report = Report(group)
    generator = np.random.default_rng(seed)
    structures = [_structure(generator, 3) for _ in range(5)]
    for step in range(40):
        structure = {"root": structures[generator.integers(0, len(structures))]}
        seeds = generator.integers(0, 2**31, 2)
        operation = ("allreduce", "allreduce", "reduce", "broadcast", "transfer")[
            generator.integers(0, 5 if size > 1 else 4)
        ]
        root, way = int(generator.integers(0, size)), int(generator.integers(0, 4))
        library = libraries[(rank * (way % 2) + step) % len(libraries)]
        layouts = np.random.default_rng([int(seeds[1]), rank if way == 3 else 0])

        def given(of: int, structure: Any = structure, seeds: Any = seeds) -> Any:
            source = np.random.default_rng([int(seeds[0]), of])
            return _map(lambda leaf: _values(source, *leaf) if _is_leaf(leaf) else leaf, structure)

        everyone = [given(of) for of in range(size)]
        tree = _map(functools.partial(_tensor, library, layouts), everyone[rank])
        with report.case(step, operation, root, library):
            asynchronous = way == 2
            if operation == "allreduce":
                done = group.allreduce(tree, async_op=asynchronous)
                expected = _map(lambda *leaves: _total(leaves), *everyone)
            elif operation == "reduce":
                done = group.reduce(tree, root, async_op=asynchronous)
                expected = (
                    _map(lambda *leaves: _total(leaves), *everyone)
                    if rank == root
                    else everyone[rank]
                )
            elif operation == "broadcast":
                done = group.broadcast(tree, root, async_op=asynchronous)
                expected = everyone[root]
            else:
                to = (root + 1) % size
                expected = everyone[root if rank == to else rank]
                done = tree
                if rank == root:
                    done = group.send(tree, to, async_op=asynchronous)
                elif rank == to:
                    done = group.recv(tree, root, async_op=asynchronous)
                else:
                    asynchronous = False
            result = done.result() if asynchronous else done
            if library != "jax":
                assert result is tree
            found: list[Array] = []
            _map(functools.partial(_check, found), expected, result)
            if operation in ("allreduce", "broadcast"):
                report.same_everywhere(
                    f"{step} {operation}", b"".join(values.tobytes() for values in found)
                )
    return report.done()


def _total(leaves: tuple[Array, ...]) -> Array:
    if leaves[0].dtype == bool:
        return np.any(leaves, axis=0)
    wide = "complex128" if leaves[0].dtype.kind == "c" else "float64"
    return np.asarray(sum(leaf.astype(wide) for leaf in leaves)).astype(leaves[0].dtype)


def _check(found: list[Array], wanted: Array, got: Any) -> None:
    values = np.asarray(got)
    assert values.dtype == wanted.dtype
    assert values.shape == wanted.shape
    np.testing.assert_array_equal(values, wanted)
    found.append(values)


@pytest.mark.parametrize("seed", [1, 2])
def test_random_trees(pool: RankPool, world: World, libraries: tuple[str, ...], seed: int) -> None:
    kinds = tuple(name for name in libraries if name in ("numpy", "torch", "jax"))
    assert_same_bits(pool.run(world.size, random_trees, world, kinds, seed))


def what_changes(rank: int, size: int, world: World) -> None:
    """What was known of a structure is found out anew where counts, dtypes, names or frameworks are others."""
    group = world.group()
    report = Report(group)
    for _ in range(3):
        for count, dtype in ((3, "float32"), (5, "float32"), (5, "float64"), (3, "int32")):
            for names in (("a", "b"), ("b", "a"), ("a", "c")):
                with report.case(count, dtype, names):
                    tree = {
                        name: np.full(count, rank + number, dtype)
                        for number, name in enumerate(sorted(names))
                    }
                    tree = {name: tree[name] for name in names}  # in another order of insertion
                    assert group.allreduce(tree) is tree
                    for number, name in enumerate(sorted(names)):
                        assert (tree[name] == sum(range(size)) + size * number).all(), tree
    with report.case("one memory in two leaves"):
        array = np.ones(6, "float32")
        with pytest.raises(col.AliasError, match=r"\['a'\] .*\['b'\]"):
            group.allreduce({"a": array[:4], "b": array[3:]})
        whole = {"a": array[::2], "b": array[1::2]}  # which interleave, and share none
        group.allreduce(whole)
        assert (array == size).all()
    with report.case("read-only"):
        array = np.ones(3)
        array.flags.writeable = False
        with pytest.raises(col.ReadOnlyError, match=r"leaf \['b'\]"):
            group.allreduce({"a": np.ones(2), "b": array})
    with (
        report.case("a leaf that is none"),
        pytest.raises(col.UnsupportedTensorError, match=r"\['b'\]"),
    ):
        group.allreduce({"a": np.ones(2), "b": "text"})
    with report.case("a container where a leaf was"):
        tree = {"a": np.ones(2), "b": np.ones(2)}
        group.allreduce(tree)
        deeper = {"a": np.ones(2), "b": [np.ones(2)]}
        group.allreduce(deeper)
        assert (deeper["b"][0] == size).all()
    with report.case("another number of ranks' leaves"):
        if size > 1:
            with pytest.raises(col.MismatchError) as found:
                group.allreduce({"a": np.ones(2), "b": np.ones(3 if rank == 1 else 2)})
            assert found.value.ranks == (1,)
            assert "['b']" in str(found.value)
            tree = {"a": np.ones(2), "b": np.ones(2)}
            group.allreduce(tree)  # the group goes on
            assert (tree["b"] == size).all()
    report.done()


def test_what_changes_between_calls(pool: RankPool, world: World) -> None:
    pool.run(world.size, what_changes, world)


def versions(rank: int, size: int, world: World) -> None:
    torch = importlib.import_module("torch")
    group = world.group()
    tree = {"a": torch.ones(3), "b": torch.ones(2, 2)}
    for _ in range(2):
        before = {name: tensor._version for name, tensor in tree.items()}
        group.allreduce(tree)
        assert all(tensor._version > before[name] for name, tensor in tree.items())
    before = {name: tensor._version for name, tensor in tree.items()}
    group.broadcast(tree, 0)
    assert all((tensor._version > before[name]) == (rank != 0) for name, tensor in tree.items())
    mixed = {"a": torch.ones(3), "b": np.ones(2)}
    before = mixed["a"]._version
    group.allreduce(mixed)
    assert mixed["a"]._version > before
    with pytest.raises(col.ReadOnlyError, match=r"\['a'\]"):
        group.allreduce({"a": torch.ones(3, requires_grad=True), "b": torch.ones(2)})
    tree = {"a": torch.ones(3), "b": torch.ones(3)}
    group.allreduce(tree)
    # of the same structure and dtype, whose memory holds other values
    lazy = torch._neg_view(torch.ones(3))
    with pytest.raises(col.UnsupportedTensorError, match=r"\['b'\].*resolve_neg\(\)"):
        group.allreduce({"a": torch.ones(3), "b": lazy})
    before = torch.ones(3)
    shared = torch._lazy_clone(before)  # of one memory until one of them is written
    group.allreduce({"a": torch.ones(3), "b": shared})
    assert (before == 1).all()
    assert (shared == size).all()


@pytest.mark.needs("torch")
def test_torch_is_told_of_every_leaf(pool: RankPool, ranks: World) -> None:
    pool.run(ranks.size, versions, ranks)


def donated(rank: int, size: int, world: World) -> None:
    jax = importlib.import_module("jax")
    group = world.group()
    for _ in range(3):
        tree = [jax.numpy.full((16, 16), rank + 1.0), {"w": jax.numpy.full(40, 2.0)}]
        jax.block_until_ready(tree)
        places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]
        result = group.allreduce(tree, donate=True)
        assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(result)] == places
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(tree))
        assert (np.asarray(result[0]) == sum(range(1, size + 1))).all()
        assert (np.asarray(result[1]["w"]) == 2 * size).all()
    with pytest.raises(col.UnsupportedTensorError, match="deleted"):
        group.allreduce(tree)
    twice = jax.numpy.ones(4)
    with pytest.raises(col.AliasError):
        group.allreduce([twice, twice], donate=True)
    assert (np.asarray(group.allreduce([twice, twice])[1]) == size).all()


@pytest.mark.needs("jax")
def test_leaves_of_jax_are_donated_together(pool: RankPool, ranks: World) -> None:
    pool.run(ranks.size, donated, ranks)


def many_of_jax(rank: int, size: int, world: World) -> None:
    jax = importlib.import_module("jax")
    group = world.group()
    for donate in (False, True):
        foreign = np.full(5, rank, np.float32)
        tree = [jax.numpy.full(number % 4, rank + number, "float32") for number in range(19)]
        tree += [jax.dlpack.from_dlpack(foreign), jax.numpy.arange(3)]
        result = group.allreduce(tree, donate=donate)
        for number in range(19):
            assert np.asarray(result[number]).tolist() == [sum(range(size)) + number * size] * (
                number % 4
            )
        assert np.asarray(result[19]).tolist() == [sum(range(size))] * 5
        assert np.asarray(result[20]).tolist() == [0, size, 2 * size]
        assert [leaf.is_deleted() for leaf in tree] == [donate] * 21
        assert (foreign == rank).all()


@pytest.mark.needs("jax")
def test_more_leaves_of_jax_than_are_copied_at_once(pool: RankPool, ranks: World) -> None:
    pool.run(ranks.size, many_of_jax, ranks)


def moved_only(rank: int, size: int, world: World) -> None:
    """Types that have no name on the transport: torch on one rank, numpy on another."""
    torch, ml_dtypes = importlib.import_module("torch"), importlib.import_module("ml_dtypes")
    group = world.group()
    for name in ("float8_e4m3fn", "float8_e5m2", "bfloat16", "float16"):
        for _ in range(2):
            bits = np.arange(6, dtype=np.uint16 if name.endswith("16") else np.uint8) + (rank + 1)
            arrays = {"a": bits.copy(), "b": bits[::-1].copy()}
            if rank % 2:
                tree = {
                    key: array.view(getattr(ml_dtypes, name, name)) for key, array in arrays.items()
                }
            else:
                tree = {
                    key: torch.from_numpy(array).view(getattr(torch, name))
                    for key, array in arrays.items()
                }
            group.broadcast(tree, size - 1)
            expected = np.arange(6, dtype=bits.dtype) + size
            assert (arrays["a"] == expected).all(), name
            assert (arrays["b"] == expected[::-1]).all(), name


@pytest.mark.needs("torch")
def test_types_that_only_move(pool: RankPool, ranks: World) -> None:
    pool.run(ranks.size, moved_only, ranks)


def one_takes_the_slow_path(rank: int, size: int, world: World) -> None:
    """The root's leaves are read-only, so that they are no plain ones: the transfers are the same."""
    group = world.group()
    for shape in ((3,), (40, 50)):
        tree = {
            "a": np.full(shape, rank + 1.0, "float32"),
            "b": np.full(shape, rank + 2.0, "float32"),
        }
        if rank == 0:
            for array in tree.values():
                array.flags.writeable = False
        group.broadcast(tree, 0)
        assert (tree["a"] == 1).all()
        assert (tree["b"] == 2).all()
        if rank < 2:
            received = {"a": np.zeros(shape, "float32"), "b": np.zeros(shape, "float32")}
            if rank == 0:
                group.send(tree, 1)
            else:
                group.recv(received, 0)
                assert (received["a"] == 1).all()
                assert (received["b"] == 2).all()


def test_plain_leaves_meet_others(pool: RankPool, ranks: World) -> None:
    pool.run(ranks.size, one_takes_the_slow_path, ranks)


@pytest.mark.gloo
@pytest.mark.skipif(not is_available("shm"), reason=str(reason("shm")))
@pytest.mark.parametrize("hosts", PLACEMENTS[1:3])
def test_plain_leaves_meet_others_between_hosts(pool: RankPool, provider: str, hosts: str) -> None:
    pool.run(len(hosts), one_takes_the_slow_path, world_of(hosts, provider))


def keys_in_order(rank: int, size: int, world: World) -> None:
    """A result has its keys in the order of what was given, whichever tree of this structure came first."""
    jax = importlib.import_module("jax")
    group = world.group()
    for names in (("b", "a"), ("a", "b")):
        tree = {name: jax.numpy.full(3, rank + ord(name)) for name in names}
        result = group.allreduce(tree)
        assert list(result) == list(names)
        for name in names:
            assert (np.asarray(result[name]) == sum(range(size)) + size * ord(name)).all()


@pytest.mark.needs("jax")
def test_results_keep_the_order_of_keys(pool: RankPool, ranks: World) -> None:
    pool.run(ranks.size, keys_in_order, ranks)
