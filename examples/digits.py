"""What the training examples on scikit-learn's digits share.

That is the data, its parts, and the comparison with one process. An example has a function
``train(rank, world_size, steps)`` that returns an ``Outcome``, and ends with
``sys.exit(digits.main(train))``: that trains once in one process, on whole batches, and once in Ray
workers, each on its part of every batch, and compares the losses of all steps and the accuracies.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
Array = Any


@dataclass(frozen=True)
class Outcome:
    """What came out of a training.

    Attributes:
        losses: The loss of each step, the mean over the whole batch of all workers.
        accuracy: The part of all images that is recognised in the end.
    """

    losses: list[float]
    accuracy: float


def load() -> tuple[Array, Array]:
    """All 1797 images, as rows of 64 pixels from 0 to 1 in float32, and their labels."""
    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype(np.float32), labels.astype(np.int64)


def batches(rank: int, world_size: int, steps: int) -> Iterator[tuple[Array, Array]]:
    """Yield this worker's part, every ``world_size``-th image, of the same shuffled batches."""
    if BATCH % world_size:
        raise ValueError(
            f"a batch of {BATCH} cannot be divided among {world_size} workers: choose 1, 2, 4, ... 64"
        )
    images, labels = load()
    order = np.random.default_rng(0)
    whole = len(images) // BATCH
    for step in range(steps):
        if step % whole == 0:
            shuffled = order.permutation(len(images))
        chosen = shuffled[step % whole * BATCH :][:BATCH][rank::world_size]
        yield images[chosen], labels[chosen]


def mean_over_workers(losses: list[float], world_size: int) -> list[float]:
    """Average each step's loss, a mean over this worker's part, over the workers."""
    curve = np.array(losses)
    if world_size > 1:
        col.allreduce(curve, op=col.ReduceOp.AVERAGE)
    return curve.tolist()


class Worker:
    """A Ray actor that joins the group, trains on its part and leaves."""

    def train(
        self, function: Callable[..., Outcome], rank: int, world_size: int, steps: int
    ) -> Outcome:
        """Call ``function(rank, world_size, steps)``.

        Several workers have the group "default".
        """
        if world_size == 1:
            return function(rank, world_size, steps)
        col.init_collective_group(world_size, rank, timeout_s=60)
        try:
            return function(rank, world_size, steps)
        finally:
            col.destroy_collective_group()


def main(
    train: Callable[[int, int, int], Outcome],
    tolerance: float = 1e-4,
    steps: int = 200,
    least_accuracy: float = 0.95,
) -> int:
    """Train in one process and in Ray workers, and compare; returns the exit code.

    Args:
        train: Trains on the part of ``rank``; the same for every world size.
        tolerance: How far a step's losses may be apart, relative to the larger of the loss and 0.1.
            Sums of floats depend on their order, and a few hundred steps enlarge the difference.
        steps: How many steps, if the command line does not say.
        least_accuracy: What both must reach, and by whose tenth part they may differ.
    """
    name = os.path.basename(sys.argv[0])
    parser = argparse.ArgumentParser(
        description="training in Ray workers, compared with training in one process"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=steps)
    options = parser.parse_args()

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    ray.init(num_cpus=options.workers, include_dashboard=False, logging_level="ERROR")
    try:
        workers = [ray.remote(num_cpus=1)(Worker).remote() for _ in range(options.workers)]
        alone = ray.get(workers[0].train.remote(train, 0, 1, options.steps))
        together = ray.get(
            [
                worker.train.remote(train, rank, options.workers, options.steps)
                for rank, worker in enumerate(workers)
            ]
        )
    finally:
        ray.shutdown()
    return compare(name, together, alone, tolerance, least_accuracy)


def compare(
    name: str, together: list[Outcome], alone: Outcome, tolerance: float, least_accuracy: float
) -> int:
    """Print both results; return 1 where they are not the same, or too bad."""
    losses = np.array(together[0].losses)
    reference = np.array(alone.losses)
    difference = float(np.max(np.abs(losses - reference) / np.maximum(reference, 0.1)))
    accuracy = together[0].accuracy
    print(
        f"{name}: loss {losses[0]:.6f} to {losses[-1]:.6f} in {len(together)} workers, {reference[0]:.6f} to "
        f"{reference[-1]:.6f} in one process; largest difference of {len(losses)} steps {difference:.1e}; accuracy "
        f"{accuracy:.4f} and {alone.accuracy:.4f}"
    )
    complaints = []
    if any(outcome != together[0] for outcome in together):
        complaints.append("the workers have not the same losses and accuracy")
    if not difference <= tolerance:
        complaints.append(f"the losses differ by {difference:.1e}, more than {tolerance:.0e}")
    if (
        not min(accuracy, alone.accuracy) >= least_accuracy
        or abs(accuracy - alone.accuracy) > 0.002
    ):
        complaints.append(
            f"both accuracies should be {least_accuracy} or more, and within 0.002 of each other"
        )
    for complaint in complaints:
        print(f"WRONG: {complaint}")
    return bool(complaints)
