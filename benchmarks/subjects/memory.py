"""Peak resident memory of an allreduce of 256 MiB in place: ours and torch.distributed's.

Each library runs in processes of its own, over torch's Gloo; after small allreduces that warm
everything up the peak is reset (Linux: /proc/self/clear_refs) and read again after the large one.
The table has the rise on rank 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.libraries import TorchGloo
from harness.rank import InGroup
from harness.run import Run
from harness.world import Kind

OPTIONS = {"mib": 256, "ranks": 2}


def status_mib(field: str) -> float:
    """Return a memory figure of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def rise_mib(allreduce: Any, small: Any, large: Any, ranks: int) -> float:
    """Return by how much the peak rises above what is resident before the call."""
    for _ in range(3):
        allreduce(small)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_mib("VmRSS")
    allreduce(large)
    assert large[0] == large[-1] == ranks, "the sums are wrong"
    return status_mib("VmHWM") - before


class Ours(InGroup):
    def rise(self, nbytes: int) -> float:
        small, large = self.array(1024), self.array(nbytes // 4)
        large += 1
        return rise_mib(self.group.allreduce, small, large, self.ranks)


class Theirs(TorchGloo):
    def rise(self, nbytes: int) -> float:
        import torch

        small, large = torch.ones(1024), torch.ones(nbytes // 4)
        return rise_mib(self.dist.all_reduce, small, large, self.ranks)


def measure(run: Run) -> None:
    mib, ranks, found = run.options.mib, run.options.ranks, []
    ours = {"backend": "gloo", "provider": "torch"}
    for kind in (
        Kind("colltensor, numpy", "subjects.memory:Ours", options=ours),
        Kind("torch.distributed", "subjects.memory:Theirs"),
    ):
        with run.started([kind], ranks) as worlds:
            found.append((kind.name, worlds[kind.name].ask("rise", mib << 20)[0]))
    found.append(("ours - theirs (at most 1)", found[0][1] - found[1][1]))
    title = f"Rise of the peak in an allreduce of {mib} MiB, {ranks} ranks"
    run.print(title, ["", "MiB"], [[name, f"{rise:.2f}"] for name, rise in found])
