"""Groups declared from the driver: every actor gets the group at once, or none does and the error says why."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from crew import AsyncMember, Crew, Member, has_group, hold, join, kill_process, leave, new_name

import colltensor as col
from colltensor.ray import CollectiveGroup

Spawn = Callable[..., Any]


def total(rank: int, name: str) -> list[float]:
    return col.allreduce(np.full(2, rank + 1.0), name).tolist()


def ranks_in(rank: int, name: str) -> tuple[int, int]:
    return col.get_rank(name), col.get_collective_group_size(name)


def test_every_actor_has_the_group_when_the_call_returns(crew: Crew) -> None:
    name = new_name()
    group = col.create_collective_group(crew.actors[:3], 3, [2, 0, 1], "gloo", name)
    assert isinstance(group, CollectiveGroup)
    assert (group.name, group.world_size) == (name, 3)
    assert list(group.actors) == [crew.actors[1], crew.actors[2], crew.actors[0]]
    assert crew.run(3, ranks_in, name) == [(2, 3), (0, 3), (1, 3)]
    assert crew.run(3, total, name) == [[6.0, 6.0]] * 3
    group.destroy()
    assert crew.run(3, has_group, name) == [False] * 3


@pytest.mark.parametrize("again", range(2))
def test_a_name_is_free_again_at_once(crew: Crew, again: int) -> None:
    for world_size in (2, 3, 2):
        group = col.create_collective_group(crew.actors[:world_size], group_name="again and again")
        assert (
            crew.run(world_size, total, "again and again")
            == [[sum(range(world_size + 1))] * 2] * world_size
        )
        group.destroy()
        group.destroy()


def described(rank: int, name: str) -> str:
    return repr(col.get_group_handle(name))


def test_calls_on_a_device_are_checked_where_it_was_asked_for(crew: Crew) -> None:
    name = new_name()
    group = col.create_collective_group(crew.actors[:2], group_name=name, check=True)
    assert all("check=True" in text for text in crew.run(2, described, name))
    assert crew.run(2, total, name) == [[3.0, 3.0]] * 2
    group.destroy()


def test_a_group_of_one_actor(crew: Crew) -> None:
    for backend in ("auto", "loopback"):
        with crew.group(1, backend=backend) as name:
            assert crew.run(1, ranks_in, name) == [(0, 1)]
            assert crew.run(1, total, name) == [[1.0, 1.0]]


def test_a_handle_destroys_its_own_group_only(crew: Crew) -> None:
    name = new_name()
    stale = col.create_collective_group(crew.actors[:2], group_name=name)
    crew.run(2, leave, name)
    group = col.create_collective_group(crew.actors[:2], group_name=name)
    stale.destroy()
    assert crew.run(2, total, name) == [[3.0, 3.0]] * 2
    group.destroy()
    assert crew.run(2, has_group, name) == [False] * 2


def test_an_actor_declares_a_group_of_others(crew: Crew) -> None:
    name = new_name()
    ray.get(crew.actors[0].run.remote(declare_and_destroy, crew.actors[1:3], name), timeout=60)
    assert crew.run(3, has_group, name) == [False] * 3


def declare_and_destroy(actors: list[Any], name: str) -> None:
    group = col.create_collective_group(actors, group_name=name)
    assert (
        ray.get([actor.run.remote(total, rank, name) for rank, actor in enumerate(actors)])
        == [[3.0, 3.0]] * 2
    )
    group.destroy()


MALFORMED: list[Any] = [
    pytest.param(
        lambda a: ([a[0], a[1], a[0]],), col.RankError, r"\bactors: ", id="an actor twice"
    ),
    pytest.param(
        lambda a: (a, 2), col.RankError, r"world_size: .*\b3, .*\b2$", id="world size too small"
    ),
    pytest.param(
        lambda a: (a, 4), col.RankError, r"world_size: .*\b3, .*\b4$", id="world size too large"
    ),
    pytest.param(lambda a: (a, "3"), col.RankError, "world_size", id="world size no number"),
    pytest.param(
        lambda a: (a, 3, [0, 1]), col.RankError, r"\branks: .*\b0 to 2\b", id="too few ranks"
    ),
    pytest.param(
        lambda a: (a, 3, [0, 1, 1]), col.RankError, r"\branks: .*\b0 to 2\b", id="a rank twice"
    ),
    pytest.param(
        lambda a: (a, 3, [1, 2, 3]), col.RankError, r"\branks: .*\b0 to 2\b", id="a rank outside"
    ),
    pytest.param(
        lambda a: (a, 3, ["0", "1", "2"]),
        col.RankError,
        r"\branks: .*\b0 to 2\b",
        id="ranks no numbers",
    ),
    pytest.param(lambda a: ([],), col.OptionError, r"\bactors: ", id="no actors"),
    pytest.param(lambda a: (a[0],), col.OptionError, r"\bactors: ", id="no list"),
    pytest.param(lambda a: ([a[0], "actor"],), col.OptionError, r"\bactors: ", id="no handle"),
    pytest.param(
        lambda a: (a, 3, None, "carrier-pigeon"), ValueError, "carrier-pigeon", id="unknown backend"
    ),
    pytest.param(
        lambda a: (a, 3, None, "loopback"),
        col.OptionError,
        "backend='auto'",
        id="loopback for three",
    ),
    pytest.param(lambda a: (a, 3, None, "gloo", ""), col.OptionError, "group_name", id="no name"),
    pytest.param(
        lambda a: (a, 3, None, "gloo", "x", -1), col.OptionError, "timeout_s", id="negative timeout"
    ),
    pytest.param(
        lambda a: (a, 3, None, "gloo", "x", "1 s"),
        col.OptionError,
        "gloo_timeout",
        id="timeout no number",
    ),
]


@pytest.mark.parametrize(("arguments", "kind", "says"), MALFORMED)
def test_a_malformed_declaration_is_an_error_at_the_call(
    crew: Crew, arguments: Callable[[list[Any]], tuple[Any, ...]], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says) as caught:
        col.create_collective_group(*arguments(crew.actors[:3]))
    assert isinstance(caught.value, col.CollectiveError)
    assert crew.run(3, has_group, "default") == [False] * 3


def test_a_dead_actor_is_named(crew: Crew, spawn: Spawn) -> None:
    dead = spawn(Member)
    kill_process(dead, ray.get(dead.pid.remote(), timeout=60))
    name = new_name()
    began = time.monotonic()
    with pytest.raises(col.PeerLostError, match="rank 1") as caught:
        col.create_collective_group([crew.actors[0], dead, crew.actors[1]], group_name=name)
    assert caught.value.ranks == (1,)
    assert time.monotonic() - began < 10
    assert crew.run(2, has_group, name) == [False] * 2


class Stillborn(Member):
    def __init__(self) -> None:
        raise ValueError("in-constructor")


def test_an_actor_whose_constructor_fails_is_named(crew: Crew, spawn: Spawn) -> None:
    name = new_name()
    with pytest.raises(col.PeerLostError, match="in-constructor") as caught:
        col.create_collective_group(
            [crew.actors[0], crew.actors[1], spawn(Stillborn)], group_name=name
        )
    assert caught.value.ranks == (2,)
    assert crew.run(2, has_group, name) == [False] * 2


def test_an_actor_that_cannot_start_is_named(crew: Crew, spawn: Spawn) -> None:
    nowhere = spawn(Member, resources={"no_node_has_it": 1})
    name = new_name()
    with pytest.raises(col.CollectiveTimeoutError, match="ray status") as caught:
        col.create_collective_group([crew.actors[0], nowhere], group_name=name, timeout_s=2)
    assert caught.value.ranks == (1,)
    assert crew.run(1, has_group, name) == [False]


def test_a_busy_actor_is_named_and_left_clean(crew: Crew, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    busy = crew.actors[1].run.remote(hold, 1, gate)
    name = new_name()
    began = time.monotonic()
    with pytest.raises(col.CollectiveTimeoutError, match="ray status") as caught:
        col.create_collective_group(crew.actors[:3], group_name=name, gloo_timeout=2000)
    assert caught.value.ranks == (1,)
    assert 2 <= time.monotonic() - began < 10
    gate.touch()
    ray.get(busy, timeout=60)
    assert crew.run(3, has_group, name) == [False] * 3
    with crew.group(3) as name:
        assert crew.run(3, total, name) == [[6.0, 6.0]] * 3


def test_a_busy_actor_destroys_the_group_when_it_comes_to_it(crew: Crew, tmp_path: Path) -> None:
    name, gate = new_name(), tmp_path / "gate"
    group = col.create_collective_group(crew.actors[:3], group_name=name)
    busy = crew.actors[2].run.remote(hold, 2, gate)
    with pytest.raises(col.CollectiveTimeoutError, match="ray status") as caught:
        group.destroy(timeout_s=2)
    assert caught.value.ranks == (2,)
    assert crew.run(2, has_group, name) == [False] * 2
    gate.touch()
    ray.get(busy, timeout=60)
    assert crew.run(3, has_group, name) == [False] * 3


def test_a_name_taken_in_one_actor(crew: Crew) -> None:
    with crew.group(2) as name:
        with pytest.raises(col.GroupError, match=r"rank 1.*destroy_collective_group\(\)"):
            col.create_collective_group([crew.actors[2], crew.actors[0]], group_name=name)
        assert crew.run(3, has_group, name) == [True, True, False]
        assert crew.run(2, total, name) == [[3.0, 3.0]] * 2


def test_what_one_actor_raises_names_its_rank(crew: Crew) -> None:
    name = new_name()
    crew.run(2, forget_gloo, 1)
    try:
        with pytest.raises(col.BackendUnavailableError, match=r"rank 1.*no-gloo-today"):
            col.create_collective_group(crew.actors[:2], backend="gloo", group_name=name)
        with pytest.raises(col.OptionError, match=r"interface .*'nope0'"):
            col.create_collective_group(crew.actors[:1], group_name=name, interface="nope0")
    finally:
        crew.run(2, forget_gloo, -1)
    assert crew.run(2, has_group, name) == [False] * 2


def forget_gloo(rank: int, forgetful: int) -> None:
    """Have the Gloo backend say in one actor that it is not available."""
    from colltensor import backends

    spec = type(backends.get_backend("gloo"))
    if rank == forgetful:
        spec.kept_available = spec.available
        spec.available = lambda self: "no-gloo-today"
    elif "kept_available" in vars(spec):
        spec.available = spec.kept_available
        del spec.kept_available


def test_an_actor_that_dies_while_the_others_connect(crew: Crew, spawn: Spawn) -> None:
    doomed = spawn(Member)
    ray.get(doomed.run.remote(die_when_connecting), timeout=60)
    name = new_name()
    with pytest.raises(col.PeerLostError) as caught:
        col.create_collective_group(
            [crew.actors[0], crew.actors[1], doomed], group_name=name, timeout_s=10
        )
    assert caught.value.ranks == (2,)
    assert crew.run(2, has_group, name) == [False] * 2


def die_when_connecting() -> None:
    from colltensor.ray import actor_member

    actor_member.connect = lambda *arguments: os._exit(1)


def test_an_actor_that_stops_while_the_others_connect(crew: Crew, spawn: Spawn) -> None:
    slow = spawn(Member)
    ray.get(slow.run.remote(sleep_when_connecting, 6), timeout=60)
    name = new_name()
    began = time.monotonic()
    with pytest.raises(col.CollectiveTimeoutError) as caught:
        col.create_collective_group(
            [crew.actors[0], slow, crew.actors[1]], group_name=name, timeout_s=2
        )
    assert caught.value.ranks == (1,)
    assert time.monotonic() - began < 10
    assert crew.run(2, has_group, name) == [False] * 2
    assert ray.get(slow.run.remote(has_group, 1, name), timeout=60) is False


def sleep_when_connecting(seconds: float) -> None:
    from colltensor.ray import actor_member

    connect = actor_member.connect

    def connect_late(*arguments: Any) -> None:
        time.sleep(seconds)
        connect(*arguments)

    actor_member.connect = connect_late


def test_destroy_where_an_actor_died(crew: Crew, spawn: Spawn) -> None:
    mortal = spawn(Member)
    name = new_name()
    group = col.create_collective_group([crew.actors[0], mortal], group_name=name)
    kill_process(mortal, ray.get(mortal.pid.remote(), timeout=60))
    group.destroy()
    assert crew.run(1, has_group, name) == [False]


def test_threaded_actors(crew: Crew, spawn: Spawn, tmp_path: Path) -> None:
    """A call that waits holds up neither the declaration nor the other calls of a threaded actor."""
    threaded = spawn(Member, max_concurrency=3)
    gate = tmp_path / "gate"
    busy = [threaded.run.remote(hold, 1, gate)]
    actors = [threaded, crew.actors[0]]
    names = [new_name(), new_name()]
    groups = [col.create_collective_group(actors, group_name=name) for name in names]
    calls = [
        actor.run.remote(total, rank, name) for name in names for rank, actor in enumerate(actors)
    ]
    assert ray.get(calls, timeout=60) == [[3.0, 3.0]] * 4
    for group in groups:
        group.destroy()
    busy += [threaded.run.remote(hold, 1, gate) for _ in range(2)]
    with pytest.raises(col.CollectiveTimeoutError) as caught:
        col.create_collective_group(actors, group_name=names[0], timeout_s=2)
    assert caught.value.ranks == (0,)
    gate.touch()
    ray.get(busy, timeout=60)
    assert [ray.get(actor.run.remote(has_group, 0, names[0]), timeout=60) for actor in actors] == [
        False,
        False,
    ]


def test_async_actors(crew: Crew, spawn: Spawn) -> None:
    actors = [spawn(AsyncMember), crew.actors[0]]
    name = new_name()
    group = col.create_collective_group(actors, group_name=name)
    assert (
        ray.get([actor.run.remote(total, r, name) for r, actor in enumerate(actors)], timeout=60)
        == [[3.0, 3.0]] * 2
    )
    group.destroy()
    steps: list[Any] = [
        (join, (2, name), None),
        (total, (name,), [3.0, 3.0]),
        (leave, (name,), None),
    ]
    for way in (actors[0].run, actors[0].run_in_thread):
        for function, arguments, expected in steps:
            calls = [
                way.remote(function, 0, *arguments),
                actors[1].run.remote(function, 1, *arguments),
            ]
            assert ray.get(calls, timeout=60) == [expected] * 2


def test_a_call_that_comes_after_the_driver_gave_up(crew: Crew) -> None:
    """Threads may run the driver's calls in any order; a late one finds nothing, or is undone."""
    ray.get(crew.actors[0].run.remote(late_calls), timeout=60)


def late_calls() -> None:
    from colltensor.ray import actor_member

    options = {
        "backend": "auto",
        "group_name": "late",
        "timeout_s": 5.0,
        "interface": None,
        "provider": None,
    }
    first, second = (
        actor_member.MemberSpec(actor_member.Token("driver", number), 0, 1, options)
        for number in (1, 2)
    )
    said = actor_member.introduce(None, first, 5.0)
    actor_member.leave(None, first.token)
    with pytest.raises(col.GroupError, match=r"create_collective_group: group 'late'"):
        actor_member.listen(None, first.token, "late", [said])
    where = actor_member.listen(
        None, second.token, "late", [actor_member.introduce(None, second, 5.0)]
    )
    with pytest.raises(col.GroupError, match=r"create_collective_group: group 'late'"):
        actor_member.introduce(None, first, 5.0)
    actor_member._members[second.token].leave()
    with pytest.raises(col.GroupError, match=r"create_collective_group: group 'late'"):
        actor_member.connect(None, second.token, "late", [where], 5.0)
    assert not col.is_group_initialized("late")
    actor_member.leave(None, second.token)
