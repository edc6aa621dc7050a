"""Groups declared from the Ray driver: every actor is initialised at once, or none is.

Imports ray. The driver asks every actor the same three questions (see ``seat``) and carries the answers.
"""

from __future__ import annotations

import operator
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from colltensor import table
from colltensor.errors import CollectiveError, CollectiveTimeoutError, GroupError, OptionError, PeerLostError, RankError
from colltensor.ray import seat

_GRACE_S: Final = 5.0
"""How much longer the driver waits than the ranks do, so that their own error arrives first."""
_VERDICT_S: Final = 1.0
"""How long the driver waits for the others once one has failed: the first to speak is seldom the cause."""


class CollectiveGroup:
    """A group of actors as the driver sees it. Made by ``create_collective_group``.

    Attributes:
        name: The group's name, by which the actors find it.
        actors: The actors in rank order.
        world_size: The number of actors.
    """

    def __init__(self, name: str, actors: Sequence[ActorHandle[Any]], token: str) -> None:
        self.name = name
        self.actors = tuple(actors)
        self.world_size = len(actors)
        self._token = token

    def destroy(self, timeout_s: float = 30.0) -> None:
        """Destroy the group in every actor that still lives; another group of the same name is left alone. Idempotent.

        Args:
            timeout_s: How long the actors may take to come to it, in seconds.

        Raises:
            CollectiveTimeoutError: Actors are busy; they destroy the group when they come to it.
            CollectiveError: What an actor raised.
        """
        round_ = _Round(f"CollectiveGroup.destroy '{self.name}'", self.actors, time.monotonic() + timeout_s)
        round_.ask(seat.leave, [(self._token,)] * self.world_size, dead_are_done=True)

    def __repr__(self) -> str:
        return f"CollectiveGroup({self.name!r}, {self.world_size} actors)"


def create_collective_group(
    actors: Sequence[ActorHandle[Any]],
    world_size: int | None = None,
    ranks: Sequence[int] | None = None,
    backend: str = "auto",
    group_name: str = "default",
    gloo_timeout: float | None = None,
    *,
    timeout_s: float = 30.0,
    interface: str | None = None,
    provider: str | None = None,
    check: bool = False,
) -> CollectiveGroup:
    """Make a group of actors from the driver; when it returns, every actor has the group.

    The actors need no method for it, but must be free to answer: one that is in a call answers after it.
    The group's secret passes through the driver and Ray's object store.

    Args:
        actors: The actors' handles, all different.
        world_size: The number of actors; may be left out.
        ranks: The rank of each actor, a permutation of ``range(world_size)``; by default in order.
        backend: As for ``init_collective_group``; the other options too.
        group_name: The name by which the actors find the group.
        gloo_timeout: ``ray.util.collective``'s spelling of the timeout, in milliseconds.
        timeout_s: How long the actors may take, their start included, in seconds; then also how
            long every operation waits.
        interface: As for ``init_collective_group``; by default, between hosts, Ray's own.
        provider: As for ``init_collective_group``.
        check: As for ``init_collective_group``.

    Returns:
        A handle that can destroy the group.

    Raises:
        RankError: ``ranks`` or ``world_size`` do not fit the actors, or an actor is in the list twice.
        OptionError: An option has a value that no group could use.
        PeerLostError: An actor is dead or could not be started; names its rank.
        CollectiveTimeoutError: An actor did not answer in time; names its rank.
        CollectiveError: What an actor raised, in its own class, with its rank: ``GroupError`` where it has a
            group of this name. After any error no actor has the group.
    """
    if gloo_timeout is not None:
        if isinstance(gloo_timeout, bool) or not isinstance(gloo_timeout, (int, float)):
            raise OptionError(f"create_collective_group: gloo_timeout: expected milliseconds, got {gloo_timeout!r}")
        timeout_s = gloo_timeout / 1000
    in_order = _in_rank_order(actors, world_size, ranks)
    options = {"backend": backend, "group_name": group_name, "timeout_s": timeout_s, "interface": interface,
               "provider": provider, "check": check}  # fmt: skip
    table.check_options(len(in_order), **options)  # type: ignore[arg-type]  # a mapping of the right types
    token = secrets.token_hex(16)
    deadline = time.monotonic() + timeout_s
    round_ = _Round(f"create_collective_group '{group_name}'", in_order, deadline)
    try:
        places = [seat.Place(token, rank, len(in_order), options) for rank in range(len(in_order))]
        introductions = round_.ask(seat.introduce, [(place, timeout_s + _GRACE_S) for place in places])
        listeners = round_.ask(seat.listen, [(token, group_name, ray.put(introductions))] * len(in_order))
        left_s = max(0.1, deadline - time.monotonic())
        round_.deadline += _GRACE_S
        round_.ask(seat.connect, [(token, group_name, ray.put(listeners), left_s)] * len(in_order))
    except CollectiveError:
        round_.dissolve(token, _VERDICT_S)
        raise
    except BaseException:
        round_.dissolve(token, 0)
        raise
    return CollectiveGroup(group_name, in_order, token)


def _in_rank_order(
    actors: Sequence[ActorHandle[Any]], world_size: int | None, ranks: Sequence[int] | None
) -> list[ActorHandle[Any]]:
    where = "create_collective_group"
    is_list = isinstance(actors, (list, tuple))
    if not is_list or not actors or not all(isinstance(actor, ActorHandle) for actor in actors):
        raise OptionError(f"{where}: actors: expected a list of actor handles, got {actors!r:.200}")
    if len(set(actors)) != len(actors):
        raise RankError(f"{where}: actors: an actor is in the list twice; each rank is another actor")
    size = len(actors)
    if world_size is not None and (isinstance(world_size, bool) or world_size != size):
        raise RankError(f"{where}: world_size: expected {size}, the number of actors, got {world_size!r}")
    try:
        numbers = list(range(size)) if ranks is None else [operator.index(rank) for rank in ranks]
    except TypeError:
        numbers = []
    if sorted(numbers) != list(range(size)):
        raise RankError(
            f"{where}: ranks: expected each of 0 to {size - 1} once, one for each actor, got {ranks!r:.200}"
        )
    return [actor for _, actor in sorted(zip(numbers, actors, strict=True), key=lambda pair: pair[0])]


class _Round:
    """Asks all actors of a group one question after another, until a deadline."""

    def __init__(self, operation: str, actors: Sequence[ActorHandle[Any]], deadline: float) -> None:
        self._operation = operation
        self._actors = actors
        self.deadline = deadline

    def ask(self, question: Callable[..., Any], arguments: Sequence[tuple[Any, ...]],
            dead_are_done: bool = False) -> list[Any]:
        """Return every actor's answer, in rank order.

        Args:
            question: A function that gets the actor and its arguments.
            arguments: For each rank.
            dead_are_done: An actor that is dead answers None.

        Raises:
            CollectiveError: The cause, if one failed; else who is late.
        """
        waiting: dict[Any, int] = {}
        answers: dict[int, Any] = {}
        failed: dict[int, CollectiveError] = {}
        for rank, actor in enumerate(self._actors):
            try:
                waiting[actor.__ray_call__.remote(question, *arguments[rank])] = rank
            except RayError as error:
                failed[rank] = self._unreachable(rank, error)
        deadline = self.deadline
        while waiting:
            if failed:
                deadline = min(deadline, time.monotonic() + _VERDICT_S)
            ready, _ = ray.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            rank = waiting.pop(ready[0])
            try:
                answers[rank] = ray.get(ready[0])
            except RayTaskError as error:
                failed[rank] = self._told(rank, error)
            except RayError as error:
                if dead_are_done:
                    answers[rank] = None
                else:
                    failed[rank] = self._unreachable(rank, error)
        if failed:
            raise _cause(failed)
        if waiting:
            raise self._late(sorted(waiting.values()))
        return [answers[rank] for rank in range(len(self._actors))]

    def dissolve(self, token: str, patience_s: float) -> None:
        """Have every actor leave the group that will not be; the busy ones do it when they come to it."""
        leaving = []
        for actor in self._actors:
            try:
                leaving.append(actor.__ray_call__.remote(seat.leave, token))
            except RayError:
                continue  # it is as unreachable as it was for the call that failed
        if leaving:
            ray.wait(leaving, num_returns=len(leaving), timeout=patience_s)

    def _told(self, rank: int, error: RayTaskError) -> CollectiveError:
        """Return what an actor raised as an error of its own class that names the actor's rank."""
        cause = error.cause
        kind = next((base for base in type(cause).__mro__ if base.__module__ == CollectiveError.__module__), GroupError)
        message = f"{self._operation}: rank {rank}: {cause}"
        ranks = getattr(cause, "ranks", None)
        told: CollectiveError = kind(message) if ranks is None else kind(message, ranks)
        told.__cause__ = error
        return told

    def _unreachable(self, rank: int, error: RayError) -> PeerLostError:
        message = f"{self._operation}: the actor of rank {rank} is dead or was never started: {error}"
        lost = PeerLostError(message, (rank,))
        lost.__cause__ = error
        return lost

    def _late(self, ranks: Sequence[int]) -> CollectiveTimeoutError:
        return CollectiveTimeoutError(
            f"{self._operation}: expected every actor to answer in time, but rank{'s' * (len(ranks) > 1)} "
            f"{', '.join(map(str, ranks))} did not: busy in another call, or not started yet for lack of resources; "
            "raise timeout_s, let them finish first, or see `ray status`", ranks,
        )


def _cause(failed: Mapping[int, CollectiveError]) -> CollectiveError:
    """Return the error that explains the others: a rank's own before a death, a death before a wait in vain."""
    def order(error: CollectiveError) -> int:
        return 2 if isinstance(error, CollectiveTimeoutError) else int(isinstance(error, PeerLostError))

    return min((failed[rank] for rank in sorted(failed)), key=order)
