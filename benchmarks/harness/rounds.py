"""Measures contestants in turns: short rounds, interleaved between the libraries, so that noise meets all alike."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.libraries import ROOTED, kind_of
from harness.world import Here, World, WorldError

MOST_CALLS = 50_000


@dataclass(frozen=True)
class Contestant:
    """An operation in a world.

    Attributes:
        label: Its column in a table.
        world: The world's name.
        operation: The operation, as in ``harness.libraries``.
    """

    label: str
    world: str
    operation: str


@dataclass(frozen=True)
class Samples:
    """What was measured of one contestant at one size.

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

    def quartiles_us(self) -> tuple[float, float]:
        """Return the first and the third quartile of the rounds."""
        low, _, high = statistics.quantiles(self.rounds_us, n=4)
        return low, high


def measure(
    worlds: Mapping[str, World | Here],
    contestants: Sequence[Contestant],
    *case: Any,
    rounds: int,
    round_ms: float,
    calls: int | None = None,
) -> dict[str, Samples]:
    """Measure contestants in one case.

    Args:
        worlds: The running worlds.
        contestants: Who takes part, with labels that differ. Those of one operation must compute the same.
        case: What ``Timed.loop`` of each needs to know besides the operation; mostly the size.
        rounds: The number of rounds of each.
        round_ms: How long a round should take, about.
        calls: The calls of a round, if it is not to be found out.

    Returns:
        The samples by label.

    Raises:
        WorldError: A world failed, or two contestants computed different results.
    """
    _prepare(worlds, contestants, case)
    plans = []
    for contestant in contestants:
        world = worlds[contestant.world]
        if calls is None:
            plans.append((contestant, *_calibrate(world, contestant, round_ms / 1e3)))
        else:
            world.ask("run", contestant.operation, 1, calls)
            plans.append((contestant, calls // 2, calls))
    times: dict[str, list[float]] = {contestant.label: [] for contestant in contestants}
    for number in range(rounds):
        first = number % len(plans)
        order = plans[first:] + plans[:first]
        # nobody always follows the same
        for contestant, warm_up, count in order if number % 2 else reversed(order):
            seconds = max(worlds[contestant.world].ask("run", contestant.operation, warm_up, count))
            times[contestant.label].append(seconds / count * 1e6)
    for name in {contestant.world for contestant in contestants}:
        worlds[name].ask("forget")
    return {
        contestant.label: Samples(count, times[contestant.label]) for contestant, _, count in plans
    }


def _prepare(
    worlds: Mapping[str, World | Here], contestants: Sequence[Contestant], case: tuple[Any, ...]
) -> None:
    """Make the arrays, and compare the results of those who do the same."""
    sums: dict[str, tuple[str, object]] = {}
    for contestant in contestants:
        found = worlds[contestant.world].ask("prepare", contestant.operation, *case)
        operation = kind_of(contestant.operation)
        other, expected = sums.setdefault(operation, (contestant.label, found))
        if found != expected:
            raise WorldError(
                f"{operation}, {case}: {contestant.label} and {other} computed different results"
            )


def _calibrate(world: World | Here, contestant: Contestant, round_s: float) -> tuple[int, int]:
    """Return the numbers of calls of a warm-up and of a round."""
    calls = 2
    for _ in range(3):
        seconds = max(world.ask("run", contestant.operation, 1, calls)) / calls
        calls = max(1, min(MOST_CALLS, round(round_s / seconds)))
    if kind_of(contestant.operation) in ROOTED:
        calls = math.ceil(calls / world.ranks) * world.ranks  # every rank is the root equally often
    print(
        f"    {contestant.label}: about {seconds * 1e6:,.1f} us, rounds of {calls}", file=sys.stderr
    )
    return math.ceil(calls / 2), calls
