"""A parameter server: the driver declares the group, rank 0 serves, the others work.

    python examples/parameter_server.py --workers 2 --steps 60

Every round the server broadcasts the parameters, each worker computes the gradient of the next
batch of its part of the digits, ``reduce`` brings the sum to the server alone, and the server takes
a step with momentum, whose state only the server has. The result must equal that of one process, to
1e-5 relative.

Needs colltensor[ray] and scikit-learn.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

import colltensor as col

try:
    import ray
    from sklearn.datasets import load_digits
except ModuleNotFoundError as missing:
    sys.exit(
        f"this example needs Ray and scikit-learn ({missing.name} is missing): "
        "pip install '.[ray]' scikit-learn"
    )

CLASSES = 10
BATCH = 64
STEP_SIZE = 0.3
MOMENTUM = 0.9
GROUP = "parameters"
Array = np.ndarray[Any, Any]


def batch(worker: int, workers: int, step: int) -> tuple[Array, Array]:
    """A worker's batch of one step.

    Images have a column of ones for the bias, and labels are rows of 0 and 1.
    """
    images, labels = load_digits(return_X_y=True)
    images, labels = images[worker::workers], labels[worker::workers]
    chosen = np.arange(step * BATCH, (step + 1) * BATCH) % len(images)
    ones = np.ones((BATCH, 1))
    return np.hstack([images[chosen] / 16, ones]).astype(np.float32), np.eye(
        CLASSES, dtype=np.float32
    )[labels[chosen]]


def gradient(weights: Array, images: Array, labels: Array) -> Array:
    """The gradient of the softmax loss, a mean over the batch."""
    scores = images @ weights
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return images.T @ (scores / scores.sum(axis=1, keepdims=True) - labels) / np.float32(BATCH)


def loss_of(weights: Array) -> float:
    """The mean loss over all images."""
    images, labels = load_digits(return_X_y=True)
    scores = np.hstack([images / 16, np.ones((len(images), 1))]) @ weights.astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    return float(
        np.mean(np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(labels)), labels])
    )


class Optimizer:
    """Stochastic gradient descent with momentum."""

    def __init__(self) -> None:
        self.weights = np.zeros((65, CLASSES), np.float32)
        self._velocity = np.zeros_like(self.weights)

    def step(self, total: Array, workers: int) -> None:
        """Take one step with the workers' summed gradient."""
        self._velocity = MOMENTUM * self._velocity - STEP_SIZE * total / np.float32(workers)
        self.weights = self.weights + self._velocity


@ray.remote(num_cpus=0)
class Server:
    """Rank 0: has the parameters and the optimizer."""

    def serve(self, workers: int, steps: int) -> Array:
        """Serve so many rounds; return the parameters."""
        optimizer = Optimizer()
        for _ in range(steps):
            col.broadcast(optimizer.weights, src_rank=0, group_name=GROUP)
            total = np.zeros_like(optimizer.weights)
            col.reduce(total, dst_rank=0, group_name=GROUP)
            optimizer.step(total, workers)
        return optimizer.weights


@ray.remote(num_cpus=1)
class Worker:
    """Rank 1 and up: has data, gets parameters, gives gradients."""

    def work(self, workers: int, steps: int) -> None:
        """Take part in so many rounds."""
        worker = col.get_rank(GROUP) - 1
        weights = np.empty((65, CLASSES), np.float32)
        for step in range(steps):
            col.broadcast(weights, src_rank=0, group_name=GROUP)
            col.reduce(
                gradient(weights, *batch(worker, workers, step)), dst_rank=0, group_name=GROUP
            )


def train_alone(workers: int, steps: int) -> Array:
    """The same rounds in this process."""
    optimizer = Optimizer()
    for step in range(steps):
        parts = [
            gradient(optimizer.weights, *batch(worker, workers, step)) for worker in range(workers)
        ]
        optimizer.step(sum(parts, np.zeros_like(optimizer.weights)), workers)
    return optimizer.weights


def main() -> int:
    """Train with a server and alone; return 0 where the losses agree."""
    parser = argparse.ArgumentParser(description="a parameter server on collectives, in Ray actors")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()

    ray.init(num_cpus=options.workers, include_dashboard=False, logging_level="ERROR")
    try:
        server, workers = Server.remote(), [Worker.remote() for _ in range(options.workers)]
        actors = [server, *workers]
        col.create_collective_group(
            actors, len(actors), list(range(len(actors))), backend="auto", group_name=GROUP
        )
        jobs = [worker.work.remote(options.workers, options.steps) for worker in workers]
        weights, *_ = ray.get([server.serve.remote(options.workers, options.steps), *jobs])
    finally:
        ray.shutdown()

    served, alone = loss_of(weights), loss_of(train_alone(options.workers, options.steps))
    difference = abs(served - alone) / alone
    print(
        f"loss after {options.steps} steps: {served:.8f} with a server and {options.workers} workers, "
        f"{alone:.8f} in one process; relative difference {difference:.1e}"
    )
    if difference > 1e-5 or served > 0.5:
        print("WRONG: the losses should agree to 1e-5 and be below 0.5")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
