"""Collectives in shared memory by where in their pages the ranks' arrays begin.

    python benchmarks/copy_offsets.py
    python benchmarks/copy_offsets.py --baseline PATH/libcolltensor.so       # in turns with another build
    python benchmarks/copy_offsets.py --baseline PATH/libcolltensor.so --baseline-checkout PATH   # and its Python

On some processors copies take several times as long where the target lies a little farther into its page than the
source does, and numpy's large arrays begin 16 bytes into a page (native/include/colltensor/copy.h). Two ranks, float32,
SUM. A table for each size has a row for each operation and a column for each place: ``0``, ``16`` and so on for the
arrays of both ranks, ``0,16`` for rank 0's at the beginning of a page and rank 1's 16 bytes into one. All places, and
both builds, take turns in short rounds (``worlds``); medians of the rounds, in microseconds a call.

The last column is bold where a place is more than 1.1 times slower than ``0``. With a baseline there are its table, and
one of its times over ours.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from worlds import report, targets
from worlds.libraries import ARRAYS
from worlds.rounds import Contestant, Samples, measure
from worlds.world import Kind, World, WorldError, started

RANKS = 2
SIZES = (1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
OPERATIONS = tuple(name for name in ARRAYS if name not in ("barrier", "copyto", "memmove"))
PLACES = ("0", "4", "16", "32", "48", "64", "2048", "0,16", "16,0")
FIRST_PLACE = "0"
SLOWER_AT_MOST = 1.1
OURS, BASELINE = "ours", "baseline"

Table = dict[str, dict[str, Samples]]
"""The samples of one size, by operation and by ``world@place``."""


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, help="another libcolltensor.so, in turns with the one in use")
    parser.add_argument("--baseline-checkout", type=Path, help="whose colltensor the baseline needs, if not this one")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes a rank")
    parser.add_argument("--places", nargs="+", default=PLACES, help="bytes into a page, of both ranks or of each")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--round-ms", type=float, default=2.0, help="how long a round takes, about (2)")
    parser.add_argument("--pin", action="store_true", help="run rank r on core r")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: at least 2")
    if options.baseline is not None and not options.baseline.is_file():
        parser.error(f"--baseline: no file {options.baseline}")
    if options.baseline_checkout is not None and not (options.baseline_checkout / "colltensor").is_dir():
        parser.error(f"--baseline-checkout: no folder {options.baseline_checkout / 'colltensor'}")
    if FIRST_PLACE not in options.places:
        options.places = [FIRST_PLACE, *options.places]
    return options


def kinds(options: argparse.Namespace) -> list[Kind]:
    """Return the worlds to start."""
    worlds = [Kind(OURS, "colltensor")]
    if options.baseline is not None:
        library = ("COLLTENSOR_LIBRARY", str(options.baseline.absolute()))
        folder = options.baseline_checkout and str(options.baseline_checkout)
        worlds.append(Kind(BASELINE, "colltensor", environment=(library,), folder=folder))
    return worlds


def measure_size(worlds: dict[str, World], nbytes: int, options: argparse.Namespace) -> Table:
    """Measure all operations at one size."""
    table: Table = {}
    for operation in options.operations:
        print(f"{operation}, {targets.size(nbytes)}", file=sys.stderr, flush=True)
        contestants = [
            Contestant(f"{world}@{place}", world, f"{operation}@{place}")
            for place in options.places for world in worlds
        ]
        table[operation] = measure(worlds, contestants, nbytes, options.rounds, options.round_ms / 1e3)
    return table


def time_table(table: Table, world: str, places: list[str]) -> str:
    """Return the medians of one build by place, and how much slower than at the beginning of a page the slowest is."""
    rows = []
    for operation, samples in table.items():
        medians = [samples[f"{world}@{place}"].median_us for place in places]
        slowest = max(medians) / samples[f"{world}@{FIRST_PLACE}"].median_us
        verdict = f"{slowest:.2f}" if slowest <= SLOWER_AT_MOST else f"**{slowest:.2f}**"
        rows.append([operation, *(report.microseconds(median) for median in medians), verdict])
    return report.markdown([f"{world}, us", *places, "slowest / 0"], rows)


def ratio_table(table: Table, places: list[str]) -> str:
    """Return how many times faster than the baseline ours is."""
    rows = []
    for operation, samples in table.items():
        pairs = [(samples[f"{BASELINE}@{place}"], samples[f"{OURS}@{place}"]) for place in places]
        rows.append([operation, *(f"{before.median_us / after.median_us:.2f}" for before, after in pairs)])
    return report.markdown(["baseline / ours", *places], rows)


def main() -> None:
    """Measure and print."""
    options = parse()
    facts = report.machine()
    with started(kinds(options), RANKS, pin=options.pin, backend="shm") as worlds:
        facts.update(worlds[OURS].versions)
        tables = {nbytes: measure_size(worlds, nbytes, options) for nbytes in options.sizes}
    print(f"`{shlex.join(['python', *sys.argv])}`\n")
    print(f"{', '.join(f'{name} {value}' for name, value in facts.items())}; {os.confstr('CS_GNU_LIBC_VERSION')}. "
          f"Medians of {options.rounds} rounds of about {options.round_ms:g} ms each; columns are bytes into a page.")
    for nbytes, table in tables.items():
        print(f"\n## {targets.size(nbytes)}\n\n{time_table(table, OURS, options.places)}")
        if BASELINE in worlds:
            print(f"\n{time_table(table, BASELINE, options.places)}\n\n{ratio_table(table, options.places)}")


if __name__ == "__main__":
    try:
        main()
    except WorldError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
