"""Programs that call ``ray.util.collective`` with ``backend="COLLTENSOR"``: Ray's front door, our groups behind it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import ray
import ray.util.collective as collective
from crew import FIRST_NODE, Member, errors_of, kill_process, new_name, outcome
from ray.cluster_utils import Cluster
from ray.util.collective import backend_registry
from ray.util.collective.collective_group.base_collective_group import BaseGroup
from ray.util.collective.types import (
    AllReduceOptions,
    RecvOptions,
    ReduceOp,
    ReduceOptions,
    SendOptions,
)

import colltensor as col
import colltensor.ray

Spawn = Callable[..., Any]


class Worker(Member):
    """Registers itself; with a setup hook Ray does that in every worker of a job, as in the program at the end."""

    def __init__(self) -> None:
        colltensor.ray.register()


@pytest.fixture(scope="module")
def workers(cluster: Cluster) -> Iterator[list[Any]]:
    """Two actors that registered, as did this process, which declares."""
    colltensor.ray.register()
    remote = ray.remote(num_cpus=0, resources={FIRST_NODE: 0.01})(Worker)
    actors = [remote.remote() for _ in range(2)]
    yield actors
    for actor in actors:
        ray.kill(actor)


def run(actors: list[Any], function: Callable[..., Any], *args: Any) -> list[Any]:
    return ray.get(
        [actor.run.remote(function, rank, *args) for rank, actor in enumerate(actors)], timeout=60
    )


def outcomes(actors: list[Any], function: Callable[..., Any], *args: Any) -> list[Any]:
    return [
        outcome(call)
        for call in [actor.run.remote(function, rank, *args) for rank, actor in enumerate(actors)]
    ]


def init(rank: int, name: str, backend: str = "COLLTENSOR") -> None:
    collective.init_collective_group(2, rank, backend, name)


def destroy(rank: int, name: str) -> None:
    collective.destroy_collective_group(name)


@pytest.fixture
def name(workers: list[Any]) -> Iterator[str]:
    """A group of the workers, which Ray's API made."""
    made = new_name()
    run(workers, init, made)
    yield made
    run(workers, destroy, made)


def made_by(kind: str, values: Any) -> Any:
    import torch

    return {"numpy": np.array, "torch": torch.tensor}[kind](values)


def every_operation(rank: int, name: str, kind: str) -> dict[str, Any]:
    """What each of Ray's functions leaves in the tensors, as lists."""
    found: dict[str, Any] = {
        "rank": collective.get_rank(name),
        "size": collective.get_collective_group_size(name),
    }
    for op in ReduceOp:
        found[op.name] = made_by(kind, [rank + 2.0, 3.0 - rank])
        collective.allreduce(found[op.name], name, op)
    found["reduce"] = made_by(kind, [rank + 1, 10])
    collective.reduce(found["reduce"], 1, name, ReduceOp.PRODUCT)
    found["broadcast"] = made_by(kind, [rank, rank + 5])
    collective.broadcast(found["broadcast"], 1, name)
    gathered = [made_by(kind, [0, 0]) for _ in range(2)]
    collective.allgather(gathered, made_by(kind, [rank, 7 + rank]), name)
    pieces = [made_by(kind, [rank + 1.0]), made_by(kind, [rank + 10.0])]
    found["reducescatter"] = made_by(kind, [0.0])
    collective.reducescatter(found["reducescatter"], pieces, name)
    found["moved"] = made_by(kind, [rank + 40])
    if rank == 0:
        collective.send(found["moved"], 1, name)
    else:
        collective.recv(found["moved"], 0, name)
    collective.barrier(name)
    lists = {"allgather": gathered, "pieces": pieces}
    return {
        key: value.tolist() if hasattr(value, "tolist") else value for key, value in found.items()
    } | {key: [tensor.tolist() for tensor in tensors] for key, tensors in lists.items()}


def expected_of_every_operation(rank: int) -> dict[str, Any]:
    return {
        "rank": rank, "size": 2, "SUM": [5.0, 5.0], "PRODUCT": [6.0, 6.0], "MIN": [2.0, 2.0], "MAX": [3.0, 3.0],
        "reduce": [2, 100] if rank == 1 else [1, 10], "broadcast": [1, 6], "reducescatter": [[3.0], [21.0]][rank],
        "moved": [40], "allgather": [[0, 7], [1, 8]], "pieces": [[rank + 1.0], [rank + 10.0]],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_every_operation(workers: list[Any], name: str, kind: str) -> None:
    found = run(workers, every_operation, name, kind)
    assert found == [expected_of_every_operation(rank) for rank in range(2)]


@pytest.mark.parametrize("again", range(2))
def test_a_declared_group(workers: list[Any], again: int) -> None:
    """Ray makes it in every actor at its first call; its detached actor is gone when the group is destroyed."""
    collective.create_collective_group(workers, 2, [0, 1], "COLLTENSOR", "declared in Ray")
    found = run(workers, every_operation, "declared in Ray", "numpy")
    for rank in range(2):
        expected = expected_of_every_operation(rank)
        assert {key: found[rank][key] for key in expected if key not in ("rank", "size")} == {
            key: value for key, value in expected.items() if key not in ("rank", "size")
        }
    run(workers, destroy, "declared in Ray")
    await_end_of_declaration("declared in Ray")


@contextlib.contextmanager
def as_if_cupy_were_here() -> Iterator[None]:
    """Ray's functions of several devices ask for CuPy before they call a group; ours needs none for CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collective.types, "cupy_available", lambda: True)
        yield


@as_if_cupy_were_here()
def of_one_device(rank: int, name: str) -> list[Any]:
    """The forms of several GPUs, with the one CPU tensor that a process may bring."""
    summed, rooted, told = np.full(2, rank + 1.0), np.full(2, rank + 1.0), np.full(2, float(rank))
    collective.allreduce_multigpu([summed], name, ReduceOp.MAX)
    collective.reduce_multigpu([rooted], 0, 0, name)
    collective.broadcast_multigpu([told], 1, 0, name)
    gathered, piece = [np.zeros(1), np.zeros(1)], np.zeros(1)
    collective.allgather_multigpu([gathered], [np.full(1, rank + 1.0)], name)
    collective.reducescatter_multigpu(
        [piece], [[np.full(1, rank + 1.0), np.full(1, rank + 2.0)]], name
    )
    moved = np.arange(4.0) + 10 * rank
    if rank == 0:
        collective.send_multigpu(moved, 1, 0, name, 2)
    else:
        collective.recv_multigpu(moved, 0, 0, name, 2)
    return [array.tolist() for array in (summed, rooted, told, *gathered, piece, moved)]


def test_the_forms_of_several_devices(workers: list[Any], name: str) -> None:
    first, second = run(workers, of_one_device, name)
    assert first == [[2.0] * 2, [3.0] * 2, [1.0] * 2, [1.0], [2.0], [3.0], [0.0, 1.0, 2.0, 3.0]]
    assert second == [[2.0] * 2, [2.0] * 2, [1.0] * 2, [1.0], [2.0], [5.0], [0.0, 1.0, 12.0, 13.0]]
    for error in errors_of(outcomes(workers, of_two_devices, name), col.DeviceError):
        assert "CUDA" in str(error)


@as_if_cupy_were_here()
def of_two_devices(rank: int, name: str) -> None:
    collective.allreduce_multigpu([np.ones(2), np.ones(2)], name)


def through_the_handle(rank: int, name: str) -> list[Any]:
    """JAX arrays, which Ray's functions refuse; and a pytree."""
    import jax.numpy as jnp

    handle = collective.get_group_handle(name)
    given = jnp.full(2, rank + 1.0)
    (listed,) = handle.allreduce([given])
    told = handle.broadcast(given)
    gathered: list[Any] = [jnp.zeros(2), jnp.zeros(2)]
    handle.allgather([gathered], [given])
    piece = handle.reducescatter(jnp.zeros(2), [given, given])
    tree = handle.allreduce({"a": given, "b": (np.full(1, 2.0),)})
    options = SendOptions() if rank == 0 else RecvOptions()
    options.dst_rank, options.src_rank = 1, 0
    moved = handle.send(given, options) if rank == 0 else handle.recv(given, options)
    handle.barrier()
    assert given.tolist() == [rank + 1.0] * 2
    assert (handle.rank, handle.world_size, handle.group_name) == (rank, 2, name)
    assert col.get_group_handle(name) is handle.group
    return [
        array.tolist() for array in (listed, told, *gathered, piece, tree["a"], tree["b"][0], moved)
    ]


def test_jax_through_the_handle(workers: list[Any], name: str) -> None:
    expected = [[3.0] * 2, [1.0] * 2, [1.0] * 2, [2.0] * 2, [3.0] * 2, [3.0] * 2, [4.0], [1.0] * 2]
    assert run(workers, through_the_handle, name) == [expected] * 2


Greatest: Any = type("Greatest", (AllReduceOptions,), {"reduceOp": ReduceOp.MAX})


def ops_of_options(rank: int, name: str) -> list[float]:
    """Ray's ``allreduce`` leaves its op in the class of its options; the next call does not take it from there."""
    handle = collective.get_group_handle(name)
    collective.allreduce(np.ones(1), name, ReduceOp.MIN)
    assert AllReduceOptions().reduceOp is ReduceOp.MIN
    product = AllReduceOptions()
    product.reduceOp = ReduceOp.PRODUCT
    found = []
    for arguments in ((), (None,), (AllReduceOptions(),), (product,), (Greatest(),), (Greatest,)):
        found += handle.allreduce([np.full(1, rank + 2.0)], *arguments)
    rooted = ReduceOptions()
    rooted.root_rank = 1
    found.append(handle.reduce(np.full(1, rank + 2.0), rooted))
    return [float(array[0]) for array in found]


def test_the_objects_of_options(workers: list[Any], name: str) -> None:
    assert run(workers, ops_of_options, name) == [
        [5.0, 5.0, 5.0, 6.0, 3.0, 3.0, root] for root in (2.0, 5.0)
    ]


def misuse(rank: int, name: str) -> None:
    """What this rank is told before anything moves; the group goes on."""
    import datetime

    handle = collective.get_group_handle(name)
    hurried = AllReduceOptions()
    hurried.timeout_ms = datetime.timedelta(milliseconds=5)
    read_only = np.ones(2)
    read_only.flags.writeable = False
    with pytest.raises(col.OptionError, match=r"register\(timeout_s="):
        handle.allreduce([np.ones(2)], hurried)
    with pytest.raises(col.ReadOnlyError):
        collective.allreduce(read_only, name)
    with pytest.raises(col.RankError):
        handle.send(np.ones(2), None)
    with pytest.raises(col.RankError):
        handle.recv([np.ones(2)], RecvOptions())
    with pytest.raises(col.OptionError, match=r"send: tensor: .*\b2$"):
        handle.send([np.ones(2)] * 2, SendOptions())
    for wrong in (np.ones((2, 2)).T, np.ones(2)):
        with as_if_cupy_were_here(), pytest.raises(col.OptionError, match="n_elements=3: "):
            collective.send_multigpu(wrong, 1 - rank, 0, name, 3)
    with pytest.raises(ValueError, match=r"rank '2' .*'2'"):
        collective.broadcast(np.ones(2), 2, name)
    with pytest.raises(RuntimeError, match="initialize"):
        collective.init_collective_group(2, rank, "COLLTENSOR", name)
    with pytest.raises(col.MismatchError):
        collective.allreduce(np.ones(2 + rank), name)
    strided = np.arange(6.0)
    collective.allreduce(strided[::2], name)
    assert strided.tolist() == [0.0, 1.0, 4.0, 3.0, 8.0, 5.0]


def test_errors_are_ours(workers: list[Any], name: str) -> None:
    run(workers, misuse, name)


def transports(rank: int, name: str) -> str:
    init(rank, name, "colltensor_gloo")
    backend: str = collective.get_group_handle(name).group.backend
    collective.destroy_collective_group(name)
    assert not col.is_group_initialized(name)
    assert not collective.is_backend_available("COLLTENSOR_NCCL")
    assert not hasattr(collective.types.Backend, "COLLTENSOR_LOOPBACK")
    with pytest.raises(RuntimeError, match="COLLTENSOR_NCCL"):
        init(rank, name, "COLLTENSOR_NCCL")
    return backend


def test_a_name_for_every_backend(workers: list[Any]) -> None:
    assert run(workers, transports, new_name()) == ["gloo"] * 2


def test_a_peer_that_does_not_come_is_named_in_time(workers: list[Any]) -> None:
    made = new_name()
    began = time.monotonic()
    error = outcome(workers[1].run.remote(init_hurriedly, 1, made))
    assert isinstance(error, col.CollectiveTimeoutError)
    assert error.ranks == (0,)
    assert 1 <= time.monotonic() - began < 8
    run(workers, init, made)  # what failed left nothing behind
    assert run(workers, every_operation, made, "numpy")[1]["SUM"] == [5.0, 5.0]
    run(workers, destroy, made)


def init_hurriedly(rank: int, name: str) -> None:
    colltensor.ray.register(timeout_s=1)
    try:
        init(rank, name)
    finally:
        colltensor.ray.register()


def test_an_actor_dies_and_the_group_is_made_again(workers: list[Any], spawn: Spawn) -> None:
    """Declared again under its name, once a survivor has destroyed it."""
    mortal = spawn(Worker, max_restarts=1)
    actors = [workers[0], mortal]
    made = new_name()
    for survived in (False, True):
        collective.create_collective_group(actors, 2, [0, 1], "COLLTENSOR", made)
        assert run(actors, every_operation, made, "numpy")[0]["SUM"] == [5.0, 5.0]
        if survived:
            break
        kill_process(mortal, ray.get(mortal.pid.remote(), timeout=60))
        error = outcome(actors[0].run.remote(add_one, 0, made))
        assert isinstance(error, col.PeerLostError)
        assert error.ranks == (1,)
        run(actors[:1], destroy, made)
        await_end_of_declaration(made)
        await_restart(mortal)
    run(actors, destroy, made)


def await_restart(actor: Any) -> None:
    """Return when the actor answers again; until then Ray may refuse calls of it."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            ray.get(actor.pid.remote(), timeout=30)
            return
        except ray.exceptions.ActorUnavailableError:
            time.sleep(0.1)
    raise AssertionError("the actor did not come back in 30 s")


def await_end_of_declaration(name: str) -> None:
    """Return when this process has heard that Ray's actor for a group is dead; until then Ray refuses the name."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            ray.get_actor(f"info_{name}")
        except ValueError:
            return
        time.sleep(0.02)
    raise AssertionError(f"Ray still has its actor for group {name!r}")


def add_one(rank: int, name: str) -> None:
    collective.allreduce(np.ones(2), name)


def test_registering_again_and_over_others(
    workers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    colltensor.ray.register()
    with pytest.raises(col.OptionError, match="timeout_s"):
        colltensor.ray.register(timeout_s=0)
    monkeypatch.setitem(backend_registry._global_registry._map, "COLLTENSOR", BaseGroup)
    with pytest.raises(col.OptionError, match="COLLTENSOR"):
        colltensor.ray.register()


def test_our_package_for_ray_does_not_import_rays_api(cluster: Cluster) -> None:
    program = (
        "import sys, colltensor.ray; "
        "print(sorted({'torch', 'jax', 'cupy', 'ray.util.collective'} & {*sys.modules}))"
    )
    assert printed_by(program) == ["[]"]


PROGRAM = """
import numpy as np
import ray
import ray.util.collective as col


@ray.remote(num_cpus=0)
class Worker:
    def setup(self, world_size, rank, backend, name):
        col.init_collective_group(world_size, rank, backend, name)

    def compute(self, name):
        tensor = np.ones(3, np.float32)
        col.allreduce(tensor, name)
        return tensor.tolist(), type(col.get_group_handle(name)).__module__

    def teardown(self, name):
        col.destroy_collective_group(name)


@ray.remote(num_cpus=0)
def task(rank, backend):
    col.init_collective_group(2, rank, backend, "with a task")
    tensor = np.ones(3, np.float32)
    col.allreduce(tensor, "with a task")
    col.destroy_collective_group("with a task")
    return tensor.tolist()


ray.init(log_to_driver=False)
workers = [Worker.remote() for _ in range(2)]
ray.get([worker.setup.remote(2, rank, "GLOO", "made in the actors") for rank, worker in enumerate(workers)])
print(ray.get([worker.compute.remote("made in the actors") for worker in workers]))
ray.get([worker.teardown.remote("made in the actors") for worker in workers])
col.create_collective_group(workers, 2, [0, 1], backend="GLOO", group_name="declared")
print(ray.get([worker.compute.remote("declared") for worker in workers]))
ray.get([worker.teardown.remote("declared") for worker in workers])
workers[0].setup.remote(2, 0, "GLOO", "with a task")
print(ray.get([workers[0].compute.remote("with a task"), task.remote(1, "GLOO")])[1])
print(ray.util.list_named_actors(all_namespaces=True))
"""

REPLACED = {
    '"GLOO"': '"COLLTENSOR"',
    "ray.init(log_to_driver=False)": "colltensor.ray.register()\n"
    'ray.init(log_to_driver=False, runtime_env={"worker_process_setup_hook": "colltensor.ray.register"})',
    "import ray.util.collective as col": "import ray.util.collective as col\nimport colltensor.ray",
}


def test_a_program_runs_on_us_with_a_setup_hook(cluster: Cluster) -> None:
    program = PROGRAM
    for theirs, ours in REPLACED.items():
        assert theirs in program
        program = program.replace(theirs, ours)
    found = str([([2.0] * 3, "colltensor.ray.base_group")] * 2)
    assert printed_by(program, RAY_ADDRESS=cluster.address) == [found, found, str([2.0] * 3), "[]"]


def printed_by(program: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Ray's own remarks
    return [line for line in done.stdout.splitlines() if "(raylet)" not in line]
