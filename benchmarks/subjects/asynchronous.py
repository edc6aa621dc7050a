"""Asynchronous calls beside synchronous ones in shared memory.

Asynchronous calls are issued up to 1,000 at a time and awaited at the end, or each awaited before the next.
"""

from __future__ import annotations

import argparse

from harness.rank import InGroup, Loop, repeat
from harness.run import Run, add_options, everywhere

SIZES = (4, 1 << 10, 1 << 16)
AT_ONCE = 1000
CALLS = ("synchronous", "awaited at the end", "each awaited")


class Ranks(InGroup):
    """The ranks."""

    def loop(self, operation: str, nbytes: int) -> Loop:
        """Return the loop of a way to call."""
        group, x = self.group, self.array(nbytes // 4)

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_options(parser, rounds=7, places=("16", "0"))
    parser.add_argument("--ranks", type=int, default=2)


def measure(run: Run, options: argparse.Namespace) -> None:
    """Print the table."""
    places, rows = options.places, []
    with run.started(run.builds("subjects.asynchronous:Ranks"), options.ranks) as worlds:
        operations = [f"{name}@{place}" for name in CALLS for place in places]
        for nbytes in SIZES:
            found = run.measure(worlds, everywhere(worlds, operations), nbytes)
            rows += [
                [name, f"{nbytes:,}", *(found[f"{name}@{place}"].median_us for place in places)]
                for name in CALLS
            ]
    head = ["what", "bytes", *(f"at {place}" for place in places)]
    run.print("Ways to call, allreduce", head, rows)
