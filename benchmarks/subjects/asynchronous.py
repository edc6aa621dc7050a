"""Asynchronous calls beside synchronous ones in shared memory.

They are issued up to 1,000 at a time and awaited at the end, or each awaited before the next.
"""

from __future__ import annotations

from harness.rank import InGroup, Loop, repeat
from harness.run import Run, everywhere

OPTIONS = {"rounds": 7, "ranks": 2, "places": ("16", "0")}
AT_ONCE = 1000
CALLS = ("synchronous", "awaited at the end", "each awaited")
SIZES = (4, 1 << 10, 1 << 16)


class Ranks(InGroup):
    def loop(self, operation: str, nbytes: int) -> Loop:
        group, x = self.group, self.array(nbytes // 4)

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


def measure(run: Run) -> None:
    rows, places = [], run.options.places
    with run.started(run.builds("subjects.asynchronous:Ranks"), run.options.ranks) as worlds:
        for nbytes in SIZES:
            every = everywhere(worlds, (f"{name}@{at}" for name in CALLS for at in places))
            found = run.medians(worlds, every, nbytes)
            for name in CALLS:
                times = (found[f"this {name}@{place}"] for place in places)
                rows.append([name, f"{nbytes:,}", *times])
    head = ["what", "bytes", *(f"at {at}" for at in places)]
    run.print("Ways to call, allreduce", head, rows)
