"""allreduce of CUDA tensors: ours against torch.distributed's on the same NCCL.

Host time: 4 KiB of float32, one rank, torch and CuPy; what a call takes until it returns to Python,
the device being idle before each round and not waited for inside. Bandwidth: 1 GiB of float32, two
ranks, each on a device of its own where there are two, else both on the first one, which needs
libnccl 2.30 or later; from an idle device until the device is done, over several calls. The table
says of each target whether it holds. With 2 ranks bus bandwidth is algorithm bandwidth (2 (n-1)/n =
1).

Two ranks on one device take turns on it, some milliseconds each, and a large call takes seconds:
there ``--large-rounds 3 --large-calls 1`` will do. Exits with 1 where a target does not hold. Needs
torch for CUDA, and CuPy; not Ray.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.rank import InGroup, Loop, Settings, on_one_thread, repeat
from harness.rounds import Contestant, Samples
from harness.run import Run
from harness.world import Kind

OPTIONS = {"rounds": 40, "calls": 50, "large_rounds": 9, "large_calls": 4}
SMALL_NBYTES, LARGE_NBYTES = 4 << 10, 1 << 30
SHARED_SINCE = 23000
SHARED = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "1"}
"""What lets several ranks use one device."""
OURS_TORCH, OURS_CUPY = "colltensor, torch", "colltensor, CuPy"
THEIRS, BY_HOST = "torch.distributed", "by the host"
HEAD = ("what", "", "colltensor", THEIRS, "ratio", "target", " ")
DONE = " until done"
Times = dict[str, Samples]


class Ranks(InGroup):
    """The ranks; the option ``devices`` has each one's device.

    None is for host memory and Gloo, to try the program.
    """

    def __init__(self, settings: Settings, rank: int) -> None:
        import torch

        devices = settings.options.pop("devices")
        self.torch, self.device = torch, devices[rank] if devices else None
        if devices:
            torch.cuda.set_device(self.device)
        self.dist = on_one_thread(settings, rank, "nccl" if devices else "gloo")
        settings.options["backend"] = "nccl" if devices else "auto"  # what InGroup makes
        super().__init__(settings, rank)
        self.barrier = self._settled_barrier  # type: ignore[method-assign]

    def complete(self) -> None:
        if self.device is not None:
            self.torch.cuda.synchronize()

    def _settled_barrier(self) -> None:
        self.complete()
        self.group.barrier()

    def leave(self) -> None:
        self.barrier()
        self.group.destroy()
        self.dist.destroy_process_group()

    def loop(self, operation: str, nbytes: int) -> Loop:
        """Return the loop of an operation.

        It returns with the device done where the operation's name ends so.
        """
        calls = repeat(self._call(operation.removesuffix(DONE), nbytes // 4))
        if not operation.endswith(DONE):
            return calls
        return lambda count: (calls(count), self.complete())

    def _call(self, name: str, count: int) -> Callable[[], object]:
        group, dist, torch, on_host = self.group, self.dist, self.torch, self.device is None
        if name == OURS_CUPY:  # numpy is in its place on the host
            array = importlib.import_module("numpy" if on_host else "cupy").ones(count, "float32")
            return lambda: group.allreduce(array)
        where = "cpu" if on_host else f"cuda:{self.device}"
        # Zeros, which stay finite however often they are summed.
        tensor, row = torch.zeros(count, device=where), torch.empty(1, count, device=where)
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
    environment = SHARED if len(devices) > len(set(devices)) else {}
    options = {"devices": devices}
    return Kind("nccl", "subjects.nccl:Ranks", options=options, environment=environment)


def contestants(*operations: str, end: str = "") -> list[Contestant]:
    """Return operations of ``world``, by their names; with the end ``DONE`` they are waited for."""
    return [Contestant(operation, "nccl", operation + end) for operation in operations]


def host_rows(times: Times) -> tuple[list[list[str]], bool]:
    """Return the table's rows about host time, and whether the targets hold."""
    rows, theirs = [], times[THEIRS].median_us
    for name in (OURS_TORCH, OURS_CUPY):
        ours = times[name].median_us
        figures = (f"{ours:.1f} us", f"{theirs:.1f} us", f"{ours / theirs:.2f}", "at most 1")
        rows.append(["host time, 4 KiB, 1 rank", name, *figures, _verdict(ours <= theirs)])
    return rows, all(row[-1] == "holds" for row in rows)


def large_row(times: Times, where: str) -> tuple[list[str], bool]:
    """Return the table's row about bandwidth, and whether the target holds."""
    ours, theirs = (LARGE_NBYTES / times[name].median_us / 1e3 for name in (OURS_TORCH, THEIRS))
    good, what = ours / theirs >= 0.98, f"bandwidth, 1 GiB, 2 ranks on {where}"
    figures = (f"{ours:.2f} GB/s", f"{theirs:.2f} GB/s", f"{ours / theirs:.3f}", "at least 0.98")
    return [what, OURS_TORCH, *figures, _verdict(good)], good


def _verdict(good: bool) -> str:
    return "holds" if good else "does NOT hold"


def _note_versions(run: Run) -> tuple[int, int]:
    """Note what it is measured on; return how many devices there are, and libnccl's version."""
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no CUDA device: there is nothing to measure")
    cupy: Any = importlib.import_module("cupy")
    version = int(importlib.import_module("cupy.cuda.nccl").get_version())
    # Not torch.cuda.nccl.version(), which is that of the header that torch was built with.
    loaded = sorted(set(re.findall(r"\S+/libnccl\.so\S*", Path("/proc/self/maps").read_text())))
    several = " (not one: the ratios compare NCCL too)" if len(loaded) != 1 else ""
    count = torch.cuda.device_count()
    run.note(device=f"{torch.cuda.get_device_name(0)} (of {count})", libnccl=version)
    run.note(torch=torch.__version__, CuPy=cupy.__version__, loaded=", ".join(loaded) + several)
    run.note(CUDA=cupy.cuda.runtime.driverGetVersion())
    return count, version


def measure(run: Run) -> int:
    options, (count, version) = run.options, _note_versions(run)
    with run.started([world([0])], 1) as worlds:
        small = contestants(OURS_TORCH, OURS_CUPY, THEIRS)
        times = run.measure(worlds, small, SMALL_NBYTES, calls=options.calls)
    rows, hold = host_rows(times)
    if count < 2 and version < SHARED_SINCE:
        why = f"not measured: one device, libnccl {version}"
        rows.append(["bandwidth, 1 GiB, 2 ranks", "", "", "", "", "", why])
    else:
        with run.started([world([0, 1] if count > 1 else [0, 0])]) as worlds:
            large = contestants(OURS_TORCH, THEIRS, end=DONE)
            often = {"rounds": options.large_rounds, "calls": options.large_calls}
            times = run.measure(worlds, large, LARGE_NBYTES, **often)
        row, good = large_row(times, "2 devices" if count > 1 else "one device")
        rows, hold = [*rows, row], hold and good
    run.print("CUDA tensors", HEAD, rows, left=2)
    return int(not hold)
