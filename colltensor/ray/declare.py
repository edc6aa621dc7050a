"""Groups declared from the Ray driver: every actor is initialised at once, or none is.

Imports ray. The driver asks every actor the same questions (see ``actor_member``) and carries the
answers.
"""

from __future__ import annotations

import itertools
import logging
import operator
import secrets
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final

import ray
from ray.actor import ActorHandle

from colltensor import table
from colltensor.errors import CollectiveError, OptionError, RankError
from colltensor.ray import actor_member
from colltensor.ray.actor_call import ActorCall
from colltensor.ray.rendezvous import refuse_client

_LOG: Final = logging.getLogger(__name__)
_GRACE_S: Final = 5.0
"""How much longer the driver waits than the ranks do, so that their own error arrives first."""
_VERDICT_S: Final = 1.0
"""How long the driver waits for actors to leave a group that could not be made."""

_DRIVER: Final = secrets.token_hex(16)
_generations: Final = itertools.count(1)


class CollectiveGroup:
    """A group of actors as the driver sees it.

    It is made by ``collective_group`` and ``create_collective_group``. As a context manager it
    destroys the group at the end, also where the block raises.

    Attributes:
        name: The group's name, by which the actors find it.
        actors: The actors in rank order.
        world_size: The number of actors.
    """

    def __init__(
        self,
        name: str,
        actors: Sequence[ActorHandle[Any]],
        token: actor_member.Token,
        options: Mapping[str, Any],
    ) -> None:
        self.name = name
        self.actors = tuple(actors)
        self.world_size = len(actors)
        self._token = token
        self._options = dict(options)

    @property
    def generation(self) -> int:
        """The number of this creation: higher than that of every earlier group of this driver."""
        return self._token.generation

    def destroy(self, timeout_s: float = 30.0) -> None:
        """Destroy the group in every actor that still lives. Idempotent.

        Another group of the same name is left alone.

        Args:
            timeout_s: How long the actors may take to come to it, in seconds.

        Raises:
            CollectiveTimeoutError: Actors are busy; they destroy the group when they come to it.
            CollectiveError: What an actor raised.
        """
        call = ActorCall(
            f"CollectiveGroup.destroy '{self.name}'", self.actors, time.monotonic() + timeout_s
        )
        call.ask(actor_member.leave, [(self._token,)] * self.world_size, dead_are_done=True)

    def recreate(self, timeout_s: float | None = None) -> None:
        """Make the group anew, of the same actors with the same ranks, name and options.

        Use it after an actor died and Ray restarted it (``max_restarts``), and for a group that is
        broken. The actors' parts of the group are replaced at once, whether it works or not; calls
        that wait in it raise. An actor that is being restarted is waited for. Calls that were meant
        for the old group never reach the new one.

        A process that was sent the handle may do it as well as the one that made the group. The
        handle that it was called on is the group's from then on. Others destroy nothing any more,
        and in other processes their ``recreate`` is refused while the new group works.

        Args:
            timeout_s: How long the actors may take, restarts included, in seconds; by default the
                group's own timeout.

        Raises:
            CollectiveError: As ``create_collective_group``; no actor has the group then, and this
                may be called again. ``GroupError`` where another process made the group anew, and
                it works: it stays.
        """
        patience_s = float(self._options["timeout_s"]) if timeout_s is None else timeout_s
        operation = f"CollectiveGroup.recreate '{self.name}'"
        self._token = _make(
            operation, self.actors, self._options, time.monotonic() + patience_s, self._token
        )

    def __enter__(self) -> CollectiveGroup:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.destroy()
            return
        try:
            self.destroy(_GRACE_S if issubclass(kind, Exception) else 0.0)
        except CollectiveError as late:  # what the block raised says more
            _LOG.warning(
                "group %r (driver): %s; it is destroyed because of %s",
                self.name,
                late,
                kind.__name__,
            )

    def __repr__(self) -> str:
        return f"CollectiveGroup({self.name!r}, {self.world_size} actors, generation {self.generation})"


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

    The actors need no method for it, but must be free to answer: one that is in a call answers
    after it. The group's secret passes through the driver and Ray's object store. A declared group
    of this name that is broken is replaced.

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
        A handle that can destroy the group, and make it anew.

    Raises:
        RankError: ``ranks`` or ``world_size`` do not fit the actors, or an actor is in the list
            twice.
        OptionError: An option has a value that no group could use.
        PeerLostError: An actor is dead or could not be started; names its rank.
        CollectiveTimeoutError: An actor did not answer in time; names its rank.
        CollectiveError: An actor's error, in its own class, with its rank: ``GroupError`` where it
            has a group of this name. After any error no actor has the group.
    """
    if gloo_timeout is not None:
        timeout_s = table.seconds_of(gloo_timeout)
    in_order = _in_rank_order("create_collective_group", actors, world_size, ranks)
    options = {"backend": backend, "group_name": group_name, "timeout_s": timeout_s, "interface": interface,
               "provider": provider, "check": check}  # fmt: skip
    return _declared("create_collective_group", in_order, options)


def collective_group(
    actors: Sequence[ActorHandle[Any]],
    backend: str = "auto",
    group_name: str | None = "default",
    *,
    ranks: Sequence[int] | None = None,
    timeout_s: float = 30.0,
    interface: str | None = None,
    provider: str | None = None,
    check: bool = False,
) -> CollectiveGroup:
    """Make a group of actors for the length of a ``with`` block.

    The actors of one node get neighbouring ranks.

        with colltensor.collective_group(actors) as group:
            ray.get([actor.step.remote() for actor in group.actors])

    The group exists when the call returns, and is destroyed when the block ends, however it ends.

    Args:
        actors: The actors' handles, all different; an actor may be in any number of groups.
        backend: As for ``init_collective_group``; the other options too.
        group_name: The name by which the actors find the group; None makes one, ``group.name``.
        ranks: The rank of each actor. By default the actors of ``actors[0]``'s node come first, in
            the order in which they are given. Those of the next node in the list follow.
            ``group.actors`` has them in rank order.
        timeout_s: How long the actors may take, their start included, in seconds; then also how
            long every operation waits.
        interface: As for ``init_collective_group``; by default, between hosts, Ray's own.
        provider: As for ``init_collective_group``.
        check: As for ``init_collective_group``.

    Returns:
        The group, which is its own context manager; used without ``with``, call ``destroy()``.

    Raises:
        CollectiveError: As ``create_collective_group``.
    """
    in_order = _in_rank_order("collective_group", actors, None, ranks)
    name = f"group-{secrets.token_hex(8)}" if group_name is None else group_name
    options = {"backend": backend, "group_name": name, "timeout_s": timeout_s, "interface": interface,
               "provider": provider, "check": check}  # fmt: skip
    return _declared("collective_group", in_order, options, by_node=ranks is None)


def _declared(
    where: str, actors: list[ActorHandle[Any]], options: dict[str, Any], by_node: bool = False
) -> CollectiveGroup:
    """Check the options and make the group, ``by_node`` with each node's actors side by side."""
    table.check_options(len(actors), **options)
    name, deadline = options["group_name"], time.monotonic() + options["timeout_s"]
    operation = f"{where} '{name}'"
    if by_node and len(actors) > 1:
        actors = _by_node(operation, actors, deadline)
    return CollectiveGroup(name, actors, _make(operation, actors, options, deadline), options)


def _make(
    operation: str,
    actors: Sequence[ActorHandle[Any]],
    options: Mapping[str, Any],
    deadline: float,
    replaces: actor_member.Token | None = None,
) -> actor_member.Token:
    """Make the group in all actors, which are in rank order; after an error none has it."""
    token = actor_member.Token(_DRIVER, next(_generations))
    name, size = options["group_name"], len(actors)
    patience_s = max(0.1, deadline - time.monotonic()) + _GRACE_S
    specs = [
        actor_member.MemberSpec(token, rank, size, dict(options), replaces) for rank in range(size)
    ]
    call = ActorCall(operation, actors, deadline)

    try:
        questions = [(spec, patience_s) for spec in specs]
        introductions = call.ask(actor_member.introduce, questions, again=True)
        listeners = call.ask(actor_member.listen, [(token, name, ray.put(introductions))] * size)
        left_s = max(0.1, deadline - time.monotonic())
        call.deadline += _GRACE_S
        call.ask(actor_member.connect, [(token, name, ray.put(listeners), left_s)] * size)
    except CollectiveError:
        call.notify(actor_member.leave, (token,), _VERDICT_S)
        raise
    except BaseException:
        call.notify(actor_member.leave, (token,), 0)
        raise
    return token


def _by_node(
    operation: str, actors: Sequence[ActorHandle[Any]], deadline: float
) -> list[ActorHandle[Any]]:
    """Return the actors with those of a host together, else in the order in which they came."""
    hosts = ActorCall(operation, actors, deadline, called="position").ask(
        actor_member.locate, [()] * len(actors), again=True
    )
    order = sorted(range(len(actors)), key=lambda place: hosts.index(hosts[place]))
    return [actors[place] for place in order]


def _in_rank_order(
    where: str,
    actors: Sequence[ActorHandle[Any]],
    world_size: int | None,
    ranks: Sequence[int] | None,
) -> list[ActorHandle[Any]]:
    refuse_client(where)

    is_list = isinstance(actors, (list, tuple))
    if not is_list or not actors or not all(isinstance(actor, ActorHandle) for actor in actors):
        raise OptionError(f"{where}: actors: expected a list of actor handles, got {actors!r:.200}")
    if len(set(actors)) != len(actors):
        raise RankError(
            f"{where}: actors: an actor is in the list twice; each rank is another actor"
        )
    size = len(actors)
    if world_size is not None and (isinstance(world_size, bool) or world_size != size):
        raise RankError(
            f"{where}: world_size: expected {size}, the number of actors, got {world_size!r}"
        )

    try:
        numbers = list(range(size)) if ranks is None else [operator.index(rank) for rank in ranks]
    except TypeError:
        numbers = []
    if sorted(numbers) != list(range(size)):
        raise RankError(
            f"{where}: ranks: expected each of 0 to {size - 1} once, one for each actor, got {ranks!r:.200}"
        )
    return [actors[numbers.index(rank)] for rank in range(size)]
