"""Groups of many Ray actors on one machine: what it takes to make one, and a first and later allreduces of 1 KiB.

    python benchmarks/ray_scale.py --plot docs/ray-scale.png
    python benchmarks/ray_scale.py --backends gloo --ranks 2,4,8,16

For each world size actors are started, a few at a time and each with a share of a CPU, until each has answered; that is
their own start. Then their first group is declared from the driver (`create_collective_group`), timed by the driver;
after it groups are declared, and made by the actors (`init_collective_group` in all of them at once), in turns, and
destroyed. A time of the imperative way is that of the last actor, as it measured it. Rank 0 starts a Ray actor there,
through which the ranks find each other, and Ray takes half a second for it. Then every actor times one allreduce of
float32 at once, of which the slowest counts, and later 20, of which the slowest rank's median counts. Medians over the
rounds.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
from plots import Line, Panel, draw

import colltensor as col

SIZES = (2, 4, 8, 16, 32, 64)
AT_ONCE = 8
CALLS = 20


class Actor:
    """One rank."""

    def start(self, backend: str) -> None:
        """Import what the backend's users have imported."""
        self.array = np.zeros(256, np.float32)
        if backend == "gloo":
            importlib.import_module("torch").set_num_threads(1)

    def init(self, world_size: int, rank: int, backend: str, name: str) -> float:
        """Join a group; return the seconds."""
        began = time.perf_counter()
        col.init_collective_group(world_size, rank, backend, name, timeout_s=120)
        return time.perf_counter() - began

    def allreduce(self, name: str, calls: int) -> float:
        """Return the median seconds of an allreduce."""
        group, seconds = col.get_group_handle(name), []
        for _ in range(calls):
            began = time.perf_counter()
            group.allreduce(self.array)
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    def leave(self, name: str) -> None:
        """Destroy the group."""
        col.destroy_collective_group(name)


class Result(NamedTuple):
    """Seconds for one world size.

    Attributes:
        start: Until all actors had answered.
        first: The first declared group of these actors.
        declared: A later one.
        imperative: A group that the actors make.
        first_call: The first allreduce of a group.
        call: A later one.
    """

    start: float
    first: float
    declared: float
    imperative: float
    first_call: float
    call: float


HEAD = ("actors' own start, s", "first group, ms", "declared, ms", "imperative, ms", "first allreduce, ms",
        "allreduce, us")
UNITS = (1.0, 1e-3, 1e-3, 1e-3, 1e-3, 1e-6)


def start_actors(count: int, backend: str) -> list[Any]:
    """Start so many actors, a few at a time so that they do not crowd each other out."""
    remote, actors = ray.remote(num_cpus=1 / 64)(Actor), []
    while len(actors) < count:
        batch = [remote.remote() for _ in range(min(AT_ONCE, count - len(actors)))]
        ray.get([actor.start.remote(backend) for actor in batch])
        actors += batch
    return actors


def declare(actors: Sequence[Any], backend: str) -> tuple[float, Any]:
    """Declare a group of all actors; return the driver's seconds, and the group."""
    began = time.perf_counter()
    group = col.create_collective_group(actors, backend=backend, group_name="declared", timeout_s=120)
    return time.perf_counter() - began, group


def measure(world_size: int, backend: str, rounds: int) -> Result:
    """Measure one world size with actors of its own."""
    began = time.perf_counter()
    actors = start_actors(world_size, backend)
    start = time.perf_counter() - began
    first, group = declare(actors, backend)
    group.destroy()
    declared, imperative, first_calls, calls = [], [], [], []
    for number in range(rounds):
        seconds, group = declare(actors, backend)
        declared.append(seconds)
        first_calls.append(max(ray.get([actor.allreduce.remote("declared", 1) for actor in actors])))
        calls.append(max(ray.get([actor.allreduce.remote("declared", CALLS) for actor in actors])))
        group.destroy()
        name = f"imperative {number}"
        inits = [actor.init.remote(world_size, rank, backend, name) for rank, actor in enumerate(actors)]
        imperative.append(max(ray.get(inits)))
        ray.get([actor.leave.remote(name) for actor in actors])
    for actor in actors:
        ray.kill(actor)
    return Result(start, first, *map(statistics.median, (declared, imperative, first_calls, calls)))


def table(results: dict[int, Result]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| ranks | " + " | ".join(HEAD) + " |", "| ---: " * (len(HEAD) + 1) + "|"]
    for world_size, result in results.items():
        cells = [f"{value / unit:,.1f}" if unit == 1.0 else f"{value / unit:,.0f}"
                 for value, unit in zip(result, UNITS, strict=True)]
        lines.append(f"| {world_size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def panel(backend: str, results: dict[int, Result]) -> Panel:
    """Return the results as a panel of the figure."""
    def line(name: str, color: int, style: int = 0) -> Line:
        return Line([(world_size, getattr(result, name)) for world_size, result in results.items()], color, style)

    return Panel(f"backend {backend!r}", {
        "actors' own start": line("start", 3),
        "first group of the actors, declared": line("first", 0, 1),
        "group, declared": line("declared", 0),
        "group, imperative": line("imperative", 1),
        "first allreduce of 1 KiB": line("first_call", 2, 1),
        "allreduce of 1 KiB": line("call", 2),
    })


def main() -> None:
    """Measure every world size and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default=",".join(map(str, SIZES)), help="world sizes, with commas")
    parser.add_argument("--backends", default="auto,gloo", help="with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plot", type=Path, help="draw them into this PNG file")
    options = parser.parse_args()
    panels = []
    for backend in options.backends.split(","):
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
        results = {}
        for world_size in map(int, options.ranks.split(",")):
            results[world_size] = measure(world_size, backend, options.rounds)
            print(f"{backend}, {world_size} ranks: {results[world_size]}", flush=True)
        ray.shutdown()
        print(f"\n{backend}:\n{table(results)}\n", flush=True)
        panels.append(panel(backend, results))
    if options.plot:
        draw(options.plot, panels, "ranks", "time", lambda ranks, _: f"{ranks:g}")


if __name__ == "__main__":
    main()
