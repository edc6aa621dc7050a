"""Ranks that meet through Ray: in actors, tasks and the driver; and what becomes of it when one dies or stays away."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from crew import (
    Crew,
    Member,
    await_named_actor,
    errors_of,
    has_group,
    join,
    kill_process,
    leave,
    named_actors,
    new_name,
    outcome,
)
from ray.cluster_utils import Cluster

import colltensor as col

Spawn = Callable[..., Any]


def total(rank: int, name: str) -> list[float]:
    return col.allreduce(np.full(2, rank + 1.0), name).tolist()


def meet_and_add(rank: int, world_size: int, name: str) -> list[float]:
    """A rank's whole life."""
    join(rank, world_size, name)
    try:
        return total(rank, name)
    finally:
        leave(rank, name)


def test_tasks_meet(cluster: object) -> None:
    task = ray.remote(num_cpus=0)(meet_and_add)
    name = new_name()
    assert (
        ray.get([task.remote(rank, 2, name) for rank in range(2)], timeout=60) == [[3.0, 3.0]] * 2
    )


@pytest.mark.parametrize("driver", [0, 1])
def test_the_driver_is_a_rank(crew: Crew, driver: int) -> None:
    name = new_name()
    call = crew.actors[0].run.remote(meet_and_add, 1 - driver, 2, name)
    assert meet_and_add(driver, 2, name) == [3.0, 3.0]
    assert ray.get(call, timeout=60) == [3.0, 3.0]


def test_one_rank_alone(crew: Crew) -> None:
    assert crew.run(1, meet_and_add, 1, new_name()) == [[1.0, 1.0]]


@pytest.mark.parametrize(
    "name",
    ["grüße/%s\n../..", "x" * 1024, " ", "colltensor:"],
    ids=["odd", "long", "space", "colon"],
)
def test_names_of_every_kind(crew: Crew, name: str) -> None:
    assert crew.run(2, meet_and_add, 2, name) == [[3.0, 3.0]] * 2


def meet_many(rank: int, names: list[str], world_size: int) -> list[list[float]]:
    """Meet in as many groups at once, from threads, in an order of each rank's own."""
    found: dict[str, list[float]] = {}

    def meet(name: str) -> None:
        found[name] = meet_and_add(rank, world_size, name)

    threads = [
        threading.Thread(target=meet, args=(name,))
        for name in (names if rank % 2 else reversed(names))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[name] for name in names]


def test_groups_made_at_once_by_threads(crew: Crew) -> None:
    names = [new_name() for _ in range(4)]
    assert crew.run(3, meet_many, names, 3) == [[[6.0, 6.0]] * 4] * 3


def meet_repeatedly(rank: int, world_size: int, name: str, times: int) -> list[list[float]]:
    return [meet_and_add(rank, world_size, name) for _ in range(times)]


def test_one_name_again_and_again(crew: Crew) -> None:
    assert crew.run(3, meet_repeatedly, 3, new_name(), 3) == [[[6.0, 6.0]] * 3] * 3


def test_rank_0_dies_during_the_rendezvous(crew: Crew, spawn: Spawn) -> None:
    name = new_name()
    doomed = spawn(Member)
    pid = ray.get(doomed.pid.remote(), timeout=60)
    doomed.run.remote(join, 0, 3, name)
    waiting = crew.actors[1].run.remote(join, 1, 3, name, timeout_s=4)
    await_named_actor()
    time.sleep(1.5)
    os.kill(pid, 9)
    began = time.monotonic()
    error = outcome(waiting)
    # Lost, where the rank was in the meeting already; late, where it was still looking for rank 0.
    assert isinstance(error, (col.PeerLostError, col.CollectiveTimeoutError)), error
    assert error.ranks == (0,)
    assert time.monotonic() - began < 10
    assert crew.run(2, has_group, name) == [False] * 2
    assert crew.run(3, meet_and_add, 3, name) == [[6.0, 6.0]] * 3


def test_rank_0_dies_and_another_takes_its_place(crew: Crew, spawn: Spawn) -> None:
    """A rank that looks for rank 0 finds the second one, whatever the first left."""
    name = new_name()
    doomed = spawn(Member)
    pid = ray.get(doomed.pid.remote(), timeout=60)
    doomed.run.remote(join, 0, 2, name)
    await_named_actor()
    os.kill(pid, 9)
    assert crew.run(2, meet_and_add, 2, name) == [[3.0, 3.0]] * 2


def test_another_rank_dies_during_the_rendezvous(crew: Crew, spawn: Spawn) -> None:
    name = new_name()
    began = time.monotonic()
    waiting = crew.actors[0].run.remote(join, 0, 3, name)
    spawn(Member).run.remote(die_in_the_meeting, 1, 3, name)
    error = outcome(waiting)
    assert isinstance(error, col.PeerLostError), error
    assert error.ranks == (1,)
    assert time.monotonic() - began < 20
    assert crew.run(2, meet_and_add, 2, name) == [[3.0, 3.0]] * 2


def die_in_the_meeting(rank: int, world_size: int, name: str) -> None:
    """Find rank 0, introduce oneself, and crash."""
    from colltensor.rendezvous.tcp import ClientExchange

    assert callable(ClientExchange._heard)
    ClientExchange._heard = lambda *arguments: os._exit(1)  # type: ignore[method-assign]
    join(rank, world_size, name)


def test_a_driver_that_is_rank_0_crashes(crew: Crew, cluster: Cluster) -> None:
    name = new_name()
    program = f"import ray, crew; ray.init(log_to_driver=False); crew.join(0, 2, {name!r})"
    folders = [str(Path(__file__).parent), str(Path(col.__file__).parent.parent)]
    environment = {
        **os.environ,
        "RAY_ADDRESS": cluster.address,
        "PYTHONPATH": os.pathsep.join(folders),
    }
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL
    ) as driver:
        await_named_actor()
        driver.kill()
    assert named_actors() == []


def test_a_rank_that_never_comes_is_named(crew: Crew) -> None:
    name = new_name()
    began = time.monotonic()
    calls = [crew.actors[rank].run.remote(join_briefly, rank, 4, name) for rank in (0, 1, 3)]
    for error in errors_of([outcome(call) for call in calls], col.CollectiveTimeoutError):
        assert error.ranks == (2,)
    assert time.monotonic() - began < 15
    assert named_actors() == []
    assert crew.run(4, meet_and_add, 4, name) == [[10.0, 10.0]] * 4


def test_a_rank_0_that_never_comes_is_named(crew: Crew) -> None:
    name = new_name()
    began = time.monotonic()
    error = outcome(crew.actors[1].run.remote(join_briefly, 1, 2, name))
    assert isinstance(error, col.CollectiveTimeoutError)
    assert error.ranks == (0,)
    assert f"colltensor:{name}" in str(error)
    assert 3 <= time.monotonic() - began < 10
    assert crew.run(2, meet_and_add, 2, name) == [[3.0, 3.0]] * 2


def join_briefly(rank: int, world_size: int, name: str) -> None:
    join(rank, world_size, name, timeout_s=3)


def test_two_ranks_0(crew: Crew) -> None:
    name = new_name()
    began = time.monotonic()
    calls = [crew.actors[0].run.remote(join, 0, 3, name)]
    await_named_actor()
    calls.append(crew.actors[1].run.remote(join, 0, 3, name))
    for error in errors_of([outcome(call) for call in calls], col.RankError):
        assert re.search(r" of 3: .*\brank 0 ", str(error))
    assert time.monotonic() - began < 25
    assert crew.run(3, meet_and_add, 3, name) == [[6.0, 6.0]] * 3


def test_ranks_that_disagree_about_the_group(crew: Crew) -> None:
    name = new_name()
    calls = [
        actor.run.remote(join, rank, 2 + rank, name) for rank, actor in enumerate(crew.actors[:2])
    ]
    for error in errors_of([outcome(call) for call in calls], col.MismatchError):
        assert error.ranks == (1,)


def test_an_actor_of_somebody_else_has_the_name(crew: Crew) -> None:
    name = new_name()
    squatter = ray.remote(num_cpus=0)(Member).options(name=f"colltensor:{name}").remote()
    try:
        ray.get(squatter.pid.remote(), timeout=60)
        calls = crew.start(2, join, 2, name)
        for error in errors_of([outcome(call) for call in calls], col.OptionError):
            assert f"group_name: the actor 'colltensor:{name}" in str(error)
    finally:
        ray.kill(squatter)


def test_a_member_dies_and_the_group_is_made_again(crew: Crew, spawn: Spawn) -> None:
    name = new_name()
    mortal = spawn(Member)
    ray.get(
        [
            actor.run.remote(join, rank, 2, name)
            for rank, actor in enumerate((crew.actors[0], mortal))
        ],
        timeout=60,
    )
    pid = ray.get(mortal.pid.remote(), timeout=60)
    waiting = crew.actors[0].run.remote(total, 0, name)
    time.sleep(0.3)
    began = time.monotonic()
    kill_process(mortal, pid)
    error = outcome(waiting)
    assert isinstance(error, col.PeerLostError), error
    assert error.ranks == (1,)
    assert time.monotonic() - began < 10
    crew.run(1, leave, name)
    assert crew.run(2, meet_and_add, 2, name) == [[3.0, 3.0]] * 2


def test_rank_0_of_a_finished_meeting_dies(crew: Crew, spawn: Spawn) -> None:
    name = new_name()
    mortal = spawn(Member)
    ray.get(
        [
            actor.run.remote(join, rank, 2, name)
            for rank, actor in enumerate((mortal, crew.actors[0]))
        ],
        timeout=60,
    )
    assert named_actors() == []
    kill_process(mortal, ray.get(mortal.pid.remote(), timeout=60))
    error = outcome(crew.actors[0].run.remote(total, 1, name))
    assert isinstance(error, col.PeerLostError), error
    assert error.ranks == (0,)
    crew.run(1, leave, name)
    assert crew.run(2, meet_and_add, 2, name) == [[3.0, 3.0]] * 2
