"""A driver that is connected through Ray Client makes no group, and is told why; its actors do."""

from __future__ import annotations

import os
import subprocess
import sys

from ray.cluster_utils import Cluster

from colltensor import net

PROGRAM = """
import sys
import numpy as np
import ray
import colltensor as col
from colltensor.ray import placed_actors

@ray.remote(num_cpus=0)
class Worker:
    def add(self, rank):
        col.init_collective_group(2, rank)
        summed = col.allreduce(np.full(2, rank + 1.0)).tolist()
        col.destroy_collective_group()
        return summed

ray.init(sys.argv[1])
actors = [Worker.remote() for _ in range(2)]
for call, arguments in (
    (col.create_collective_group, (actors,)), (col.collective_group, (actors,)), (col.init_collective_group, (2, 0)),
    (lambda: placed_actors(Worker, 2).__enter__(), ()),
):
    try:
        call(*arguments)
    except col.GroupError as error:
        print("ray://" in str(error), "ray job submit" in str(error))
print(ray.get([actor.add.remote(rank) for rank, actor in enumerate(actors)], timeout=60))
"""


def test_a_client_is_refused_with_the_reason(cluster: Cluster) -> None:
    with net.listen("127.0.0.1") as probe:
        port = probe.getsockname()[1]
    where = ["--host", "127.0.0.1", "--port", str(port), "--address", cluster.address]
    server = subprocess.Popen(
        [sys.executable, "-m", "ray.util.client.server", "--mode", "specific-server", *where],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, f"ray://127.0.0.1:{port}"], env={**os.environ}, capture_output=True,
            text=True, timeout=90, check=False,
        )  # fmt: skip
    finally:
        server.kill()
        server.wait()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True True"] * 4 + ["[[3.0, 3.0], [3.0, 3.0]]"]
