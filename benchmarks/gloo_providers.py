"""Float32 allreduce over each provider of Gloo that is here, side by side in one run.

    python benchmarks/gloo_providers.py                  2 ranks over loopback
    python benchmarks/gloo_providers.py --namespaces     2 x 2 ranks on two hosts, backend "hierarchical"
    python benchmarks/gloo_providers.py --other-python /path/to/python3.10

Ranks are processes with a group of each provider and numpy arrays. pygloo exists for Python 3.10 and below only, where
recent versions of torch do not: `--other-python` names the Python of an environment of its own, with colltensor and
pygloo, for a second world of ranks. The native provider is measured in both, and each other provider compared with
it in the same Python.

For every size all providers of both worlds alternate in rounds, so that noise of the machine meets all of them alike;
the world that has not its turn waits for input. A time is what rank 0 measured for one call, after warm-up, and in each
round after a barrier and one call that does not count; the table has medians, and ratios to the native provider's.
Arrays begin where numpy puts them: 16 bytes into a page if they are large.
Hosts are network namespaces with a veth pair between them, which needs root (hosts_traffic.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from hosts_traffic import inside, two_hosts

SIZES = (4, 1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26)
CALL_S = 60.0
LEAVE_S = 10.0


class World:
    """Ranks of one Python, which measure what they are told, each on standard input.

    Attributes:
        python: The version of the Python.
        providers: The providers that it has, the native one first.
    """

    def __init__(
        self, python: str, ranks: int, backend: str, holders: Sequence[int], undo: contextlib.ExitStack
    ) -> None:
        """Start the ranks; ``undo`` ends them."""
        folder = undo.enter_context(tempfile.TemporaryDirectory())
        self._ranks = []
        for rank in range(ranks):
            program = [python, __file__, "--as-rank", json.dumps([rank, ranks, folder, backend])]
            process = subprocess.Popen(
                inside(holders[rank * 2 // ranks], program) if holders else program,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            undo.callback(process.wait)
            undo.callback(process.kill)
            self._ranks.append(process)
        undo.callback(self._leave)
        self.python, self.providers = self._answer()

    def measure(self, provider: str, nbytes: int, calls: int) -> list[float]:
        """Let the ranks make some allreduces of arrays of a size; return what each took, in seconds."""
        for process in self._ranks:
            assert process.stdin is not None
            process.stdin.write(json.dumps([provider, nbytes, calls]) + "\n")
            process.stdin.flush()
        times: list[float] = self._answer()
        return times

    def _leave(self) -> None:
        """Let the ranks destroy their groups and end; those that do not are killed."""
        for process in self._ranks:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for process in self._ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LEAVE_S)

    def _answer(self) -> Any:
        first = self._ranks[0]
        assert first.stdout is not None
        line = first.stdout.readline()
        if not line:
            raise RuntimeError("rank 0 has ended; its error is above")
        return json.loads(line)


class Contestant(NamedTuple):
    """A provider in one world."""

    world: World
    provider: str

    @property
    def label(self) -> str:
        """What the table calls it."""
        return f"{self.provider}, {self.world.python}"


def be_rank(rank: int, world_size: int, folder: str, backend: str) -> None:
    """Measure what the lines of the standard input ask for; rank 0 prints the times."""
    import numpy as np

    import colltensor as col

    names = ["native", *(name for name in ("torch", "pygloo") if find_spec(name))]
    groups = {
        name: col.init_collective_group(
            world_size, rank, backend, name, init_method=f"file://{folder}/{name}", timeout_s=CALL_S, provider=name
        )
        for name in names
    }
    if rank == 0:
        print(json.dumps(["{}.{}".format(*sys.version_info), names]), flush=True)
    array = np.zeros(0, np.float32)
    for line in sys.stdin:
        name, nbytes, calls = json.loads(line)
        group = groups[name]
        if array.nbytes != nbytes:
            # Written, as an array in use is: the pages of a fresh one come from the kernel one by one.
            array = np.full(nbytes // 4, 1e-30, np.float32)
        group.barrier()
        group.allreduce(array)
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            group.allreduce(array)
            times.append(time.perf_counter() - start)
        if rank == 0:
            print(json.dumps(times), flush=True)
    for name in names:
        col.destroy_collective_group(name)


def medians(contestants: Sequence[Contestant], nbytes: int, seconds: float) -> list[float]:
    """Return the median time of a call of each, in seconds."""
    one = max(statistics.median(world.measure(provider, nbytes, 3)) for world, provider in contestants)
    calls = max(1, min(20, int(0.1 / one)))
    rounds = max(7, min(100, int(seconds / one)) // calls)
    times: list[list[float]] = [[] for _ in contestants]
    for _ in range(rounds):
        for (world, provider), found in zip(contestants, times, strict=True):
            found += world.measure(provider, nbytes, calls)
    return [statistics.median(found) for found in times]


def table(contestants: Sequence[Contestant], results: dict[int, list[float]], ranks: int) -> str:
    """Return the medians in microseconds, and how much longer the others take than the native one, in Markdown."""
    natives = {c.world: i for i, c in enumerate(contestants) if c.provider == "native"}
    others = [(i, natives[c.world]) for i, c in enumerate(contestants) if c.provider != "native"]
    header = [f"bytes, {ranks} ranks", *(c.label for c in contestants), "GB/s, native"]
    header += [f"{contestants[i].provider} / native" for i, _ in others]
    lines = [header, ["---:"] * len(header)]
    for nbytes, found in results.items():
        row = [f"{nbytes:,}", *(f"{seconds * 1e6:,.0f}" for seconds in found), f"{nbytes / found[0] / 1e9:.2f}"]
        lines.append(row + [f"{found[i] / found[native]:.2f}" for i, native in others])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Measure and print the table, or be a rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--namespaces", action="store_true", help="two hosts with two ranks each")
    parser.add_argument("--other-python", help="another Python, whose providers are measured in turns with this one's")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each size and provider, about")
    parser.add_argument("--sizes", type=lambda text: [int(word) for word in text.split(",")], default=list(SIZES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    ranks, backend = (4, "hierarchical") if arguments.namespaces else (2, "gloo")
    if arguments.as_rank is not None:
        be_rank(*json.loads(arguments.as_rank))
        return
    with contextlib.ExitStack() as undo:
        holders = undo.enter_context(two_hosts()) if arguments.namespaces else []
        pythons = [sys.executable, *([arguments.other_python] if arguments.other_python else [])]
        worlds = [World(python, ranks, backend, holders, undo) for python in pythons]
        contestants = [Contestant(world, provider) for world in worlds for provider in world.providers]
        results = {nbytes: medians(contestants, nbytes, arguments.seconds) for nbytes in arguments.sizes}
    text = table(contestants, results, ranks)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
