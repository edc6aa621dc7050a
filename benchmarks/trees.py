"""Trees of tensors as one call, beside a call a leaf, one array of as many bytes, and another build.

    python benchmarks/trees.py --frameworks numpy,torch,jax
    python benchmarks/trees.py --backend gloo
    python benchmarks/trees.py --baseline OTHER/CHECKOUT:OTHER/libcolltensor.so

Two ranks on one host. Medians over ``--rounds`` rounds, of the slower rank, in microseconds a call: ``tree`` is
``group.allreduce(tree)``, ``loop`` an allreduce for each leaf, ``one`` an allreduce of one array of as many bytes,
``sync`` a ``Synchronizer`` and ``sync_gradients`` the function. They run in turns in every round, and the builds, each
in processes of its own, take turns with the rounds. Leaves begin where their frameworks put them: numpy's large ones 16
bytes into a page. ``mixed`` is 1,000 leaves of 1 B to 1 MiB, of five dtypes, every eighth one strided.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

CASES = {"1 of 0-d": (1, 0), "100 of 1 KiB": (100, 256), "10000 of 1 KiB": (10_000, 256),
         "100 of 256 KiB": (100, 65_536), "mixed": (1000, -1)}
"""Number of leaves and elements of each."""
ROUND_S = 0.05
"""About how long each way is repeated in a round."""


def mixed() -> list[Any]:
    """Return numpy leaves of many sizes, dtypes and layouts, the same on every rank."""
    import numpy as np

    draw = np.random.default_rng(0)
    leaves = []
    for number in range(1000):
        dtype = np.dtype(("float32", "float64", "int32", "uint8", "float16")[int(draw.integers(5))])
        count = max(1, int(2 ** draw.uniform(0, 20 if number % 50 == 0 else 12)) // dtype.itemsize)
        leaf = np.ones(2 * count if number % 8 == 0 else count, dtype)
        leaves.append(leaf[::2] if number % 8 == 0 else leaf)
    return leaves


def leaves_of(framework: str, number: int, count: int) -> list[Any]:
    """Return the leaves of a case."""
    import numpy as np

    arrays = mixed() if count < 0 else [np.ones(count or (), np.float32) for _ in range(number)]
    return [of_framework(framework, array) for array in arrays]


def of_framework(framework: str, array: Any) -> Any:
    """Return an array of a framework with these values."""
    if framework == "torch":
        import torch

        torch.set_num_threads(1)
        return torch.from_numpy(array)
    if framework == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
        return jax.numpy.asarray(array)
    return array


def ways_of(group: Any, framework: str, leaves: list[Any]) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name."""
    import numpy as np

    from colltensor.gradients import Synchronizer, sync_gradients

    tree = {f"leaf{number}": leaf for number, leaf in enumerate(leaves)}
    one = of_framework(framework, np.ones(max(1, sum(leaf.nbytes for leaf in leaves) // 4), np.float32))
    ways = {
        "tree": lambda: group.allreduce(tree),
        "loop": lambda: [group.allreduce(leaf) for leaf in leaves],
        "one": lambda: group.allreduce(one),
        "sync_gradients": lambda: sync_gradients(tree, group=group, average=False),
    }
    if len(leaves) <= 1000:
        kept = Synchronizer(tree, group=group, average=False)
        ways["sync"] = lambda: kept.sync(tree)
    return ways


def measure(rank: int, options: argparse.Namespace, build: tuple[str, str], place: str, pipe: Any) -> None:
    """Time one build in one rank, a round each time that it is told to."""
    if build[0]:
        sys.path.insert(0, build[0])
        os.environ["COLLTENSOR_LIBRARY"] = build[1]
    import colltensor as col

    group = col.init_collective_group(2, rank, options.backend, init_method=f"file://{place}", timeout_s=120)
    made: dict[tuple[str, str], dict[str, Callable[[], Any]]] = {}
    repeats: dict[tuple[str, str, str], int] = {}
    while (case := pipe.recv()) is not None:
        if case not in made:
            made.clear()  # the memory of one case at a time
            number, count = CASES[case[1]]
            made[case] = ways_of(group, case[0], leaves_of(case[0], number, count))
            for name, way in made[case].items():
                way()
                group.barrier()
                began = time.perf_counter()
                way()
                once = max(group.allgather_object(time.perf_counter() - began))
                repeats[(*case, name)] = max(1, int(ROUND_S / once))
        found = {}
        for name, way in made[case].items():
            group.barrier()
            began = time.perf_counter()
            for _ in range(repeats[(*case, name)]):
                way()
            taken = (time.perf_counter() - began) / repeats[(*case, name)]
            found[name] = max(group.allgather_object(taken)) * 1e6
        pipe.send(found)
    group.destroy()


def main() -> None:
    """Run the builds in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--frameworks", default="numpy")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--backend", default="shm")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--baseline", metavar="FOLDER:LIBRARY", help="another checkout, and its native library")
    options = parser.parse_args()
    own = ("", "")
    if "COLLTENSOR_LIBRARY" in os.environ:
        own = (os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.environ["COLLTENSOR_LIBRARY"])
    builds = {"this": own}
    if options.baseline:
        folder, library = options.baseline.rsplit(":", 1)
        builds["baseline"] = (os.path.abspath(folder), os.path.abspath(library))
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as place:
        pipes: dict[str, list[Any]] = {}
        processes = []
        for name, build in builds.items():
            pipes[name] = []
            for rank in range(2):
                here, there = context.Pipe()
                pipes[name].append(here)
                where = os.path.join(place, name)
                processes.append(context.Process(target=measure, args=(rank, options, build, where, there)))
                processes[-1].start()
        print(f"us a call, 2 ranks, {options.backend}, {options.rounds} rounds")
        for framework in options.frameworks.split(","):
            for case in options.cases.split(","):
                times: dict[str, dict[str, list[float]]] = {name: {} for name in builds}
                for _ in range(options.rounds):
                    for name in builds:
                        for pipe in pipes[name]:
                            pipe.send((framework, case))
                        for pipe in pipes[name]:
                            for way, taken in pipe.recv().items():
                                times[name].setdefault(way, []).append(taken)
                for name in builds:
                    row = {way: statistics.median(taken) for way, taken in times[name].items()}
                    figures = "  ".join(f"{way} {taken:9.1f}" for way, taken in row.items())
                    print(f"{name:8}  {framework:5}  {case:14}  {figures}  tree/loop {row['tree'] / row['loop']:5.2f}"
                          f"  tree/one {row['tree'] / row['one']:6.2f}", flush=True)
        for group in pipes.values():
            for pipe in group:
                pipe.send(None)
        for process in processes:
            process.join()


if __name__ == "__main__":
    main()
