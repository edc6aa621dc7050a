"""The optax transformation that keeps gradients in step."""

from __future__ import annotations

import importlib
import logging
from typing import Any, Final

from colltensor.errors import BackendUnavailableError, GroupError
from colltensor.group import Group
from colltensor.jax.collectives import tree_allreduce
from colltensor.jax.replicas import are_traced, compare_eagerly, compare_when_run
from colltensor.table import find_group
from colltensor.types import ReduceOp

_log: Final = logging.getLogger(__name__)


def sync_gradients(
    group: Group | str = "default", average: bool = True, *, compare: bool = True
) -> Any:
    """Return an ``optax.GradientTransformation`` that averages gradients over the ranks.

    Use ``optax.chain(sync_gradients(group), optax.sgd(0.1))``. All leaves of one dtype travel in
    one allreduce, in the order of ``jax.tree``. A rank without JAX joins with the same flat
    tensors. Every rank gets the same bits.

    Gradients that are in step keep unequal replicas unequal. So ``init(parameters)`` compares the
    parameters of all ranks, bit for bit; ``parameters = colltensor.broadcast(parameters)`` before
    makes them rank 0's. It is a collective, which all ranks call, all inside ``jax.jit`` or all
    outside. Later steps cost nothing more.

    Args:
        group: The group or its name, looked up when the update is traced.
        average: False for the sum.
        compare: False where ``init`` is not to compare: not all ranks call it (some have no JAX,
            say), or replicas are to differ.

    Raises:
        BackendUnavailableError: optax is missing.
        MismatchError: By ``init``, on every rank: the parameters differ. It names the ranks, the
            leaves and the remedy. Inside ``jax.jit`` a ``JaxRuntimeError`` with the same words,
            where the computation runs.
    """
    try:
        optax = importlib.import_module("optax")
    except ImportError as error:
        raise BackendUnavailableError(
            f"sync_gradients returns an optax.GradientTransformation and needs optax ({error}): pip install optax"
        ) from error
    op = ReduceOp.AVERAGE if average else ReduceOp.SUM
    replicas = _Replicas(group)

    def init(params: Any) -> Any:
        if compare:
            replicas.compare(params)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        if compare and not replicas.compared:
            replicas.catch_up(params)
        return tree_allreduce(updates, group, op), state

    return optax.GradientTransformation(init, update)


class _Replicas:
    """Whether one transformation has compared the ranks' parameters.

    Attributes:
        compared: Whether it has, or whoever uses it was told that it cannot.
    """

    def __init__(self, group: Group | str) -> None:
        self.compared = False
        self._group = group

    def compare(self, params: Any) -> None:
        """Compare if there is a group yet: programs that evaluate call ``init`` as well."""
        try:
            group = find_group(self._group) if isinstance(self._group, str) else self._group
        except GroupError:
            return
        self.compared = True
        if group.world_size == 1:
            return
        if are_traced(params):
            compare_when_run(params, group)
        else:
            compare_eagerly(params, group)

    def catch_up(self, params: Any) -> None:
        """Compare before the first update what ``init`` has not, or say that it cannot be done."""
        if params is not None and not are_traced(params):
            self.compare(params)
            return
        group = find_group(self._group) if isinstance(self._group, str) else self._group
        self.compared = True
        if group.world_size > 1:
            _log.warning(
                "group %r (rank %d): sync_gradients has not compared the ranks' parameters, because init() was not "
                "called since the group was made; replicas that start unequal stay so: call "
                "colltensor.gradients.compare_parameters(parameters) on every rank before the first step, or pass "
                "compare=False",
                group.name,
                group.rank,
            )
