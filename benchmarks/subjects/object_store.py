"""An allreduce of ray.put and ray.get, against ray.util.collective's and ours.

The clusters are simulated.

    python benchmarks object-store --plot docs/ray-object-store.png

What is measured, and how, is in `examples/put_get_vs_allreduce.py`: float32, 2 workers on one node,
then 14 on 7 nodes, two on each, which are processes on this machine with an object store each. In
place on numpy arrays; the sums through the object store leave every worker with a read-only view of
it, which is less than an allreduce gives. `ray.util.collective` goes over Gloo. All three are
checked at every size before they are measured.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.plots import Line, Panel, size
from harness.run import Run

SIZES = tuple(1 << power for power in (10, 14, 18, 20, 22, 24, 26))
OPTIONS = {"plot": "", "nodes": (1, 7), "bytes": SIZES, "seconds": 1.0}
PER_NODE = 2
WHERE = ("inside the workers", "by the driver")


def measure_cluster(example: Any, nodes: int, sizes: Sequence[int], seconds: float) -> Any:
    """Start a cluster of so many nodes, two workers on each, and measure every size."""
    import ray
    from ray.cluster_utils import Cluster

    # Of each node its workers' arrays, another node's and the sum, twice each.
    store, free = max(150 << 20, 8 * max(sizes) + (64 << 20)), shutil.disk_usage("/dev/shm").free
    if nodes * store > free:
        needed = f"{nodes} object stores of {size(store)} need {size(nodes * store)} in /dev/shm"
        sys.exit(f"{needed}, which has {size(free)} free; choose smaller --bytes")
    cluster, world_size = Cluster(), nodes * PER_NODE
    try:
        for node in range(nodes):
            own = {"num_cpus": PER_NODE, "resources": {f"node {node}": 1.0}}
            cluster.add_node(include_dashboard=False, object_store_memory=store, **own)
        ray.init(address=cluster.address, log_to_driver=False)
        worker = ray.remote(num_cpus=1)(example.Worker)
        workers = [
            worker.options(resources={f"node {rank // PER_NODE}": 0.1}).remote(
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


def measure(run: Run) -> None:
    options, examples = run.options, str(Path(__file__).resolve().parents[2] / "examples")
    sys.path.insert(0, examples)
    # For the workers, which import what they are made of.
    os.environ["PYTHONPATH"] = os.pathsep.join([examples, os.environ["PYTHONPATH"]])
    example: Any = importlib.import_module("put_get_vs_allreduce")
    panels, order = [], (example.OURS, example.STORE, example.PEER)
    run.note(ray=importlib.import_module("ray").__version__)
    for nodes in options.nodes:
        found = measure_cluster(example, nodes, options.bytes, options.seconds)
        title = f"{nodes * PER_NODE} workers on {nodes} node{'s' * (nodes > 1)}"
        lines = {
            f"{name}, {where}": Line(
                [(nbytes, times[name][style]) for nbytes, times in found.items()], color, style
            )
            for color, name in enumerate(order)
            for style, where in enumerate(WHERE)
        }
        columns = [[seconds * 1e6 for _, seconds in line.points] for line in lines.values()]
        rows = zip((f"{nbytes:,}" for nbytes in found), *columns, strict=True)
        run.print(title, ["bytes", *lines], [*rows])
        panels.append(Panel(title, lines))
    run.plot(panels, "size of each worker's array", "time of one sum", size)
