"""Softmax regression on scikit-learn's digits, in Ray workers, in the framework you choose.

    python examples/ray_digits.py --array jax --workers 2

Each worker holds a part of the images. Every step it computes the gradient of its part, and one
call of ``allreduce`` on a dict sums weights' gradient, bias' gradient and loss over all workers.
The loss must equal that of one process with all images, to 1e-5 relative.

Needs colltensor[ray], scikit-learn and, for --array, colltensor[torch], [jax] or [cupy].
"""

from __future__ import annotations

import argparse
import importlib
import os
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
STEP_SIZE = 1.0
Arrays = dict[str, Any]


def load_part(rank: int, world_size: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Every ``world_size``-th image from ``rank`` on, and the labels as rows of 0 and 1.

    Pixels are from 0 to 1.
    """
    images, labels = load_digits(return_X_y=True)
    images = (images[rank::world_size] / 16).astype(np.float32)
    return images, np.eye(CLASSES, dtype=np.float32)[labels[rank::world_size]]


def initial_parameters(seed: int) -> Arrays:
    """Small random weights, different for each seed."""
    weights = np.random.default_rng(seed).normal(scale=0.01, size=(64, CLASSES))
    return {"weights": weights.astype(np.float32), "bias": np.zeros(CLASSES, np.float32)}


class NumpyModel:
    """Softmax regression written out, for numpy and CuPy."""

    def __init__(self, array: str) -> None:
        self.xp = importlib.import_module(array)
        self.to_array = self.xp.asarray

    def sums(self, parameters: Arrays, images: Any, labels: Any) -> Arrays:
        """The loss and its gradients, summed over the images."""
        scores = images @ parameters["weights"] + parameters["bias"]
        scores = scores - scores.max(axis=1, keepdims=True)
        log_sum = self.xp.log(self.xp.exp(scores).sum(axis=1, keepdims=True))
        error = self.xp.exp(scores - log_sum) - labels
        loss = (labels * (log_sum - scores)).sum()
        return {
            "weights": images.T @ error,
            "bias": error.sum(axis=0),
            "loss": self.xp.asarray(loss),
        }


class TorchModel:
    """The same with torch's autograd."""

    def __init__(self, array: str) -> None:
        self.torch = importlib.import_module(array)
        self.to_array = self.torch.tensor

    def sums(self, parameters: Arrays, images: Any, labels: Any) -> Arrays:
        """The loss and its gradients, summed over the images."""
        leaves = [parameters[name].clone().requires_grad_() for name in ("weights", "bias")]
        scores = images @ leaves[0] + leaves[1]
        loss = self.torch.nn.functional.cross_entropy(scores, labels, reduction="sum")
        weights, bias = self.torch.autograd.grad(loss, leaves)
        return {"weights": weights, "bias": bias, "loss": loss.detach()}


class JaxModel:
    """The same with jax.value_and_grad."""

    def __init__(self, array: str) -> None:
        jax = importlib.import_module(array)
        self.to_array = jax.numpy.asarray

        def loss(parameters: Arrays, images: Any, labels: Any) -> Any:
            scores = images @ parameters["weights"] + parameters["bias"]
            return -(labels * jax.nn.log_softmax(scores)).sum()

        self.loss_and_gradients = jax.jit(jax.value_and_grad(loss))

    def sums(self, parameters: Arrays, images: Any, labels: Any) -> Arrays:
        """The loss and its gradients, summed over the images."""
        loss, gradients = self.loss_and_gradients(parameters, images, labels)
        return {**gradients, "loss": loss}


MODELS = {"numpy": NumpyModel, "cupy": NumpyModel, "torch": TorchModel, "jax": JaxModel}


def train(array: str, rank: int, world_size: int, steps: int) -> tuple[float, float]:
    """Train on this rank's part.

    Returns the last loss, a mean over all images, and the accuracy on the part.
    """
    model = MODELS[array](array)
    images, labels = map(model.to_array, load_part(rank, world_size))
    parameters = {
        name: model.to_array(values) for name, values in initial_parameters(seed=rank).items()
    }
    total = len(load_digits().target)
    if world_size > 1:
        parameters = col.broadcast(parameters, src_rank=0)
    loss = 0.0
    for _ in range(steps):
        sums = model.sums(parameters, images, labels)
        if world_size > 1:
            sums = col.allreduce(sums)
        loss = float(sums.pop("loss")) / total
        parameters = {
            name: parameters[name] - STEP_SIZE * gradient / total for name, gradient in sums.items()
        }
    guesses = (images @ parameters["weights"] + parameters["bias"]).argmax(1)
    return loss, float((guesses == labels.argmax(1)).sum()) / len(images)


class Worker:
    """One worker: joins the group, trains on its part of the images."""

    def train(self, array: str, rank: int, world_size: int, steps: int) -> tuple[float, float]:
        """Join, train, leave."""
        if world_size > 1:
            col.init_collective_group(world_size, rank, timeout_s=60)
        try:
            return train(array, rank, world_size, steps)
        finally:
            if world_size > 1:
                col.destroy_collective_group()


def main() -> int:
    """Train in one process and in many; return 0 where the losses agree."""
    parser = argparse.ArgumentParser(description="data-parallel softmax regression in Ray workers")
    parser.add_argument("--array", choices=tuple(MODELS), default="numpy")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    try:
        importlib.import_module(options.array)
    except ModuleNotFoundError:
        sys.exit(f"--array {options.array} needs it installed: pip install '.[{options.array}]'")
    gpus = 1 if options.array == "cupy" else 0
    if gpus and importlib.import_module("cupy").cuda.is_available() is False:
        sys.exit("--array cupy needs a GPU for each worker, and CuPy finds none here")

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    ray.init(
        num_cpus=options.workers,
        num_gpus=gpus * options.workers,
        include_dashboard=False,
        logging_level="ERROR",
    )
    try:
        remote = ray.remote(num_cpus=1, num_gpus=gpus)(Worker)
        workers = [remote.remote() for _ in range(options.workers)]
        alone, _ = ray.get(workers[0].train.remote(options.array, 0, 1, options.steps))
        jobs = [
            worker.train.remote(options.array, rank, options.workers, options.steps)
            for rank, worker in enumerate(workers)
        ]
        results = ray.get(jobs)
    finally:
        ray.shutdown()

    losses = [loss for loss, _ in results]
    accuracy = sum(part for _, part in results) / len(results)
    difference = max(abs(loss - alone) for loss in losses) / alone
    print(
        f"loss after {options.steps} steps, {options.array}: {losses[0]:.8f} in {options.workers} workers, "
        f"{alone:.8f} in one process; relative difference {difference:.1e}; accuracy {accuracy:.3f}"
    )
    if len(set(losses)) != 1 or difference > 1e-5 or not accuracy > 0.9:
        print(
            f"WRONG: the losses {losses} should be one number, within 1e-5 of {alone}, and the accuracy above 0.9"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
