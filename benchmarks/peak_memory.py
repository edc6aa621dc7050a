"""Peak resident memory of an in-place allreduce of 256 MiB: ours on numpy against torch.distributed's.

    python benchmarks/peak_memory.py

Each library runs in processes of its own (2 ranks); after a small allreduce that warms everything up the peak is
reset (Linux: /proc/self/clear_refs) and read again after the large one. The table has the rise on rank 0 in MiB.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any


def status_mib(field: str) -> float:
    """Return a memory figure of /proc/self/status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def rise_mib(allreduce: Any, small: Any, large: Any) -> float:
    """Return by how much the peak rises above what is resident before the call."""
    for _ in range(3):
        allreduce(small)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_mib("VmRSS")
    allreduce(large)
    return status_mib("VmHWM") - before


def ours(rank: int, world_size: int, folder: str, count: int, out: Any) -> None:
    """Measure ColTensor on numpy arrays."""
    import numpy as np

    import colltensor as col

    group = col.init_collective_group(world_size, rank, "gloo", init_method=f"file://{folder}", provider="torch")
    small, large = np.ones(1024, np.float32), np.ones(count, np.float32)
    out.put((rank, rise_mib(group.allreduce, small, large)))
    assert large[0] == large[-1] == world_size
    group.barrier()
    group.destroy()


def theirs(rank: int, world_size: int, folder: str, count: int, out: Any) -> None:
    """Measure torch.distributed on torch tensors."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/torch", rank=rank, world_size=world_size)
    small, large = torch.ones(1024), torch.ones(count)
    out.put((rank, rise_mib(dist.all_reduce, small, large)))
    dist.destroy_process_group()


def measure(target: Any, world_size: int, count: int) -> float:
    """Run all ranks and return rank 0's figure."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=target, args=(rank, world_size, folder, count, out)) for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        found = dict(out.get(timeout=120) for _ in ranks)
        for process in ranks:
            process.join(60)
    return found[0]


def main() -> None:
    """Print both figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    count = arguments.mib * (1 << 20) // 4
    print(f"allreduce of {arguments.mib} MiB of float32 in place, {arguments.ranks} ranks: rise of the peak, MiB")
    ours_mib = measure(ours, arguments.ranks, count)
    theirs_mib = measure(theirs, arguments.ranks, count)
    print(f"  colltensor (numpy)         {ours_mib:8.2f}")
    print(f"  torch.distributed (torch)  {theirs_mib:8.2f}")
    print(f"  ours - theirs              {ours_mib - theirs_mib:8.2f}   (at most 1)")


if __name__ == "__main__":
    main()
