"""Calls of two ranks beside busy loops, in shared memory and over Gloo; and their timeouts.

    python benchmarks overload --loops 0 4 --baseline LIBRARY

More runnable threads than processors is what data loaders make of a training machine. The table has
the median and the 90th percentile of single allreduces of float32 arrays, each rank's worse one;
and how long after its start a call whose peer never comes raises with ``timeout_s=2``. With
``--one-core`` ranks and loops share one core.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from itertools import product

import numpy as np
from harness.rank import Settings, Timed
from harness.run import Run, ratio

OPTIONS = {"rounds": 4, "baseline": "", "loops": (0, 4), "one_core": False}
BACKENDS = ("shm", "gloo")
CALLS = {4: 150, 1 << 16: 100, 1 << 20: 40}
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(10**6): pass"
HEAD = ["build", "bytes", "shm", "90th percentile", "Gloo", "90th percentile "]
HEAD += ["shm / Gloo", "late: shm, Gloo, s"]


class Ranks(Timed):
    """The ranks, with a group of each backend."""

    def __init__(self, settings: Settings, rank: int) -> None:
        super().__init__(settings, rank)
        self._groups = {name: self.join(name, name, timeout_s=120) for name in BACKENDS}

    def times(self, backend: str, nbytes: int) -> list[float]:
        """Return the microseconds of single calls."""
        group, array, times = self._groups[backend], self.array(nbytes // 4), []
        group.barrier()
        for _ in range(CALLS[nbytes]):
            began = time.perf_counter()
            group.allreduce(array)
            times.append((time.perf_counter() - began) * 1e6)
        return times

    def late(self, backend: str) -> float:
        """Return how long rank 0 waits for the other one, in seconds."""
        import colltensor as col

        group = self.join(backend, f"late-{backend}", timeout_s=120)
        group.set_timeout(2.0)
        group.barrier()
        began = time.monotonic()
        if self.rank == 0:
            with contextlib.suppress(col.CollectiveTimeoutError):
                group.allreduce(np.zeros(1))
        else:
            time.sleep(12)
        return time.monotonic() - began


def measure(run: Run) -> None:
    prefix = ["taskset", "-c", "0"] if run.options.one_core else []
    where = "one core" if prefix else "all cores"
    for loops in run.options.loops:
        times: dict[tuple[str, int, str], list[float]] = {}
        builds, rows = run.builds("subjects.overload:Ranks", prefixes=[prefix]), []
        with run.started(builds) as worlds, contextlib.ExitStack() as undo:
            for _ in range(loops):
                busy = undo.enter_context(subprocess.Popen([*prefix, sys.executable, "-c", BUSY]))
                undo.callback(busy.kill)
            for _ in range(run.options.rounds):
                for nbytes, (name, world), backend in product(CALLS, worlds.items(), BACKENDS):
                    slower = map(max, *world.ask("times", backend, nbytes))
                    times.setdefault((name, nbytes, backend), []).extend(slower)
            for name, world in worlds.items():
                late = [f"{world.ask('late', backend)[0]:.1f}" for backend in BACKENDS]
                for nbytes in CALLS:
                    both = [times[name, nbytes, backend] for backend in BACKENDS]
                    medians = [statistics.median(one) for one in both]
                    tenths = [statistics.quantiles(one, n=10)[-1] for one in both]
                    cells = [cell for pair in zip(medians, tenths, strict=True) for cell in pair]
                    rows.append([name, f"{nbytes:,}", *cells, ratio(*medians), ", ".join(late)])
        run.print(f"{loops} busy loops, {where}", HEAD, rows)
