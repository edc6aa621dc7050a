"""Training in JAX on scikit-learn's digits, everything inside `jax.jit`, in Ray workers.

    python examples/train_jax.py --workers 2

The whole training is one jitted function: a `lax.scan` over the steps, whose optimiser is
`optax.chain(colltensor.jax.sync_gradients(), optax.adam(...))`. The losses of all steps must equal
those of one process that trains on the whole batches: to 1e-4 relative, since the sums are taken in
another order; and so must the accuracy.

Needs colltensor[ray,jax], optax and scikit-learn.
"""

from __future__ import annotations

import sys
from typing import Any

import digits
import numpy as np


def train(rank: int, world_size: int, steps: int) -> digits.Outcome:
    """Train a small network on this worker's parts of the batches."""
    import jax
    import jax.numpy as jnp
    import optax

    import colltensor.jax as cj

    together = world_size > 1
    images, labels = (
        np.stack(parts) for parts in zip(*digits.batches(rank, world_size, steps), strict=True)
    )
    optimizer = optax.chain(cj.sync_gradients() if together else optax.identity(), optax.adam(3e-3))

    def scores(parameters: Any, images: Any) -> Any:
        hidden = jnp.tanh(images @ parameters["in"] + parameters["in bias"])
        return hidden @ parameters["out"] + parameters["out bias"]

    def loss(parameters: Any, images: Any, labels: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(
            scores(parameters, images), labels
        ).mean()

    def step(carried: Any, batch: Any) -> Any:
        parameters, state = carried
        value, gradients = jax.value_and_grad(loss)(parameters, *batch)
        updates, state = optimizer.update(gradients, state, parameters)
        return (optax.apply_updates(parameters, updates), state), value

    @jax.jit
    def run(parameters: Any, images: Any, labels: Any) -> Any:
        if together:
            parameters = jax.tree.map(cj.broadcast, parameters)  # rank 0's, on every rank
        (parameters, _), losses = jax.lax.scan(
            step, (parameters, optimizer.init(parameters)), (images, labels)
        )
        return parameters, losses

    keys = jax.random.split(jax.random.key(rank))
    parameters = {
        "in": jax.random.normal(keys[0], (64, 48)) / 8,
        "in bias": jnp.zeros(48),
        "out": jax.random.normal(keys[1], (48, digits.CLASSES)) / 7,
        "out bias": jnp.zeros(digits.CLASSES),
    }
    parameters, losses = run(parameters, images, labels)
    images, labels = digits.load()
    right = scores(parameters, images).argmax(1) == labels
    return digits.Outcome(
        digits.mean_over_workers(losses.tolist(), world_size), float(right.mean())
    )


if __name__ == "__main__":
    sys.exit(digits.main(train, least_accuracy=0.9))
