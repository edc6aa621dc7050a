"""Host time and bandwidth beside torch.distributed's, as ``benchmarks/nccl.py`` measures them, in little time."""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_streams
import numpy as np
from child import ROOT, Channel, SkippedError

# First on the path, because there are packages with its name; by its name, because its ranks import it.
sys.path.insert(0, str(ROOT / "benchmarks"))
benchmark: Any = importlib.import_module("nccl")
ROUNDS, CALLS = 10, 50
LARGE_ROUNDS = 5
FIGURE_NBYTES = 64 << 20
_GIB = 1 << 30


def host_time(*, channel: Channel, folder: Path, cpu: bool) -> str:
    """Measure what a call of 4 KiB takes the host; the targets are no condition of the check."""
    where = str(_made(folder / "host-time"))
    times = _fake_host_times() if cpu else benchmark.host_times(where, ROUNDS, CALLS)
    lines, holds = benchmark.small_lines(times)
    channel.facts(host_time=lines)
    median = {name: statistics.median(values) * 1e6 for name, values in times.items()}
    said = ", ".join(f"{name} {value:.1f} us" for name, value in median.items())
    return said if cpu else f"{said}: {'holds' if holds else 'does NOT hold'}"


def large_call(*, channel: Channel, folder: Path, cpu: bool) -> str:
    """Measure 1 GiB on one rank: an allreduce in place, which should cost nothing, and an allgather, which copies."""
    if cpu:
        raise SkippedError("the fake device has no bandwidth")
    import torch

    group, dist = benchmark.connect(0, 1, 0, str(_made(folder / "large")))
    tensor = torch.ones(_GIB // 4, device="cuda:0")
    row = torch.empty(1, _GIB // 4, device="cuda:0")
    pairs: dict[str, dict[str, Callable[[], object]]] = {
        "allreduce in place": {
            "ours": lambda: group.allreduce(tensor), "theirs": lambda: dist.all_reduce(tensor),
        },
        "allgather": {
            "ours": lambda: group.allgather(row, tensor), "theirs": lambda: dist.all_gather_into_tensor(row[0], tensor),
        },
    }  # fmt: skip
    said = []
    for name, functions in pairs.items():
        times: dict[str, list[float]] = {who: [] for who in functions}
        for _ in range(LARGE_ROUNDS):
            for who, call in functions.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                call()
                torch.cuda.synchronize()
                times[who].append(time.perf_counter() - start)
        median = {who: statistics.median(values[1:]) for who, values in times.items()}
        rates = {who: _GIB / seconds / 1e9 for who, seconds in median.items()}
        said.append(
            f"{name} {median['ours'] * 1e3:.3f} ms ({rates['ours']:.0f} GB/s), theirs {median['theirs'] * 1e3:.3f} ms: "
            f"{rates['ours'] / rates['theirs']:.3f} of its bandwidth"
        )
    channel.facts(large_call=said)
    group.destroy()
    dist.destroy_process_group()
    return "; ".join(said)


def two_ranks(*, channel: Channel, folder: Path, cpu: bool) -> str:
    """Measure 1 GiB between two ranks on one device, beside torch.distributed."""
    where = str(_made(folder / "two"))
    _needs_two()
    times = benchmark.in_processes(
        benchmark.large_times, [(rank, 0, where, 3, 1) for rank in range(2)], benchmark.SHARED
    )
    (line,), _ = benchmark.large_lines(times, "one device")
    channel.facts(two_ranks=line)
    return line


def through_the_host(*, channel: Channel, folder: Path, cpu: bool) -> str:
    """Measure an allreduce of two ranks on one device beside copies to the host, shared memory there, and back."""
    where = str(_made(folder / "host"))
    _needs_two()
    times = benchmark.in_processes(both_ways, [(rank, where) for rank in range(2)], benchmark.SHARED)
    median = {name: statistics.median(values[1:]) * 1e3 for name, values in times.items()}
    channel.facts(through_the_host=median)
    return ", ".join(f"{name} {value:.1f} ms" for name, value in median.items())


def both_ways(rank: int, folder: str) -> dict[str, list[float]]:
    """Sum 64 MiB of two ranks by NCCL and by way of the host, in turns; the seconds of each."""
    import torch

    import colltensor as col

    group = col.init_collective_group(2, rank, "auto", "both ways", init_method=f"file://{folder}/ours")
    tensor = torch.ones(FIGURE_NBYTES // 4, device="cuda:0")

    def by_host() -> None:
        host = tensor.cpu()
        group.allreduce(host)
        tensor.copy_(host)

    ways: dict[str, Callable[[], object]] = {"NCCL": lambda: group.allreduce(tensor), "host": by_host}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(LARGE_ROUNDS):
        for name, call in ways.items():
            torch.cuda.synchronize()
            group.barrier()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    group.barrier()
    group.destroy()
    return times


def _needs_two() -> None:
    version = importlib.import_module("cupy.cuda.nccl").get_version()
    if version < benchmark.SHARED_SINCE:
        raise SkippedError(f"two ranks on one device need libnccl 2.30 or later, this is {version}")


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _fake_host_times() -> dict[str, list[float]]:
    """Return times of the fake device, under the names of the card's, so that what is made of them is run as well."""
    import colltensor as col

    group = col.init_collective_group(1, 0, gpu_streams.BACKEND, "measured")
    with gpu_streams.Queue("device") as queue:
        tensor, other = queue.full(1.0), np.ones(1000)
        functions: dict[str, Callable[[], Any]] = {
            benchmark.OURS_TORCH: lambda: group.allreduce(tensor),
            benchmark.OURS_CUPY: lambda: group.allreduce(tensor),
            benchmark.THEIRS: lambda: np.add(other, other, out=other),
        }
        times = benchmark.alternate(functions, 2, 5, queue.synchronize)
    group.destroy()
    return times


