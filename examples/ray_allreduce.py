"""The walk-through: Ray workers hold gradients, set up a group, and allreduce them in place.

    python examples/ray_allreduce.py --array torch --workers 4
    python examples/ray_allreduce.py --array jax --workers 2 --compare 64
    python examples/ray_allreduce.py --array cupy --workers 2 --gpu 0.25

Needs colltensor[ray] and, for --array, colltensor[torch], [jax] or [cupy]. With --gpu the arrays
are on a GPU, of which each worker takes that share (CuPy's always are); several workers on one GPU
need libnccl 2.30 or later. ``--compare MIB`` also measures what the same sum takes through ray.put
and ray.get.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from typing import Any

import numpy as np

import colltensor as col

try:
    import ray
except ModuleNotFoundError:
    sys.exit("this example needs Ray: pip install '.[ray]'")

LENGTH = 10
TURNS = 5
ON_GPU = {
    "NCCL_MULTI_RANK_GPU_ENABLE": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_MAX_CTAS": "1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
"""What lets NCCL put several workers on one GPU, and JAX leave memory to the others."""


def expected_gradients(rank: int) -> np.ndarray[Any, Any]:
    """The gradients that a worker starts with: different in every rank and at every index."""
    return np.arange(1, LENGTH + 1, dtype=np.float32) * (rank + 1)


def to_framework(values: np.ndarray[Any, Any], array: str, gpu: bool) -> Any:
    """Make an array of the framework that was asked for."""
    if array == "torch":
        return importlib.import_module("torch").tensor(values, device="cuda" if gpu else "cpu")
    if array == "jax":
        jax = importlib.import_module("jax")
        return jax.device_put(values, jax.devices("gpu" if gpu else "cpu")[0])
    return importlib.import_module(array).array(values)


def to_host(tensor: Any, array: str) -> np.ndarray[Any, Any]:
    """Return a copy of an array in host memory."""
    if array == "torch":
        return np.array(tensor.cpu().numpy())
    return np.array(tensor.get() if array == "cupy" else tensor)


class Worker:
    """One worker: its gradients, and its place in the group."""

    def __init__(self, array: str, rank: int, gpu: bool) -> None:
        self.array, self.rank, self.gpu = array, rank, gpu
        self.gradients = to_framework(expected_gradients(rank), array, gpu)

    def setup(self, world_size: int, rank: int) -> None:
        """Join the group; every worker must."""
        col.init_collective_group(world_size=world_size, rank=rank, backend="auto")

    def allreduce(self) -> tuple[str, list[float]]:
        """Sum the gradients over all workers, in place but for JAX, whose arrays are immutable."""
        self.gradients = col.allreduce(self.gradients)
        kind = type(self.gradients)
        return f"{kind.__module__}.{kind.__qualname__}", self.gradients.tolist()

    def fill(self, count: int) -> None:
        """Take larger gradients, to measure with."""
        self.gradients = to_framework(
            np.full(count, self.rank + 1.0, np.float32), self.array, self.gpu
        )

    def measure(self) -> list[float]:
        """Return the seconds of a few allreduces, each until its result is there."""
        group, seconds = col.get_group_handle(), []
        for _ in range(TURNS):
            group.barrier()
            start = time.perf_counter()
            self.gradients = col.allreduce(self.gradients)
            group.synchronize()  # on a GPU the call is only queued
            seconds.append(time.perf_counter() - start)
        return seconds

    def give(self) -> np.ndarray[Any, Any]:
        """Hand the gradients out through Ray's object store."""
        return to_host(self.gradients, self.array)

    def take(self, gradients: np.ndarray[Any, Any]) -> None:
        """Take gradients out of Ray's object store."""
        self.gradients = to_framework(gradients, self.array, self.gpu)

    def leave(self) -> None:
        """Leave the group."""
        col.destroy_collective_group()


def compare(workers: list[Any], mib: int) -> str:
    """Measure allreduce, and the driver's sum through the object store; return it in words."""
    ray.get([worker.fill.remote(mib << 18) for worker in workers])
    ours = min(
        max(times)
        for times in zip(*ray.get([worker.measure.remote() for worker in workers]), strict=True)
    )
    theirs = []
    for _ in range(TURNS):
        start = time.perf_counter()
        total = ray.put(sum(ray.get([worker.give.remote() for worker in workers])))
        ray.get([worker.take.remote(total) for worker in workers])
        theirs.append(time.perf_counter() - start)
    apart = f"allreduce {ours * 1e3:.1f} ms, ray.put and ray.get {min(theirs) * 1e3:.1f} ms"
    return f"{mib} MiB, best of {TURNS}: {apart}"


def share(options: argparse.Namespace) -> float:
    """Return the share of a GPU that each worker takes, 0 for none.

    Exits where it cannot be had.
    """
    gpu = float(options.gpu or (1.0 if options.array == "cupy" else 0.0))
    if gpu and options.array == "numpy":
        sys.exit("--gpu goes with --array cupy, torch or jax: numpy has no arrays on a GPU")
    reason = col.backend_unavailable_reason("nccl") if gpu else None
    if reason is not None:
        sys.exit(
            f"--array {options.array} on a GPU goes through NCCL, which cannot be used here: {reason}"
        )
    return gpu


def main() -> int:
    """Run the walk-through; return 0 where every worker holds the sum."""
    parser = argparse.ArgumentParser(description="allreduce in Ray workers")
    parser.add_argument("--array", choices=("numpy", "torch", "jax", "cupy"), default="numpy")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--gpu",
        type=float,
        metavar="SHARE",
        help="put the arrays on a GPU: what a worker takes of it",
    )
    parser.add_argument(
        "--compare", type=int, metavar="MIB", help="also measure, against ray.put and ray.get"
    )
    options = parser.parse_args()
    try:
        importlib.import_module(options.array)
    except ModuleNotFoundError:
        sys.exit(f"--array {options.array} needs it installed: pip install '.[{options.array}]'")
    gpu = share(options)

    if gpu:
        os.environ.update(ON_GPU)  # the workers inherit it
    else:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    ray.init(num_cpus=options.workers, include_dashboard=False, logging_level="ERROR")
    try:
        gpus = ray.cluster_resources().get("GPU", 0.0)
        if gpu * options.workers > gpus:
            sys.exit(
                f"{options.workers} workers want {gpu:g} of a GPU each, and Ray has {gpus:g}: lower --gpu"
            )
        remote = ray.remote(num_cpus=1, num_gpus=gpu)(Worker)
        workers = [remote.remote(options.array, rank, gpu > 0) for rank in range(options.workers)]
        ray.get([worker.setup.remote(options.workers, rank) for rank, worker in enumerate(workers)])
        results = ray.get([worker.allreduce.remote() for worker in workers])
        compared = compare(workers, options.compare) if options.compare else None
        ray.get([worker.leave.remote() for worker in workers])
    finally:
        ray.shutdown()

    expected = sum(expected_gradients(rank) for rank in range(options.workers))
    right = all(np.array_equal(values, expected) for _, values in results)
    for rank, (kind, values) in enumerate(results):
        print(f"rank {rank}: {kind} {values[:4]} ...")
    print(f"{'right' if right else 'WRONG'}: every worker should hold {expected[:4].tolist()} ...")
    if compared:
        print(compared)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
