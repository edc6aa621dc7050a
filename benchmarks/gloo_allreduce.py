"""Float32 allreduce over Gloo: ours, torch.distributed's and ray.util.collective's, side by side in one run.

    python benchmarks/gloo_allreduce.py --out table.md

Two Ray actors (one torch thread each) hold a group of each library and take turns: for every size the libraries
alternate in rounds, so that noise of the machine meets all of them alike. A time is what rank 0 measured for one
call, after warm-up and with a barrier before each round; the table has medians and ratios of medians. Algorithm
bandwidth is bytes of the buffer over time; with 2 ranks bus bandwidth is the same (2 (n-1)/n = 1). Tensors begin where
torch puts them: 64 bytes into a page if they are large.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import ray

SIZES = (4, 1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26)
LIBRARIES = ("colltensor", "torch.distributed", "ray.util.collective")


@ray.remote(num_cpus=0.5)
class Rank:
    """One rank with a group of each library."""

    def __init__(self, rank: int, world_size: int, folder: str) -> None:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        self.rank, self.world_size, self.folder, self.dist = rank, world_size, folder, dist

    def setup(self) -> None:
        """Make the three groups."""
        import ray.util.collective as ray_collective

        import colltensor as col

        store = self.dist.FileStore(f"{self.folder}/torch", self.world_size)
        self.dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.world_size)
        self.ours = col.init_collective_group(self.world_size, self.rank, "gloo", "ours", provider="torch")
        ray_collective.init_collective_group(self.world_size, self.rank, "gloo", "theirs")
        self.theirs = ray_collective

    def measure(self, nbytes: int, rounds: int, calls: int) -> dict[str, list[float]]:
        """Return the seconds of every call, by library."""
        import torch

        tensor = torch.zeros(nbytes // 4)
        functions: dict[str, Callable[[], object]] = {
            "colltensor": lambda: self.ours.allreduce(tensor),
            "torch.distributed": lambda: self.dist.all_reduce(tensor),
            "ray.util.collective": lambda: self.theirs.allreduce(tensor, "theirs"),
        }
        for call in functions.values():
            call()
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(rounds):
            for name, call in functions.items():
                self.ours.barrier()
                for _ in range(calls):
                    start = time.perf_counter()
                    call()
                    times[name].append(time.perf_counter() - start)
        return times


def table(results: dict[int, dict[str, list[float]]]) -> str:
    """Return the medians as a Markdown table."""
    names = " | ".join(f"{name}, us" for name in LIBRARIES)
    lines = [f"| bytes | {names} | GB/s, ours | ours / torch | ours / ray |"]
    lines.append("| ---: " * (len(LIBRARIES) + 4) + "|")
    for nbytes, times in results.items():
        median = {name: statistics.median(values) for name, values in times.items()}
        ours = median["colltensor"]
        cells = [f"{nbytes:,}", *(f"{median[name] * 1e6:,.0f}" for name in LIBRARIES), f"{nbytes / ours / 1e9:.2f}",
                 f"{ours / median['torch.distributed']:.2f}", f"{ours / median['ray.util.collective']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure every size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each size and library, about")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    import tempfile

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [Rank.remote(rank, arguments.ranks, folder) for rank in range(arguments.ranks)]
        ray.get([rank.setup.remote() for rank in ranks])
        results = {}
        for nbytes in SIZES:
            first = ray.get([rank.measure.remote(nbytes, 2, 3) for rank in ranks])[0]
            one = max(statistics.median(times) for times in first.values())
            calls = max(1, min(20, int(0.2 / one)))
            rounds = max(7, min(100, int(arguments.seconds / (one * calls))))
            results[nbytes] = ray.get([rank.measure.remote(nbytes, rounds, calls) for rank in ranks])[0]
            print(f"{nbytes:>12,} bytes: {rounds} rounds of {calls} calls each", flush=True)
    ray.shutdown()
    text = table(results)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
