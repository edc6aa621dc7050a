"""Containers of tensors: flattening in one order on every rank, and back."""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, cast

import optree

from colltensor.adapters import find_adapter
from colltensor.errors import CollectiveError, UnsupportedTensorError

_SPARSE: Final = "jax.experimental.sparse._base.JAXSparse"
_WITH_INDICES: Final = {
    _SPARSE: "pass a dense one, x.todense(), or x.data alone where all ranks have the same indices",
    "torch.nn.utils.rnn.PackedSequence": "pass x.data",
}
"""Nodes that hold indices beside values, by the name of a base; and what can be reduced instead."""
_CONSTANT_MODULES: Final = frozenset({"datetime", "decimal", "fractions", "pathlib", "uuid"})
_CONSTANTS: Final = frozenset(
    {
        "builtins.str",
        "builtins.bytes",
        "builtins.range",
        "enum.Enum",
        "numpy.dtype",
        "numpy.generic",
    }
    | {f"torch.{name}" for name in ("dtype", "device", "layout", "memory_format", "Size")}
)
"""Modules, and names of types, whose values are the same on ranks that write them alike.

Of a module these are all types, of a type all values.
"""
_remedies: Final[dict[type, str | None]] = {}
"""That of a type that has been seen; None where all leaves are values."""


def is_container(value: Any) -> bool:
    """Return True for a pytree node (dict, list ...) that may hold tensors; not for None."""
    if value is None or find_adapter(type(value)) is not None:
        return False
    return not optree.tree_is_leaf(value) or _is_jax_node(value)


def flatten(
    tree: Any, reduced: bool = False
) -> tuple[list[Any], list[str], Callable[[Iterable[Any]], Any]]:
    """Return a container's leaves, their paths, and the function that builds it anew from leaves.

    Leaves come in optree's order: dict keys sorted, whatever the insertion order; ``None`` is an
    empty subtree. Nodes known to jax alone (flax structures, say) are flattened by
    ``jax.tree_util``.

    Raises:
        UnsupportedTensorError: A dict's keys cannot be ordered, or mean nothing on other ranks.
            With ``reduced``, a node that holds indices, which must not be combined.
    """
    outer, spec = _flattened(tree, _is_tensor_to_reduce if reduced else _is_tensor)
    entries = spec.paths()
    _refuse_keys_of_this_process(entries)
    outer_paths = ["".join(f"[{entry!r}]" for entry in path) for path in entries]
    if not any(not _is_tensor(leaf) and _is_jax_node(leaf) for leaf in outer):
        return outer, outer_paths, lambda leaves: optree.tree_unflatten(spec, list(leaves))
    return _flatten_jax_nodes(outer, outer_paths, spec, refuse_indices if reduced else None)


def constant(leaf: Any) -> str | None:
    """Return what a leaf without numbers is, in words that are the same in every process.

    Returns None if it may have numbers. Functions and classes go by their names; text, options,
    paths and dates by their repr.
    """
    if callable(leaf):
        name = getattr(leaf, "__qualname__", None) or getattr(leaf, "__name__", None)
        return f"{getattr(leaf, '__module__', None)}.{name}" if isinstance(name, str) else None
    kind = type(leaf)
    if kind.__module__.partition(".")[0] in _CONSTANT_MODULES or any(
        f"{base.__module__}.{base.__qualname__}" in _CONSTANTS for base in kind.__mro__
    ):
        return repr(leaf)
    return None


def refuse_indices(node: Any) -> bool:
    """Return False, so that it may be asked of every node of a tree that is flattened.

    Raises:
        UnsupportedTensorError: The node holds indices beside values: a sparse array, say. Ranks'
            indices differ, and their sum means nothing.
    """
    kind = type(node)
    if kind not in _remedies:
        _remedies[kind] = _remedy(kind)
    remedy = _remedies[kind]
    if remedy is not None:
        raise UnsupportedTensorError(
            f"{kind.__module__}.{kind.__qualname__} holds indices beside its values, and this call would treat both "
            f"alike; {remedy}"
        )
    return False


def _remedy(kind: type) -> str | None:
    # of torch.max, topk, sort ...
    if kind.__module__ == "torch.return_types" and hasattr(kind, "indices"):
        return "pass x.values"
    names = (f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__)
    return next((_WITH_INDICES[name] for name in names if name in _WITH_INDICES), None)


def structure_of(tree: Any) -> optree.PyTreeSpec | None:
    """Return what ``leaves_like`` compares with; None for a tree with nodes that only jax knows."""
    leaves, structure = _flattened(tree, _is_tensor)
    has_jax_nodes = any(not _is_tensor(leaf) and _is_jax_node(leaf) for leaf in leaves)
    return None if has_jax_nodes else structure


def flat_tree(tree: Any) -> tuple[list[Any], optree.PyTreeSpec]:
    """Return leaves and structure fast; one unlike ``structure_of`` has other leaves inside."""
    leaves, structure = _flattened(tree)
    return leaves, structure


def matcher_of(structure: optree.PyTreeSpec) -> Callable[[Any], list[Any] | None] | None:
    """Return a function that gives the leaves of a tree of this structure, None for another one.

    For dicts, lists and tuples alone; None for structures with other nodes. It takes a tenth of
    optree's time, but looks at containers only where the structure has some. What it gives for a
    leaf may be a container.
    """
    if structure.is_leaf():
        return lambda tree: [tree]

    kind = structure.type
    inner = [matcher_of(child) for child in structure.children()]
    if kind not in (dict, list, tuple) or not inner or None in inner:
        return None

    length, entries = len(inner), structure.entries()
    get = operator.itemgetter(*entries) if length > 1 else lambda tree: (tree[entries[0]],)
    flat = all(child.is_leaf() for child in structure.children())

    def match(tree: Any) -> list[Any] | None:
        if tree.__class__ is not kind or len(tree) != length:
            return None
        try:
            values = get(tree)
        except KeyError:
            return None

        if flat:
            return list(values)

        leaves: list[Any] = []
        for one, value in zip(inner, values, strict=True):
            found = one(value)  # type: ignore[misc]  # none of them is None
            if found is None:
                return None
            leaves += found
        return leaves

    return match


def builder_of(structure: optree.PyTreeSpec) -> Callable[[Any, Iterator[Any]], Any] | None:
    """Return a function that builds a tree of this structure anew, with other leaves.

    Returns None as ``matcher_of``. The function is given the tree, whose dicts say in which order
    their keys are, and an iterator of the leaves.
    """
    if structure.is_leaf():
        return lambda tree, leaves: next(leaves)

    kind = structure.type
    inner = [builder_of(child) for child in structure.children()]
    if kind not in (dict, list, tuple) or not inner or None in inner:
        return None

    entries = structure.entries()
    flat = all(child.is_leaf() for child in structure.children())

    def build(tree: Any, leaves: Iterator[Any]) -> Any:
        values: Iterable[Any] = (
            itertools.islice(leaves, len(inner))
            if flat
            else [one(tree[entry], leaves) for one, entry in zip(inner, entries, strict=True)]  # type: ignore[misc]
        )
        if kind is not dict:
            return kind(values)

        made = dict(tree)
        made.update(zip(entries, values, strict=True))
        return made

    return build


def leaves_like(tree: Any, structure: optree.PyTreeSpec) -> list[Any] | None:
    """Return a tree's leaves as ``flatten``, but cheaper; None for another structure."""
    leaves, found = _flattened(tree)
    return leaves if found == structure else None


def _flattened(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[Any], optree.PyTreeSpec]:
    """Flatten with optree.

    Raises:
        UnsupportedTensorError: A dict's keys cannot be ordered, as the ranks need them.
    """
    try:
        return optree.tree_flatten(tree, is_leaf=is_leaf)
    except CollectiveError:
        raise
    except Exception as error:  # whatever a key's own __lt__ raises
        refuse_unordered_keys(
            tree, error, lambda node: optree.tree_flatten(cast("Any", dict.fromkeys(node, 0)))
        )
        raise


def refuse_unordered_keys(
    tree: Any, error: Exception, sort: Callable[[Any], object] = sorted
) -> None:
    """Refuse a tree that could not be flattened because a dict's keys have no order.

    Returns if there was another reason.

    Args:
        tree: The tree.
        error: What flattening it raised.
        sort: Raises for a dict with such keys.

    Raises:
        UnsupportedTensorError: Names the keys' types.
    """
    for node in _dicts(tree):
        try:
            sort(node)
        except Exception:  # noqa: BLE001 - whatever a key's own __lt__ raises
            raise _unordered(node, f"have no order that all ranks share ({error})") from error


def _unordered(keys: Iterable[Any], why: str) -> UnsupportedTensorError:
    kinds = " and ".join(
        sorted({f"{type(key).__module__}.{type(key).__qualname__}" for key in keys})
    )
    return UnsupportedTensorError(
        f"a dict has keys of type {kinds}, which {why}; name them (by named_parameters(), say), or pass "
        "list(tree.values()), in the same order on every rank"
    )


def _refuse_keys_of_this_process(paths: Iterable[tuple[Any, ...]]) -> None:
    """Check that keys mean the same on all ranks.

    Raises:
        UnsupportedTensorError: A key is a tensor, or known by its address alone.
    """
    for key in [entry for path in paths for entry in path if not isinstance(entry, (str, int))]:
        if any(map(_is_tensor, key if isinstance(key, tuple) else (key,))) or " at 0x" in repr(key):
            raise _unordered([key], "mean nothing in other processes")


def _dicts(tree: Any) -> Iterable[dict[Any, Any]]:
    if isinstance(tree, dict):
        yield tree
    if isinstance(tree, (dict, list, tuple)):
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from _dicts(child)
    elif not _is_tensor(tree) and _is_jax_node(tree):
        flatten_one_level = sys.modules["jax"].tree_util.default_registry.flatten_one_level
        children = flatten_one_level(tree)
        yield from _dicts(list(children[0]) if children else [])


def _flatten_jax_nodes(
    outer: list[Any],
    outer_paths: list[str],
    spec: optree.PyTreeSpec,
    look: Callable[[Any], bool] | None,
) -> tuple[list[Any], list[str], Callable[[Iterable[Any]], Any]]:
    tree_util = sys.modules["jax"].tree_util
    leaves: list[Any] = []
    paths: list[str] = []
    inner: list[tuple[int, Any]] = []

    for leaf, path in zip(outer, outer_paths, strict=True):
        if _is_tensor(leaf) or not _is_jax_node(leaf):
            found, definition = [((), leaf)], None
        else:
            try:
                found, definition = tree_util.tree_flatten_with_path(leaf, is_leaf=look)
            except ValueError as error:  # of JAX's sorting
                refuse_unordered_keys(leaf, error)
                raise
            _refuse_keys_of_this_process(
                [tuple(getattr(key, "key", "") for key in keys) for keys, _ in found]
            )
            if any(map(_is_sparse, tree_util.tree_leaves(leaf, is_leaf=_is_sparse))):
                # shapes and sorted indices are no leaves, and must be the same
                path += f" of {definition}: "

        leaves += [tensor for _, tensor in found]
        paths += [path + tree_util.keystr(keys) for keys, _ in found]
        inner.append((len(found), definition))

    def rebuild(replaced: Iterable[Any]) -> Any:
        rest = iter(replaced)
        nodes = []
        for length, definition in inner:
            part = [next(rest) for _ in range(length)]
            nodes.append(
                part[0] if definition is None else tree_util.tree_unflatten(definition, part)
            )
        return optree.tree_unflatten(spec, nodes)

    return leaves, paths, rebuild


def _is_tensor(value: Any) -> bool:
    return find_adapter(type(value)) is not None


def _is_tensor_to_reduce(value: Any) -> bool:
    return _is_tensor(value) or refuse_indices(value)


def _is_sparse(value: Any) -> bool:
    return any(f"{base.__module__}.{base.__qualname__}" == _SPARSE for base in type(value).__mro__)


def _is_jax_node(value: Any) -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and value is not None and not jax.tree_util.all_leaves([value])
