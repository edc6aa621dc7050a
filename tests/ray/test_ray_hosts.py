"""Two of Ray's nodes are two hosts: "auto" is hierarchical there, and what Ray says of the nodes can be overruled."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import ray
from crew import Crew, leave, new_name

import colltensor as col
from colltensor.backends import is_available, reason

pytestmark = [
    pytest.mark.gloo,
    pytest.mark.needs("torch"),
    pytest.mark.skipif(not is_available("shm"), reason=str(reason("shm"))),
]

VARIABLE = "COLLTENSOR_HOST_ID"


def node(rank: int) -> str:
    return ray.get_runtime_context().get_node_id()


def sums(rank: int, name: str) -> tuple[str, list[float]]:
    """The group's backend, and sums of arrays of one step and of many."""
    group = col.get_group_handle(name)
    return group.backend, [
        float(col.allreduce(np.full(n, rank + 1.0), name)[-1]) for n in (3, 100_000, 3_000_001)
    ]


def meet(rank: int, world_size: int, name: str, host: str | None) -> tuple[str, list[float]]:
    """A rank's whole life on "auto"."""
    before = os.environ.get(VARIABLE)
    if host is not None:
        os.environ[VARIABLE] = host
    try:
        col.init_collective_group(world_size, rank, group_name=name)
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before
    try:
        return sums(rank, name)
    finally:
        leave(rank, name)


def test_two_actors_on_each_of_two_nodes(crew: Crew) -> None:
    """They are interleaved: the crew's actors lie on the nodes in turn."""
    nodes = crew.run(4, node)
    assert nodes[0] == nodes[2] != nodes[1] == nodes[3]
    assert crew.run(4, meet, 4, new_name(), None) == [("hierarchical", [10.0] * 3)] * 4


def test_one_actor_on_each_node(crew: Crew) -> None:
    assert crew.run(2, meet, 2, new_name(), None) == [("gloo", [3.0] * 3)] * 2


def test_actors_of_one_node(crew: Crew) -> None:
    """Ranks 0 and 1 are the crew's first and third actor."""
    name = new_name()
    calls = [
        actor.run.remote(meet, rank, 2, name, None) for rank, actor in enumerate(crew.actors[::2])
    ]
    assert ray.get(calls, timeout=60) == [("shm", [3.0] * 3)] * 2


def test_the_variable_overrules_ray(crew: Crew) -> None:
    assert crew.run(4, meet, 4, new_name(), "one machine") == [("shm", [10.0] * 3)] * 4


def test_a_group_declared_by_the_driver(crew: Crew) -> None:
    with crew.group(4) as name:
        assert crew.run(4, sums, name) == [("hierarchical", [10.0] * 3)] * 4


def split(rank: int, name: str, color: Callable[[int], Any]) -> tuple[str, float]:
    part = col.get_group_handle(name).split(color(rank))
    assert part is not None
    try:
        return part.backend, float(part.allreduce(np.full(70_000, rank + 1.0))[-1])
    finally:
        part.destroy()


def by_node(rank: int) -> int:
    return rank % 2


def by_half(rank: int) -> int:
    return rank // 2


def test_parts_of_a_group_know_their_nodes(crew: Crew) -> None:
    with crew.group(4) as name:
        assert crew.run(4, split, name, by_node) == [("shm", 4.0), ("shm", 6.0)] * 2
        assert crew.run(4, split, name, by_half) == [("gloo", 3.0)] * 2 + [("gloo", 7.0)] * 2
