"""A program written for ``ray.util.collective`` runs when its import is replaced, and the signatures say why."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import ray.util.collective
from ray.cluster_utils import Cluster

import colltensor as col

PROGRAM = """
    import numpy as np
    import ray
    import ray.util.collective as col
    from ray.util.collective.types import Backend, ReduceOp


    @ray.remote(num_cpus=0)
    class Worker:
        def __init__(self, rank):
            self.rank = rank
            self.buffer = np.ones(4, dtype=np.float32) * (rank + 1)

        def setup(self, world_size, name):
            col.init_collective_group(world_size, self.rank, Backend.GLOO, name, 30000)
            return col.is_group_initialized(name), col.get_rank(name), col.get_collective_group_size(name)

        def compute(self, name):
            col.allreduce(self.buffer, name)
            summed = self.buffer.tolist()
            col.allreduce(self.buffer, group_name=name, op=ReduceOp.MAX)
            outputs = [np.zeros(2, dtype=np.float32) for _ in range(2)]
            col.allgather(outputs, np.full(2, self.rank, dtype=np.float32), name)
            piece = np.zeros(2, dtype=np.float32)
            pieces = [np.full(2, i + self.rank, dtype=np.float32) for i in range(2)]
            col.reducescatter(piece, pieces, name, ReduceOp.SUM)
            shared = np.full(2, self.rank, dtype=np.int64)
            col.broadcast(shared, src_rank=1, group_name=name)
            rooted = np.full(2, self.rank + 1.0)
            col.reduce(rooted, dst_rank=0, group_name=name, op=ReduceOp.PRODUCT)
            if self.rank == 0:
                col.send(np.arange(3.0), dst_rank=1, group_name=name)
                received = None
            else:
                received = np.zeros(3)
                col.recv(received, src_rank=0, group_name=name)
            col.barrier(name)
            return [summed, np.concatenate(outputs).tolist(), piece.tolist(), shared.tolist(),
                    rooted.tolist() if self.rank == 0 else received.tolist()]

        def teardown(self, name):
            col.destroy_collective_group(name)
            return col.is_group_initialized(name), col.get_rank(name)

        def fail(self):
            try:
                col.allreduce(self.buffer, "no such group")
            except RuntimeError:
                return "RuntimeError"
            return "nothing"


    @ray.remote(num_cpus=0)
    class AsyncWorker:
        async def run(self, rank):
            col.init_collective_group(2, rank, Backend.GLOO)
            buffer = np.full(2, rank + 1.0)
            col.allreduce(buffer)
            col.destroy_collective_group()
            return buffer.tolist()


    @ray.remote(num_cpus=0)
    def task(rank):
        col.init_collective_group(2, rank, Backend.GLOO)
        buffer = np.full(2, rank + 1.0)
        col.allreduce(buffer)
        col.destroy_collective_group()
        return buffer.tolist()


    ray.init(log_to_driver=False)
    workers = [Worker.options(max_concurrency=2 - rank).remote(rank) for rank in range(2)]
    print(ray.get([worker.setup.remote(2, "imperative") for worker in workers]))
    print(ray.get([worker.compute.remote("imperative") for worker in workers]))
    print(ray.get([worker.teardown.remote("imperative") for worker in workers]))
    col.create_collective_group(workers, 2, [0, 1], backend="gloo", group_name="declared", gloo_timeout=30000)
    print(ray.get([worker.compute.remote("declared") for worker in workers]))
    print(ray.get([worker.fail.remote() for worker in workers]))
    print(ray.get([task.remote(0), AsyncWorker.remote().run.remote(1)]))
    col.create_collective_group(workers, 2, [0, 1], backend="gloo")
    print([found[0] for found in ray.get([worker.compute.remote("default") for worker in workers])])
    print(col.gloo_available(), col.is_backend_available("GLOO"))
"""

SECOND = [[0.0, 0.0, 1.0, 1.0], [1.0, 1.0], [1, 1]]
THIRD = [[0.0, 0.0, 1.0, 1.0], [3.0, 3.0], [1, 1]]
PRINTS = [
    [(True, 0, 2), (True, 1, 2)],
    [[[3.0] * 4, *SECOND, [2.0, 2.0]], [[3.0] * 4, *THIRD, [0.0, 1.0, 2.0]]],
    [(False, -1), (False, -1)],
    [[[6.0] * 4, *SECOND, [2.0, 2.0]], [[6.0] * 4, *THIRD, [0.0, 1.0, 2.0]]],
    ["RuntimeError", "RuntimeError"],
    [[3.0, 3.0]] * 2,
    [[12.0] * 4] * 2,
    "True True",
]


def test_a_program_runs_with_its_import_replaced(cluster: Cluster, tmp_path: Path) -> None:
    """A threaded actor, an async one and a task; groups named and not, that these make and that the driver does."""
    program = textwrap.dedent(PROGRAM)
    line = "import ray.util.collective as col\n"
    assert program.count(line) == 1
    script = tmp_path / "program.py"
    script.write_text(program.replace(line, "import colltensor as col\n"))
    printed = printed_by(script, RAY_ADDRESS=cluster.address)
    assert printed == [text if isinstance(text, str) else str(text) for text in PRINTS]


LOCAL_PROGRAM = """
    import numpy as np
    import ray
    import colltensor as col

    @ray.remote(num_cpus=0)
    def task(rank):
        col.init_collective_group(2, rank)
        return col.allreduce(np.full(2, rank + 1.0)).tolist()

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    print(ray.get([task.remote(rank) for rank in range(2)]))
"""


def test_a_program_starts_ray_itself(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(LOCAL_PROGRAM))
    assert printed_by(script) == [str([[3.0, 3.0]] * 2)]


def printed_by(script: Path, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=script.parent,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(col.__file__).parent.parent), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


THEIRS = sorted({*ray.util.collective.__all__, "synchronize"} - {"register_collective_backend"})
"""Ray's own registry of backends takes its own backend classes; ours is ``register_backend``."""


@pytest.mark.parametrize("name", THEIRS)
def test_a_signature_begins_as_rays_does(name: str) -> None:
    their = getattr(ray.util.collective, name, None) or getattr(
        ray.util.collective.collective, name
    )
    expected = list(inspect.signature(their).parameters.values())
    found = list(inspect.signature(getattr(col, name)).parameters.values())
    assert [parameter.name for parameter in found[: len(expected)]] == [
        parameter.name for parameter in expected
    ]
    for ours, theirs in zip(found, expected, strict=False):
        assert ours.kind is theirs.kind
        if theirs.default is not inspect.Parameter.empty:
            assert is_equal(ours.name, ours.default, theirs.default)
    for extra in found[len(expected) :]:
        assert extra.kind is inspect.Parameter.KEYWORD_ONLY


def is_equal(name: str, ours: Any, theirs: Any) -> bool:
    """Ray's ops are another enumeration; the backend and the timeout have defaults of their own, as documented."""
    return name in ("backend", "gloo_timeout") or ours == theirs or ours.name == theirs.name
