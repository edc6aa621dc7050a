"""Arrays in several layouts beside a contiguous one, of 1024 x 1024 elements of float32.

    python benchmarks layouts --backend gloo
    python benchmarks layouts --backend shm --baseline OTHER/CHECKOUT:OTHER/libcolltensor.so

"Some" ranks are those with odd numbers; the others have contiguous arrays. The operation ``send``
is for 2 ranks.
"""

from __future__ import annotations

import numpy as np
from harness.rank import InGroup, Loop, repeat
from harness.run import Run, everywhere, ratio

LAYOUTS = (
    "contiguous",
    "transposed on all ranks",
    "transposed on some",
    "every second column",
    "every second column on some",
)
OPTIONS = {
    "rounds": 7,
    "round_ms": 20.0,
    "baseline": "",
    "backend": "shm",
    "ranks": 2,
    "operations": ("allreduce",),
}
CHOICES = {"operations": ("allreduce", "reduce", "broadcast", "send")}
SIDE = 1024


class Ranks(InGroup):
    def loop(self, operation: str, name: str) -> Loop:
        group, rank = self.group, self.rank
        x = self.layout("contiguous" if operation.endswith("some") and rank % 2 == 0 else operation)
        if name == "send":
            return repeat(lambda: group.recv(x, 0) if rank else group.send(x, 1))
        return repeat(lambda: getattr(group, name)(x))

    def layout(self, name: str) -> np.ndarray:
        if name.startswith("every second column"):
            return self.array(2 * SIDE * SIDE).reshape(SIDE, 2 * SIDE)[:, ::2]
        x = self.array(SIDE * SIDE).reshape(SIDE, SIDE)
        return x.T if name.startswith("transposed") else x


def measure(run: Run) -> None:
    rows, ranks, own = [], run.options.ranks, {"backend": run.options.backend}
    with run.started(run.builds("subjects.layouts:Ranks", options=own), ranks) as worlds:
        for name in run.options.operations:
            found = run.medians(worlds, everywhere(worlds, LAYOUTS), name)
            for world in worlds:
                times = [found[f"{world} {layout}"] for layout in LAYOUTS]
                rows += [
                    [world, name, layout, time, ratio(time, times[0])]
                    for layout, time in zip(LAYOUTS, times, strict=True)
                ]
    head = ["build", "operation", "layout", "us", "of contiguous"]
    run.print(f"Layouts, {ranks} ranks, {run.options.backend}", head, rows, left=3)
