"""One model trained by torch in half of the workers and by JAX in the other half, in Ray: digits of scikit-learn.

    python examples/train_mixed.py --workers 2

Even ranks compute their gradients with torch and call `col.allreduce`, odd ranks do it all inside `jax.jit` with
`colltensor.jax.allreduce`; the calls meet, because both bring one flat float32 vector and then the loss. Every rank
must end with the same losses, within 1e-4 relative of those of one process (torch) that has the whole batches.

Needs colltensor[ray,torch,jax] and scikit-learn.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import colltensor as col

try:
    import ray
    from sklearn.datasets import load_digits
except ModuleNotFoundError as missing:
    sys.exit(f"this example needs Ray and scikit-learn ({missing.name} is missing): "
             "pip install 'colltensor[ray,torch,jax]' scikit-learn")

BATCH, TEST, HIDDEN, CLASSES = 96, 297, 48, 10
SPLIT = 64 * HIDDEN
STEP_SIZE = 0.5
TOLERANCE = 1e-4
Step = Callable[[Any, Any, Any], tuple[Any, Any]]


def torch_step() -> Step:
    """Return a step of gradient descent in torch: (parameters, images, labels) to (parameters, loss)."""
    import torch

    torch.set_num_threads(1)

    def step(parameters: Any, images: Any, labels: Any) -> tuple[Any, Any]:
        flat = torch.tensor(parameters, requires_grad=True)
        hidden = torch.tanh(torch.from_numpy(images) @ flat[:SPLIT].view(64, HIDDEN))
        scores = hidden @ flat[SPLIT:].view(HIDDEN, CLASSES)
        loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(labels))
        (gradient,) = torch.autograd.grad(loss, flat)
        gradient = col.allreduce(gradient, op=col.ReduceOp.AVERAGE)
        loss = col.allreduce(loss.detach(), op=col.ReduceOp.AVERAGE)
        return parameters - STEP_SIZE * gradient.numpy(), loss.item()

    return step


def jax_step() -> Step:
    """Return the same step in JAX, jitted."""
    import jax

    import colltensor.jax as cj

    def loss_of(flat: Any, images: Any, labels: Any) -> Any:
        hidden = jax.numpy.tanh(images @ flat[:SPLIT].reshape(64, HIDDEN))
        scores = hidden @ flat[SPLIT:].reshape(HIDDEN, CLASSES)
        return -jax.nn.log_softmax(scores)[jax.numpy.arange(len(labels)), labels].mean()

    @jax.jit
    def step(parameters: Any, images: Any, labels: Any) -> tuple[Any, Any]:
        loss, gradient = jax.value_and_grad(loss_of)(parameters, images, labels)
        gradient = cj.allreduce(gradient, op=col.ReduceOp.AVERAGE)
        return parameters - STEP_SIZE * gradient, cj.allreduce(loss, op=col.ReduceOp.AVERAGE)

    return step


def train(rank: int, world_size: int, steps: int) -> tuple[list[float], float]:
    """Train on this rank's part of each batch; return the losses over all ranks, and the accuracy."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    order = np.random.default_rng(0)
    parameters = (np.random.default_rng(1).normal(size=SPLIT + HIDDEN * CLASSES) / 8).astype(np.float32)
    step = jax_step() if rank % 2 else torch_step()
    losses = []
    for _ in range(steps):
        batch = order.permutation(len(images) - TEST)[:BATCH][rank::world_size]
        parameters, loss = step(parameters, images[batch], labels[batch])
        losses.append(float(loss))
    parameters = np.asarray(parameters)
    hidden = np.tanh(images[-TEST:] @ parameters[:SPLIT].reshape(64, HIDDEN))
    scores = hidden @ parameters[SPLIT:].reshape(HIDDEN, CLASSES)
    return losses, float((scores.argmax(1) == labels[-TEST:]).mean())


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
    parser = argparse.ArgumentParser(description="torch and JAX workers that train one model")
    parser.add_argument("--workers", type=int, default=2, choices=(2, 4, 6, 8), help="half of them torch, half JAX")
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
    same = all(theirs == losses for theirs, _ in results)
    if not same or difference > TOLERANCE or abs(accuracy - alone_accuracy) > 1 / TEST or accuracy < 0.85:
        print(f"WRONG: the workers should have the same losses, within {TOLERANCE} of one process's")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
