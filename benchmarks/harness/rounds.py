"""Measures contestants in turns, in short rounds, so that noise meets all alike."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from harness.libraries import ROOTED, kind_of
from harness.world import Here, World, WorldError

MOST_CALLS = 50_000
Worlds = Mapping[str, "World | Here"]


class Contestant(NamedTuple):
    """An operation in a world, under a label of its own, which is its column in a table."""

    label: str
    world: str
    operation: str


@dataclass(frozen=True)
class Samples:
    """What was measured of one contestant in one case.

    Attributes:
        calls: The calls of a round.
        rounds_us: For each round, the microseconds of a call on the slowest rank.
    """

    calls: int
    rounds_us: list[float]

    @property
    def median_us(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.rounds_us)


def measure(
    worlds: Worlds,
    contestants: Sequence[Contestant],
    *case: Any,
    rounds: int,
    round_ms: float,
    calls: int | None = None,
) -> dict[str, Samples]:
    """Measure contestants in one case, and return their samples by label.

    Args:
        worlds: The running worlds.
        contestants: Who takes part, with labels that differ. Those of one operation must compute
            the same.
        case: What ``Timed.loop`` of each needs to know besides the operation; mostly the size.
        rounds: The number of rounds of each.
        round_ms: How long a round should take, about.
        calls: The calls of a round, if it is not to be found out.

    Raises:
        WorldError: A world failed, or two contestants computed different results.
    """
    _prepare(worlds, contestants, case)
    plans = []
    for one in contestants:
        if calls is None:
            plans.append((one, *_calibrate(worlds[one.world], one, round_ms / 1e3)))
        else:
            worlds[one.world].ask("run", one.operation, 1, calls)
            plans.append((one, calls // 2, calls))
    times: dict[str, list[float]] = {one.label: [] for one in contestants}
    for number in range(rounds):
        first = number % len(plans)
        order = plans[first:] + plans[:first]
        # nobody always follows the same
        for one, warm_up, count in order if number % 2 else reversed(order):
            seconds = max(worlds[one.world].ask("run", one.operation, warm_up, count))
            times[one.label].append(seconds / count * 1e6)
    for name in {one.world for one in contestants}:
        worlds[name].ask("forget")
    return {one.label: Samples(count, times[one.label]) for one, _, count in plans}


def _prepare(worlds: Worlds, contestants: Sequence[Contestant], case: tuple[Any, ...]) -> None:
    """Make the arrays, and compare the results of those who do the same."""
    sums: dict[str, tuple[str, object]] = {}
    for one in contestants:
        found = worlds[one.world].ask("prepare", one.operation, *case)
        kind = kind_of(one.operation)
        other, expected = sums.setdefault(kind, (one.label, found))
        if found != expected:
            raise WorldError(f"{kind}, {case}: {one.label} and {other} computed different results")


def _calibrate(world: World | Here, one: Contestant, round_s: float) -> tuple[int, int]:
    """Return the numbers of calls of a warm-up and of a round."""
    calls = 2
    for _ in range(3):
        seconds = max(world.ask("run", one.operation, 1, calls)) / calls
        calls = max(1, min(MOST_CALLS, round(round_s / seconds)))
    if kind_of(one.operation) in ROOTED:
        calls = math.ceil(calls / world.ranks) * world.ranks  # every rank is the root equally often
    print(f"    {one.label}: about {seconds * 1e6:,.1f} us, rounds of {calls}", file=sys.stderr)
    return math.ceil(calls / 2), calls
