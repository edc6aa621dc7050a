"""Ray actors for the tests: a crew that lives as long as the session, and what a test sends to it.

    def sums(rank, name, scale):             # top-level, so that it can be pickled
        return col.allreduce(numpy.full(3, rank * scale), name)

    def test_sums(crew):
        with crew.group(2) as name:
            assert crew.run(2, sums, name, 5)[0].tolist() == [5, 5, 5]

The workers import the test's module by its name, with the folder of this one on their search path.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.experimental.internal_kv import _internal_kv_list
from ray.util.state import list_actors, list_placement_groups

import colltensor as col

FIRST_NODE, SECOND_NODE = "first_node", "second_node"
"""Resources that tell the two nodes apart."""
PATIENCE_S = 60.0

_numbers = itertools.count()


class Member:
    """What the tests' actors are: they run what they are sent."""

    def pid(self) -> int:
        return os.getpid()

    def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return function(*args, **options)


class AsyncMember:
    """The same with an event loop."""

    async def pid(self) -> int:
        return os.getpid()

    async def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return function(*args, **options)

    async def run_in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.to_thread(function, *args)


class Crew:
    """Actors of the two nodes in turn; rank r is the same process in every test.

    Attributes:
        actors: Their handles.
    """

    def __init__(self, size: int) -> None:
        nodes = (FIRST_NODE, SECOND_NODE)
        remote = ray.remote(num_cpus=0)(Member)
        self.actors = [
            remote.options(resources={nodes[rank % 2]: 0.01}).remote() for rank in range(size)
        ]

    @contextlib.contextmanager
    def group(self, world_size: int, **options: Any) -> Iterator[str]:
        """A group of the first actors, made from here; yields its name."""
        name = new_name()
        group = col.create_collective_group(self.actors[:world_size], group_name=name, **options)
        try:
            yield name
        finally:
            group.destroy()

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run ``function(rank, *args)`` in the first actors; the results by rank."""
        return ray.get(self.start(world_size, function, *args), timeout=PATIENCE_S)

    def outcomes(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """As ``run``, with the exception in the place of the result of a rank that raised."""
        return [outcome(call) for call in self.start(world_size, function, *args)]

    def start(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """As ``run``, without waiting."""
        return [
            actor.run.remote(function, rank, *args)
            for rank, actor in enumerate(self.actors[:world_size])
        ]


def new_name() -> str:
    """A group name that no other test uses."""
    return f"group-{next(_numbers)}"


def outcome(call: Any) -> Any:
    """What a remote call returned or raised."""
    try:
        return ray.get(call, timeout=PATIENCE_S)
    except Exception as error:
        return error


def named_actors() -> list[str]:
    """The names of all named actors that live, once those that are ending had a moment for it."""
    deadline = time.monotonic() + 5.0
    while names := [
        str(entry["name"]) for entry in ray.util.list_named_actors(all_namespaces=True)
    ]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return names


def left_in_ray() -> list[str]:
    """What Ray still has of ours: actors that are not dead, placement groups, keys; what is ending has a moment."""
    deadline = time.monotonic() + 15.0
    while found := [*_live_actors(), *_placement_groups(), *_keys()]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return found


def _live_actors() -> list[str]:
    return [
        f"actor {entry.class_name} {entry.name!r}"
        for entry in list_actors(filters=[("state", "!=", "DEAD")])
    ]


def _placement_groups() -> list[str]:
    groups = list_placement_groups(filters=[("state", "!=", "REMOVED")])
    return [f"placement group {entry.placement_group_id}" for entry in groups]


def _keys() -> list[str]:
    """The keys in Ray's store that are named after us, or that its own groups meet by."""
    names = (b"colltensor", b"collective")
    return [
        f"key {key!r}"
        for key in _internal_kv_list(b"")
        if any(name in key.lower() for name in names)
    ]


def await_named_actor() -> None:
    """Return once a rank 0 has left its endpoint."""
    deadline = time.monotonic() + PATIENCE_S
    while not ray.util.list_named_actors(all_namespaces=True):
        assert time.monotonic() < deadline, "rank 0 left no endpoint"
        time.sleep(0.02)


def kill_process(actor: Any, pid: int) -> None:
    """End an actor's process as a crash does, and wait until Ray knows."""
    os.kill(pid, 9)
    with contextlib.suppress(ray.exceptions.RayActorError):
        ray.get(actor.pid.remote(), timeout=PATIENCE_S)


def hold(rank: int, gate: Path) -> None:
    """Keep an actor busy until somebody makes the file ``gate``."""
    deadline = time.monotonic() + PATIENCE_S
    while not gate.exists():
        assert time.monotonic() < deadline, f"nobody made {gate}"
        time.sleep(0.02)


def join(rank: int, world_size: int, name: str, **options: Any) -> None:
    """Init a group in an actor or a task."""
    col.init_collective_group(world_size, rank, "gloo", name, **options)


def leave(rank: int, name: str) -> None:
    col.destroy_collective_group(name)


def has_group(rank: int, name: str) -> bool:
    return col.is_group_initialized(name)


def errors_of(outcomes: Sequence[Any], kind: type[BaseException]) -> list[Any]:
    """The outcomes, all of which must be errors of a kind."""
    for found in outcomes:
        if not isinstance(found, kind):
            raise AssertionError(f"expected {kind.__name__}, got {found!r}") from (
                found if isinstance(found, BaseException) else None
            )
    return list(outcomes)
