"""Float32 allreduce over each provider of Gloo that is here, side by side in one run.

    python benchmarks/gloo_providers.py                  2 ranks over loopback
    python benchmarks/gloo_providers.py --namespaces     2 x 2 ranks on two hosts, backend "hierarchical"

Ranks are processes with a group of each provider and numpy arrays. For every size the providers alternate in rounds,
so that noise of the machine meets all of them alike. A time is what rank 0 measured for one call, after warm-up and
with a barrier before each round; the table has medians, and ratios to the native provider's. Hosts are network
namespaces with a veth pair between them, which needs root (hosts_traffic.py). pygloo exists for Python 3.10 only, and
torch is not in that environment: a table for each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from hosts_traffic import inside, outputs_of, two_hosts

SIZES = (4, 1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26)
RUN_S = 580.0


def be_rank(rank: int, world_size: int, folder: str, backend: str, sizes: list[int], seconds: float) -> None:
    """Measure every size with every provider; rank 0 prints the medians by size and provider."""
    import numpy as np

    import colltensor as col

    names = ["native", *(name for name in ("torch", "pygloo") if find_spec(name))]
    groups = {
        name: col.init_collective_group(
            world_size, rank, backend, name, init_method=f"file://{folder}/{name}", timeout_s=60.0, provider=name
        )
        for name in names
    }
    native = groups["native"]
    medians = {}
    for nbytes in sizes:
        # Written, as an array in use is: the pages of a fresh one come from the kernel one by one, in its first call.
        array = np.full(nbytes // 4, 1e-30, np.float32)
        times: dict[str, list[float]] = {name: [] for name in names}
        for name in names:  # warms up, and tells how many calls there is time for
            for _ in range(3):
                start = time.perf_counter()
                groups[name].allreduce(array)
                times[name].append(time.perf_counter() - start)
        one = max(statistics.median(found) for found in times.values())
        plan = native.broadcast_object((max(1, min(20, int(0.1 / one))), max(7, min(100, int(seconds / one)))))
        calls, rounds = plan[0], max(7, plan[1] // plan[0])
        times = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                native.barrier()
                for _ in range(calls):
                    start = time.perf_counter()
                    groups[name].allreduce(array)
                    times[name].append(time.perf_counter() - start)
        medians[nbytes] = {name: statistics.median(found) for name, found in times.items()}
    if rank == 0:
        print(json.dumps(list(medians.items())))
    for name in names:
        col.destroy_collective_group(name)


def measure(ranks: int, holders: list[int], sizes: list[int], seconds: float) -> list[tuple[int, dict[str, float]]]:
    """Run the ranks and return what rank 0 measured."""
    backend = "hierarchical" if holders else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        programs = []
        for rank in range(ranks):
            arguments = json.dumps([rank, ranks, folder, backend, sizes, seconds])
            program = [sys.executable, __file__, "--as-rank", arguments]
            programs.append(inside(holders[rank * 2 // ranks], program) if holders else program)
        outputs = outputs_of(programs, RUN_S)
    found: list[tuple[int, dict[str, float]]] = json.loads(outputs[0].splitlines()[-1])
    return found


def table(results: list[tuple[int, dict[str, float]]], ranks: int) -> str:
    """Return the medians in microseconds, and how much longer the others take, in Markdown."""
    names = list(results[0][1])
    others = names[1:]
    lines = [f"| bytes, {ranks} ranks | {' | '.join(names)} | GB/s, native | "
             + " | ".join(f"{name} / native" for name in others) + " |"]
    lines.append("| ---: " * (len(names) + len(others) + 2) + "|")
    for nbytes, medians in results:
        cells = [f"{nbytes:,}", *(f"{medians[name] * 1e6:,.0f}" for name in names)]
        cells.append(f"{nbytes / medians['native'] / 1e9:.2f}")
        cells += [f"{medians[name] / medians['native']:.2f}" for name in others]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table, or be a rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--namespaces", action="store_true", help="two hosts with two ranks each")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each size and provider, about")
    parser.add_argument("--sizes", type=lambda text: [int(word) for word in text.split(",")], default=list(SIZES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_rank is not None:
        be_rank(*json.loads(arguments.as_rank))
        return
    ranks = 4 if arguments.namespaces else 2
    with two_hosts() if arguments.namespaces else contextlib.nullcontext([]) as holders:
        text = table(measure(ranks, holders, arguments.sizes, arguments.seconds), ranks)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
