"""One JAX primitive for each collective, with its lowering and its rules for derivatives and vmap.

Every primitive takes one array and gives one. Let x_r be the operand and y_r the result of rank r.
Let v_r be the cotangent of y_r: the derivative of the sum of all ranks' losses by y_r. The
transpose gives the cotangent of x_r; the public function's documentation derives it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from colltensor import bridge
from colltensor.adapters._numpy_dtypes import DTYPE_OF
from colltensor.backends.nccl import reductions
from colltensor.jax import _groups, _order, _targets
from colltensor.operations import NATIVE
from colltensor.types import ReduceOp

NO_OP: Final = 255
NO_RANK: Final = -1

_TIED: Final = (ReduceOp.MIN, ReduceOp.MAX)


def _make(
    operation: str, shape: Callable[[tuple[int, ...], int], tuple[int, ...]], name: str = ""
) -> Primitive:
    """Make a primitive; ``shape`` gives the result's shape.

    Its parameters are ``number`` (the group's), ``size``, ``rank``, ``op``, ``root`` and
    ``source``. ``size`` and ``rank`` are the group's, so that no rule needs the group.
    """
    primitive = Primitive(f"colltensor_{name or operation}")

    def abstract(x: Any, *, size: int, **parameters: int) -> Any:
        result = jax.core.ShapedArray(shape(x.shape, size), x.dtype, weak_type=x.weak_type)
        return result, {_order.ORDERED}

    def lower(
        context: Any, x: Any, *, number: int, op: int, root: int, source: int, **parameters: int
    ) -> Any:
        group, dtype = _groups.group_of(number), DTYPE_OF[context.avals_in[0].dtype]
        if _order.is_for("cuda", context):
            # one rank: the result is the operand, and there is nothing to call
            if group.backend == "loopback":
                return _order.lower_to_nothing(context, x)
            reductions.require(name or operation, dtype, None if op == NO_OP else ReduceOp(op))

        numbers = {"handle": bridge.shared_memory(group), "number": number}
        numbers |= {"operation": NATIVE[operation], "op": op, "root": root, "source": source}
        numbers |= {"dtype": dtype.code, "itemsize": dtype.itemsize}
        attributes = {key: np.int64(value) for key, value in numbers.items()}
        # Where operand and result are one array, XLA may give them one memory.
        aliased = (name or operation) in ("allreduce", "reduce", "broadcast", "send", "recv")
        return _order.lower_to(_targets.TARGET, context, x, aliased, attributes)

    def call(x: Any, **parameters: int) -> Any:
        with jax.disable_jit(False):
            return _compiled(primitive, tuple(parameters.items()))(x)

    primitive.def_effectful_abstract_eval(abstract)
    primitive.def_impl(call)
    for platform in ("cpu", "cuda"):
        mlir.register_lowering(primitive, lower, platform=platform)
    return primitive


@functools.lru_cache(maxsize=256)  # groups come and go
def _compiled(primitive: Primitive, parameters: tuple[tuple[str, int], ...]) -> Any:
    """Return the collective outside of jit: a jitted function of its own."""
    return jax.jit(_order.ordered(functools.partial(primitive.bind, **dict(parameters))))


def _same(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    return shape


allreduce_p: Final = _make("allreduce", _same)
reduce_p: Final = _make("reduce", _same)
broadcast_p: Final = _make("broadcast", _same)
allgather_p: Final = _make("allgather", lambda shape, size: (size, *shape))
reducescatter_p: Final = _make("reducescatter", lambda shape, size: shape[1:])
send_p: Final = _make("transfer", _same, "send")
recv_p: Final = _make("transfer", _same, "recv")
sendrecv_p: Final = _make("transfer", _same, "sendrecv")


def _linear(primitive: Primitive, transpose: Callable[..., Any]) -> None:
    """Give a primitive the rules of a linear map."""

    def jvp(primals: Any, tangents: Any, *, op: int, **parameters: int) -> Any:
        (x,), (tangent,) = primals, tangents
        y = primitive.bind(x, op=op, **parameters)
        if op not in (NO_OP, ReduceOp.SUM, ReduceOp.AVERAGE):
            return y, _of_extremes(primitive, x, y, _instantiated(tangent), op, parameters)
        return y, primitive.bind(_instantiated(tangent), op=op, **parameters)

    def transposed(cotangent: Any, x: Any, **parameters: int) -> Any:
        return [transpose(_instantiated(cotangent), **parameters)]

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transposed


def _instantiated(tangent: Any) -> Any:
    """Make a tangent's known zeros real: others would wait for what one leaves out."""
    return ad.instantiate_zeros(tangent)


def _of_extremes(
    primitive: Primitive, x: Any, y: Any, tangent: Any, op: int, parameters: dict[str, int]
) -> Any:
    """Return the tangent of MIN or MAX: the mean of those of the ranks that have it."""
    if op not in _TIED or primitive is not allreduce_p:
        # What JAX itself raises where a primitive has no rule.
        raise NotImplementedError(
            f"{primitive.name} with op={ReduceOp(op).name} has no derivative here; use SUM, AVERAGE, or an allreduce "
            "with MIN or MAX"
        )
    has_it = (x == y).astype(tangent.dtype)
    total = allreduce_p.bind(tangent * has_it, op=int(ReduceOp.SUM), **parameters)
    return total / allreduce_p.bind(has_it, op=int(ReduceOp.SUM), **parameters)


def _share(cotangent: Any, op: int, size: int) -> Any:
    return cotangent / size if op == ReduceOp.AVERAGE else cotangent


def _allreduce(v: Any, **parameters: int) -> Any:
    return allreduce_p.bind(v, **parameters)


def _broadcast(v: Any, *, rank: int, root: int, op: int, **parameters: int) -> Any:
    total = reduce_p.bind(v, rank=rank, root=root, op=int(ReduceOp.SUM), **parameters)
    return total if rank == root else jnp.zeros_like(total)


def _reduce(v: Any, *, rank: int, root: int, op: int, size: int, **parameters: int) -> Any:
    of_root = broadcast_p.bind(v, rank=rank, root=root, op=NO_OP, size=size, **parameters)
    share = _share(of_root, op, size)
    return share if rank == root else share + v


def _allgather(v: Any, *, op: int, **parameters: int) -> Any:
    return reducescatter_p.bind(v, op=int(ReduceOp.SUM), **parameters)


def _reducescatter(v: Any, *, op: int, size: int, **parameters: int) -> Any:
    return _share(allgather_p.bind(v, op=NO_OP, size=size, **parameters), op, size)


def _send(v: Any, *, root: int, source: int, **parameters: int) -> Any:
    return v + recv_p.bind(v, root=NO_RANK, source=root, **parameters)


def _recv(v: Any, *, root: int, source: int, **parameters: int) -> Any:
    return jnp.zeros_like(send_p.bind(v, root=source, source=NO_RANK, **parameters))


def _sendrecv(v: Any, *, root: int, source: int, **parameters: int) -> Any:
    return sendrecv_p.bind(v, root=source, source=root, **parameters)


_linear(allreduce_p, _allreduce)
_linear(reduce_p, _reduce)
_linear(broadcast_p, _broadcast)
_linear(allgather_p, _allgather)
_linear(reducescatter_p, _reducescatter)
_linear(send_p, _send)
_linear(recv_p, _recv)
_linear(sendrecv_p, _sendrecv)


def _vectorise(primitive: Primitive, given: int | None = None, result: int | None = None) -> None:
    """Send the whole batch: its axis stays, or goes to ``given`` and back at ``result``."""

    def batch(operands: Any, axes: Any, **parameters: int) -> Any:
        (x,), (axis,) = operands, axes
        if given is not None:
            x, axis = jnp.moveaxis(x, axis, given), result
        return primitive.bind(x, **parameters), axis

    batching.primitive_batchers[primitive] = batch


for _primitive in (allreduce_p, reduce_p, broadcast_p, send_p, recv_p, sendrecv_p):
    _vectorise(_primitive)
_vectorise(allgather_p, 0, 1)
_vectorise(reducescatter_p, 1, 0)


weak_p: Final = Primitive("colltensor_weak_type")
"""The operand with JAX's weak type, which an array loses that travels together with others."""
weak_p.def_impl(jax.jit(weak_p.bind))
weak_p.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape, x.dtype, weak_type=True))
mlir.register_lowering(weak_p, lambda context, x: [x])
ad.deflinear(weak_p, lambda cotangent: [cotangent])
batching.defvectorized(weak_p)
