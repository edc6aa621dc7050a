"""An allreduce put together from ray.put and ray.get, against colltensor's.

With --peer, ray.util.collective's is measured too.

    python examples/put_get_vs_allreduce.py --workers 2 --bytes 1024,1048576

Workers that share arrays through Ray's object store alone go through four steps for one sum: every
worker puts its array, one of them gets all of them, adds them up and puts the sum, and every worker
gets that; the driver carries the references. An allreduce is one call. Both are checked, and timed
twice: inside the workers (from the first that begins to the last that has the sum, by their clocks,
which are one on one machine; of an allreduce, the slowest worker), and by the driver, which asks
for one sum and waits for all workers.

Needs colltensor[ray], and colltensor[torch] for --peer. `python benchmarks object-store` measures
and draws with this.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

import colltensor as col

try:
    import ray
except ModuleNotFoundError:
    sys.exit("this example needs Ray: pip install '.[ray]'")

STORE, OURS, PEER = "ray.put and ray.get", "colltensor", "ray.util.collective"


class Times(NamedTuple):
    """Seconds of one sum, medians: inside the workers, and by the driver."""

    inside: float
    driver: float


class Worker:
    """One worker with its gradients, which can be summed in three ways."""

    def __init__(self, rank: int, world_size: int, peer: bool) -> None:
        self.rank, self.world_size = rank, world_size
        self.peer: Any = importlib.import_module("ray.util.collective") if peer else None

    def setup(self) -> str:
        """Join the groups; return which backend colltensor chose."""
        group = col.init_collective_group(self.world_size, self.rank, "auto", "ours", timeout_s=120)
        if self.peer:
            self.peer.init_collective_group(self.world_size, self.rank, "gloo", "peer")
        return group.backend

    def fill(self, nbytes: int, value: float) -> None:
        """Take gradients that are ``value`` times 1, 2, 3 ..."""
        self.gradients = np.arange(1, nbytes // 4 + 1, dtype=np.float32) % 64 * np.float32(value)

    def put(self) -> list[Any]:
        """Step 1: put the gradients; the list keeps Ray from resolving the reference on the way."""
        self.began = time.perf_counter()
        return [ray.put(self.gradients)]

    def add(self, *puts: list[Any]) -> list[Any]:
        """Steps 2 and 3, in one worker: get and add up everybody's, and put the sum."""
        total = np.zeros_like(self.gradients)
        for (reference,) in puts:
            total += ray.get(reference)
        return [ray.put(total)]

    def take(self, total: list[Any]) -> tuple[float, float]:
        """Step 4: get the sum, a read-only view of the object store.

        Returns when the put began, and now.
        """
        self.total = ray.get(total[0])
        return self.began, time.perf_counter()

    def allreduce(self, name: str) -> None:
        """Sum the gradients in place."""
        self.call(name)(self.gradients)

    def measure(self, name: str, rounds: int, calls: int) -> list[float]:
        """Return the seconds of an allreduce, by round of so many calls."""
        allreduce, seconds = self.call(name), []
        for _ in range(rounds):
            col.barrier("ours")
            began = time.perf_counter()
            for _ in range(calls):
                allreduce(self.gradients)
            seconds.append((time.perf_counter() - began) / calls)
        return seconds

    def call(self, name: str) -> Callable[[Any], object]:
        """Return the allreduce of a library."""
        if name == PEER:
            return lambda tensor: self.peer.allreduce(tensor, "peer")
        return col.get_group_handle("ours").allreduce

    def holds(self, value: float, in_store: bool) -> bool:
        """Return whether the sum is 1, 2, 3 ... times ``value``."""
        found = self.total if in_store else self.gradients
        return bool(
            np.array_equal(
                found, np.arange(1, found.size + 1, dtype=np.float32) % 64 * np.float32(value)
            )
        )

    def leave(self) -> None:
        """Leave the groups."""
        col.destroy_collective_group("ours")
        if self.peer:
            self.peer.destroy_collective_group("peer")


def sum_through_store(workers: Sequence[Any]) -> float:
    """Sum all gradients through the object store; return the seconds inside the workers."""
    puts = [worker.put.remote() for worker in workers]
    total = workers[0].add.remote(*puts)
    spans = ray.get([worker.take.remote(total) for worker in workers])
    return max(end for _, end in spans) - min(begin for begin, _ in spans)


def check(workers: Sequence[Any], nbytes: int, names: Sequence[str]) -> None:
    """Sum small whole numbers in every way; exit where a worker does not hold the sum."""
    expected = float(len(workers) * (len(workers) + 1) // 2)
    for name in names:
        ray.get([worker.fill.remote(nbytes, rank + 1.0) for rank, worker in enumerate(workers)])
        if name == STORE:
            sum_through_store(workers)
        else:
            ray.get([worker.allreduce.remote(name) for worker in workers])
        if not all(ray.get([worker.holds.remote(expected, name == STORE) for worker in workers])):
            sys.exit(f"WRONG: {name}: a worker does not hold the sum of {nbytes} bytes")


def measure(
    workers: Sequence[Any], nbytes: int, names: Sequence[str], seconds: float
) -> dict[str, Times]:
    """Return the times by name, each measured for about so many seconds.

    Inside the workers, and by the driver.
    """
    check(workers, nbytes, names)
    ray.get([worker.fill.remote(nbytes, 0.0) for worker in workers])  # zeros stay what they are
    return {
        name: measure_store(workers, seconds)
        if name == STORE
        else measure_calls(workers, name, nbytes, seconds)
        for name in names
    }


def measure_store(workers: Sequence[Any], seconds: float) -> Times:
    """Measure sums through the object store, both times at once."""
    inside, driver = [], []
    until = time.perf_counter() + 2 * seconds
    while time.perf_counter() < until or len(driver) < 3:
        began = time.perf_counter()
        inside.append(sum_through_store(workers))
        driver.append(time.perf_counter() - began)
    return Times(statistics.median(inside), statistics.median(driver))


def measure_calls(workers: Sequence[Any], name: str, nbytes: int, seconds: float) -> Times:
    """Measure allreduces, in rounds of many where they are short."""
    calls = max(1, min(100, (1 << 24) // nbytes))

    def inside(rounds: int) -> float:
        times = ray.get([worker.measure.remote(name, rounds, calls) for worker in workers])
        return statistics.median(map(max, zip(*times, strict=True)))

    median = inside(max(3, min(200, int(seconds / (inside(1) * calls)))))
    driver = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(driver) < 3:
        began = time.perf_counter()
        ray.get([worker.allreduce.remote(name) for worker in workers])
        driver.append(time.perf_counter() - began)
    return Times(median, statistics.median(driver))


def table(results: dict[int, dict[str, Times]]) -> str:
    """Return the results as a Markdown table, in microseconds."""
    names = list(next(iter(results.values())))
    others = [name for name in names if name != OURS]
    head = [
        "bytes",
        *names,
        *(f"{name} / {OURS}" for name in others),
        *(f"driver: {name}" for name in names),
        *(f"driver: {name} / {OURS}" for name in others),
    ]
    lines = ["| " + " | ".join(head) + " |", "| ---: " * len(head) + "|"]
    for nbytes, times in results.items():
        cells = [f"{nbytes:,}"]
        for column in range(2):
            cells += [
                f"{times[name][column] * 1e6:,.{0 if times[name][column] > 1e-4 else 1}f}"
                for name in names
            ]
            cells += [f"{times[name][column] / times[OURS][column]:,.1f}" for name in others]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Compare, and print the times; return 0 where all sums were right."""
    parser = argparse.ArgumentParser(
        description="an allreduce through the object store, and as one call"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--bytes",
        default="1024,262144,4194304",
        help="sizes of a worker's float32 array, with commas",
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="for each measurement, about")
    parser.add_argument(
        "--peer", action="store_true", help=f"compare with {PEER} over Gloo as well"
    )
    options = parser.parse_args()
    names = [STORE, OURS, *([PEER] if options.peer else [])]
    ray.init(num_cpus=options.workers, include_dashboard=False, logging_level="ERROR")
    try:
        remote = ray.remote(num_cpus=1)(Worker)
        workers = [
            remote.remote(rank, options.workers, options.peer) for rank in range(options.workers)
        ]
        backend = ray.get([worker.setup.remote() for worker in workers])[0]
        sizes = map(int, options.bytes.split(","))
        results = {nbytes: measure(workers, nbytes, names, options.seconds) for nbytes in sizes}
        ray.get([worker.leave.remote() for worker in workers])
    finally:
        ray.shutdown()
    print(
        f"{options.workers} workers, backend {backend!r}, every sum was right; microseconds, inside the workers and "
        f"by the driver:\n\n{table(results)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
