"""Calls of two ranks beside busy loops, in shared memory and over Gloo in turns; and that timeouts hold.

    python benchmarks overload --loops 0 4 --baseline LIBRARY

More runnable threads than processors is what data loaders make of a training machine. The table has the median and the
90th percentile of single allreduces of float32 arrays, each rank's worse one; and how long after its start a call whose
peer never comes raises with ``timeout_s=2``.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
from harness.rank import Settings, Timed
from harness.run import Run, add_options

BACKENDS = ("shm", "gloo")
CALLS = {4: 150, 1 << 16: 100, 1 << 20: 40}
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(10**6): pass"
ONE_CORE = ("taskset", "-c", "0")


class Ranks(Timed):
    """The ranks, with a group of each backend."""

    def __init__(self, settings: Settings, rank: int) -> None:
        super().__init__(settings, rank)
        self._groups = {backend: self._join(backend, backend) for backend in BACKENDS}

    def _join(self, backend: str, name: str) -> object:
        import colltensor as col

        method = f"file://{self.settings.folder}/{self.settings.world}-{name}"
        return col.init_collective_group(
            2, self.rank, backend, name, init_method=method, timeout_s=120
        )

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

        group = self._join(backend, f"late-{backend}")
        group.set_timeout(2.0)
        group.barrier()
        began = time.monotonic()
        if self.rank == 0:
            with contextlib.suppress(col.CollectiveTimeoutError):
                group.allreduce(np.zeros(1))
        else:
            time.sleep(12)
        return time.monotonic() - began


@contextlib.contextmanager
def _busy(loops: int, prefix: tuple[str, ...]) -> Iterator[None]:
    """Run busy loops for the length of a ``with`` block."""
    processes = [subprocess.Popen([*prefix, sys.executable, "-c", BUSY]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_options(parser, rounds=4, baseline=True)
    parser.add_argument("--loops", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--one-core", action="store_true", help="ranks and loops on one core")


def measure(run: Run, options: argparse.Namespace) -> None:
    """Print a table for each number of loops."""
    prefix = ONE_CORE if options.one_core else ()
    head = [
        "build",
        "bytes",
        "shm",
        "90th percentile",
        "Gloo",
        "90th percentile ",
        "shm / Gloo",
        "late: shm, Gloo, s",
    ]
    for loops in options.loops:
        with (
            run.started(run.builds("subjects.overload:Ranks", prefixes=[prefix])) as worlds,
            _busy(loops, prefix),
        ):
            times: dict[tuple[str, int, str], list[float]] = {}
            for _ in range(options.rounds):
                for nbytes in CALLS:
                    for name, world in worlds.items():
                        for backend in BACKENDS:
                            pairs = zip(*world.ask("times", backend, nbytes), strict=True)
                            times.setdefault((name, nbytes, backend), []).extend(map(max, pairs))
            late = {
                name: [world.ask("late", backend)[0] for backend in BACKENDS]
                for name, world in worlds.items()
            }
        rows = []
        for name in worlds:
            for nbytes in CALLS:
                both = [times[name, nbytes, backend] for backend in BACKENDS]
                cells = [
                    (statistics.median(one), statistics.quantiles(one, n=10)[-1]) for one in both
                ]
                rows.append(
                    [
                        name,
                        f"{nbytes:,}",
                        *cells[0],
                        *cells[1],
                        f"{cells[0][0] / cells[1][0]:.2f}",
                        ", ".join(f"{seconds:.1f}" for seconds in late[name]),
                    ]
                )
        run.print(f"{loops} busy loops, {'one core' if prefix else 'all cores'}", head, rows)
