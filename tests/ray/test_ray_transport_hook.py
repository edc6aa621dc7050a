"""The tensor transports registered in every worker by Ray's setup hook, in a job of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ray.cluster_utils import Cluster

PROGRAM = """
import os
import time

import numpy as np
import ray

import colltensor.ray

ray.init(
    log_to_driver=False, runtime_env={
        "worker_process_setup_hook": "colltensor.ray.register_tensor_transports",
        "env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]},
    },
)
colltensor.ray.register_tensor_transports(["numpy"])


@ray.remote(num_cpus=0, enable_tensor_transport=True, max_restarts=1)
class Source:
    def pid(self):
        return os.getpid()

    @ray.method(tensor_transport="COLLTENSOR_NUMPY")
    def count(self, end):
        return colltensor.ray.NumpyArray(np.arange(end))


@ray.remote(num_cpus=0)
class Maker:
    def total(self, end):
        source = Source.remote()  # whose class this process must know the transport of
        return int(ray.get(source.count.remote(end), timeout=60).array.sum())


@ray.remote(num_cpus=0)
def total(refs):
    return int(ray.get(refs[0], timeout=60).array.sum())


source = Source.remote()
put = ray.put(colltensor.ray.NumpyArray(np.arange(6)), _tensor_transport="COLLTENSOR_NUMPY")
for call in [Maker.remote().total.remote(5), total.remote([put])]:
    print(ray.get(call, timeout=60))
assert ray.get(source.count.remote(3), timeout=60).array.sum() == 3
pid = ray.get(source.pid.remote(), timeout=60)
os.kill(pid, 9)
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    try:
        if ray.get(source.pid.remote(), timeout=60) != pid:
            break
    except ray.exceptions.RayActorError:
        time.sleep(0.05)
print(ray.get(source.count.remote(7), timeout=60).array.sum())
"""

NUMPY_ALONE = """
import importlib.util

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("torch", "jax", "cupy") else find_spec(name, *rest)
"""


def test_workers_make_actors_take_objects_and_restart(cluster: Cluster, tmp_path: Path) -> None:
    """The workers find numpy alone, because importing the other frameworks takes them seconds."""
    (tmp_path / "sitecustomize.py").write_text(NUMPY_ALONE)
    path = os.pathsep.join((str(tmp_path), os.environ["PYTHONPATH"]))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "(raylet)" not in line] == [
        "10",
        "15",
        "21",
    ]
