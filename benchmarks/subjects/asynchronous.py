"""Asynchronous calls beside synchronous ones, strided arrays beside contiguous ones.

Both are in shared memory. Asynchronous calls are issued up to 1,000 at a time and awaited at the
end, or each awaited before the next. Strided arrays have 1024 x 1024 elements of float32.
"""

from __future__ import annotations

import numpy as np
from harness.rank import InGroup, Loop, repeat
from harness.run import Run, everywhere

OPTIONS = {"rounds": 7, "ranks": 2, "places": ("16", "0")}
AT_ONCE = 1000
CALLS = ("synchronous", "awaited at the end", "each awaited")
LAYOUTS = ("contiguous", "transposed on all ranks", "transposed on some", "every second column")
TABLES = (("Ways to call", CALLS, (4, 1 << 10, 1 << 16)), ("Layouts", LAYOUTS, (1 << 22,)))


class Ranks(InGroup):
    def loop(self, operation: str, nbytes: int) -> Loop:
        group = self.group
        x = self.layout(operation) if operation in LAYOUTS else self.array(nbytes // 4)

        def awaited_at_the_end(calls: int) -> None:
            for first in range(0, calls, AT_ONCE):
                together = range(min(AT_ONCE, calls - first))
                for work in [group.allreduce(x, async_op=True) for _ in together]:
                    work.wait()

        if operation == "awaited at the end":
            return awaited_at_the_end
        if operation == "each awaited":
            return repeat(lambda: group.allreduce(x, async_op=True).wait())
        return repeat(lambda: group.allreduce(x))

    def layout(self, name: str) -> np.ndarray:
        if name == "every second column":
            return self.array(1 << 21).reshape(1024, 2048)[:, ::2]
        x, some = self.array(1 << 20).reshape(1024, 1024), name == "transposed on some"
        return x.T if name == "transposed on all ranks" or (some and self.rank % 2) else x


def measure(run: Run) -> None:
    places = run.options.places
    with run.started(run.builds("subjects.asynchronous:Ranks"), run.options.ranks) as worlds:
        for title, names, sizes in TABLES:
            rows = []
            for nbytes in sizes:
                every = everywhere(worlds, (f"{name}@{at}" for name in names for at in places))
                found = run.medians(worlds, every, nbytes, table=title)
                for name in names:
                    times = (found[f"this {name}@{place}"] for place in places)
                    rows.append([name, f"{nbytes:,}", *times])
            run.print(
                f"{title}, allreduce", ["what", "bytes", *(f"at {at}" for at in places)], rows
            )
