"""Containers: leaves in optree's order, their paths, and the way back."""

from __future__ import annotations

import importlib
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import optree
import pytest

from colltensor import tree
from colltensor.errors import UnsupportedTensorError

Pair = namedtuple("Pair", ["weight", "bias"])  # the plain kind is what optree must know


@dataclass
class Plain:
    """No pytree node."""

    weight: Any


class Registered:
    """A pytree node of the user's, registered with optree."""

    def __init__(self, first: Any, second: Any) -> None:
        self.parts = (first, second)

    def tree_flatten(self) -> Any:
        return self.parts, None

    @classmethod
    def tree_unflatten(cls, _: Any, children: Any) -> Any:
        return cls(*children)


optree.register_pytree_node_class(Registered, namespace=optree.registry.__GLOBAL_NAMESPACE)


def array() -> Any:
    return np.zeros(2)


def test_what_is_a_container() -> None:
    for container in ([], {}, (), [array()], {"a": 1}, Pair(1, 2), OrderedDict(), Registered(1, 2)):
        assert tree.is_container(container), container
    for leaf in (array(), np.float32(1), 1.0, "abc", Plain(1), object(), {1, 2}, None):
        assert not tree.is_container(leaf), leaf


def test_leaves_come_in_sorted_order_of_keys() -> None:
    a, b, c = array(), array(), array()
    leaves, paths, _ = tree.flatten({"z": a, "b": {"y": b}, "a": [None, c]})
    assert [id(leaf) for leaf in leaves] == [id(c), id(b), id(a)]
    assert paths == ["['a'][1]", "['b']['y']", "['z']"]


def test_insertion_order_changes_nothing() -> None:
    first = tree.flatten({"a": 1.0, "b": 2.0, "c": 3.0})
    second = tree.flatten({"c": 3.0, "a": 1.0, "b": 2.0})
    assert first[:2] == second[:2]


@pytest.mark.parametrize(
    "container",
    [
        {"b": [1, (2,)], "a": None},
        [],
        (),
        {},
        None,
        Pair(1, {"k": 2}),
        OrderedDict([("z", 1), ("a", 2)]),
        [[], [()]],
        {10: 1, 2: 2},
        ({"x": [{"y": 5}]},),
    ],
)
def test_rebuild_gives_the_same_structure(container: Any) -> None:
    leaves, paths, rebuild = tree.flatten(container)
    assert len(leaves) == len(paths)
    assert rebuild(leaves) == container
    assert type(rebuild(leaves)) is type(container)
    doubled = rebuild([leaf * 2 for leaf in leaves])
    assert optree.tree_leaves(doubled) == [leaf * 2 for leaf in leaves]


def test_nodes_registered_with_optree() -> None:
    a, b = array(), array()
    leaves, paths, rebuild = tree.flatten({"n": Registered(a, [b])})
    assert [id(leaf) for leaf in leaves] == [id(a), id(b)]
    assert len(set(paths)) == 2
    assert rebuild([1, 2])["n"].parts == (1, [2])


def test_arrays_are_leaves_and_their_paths_differ() -> None:
    nested = [[array()], [array()], {"0": array(), 0: array()}]
    _, paths, _ = tree.flatten(nested)
    assert len(set(paths)) == 4


@pytest.mark.needs("jax")
def test_nodes_of_jax() -> None:
    jax = importlib.import_module("jax")
    a, b = array(), array()
    node = jax.tree_util.Partial(max, a, key=[b])
    assert tree.is_container(node)
    leaves, paths, rebuild = tree.flatten({"f": node, "x": 1.0})
    assert [id(leaf) for leaf in leaves[:2]] == [id(a), id(b)]
    assert len(set(paths)) == 3
    again = rebuild([7, 8, 9])
    assert again["f"].args == (7,)
    assert again["f"].keywords == {"key": [8]}
    assert again["x"] == 9


class Unordered:
    """A key whose comparison fails, as a tensor's does."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __lt__(self, other: object) -> bool:
        raise self.error


@pytest.mark.parametrize("flatten", [tree.flatten, tree.structure_of, tree.flat_tree])
@pytest.mark.parametrize(
    "error", [RuntimeError("ambiguous"), ValueError("ambiguous"), ZeroDivisionError("ambiguous")]
)
def test_keys_that_cannot_be_ordered_are_named(flatten: Any, error: Exception) -> None:
    keys = {Unordered(error): np.zeros(1), Unordered(error): np.ones(2)}
    with pytest.raises(
        UnsupportedTensorError, match=r"\btest_tree\.Unordered, .*list\(tree\.values\(\)\)"
    ):
        flatten({"state": [keys], "other": np.zeros(2)})


@pytest.mark.needs("torch")
def test_parameters_as_keys_are_named() -> None:
    """They ended in an error of torch: the size of tensor a must match."""
    torch = importlib.import_module("torch")
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (2, 3)]
    gradients = {parameter: torch.zeros(2) for parameter in parameters}
    with pytest.raises(
        UnsupportedTensorError, match=r"\btorch\.nn\.parameter\.Parameter, .*named_parameters\(\)"
    ):
        tree.flatten(gradients)


@pytest.mark.needs("torch")
def test_keys_that_mean_nothing_elsewhere_are_named() -> None:
    """Parameters of one element can be sorted, by their values; objects keep the order in which they came."""
    torch = importlib.import_module("torch")
    parameter = torch.nn.Parameter(torch.zeros(2))
    scalars = [torch.nn.Parameter(torch.tensor(value)) for value in (2.0, 1.0)]
    for keys, kind in (
        ([parameter], "Parameter"),
        (scalars, "Parameter"),
        ([(0, parameter)], "tuple"),
        ([object()], "object"),
    ):
        with pytest.raises(UnsupportedTensorError, match=rf"\.{kind}, .*named_parameters\(\)"):
            tree.flatten([{key: np.zeros(1) for key in keys}])
    assert tree.flatten({(1, "a"): 1.0, None: 2.0, 1.5: 3.0})[0] == [2.0, 3.0, 1.0]


@pytest.mark.needs("jax")
def test_keys_that_jax_cannot_order_are_named() -> None:
    """They ended in an error of JAX, which did not say which."""
    jax = importlib.import_module("jax")
    for keys, kinds in (((1, "a"), r"int .*builtins\.str"), ((object(), object()), "object")):
        node = jax.tree_util.Partial(max, {"a": dict.fromkeys(keys, np.zeros(1))})
        with pytest.raises(
            UnsupportedTensorError, match=rf"\bbuiltins\.{kinds}, .*named_parameters\(\)"
        ):
            tree.flatten([node])
    node = jax.tree_util.Partial(max, {object(): np.zeros(1)})
    with pytest.raises(UnsupportedTensorError, match=r"\bbuiltins\.object, .*named_parameters\(\)"):
        tree.flatten([node])


def test_a_tree_built_anew_keeps_the_order_of_its_keys() -> None:
    for node in (
        {"b": 1, "a": 2},
        {"b": [1, (2,)], "a": {"y": 3, "x": 4}},
        [1, 2],
        (1, [2]),
        {2: 1, 1: 2},
    ):
        leaves, structure = tree.flat_tree(node)
        build = tree.builder_of(structure)
        assert build is not None
        built = build(node, iter([str(leaf) for leaf in leaves]))
        assert built is not node
        assert repr(built) == repr(structure.unflatten([str(leaf) for leaf in leaves]))
    assert tree.builder_of(tree.flat_tree(OrderedDict(a=1))[1]) is None
    assert tree.builder_of(tree.flat_tree([[], 1])[1]) is None
