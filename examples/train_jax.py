"""Data-parallel training in JAX, everything inside `jax.jit`, in Ray workers: digits of scikit-learn.

    python examples/train_jax.py --workers 2

The whole training is one jitted function: a `lax.scan` over the steps, whose optimiser is
`optax.chain(colltensor.jax.sync_gradients(), optax.adam(...))`. Each worker has every n-th image of each batch. The
losses of all steps must equal those of one process that trains on the whole batches: to 1e-4 relative, since the sums
are taken in another order; and so must the accuracy on the test images, to one image.

Needs colltensor[ray,jax], optax and scikit-learn.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import numpy as np

import colltensor as col

try:
    import ray
    from sklearn.datasets import load_digits
except ModuleNotFoundError as missing:
    sys.exit(f"this example needs Ray and scikit-learn ({missing.name} is missing): "
             "pip install 'colltensor[ray,jax]' optax scikit-learn")

BATCH, TEST = 96, 297
TOLERANCE = 1e-4


def load(rank: int, world_size: int, steps: int) -> tuple[Any, Any, Any, Any]:
    """Return this rank's part of every batch, images and labels, and the test images with theirs."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    order = np.random.default_rng(0)
    batches = np.stack([order.permutation(len(images) - TEST)[:BATCH] for _ in range(steps)])[:, rank::world_size]
    return images[batches], labels[batches], images[-TEST:], labels[-TEST:]


def train(rank: int, world_size: int, steps: int) -> tuple[list[float], float]:
    """Train a small network on this rank's part; return the loss of every step, over all ranks, and the accuracy."""
    import jax
    import jax.numpy as jnp
    import optax

    import colltensor.jax as cj

    images, labels, test_images, test_labels = load(rank, world_size, steps)
    optimizer = optax.chain(cj.sync_gradients(), optax.adam(3e-3))

    def scores(parameters: Any, images: Any) -> Any:
        hidden = jnp.tanh(images @ parameters["in"] + parameters["in bias"])
        return hidden @ parameters["out"] + parameters["out bias"]

    def loss(parameters: Any, images: Any, labels: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(scores(parameters, images), labels).mean()

    def step(carried: Any, batch: Any) -> Any:
        parameters, state = carried
        value, gradients = jax.value_and_grad(loss)(parameters, *batch)
        updates, state = optimizer.update(gradients, state, parameters)
        return (optax.apply_updates(parameters, updates), state), cj.allreduce(value, op=col.ReduceOp.AVERAGE)

    @jax.jit
    def run(parameters: Any, images: Any, labels: Any) -> Any:
        parameters = jax.tree.map(cj.broadcast, parameters)  # rank 0's, on every rank
        (parameters, _), losses = jax.lax.scan(step, (parameters, optimizer.init(parameters)), (images, labels))
        return parameters, losses

    keys = jax.random.split(jax.random.key(rank))
    parameters = {
        "in": jax.random.normal(keys[0], (64, 48)) / 8, "in bias": jnp.zeros(48),
        "out": jax.random.normal(keys[1], (48, 10)) / 7, "out bias": jnp.zeros(10),
    }
    parameters, losses = run(parameters, images, labels)
    accuracy = (scores(parameters, test_images).argmax(1) == test_labels).mean()
    return [float(value) for value in losses], float(accuracy)


class Worker:
    """One worker: joins the group, trains on its part of the batches."""

    def train(self, rank: int, world_size: int, steps: int) -> tuple[list[float], float]:
        """Join, train, leave."""
        col.init_collective_group(world_size, rank, timeout_s=60)
        try:
            return train(rank, world_size, steps)
        finally:
            col.destroy_collective_group()


def main() -> int:
    """Train in one process and in many; return 0 where losses and accuracies agree."""
    parser = argparse.ArgumentParser(description="data-parallel training inside jax.jit, in Ray workers")
    parser.add_argument("--workers", type=int, default=2, choices=(1, 2, 3, 4, 6, 8), help="divides the batch of 96")
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    ray.init(num_cpus=options.workers, include_dashboard=False, logging_level="ERROR")
    try:
        workers = [ray.remote(num_cpus=1)(Worker).remote() for _ in range(options.workers)]
        alone, alone_accuracy = ray.get(workers[0].train.remote(0, 1, options.steps))
        results = ray.get([
            worker.train.remote(rank, options.workers, options.steps) for rank, worker in enumerate(workers)
        ])
    finally:
        ray.shutdown()
    losses, accuracy = results[0]
    difference = max(abs(mine - theirs) / theirs for mine, theirs in zip(losses, alone, strict=True))
    print(f"loss after {options.steps} steps: {losses[-1]:.6f} in {options.workers} workers, {alone[-1]:.6f} in one "
          f"process; largest relative difference {difference:.1e}; accuracy {accuracy:.4f} and {alone_accuracy:.4f}")
    same = all(result == results[0] for result in results)
    if not same or difference > TOLERANCE or abs(accuracy - alone_accuracy) > 1 / TEST or accuracy < 0.85:
        print(f"WRONG: the workers should have the same losses, within {TOLERANCE} of one process's")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
