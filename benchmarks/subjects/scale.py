"""Groups of many Ray actors on one machine: what it takes to make one, and to allreduce.

    python benchmarks scale --plot docs/ray-scale.png
    python benchmarks scale --backends gloo --ranks 2,4,8,16

For each world size actors are started, a few at a time and each with a share of a CPU, until each
has answered; that is their own start. Then their first group is declared from the driver
(`create_collective_group`), timed by the driver; after it groups are declared, and made by the
actors (`init_collective_group` in all of them at once), in turns, and destroyed. A time of the
imperative way is that of the last actor, as it measured it. Rank 0 starts a Ray actor there,
through which the ranks find each other, and Ray takes half a second for it. Then every actor times
one allreduce of float32 at once, of which the slowest counts, and later 20, of which the slowest
rank's median counts. Medians over the rounds.
"""

from __future__ import annotations

import importlib
import statistics
import time
from typing import Any

import numpy as np
from harness.plots import Line, Panel
from harness.run import Run

SIZES = (2, 4, 8, 16, 32, 64)
OPTIONS = {"rounds": 5, "plot": "", "ranks": SIZES, "backends": ("auto", "gloo")}
AT_ONCE, CALLS = 8, 20
COLUMNS = {
    "start": ("actors' own start", "s", 1.0, 3, 0),
    "first": ("first group of the actors, declared", "ms", 1e-3, 0, 1),
    "declared": ("group, declared", "ms", 1e-3, 0, 0),
    "imperative": ("group, imperative", "ms", 1e-3, 1, 0),
    "first_call": ("first allreduce of 1 KiB", "ms", 1e-3, 2, 1),
    "call": ("allreduce of 1 KiB", "us", 1e-6, 2, 0),
}
"""What is measured: its name, its unit, its seconds, and the colour and style of its line."""


def col() -> Any:
    """Return colltensor, which an actor's first group imports."""
    return importlib.import_module("colltensor")


class Actor:
    """One rank."""

    def start(self, backend: str, rank: int) -> None:
        """Import what the backend's users have imported."""
        self.backend, self.rank, self.array = backend, rank, np.zeros(256, np.float32)
        if backend == "gloo":
            importlib.import_module("torch").set_num_threads(1)

    def init(self, name: str, world_size: int) -> float:
        """Join a group; return the seconds."""
        began, group = time.perf_counter(), (world_size, self.rank, self.backend, name)
        col().init_collective_group(*group, timeout_s=120)
        return time.perf_counter() - began

    def allreduce(self, name: str, calls: int) -> float:
        """Return the median seconds of an allreduce."""
        group, seconds = col().get_group_handle(name), []
        for _ in range(calls):
            began = time.perf_counter()
            group.allreduce(self.array)
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    def leave(self, name: str) -> float:
        col().destroy_collective_group(name)
        return 0.0


def declare(actors: list[Any], backend: str) -> tuple[float, Any]:
    """Declare a group of all actors; return the driver's seconds, and the group."""
    began, options = time.perf_counter(), {"backend": backend, "timeout_s": 120}
    group = col().create_collective_group(actors, group_name="declared", **options)
    return time.perf_counter() - began, group


def measure_one(world_size: int, backend: str, rounds: int) -> dict[str, float]:
    """Return the seconds of one world size, with actors of its own."""
    import ray

    actors: list[Any] = []

    def slowest(method: str, *arguments: Any) -> float:
        """Return the most seconds of a method that all actors run at once."""
        return max(ray.get([getattr(actor, method).remote(*arguments) for actor in actors]))

    remote, began = ray.remote(num_cpus=1 / 64)(Actor), time.perf_counter()
    while len(actors) < world_size:  # a few at a time, so that they do not crowd each other out
        ranks = range(len(actors), min(len(actors) + AT_ONCE, world_size))
        actors += [remote.remote() for _ in ranks]
        ray.get([actors[rank].start.remote(backend, rank) for rank in ranks])
    found: dict[str, list[float]] = {name: [] for name in COLUMNS}
    found["start"].append(time.perf_counter() - began)
    for number in range(1 + rounds):
        seconds, group = declare(actors, backend)
        found["declared" if number else "first"].append(seconds)
        if number:
            found["first_call"].append(slowest("allreduce", "declared", 1))
            found["call"].append(slowest("allreduce", "declared", CALLS))
        group.destroy()
        if number:
            found["imperative"].append(slowest("init", f"imperative {number}", world_size))
            slowest("leave", f"imperative {number}")
    for actor in actors:
        ray.kill(actor)
    return {what: statistics.median(seconds) for what, seconds in found.items()}


def measure(run: Run) -> None:
    ray_world: Any = importlib.import_module("harness.ray_world")
    run.note(ray=ray_world.ray.__version__)
    panels = []
    for backend in run.options.backends:
        with ray_world.local_ray(2):
            found = {
                size: measure_one(size, backend, run.options.rounds) for size in run.options.ranks
            }
        title, rows = f"backend {backend!r}", []
        for size, times in found.items():
            cells = ((times[what] / COLUMNS[what][2], int(what == "start")) for what in COLUMNS)
            rows.append([str(size), *(f"{value:,.{digits}f}" for value, digits in cells)])
        head = ["ranks", *(f"{name}, {unit}" for name, unit, *_ in COLUMNS.values())]
        run.print(title, head, rows, left=0)
        lines = {
            name: Line([(size, times[what]) for size, times in found.items()], color, style)
            for what, (name, _, _, color, style) in COLUMNS.items()
        }
        panels.append(Panel(title, lines))
    run.plot(panels, "ranks", "time", lambda ranks, _: f"{ranks:g}")
