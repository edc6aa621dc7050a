"""What view, checks and API add to a call: one rank on loopback, where the transport costs nothing.

1 KiB of float32; the lowest and the median of the rounds, less the cost of the loop. JAX arrays are donated, and their
shape was seen before (compiling takes tens of milliseconds a shape).
"""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from harness.rank import InGroup, Loop, repeat
from harness.run import Run, add_options, everywhere

COUNT = 256
TARGETS_US = {"numpy": 3.0, "torch": 3.0, "jax": 40.0}
CALLS = (
    "numpy",
    "numpy, Group method",
    "torch",
    "torch, Group method",
    "jax, donated",
    "jax, copied",
)


class Ranks(InGroup):
    """The rank."""

    def loop(self, operation: str) -> Loop:
        """Return the loop of a framework's array and a way to call; "empty" is a loop that calls nothing."""
        import colltensor as col

        framework, _, way = operation.partition(", ")
        if framework == "jax":
            return self._jax(way)
        if operation == "empty":
            return repeat(lambda: None)
        array: Any = self.array(COUNT) + 1
        if framework == "torch":
            array = importlib.import_module("torch").ones(COUNT)
        if way:
            return repeat(lambda: self.group.allreduce(array))
        return repeat(lambda: col.allreduce(array))

    def _jax(self, way: str) -> Loop:
        import jax.numpy as jnp

        import colltensor as col

        held = [jnp.ones(COUNT)]
        if way == "copied":
            return repeat(lambda: col.allreduce(held[0]))

        def donate() -> None:
            held[0] = col.allreduce(held[0], donate=True)

        return repeat(donate)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_options(parser, rounds=400, round_ms=0.5, baseline=True)


def measure(run: Run, options: argparse.Namespace) -> None:
    """Print the table of each build."""
    calls = [call for call in CALLS if importlib.util.find_spec(call.partition(",")[0])]
    with run.started(
        run.builds("subjects.overhead:Ranks", options={"backend": "auto"}), ranks=1
    ) as worlds:
        found = run.measure(worlds, everywhere(worlds, ["empty", *calls]))
    for world in worlds:
        of = {
            call: found[call if world == "this" else f"{world} {call}"]
            for call in ("empty", *calls)
        }
        empty = of["empty"].median_us
        rows = [
            [
                call,
                min(of[call].rounds_us) - empty,
                of[call].median_us - empty,
                TARGETS_US[call.partition(",")[0]],
            ]
            for call in calls
        ]
        run.print(
            f"allreduce, 1 KiB, 1 rank, {world} build",
            ["array", "lowest", "median", "target"],
            rows,
        )
