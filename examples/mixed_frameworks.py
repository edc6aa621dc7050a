"""A numpy rank, a torch rank and a JAX rank in one group, without Ray.

    python examples/mixed_frameworks.py

Each process sums the digits' images class by class in its own framework; ``allreduce`` adds the
sums of all three, each in its own kind of array, so that all know the mean image of every digit.
With these, every rank classifies its images (nearest mean image), and ``allreduce`` counts the
right answers.

Needs colltensor[torch,jax] and scikit-learn.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import sys
import tempfile
from typing import Any

import numpy as np

import colltensor as col

try:
    from sklearn.datasets import load_digits
except ModuleNotFoundError:
    sys.exit("this example needs scikit-learn: pip install scikit-learn")

FRAMEWORKS = ("numpy", "torch", "jax")
CLASSES = 10


def sums_by_class(
    images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]
) -> dict[str, np.ndarray[Any, Any]]:
    """The sum and the number of the images of each class.

    Whole numbers below 2**24, so float32 is exact.
    """
    one_hot = np.eye(CLASSES, dtype=np.float32)[labels]
    return {"sums": one_hot.T @ images, "counts": one_hot.sum(axis=0)}


def to_framework(values: np.ndarray[Any, Any], framework: str) -> Any:
    """Make an array of the rank's framework."""
    if framework == "torch":
        return importlib.import_module("torch").tensor(values)
    if framework == "jax":
        return importlib.import_module("jax.numpy").asarray(values)
    return values


def run_rank(rank: int, folder: str) -> None:
    """One rank: raises where its result is wrong."""
    framework = FRAMEWORKS[rank]
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32)
    own_images, own_labels = images[rank :: len(FRAMEWORKS)], labels[rank :: len(FRAMEWORKS)]
    part = {
        name: to_framework(values, framework)
        for name, values in sums_by_class(own_images, own_labels).items()
    }

    group = col.init_collective_group(
        len(FRAMEWORKS), rank, init_method=f"file://{folder}", timeout_s=60
    )
    total = group.allreduce(part)
    means = np.asarray(total["sums"]) / np.asarray(total["counts"])[:, None]
    guesses = ((own_images[:, None, :] - means) ** 2).sum(axis=2).argmin(axis=1)
    right = group.allreduce(
        to_framework(np.array([(guesses == own_labels).sum()], np.int32), framework)
    )
    group.barrier()
    group.destroy()

    expected = sums_by_class(images, labels)
    for name, values in expected.items():
        np.testing.assert_array_equal(
            np.asarray(total[name]), values, err_msg=f"rank {rank}, {name}"
        )
    kind = type(total["sums"])
    line = f"{kind.__module__}.{kind.__qualname__}; together {int(right[0])} of {len(images)} right"
    sys.stdout.write(f"rank {rank}: {line}\n")  # one write, so that the ranks' lines stay whole
    if int(right[0]) < 0.85 * len(images):
        raise AssertionError(f"rank {rank}: only {int(right[0])} right")


def main() -> int:
    """Start the three ranks; return 0 where each of them succeeds."""
    for framework in FRAMEWORKS:
        if importlib.util.find_spec(framework) is None:
            sys.exit(f"this example needs {framework}: pip install '.[torch,jax]'")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=run_rank, args=(rank, folder)) for rank in range(len(FRAMEWORKS))
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    codes = [process.exitcode for process in ranks]
    if any(codes):
        print(f"WRONG: the ranks ended with exit codes {codes}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
