"""For JAX users: collectives inside ``jax.jit``, and an optax transformation for gradients."""

from colltensor.jax._groups import forget_failures
from colltensor.jax._order import ordered
from colltensor.jax.collectives import (
    allgather,
    allreduce,
    broadcast,
    recv,
    reduce,
    reducescatter,
    send,
    sendrecv,
    tree_allreduce,
)
from colltensor.jax.optimizer import sync_gradients

__all__ = [
    "allgather",
    "allreduce",
    "broadcast",
    "forget_failures",
    "ordered",
    "recv",
    "reduce",
    "reducescatter",
    "send",
    "sendrecv",
    "sync_gradients",
    "tree_allreduce",
]
