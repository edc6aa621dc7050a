"""The gradients of an MLP 64-w-w-10 of numpy arrays, kept in step between ranks in four ways.

    python benchmarks/gradient_trees.py --ranks 2 --repeat 200

Medians over ``--repeat`` steps after 20 of warm-up, of the slowest rank, in microseconds: a ``Synchronizer``, which
keeps its buckets; ``sync_gradients``, which fuses anew each time; an allreduce for each leaf; and the copies alone,
into a flat buffer and back by numpy. All on the same leaves in one run, in shared memory or over ``--backend gloo``.
Leaves begin where numpy puts them: 16 bytes into a page if they are large.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import colltensor as col
from colltensor.gradients import Synchronizer, sync_gradients

WIDTHS = (16, 64, 128, 256, 512, 2048)


def gradients_of(width: int) -> dict[str, Any]:
    """Arrays of the shapes of the layers' weights and biases."""
    sizes = [64, width, width, 10]
    layers = enumerate(itertools.pairwise(sizes))
    return {
        f"layer{number}": {"weights": np.ones((wide, high), np.float32), "bias": np.ones(high, np.float32)}
        for number, (wide, high) in layers
    }


def ways(group: col.Group, gradients: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """What is compared, by name."""
    leaves = [leaf for layer in gradients.values() for leaf in layer.values()]
    kept = Synchronizer(gradients, group=group)
    flat = np.empty(sum(leaf.size for leaf in leaves), np.float32)
    ends = np.cumsum([leaf.size for leaf in leaves])
    slots = [flat[end - leaf.size : end].reshape(leaf.shape) for leaf, end in zip(leaves, ends, strict=True)]

    def copies() -> None:
        for slot, leaf in zip(slots, leaves, strict=True):
            slot[...] = leaf
        for slot, leaf in zip(slots, leaves, strict=True):
            leaf[...] = slot

    return {
        "Synchronizer": lambda: kept.sync(gradients),
        "sync_gradients": lambda: sync_gradients(gradients, group=group),
        "leaf by leaf": lambda: [group.allreduce(leaf, col.ReduceOp.AVERAGE) for leaf in leaves],
        "copies alone": copies,
    }


def measure(rank: int, options: argparse.Namespace, place: str, results: Any) -> None:
    """Time every way in one rank; rank 0 puts the medians of the slowest rank."""
    group = col.init_collective_group(options.ranks, rank, options.backend, init_method=f"file://{place}")
    for width in WIDTHS:
        for name, step in ways(group, gradients_of(width)).items():
            times = []
            for _ in range(20 + options.repeat):
                group.barrier()
                began = time.perf_counter()
                step()
                times.append(time.perf_counter() - began)
            medians = group.allgather_object(statistics.median(times[20:]))
            if rank == 0:
                results.put((width, name, max(medians) * 1e6))
    group.destroy()


def main() -> None:
    """Run the ranks and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=200)
    parser.add_argument("--backend", default="shm")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results: Any = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as place:
        ranks = [context.Process(target=measure, args=(rank, options, place, results)) for rank in range(options.ranks)]
        for process in ranks:
            process.start()
        rows = [results.get() for _ in range(4 * len(WIDTHS))]
        for process in ranks:
            process.join()
    print(f"us a step, {options.ranks} ranks, {options.backend}, MLP 64-w-w-10 in float32")
    print("\n".join(f"w = {width:5}  {name:15} {taken:9.1f}" for width, name, taken in rows))


if __name__ == "__main__":
    main()
