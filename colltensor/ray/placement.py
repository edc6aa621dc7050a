"""Starts the actors of a group in a placement group of Ray's, side by side or apart."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import ray
from ray.actor import ActorClass, ActorHandle
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from colltensor.errors import CollectiveTimeoutError, OptionError, RankError
from colltensor.ray.rendezvous import refuse_client

_STRATEGIES: Final = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


@contextlib.contextmanager
def placed_actors(
    actor_class: ActorClass[Any],
    count: int,
    args: Sequence[Any] | Callable[[int], Sequence[Any]] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    strategy: str = "PACK",
    num_cpus: float = 1,
    num_gpus: float = 0,
    resources: Mapping[str, float] | None = None,
    timeout_s: float = 30.0,
    **options: Any,
) -> Iterator[list[ActorHandle[Any]]]:
    """Start actors in a placement group of their own, all or none, and end both with the block.

        with colltensor.ray.placed_actors(Worker, 4, strategy="SPREAD") as actors:
            with colltensor.collective_group(actors) as group:
                ...

    Args:
        actor_class: The class, decorated with ``ray.remote``.
        count: How many actors.
        args: The arguments of the constructor. Or a function that returns them for an actor's place
            in the list, which is also its rank in ``collective_group(actors)``.
        kwargs: Keyword arguments of every constructor.
        strategy: ``"PACK"`` puts the actors on as few nodes as can hold them, ``"SPREAD"`` on as
            many as there are. ``"STRICT_PACK"`` and ``"STRICT_SPREAD"`` fail where one node, or one
            node each, is unavailable.
        num_cpus: What each actor reserves, whatever its class says.
        num_gpus: The same.
        resources: The same, of Ray's custom resources.
        timeout_s: How long the cluster may take to find room, in seconds.
        options: For ``actor_class.options()``: ``max_restarts``, ``max_concurrency``,
            ``runtime_env`` ...

    Yields:
        The actors' handles, those of one node side by side. Their constructors may still run.

    Raises:
        OptionError, RankError: An argument has a value that Ray could not use.
        CollectiveTimeoutError: The cluster has no room; nothing was started.
    """
    refuse_client("placed_actors")
    bundle = _bundle(actor_class, count, strategy, num_cpus, num_gpus, resources)
    group = placement_group([bundle] * count, strategy=strategy)
    actors: list[ActorHandle[Any]] = []

    try:
        _await(group, bundle, timeout_s)
        options.update(num_cpus=num_cpus, num_gpus=num_gpus, resources=dict(resources or {}))
        for place, index in enumerate(_by_node(group, count)):
            where = PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=index
            )
            start = actor_class.options(scheduling_strategy=where, **options)
            given = args(place) if callable(args) else args
            actors.append(start.remote(*given, **(kwargs or {})))
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(group)


def _bundle(
    actor_class: Any,
    count: Any,
    strategy: Any,
    num_cpus: float,
    num_gpus: float,
    resources: Mapping[str, float] | None,
) -> dict[str, float]:
    where = "placed_actors"
    if not isinstance(actor_class, ActorClass):
        raise OptionError(
            f"{where}: actor_class: expected a class decorated with ray.remote, got {actor_class!r:.200}"
        )
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise RankError(f"{where}: count: expected at least 1 actor, got {count!r}")
    if strategy not in _STRATEGIES:
        raise OptionError(
            f"{where}: strategy: expected one of {', '.join(_STRATEGIES)}, got {strategy!r}"
        )

    asked = {"CPU": num_cpus, "GPU": num_gpus, **(resources or {})}
    bundle = {name: amount for name, amount in asked.items() if amount > 0}
    if not bundle or len(bundle) < sum(amount != 0 for amount in asked.values()):
        raise OptionError(
            f"{where}: expected some resource, and none below 0, for each actor to reserve, got {asked}"
        )
    return bundle


def _await(group: PlacementGroup, bundle: Mapping[str, float], timeout_s: float) -> None:
    if not group.wait(timeout_s):
        raise CollectiveTimeoutError(
            f"placed_actors: timed out after {timeout_s:g} s: the cluster has no room for {group.bundle_count} actors "
            f"with {bundle} each, with this strategy; see `ray status`, ask for less, or raise timeout_s",
            (),
        )


def _by_node(group: PlacementGroup, count: int) -> list[int]:
    """Return the indices of the bundles, those of one node side by side."""
    nodes = placement_group_table(group)["bundles_to_node_id"]
    return sorted(range(count), key=lambda index: (nodes[index], index))
