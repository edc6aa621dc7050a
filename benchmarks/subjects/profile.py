"""Where the nanoseconds of a `group.allreduce(x)` of 1 KiB go, in shared memory.

Two tables. The first times parts of the call on their own: those that need no second rank by one
rank alone, then the whole call by 2 ranks, in nanoseconds. What is timed alone includes the loop
and the call of a lambda function, which are the first line.

The second is a profile of rank 0 by symbol, sampled by `perf` (package linux-perf or linux-tools)
while the 2 ranks do nothing but call: the share of the samples times the time of a call. Waiting
for the other rank counts where it spins. `--perf-data FILE` keeps the samples with their call
graphs, for `perf report -i FILE`. Without perf, or where it may not sample (see
/proc/sys/kernel/perf_event_paranoid), the output says so.
"""

from __future__ import annotations

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
from harness.rounds import Contestant
from harness.run import Run
from harness.world import Kind, World, WorldError

OPTIONS = {"rounds": 100, "round_ms": 2.0, "nbytes": 1024, "backend": "auto", "perf_data": ""}
SAMPLED_S, LEAST = 4.0, 0.01
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
WHOLE = Contestant("group.allreduce(x), 2 ranks", "calls", "allreduce")
CALLS = (WHOLE, Contestant("col.allreduce(x), 2 ranks", "calls", "allreduce:function"))


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
        return tensor


class Layers(InGroup):
    """One rank, and the parts of a call that need no second one."""

    def loop(self, operation: str, nbytes: int) -> Loop:
        import colltensor as col
        from colltensor import dlpack
        from colltensor.backends.shm import library
        from colltensor.operations import NATIVE

        ours, theirs = map(inspect.signature, (Empty.allreduce, col.Group.allreduce))
        assert [*ours.parameters] == [*theirs.parameters], "give Empty's the parameters of Group's"
        array, empty, native, group = self.array(nbytes // 4), Empty(), library.load(), self.group
        convert = dlpack.tvm_ffi().from_dlpack
        interface, releasing = (native.get_function("shm_interface") for _ in range(2))
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


def sample(perf: str, world: World, call_us: float, data: Path) -> None:
    """Sample rank 0 while the ranks call ``allreduce``."""
    command = [perf, "record", "-F", "5000", "-g", "-o", str(data), "-p", str(world.pid)]
    ends = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **ends) as process:
        try:
            time.sleep(0.5)  # until it has attached
            world.ask("run", "allreduce", 1000, int(SAMPLED_S * 1e6 / call_us))
        finally:
            process.send_signal(signal.SIGINT)
            said = process.communicate()[1]
    if not data.is_file() or not data.stat().st_size:
        raise WorldError(f"perf could not sample: {said.strip()}")


def symbols(perf: str, data: Path) -> list[tuple[float, str, str]]:
    """Return share, library and symbol of what was sampled, the largest first."""
    options = ["--stdio", "--no-children", "-g", "none", "-F", "overhead,dso,sym", "-t"]
    command, found = [perf, "report", "-i", str(data), *options, "\t"], []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        if line.strip() and not line.startswith("#"):
            share, shared_object, symbol = (field.strip() for field in line.split("\t")[:3])
            found.append((float(share.rstrip("%")) / 100, shared_object, symbol))
    return sorted(found, reverse=True)


def print_profile(run: Run, found: list[tuple[float, str, str]], call_ns: float) -> None:
    """Print the second table: libraries, then the symbols with a share that counts."""
    libraries: dict[str, float] = collections.defaultdict(float)
    for share, shared_object, _ in found:
        libraries[shared_object] += share
    lines = [(share, f"**{name}**", "all") for name, share in libraries.items()]
    lines.sort(reverse=True)
    lines += [(share, name, f"`{symbol}`") for share, name, symbol in found]
    lines = [line for line in lines if line[0] >= LEAST]
    rest = sum(share for share, _, _ in found if share < LEAST)
    lines.append((rest, "", f"symbols below {LEAST:.0%}"))
    title = f"Rank 0 of `group.allreduce(x)`, 2 ranks, {call_ns:,.0f} ns a call"
    rows = [[name, what, f"{share:.1%}", f"{share * call_ns:,.0f}"] for share, name, what in lines]
    run.print(title, ["library", "symbol", "share", "ns a call"], rows, left=2)


def measure(run: Run) -> None:
    nbytes, own = run.options.nbytes, {"backend": run.options.backend}
    with run.started([Kind("layers", "subjects.profile:Layers")], 1) as worlds:
        layers = [Contestant(name, "layers", name) for name in LAYERS]
        found = run.measure(worlds, layers, nbytes)
    kind = Kind("calls", "harness.libraries:Colltensor", options=own)
    with tempfile.TemporaryDirectory() as folder, run.started([kind]) as worlds:
        found |= run.measure(worlds, CALLS, nbytes)
        times = {name: (one.median_us, min(one.rounds_us)) for name, one in found.items()}
        rows = [[name, *(f"{us * 1e3:,.0f}" for us in both)] for name, both in times.items()]
        run.print("Parts of a call", ["layer", "median, ns", "lowest, ns"], rows)
        perf, call_us = shutil.which("perf"), times[WHOLE.label][0]
        if perf is None:
            print("\nNo profile by symbol: perf is not installed.")
            return
        data = Path(run.options.perf_data or f"{folder}/perf.data")
        worlds["calls"].ask("prepare", "allreduce", nbytes)
        sample(perf, worlds["calls"], call_us, data)
        print_profile(run, symbols(perf, data), call_us * 1e3)
