"""allreduce of CUDA tensors: ours against torch.distributed's on the same NCCL, side by side in one run.

    python benchmarks/nccl.py --out table.md

Host time: 4 KiB of float32, one rank, torch and CuPy; what a call takes until it returns to Python, the device being
idle before each round and not waited for inside. Bandwidth: 1 GiB of float32, two ranks (processes), each on a device
of its own where there are two, else both on the first one, which needs libnccl 2.30 or later; from an idle device
until the device is done, over several calls. The libraries alternate in rounds, after a warm-up; the table has
medians, and says of each target whether it holds. With 2 ranks bus bandwidth is algorithm bandwidth (2 (n-1)/n = 1).

Two ranks on one device take turns on it, some milliseconds each, and a large call takes seconds: there
``--large-rounds 3 --large-calls 1`` will do. Exits with 1 where a target does not hold. Needs torch for CUDA, and CuPy;
not Ray.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SMALL_NBYTES, LARGE_NBYTES = 4 << 10, 1 << 30
SHARED_SINCE = 23000
SHARED = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "1"}
"""What lets several ranks use one device."""
OURS_TORCH, OURS_CUPY, THEIRS = "colltensor, torch", "colltensor, CuPy", "torch.distributed"
RANK_TIMEOUT_S = 500.0


def connect(rank: int, world_size: int, device: int | None, folder: str) -> tuple[Any, Any]:
    """Make both libraries' groups; returns ours and torch.distributed.

    Args:
        rank: This process's.
        world_size: How many there are.
        device: The CUDA device; None for host memory and Gloo, which shows no more than that the program works.
        folder: Where the ranks meet.
    """
    import torch
    import torch.distributed as dist

    import colltensor as col

    ours, theirs = ("auto", "gloo") if device is None else ("nccl", "nccl")
    if device is not None:
        torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/torch", world_size)
    dist.init_process_group(theirs, store=store, rank=rank, world_size=world_size)
    return col.init_collective_group(world_size, rank, ours, "measured", init_method=f"file://{folder}/ours"), dist


def place_of(device: int | None) -> tuple[str, Callable[[], object]]:
    """Return torch's name of a device, or of the host for None, and what waits for it."""
    import torch

    return ("cpu", lambda: None) if device is None else (f"cuda:{device}", torch.cuda.synchronize)


def alternate(
    functions: dict[str, Callable[[], object]], rounds: int, calls: int, settle: Callable[[], object]
) -> dict[str, list[float]]:
    """Return the seconds of every call by function, in rounds in which they take turns, once the device is idle."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 3):
        for name, call in functions.items():
            settle()
            for _ in range(calls):
                start = time.perf_counter()
                call()
                end = time.perf_counter()
                if turn >= 3:  # the first rounds warm up
                    times[name].append(end - start)
    settle()
    return times


def host_times(folder: str, rounds: int, calls: int, device: int | None = 0) -> dict[str, list[float]]:
    """Return the seconds of every call of one rank, by library; on the host numpy is in CuPy's place."""
    import torch

    where, settle = place_of(device)
    group, dist = connect(0, 1, device, folder)
    tensor = torch.ones(SMALL_NBYTES // 4, device=where)
    array = importlib.import_module("numpy" if device is None else "cupy").ones(SMALL_NBYTES // 4, "float32")
    functions: dict[str, Callable[[], object]] = {
        OURS_TORCH: lambda: group.allreduce(tensor),
        OURS_CUPY: lambda: group.allreduce(array),
        THEIRS: lambda: dist.all_reduce(tensor),
    }
    times = alternate(functions, rounds, calls, settle)
    group.destroy()
    dist.destroy_process_group()
    return times


def large_times(
    rank: int, device: int | None, folder: str, rounds: int, calls: int, nbytes: int = LARGE_NBYTES
) -> dict[str, list[float]]:
    """Return the seconds that one call of two ranks takes on the device, by library, one number for each round."""
    import torch

    where, settle = place_of(device)
    group, dist = connect(rank, 2, device, folder)
    tensor = torch.zeros(nbytes // 4, device=where)
    functions: dict[str, Callable[[], object]] = {
        OURS_TORCH: lambda: group.allreduce(tensor),
        THEIRS: lambda: dist.all_reduce(tensor),
    }
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, call in functions.items():
            settle()
            group.barrier()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            settle()
            if turn:  # the first round warms up
                times[name].append((time.perf_counter() - start) / calls)
    group.barrier()
    group.destroy()
    dist.destroy_process_group()
    return times


def _rank_main(results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    results.put(function(*arguments))


def in_processes(function: Callable[..., Any], calls: list[tuple[Any, ...]], environment: dict[str, str]) -> Any:
    """Run a function in a new process for each tuple of arguments; returns what one of them returned."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    os.environ.update(environment)  # inherited
    processes = [context.Process(target=_rank_main, args=(results, function, given), daemon=True) for given in calls]
    for process in processes:
        process.start()
    until = time.monotonic() + RANK_TIMEOUT_S
    found: list[Any] = []
    while len(found) < len(calls):
        if not results.empty():
            found.append(results.get())
        elif time.monotonic() > until or any(process.exitcode for process in processes):
            for process in processes:
                process.terminate()
            sys.exit(f"a rank of {function.__name__} failed or did not end in {RANK_TIMEOUT_S} s; see above")
        time.sleep(0.05)
    for process in processes:
        process.join()
    return found[0]


def small_lines(times: dict[str, list[float]]) -> tuple[list[str], bool]:
    """Return the table's lines about host time, and whether the targets hold."""
    median = {name: statistics.median(values) * 1e6 for name, values in times.items()}
    lines, hold = [], True
    for name in (OURS_TORCH, OURS_CUPY):
        good = median[name] <= median[THEIRS]
        hold = hold and good
        lines.append(
            f"| host time, 4 KiB, 1 rank | {name} | {median[name]:.1f} us | {median[THEIRS]:.1f} us | "
            f"{median[name] / median[THEIRS]:.2f} | at most 1 | {'holds' if good else 'does NOT hold'} |"
        )
    return lines, hold


def large_lines(times: dict[str, list[float]], where: str) -> tuple[list[str], bool]:
    """Return the table's line about bandwidth, and whether the target holds."""
    rate = {name: LARGE_NBYTES / statistics.median(values) / 1e9 for name, values in times.items()}
    ratio = rate[OURS_TORCH] / rate[THEIRS]
    verdict = "holds" if ratio >= 0.98 else "does NOT hold"
    line = (
        f"| bandwidth, 1 GiB, 2 ranks on {where} | {OURS_TORCH} | {rate[OURS_TORCH]:.2f} GB/s | "
        f"{rate[THEIRS]:.2f} GB/s | {ratio:.3f} | at least 0.98 | {verdict} |"
    )
    return [line], ratio >= 0.98


def versions() -> tuple[list[str], int, int]:
    """Return what it is measured on, how many devices there are, and libnccl's version; exits without a device."""
    import cupy
    import torch
    from cupy.cuda import nccl, runtime

    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no CUDA device, and without one there is nothing to measure")
    ours = nccl.get_version()
    card = f"{torch.cuda.get_device_name(0)}, {torch.cuda.device_count()} devices"
    lines = [
        f"{card}; driver for CUDA {runtime.driverGetVersion()}",
        f"torch {torch.__version__}, CuPy {cupy.__version__}, Python {sys.version.split()[0]}",
    ]
    # Not torch.cuda.nccl.version(), which is that of the header that torch was built with.
    loaded = sorted(set(re.findall(r"\S+/libnccl\.so\S*", Path("/proc/self/maps").read_text())))
    lines.append(f"libnccl: {ours} as CuPy has it; loaded: {', '.join(loaded)}")
    if len(loaded) != 1:
        lines.append("CuPy and torch do not have one libnccl: the ratios compare NCCL too.")
    return lines, torch.cuda.device_count(), ours


def main() -> int:
    """Measure, print the table; return 1 where a target does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=50, help="small calls in a round")
    parser.add_argument("--large-rounds", type=int, default=9)
    parser.add_argument("--large-calls", type=int, default=4, help="large calls in a round")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    head, devices, version = versions()
    lines = ["| what | | colltensor | torch.distributed | ratio | target | |", "| --- " * 7 + "|"]
    with tempfile.TemporaryDirectory() as folder:
        found, hold = small_lines(in_processes(host_times, [(folder, options.rounds, options.calls)], {}))
        lines += found
    if devices < 2 and version < SHARED_SINCE:
        why = f"not measured: one device, libnccl {version}"
        lines.append(f"| bandwidth, 1 GiB, 2 ranks | | | | | at least 0.98 | {why} |")
    else:
        with tempfile.TemporaryDirectory() as folder:
            calls = [
                (rank, rank if devices > 1 else 0, folder, options.large_rounds, options.large_calls)
                for rank in range(2)
            ]
            times = in_processes(large_times, calls, {} if devices > 1 else SHARED)
        found, good = large_lines(times, "2 devices" if devices > 1 else "one device")
        lines, hold = lines + found, hold and good
    text = "\n".join([*head, "", *lines])
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return 0 if hold else 1


if __name__ == "__main__":
    sys.exit(main())
