"""Arrays in several layouts beside a contiguous one, of 1024 x 1024 elements of float32.

    python benchmarks layouts --backend gloo
    python benchmarks layouts --backend shm --baseline OTHER/CHECKOUT:OTHER/libcolltensor.so

"Some" ranks are those with odd numbers; the others have contiguous arrays.
"""

from __future__ import annotations

import argparse

import numpy as np
from harness.rank import InGroup, Loop, repeat
from harness.run import Run, add_options, everywhere

LAYOUTS = (
    "contiguous",
    "transposed on all ranks",
    "transposed on some",
    "every second column",
    "every second column on some",
)
SIDE = 1024


class Ranks(InGroup):
    """The ranks; an operation is the name of one and a layout."""

    def loop(self, operation: str, name: str) -> Loop:
        """Return the loop of an operation on a layout."""
        group, rank = self.group, self.rank
        x = self.layout("contiguous" if operation.endswith("some") and rank % 2 == 0 else operation)
        if name == "send":
            return repeat(lambda: group.recv(x, 0) if rank else group.send(x, 1))
        return repeat(lambda: getattr(group, name)(x))

    def layout(self, name: str) -> np.ndarray:
        """Return an array in a layout."""
        if name.startswith("every second column"):
            return self.array(2 * SIDE * SIDE).reshape(SIDE, 2 * SIDE)[:, ::2]
        x = self.array(SIDE * SIDE).reshape(SIDE, SIDE)
        return x.T if name.startswith("transposed") else x


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_options(parser, rounds=7, round_ms=20, baseline=True)
    parser.add_argument("--backend", default="shm")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--operations", default="allreduce", help="with commas; send is for 2 ranks"
    )


def measure(run: Run, options: argparse.Namespace) -> None:
    """Print a row for each operation, layout and build."""
    rows = []
    kinds = run.builds("subjects.layouts:Ranks", options={"backend": options.backend})
    with run.started(kinds, options.ranks) as worlds:
        for name in options.operations.split(","):
            found = run.measure(worlds, everywhere(worlds, LAYOUTS), name)
            for world in worlds:
                prefix = "" if world == "this" else f"{world} "
                contiguous = found[f"{prefix}contiguous"].median_us
                rows += [
                    [world, name, layout, time, f"{time / contiguous:.2f}"]
                    for layout in LAYOUTS
                    for time in [found[prefix + layout].median_us]
                ]
    head = ["build", "operation", "layout", "us", "of contiguous"]
    run.print(f"Layouts, {options.ranks} ranks, {options.backend}", head, rows, left=3)
