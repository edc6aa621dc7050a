"""What an allreduce sends between two hosts, and how long it takes: hierarchical beside flat Gloo.

    python benchmarks hosts --mib 64 --ranks 2 --rate 1gbit

Two hosts are two network namespaces of this machine with a link between them (which needs root, and
`ip`, `unshare` and `nsenter`). Each has so many ranks, in the order of the hosts (A A B B) or
interleaved (A B A B). The bytes are the link's own count in both directions, headers and the
control plane's included, of one float32 allreduce in place, over the buffer's; the time is the
median of the calls on rank 0, with the ranks of both hosts on the same cores. `--rate` is what the
link carries each way, as tc spells it; without it what it can.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
from harness.namespaces import LINK, inside, two_hosts
from harness.rank import NUMPY_PLACE, InGroup
from harness.run import Run
from harness.world import Kind

OPTIONS = {"mib": 64, "ranks": 2, "calls": 5, "rate": "", "places": (str(NUMPY_PLACE),)}
HEAD = ["backend", "hosts of the ranks", "arrays at", "first to second, x buffer"]
HEAD += ["back, x buffer", "ms"]


class Ranks(InGroup):
    def count(self, nbytes: int, calls: int, place: int) -> tuple[str, float, float, float]:
        """Sum arrays, and compare the result.

        Returns the backend, the bytes sent and received, and the seconds.
        """
        self.place, figures = place, []
        data, numbers = self.array(nbytes // 4), np.arange(nbytes // 4, dtype=np.float32) % 1000
        for _ in range(1 + calls):
            data[:] = numbers + self.rank
            self.group.barrier()
            before, began = counted(), time.perf_counter()
            self.group.allreduce(data)
            seconds = time.perf_counter() - began
            self.group.barrier()
            sent, received = (now - then for then, now in zip(before, counted(), strict=True))
            figures.append((sent, received, seconds))
            self.group.barrier()
            wanted = self.ranks * numbers + sum(range(self.ranks))
            assert (data == wanted).all(), "the sums are wrong"
        return (self.group.backend, *map(statistics.median, zip(*figures[1:], strict=True)))


def counted() -> tuple[int, int]:
    """Return the bytes that this host's end of the link has sent and received."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, columns = line.partition(":")
        if name.strip() == LINK:
            return int(columns.split()[8]), int(columns.split()[0])
    raise RuntimeError(f"this process is not on a host with an interface {LINK!r}")


def measure(run: Run) -> None:
    options, rows = run.options, []
    nbytes, in_order = options.mib << 20, "A" * options.ranks + "B" * options.ranks
    for backend, hosts in (("auto", in_order), ("gloo", in_order), ("gloo", "AB" * options.ranks)):
        with two_hosts(options.rate) as holders:
            prefixes = [inside(holders[host != "A"], ()) for host in hosts]
            own = {"options": {"backend": backend}, "prefixes": prefixes}
            with run.started([Kind("hosts", "subjects.hosts:Ranks", **own)], len(hosts)) as worlds:
                for place in options.places:
                    asked = worlds["hosts"].ask("count", nbytes, options.calls, int(place))
                    name, sent, received, seconds = asked[0]
                    shares = (f"{sent / nbytes:.3f}", f"{received / nbytes:.3f}")
                    rows.append([name, " ".join(hosts), place, *shares, f"{seconds * 1e3:,.1f}"])
    run.print("Between two hosts", HEAD, rows, left=2)
