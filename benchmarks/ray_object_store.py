"""An allreduce put together from ray.put and ray.get, against ray.util.collective's and ours, on simulated clusters.

    python benchmarks/ray_object_store.py --plot docs/ray-object-store.png

What is measured, and how, is in `examples/put_get_vs_allreduce.py`: float32, 2 workers on one node, then 14 on 7 nodes,
two on each, which are processes on this machine with an object store each. In place on numpy arrays; the sums through
the object store leave every worker with a read-only view of it, which is less than an allreduce gives.
`ray.util.collective` goes over Gloo. All three are checked at every size before they are measured.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from plots import Line, Panel, draw, size
from ray.cluster_utils import Cluster

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from put_get_vs_allreduce import OURS, PEER, STORE, Times, Worker, measure, table  # noqa: E402 - found there only

SIZES = (1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26)
NODES = (1, 7)
PER_NODE = 2
WHERE = ("inside the workers", "by the driver")


def store_bytes(sizes: Sequence[int]) -> int:
    """Return what a node's object store must hold: its workers' arrays, another node's and the sum, twice each."""
    return max(150 << 20, 8 * max(sizes) + (64 << 20))


def run(nodes: int, sizes: Sequence[int], seconds: float) -> dict[int, dict[str, Times]]:
    """Start a cluster of so many nodes, two workers on each, and measure every size."""
    needed, free = nodes * store_bytes(sizes), shutil.disk_usage("/dev/shm").free
    if needed > free:
        sys.exit(f"{nodes} object stores of {size(store_bytes(sizes))} need {size(needed)} in /dev/shm, which has "
                 f"{size(free)} free; choose smaller --bytes")
    # For the workers, which import what they are made of.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(EXAMPLES), os.environ.get("PYTHONPATH")]))
    cluster = Cluster()
    try:
        for node in range(nodes):
            cluster.add_node(
                num_cpus=PER_NODE, resources={f"node {node}": 1.0}, object_store_memory=store_bytes(sizes),
                include_dashboard=False,
            )
        ray.init(address=cluster.address, log_to_driver=False)
        return measure_all(start_workers(nodes), sizes, seconds)
    finally:
        ray.shutdown()
        cluster.shutdown()


def start_workers(nodes: int) -> list[Any]:
    """Start the workers, ranks 2i and 2i + 1 on node i, and let them meet."""
    world_size = nodes * PER_NODE
    remote = ray.remote(num_cpus=1)(Worker)
    workers = [
        remote.options(resources={f"node {rank // PER_NODE}": 0.1}).remote(rank, world_size, True)
        for rank in range(world_size)
    ]
    print(f"{world_size} workers: {ray.get([worker.setup.remote() for worker in workers])[0]!r}", flush=True)
    return workers


def measure_all(workers: Sequence[Any], sizes: Sequence[int], seconds: float) -> dict[int, dict[str, Times]]:
    """Measure every size."""
    results = {}
    for nbytes in sizes:
        began = time.perf_counter()
        results[nbytes] = measure(workers, nbytes, (STORE, PEER, OURS), seconds)
        print(f"{size(nbytes)}: {results[nbytes]} in {time.perf_counter() - began:.0f} s", flush=True)
    return results


def panel(nodes: int, results: dict[int, dict[str, Times]]) -> Panel:
    """Return the results as a panel of the figure."""
    return Panel(f"{nodes * PER_NODE} workers on {nodes} node{'s' * (nodes > 1)}", {
        f"{name}, {where}": Line([(nbytes, times[name][style]) for nbytes, times in results.items()], color, style)
        for color, name in enumerate((OURS, STORE, PEER)) for style, where in enumerate(WHERE)
    })


def main() -> None:
    """Measure both clusters and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", default=",".join(map(str, NODES)), help="numbers of nodes, with commas")
    parser.add_argument("--bytes", default=",".join(map(str, SIZES)), help="sizes, with commas")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each measurement, about")
    parser.add_argument("--plot", type=Path, help="draw them into this PNG file")
    options = parser.parse_args()
    sizes = [int(nbytes) for nbytes in options.bytes.split(",")]
    panels = []
    for nodes in map(int, options.nodes.split(",")):
        results = run(nodes, sizes, options.seconds)
        print(f"\n{panel(nodes, results).title}, microseconds:\n{table(results)}\n", flush=True)
        panels.append(panel(nodes, results))
    if options.plot:
        draw(options.plot, panels, "size of each worker's array", "time of one sum", size)


if __name__ == "__main__":
    main()
