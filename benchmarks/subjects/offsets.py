"""Collectives in shared memory by where in their pages the ranks' arrays begin.

    python benchmarks offsets
    python benchmarks offsets --baseline PATH/libcolltensor.so             # in turns with another build
    python benchmarks offsets --baseline CHECKOUT:PATH/libcolltensor.so    # and its Python

On some processors copies take several times as long where the target lies a little farther into its page than the
source does, and numpy's large arrays begin 16 bytes into a page (native/include/colltensor/copy.h). Two ranks, float32,
SUM. A table for each size has a row for each operation and a column for each place: ``0``, ``16`` and so on for the
arrays of both ranks, ``0,16`` for rank 0's at the beginning of a page and rank 1's 16 bytes into one.

The last column is bold where a place is more than 1.1 times slower than ``0``. With a baseline there are its table, and
one of its times over ours.
"""

from __future__ import annotations

import argparse

from harness.libraries import ARRAYS
from harness.rounds import Contestant
from harness.run import BASELINE, THIS, Run, add_options
from harness.targets import size

SIZES = (1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
OPERATIONS = tuple(name for name in ARRAYS if name not in ("barrier", "copyto", "memmove"))
PLACES = ("0", "4", "16", "32", "48", "64", "2048", "0,16", "16,0")
FIRST_PLACE = "0"
SLOWER_AT_MOST = 1.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_options(parser, round_ms=2, baseline=True, places=PLACES)
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes a rank")


def measure(run: Run, options: argparse.Namespace) -> None:
    """Print the tables of each size."""
    places = list(dict.fromkeys([FIRST_PLACE, *options.places]))
    with run.started(run.builds("harness.libraries:Colltensor")) as worlds:
        for nbytes in options.sizes:
            table = {}
            for operation in options.operations:
                contestants = [
                    Contestant(f"{world}@{place}", world, f"{operation}@{place}")
                    for place in places
                    for world in worlds
                ]
                found = run.measure(worlds, contestants, nbytes, table=operation)
                table[operation] = {label: one.median_us for label, one in found.items()}
            for world in worlds:
                rows = []
                for operation, medians in table.items():
                    times = [medians[f"{world}@{place}"] for place in places]
                    slowest = max(times) / medians[f"{world}@{FIRST_PLACE}"]
                    rows.append(
                        [
                            operation,
                            *times,
                            f"{slowest:.2f}" if slowest <= SLOWER_AT_MOST else f"**{slowest:.2f}**",
                        ]
                    )
                run.print(f"{size(nbytes)}, {world} build", ["us", *places, "slowest / 0"], rows)
            if BASELINE in worlds:
                run.print(
                    f"{size(nbytes)}, baseline / this",
                    ["operation", *places],
                    [
                        [
                            operation,
                            *(
                                f"{medians[f'{BASELINE}@{place}'] / medians[f'{THIS}@{place}']:.2f}"
                                for place in places
                            ),
                        ]
                        for operation, medians in table.items()
                    ],
                )
