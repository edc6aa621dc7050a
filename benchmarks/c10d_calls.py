"""What calls of torch.distributed take on our backend and on Gloo, both groups in the same processes, in turns.

    python benchmarks/c10d_calls.py

2 processes of one machine, one torch thread each, float32. A sample is the mean of a run of calls after a barrier; the
table has the medians of 7 rounds on rank 0, in microseconds a call ("there and back": two sends). Tensors begin where
torch puts them: 64 bytes into a page if they are large.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

ROUNDS = 7
COUNTS = {1 << 10: 200, 1 << 18: 50, 1 << 22: 10}
"""Bytes, and how many calls make a sample."""


def calls_of(dist: Any, torch: Any, group: Any, rank: int, nbytes: int) -> dict[str, Callable[[], Any]]:
    """Return the calls by name."""
    tensor = torch.ones(nbytes // 4)
    gathered, part = torch.empty(2 * nbytes // 4), torch.empty(nbytes // 8)

    def there_and_back() -> None:
        for sender in (0, 1):
            (dist.send if rank == sender else dist.recv)(tensor, 1 - rank, group=group)

    return {
        "all_reduce": lambda: dist.all_reduce(tensor, group=group),
        "all_reduce, async_op": lambda: dist.all_reduce(tensor, group=group, async_op=True).wait(),
        "broadcast": lambda: dist.broadcast(tensor, 0, group=group),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(gathered, tensor, group=group),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(part, tensor, group=group),
        "all_to_all_single": lambda: dist.all_to_all_single(gathered, gathered.clone(), group=group),
        "there and back": there_and_back,
    }


def rank_main(rank: int, folder: str) -> None:
    """Run one rank; rank 0 prints the rows."""
    import warnings

    import torch

    import colltensor.torch  # noqa: F401 - registers the backend

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist = torch.distributed
    dist.init_process_group("cpu:colltensor", f"file://{folder}/store", rank=rank, world_size=2)
    groups = {"colltensor": dist.new_group(), "gloo": dist.new_group(backend="gloo")}
    for nbytes, count in COUNTS.items():
        calls = {name: calls_of(dist, torch, group, rank, nbytes) for name, group in groups.items()}
        for name in calls["gloo"]:
            samples: dict[str, list[float]] = {backend: [] for backend in groups}
            for _ in range(ROUNDS + 1):
                for backend in groups:
                    dist.barrier()
                    begin = time.perf_counter()
                    for _ in range(count):
                        calls[backend][name]()
                    samples[backend].append((time.perf_counter() - begin) / count * 1e6)
            ours, gloo = (statistics.median(samples[backend][1:]) for backend in groups)
            if rank == 0:
                print(f"| {nbytes} | {name} | {ours:,.1f} | {gloo:,.1f} | {gloo / ours:.1f} |", flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Start the ranks."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    print("| bytes | call | colltensor | Gloo | Gloo / colltensor |\n| ---: | --- | ---: | ---: | ---: |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=rank_main, args=(rank, folder)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()


if __name__ == "__main__":
    main()
