"""The optax transformation that keeps gradients in step. Imports jax, and optax where it is used."""

from __future__ import annotations

import importlib
from typing import Any

from colltensor.errors import BackendUnavailableError
from colltensor.group import Group
from colltensor.jax.collectives import tree_allreduce
from colltensor.types import ReduceOp


def sync_gradients(group: Group | str = "default", average: bool = True) -> Any:
    """Return an ``optax.GradientTransformation`` that replaces gradients by their mean over the ranks.

    ``optax.chain(sync_gradients(group), optax.sgd(0.1))``. All leaves of one dtype travel in one allreduce, in the
    order of ``jax.tree``: a rank without JAX joins with the same flat tensors. Every rank gets the same bits.

    Args:
        group: The group or its name, looked up when the update is traced.
        average: False for the sum.

    Raises:
        BackendUnavailableError: optax is missing.
    """
    try:
        optax = importlib.import_module("optax")
    except ImportError as error:
        raise BackendUnavailableError(
            f"sync_gradients returns an optax.GradientTransformation and needs optax ({error}): pip install optax"
        ) from error
    op = ReduceOp.AVERAGE if average else ReduceOp.SUM

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return tree_allreduce(updates, group, op), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
