"""Time calls of two ranks beside busy loops, in shared memory and over Gloo in turns, and see that timeouts hold.

    python benchmarks/overload.py [--loops 0 4] [--one-core] [--baseline LIB]

More runnable threads than processors is what data loaders make of a training machine. Prints the median and the 90th
percentile of an allreduce of float32 arrays, in us, each rank's worse one; and how long after its start a call whose
peer never comes raises with ``timeout_s=2``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROUNDS = 4
SIZES = (4, 65536, 1 << 20)
CALLS = {4: 150, 65536: 100, 1 << 20: 40}
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(10**6): pass"


def work(rank: int, folder: str) -> None:
    """Be one rank: print a line of JSON with times by wire and size."""
    import colltensor as col

    groups = {
        wire: col.init_collective_group(2, rank, wire, wire, init_method=f"file://{folder}/{wire}", timeout_s=120)
        for wire in ("shm", "gloo")
    }
    times: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for nbytes in SIZES:
            array = np.zeros(nbytes // 4, np.float32)
            for wire, group in groups.items():
                group.barrier()
                found = times.setdefault(f"{wire} {nbytes}", [])
                for _ in range(CALLS[nbytes]):
                    began = time.perf_counter()
                    group.allreduce(array)
                    found.append(time.perf_counter() - began)
    late = {}
    for wire in groups:
        place = f"file://{folder}/late-{wire}"
        own = col.init_collective_group(2, rank, wire, f"late {wire}", init_method=place, timeout_s=30)
        own.set_timeout(2.0)
        own.barrier()
        if rank == 0:
            began = time.monotonic()
            try:
                own.allreduce(np.zeros(1))
            except col.CollectiveTimeoutError:
                late[wire] = time.monotonic() - began
        else:
            time.sleep(12)
    print(json.dumps({"times": times, "late": late}), flush=True)


def measure(loops: int, one_core: bool, library: str) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Run both ranks beside so many busy loops; return times by wire and size, and when a timeout was raised."""
    cores = sorted(os.sched_getaffinity(0))[: 1 if one_core else None]
    variables = {**os.environ, **({"COLLTENSOR_LIBRARY": library} if library else {})}
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank", str(rank), "--folder", folder], stdout=subprocess.PIPE, text=True,
                env=variables, preexec_fn=lambda: os.sched_setaffinity(0, cores),
            )
            for rank in range(2)
        ]
        busy = [
            subprocess.Popen([sys.executable, "-c", BUSY], preexec_fn=lambda: os.sched_setaffinity(0, cores))
            for _ in range(loops)
        ]
        try:
            found = [json.loads(rank.communicate(timeout=300)[0].splitlines()[-1]) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
            for loop in busy:
                loop.kill()
                loop.wait()
    first, second = (one["times"] for one in found)
    times = {key: [max(pair) for pair in zip(first[key], second[key], strict=True)] for key in first}
    return times, found[0]["late"]


def main() -> None:
    """Print a table for each number of loops and each library."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loops", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--one-core", action="store_true", help="ranks and loops on one core")
    parser.add_argument("--baseline", default="", help="another build of the native library, run in turns")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        work(arguments.rank, arguments.folder)
        return
    for loops in arguments.loops:
        for name, library in [("this build", ""), *([("baseline", arguments.baseline)] if arguments.baseline else [])]:
            times, late = measure(loops, arguments.one_core, library and str(Path(library).resolve()))
            print(f"\n{loops} busy loops, {'one core' if arguments.one_core else 'all cores'}, {name}")
            print(f"{'bytes':>9} {'shm':>9} {'p90':>9} {'Gloo':>9} {'p90':>9} {'shm/Gloo':>9}")
            for nbytes in SIZES:
                row = [times[f"{wire} {nbytes}"] for wire in ("shm", "gloo")]
                middle = [statistics.median(values) * 1e6 for values in row]
                high = [statistics.quantiles(values, n=10)[-1] * 1e6 for values in row]
                print(f"{nbytes:>9} {middle[0]:9.0f} {high[0]:9.0f} {middle[1]:9.0f} {high[1]:9.0f} "
                      f"{middle[0] / middle[1]:9.2f}")
            print("timeout of 2 s raised after:", ", ".join(f"{wire} {s:.1f} s" for wire, s in late.items()))


if __name__ == "__main__":
    main()
