"""What view, checks and API add to a call: one rank on loopback, where the transport costs nothing.

1 KiB of float32; the lowest and the median of the rounds, less the cost of the loop. JAX arrays are
donated, and their shape was seen before (compiling takes tens of milliseconds a shape).
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

from harness.rank import InGroup, Loop, repeat
from harness.run import Run, everywhere

OPTIONS = {"rounds": 400, "round_ms": 0.5, "baseline": ""}
COUNT = 256
TARGETS_US = {"numpy": 3.0, "torch": 3.0, "jax": 40.0}
CALLS = ("numpy", "numpy, Group method", "torch", "torch, Group method")
CALLS += ("jax, donated", "jax, copied")


class Ranks(InGroup):
    def loop(self, operation: str) -> Loop:
        """Return the loop of a framework's array and a way to call; "empty" calls nothing."""
        import colltensor as col

        framework, _, way = operation.partition(", ")
        if operation == "empty":
            return repeat(lambda: None)
        module = importlib.import_module({"jax": "jax.numpy"}.get(framework, framework))
        ones: Any = self.array(COUNT) + 1 if framework == "numpy" else module.ones(COUNT)
        held = [ones]

        def donate() -> None:
            held[0] = col.allreduce(held[0], donate=True)

        if way == "donated":
            return repeat(donate)
        if way == "Group method":
            return repeat(lambda: self.group.allreduce(ones))
        return repeat(lambda: col.allreduce(ones))


def measure(run: Run) -> None:
    calls = [call for call in CALLS if find_spec(call.partition(",")[0])]
    with run.started(
        run.builds("subjects.overhead:Ranks", options={"backend": "auto"}), 1
    ) as worlds:
        found = run.measure(worlds, everywhere(worlds, ["empty", *calls]))
    for world in worlds:
        empty, rows = found[f"{world} empty"].median_us, []
        for call in calls:
            one, target = found[f"{world} {call}"], TARGETS_US[call.partition(",")[0]]
            rows.append([call, min(one.rounds_us) - empty, one.median_us - empty, target])
        title = f"allreduce, 1 KiB, 1 rank, {world} build"
        run.print(title, ["array", "lowest", "median", "target"], rows)
