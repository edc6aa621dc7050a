"""Measures contestants in turns: short rounds, interleaved between the libraries, so that noise meets all alike."""

from __future__ import annotations

import math
import statistics
import sys
from dataclasses import dataclass

from worlds.libraries import ROOTED, kind_of
from worlds.world import World, WorldError

MOST_CALLS = 50_000


@dataclass(frozen=True)
class Contestant:
    """An operation in a world.

    Attributes:
        label: Its column in a table.
        world: The world's name.
        operation: The operation, as in ``worlds.libraries``.
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
    worlds: dict[str, World], contestants: list[Contestant], nbytes: int, rounds: int, round_s: float
) -> dict[str, Samples]:
    """Measure contestants at one size.

    Args:
        worlds: The running worlds.
        contestants: Who takes part, with labels that differ. Those of one operation must compute the same.
        nbytes: The size.
        rounds: The number of rounds of each.
        round_s: How long a round should take, about.

    Returns:
        The samples by label.

    Raises:
        WorldError: A world failed, or two contestants computed different results.
    """
    _prepare(worlds, contestants, nbytes)
    plans = [(contestant, *_calibrate(worlds[contestant.world], contestant, round_s)) for contestant in contestants]
    times: dict[str, list[float]] = {contestant.label: [] for contestant in contestants}
    for number in range(rounds):
        first = number % len(plans)
        order = plans[first:] + plans[:first]
        for contestant, warm_up, calls in order if number % 2 else reversed(order):  # nobody always follows the same
            seconds = max(worlds[contestant.world].ask("run", contestant.operation, warm_up, calls))
            times[contestant.label].append(seconds / calls * 1e6)
    for world in {contestant.world for contestant in contestants}:
        worlds[world].ask("forget")
    return {contestant.label: Samples(calls, times[contestant.label]) for contestant, _, calls in plans}


def _prepare(worlds: dict[str, World], contestants: list[Contestant], nbytes: int) -> None:
    """Make the arrays, and compare the results of those who do the same."""
    sums: dict[str, tuple[str, object]] = {}
    for contestant in contestants:
        found = worlds[contestant.world].ask("prepare", contestant.operation, nbytes)
        operation = kind_of(contestant.operation)
        other, expected = sums.setdefault(operation, (contestant.label, found))
        if found != expected:
            raise WorldError(f"{operation}, {nbytes} bytes: {contestant.label} and {other} computed different results")


def _calibrate(world: World, contestant: Contestant, round_s: float) -> tuple[int, int]:
    """Return the numbers of calls of a warm-up and of a round."""
    calls = 2
    for _ in range(3):
        seconds = max(world.ask("run", contestant.operation, 1, calls)) / calls
        calls = max(1, min(MOST_CALLS, round(round_s / seconds)))
    if kind_of(contestant.operation) in ROOTED:
        calls = math.ceil(calls / world.ranks) * world.ranks  # every rank is the root equally often
    print(f"    {contestant.label}: about {seconds * 1e6:,.1f} us, rounds of {calls}", file=sys.stderr)
    return math.ceil(calls / 2), calls
