"""Declared groups made again: after an actor died and Ray restarted it, and while the old group still has members."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from crew import Crew, Member, errors_of, has_group, hold, new_name, outcome

import colltensor as col

Spawn = Callable[..., Any]


def total(rank: int, name: str) -> list[float]:
    return col.allreduce(np.full(2, rank + 1.0), name).tolist()


def totals(actors: list[Any], name: str) -> list[Any]:
    return ray.get(
        [actor.run.remote(total, rank, name) for rank, actor in enumerate(actors)], timeout=60
    )


def test_a_group_is_made_anew_after_an_actor_was_killed_in_a_collective(
    crew: Crew, spawn: Spawn
) -> None:
    mortal = spawn(Member, max_restarts=1)
    actors = [crew.actors[0], mortal, crew.actors[1]]
    name = new_name()
    group = col.create_collective_group(actors, group_name=name)
    first = group.generation
    pid = ray.get(mortal.pid.remote(), timeout=60)
    waiting = [crew.actors[rank].run.remote(total, rank, name) for rank in (0, 1)]
    time.sleep(0.3)
    os.kill(pid, 9)
    for error in errors_of([outcome(call) for call in waiting], col.PeerLostError):
        assert error.ranks == (1,)
    began = time.monotonic()
    group.recreate()
    # Ray takes some two seconds to notice and to start a process
    assert time.monotonic() - began < 10
    assert group.generation > first
    assert ray.get(mortal.pid.remote(), timeout=60) != pid
    assert totals(actors, name) == [[6.0, 6.0]] * 3
    group.destroy()
    assert crew.run(2, has_group, name) == [False] * 2


def test_a_group_that_works_is_replaced_only_when_asked(crew: Crew) -> None:
    name = new_name()
    group = col.create_collective_group(crew.actors[:2], group_name=name)
    with pytest.raises(col.GroupError, match=r"destroy_collective_group\(\)"):
        col.create_collective_group(crew.actors[:2], group_name=name)
    assert crew.run(2, total, name) == [[3.0, 3.0]] * 2
    kept = crew.run(2, keep, name)
    group.recreate()
    assert crew.run(2, total, name) == [[3.0, 3.0]] * 2
    assert all("init_collective_group()" in text for text in crew.run(2, use_kept, name)), kept
    group.destroy()
    group.recreate()  # as well as one that is gone
    assert crew.run(2, total, name) == [[3.0, 3.0]] * 2
    group.destroy()


kept: dict[str, col.Group] = {}


def keep(rank: int, name: str) -> str:
    kept[name] = col.get_group_handle(name)
    return repr(kept[name])


def use_kept(rank: int, name: str) -> str:
    """Call on the group of the generation before."""
    with pytest.raises(col.GroupError) as caught:
        kept.pop(name).allreduce(np.ones(2))
    return str(caught.value)


def test_a_broken_group_is_replaced_without_its_handle(crew: Crew, spawn: Spawn) -> None:
    """A driver that lost the handle declares the group again; the actors know that theirs is broken."""
    mortal = spawn(Member, max_restarts=1)
    name = new_name()
    col.create_collective_group([crew.actors[0], mortal], group_name=name)
    pid = ray.get(mortal.pid.remote(), timeout=60)
    waiting = crew.actors[0].run.remote(total, 0, name)
    time.sleep(0.3)
    os.kill(pid, 9)
    errors_of([outcome(waiting)], col.PeerLostError)
    with col.collective_group([crew.actors[0], mortal], group_name=name) as group:
        assert totals(list(group.actors), name) == [[3.0, 3.0]] * 2
    assert crew.run(1, has_group, name) == [False]


def test_an_actor_that_does_not_come_back_is_named(crew: Crew, spawn: Spawn) -> None:
    mortal = spawn(Member)
    name = new_name()
    group = col.create_collective_group([crew.actors[0], mortal], group_name=name)
    os.kill(ray.get(mortal.pid.remote(), timeout=60), 9)
    began = time.monotonic()
    with pytest.raises(col.PeerLostError) as caught:
        group.recreate()
    assert caught.value.ranks == (1,)
    assert time.monotonic() - began < 10
    assert crew.run(1, has_group, name) == [False]


def test_a_late_member_stays_out(crew: Crew, spawn: Spawn, tmp_path: Path) -> None:
    """An actor that was busy during the first creation answers to it only after the second one was made."""
    late = spawn(Member, max_concurrency=2)
    name, gates = new_name(), [tmp_path / "first", tmp_path / "second"]
    busy = [late.run.remote(hold, 1, gate) for gate in gates]
    actors = [crew.actors[0], late]
    with pytest.raises(col.CollectiveTimeoutError) as caught:
        col.create_collective_group(actors, group_name=name, timeout_s=1)
    assert caught.value.ranks == (1,)
    for gate in gates:
        gate.touch()
    group = col.create_collective_group(actors, group_name=name)
    ray.get(busy, timeout=60)
    assert totals(actors, name) == [[3.0, 3.0]] * 2
    group.destroy()
    assert [ray.get(actor.run.remote(has_group, 0, name), timeout=60) for actor in actors] == [
        False,
        False,
    ]


def test_a_member_that_still_connects_to_the_old_group_gives_way(
    crew: Crew, spawn: Spawn, tmp_path: Path
) -> None:
    """One thread of an actor is in the old creation, while another takes part in the new one."""
    slow = spawn(Member, max_concurrency=3)
    gate, began = tmp_path / "gate", tmp_path / "began"
    ray.get(slow.run.remote(connect_slowly, gate, began), timeout=60)
    name = new_name()
    actors = [crew.actors[0], slow]
    with pytest.raises(col.CollectiveTimeoutError) as caught:
        col.create_collective_group(actors, group_name=name, timeout_s=1)
    assert caught.value.ranks == (1,)
    assert began.exists()
    assert not gate.exists()
    opener = slow.run.remote(open_later, gate, 1.0)
    group = col.create_collective_group(actors, group_name=name, timeout_s=10)
    assert gate.exists()
    assert totals(actors, name) == [[3.0, 3.0]] * 2
    ray.get(opener, timeout=60)
    group.destroy()


def connect_slowly(gate: Path, began: Path) -> None:
    """Have this process's next group wait, its name taken, until somebody makes a file."""
    from colltensor import table

    connect = table.connect

    def wait_and_connect(*arguments: Any) -> col.Group:
        table.connect = connect
        began.touch()
        hold(0, gate)
        return connect(*arguments)

    table.connect = wait_and_connect


def open_later(gate: Path, seconds: float) -> None:
    time.sleep(seconds)
    gate.touch()


def test_a_group_is_made_anew_while_an_actor_waits_in_it(crew: Crew, spawn: Spawn) -> None:
    """A threaded actor's call on the old generation ends with an error at once; it is not carried over."""
    threaded = spawn(Member, max_concurrency=2)
    name = new_name()
    actors = [threaded, crew.actors[0]]
    group = col.create_collective_group(actors, group_name=name)
    waiting = threaded.run.remote(total, 0, name)
    time.sleep(0.5)
    began = time.monotonic()
    group.recreate()
    assert isinstance(outcome(waiting), col.GroupError)
    assert time.monotonic() - began < 5
    assert totals(actors, name) == [[3.0, 3.0]] * 2
    group.destroy()


def make_anew(group: col.ray.CollectiveGroup) -> tuple[float, col.ray.CollectiveGroup]:
    began = time.monotonic()
    group.recreate()
    return time.monotonic() - began, group


def destroy(group: col.ray.CollectiveGroup) -> None:
    group.destroy()


def test_another_process_makes_a_group_anew(crew: Crew, spawn: Spawn) -> None:
    """One that works, one that is gone, and one whose actor was restarted; then the first handle is out of date."""
    mortal, other = spawn(Member, max_restarts=1), spawn(Member)
    actors, name = [crew.actors[0], mortal], new_name()
    group = col.create_collective_group(actors, group_name=name)
    elsewhere = group
    for turn in range(3):
        if turn == 1:
            os.kill(ray.get(mortal.pid.remote(), timeout=60), 9)
        if turn == 2:
            ray.get(other.run.remote(destroy, elsewhere), timeout=60)
        took_s, elsewhere = ray.get(other.run.remote(make_anew, elsewhere), timeout=60)
        assert took_s < 10
        assert totals(actors, name) == [[3.0, 3.0]] * 2
    with pytest.raises(col.GroupError, match=r"destroy_collective_group\(\)"):
        group.recreate()
    group.destroy()
    assert totals(actors, name) == [[3.0, 3.0]] * 2
    elsewhere.destroy()
    assert crew.run(1, has_group, name) == [False]
    group.recreate()  # as long as no other has one
    assert totals(actors, name) == [[3.0, 3.0]] * 2
    group.destroy()
