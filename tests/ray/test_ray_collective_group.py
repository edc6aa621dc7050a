"""``with col.collective_group(actors)``, ranks by node, and actors that are placed for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from crew import FIRST_NODE, SECOND_NODE, Crew, Member, has_group, hold, new_name
from ray.util import placement_group_table

import colltensor as col
from colltensor.ray import placed_actors

Spawn = Callable[..., Any]


def total(rank: int, name: str = "default") -> list[float]:
    return col.allreduce(np.full(2, rank + 1.0), name).tolist()


def rank_and_backend(rank: int, name: str) -> tuple[int, str]:
    return col.get_rank(name), col.get_group_handle(name).backend


def in_each(actors: Any, function: Callable[..., Any], *args: Any) -> list[Any]:
    return ray.get(
        [actor.run.remote(function, rank, *args) for rank, actor in enumerate(actors)], timeout=60
    )


def test_ranks_of_one_node_are_neighbours(crew: Crew) -> None:
    """The crew's actors are on the two nodes in turn."""
    with col.collective_group(crew.actors, timeout_s=20) as group:
        assert list(group.actors) == [crew.actors[number] for number in (0, 2, 1, 3)]
        assert in_each(group.actors, rank_and_backend, group.name) == [
            (rank, "hierarchical") for rank in range(4)
        ]
        assert (group.name, group.world_size) == ("default", 4)
        assert in_each(group.actors, total) == [[10.0] * 2] * 4
    assert crew.run(4, has_group, "default") == [False] * 4


def test_ranks_that_are_given_are_kept(crew: Crew) -> None:
    with col.collective_group(crew.actors[:3], "gloo", new_name(), ranks=[2, 0, 1]) as group:
        assert list(group.actors) == [crew.actors[number] for number in (1, 2, 0)]
        assert in_each(group.actors, rank_and_backend, group.name) == [
            (rank, "gloo") for rank in range(3)
        ]


def test_groups_without_a_name_and_actors_in_several(crew: Crew) -> None:
    with (
        col.collective_group(crew.actors[:2], group_name=None) as one,
        col.collective_group(crew.actors[1:3], group_name=None) as two,
        col.collective_group(crew.actors[:3]) as three,
    ):
        assert len({one.name, two.name, three.name}) == 3
        for group in (two, three, one):
            assert in_each(group.actors, total, group.name) == [
                [sum(range(group.world_size + 1))] * 2
            ] * len(group.actors)
    assert [crew.run(3, has_group, group.name) for group in (one, two, three)] == [[False] * 3] * 3


def raise_in_block(crew: Crew, name: str, error: BaseException) -> None:
    with col.collective_group(crew.actors[:2], group_name=name):
        assert crew.run(1, has_group, name) == [True]
        raise error


def test_a_block_that_raises(crew: Crew) -> None:
    name = new_name()
    with pytest.raises(ZeroDivisionError):
        raise_in_block(crew, name, ZeroDivisionError())
    assert crew.run(2, has_group, name) == [False] * 2


def test_a_block_that_is_interrupted_while_an_actor_is_busy(
    crew: Crew, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the block raised is what the caller gets, at once; the group goes when the actor comes to it."""
    name, gate = new_name(), tmp_path / "gate"

    def interrupt() -> None:
        with col.collective_group(crew.actors[:2], group_name=name):
            busy.append(crew.actors[1].run.remote(hold, 1, gate))
            began.append(time.monotonic())
            raise KeyboardInterrupt

    busy: list[Any] = []
    began: list[float] = []
    with caplog.at_level(logging.WARNING, "colltensor"), pytest.raises(KeyboardInterrupt):
        interrupt()
    assert time.monotonic() - began[0] < 2
    assert f"group '{name}' (driver): " in caplog.text
    gate.touch()
    ray.get(busy, timeout=60)
    assert crew.run(2, has_group, name) == [False] * 2


def test_an_end_that_an_actor_is_late_for_is_an_error(crew: Crew, tmp_path: Path) -> None:
    name, gate = new_name(), tmp_path / "gate"
    group = col.collective_group(crew.actors[:2], group_name=name)
    busy = crew.actors[1].run.remote(hold, 1, gate)
    with pytest.raises(col.CollectiveTimeoutError) as caught:
        group.destroy(timeout_s=0.5)
    assert caught.value.ranks == (1,)
    gate.touch()
    ray.get(busy, timeout=60)
    assert crew.run(2, has_group, name) == [False] * 2


def test_an_actor_that_cannot_be_located_is_named(crew: Crew, spawn: Spawn) -> None:
    """No rank is settled yet: the error tells its position in the list."""
    nowhere = spawn(Member, resources={"no_node_has_it": 1})
    with pytest.raises(col.CollectiveTimeoutError, match=r"\bposition 1\b") as caught:
        col.collective_group([crew.actors[0], nowhere], timeout_s=1)
    assert caught.value.ranks == (1,)


def test_drivers_threads_declare_groups_at_once(crew: Crew) -> None:
    """Of one name for different actors, and of different names for the same ones."""
    failed: list[BaseException] = []

    def declare(actors: list[Any], name: str) -> None:
        try:
            for _ in range(2):
                with col.collective_group(actors, group_name=name) as group:
                    assert in_each(group.actors, has_group, name) == [True] * 2
        except BaseException as error:
            failed.append(error)

    share = new_name()
    work = [(crew.actors[:2], share), (crew.actors[2:], share), (crew.actors[1:3], new_name())]
    threads = [threading.Thread(target=declare, args=item) for item in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


class Placed(Member):
    """Tells how it was made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.made_with = (args, kwargs)

    def where(self) -> tuple[str, Any]:
        return ray.get_runtime_context().get_node_id(), self.made_with


def states() -> list[str]:
    """The states of the placement groups that are not removed, once those that are going had a moment for it."""
    deadline = time.monotonic() + 5
    while found := [
        entry["state"] for entry in placement_group_table().values() if entry["state"] != "REMOVED"
    ]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return found


def await_free_nodes() -> None:
    """Return when nothing is reserved any more, of which Ray hears a moment after a group is removed."""
    deadline = time.monotonic() + 10
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.1)


@pytest.mark.parametrize(("strategy", "nodes"), [("PACK", 1), ("SPREAD", 2)])
def test_placed_actors(crew: Crew, strategy: str, nodes: int) -> None:
    await_free_nodes()
    options = {"strategy": strategy, "num_cpus": 0.25, "max_restarts": 1}
    with placed_actors(
        ray.remote(Placed), 4, lambda place: (place, "x"), {"key": 1}, **options
    ) as actors:
        told = ray.get([actor.where.remote() for actor in actors], timeout=60)
        assert [made for _, made in told] == [((place, "x"), {"key": 1}) for place in range(4)]
        found = [node for node, _ in told]
        assert len(set(found)) == nodes
        assert found == sorted(found)
        with col.collective_group(actors) as group:
            assert list(group.actors) == actors
            assert in_each(group.actors, total) == [[10.0] * 2] * 4
    assert states() == []
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(actors[0].where.remote(), timeout=60)


def test_a_block_of_placed_actors_that_raises(crew: Crew) -> None:
    with pytest.raises(ZeroDivisionError), placed_actors(ray.remote(Placed), 1, num_cpus=0.1):
        raise ZeroDivisionError
    assert states() == []


def test_a_cluster_without_room(crew: Crew) -> None:
    began = time.monotonic()
    with pytest.raises(col.CollectiveTimeoutError, match=r"placed_actors: .*\b1 s: .*ray status"):
        placed_actors(ray.remote(Placed), 2, resources={FIRST_NODE: 0.9}, timeout_s=1).__enter__()
    assert time.monotonic() - began < 5
    assert states() == []


WRONG: list[Any] = [
    pytest.param((Placed, 1), {}, r"actor_class: .*ray\.remote", id="plain class"),
    pytest.param((ray.remote(Placed), 0), {}, r"count: .*\b0$", id="none"),
    pytest.param(
        (ray.remote(Placed), 1), {"strategy": "STACK"}, "strategy: .*'STACK'", id="strategy"
    ),
    pytest.param(
        (ray.remote(Placed), 1),
        {"num_cpus": 0},
        r"placed_actors: .*'CPU': 0\b",
        id="nothing reserved",
    ),
    pytest.param(
        (ray.remote(Placed), 1),
        {"resources": {SECOND_NODE: -1}},
        rf"placed_actors: .*'{SECOND_NODE}': -1\b",
        id="negative",
    ),
]


@pytest.mark.parametrize(("arguments", "options", "says"), WRONG)
def test_placed_actors_with_arguments_that_ray_cannot_use(
    crew: Crew, arguments: tuple[Any, ...], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        placed_actors(*arguments, **options).__enter__()
    assert isinstance(caught.value, col.CollectiveError)
    assert states() == []
