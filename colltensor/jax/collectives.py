"""Collectives on JAX arrays, inside and outside of ``jit``, ``grad``, ``vmap`` and ``lax.scan``.

Imports jax. The results are new arrays. Derivatives are those of the sum of all ranks' losses, by
each rank's own operand. Every rank differentiates its own loss, in step with the others, and gets
its part of that sum's gradient. Below, x_r is the operand of rank r and y_r its result. v_r is the
cotangent that rank r has of y_r, and L the sum of the losses.

Every operand may be a pytree of arrays (a dict, a list ...). It has the same leaves, in
``jax.tree``'s order, on every rank; the result has the same structure. Leaves of one dtype travel
together, as one flat array. Ranks that call eagerly must bring those flat arrays, one a dtype, and
not the tree.
"""

from __future__ import annotations

import math
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from colltensor.adapters._numpy_dtypes import DTYPE_OF, unsupported_dtype
from colltensor.backends.rules import require
from colltensor.errors import GroupError, RankError, ShapeError, UnsupportedDTypeError
from colltensor.group import Group
from colltensor.jax import _groups, _primitives, _targets
from colltensor.jax._primitives import NO_OP, NO_RANK
from colltensor.table import find_group
from colltensor.tree import refuse_indices, refuse_unordered_keys
from colltensor.types import ReduceOp


def allreduce(x: Any, group: Group | str = "default", op: ReduceOp = ReduceOp.SUM) -> Any:
    """Return the elementwise combination of all ranks' arrays.

    Every rank calls and gets the same bits.

    The gradient of a SUM-allreduce is a SUM-allreduce. For every s, y_s = sum of x_r, so for every
    r, dL/dx_r = sum over s of v_s. Of an AVERAGE it is an AVERAGE. The derivative of MIN and MAX
    belongs to the ranks that have the extreme element, in equal parts; the other ops have none.

    Args:
        x: An array of any shape, or a pytree of arrays; all ranks' have one dtype and count.
        group: The group or its name.
        op: How elements are combined.

    Raises:
        UnsupportedDTypeError: ``op`` is not defined for this dtype, or JAX would cut 64-bit numbers
            to 32 bits.
        BackendUnavailableError: jax-tvm-ffi is missing.
        GroupError: There is no such group.
        jax.errors.JaxRuntimeError: Where the result is ready or read, if something went wrong
            between the ranks. It has the words of the error that an eager call would have raised.
    """
    return _call(_primitives.allreduce_p, "allreduce", x, group, op=op)


def reduce(
    x: Any, dst_rank: int = 0, group: Group | str = "default", op: ReduceOp = ReduceOp.SUM
) -> Any:
    """Return the combination of all ranks' arrays on rank ``dst_rank``, and ``x`` on the others.

    Derivative (SUM): y_d = sum of x_r on the root d and y_r = x_r elsewhere. So dL/dx_d = v_d and
    dL/dx_r = v_d + v_r: a broadcast of v_d, to which the other ranks add their own. With AVERAGE,
    v_d is divided by the number of ranks.

    Args:
        x: As for ``allreduce``.
        dst_rank: The rank that gets the result.
        group: The group or its name.
        op: How elements are combined.
    """
    return _call(_primitives.reduce_p, "reduce", x, group, op=op, root=dst_rank)


def broadcast(x: Any, src_rank: int = 0, group: Group | str = "default") -> Any:
    """Return rank ``src_rank``'s array on every rank.

    Derivative: y_r = x_s for every r, so dL/dx_s = sum of all v_r, a reduction to the source s, and
    zero elsewhere.

    Args:
        x: On ``src_rank`` the array to send, elsewhere one of its dtype and count, whose values do
            not matter.
        src_rank: The rank that has the data.
        group: The group or its name.
    """
    return _call(_primitives.broadcast_p, "broadcast", x, group, root=src_rank)


def allgather(x: Any, group: Group | str = "default") -> Any:
    """Return all ranks' arrays, stacked by rank along a new first axis.

    Derivative: y_s[r] = x_r for every s, so dL/dx_r = sum over s of v_s[r]: a SUM-reducescatter of
    v.

    Args:
        x: An array of any dtype; all ranks' have one dtype and count.
        group: The group or its name.
    """
    return _call(_primitives.allgather_p, "allgather", x, group)


def reducescatter(x: Any, group: Group | str = "default", op: ReduceOp = ReduceOp.SUM) -> Any:
    """Return the combination of all ranks' ``x[rank]``.

    Derivative (SUM): y_s = sum over r of x_r[s], so dL/dx_r[s] = v_s for every r: an allgather of
    v. With AVERAGE, it is divided by the number of ranks.

    Args:
        x: An array whose first axis has one entry for each rank.
        group: The group or its name.
        op: How elements are combined.
    """
    return _call(_primitives.reducescatter_p, "reducescatter", x, group, op=op)


def send(x: Any, dst_rank: int, group: Group | str = "default") -> Any:
    """Send an array to rank ``dst_rank``, which calls ``recv``; returns ``x`` as it is.

    Derivative: y = x here and y_d = x on the receiver d, so dL/dx = v + v_d. The receiver sends
    v_d back. For that the differentiated function must use the result
    (``x = send(x, 1)``).

    Args:
        x: An array of any dtype.
        dst_rank: The rank to send to.
        group: The group or its name.
    """
    return _call(_primitives.send_p, "send", x, group, root=dst_rank)


def recv(like: Any, src_rank: int, group: Group | str = "default") -> Any:
    """Return the array that rank ``src_rank`` sends, with the shape and dtype of ``like``.

    Derivative: y = x_s of the sender s, so v is sent back to it, and dL/dlike is zero. For that
    ``like`` must depend on the differentiated variables, as the sender's array does
    (``0 * parameters``).

    Args:
        like: An array, whose values do not matter.
        src_rank: The rank to receive from.
        group: The group or its name.
    """
    return _call(_primitives.recv_p, "recv", like, group, source=src_rank)


def sendrecv(x: Any, dst_rank: int, src_rank: int, group: Group | str = "default") -> Any:
    """Send an array to ``dst_rank`` and return one of the same shape from ``src_rank``.

    Ranks in a ring use it so.

    Derivative: y_d = x_r for the rank d that r sends to, so dL/dx_r = v_d: a sendrecv the other way
    round.

    Args:
        x: An array of any dtype.
        dst_rank: The rank to send to; may be this one, if ``src_rank`` is too.
        src_rank: The rank to receive from.
        group: The group or its name.
    """
    return _call(_primitives.sendrecv_p, "sendrecv", x, group, root=dst_rank, source=src_rank)


def _call(
    primitive: Any,
    name: str,
    x: Any,
    group: Group | str,
    *,
    op: ReduceOp | None = None,
    root: int | None = None,
    source: int | None = None,
) -> Any:
    """Check a call of one array or a pytree as far as it can be before it runs, and make it.

    Leaves of one dtype travel together, in one transfer: their number on each rank depends on
    dtypes alone.
    """
    _targets.register()
    found = find_group(group) if isinstance(group, str) else group
    if not isinstance(found, Group):
        raise GroupError(
            f"{name}: group: expected a colltensor.Group or a group's name, got {group!r}"
        )

    look = None if op is None and name != "allgather" else refuse_indices
    try:
        leaves, structure = jax.tree_util.tree_flatten(x, is_leaf=look)
    except ValueError as error:  # of JAX's sorting
        refuse_unordered_keys(x, error)
        raise

    leaves = [leaf if _is_float0(leaf) else _array(name, leaf) for leaf in leaves]
    by_dtype: dict[Any, list[int]] = {}
    for index, leaf in enumerate(leaves):
        if not _is_float0(leaf):
            by_dtype.setdefault(leaf.dtype, []).append(index)
    per_rank = name == "reducescatter"
    if per_rank:
        for leaf in leaves:
            _check_blocks(leaf, found)

    op = None if op is None else ReduceOp.of(op)
    for members in by_dtype.values():
        if len(members) == 1:
            leaves[members[0]] = _bind(primitive, name, leaves[members[0]], found, op, root, source)
            continue

        shapes = [leaves[index].shape[1:] if per_rank else leaves[index].shape for index in members]
        parts = [
            leaves[index].reshape((found.world_size, -1) if per_rank else -1) for index in members
        ]
        result = _bind(primitive, name, jnp.concatenate(parts, axis=-1), found, op, root, source)

        start = 0
        for index, shape in zip(members, shapes, strict=True):
            count = math.prod(shape)
            part = result[..., start : start + count].reshape((*result.shape[:-1], *shape))
            leaves[index] = _primitives.weak_p.bind(part) if leaves[index].weak_type else part
            start += count
    return jax.tree_util.tree_unflatten(structure, leaves)


def _bind(
    primitive: Any,
    name: str,
    x: Any,
    group: Group,
    op: ReduceOp | None,
    root: int | None,
    source: int | None,
) -> Any:
    """Check and make a call of one array."""
    size, rank = group.world_size, group.rank
    dtype = DTYPE_OF.get(x.dtype)
    if dtype is None:
        raise unsupported_dtype(x.dtype)
    require(name, dtype, op)

    for argument, peer in (("dst_rank", root), ("src_rank", source)):
        if isinstance(peer, jax.core.Tracer):
            raise RankError(
                f"{name}: {argument} (rank {rank}): expected a number, got a traced array; a rank must be known when "
                "the function is traced: mark the argument static (static_argnums)"
            )
        if peer is not None and not (isinstance(peer, SupportsIndex) and 0 <= int(peer) < size):
            raise RankError(
                f"{name}: {argument} (rank {rank}): expected 0 to {size - 1}, got {peer!r}"
            )
    if name in ("send", "recv") and rank in (root, source):
        raise RankError(f"{name}: rank {rank} is this rank itself; use sendrecv to copy to oneself")

    number, code = _groups.number_of(group), NO_OP if op is None else int(op)
    to, of = (NO_RANK if peer is None else int(peer) for peer in (root, source))
    return primitive.bind(x, number=number, size=size, rank=rank, op=code, root=to, source=of)


def _is_float0(leaf: Any) -> bool:
    """Return True for the gradient of an integer, which holds nothing and does not travel."""
    return bool(getattr(leaf, "dtype", None) == jax.dtypes.float0)


def _array(name: str, leaf: Any) -> Any:
    """Return a leaf as a JAX array.

    Raises:
        UnsupportedDTypeError: JAX would change its numbers: it makes 32 bits of 64 while
            ``jax_enable_x64`` is off.
    """
    if isinstance(leaf, (jax.Array, float, complex, bool)):
        return jnp.asarray(leaf)

    given = np.asarray(leaf)
    if given.dtype not in DTYPE_OF:
        raise unsupported_dtype(given.dtype)
    array = jnp.asarray(leaf)
    if given.dtype.kind in "iufc" and given.dtype != array.dtype:
        with np.errstate(all="ignore"):
            kept = given.astype(array.dtype)
            changed = (
                (kept != given) if given.dtype.kind in "iu" else np.isinf(kept) & ~np.isinf(given)
            )
        if changed.any():
            raise UnsupportedDTypeError(
                f"{name}: {given.dtype} numbers of this array do not fit {array.dtype}, which JAX makes of them; switch"
                " jax_enable_x64 on, on every rank, or pass an array of a smaller dtype"
            )

    return array


def _check_blocks(x: Any, group: Group) -> None:
    if x.ndim == 0 or x.shape[0] != group.world_size:
        raise ShapeError(
            f"reducescatter: x (rank {group.rank}): expected a first axis of {group.world_size} entries, one a rank, "
            f"got shape {x.shape}"
        )


def tree_allreduce(tree: Any, group: Group | str = "default", op: ReduceOp = ReduceOp.SUM) -> Any:
    """Do as ``allreduce``, which takes trees itself."""
    return allreduce(tree, group, op)
