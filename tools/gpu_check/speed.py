"""Host time and bandwidth beside torch.distributed's, as ``benchmarks/nccl.py`` measures them, in little time."""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from child import ROOT, Channel, SkippedError

# First on the path, because there are packages with its name; by its name, because its ranks import it.
sys.path.insert(0, str(ROOT / "benchmarks"))
benchmark: Any = importlib.import_module("nccl")
ROUNDS, CALLS = 10, 50
LARGE_ROUNDS = 5
WAYS_NBYTES, FAKE_NBYTES = 64 << 20, 1 << 20


def host_time(*, channel: Channel, folder: Path, cpu: bool) -> str:
    """Measure what a call of 4 KiB takes the host; the target is no condition of the check."""
    times = benchmark.host_times(_made(folder / "host-time"), ROUNDS, CALLS, None if cpu else 0)
    lines, holds = benchmark.small_lines(times)
    channel.facts(host_time=lines)
    median = {name: statistics.median(values) * 1e6 for name, values in times.items()}
    said = ", ".join(f"{name} {value:.1f} us" for name, value in median.items())
    return f"{said}: {'holds' if holds else 'does NOT hold'}"


def large_call(*, channel: Channel, folder: Path, cpu: bool) -> str:
    """Measure 1 GiB on one rank: an allreduce in place, which should cost nothing, and an allgather, which copies."""
    torch = importlib.import_module("torch")
    device, nbytes = (None, FAKE_NBYTES) if cpu else (0, benchmark.LARGE_NBYTES)
    where, settle = benchmark.place_of(device)
    group, dist = benchmark.connect(0, 1, device, _made(folder / "large"))
    tensor, row = torch.ones(nbytes // 4, device=where), torch.empty(1, nbytes // 4, device=where)
    calls: dict[str, dict[str, Callable[[], object]]] = {
        "allreduce in place": {
            "ours": lambda: group.allreduce(tensor),
            "theirs": lambda: dist.all_reduce(tensor),
        },
        "allgather": {
            "ours": lambda: group.allgather(row, tensor),
            "theirs": lambda: dist.all_gather_into_tensor(row[0], tensor),
        },
    }
    said = []
    for name, functions in calls.items():
        median = _medians(functions, settle, settle)
        rates = {who: nbytes / seconds / 1e9 for who, seconds in median.items()}
        said.append(
            f"{name}: ours {median['ours'] * 1e3:.3f} ms, {rates['ours']:.0f} GB/s, "
            f"{rates['ours'] / rates['theirs']:.3f} of torch.distributed's"
        )
    channel.facts(large_call=said)
    group.destroy()
    dist.destroy_process_group()
    return "; ".join(said)


def two_ranks(*, channel: Channel, folder: Path, cpu: bool) -> str:
    """Measure two ranks on one device: 1 GiB beside torch.distributed, 64 MiB beside copies through the host."""
    if not cpu:
        _needs_two()
    calls = [(rank, None if cpu else 0, _made(folder / "two")) for rank in range(2)]
    found = benchmark.in_processes(measured, calls, benchmark.SHARED)
    (line,), _ = benchmark.large_lines(found["large"], "one device")
    channel.facts(two_ranks=line, through_the_host=found["ways"])
    return f"{line} {', '.join(f'{name} {seconds * 1e3:.1f} ms' for name, seconds in found['ways'].items())}"


def measured(rank: int, device: int | None, folder: str) -> dict[str, dict[str, Any]]:
    """Measure in one rank what ``two_ranks`` reports."""
    nbytes = FAKE_NBYTES if device is None else benchmark.LARGE_NBYTES
    large = benchmark.large_times(rank, device, folder, 3, 1, nbytes)
    return {"large": large, "ways": _both_ways(rank, device, folder)}


def _both_ways(rank: int, device: int | None, folder: str) -> dict[str, float]:
    """Sum an array of two ranks on the device, and by copies to the host, shared memory there, and copies back."""
    torch, col = importlib.import_module("torch"), importlib.import_module("colltensor")
    where, settle = benchmark.place_of(device)
    group = col.init_collective_group(2, rank, "auto", "both ways", init_method=f"file://{folder}/ways")
    tensor = torch.ones((FAKE_NBYTES if device is None else WAYS_NBYTES) // 4, device=where)

    def by_host() -> None:
        host = tensor.cpu()
        group.allreduce(host)
        tensor.copy_(host)

    def begin() -> None:
        settle()
        group.barrier()

    median = _medians({"on the device": lambda: group.allreduce(tensor), "by the host": by_host}, begin, settle)
    group.barrier()
    group.destroy()
    return median


def _medians(
    functions: dict[str, Callable[[], object]], begin: Callable[[], object], end: Callable[[], object]
) -> dict[str, float]:
    """Return the seconds of each function, which take turns; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(LARGE_ROUNDS + 1):
        for name, call in functions.items():
            begin()
            start = time.perf_counter()
            call()
            end()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def _needs_two() -> None:
    version = importlib.import_module("cupy.cuda.nccl").get_version()
    if version < benchmark.SHARED_SINCE:
        raise SkippedError(f"two ranks on one device need libnccl 2.30 or later, this is {version}")


def _made(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    return str(folder)
