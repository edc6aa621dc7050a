"""The walk-through: Ray workers hold gradients, set up a group, and allreduce them in place.

    python examples/ray_allreduce.py --array torch --workers 4

Needs colltensor[ray] and, for --array, colltensor[torch], [jax] or [cupy] (CuPy needs a GPU per worker).
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
except ModuleNotFoundError:
    sys.exit("this example needs Ray: pip install 'colltensor[ray]'")

LENGTH = 10


def expected_gradients(rank: int) -> np.ndarray[Any, Any]:
    """The gradients that a worker starts with: different in every rank and at every index."""
    return np.arange(1, LENGTH + 1, dtype=np.float32) * (rank + 1)


def to_framework(values: np.ndarray[Any, Any], array: str) -> Any:
    """Make an array of the framework that was asked for."""
    if array == "torch":
        return importlib.import_module("torch").tensor(values)
    if array == "jax":
        return importlib.import_module("jax.numpy").asarray(values)
    return importlib.import_module(array).array(values)


class Worker:
    """One worker: its gradients, and its place in the group."""

    def __init__(self, array: str, rank: int) -> None:
        self.gradients = to_framework(expected_gradients(rank), array)

    def setup(self, world_size: int, rank: int) -> None:
        """Join the group; every worker must."""
        col.init_collective_group(world_size=world_size, rank=rank, backend="auto")

    def allreduce(self) -> tuple[str, list[float]]:
        """Sum the gradients over all workers, in place but for JAX, whose arrays are immutable."""
        self.gradients = col.allreduce(self.gradients)
        kind = type(self.gradients)
        return f"{kind.__module__}.{kind.__qualname__}", self.gradients.tolist()

    def leave(self) -> None:
        """Leave the group."""
        col.destroy_collective_group()


def main() -> int:
    """Run the walk-through; return 0 where every worker holds the sum."""
    parser = argparse.ArgumentParser(description="allreduce in Ray workers")
    parser.add_argument("--array", choices=("numpy", "torch", "jax", "cupy"), default="numpy")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    try:
        importlib.import_module(options.array)
    except ModuleNotFoundError:
        sys.exit(f"--array {options.array} needs it installed: pip install 'colltensor[{options.array}]'")
    gpus = options.workers if options.array == "cupy" else 0
    if gpus and importlib.import_module("cupy").cuda.is_available() is False:
        sys.exit("--array cupy needs a GPU for each worker, and CuPy finds none here")

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    ray.init(num_cpus=options.workers, num_gpus=gpus, include_dashboard=False, logging_level="ERROR")
    try:
        remote = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(Worker)
        workers = [remote.remote(options.array, rank) for rank in range(options.workers)]
        ray.get([worker.setup.remote(options.workers, rank) for rank, worker in enumerate(workers)])
        results = ray.get([worker.allreduce.remote() for worker in workers])
        ray.get([worker.leave.remote() for worker in workers])
    finally:
        ray.shutdown()

    expected = sum(expected_gradients(rank) for rank in range(options.workers))
    right = all(np.array_equal(values, expected) for _, values in results)
    for rank, (kind, values) in enumerate(results):
        print(f"rank {rank}: {kind} {values[:4]} ...")
    print(f"{'right' if right else 'WRONG'}: every worker should hold {expected[:4].tolist()} ...")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
