"""Groups of many Ray actors on one machine: what it takes to make one, and a first and later allreduces of 1 KiB.

    python benchmarks scale --plot docs/ray-scale.png
    python benchmarks scale --backends gloo --ranks 2,4,8,16

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
from typing import Any

import numpy as np
from harness.plots import Line, Panel
from harness.run import Run, add_options, numbers

SIZES, AT_ONCE, CALLS = "2,4,8,16,32,64", 8, 20
COLUMNS = {
    "start": ("actors' own start", "s", 1.0, 3, 0),
    "first": ("first group of the actors, declared", "ms", 1e-3, 0, 1),
    "declared": ("group, declared", "ms", 1e-3, 0, 0),
    "imperative": ("group, imperative", "ms", 1e-3, 1, 0),
    "first_call": ("first allreduce of 1 KiB", "ms", 1e-3, 2, 1),
    "call": ("allreduce of 1 KiB", "us", 1e-6, 2, 0),
}
"""What is measured: its name, its unit and what that is in seconds, and the colour and style of its line."""


class Actor:
    """One rank."""

    def start(self, backend: str) -> None:
        """Import what the backend's users have imported."""
        self.array = np.zeros(256, np.float32)
        if backend == "gloo":
            importlib.import_module("torch").set_num_threads(1)

    def init(self, world_size: int, rank: int, backend: str, name: str) -> float:
        """Join a group; return the seconds."""
        import colltensor as col

        began = time.perf_counter()
        col.init_collective_group(world_size, rank, backend, name, timeout_s=120)
        return time.perf_counter() - began

    def allreduce(self, name: str, calls: int) -> float:
        """Return the median seconds of an allreduce."""
        import colltensor as col

        group, seconds = col.get_group_handle(name), []
        for _ in range(calls):
            began = time.perf_counter()
            group.allreduce(self.array)
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    def leave(self, name: str) -> None:
        """Destroy the group."""
        import colltensor as col

        col.destroy_collective_group(name)


def _start_actors(count: int, backend: str) -> list[Any]:
    """Start so many actors, a few at a time so that they do not crowd each other out."""
    import ray

    remote, actors = ray.remote(num_cpus=1 / 64)(Actor), []
    while len(actors) < count:
        batch = [remote.remote() for _ in range(min(AT_ONCE, count - len(actors)))]
        ray.get([actor.start.remote(backend) for actor in batch])
        actors += batch
    return actors


def _declare(actors: Sequence[Any], backend: str) -> tuple[float, Any]:
    """Declare a group of all actors; return the driver's seconds, and the group."""
    import colltensor as col

    began = time.perf_counter()
    group = col.create_collective_group(
        actors, backend=backend, group_name="declared", timeout_s=120
    )
    return time.perf_counter() - began, group


def _measure_one(world_size: int, backend: str, rounds: int) -> dict[str, float]:
    """Return the seconds of one world size, with actors of its own."""
    import ray

    began = time.perf_counter()
    actors = _start_actors(world_size, backend)
    found: dict[str, list[float]] = {"start": [time.perf_counter() - began]}
    first, group = _declare(actors, backend)
    group.destroy()
    found["first"] = [first]
    for number in range(rounds):
        seconds, group = _declare(actors, backend)
        first_calls = ray.get([actor.allreduce.remote("declared", 1) for actor in actors])
        calls = ray.get([actor.allreduce.remote("declared", CALLS) for actor in actors])
        group.destroy()
        name = f"imperative {number}"
        inits = ray.get(
            [
                actor.init.remote(world_size, rank, backend, name)
                for rank, actor in enumerate(actors)
            ]
        )
        ray.get([actor.leave.remote(name) for actor in actors])
        figures = {
            "declared": [seconds],
            "imperative": inits,
            "first_call": first_calls,
            "call": calls,
        }
        for what, of_ranks in figures.items():
            found.setdefault(what, []).append(max(of_ranks))
    for actor in actors:
        ray.kill(actor)
    return {what: statistics.median(seconds) for what, seconds in found.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_options(parser, rounds=5, plot=True)
    parser.add_argument(
        "--ranks", type=numbers, default=numbers(SIZES), help="world sizes, with commas"
    )
    parser.add_argument("--backends", default="auto,gloo", help="with commas")


def measure(run: Run, options: argparse.Namespace) -> None:
    """Print a table for each backend."""
    import ray

    run.note(ray=ray.__version__)
    panels = []
    for backend in options.backends.split(","):
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20
        )
        results = {
            world_size: _measure_one(world_size, backend, options.rounds)
            for world_size in options.ranks
        }
        ray.shutdown()
        head = ["ranks", *(f"{name}, {unit}" for name, unit, *_ in COLUMNS.values())]
        run.print(
            f"Backend {backend!r}",
            head,
            [
                [
                    str(size),
                    *(
                        f"{result[what] / COLUMNS[what][2]:,.{int(what == 'start')}f}"
                        for what in COLUMNS
                    ),
                ]
                for size, result in results.items()
            ],
            left=0,
        )
        panels.append(
            Panel(
                f"backend {backend!r}",
                {
                    name: Line(
                        [(size, result[what]) for size, result in results.items()], color, style
                    )
                    for what, (name, _, _, color, style) in COLUMNS.items()
                },
            )
        )
    run.plot(panels, "ranks", "time", lambda ranks, _: f"{ranks:g}")
