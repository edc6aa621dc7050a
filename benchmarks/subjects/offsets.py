"""Collectives in shared memory by where in their pages the ranks' arrays begin.

    python benchmarks offsets
    python benchmarks offsets --baseline PATH/libcolltensor.so             # and another build
    python benchmarks offsets --baseline CHECKOUT:PATH/libcolltensor.so    # and its Python

On some processors copies take several times as long where the target lies a little farther into its
page than the source does, and numpy's large arrays begin 16 bytes into a page
(native/include/colltensor/copy.h). Two ranks, float32, SUM. A table for each size has a row for
each operation and a column for each place: ``0``, ``16`` and so on for the arrays of both ranks,
``0,16`` for rank 0's at the beginning of a page and rank 1's 16 bytes into one.

The last column is bold where a place is more than 1.1 times slower than ``0``. With a baseline
there are its table, and one of its times over ours.
"""

from __future__ import annotations

from harness.libraries import ARRAYS
from harness.plots import size
from harness.run import BASELINE, THIS, Run, everywhere, ratio

OPERATIONS = tuple(name for name in ARRAYS if name not in ("barrier", "copyto", "memmove"))
OPTIONS = {
    "round_ms": 2.0,
    "baseline": "",
    "places": ("0", "4", "16", "32", "48", "64", "2048", "0,16", "16,0"),
    "operations": OPERATIONS,
    "sizes": (1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22),
}
CHOICES = {"operations": OPERATIONS}
SLOWER_AT_MOST = 1.1


def measure(run: Run) -> None:
    options, names = run.options, run.options.operations
    places = list(dict.fromkeys(["0", *options.places]))
    with run.started(run.builds("harness.libraries:Colltensor")) as worlds:
        for nbytes in options.sizes:
            found = {}
            for name in names:
                every = everywhere(worlds, (f"{name}@{place}" for place in places))
                found |= run.medians(worlds, every, nbytes, table=name)
            times = {
                (world, name): [found[f"{world} {name}@{place}"] for place in places]
                for world in worlds
                for name in names
            }
            for world in worlds:
                rows = [[name, *times[world, name], slowest(times[world, name])] for name in names]
                run.print(f"{size(nbytes)}, {world} build", ["us", *places, "slowest / 0"], rows)
            if BASELINE in worlds:
                pairs = ((name, times[BASELINE, name], times[THIS, name]) for name in names)
                rows = [[name, *map(ratio, before, now)] for name, before, now in pairs]
                run.print(f"{size(nbytes)}, baseline / this", ["operation", *places], rows)


def slowest(times: list[float]) -> str:
    found = ratio(max(times), times[0])
    return found if max(times) <= SLOWER_AT_MOST * times[0] else f"**{found}**"
