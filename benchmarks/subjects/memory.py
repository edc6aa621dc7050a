"""Peak resident memory of an in-place allreduce of 256 MiB: ours on numpy against torch.distributed's.

Each library runs in processes of its own, over torch's Gloo; after small allreduces that warm everything up the peak is
reset (Linux: /proc/self/clear_refs) and read again after the large one. The table has the rise on rank 0.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from harness.libraries import TorchGloo
from harness.rank import InGroup
from harness.run import Run, add_options
from harness.world import Kind


def _status_mib(field: str) -> float:
    """Return a memory figure of /proc/self/status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def _rise_mib(allreduce: Any, small: Any, large: Any, ranks: int) -> float:
    """Return by how much the peak rises above what is resident before the call."""
    for _ in range(3):
        allreduce(small)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mib("VmRSS")
    allreduce(large)
    assert large[0] == large[-1] == ranks, "the sums are wrong"
    return _status_mib("VmHWM") - before


class Ours(InGroup):
    """Ranks with numpy arrays."""

    def rise(self, nbytes: int) -> float:
        """Return the rise in MiB."""
        small, large = self.array(1024), self.array(nbytes // 4)
        large += 1
        return _rise_mib(self.group.allreduce, small, large, self.ranks)


class Theirs(TorchGloo):
    """Ranks with torch tensors."""

    def rise(self, nbytes: int) -> float:
        """Return the rise in MiB."""
        import torch

        return _rise_mib(
            torch.distributed.all_reduce, torch.ones(1024), torch.ones(nbytes // 4), self.ranks
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_options(parser)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=2)


def measure(run: Run, options: argparse.Namespace) -> None:
    """Print both figures."""
    kinds = (
        Kind(
            "colltensor, numpy",
            "subjects.memory:Ours",
            options={"backend": "gloo", "provider": "torch"},
        ),
        Kind("torch.distributed", "subjects.memory:Theirs"),
    )
    found = {}
    for kind in kinds:
        with run.started([kind], options.ranks) as worlds:
            found[kind.name] = worlds[kind.name].ask("rise", options.mib << 20)[0]
    rows = [[name, f"{mib:.2f}"] for name, mib in found.items()]
    ours, theirs = found.values()
    rows.append(["ours - theirs (at most 1)", f"{ours - theirs:.2f}"])
    run.print(
        f"Rise of the peak in an allreduce of {options.mib} MiB, {options.ranks} ranks",
        ["", "MiB"],
        rows,
    )
