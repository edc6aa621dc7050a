"""The order of collectives inside XLA: an effect of JAX's, and the tokens that carry it.

XLA runs calls with side effects in any order that their data allow. JAX orders those that have an
*ordered effect*. It passes a token through every computation, loop and branch, from one such call
to the next. All of JAX's internals that this package needs are imported here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import jax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from colltensor._compat import jax as _compat
from colltensor.errors import DeviceError

effects: Any = _compat.effects()
_token = _compat.abstract_token()


class Ordered(effects.Effect):  # type: ignore[misc]  # jax is not looked into
    """The effect of every collective: one after the other, in the order of the program."""

    def __repr__(self) -> str:
        return "a collective of colltensor's"

    def __str__(self) -> str:
        return "collective"


class Kept(effects.Effect):  # type: ignore[misc]  # jax is not looked into
    """An ``ordered`` function's effect from outside: not dropped, its order settled inside."""

    def __str__(self) -> str:
        return "ordered collectives"


ORDERED: Final = Ordered()
KEPT: Final = Kept()

effects.ordered_effects.add_type(Ordered)
for _kind in (Ordered, Kept):
    effects.lowerable_effects.add_type(_kind)
    effects.control_flow_allowed_effects.add_type(_kind)
    effects.custom_derivatives_allowed_effects.add_type(_kind)
    effects.remat_allowed_effects.add_type(_kind)


def lower_to(
    target: str, context: Any, operand: Any, aliased: bool, attributes: dict[str, Any]
) -> Any:
    """Emit a call of a target, of one operand and result, after the collective before."""
    _refuse_several_devices(target, context)
    token = context.tokens_in.get(ORDERED)
    with_token = context.replace(
        avals_in=[*context.avals_in, _token], avals_out=[*context.avals_out, _token]
    )
    rule = jax.ffi.ffi_lowering(
        target, has_side_effect=True, operand_output_aliases={0: 0} if aliased else None
    )
    result, token = rule(with_token, operand, token, **attributes)
    context.set_tokens_out(mlir.TokenSet({ORDERED: token}))
    return [result]


def lower_to_nothing(context: Any, operand: Any) -> Any:
    """Emit the operand in the shape of the result, and no call."""
    shape = context.avals_out[0].shape
    return mlir.lower_fun(lambda x: x.reshape(shape), multiple_results=False)(context, operand)


def is_for(platform: str, context: Any) -> bool:
    """Return whether what is emitted may run on a platform; it may be meant for several."""
    return platform in (context.platforms or context.module_context.platforms)


def _refuse_several_devices(target: str, context: Any) -> None:
    """Refuse a call that each device would make by itself.

    XLA would run the devices' calls in any order, and ranks would pair wrong ones. JAX refuses
    ordered effects there, but sees none outside of an ``ordered`` function.
    """
    place = context.module_context.axis_context
    devices = max(
        getattr(place, "num_devices", None) or 1, getattr(getattr(place, "mesh", None), "size", 1)
    )
    if devices > 1:
        raise DeviceError(
            f"{target}: a jitted collective works on one device of a process, got a computation over {devices} (a "
            "sharded array, pmap or shard_map); move the array to one device, or make a process for each"
        )


_ordered_p: Final = Primitive("ordered_collectives")
_ordered_p.multiple_results = True


def ordered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Settle the order of a function's collectives inside it, so that a jitted call costs less.

    Use ``jax.jit(ordered(step))`` in place of ``jax.jit(step)``. JAX takes some 60 microseconds
    less for a call, because no token enters or leaves the computation. Nothing else changes.

    Within the function, collectives run in the order of the program. So do computations that one
    thread starts one after the other on one device. A derivative or ``vmap`` is that of the
    function itself, as if ``ordered`` were not there.

    Args:
        function: Takes and returns pytrees of arrays.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree_util.tree_flatten((args, kwargs))
        shapes: list[Any] = []

        def flat(*leaves: Any) -> list[Any]:
            args, kwargs = jax.tree_util.tree_unflatten(tree, leaves)
            results, result_tree = jax.tree_util.tree_flatten(function(*args, **kwargs))
            shapes.append(result_tree)
            return list(results)

        closed = jax.make_jaxpr(flat)(*leaves)
        captured = closed.consts  # what the function closes over may be traced itself
        closed = ClosedJaxpr(_compat.convert_constvars_jaxpr(closed.jaxpr), ())
        return jax.tree_util.tree_unflatten(
            shapes[-1], _ordered_p.bind(*captured, *leaves, jaxpr=closed)
        )

    return call


def _inline(*operands: Any, jaxpr: ClosedJaxpr) -> list[Any]:
    results: list[Any] = jaxpr_as_fun(jaxpr)(*operands)
    return results


def _shapes(*operands: Any, jaxpr: ClosedJaxpr) -> Any:
    others = {effect for effect in jaxpr.effects if not isinstance(effect, Ordered)}
    return jaxpr.out_avals, {KEPT, *others} if len(others) < len(jaxpr.effects) else others


def _lower(context: Any, *operands: Any, jaxpr: ClosedJaxpr) -> Any:
    inside = context.replace(tokens_in=mlir.TokenSet.create([ORDERED]), tokens_out=None)
    return mlir.core_call_lowering(inside, *operands, name="ordered_collectives", call_jaxpr=jaxpr)


def _jvp(primals: Any, tangents: Any, *, jaxpr: ClosedJaxpr) -> Any:
    live = [not isinstance(tangent, ad.Zero) for tangent in tangents]
    moving = [primal for primal, alive in zip(primals, live, strict=True) if alive]

    def part(*moved: Any) -> list[Any]:
        rest = iter(moved)
        return _inline(
            *(next(rest) if alive else primal for primal, alive in zip(primals, live, strict=True)),
            jaxpr=jaxpr,
        )

    return jax.jvp(
        part, moving, [tangent for tangent, alive in zip(tangents, live, strict=True) if alive]
    )


def _batch(axis: Any, operands: Any, axes: Any, *, jaxpr: ClosedJaxpr) -> Any:
    function = functools.partial(_inline, jaxpr=jaxpr)
    results = jax.vmap(function, in_axes=tuple(axes), axis_name=axis.name, axis_size=axis.size)(
        *operands
    )
    return results, [0] * len(results)


def _run(*operands: Any, jaxpr: ClosedJaxpr) -> Any:
    with jax.disable_jit(False):
        return jax.jit(functools.partial(_ordered_p.bind, jaxpr=jaxpr))(*operands)


_ordered_p.def_effectful_abstract_eval(_shapes)
_ordered_p.def_impl(_run)
mlir.register_lowering(_ordered_p, _lower)
ad.primitive_jvps[_ordered_p] = _jvp
batching.fancy_primitive_batchers[_ordered_p] = _batch
