"""Arrays of every framework, reduced in Ray actors on two nodes."""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
import pytest
import ray
from crew import Crew, has_group, join, leave, new_name

import colltensor as col

FRAMEWORKS = [
    "numpy",
    pytest.param("torch", marks=pytest.mark.needs("torch")),
    pytest.param("jax", marks=pytest.mark.needs("jax")),
]


def values(rank: int, count: int = 1001) -> np.ndarray[Any, Any]:
    """What a rank brings: unique by rank and index."""
    return np.arange(count, dtype=np.float32) + 10_000 * (rank + 1)


def make(framework: str, array: np.ndarray[Any, Any]) -> Any:
    if framework == "numpy":
        return array
    if framework == "torch":
        return importlib.import_module("torch").from_numpy(array)
    return importlib.import_module("jax.numpy").array(array)


def every_collective(
    rank: int, name: str, framework: str, world_size: int
) -> dict[str, np.ndarray[Any, Any]]:
    """Call the collectives; check here what only the process itself can see."""
    tensor = make(framework, values(rank))
    reduced = col.allreduce(tensor, name)
    assert (reduced is tensor) == (framework != "jax")
    assert type(reduced) is type(tensor)
    if framework == "jax":
        np.testing.assert_array_equal(np.asarray(tensor), values(rank))
    gathered = [make(framework, np.zeros(1001, np.float32)) for _ in range(world_size)]
    col.allgather(gathered, make(framework, values(rank)), name)
    blocks = [make(framework, values(10 * rank + block)) for block in range(world_size)]
    found = {
        "allreduce": reduced,
        "max": col.allreduce(make(framework, values(rank)), name, col.ReduceOp.MAX),
        "reduce": col.reduce(make(framework, values(rank)), 1, name),
        "broadcast": col.broadcast(make(framework, values(rank)), 1, name),
        "reducescatter": col.reducescatter(
            make(framework, np.zeros(1001, np.float32)), blocks, name
        ),
        **{f"allgather {source}": tensor for source, tensor in enumerate(gathered)},
    }
    if rank == 0:
        col.send(make(framework, values(7)), world_size - 1, name)
    elif rank == world_size - 1:
        found["recv"] = col.recv(make(framework, np.zeros(1001, np.float32)), 0, name)
    col.barrier(name)
    return {operation: np.asarray(tensor) for operation, tensor in found.items()}


def expected_of(rank: int, world_size: int) -> dict[str, np.ndarray[Any, Any]]:
    everyone = [values(source) for source in range(world_size)]
    total = np.sum(everyone, axis=0)
    found = {
        "allreduce": total,
        "max": everyone[-1],
        "reduce": total if rank == 1 else everyone[rank],
        "broadcast": everyone[1],
        "reducescatter": np.sum(
            [values(10 * source + rank) for source in range(world_size)], axis=0
        ),
        **{f"allgather {source}": array for source, array in enumerate(everyone)},
    }
    return {**found, "recv": values(7)} if rank == world_size - 1 else found


def check(results: list[dict[str, np.ndarray[Any, Any]]], world_size: int) -> None:
    for rank, found in enumerate(results):
        expected = expected_of(rank, world_size)
        assert found.keys() == expected.keys()
        for operation, array in found.items():
            np.testing.assert_array_equal(
                array, expected[operation], err_msg=f"{operation} on rank {rank}"
            )


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_collectives_in_actors_that_init_themselves(crew: Crew, framework: str) -> None:
    name = new_name()
    crew.run(2, join, 2, name)
    check(crew.run(2, every_collective, name, framework, 2), 2)
    crew.run(2, leave, name)
    assert crew.run(2, has_group, name) == [False, False]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_collectives_in_actors_that_the_driver_declares(crew: Crew, framework: str) -> None:
    with crew.group(2) as name:
        check(crew.run(2, every_collective, name, framework, 2), 2)


@pytest.mark.needs("torch", "jax")
def test_one_group_of_three_frameworks(crew: Crew) -> None:
    frameworks = ("torch", "jax", "numpy")
    with crew.group(3) as name:
        calls = [
            actor.run.remote(every_collective, rank, name, frameworks[rank], 3)
            for rank, actor in enumerate(crew.actors[:3])
        ]
        check(ray.get(calls, timeout=60), 3)


def node_id(rank: int) -> str:
    return str(ray.get_runtime_context().get_node_id())


def pretend_host(rank: int, name: str | None) -> None:
    """Have this process believe that it runs on a host of its own, as nodes usually do."""
    if name is None:
        del os.environ["COLLTENSOR_HOST_ID"]
    else:
        os.environ["COLLTENSOR_HOST_ID"] = f"{name}-{rank % 2}"


def test_ranks_on_two_nodes(crew: Crew) -> None:
    nodes = crew.run(4, node_id)
    assert nodes[0] == nodes[2] != nodes[1] == nodes[3]
    with crew.group(4) as name:
        check(crew.run(4, every_collective, name, "numpy", 4), 4)


@pytest.mark.parametrize("way", ["declared", "imperative"])
def test_ranks_on_two_hosts(crew: Crew, way: str) -> None:
    crew.run(4, pretend_host, "host")
    try:
        if way == "declared":
            with crew.group(4) as name:
                check(crew.run(4, every_collective, name, "numpy", 4), 4)
        else:
            name = new_name()
            crew.run(4, join, 4, name)
            check(crew.run(4, every_collective, name, "numpy", 4), 4)
            crew.run(4, leave, name)
    finally:
        crew.run(4, pretend_host, None)


def test_an_interface_for_the_group(crew: Crew) -> None:
    with crew.group(2, interface="127.0.0.1") as name:
        check(crew.run(2, every_collective, name, "numpy", 2), 2)
