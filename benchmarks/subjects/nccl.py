"""allreduce of CUDA tensors: ours against torch.distributed's on the same NCCL, side by side in one run.

Host time: 4 KiB of float32, one rank, torch and CuPy; what a call takes until it returns to Python, the device being
idle before each round and not waited for inside. Bandwidth: 1 GiB of float32, two ranks, each on a device of its own
where there are two, else both on the first one, which needs libnccl 2.30 or later; from an idle device until the device
is done, over several calls. The table says of each target whether it holds. With 2 ranks bus bandwidth is algorithm
bandwidth (2 (n-1)/n = 1).

Two ranks on one device take turns on it, some milliseconds each, and a large call takes seconds: there
``--large-rounds 3 --large-calls 1`` will do. Exits with 1 where a target does not hold. Needs torch for
CUDA, and CuPy; not Ray.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.rank import InGroup, Loop, Settings, repeat
from harness.rounds import Contestant, Samples
from harness.run import Run, add_options
from harness.world import Kind

SMALL_NBYTES, LARGE_NBYTES = 4 << 10, 1 << 30
SHARED_SINCE = 23000
SHARED = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "1"}
"""What lets several ranks use one device."""
OURS_TORCH, OURS_CUPY, THEIRS, BY_HOST = (
    "colltensor, torch",
    "colltensor, CuPy",
    "torch.distributed",
    "by the host",
)
HEAD = ("what", "", "colltensor", THEIRS, "ratio", "target", " ")
Times = dict[str, Samples]


class Ranks(InGroup):
    """The ranks: the option ``devices`` has each one's device; none for host memory and Gloo, to try the program."""

    def __init__(self, settings: Settings, rank: int) -> None:
        import torch
        import torch.distributed as dist

        devices = settings.options.pop("devices")
        self.device = devices[rank] if devices else None
        self.torch, self.dist = torch, dist
        if self.device is not None:
            torch.cuda.set_device(self.device)
        store = dist.FileStore(f"{settings.folder}/{settings.world}-torch", settings.ranks)
        dist.init_process_group(
            "gloo" if self.device is None else "nccl",
            store=store,
            rank=rank,
            world_size=settings.ranks,
        )
        # what InGroup makes
        settings.options["backend"] = "auto" if self.device is None else "nccl"
        super().__init__(settings, rank)
        self.barrier = self._settled_barrier  # type: ignore[method-assign]

    def complete(self) -> None:
        """Wait for the device."""
        if self.device is not None:
            self.torch.cuda.synchronize()

    def _settled_barrier(self) -> None:
        self.complete()
        self.group.barrier()

    def leave(self) -> None:
        """Destroy the groups."""
        self.barrier()
        self.group.destroy()
        self.dist.destroy_process_group()

    def loop(self, operation: str, nbytes: int) -> Loop:
        """Return the loop of an operation, which returns with the device done where its name ends so."""
        name = operation.removesuffix(" until done")
        calls = repeat(self._call(name, nbytes))
        if operation == name:
            return calls

        def until_done(count: int) -> None:
            calls(count)
            self.complete()

        return until_done

    def _call(self, name: str, nbytes: int) -> Callable[[], object]:
        group, dist, count = self.group, self.dist, nbytes // 4
        if name == OURS_CUPY:  # numpy is in its place on the host
            array = importlib.import_module("numpy" if self.device is None else "cupy").ones(
                count, "float32"
            )
            return lambda: group.allreduce(array)
        where = "cpu" if self.device is None else f"cuda:{self.device}"
        # Zeros, which stay finite however often they are summed.
        tensor, row = (
            self.torch.zeros(count, device=where),
            self.torch.empty(1, count, device=where),
        )

        either = self.join("auto", "either") if name == BY_HOST else None

        def by_the_host() -> None:
            host = tensor.cpu()
            either.allreduce(host)
            tensor.copy_(host)

        return {
            OURS_TORCH: lambda: group.allreduce(tensor),
            THEIRS: lambda: dist.all_reduce(tensor),
            "allgather, ours": lambda: group.allgather(row, tensor),
            "allgather, theirs": lambda: dist.all_gather_into_tensor(row[0], tensor),
            BY_HOST: by_the_host,
        }[name]


def world(devices: list[int]) -> Kind:
    """Return the world of ranks on these devices; on none, of ranks in host memory."""
    return Kind(
        "nccl",
        "subjects.nccl:Ranks",
        options={"devices": devices},
        environment=SHARED if len(devices) > len(set(devices)) else {},
    )


def contestants(*operations: str) -> list[Contestant]:
    """Return operations of ``world``, by their names."""
    return [Contestant(operation, "nccl", operation) for operation in operations]


def until_done(*operations: str) -> list[Contestant]:
    """Return operations that are waited for."""
    return [Contestant(operation, "nccl", f"{operation} until done") for operation in operations]


def host_rows(times: Times) -> tuple[list[list[str]], bool]:
    """Return the table's rows about host time, and whether the targets hold."""
    rows, hold, theirs = [], True, times[THEIRS].median_us
    for name in (OURS_TORCH, OURS_CUPY):
        ours = times[name].median_us
        hold &= ours <= theirs
        rows.append(
            [
                "host time, 4 KiB, 1 rank",
                name,
                f"{ours:.1f} us",
                f"{theirs:.1f} us",
                f"{ours / theirs:.2f}",
                "at most 1",
                "holds" if ours <= theirs else "does NOT hold",
            ]
        )
    return rows, hold


def large_row(times: Times, where: str) -> tuple[list[str], bool]:
    """Return the table's row about bandwidth, and whether the target holds."""
    ours, theirs = (LARGE_NBYTES / times[name].median_us / 1e3 for name in (OURS_TORCH, THEIRS))
    return [
        f"bandwidth, 1 GiB, 2 ranks on {where}",
        OURS_TORCH,
        f"{ours:.2f} GB/s",
        f"{theirs:.2f} GB/s",
        f"{ours / theirs:.3f}",
        "at least 0.98",
        "holds" if ours / theirs >= 0.98 else "does NOT hold",
    ], ours / theirs >= 0.98


def _note_versions(run: Run) -> tuple[int, int]:
    """Note what it is measured on; return how many devices there are, and libnccl's version."""
    import torch

    if not torch.cuda.is_available():
        sys.exit(
            f"torch {torch.__version__} sees no CUDA device, and without one there is nothing to measure"
        )
    cupy: Any = importlib.import_module("cupy")
    version = int(importlib.import_module("cupy.cuda.nccl").get_version())
    # Not torch.cuda.nccl.version(), which is that of the header that torch was built with.
    loaded = sorted(set(re.findall(r"\S+/libnccl\.so\S*", Path("/proc/self/maps").read_text())))
    run.note(
        device=f"{torch.cuda.get_device_name(0)} (of {torch.cuda.device_count()})",
        torch=torch.__version__,
        CuPy=cupy.__version__,
        CUDA=cupy.cuda.runtime.driverGetVersion(),
        libnccl=version,
        loaded=", ".join(loaded)
        + (" (not one: the ratios compare NCCL too)" if len(loaded) != 1 else ""),
    )
    return torch.cuda.device_count(), version


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_options(parser, rounds=40)
    parser.add_argument("--calls", type=int, default=50, help="small calls in a round")
    parser.add_argument("--large-rounds", type=int, default=9)
    parser.add_argument("--large-calls", type=int, default=4, help="large calls in a round")


def measure(run: Run, options: argparse.Namespace) -> int:
    """Print the table; return 1 where a target does not hold."""
    count, version = _note_versions(run)
    with run.started([world([0])], 1) as worlds:
        times = run.measure(
            worlds, contestants(OURS_TORCH, OURS_CUPY, THEIRS), SMALL_NBYTES, calls=options.calls
        )
    rows, hold = host_rows(times)
    if count < 2 and version < SHARED_SINCE:
        rows.append(
            [
                "bandwidth, 1 GiB, 2 ranks",
                "",
                "",
                "",
                "",
                "",
                f"not measured: one device, libnccl {version}",
            ]
        )
    else:
        with run.started([world([0, 1] if count > 1 else [0, 0])]) as worlds:
            times = run.measure(
                worlds,
                until_done(OURS_TORCH, THEIRS),
                LARGE_NBYTES,
                rounds=options.large_rounds,
                calls=options.large_calls,
            )
        row, good = large_row(times, "2 devices" if count > 1 else "one device")
        rows, hold = [*rows, row], hold and good
    run.print("CUDA tensors", HEAD, rows, left=2)
    return int(not hold)
