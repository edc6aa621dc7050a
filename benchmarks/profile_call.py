"""Where the nanoseconds of one `group.allreduce(x)` of 1 KiB go, 2 ranks in shared memory, from Python down.

    python benchmarks/profile_call.py

Two tables. The first times parts of the call on their own: those that need no second rank in this process,
while the ranks sleep, then the whole call by 2 ranks. A sample is the mean of many calls in a loop; the table has the
median and the lowest of the samples, in nanoseconds. What is timed in this process includes the loop and the call of a
lambda function, which are the first line.

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
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from worlds.places import NUMPY_PLACE, place_of
from worlds.world import Kind, World, WorldError, started

import colltensor as col
from colltensor import dlpack
from colltensor.backends.base import DIRECT
from colltensor.backends.shm import library

LOOP = 2000
NO_GROUP = 0
"""A handle that no group has: a native call with it converts its arguments and comes back."""


class Empty:
    """A method with the parameters of ``Group.allreduce`` and nothing in it."""

    def allreduce(
        self, tensor: Any, op: Any = None, *, async_op: bool = False, donate: bool = False, copy: bool | None = None
    ) -> Any:
        """Return the tensor."""
        return tensor


def layers(array: np.ndarray, folder: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the layers that need no second rank."""
    same = (inspect.signature(method).parameters.keys() for method in (Empty.allreduce, col.Group.allreduce))
    assert len(set(map(tuple, same))) == 1, "Group.allreduce has other parameters by now; give Empty's the same"
    empty, native, convert = Empty(), library.load(), dlpack.tvm_ffi().from_dlpack
    yield "loop and an empty call", lambda: None
    yield "empty Python method, same parameters", lambda: empty.allreduce(array)
    yield "DLPack conversion: tvm_ffi.from_dlpack(x)", lambda: convert(array)
    interface = native.get_function("shm_interface")
    interface.release_gil = False
    yield "native call, no arguments, lock kept", lambda: interface()
    releasing = native.get_function("shm_interface")
    yield "native call, no arguments, lock released", lambda: releasing()
    whole = native.shm_direct_function(NO_GROUP, 0, DIRECT["allreduce"], 0, -1, -1, True)
    whole.release_gil = False
    yield "native call with the tensor, lock kept, no group", lambda: whole(array)
    alone = col.init_collective_group(1, 0, "shm", "alone", init_method=f"file://{folder}/alone")
    yield "group.allreduce(x), 1 rank in shared memory", lambda: alone.allreduce(array)
    yield "col.allreduce(x, 'alone'), 1 rank in shared memory", lambda: col.allreduce(array, "alone")


def sample_here(call: Callable[[], object], samples: int) -> list[float]:
    """Return the nanoseconds of a call, one number a sample."""
    def loop() -> float:
        began = time.perf_counter_ns()
        for _ in range(LOOP):
            call()
        return (time.perf_counter_ns() - began) / LOOP

    loop()
    return [loop() for _ in range(samples)]


def sample_world(world: World, nbytes: int, samples: int) -> dict[str, list[float]]:
    """Return the nanoseconds of a call of all ranks by operation, one number a sample; the operations take turns."""
    times: dict[str, list[float]] = {"allreduce": [], "allreduce:function": []}
    for operation in times:
        world.ask("prepare", operation, nbytes)
    for _ in range(samples):
        for operation, found in times.items():
            found.append(max(world.ask("run", operation, LOOP, LOOP)) / LOOP * 1e9)
    return times


def layers_table(rows: list[tuple[str, list[float]]]) -> str:
    """Return the first table."""
    lines = ["| layer | median, ns | lowest, ns |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {statistics.median(times):,.0f} | {min(times):,.0f} |" for name, times in rows]
    return "\n".join(lines)


def record(perf: str, world: World, call_ns: float, seconds: float, data: Path) -> None:
    """Sample rank 0 while the ranks call ``allreduce``, which must be prepared.

    Raises:
        WorldError: perf could not sample.
    """
    command = [perf, "record", "-F", "5000", "-g", "-o", str(data), "-p", str(world.pid)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            time.sleep(0.5)  # until it has attached
            world.ask("run", "allreduce", LOOP, int(seconds * 1e9 / call_ns))
        finally:
            process.send_signal(signal.SIGINT)
            said = process.communicate()[1]
    if not data.is_file() or not data.stat().st_size:
        raise WorldError(f"perf could not sample: {said.strip()}")


def symbols(perf: str, data: Path) -> list[tuple[float, str, str]]:
    """Return share, library and symbol of what was sampled, the largest first."""
    command = [perf, "report", "-i", str(data), "--stdio", "--no-children", "-g", "none", "-t", "\t",
               "-F", "overhead,dso,sym"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            share, shared_object, symbol = (field.strip() for field in line.split("\t")[:3])
            found.append((float(share.rstrip("%")) / 100, shared_object, symbol))
    return sorted(found, reverse=True)


def symbols_table(found: list[tuple[float, str, str]], call_ns: float, least: float) -> str:
    """Return the second table: libraries, then the symbols with at least that share."""
    libraries: dict[str, float] = collections.defaultdict(float)
    for share, shared_object, _ in found:
        libraries[shared_object] += share
    lines = ["| library | symbol | share | ns a call |", "| --- | --- | ---: | ---: |"]
    for shared_object, share in sorted(libraries.items(), key=lambda item: -item[1]):
        if share >= least:
            lines.append(f"| **{shared_object}** | all | {share:.1%} | {share * call_ns:,.0f} |")
    for share, shared_object, symbol in found:
        if share >= least:
            lines.append(f"| {shared_object} | `{symbol}` | {share:.1%} | {share * call_ns:,.0f} |")
    rest = sum(share for share, _, _ in found if share < least)
    return "\n".join([*lines, f"| | symbols below {least:.0%} | {rest:.1%} | {rest * call_ns:,.0f} |"])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nbytes", type=int, default=1024)
    parser.add_argument("--backend", default="auto", help="colltensor's backend (auto)")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long perf samples")
    parser.add_argument("--least", type=float, default=0.01, help="the least share of a symbol that is printed")
    parser.add_argument("--pin", action="store_true", help="run rank r on core r")
    parser.add_argument("--perf-data", type=Path, help="keep perf's samples in this file")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    perf = shutil.which("perf")
    started_worlds = started([Kind("colltensor", "colltensor")], 2, pin=options.pin, backend=options.backend)
    with tempfile.TemporaryDirectory() as folder, started_worlds as worlds:
        world = worlds["colltensor"]
        array = np.zeros(options.nbytes // 4, np.float32)
        rows = [(name, sample_here(call, options.samples)) for name, call in layers(array, folder)]
        times = sample_world(world, options.nbytes, options.samples)
        rows += [("group.allreduce(x), 2 ranks", times["allreduce"])]
        rows += [("col.allreduce(x), 2 ranks", times["allreduce:function"])]
        call_ns = statistics.median(times["allreduce"])
        print(f"{options.nbytes:,} bytes of float32, in one process {place_of(array)}, in two {NUMPY_PLACE}; "
              f"{', '.join(map(' '.join, world.versions.items()))}\n")
        print(layers_table(rows))
        if perf is None:
            print("\nNo profile by symbol: perf is not installed.")
            return
        data = options.perf_data or Path(folder) / "perf.data"
        record(perf, world, call_ns, options.seconds, data)
        print(f"\nRank 0 of `group.allreduce(x)`, 2 ranks, {call_ns:,.0f} ns a call:\n")
        print(symbols_table(symbols(perf, data), call_ns, options.least))


if __name__ == "__main__":
    try:
        main()
    except WorldError as error:
        sys.exit(str(error))
