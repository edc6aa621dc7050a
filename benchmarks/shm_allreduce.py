"""Float32 allreduce in place from Python on numpy arrays: shared memory beside torch's Gloo, in one run.

    python benchmarks/shm_allreduce.py --ranks 2 --pin

Every rank is a process with a group of each library; for every size the libraries take turns in short rounds, so
that noise meets all alike. A time is what rank 0 measured for a round of calls divided by their number; the table
has the lowest decile and the median of the rounds. `fast` is the backend's function for a framework's own tensor,
`group` is Group.allreduce. Algorithm bandwidth is the buffer's bytes over the median of `fast`. The last line is
what two processes need for one memcpy of 64 MiB each at the same time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

SIZES = (4, 1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26)
ROUND_S = 0.004


def rank_main(rank: int, ranks: int, folder: str, arguments: argparse.Namespace) -> None:
    """Measure as one rank; rank 0 prints."""
    if arguments.pin:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank % arguments.cores]})
    import colltensor as col

    group = col.init_collective_group(ranks, rank, "shm", "measured", init_method=f"file://{folder}", timeout_s=60)
    backend = group._backend
    names = ["fast", "group"]
    gloo: Any = None
    if arguments.gloo:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        store = dist.FileStore(f"{folder}/torch", ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        gloo = torch, dist
        names.append("gloo")
    if rank == 0:
        print(f"| bytes, {ranks} ranks | " + " | ".join(f"{name}: decile, median us" for name in names) + " | GB/s |")
        print("| ---: " * (len(names) + 2) + "|")
    for nbytes in arguments.sizes:
        data = np.ones(nbytes // 4, np.float32)
        calls: dict[str, Callable[[], object]] = {
            "fast": lambda data=data: backend.fast_allreduce(data, 3, 60.0),
            "group": lambda data=data: group.allreduce(data, col.ReduceOp.MAX),
        }
        if gloo is not None:
            tensor = gloo[0].from_numpy(data)
            calls["gloo"] = lambda tensor=tensor: gloo[1].all_reduce(tensor, gloo[1].ReduceOp.MAX)
        times = measure(group, calls, arguments.rounds)
        if rank == 0:
            median = {name: statistics.median(times[name]) for name in names}
            cells = [f"{statistics.quantiles(times[name], n=10)[0]:,.2f}, {median[name]:,.2f}" for name in names]
            print(f"| {nbytes:,} | {' | '.join(cells)} | {nbytes / median['fast'] / 1e3:.2f} |", flush=True)
    source, target = np.ones(1 << 24, np.float32), np.ones(1 << 24, np.float32)
    copies = measure(group, {"copy": lambda: np.copyto(target, source)}, arguments.rounds)["copy"]
    if rank == 0:
        print(f"\n64 MiB copied by {ranks} processes at once: {statistics.median(copies):,.0f} us")
    group.barrier()
    col.destroy_collective_group("measured")


def measure(group: Any, calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the microseconds of a call, one number for each round, by library."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {}
    for name, call in calls.items():
        call()
        began = time.perf_counter()
        call()
        one = max(time.perf_counter() - began, 1e-6)
        repeats[name] = group.allgather_object(max(1, min(2000, int(ROUND_S / one))))[0]
    for _ in range(rounds):
        for name, call in calls.items():
            group.barrier()
            began = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - began) / repeats[name] * 1e6)
    return times


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--pin", action="store_true", help="give every rank a core of its own, in turn")
    parser.add_argument("--gloo", action="store_true", help="measure torch.distributed too")
    parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank >= 0:
        rank_main(arguments.rank, arguments.ranks, arguments.folder, arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", folder, "--rank"]
        ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(arguments.ranks)]
        sys.exit(max(process.wait() for process in ranks))


if __name__ == "__main__":
    main()
