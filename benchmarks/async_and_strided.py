"""Asynchronous calls beside synchronous ones, and allreduces of strided arrays beside contiguous ones (shared memory).

    python benchmarks/async_and_strided.py [--ranks 2]

Medians of several rounds on rank 0, in microseconds a call. Asynchronous calls are issued 1,000 at a time and awaited
at the end, or each awaited before the next. Strided arrays have 1024 x 1024 elements of float32.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np

import colltensor as col

CALLS, ROUNDS = 1000, 7
SIZES = (4, 1024, 65536)


def median_us(group: col.Group, calls: int, round_of_calls: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return the median time of a call, of rounds of so many."""
    times = []
    for _ in range(rounds):
        group.barrier()
        began = time.perf_counter()
        round_of_calls()
        times.append((time.perf_counter() - began) / calls * 1e6)
    return statistics.median(times)


def asynchronous(group: col.Group) -> None:
    """Print the table of asynchronous calls."""
    for nbytes in SIZES:
        x = np.zeros(nbytes // 4, np.float32)

        def at_the_end(x: np.ndarray = x) -> None:
            for work in [group.allreduce(x, async_op=True) for _ in range(CALLS)]:
                work.wait()

        group.allreduce(x)
        rows = (
            ("synchronous", lambda x=x: [group.allreduce(x) for _ in range(CALLS)]),
            ("awaited at the end", at_the_end),
            ("each awaited", lambda x=x: [group.allreduce(x, async_op=True).wait() for _ in range(CALLS)]),
        )
        for name, calls in rows:
            found = median_us(group, CALLS, calls)
            if group.rank == 0:
                print(f"allreduce, {nbytes:6} B, {name:20} {found:9.2f}", flush=True)


def strided(group: col.Group) -> None:
    """Print the table of strided arrays."""
    def contiguous() -> np.ndarray:
        return np.zeros((1024, 1024), np.float32)

    def transposed() -> np.ndarray:
        return contiguous().T

    makers = {
        "contiguous": contiguous,
        "transposed on all ranks": transposed,
        "transposed on some": transposed if group.rank % 2 else contiguous,
        "every second column": lambda: np.zeros((1024, 2048), np.float32)[:, ::2],
    }
    for name, make in makers.items():
        x = make()
        found = median_us(group, 1, lambda x=x: group.allreduce(x), 5 * ROUNDS)
        if group.rank == 0:
            print(f"allreduce, 4 MiB, {name:24} {found:9.0f}", flush=True)


def run(rank: int, ranks: int, folder: str) -> None:
    """Measure, as one rank."""
    group = col.init_collective_group(ranks, rank, "shm", init_method=f"file://{folder}/meeting")
    asynchronous(group)
    strided(group)
    group.destroy()


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    ranks = parser.parse_args().ranks
    with tempfile.TemporaryDirectory() as folder:
        processes = [multiprocessing.Process(target=run, args=(rank, ranks, folder)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()


if __name__ == "__main__":
    main()
