"""Allreduce of numpy arrays over each provider of Gloo that is here.

    python benchmarks providers                  2 ranks over loopback
    python benchmarks providers --namespaces     2 x 2 ranks on two hosts, backend "hierarchical"
    python benchmarks providers --other-python /path/to/python3.10

pygloo exists for Python 3.10 and below only, where recent versions of torch do not: `--other-python` names the Python
of an environment of its own, with colltensor and pygloo, whose providers take turns with these. Each provider is
compared with the native one of its own Python. Hosts are network namespaces with a link between them, which needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys

from harness.namespaces import inside, two_hosts
from harness.rounds import Contestant
from harness.run import Run, add_options, numbers
from harness.world import Kind

SIZES = ",".join(str(4**power) for power in range(1, 14) if power not in (2, 3, 4))
FIND = "import sys; from importlib.util import find_spec as f; print('%d.%d' % sys.version_info[:2], *filter(f, {}))"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_options(parser, rounds=25, round_ms=20, places=("16", "0"))
    parser.add_argument("--namespaces", action="store_true", help="two hosts with two ranks each")
    parser.add_argument(
        "--other-python", help="another Python, whose providers are measured as well"
    )
    parser.add_argument("--sizes", type=numbers, default=numbers(SIZES), help="bytes, with commas")


def measure(run: Run, options: argparse.Namespace) -> None:
    """Print the table."""
    ranks, backend = (4, "hierarchical") if options.namespaces else (2, "gloo")
    kinds: dict[str, Kind] = {}
    with contextlib.ExitStack() as undo:
        holders = undo.enter_context(two_hosts()) if options.namespaces else []
        prefixes = [inside(holder, []) for holder in holders for _ in range(2)] or [[]]
        for python in filter(None, (sys.executable, options.other_python)):
            find = [python, "-c", FIND.format(("torch", "pygloo"))]
            version, *there = subprocess.run(
                find, capture_output=True, text=True, check=True
            ).stdout.split()
            for provider in ("native", *there):
                kinds[f"{provider}, {version}"] = Kind(
                    f"{provider}, {version}",
                    "harness.libraries:Colltensor",
                    python,
                    prefixes=prefixes,
                    options={"backend": backend, "provider": provider},
                )
        worlds = undo.enter_context(run.started([*kinds.values()], ranks))
        columns = {
            f"{name} at {place}": (name, place) for name in kinds for place in options.places
        }
        contestants = [
            Contestant(label, name, f"allreduce@{place}")
            for label, (name, place) in columns.items()
        ]
        ours = {
            label: f"native, {name.split(', ')[1]} at {place}"
            for label, (name, place) in columns.items()
        }
        others = [label for label in columns if ours[label] != label]
        rows = []
        for nbytes in options.sizes:
            found = {
                label: one.median_us
                for label, one in run.measure(worlds, contestants, nbytes).items()
            }
            rows.append(
                [
                    f"{nbytes:,}",
                    *found.values(),
                    f"{nbytes / next(iter(found.values())) / 1e3:.2f}",
                    *(f"{found[label] / found[ours[label]]:.2f}" for label in others),
                ]
            )
    head = [
        f"bytes, {ranks} ranks",
        *columns,
        "GB/s, native",
        *(f"{label} / native" for label in others),
    ]
    run.print("Allreduce by provider", head, rows)
