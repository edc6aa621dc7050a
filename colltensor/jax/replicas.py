"""Whether all ranks have the same parameters: pytrees of JAX arrays or of traced values."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from colltensor.errors import MismatchError
from colltensor.group import Group
from colltensor.jax import collectives
from colltensor.replicas import REMEDY, compare_tree, values_differ

_REMEDY: Final = f"{REMEDY}, or pass compare=False"

_LANES: Final = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)
"""Odd numbers, each of which makes a hash of 32 bits of its own."""


def are_traced(tree: Any) -> bool:
    """Return whether a tree has leaves without values as yet."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree_util.tree_leaves(tree))


def compare_eagerly(params: Any, group: Group) -> None:
    """Compare the parameters of all ranks now.

    Raises:
        MismatchError: They differ.
    """
    compare_tree(jax.tree_util.tree_map(_on_host, params), group, "sync_gradients", _REMEDY)


def compare_when_run(params: Any, group: Group) -> None:
    """Compare them inside the computation that is being traced; its call raises where they differ.

    The computation hashes them itself. It gathers the hashes by a collective, which has its place
    among the others.
    """
    found, _ = jax.tree_util.tree_flatten_with_path(params)
    if found:
        hashes = jnp.stack(
            [_hash(jnp.asarray(_numbers(leaf)), jax.tree_util.keystr(path)) for path, leaf in found]
        )
        judge = functools.partial(_judge, group, [jax.tree_util.keystr(path) for path, _ in found])
        jax.debug.callback(judge, collectives.allgather(hashes, group))


def _numbers(leaf: Any) -> Any:
    """Return the numbers behind a typed key of ``jax.random``, and anything else as it is."""
    dtype = getattr(leaf, "dtype", None)
    return (
        jax.random.key_data(leaf)
        if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
        else leaf
    )


def _on_host(leaf: Any) -> Any:
    leaf = _numbers(leaf)
    return np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf


def _judge(group: Group, paths: Sequence[str], hashes: Any) -> None:
    """Raise where a rank's hashes are not those of most ranks; all ranks find the same."""
    hashes = np.asarray(hashes)
    rows = [row.tobytes() for row in hashes]
    usual = max(rows, key=rows.count)
    ranks = [rank for rank, row in enumerate(rows) if row != usual]
    if ranks:
        of = rows.index(usual)
        others = (hashes[ranks[0]] != hashes[of]).any(axis=-1).nonzero()[0]
        raise MismatchError(
            f"sync_gradients of group '{group.name}' (rank {group.rank}): rank{'s' * (len(ranks) > 1)} "
            f"{', '.join(map(str, ranks))} differ{'s' * (len(ranks) == 1)}: "
            f"{values_differ(ranks[0], of, [paths[index] for index in others])}; {_REMEDY}",
            ranks,
        )


def _hash(x: Any, path: str) -> Any:
    """Return 128 bits that depend on every bit of an array, its place, and its name."""
    words = _words(x)
    place = jax.lax.iota(jnp.uint32, words.size) + jnp.uint32(
        zlib.crc32(f"{path} {x.dtype}{x.shape}".encode())
    )
    sums = [
        jnp.sum(_mixed(words ^ (place * jnp.uint32(lane))), dtype=jnp.uint32) for lane in _LANES
    ]
    return jnp.stack(sums)


def _words(x: Any) -> Any:
    """Return an array's bits as a flat array of unsigned integers of 32 bits."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if jnp.issubdtype(x.dtype, jnp.floating):
        bits = jnp.finfo(x.dtype).bits
        x = jax.lax.bitcast_convert_type(
            x.astype(jnp.float32) if bits < 8 else x, f"uint{min(max(bits, 8), 32)}"
        )
    elif x.dtype.itemsize == 8:
        x = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return x.astype(jnp.uint32).ravel()


def _mixed(words: Any) -> Any:
    """Return words mixed one to one, by MurmurHash3's finaliser, so that all bits count."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
