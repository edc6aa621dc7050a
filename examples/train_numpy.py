"""An MLP of two layers by hand in numpy, in Ray workers, in step by a ``Synchronizer``.

    python examples/train_numpy.py --workers 2

Each worker computes the gradients of its part of every batch; ``synchronizer.sync`` replaces them,
in place, by the mean over all workers. The losses of all steps are those of one process with the
whole batches, to 1e-4 relative, and so is the accuracy. Needs colltensor[ray] and scikit-learn.
"""

from __future__ import annotations

import sys
from typing import Any

import digits
import numpy as np

import colltensor as col
from colltensor.gradients import Synchronizer

HIDDEN = 128
STEP_SIZE, MOMENTUM = 0.1, 0.9
Arrays = dict[str, Any]


def initial_parameters(seed: int) -> Arrays:
    """Random weights, different for each seed."""
    random = np.random.default_rng(seed)
    return {
        "weights1": random.normal(scale=64**-0.5, size=(64, HIDDEN)).astype(np.float32),
        "bias1": np.zeros(HIDDEN, np.float32),
        "weights2": random.normal(scale=HIDDEN**-0.5, size=(HIDDEN, digits.CLASSES)).astype(
            np.float32
        ),
        "bias2": np.zeros(digits.CLASSES, np.float32),
    }


def scores_of(parameters: Arrays, images: Any) -> tuple[Any, Any]:
    """The hidden layer after its ReLU, and the scores of the classes."""
    hidden = np.maximum(images @ parameters["weights1"] + parameters["bias1"], 0)
    return hidden, hidden @ parameters["weights2"] + parameters["bias2"]


def loss_and_gradients(parameters: Arrays, images: Any, labels: Any) -> tuple[float, Arrays]:
    """The mean cross entropy and its gradients."""
    hidden, scores = scores_of(parameters, images)
    scores = scores - scores.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(scores).sum(axis=1, keepdims=True))
    rows = np.arange(len(labels))
    loss = float((log_sum[:, 0] - scores[rows, labels]).mean())
    error = np.exp(scores - log_sum)
    error[rows, labels] -= 1
    error /= len(labels)
    back = (error @ parameters["weights2"].T) * (hidden > 0)
    gradients = {
        "weights1": images.T @ back,
        "bias1": back.sum(axis=0),
        "weights2": hidden.T @ error,
        "bias2": error.sum(axis=0),
    }
    return loss, gradients


def train(rank: int, world_size: int, steps: int) -> digits.Outcome:
    """Train on this worker's parts of the batches."""
    parameters = initial_parameters(seed=rank)
    if world_size > 1:
        col.broadcast(parameters)
        synchronizer = Synchronizer(parameters)
    velocity = {name: np.zeros_like(values) for name, values in parameters.items()}
    losses = []
    for images, labels in digits.batches(rank, world_size, steps):
        loss, gradients = loss_and_gradients(parameters, images, labels)
        if world_size > 1:
            synchronizer.sync(gradients)
        for name, gradient in gradients.items():
            velocity[name] = MOMENTUM * velocity[name] + gradient
            parameters[name] -= STEP_SIZE * velocity[name]
        losses.append(loss)
    images, labels = digits.load()
    right = scores_of(parameters, images)[1].argmax(axis=1) == labels
    return digits.Outcome(digits.mean_over_workers(losses, world_size), float(right.mean()))


if __name__ == "__main__":
    sys.exit(digits.main(train))
