"""Asynchronous calls beside synchronous ones, and strided arrays beside contiguous ones, in shared memory.

Asynchronous calls are issued up to 1,000 at a time and awaited at the end, or each awaited before the next. Strided
arrays have 1024 x 1024 elements of float32.
"""

from __future__ import annotations

import argparse

import numpy as np
from harness.rank import InGroup, Loop, repeat
from harness.run import Run, add_options, everywhere

SIZES = (4, 1 << 10, 1 << 16)
AT_ONCE = 1000
CALLS = ("synchronous", "awaited at the end", "each awaited")
LAYOUTS = ("contiguous", "transposed on all ranks", "transposed on some", "every second column")


class Ranks(InGroup):
    """The ranks."""

    def loop(self, operation: str, nbytes: int) -> Loop:
        """Return the loop of a way to call, or of a layout."""
        group = self.group
        x = self.layout(operation) if operation in LAYOUTS else self.array(nbytes // 4)

        def awaited_at_the_end(calls: int) -> None:
            for first in range(0, calls, AT_ONCE):
                for work in [
                    group.allreduce(x, async_op=True) for _ in range(min(AT_ONCE, calls - first))
                ]:
                    work.wait()

        if operation == "awaited at the end":
            return awaited_at_the_end
        if operation == "each awaited":
            return repeat(lambda: group.allreduce(x, async_op=True).wait())
        return repeat(lambda: group.allreduce(x))

    def layout(self, name: str) -> np.ndarray:
        """Return an array in a layout."""
        if name == "every second column":
            return self.array(1 << 21).reshape(1024, 2048)[:, ::2]
        x = self.array(1 << 20).reshape(1024, 1024)
        transposed = name == "transposed on all ranks" or (
            name == "transposed on some" and self.rank % 2
        )
        return x.T if transposed else x


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_options(parser, rounds=7, places=("16", "0"))
    parser.add_argument("--ranks", type=int, default=2)


def measure(run: Run, options: argparse.Namespace) -> None:
    """Print both tables."""
    places = options.places
    with run.started(run.builds("subjects.asynchronous:Ranks"), options.ranks) as worlds:
        for title, names, sizes in (
            ("Ways to call", CALLS, SIZES),
            ("Layouts", LAYOUTS, (1 << 22,)),
        ):
            rows = []
            for nbytes in sizes:
                operations = [f"{name}@{place}" for name in names for place in places]
                found = run.measure(worlds, everywhere(worlds, operations), nbytes, table=title)
                rows += [
                    [name, f"{nbytes:,}", *(found[f"{name}@{place}"].median_us for place in places)]
                    for name in names
                ]
            run.print(
                f"{title}, allreduce", ["what", "bytes", *(f"at {place}" for place in places)], rows
            )
