"""Where the nanoseconds of one `group.allreduce(x)` of 1 KiB go, 2 ranks in shared memory, from Python down.

Two tables. The first times parts of the call on their own: those that need no second rank by one rank alone, then the
whole call by 2 ranks, in nanoseconds. What is timed alone includes the loop and the call of a lambda function, which
are the first line.

The second is a profile of rank 0 by symbol, sampled by `perf` (package linux-perf or linux-tools) while the 2 ranks
do nothing but call: the share of the samples times the time of a call. Waiting for the other rank counts where it
spins. `--perf-data FILE` keeps the samples with their call graphs, for `perf report -i FILE`. Without perf, or where it
may not sample (see /proc/sys/kernel/perf_event_paranoid), the output says so.
"""

from __future__ import annotations

import argparse
import collections
import inspect
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.rank import InGroup, Loop, repeat
from harness.rounds import Contestant, Samples
from harness.run import Run, add_options
from harness.world import Kind, World, WorldError

NO_GROUP = 0
"""A handle that no group has: a native call with it converts its arguments and comes back."""
LAYERS = (
    "loop and an empty call",
    "empty Python method, same parameters",
    "DLPack conversion: tvm_ffi.from_dlpack(x)",
    "native call, no arguments, lock kept",
    "native call, no arguments, lock released",
    "native call with the tensor, lock kept, no group",
    "group.allreduce(x), 1 rank in shared memory",
    "col.allreduce(x), 1 rank in shared memory",
)
CALLS = {
    "allreduce": "group.allreduce(x), 2 ranks",
    "allreduce:function": "col.allreduce(x), 2 ranks",
}


class Empty:
    """A method with the parameters of ``Group.allreduce`` and nothing in it."""

    def allreduce(
        self,
        tensor: Any,
        op: Any = None,
        *,
        async_op: bool = False,
        donate: bool = False,
        copy: bool | None = None,
        _like: Any = None,
    ) -> Any:
        """Return the tensor."""
        return tensor


class Layers(InGroup):
    """One rank, and the parts of a call that need no second one."""

    def loop(self, operation: str, nbytes: int) -> Loop:
        """Return the loop of a layer."""
        import colltensor as col
        from colltensor import dlpack
        from colltensor.backends.shm import library
        from colltensor.operations import NATIVE

        same = (
            inspect.signature(method).parameters.keys()
            for method in (Empty.allreduce, col.Group.allreduce)
        )
        assert len(set(map(tuple, same))) == 1, (
            "Group.allreduce has other parameters by now; give Empty's the same"
        )
        array, empty, native, group = self.array(nbytes // 4), Empty(), library.load(), self.group
        convert = dlpack.tvm_ffi().from_dlpack
        interface, releasing = (
            native.get_function("shm_interface"),
            native.get_function("shm_interface"),
        )
        interface.release_gil = False
        whole = native.shm_fast_function(NO_GROUP, 0, NATIVE["allreduce"], 0, -1, -1, False, True)
        whole.release_gil = False
        layers: tuple[Callable[[], object], ...] = (
            lambda: None,
            lambda: empty.allreduce(array),
            lambda: convert(array),
            lambda: interface(),
            lambda: releasing(),
            lambda: whole(array),
            lambda: group.allreduce(array),
            lambda: col.allreduce(array),
        )
        return repeat(dict(zip(LAYERS, layers, strict=True))[operation])


def _record(perf: str, world: World, call_us: float, seconds: float, data: Path) -> None:
    """Sample rank 0 while the ranks call ``allreduce``.

    Raises:
        WorldError: perf could not sample.
    """
    command = [perf, "record", "-F", "5000", "-g", "-o", str(data), "-p", str(world.pid)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            time.sleep(0.5)  # until it has attached
            world.ask("run", "allreduce", 1000, int(seconds * 1e6 / call_us))
        finally:
            process.send_signal(signal.SIGINT)
            said = process.communicate()[1]
    if not data.is_file() or not data.stat().st_size:
        raise WorldError(f"perf could not sample: {said.strip()}")


def _symbols(perf: str, data: Path) -> list[tuple[float, str, str]]:
    """Return share, library and symbol of what was sampled, the largest first."""
    command = [
        perf,
        "report",
        "-i",
        str(data),
        "--stdio",
        "--no-children",
        "-g",
        "none",
        "-t",
        "\t",
        "-F",
        "overhead,dso,sym",
    ]
    found = []
    for line in subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.splitlines():
        if line.strip() and not line.startswith("#"):
            share, shared_object, symbol = (field.strip() for field in line.split("\t")[:3])
            found.append((float(share.rstrip("%")) / 100, shared_object, symbol))
    return sorted(found, reverse=True)


def _print_profile(
    run: Run, found: list[tuple[float, str, str]], call_ns: float, least: float
) -> None:
    """Print the second table: libraries, then the symbols with at least that share."""
    libraries: dict[str, float] = collections.defaultdict(float)
    for share, shared_object, _ in found:
        libraries[shared_object] += share
    lines = [
        (share, f"**{name}**", "all")
        for name, share in sorted(libraries.items(), key=lambda item: -item[1])
    ]
    lines += [(share, shared_object, f"`{symbol}`") for share, shared_object, symbol in found]
    rows = [
        [name, symbol, f"{share:.1%}", f"{share * call_ns:,.0f}"]
        for share, name, symbol in lines
        if share >= least
    ]
    rest = sum(share for share, _, _ in found if share < least)
    rows.append(["", f"symbols below {least:.0%}", f"{rest:.1%}", f"{rest * call_ns:,.0f}"])
    run.print(
        f"Rank 0 of `group.allreduce(x)`, 2 ranks, {call_ns:,.0f} ns a call",
        ["library", "symbol", "share", "ns a call"],
        rows,
        left=2,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_options(parser, rounds=100, round_ms=2)
    parser.add_argument("--nbytes", type=int, default=1024)
    parser.add_argument("--backend", default="auto", help="colltensor's backend (auto)")
    parser.add_argument("--seconds", type=float, default=4.0, help="how long perf samples")
    parser.add_argument(
        "--least", type=float, default=0.01, help="the least share of a symbol that is printed"
    )
    parser.add_argument("--perf-data", type=Path, help="keep perf's samples in this file")


def measure(run: Run, options: argparse.Namespace) -> None:
    """Print the tables."""
    with run.started([Kind("layers", "subjects.profile:Layers")], 1) as worlds:
        found = run.measure(
            worlds, [Contestant(name, "layers", name) for name in LAYERS], options.nbytes
        )
    kind = Kind("calls", "harness.libraries:Colltensor", options={"backend": options.backend})
    with tempfile.TemporaryDirectory() as folder, run.started([kind]) as worlds:
        contestants = [Contestant(name, "calls", operation) for operation, name in CALLS.items()]
        found |= run.measure(worlds, contestants, options.nbytes)
        rows = [[name, *_nanoseconds(samples)] for name, samples in found.items()]
        run.print("Parts of a call", ["layer", "median, ns", "lowest, ns"], rows)
        perf = shutil.which("perf")
        if perf is None:
            print("\nNo profile by symbol: perf is not installed.")
            return
        call_us = found[CALLS["allreduce"]].median_us
        data = options.perf_data or Path(folder) / "perf.data"
        worlds["calls"].ask("prepare", "allreduce", options.nbytes)
        _record(perf, worlds["calls"], call_us, options.seconds, data)
        _print_profile(run, _symbols(perf, data), call_us * 1e3, options.least)


def _nanoseconds(samples: Samples) -> tuple[str, str]:
    return f"{samples.median_us * 1e3:,.0f}", f"{min(samples.rounds_us) * 1e3:,.0f}"
