"""An allreduce put together from ray.put and ray.get, against ray.util.collective's and ours, on simulated clusters.

    python benchmarks object-store --plot docs/ray-object-store.png

What is measured, and how, is in `examples/put_get_vs_allreduce.py`: float32, 2 workers on one node, then 14 on 7 nodes,
two on each, which are processes on this machine with an object store each. In place on numpy arrays; the sums through
the object store leave every worker with a read-only view of it, which is less than an allreduce gives.
`ray.util.collective` goes over Gloo. All three are checked at every size before they are measured.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.plots import Line, Panel, size
from harness.run import Run, add_options, numbers

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SIZES = ",".join(str(1 << power) for power in (10, 14, 18, 20, 22, 24, 26))
PER_NODE = 2
WHERE = ("inside the workers", "by the driver")


def _store_bytes(sizes: Sequence[int]) -> int:
    """Return what a node's object store must hold: its workers' arrays, another node's and the sum, twice each."""
    return max(150 << 20, 8 * max(sizes) + (64 << 20))


def _measure_cluster(
    example: Any, nodes: int, sizes: Sequence[int], seconds: float
) -> dict[int, Any]:
    """Start a cluster of so many nodes, two workers on each, and measure every size."""
    import ray
    from ray.cluster_utils import Cluster

    needed, free = nodes * _store_bytes(sizes), shutil.disk_usage("/dev/shm").free
    if needed > free:
        sys.exit(
            f"{nodes} object stores of {size(_store_bytes(sizes))} need {size(needed)} in /dev/shm, which has "
            f"{size(free)} free; choose smaller --bytes"
        )
    # For the workers, which import what they are made of.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(EXAMPLES), os.environ.get("PYTHONPATH")])
    )
    cluster = Cluster()
    try:
        for node in range(nodes):
            cluster.add_node(
                num_cpus=PER_NODE,
                resources={f"node {node}": 1.0},
                include_dashboard=False,
                object_store_memory=_store_bytes(sizes),
            )
        ray.init(address=cluster.address, log_to_driver=False)
        remote, world_size = ray.remote(num_cpus=1)(example.Worker), nodes * PER_NODE
        workers = [
            remote.options(resources={f"node {rank // PER_NODE}": 0.1}).remote(
                rank, world_size, True
            )
            for rank in range(world_size)
        ]
        ray.get([worker.setup.remote() for worker in workers])
        contestants = (example.STORE, example.PEER, example.OURS)
        return {nbytes: example.measure(workers, nbytes, contestants, seconds) for nbytes in sizes}
    finally:
        ray.shutdown()
        cluster.shutdown()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_options(parser, plot=True)
    parser.add_argument(
        "--nodes", type=numbers, default=[1, 7], help="numbers of nodes, with commas (1,7)"
    )
    parser.add_argument("--bytes", type=numbers, default=numbers(SIZES), help="sizes, with commas")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each measurement, about")


def measure(run: Run, options: argparse.Namespace) -> None:
    """Measure the clusters."""
    sys.path.insert(0, str(EXAMPLES))
    example: Any = importlib.import_module("put_get_vs_allreduce")
    panels, order = [], (example.OURS, example.STORE, example.PEER)
    run.note(ray=importlib.import_module("ray").__version__)
    for nodes in options.nodes:
        results = _measure_cluster(example, nodes, options.bytes, options.seconds)
        title = f"{nodes * PER_NODE} workers on {nodes} node{'s' * (nodes > 1)}"
        run.print(
            title,
            ["bytes", *(f"{name}, {where}" for name in order for where in WHERE)],
            [
                [f"{nbytes:,}", *(seconds * 1e6 for name in order for seconds in times[name])]
                for nbytes, times in results.items()
            ],
        )
        panels.append(
            Panel(
                title,
                {
                    f"{name}, {where}": Line(
                        [(nbytes, times[name][style]) for nbytes, times in results.items()],
                        color,
                        style,
                    )
                    for color, name in enumerate(order)
                    for style, where in enumerate(WHERE)
                },
            )
        )
    run.plot(panels, "size of each worker's array", "time of one sum", size)
