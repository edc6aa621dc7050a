"""One model trained by torch in half of the Ray workers and by JAX in the other half.

    python examples/train_mixed.py --workers 2

Even ranks compute their gradients with torch and call `col.allreduce`, odd ranks do it all inside
`jax.jit` with `colltensor.jax.allreduce`; the calls meet, because both bring one flat float32
vector. The losses of all steps must be within 1e-4 relative of those of one process (torch) that
has the whole batches.

Needs colltensor[ray,torch,jax] and scikit-learn.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import digits
import numpy as np

import colltensor as col

HIDDEN = 48
SPLIT = 64 * HIDDEN
STEP_SIZE = 0.5
Step = Callable[[Any, Any, Any], tuple[Any, Any]]


def torch_step(world_size: int) -> Step:
    """Return a step of gradient descent in torch.

    It takes parameters, images and labels, and returns parameters and the loss of this part.
    """
    import torch

    torch.set_num_threads(1)

    def step(parameters: Any, images: Any, labels: Any) -> tuple[Any, Any]:
        flat = torch.tensor(parameters, requires_grad=True)
        hidden = torch.tanh(torch.from_numpy(images) @ flat[:SPLIT].view(64, HIDDEN))
        scores = hidden @ flat[SPLIT:].view(HIDDEN, digits.CLASSES)
        loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(labels))
        (gradient,) = torch.autograd.grad(loss, flat)
        if world_size > 1:
            gradient = col.allreduce(gradient, op=col.ReduceOp.AVERAGE)
        return parameters - STEP_SIZE * gradient.numpy(), loss.item()

    return step


def jax_step() -> Step:
    """Return the same step in JAX, jitted."""
    import jax

    import colltensor.jax as cj

    def loss_of(flat: Any, images: Any, labels: Any) -> Any:
        hidden = jax.numpy.tanh(images @ flat[:SPLIT].reshape(64, HIDDEN))
        scores = hidden @ flat[SPLIT:].reshape(HIDDEN, digits.CLASSES)
        return -jax.nn.log_softmax(scores)[jax.numpy.arange(len(labels)), labels].mean()

    @jax.jit
    def step(parameters: Any, images: Any, labels: Any) -> tuple[Any, Any]:
        loss, gradient = jax.value_and_grad(loss_of)(parameters, images, labels)
        return parameters - STEP_SIZE * cj.allreduce(gradient, op=col.ReduceOp.AVERAGE), loss

    return step


def train(rank: int, world_size: int, steps: int) -> digits.Outcome:
    """Train on this worker's parts of the batches, in its own framework."""
    parameters = (np.random.default_rng(1).normal(size=SPLIT + HIDDEN * digits.CLASSES) / 8).astype(
        np.float32
    )
    step = jax_step() if rank % 2 else torch_step(world_size)
    losses = []
    for images, labels in digits.batches(rank, world_size, steps):
        parameters, loss = step(parameters, images, labels)
        losses.append(float(loss))
    images, labels = digits.load()
    parameters = np.asarray(parameters)
    hidden = np.tanh(images @ parameters[:SPLIT].reshape(64, HIDDEN))
    right = (hidden @ parameters[SPLIT:].reshape(HIDDEN, digits.CLASSES)).argmax(axis=1) == labels
    return digits.Outcome(digits.mean_over_workers(losses, world_size), float(right.mean()))


if __name__ == "__main__":
    sys.exit(digits.main(train, least_accuracy=0.9))
