"""What an allreduce sends between two hosts, and how long it takes: hierarchical beside flat Gloo.

    python benchmarks hosts --mib 64 --ranks 2 --rate 1gbit

Two hosts are two network namespaces of this machine with a link between them (which needs root, and `ip`, `unshare`
and `nsenter`). Each has so many ranks, in the order of the hosts (A A B B) or interleaved (A B A B). The bytes are the
link's own count in both directions, headers and the control plane's included, of one float32 allreduce in place, over
the buffer's; the time is the median of the calls on rank 0, with the ranks of both hosts on the same cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from harness.namespaces import LINK, inside, two_hosts
from harness.places import NUMPY_PLACE
from harness.rank import InGroup
from harness.run import Run, add_options
from harness.world import Kind


class Ranks(InGroup):
    """The ranks of one case."""

    def count(self, nbytes: int, calls: int, place: int) -> tuple[str, int, int, float]:
        """Sum arrays, compare the result, and return the backend, the bytes sent and received, and the seconds."""
        group, counts, seconds = self.group, [], []
        self.place = place
        data, numbers = self.array(nbytes // 4), np.arange(nbytes // 4, dtype=np.float32) % 1000
        for _ in range(1 + calls):
            data[:] = numbers + self.rank
            group.barrier()
            before = _counted()
            began = time.perf_counter()
            group.allreduce(data)
            seconds.append(time.perf_counter() - began)
            group.barrier()
            counts.append([after - start for start, after in zip(before, _counted(), strict=True)])
            group.barrier()
            assert (data == self.ranks * numbers + sum(range(self.ranks))).all(), (
                "the sums are wrong"
            )
        sent, received = (
            int(statistics.median(column)) for column in zip(*counts[1:], strict=True)
        )
        return group.backend, sent, received, statistics.median(seconds[1:])


def _counted() -> tuple[int, int]:
    """Return the bytes sent and received by this host's end of the link, as /proc/net/dev has them."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, columns = line.partition(":")
        if name.strip() == LINK:
            numbers = columns.split()
            return int(numbers[8]), int(numbers[0])
    raise RuntimeError(f"this process is not on a host with an interface {LINK!r}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_options(parser, places=(str(NUMPY_PLACE),))
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=2, help="ranks on each host")
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument(
        "--rate", help="what the link carries each way, as tc spells it; by default what it can"
    )


def measure(run: Run, options: argparse.Namespace) -> None:
    """Count every case: the hierarchical backend, and flat Gloo with both orders of the ranks."""
    nbytes, rows, in_order = options.mib << 20, [], "A" * options.ranks + "B" * options.ranks
    for backend, hosts in (("auto", in_order), ("gloo", in_order), ("gloo", "AB" * options.ranks)):
        with two_hosts(options.rate) as holders:
            prefixes = [inside(holders[host != "A"], ()) for host in hosts]
            kind = Kind(
                "hosts", "subjects.hosts:Ranks", options={"backend": backend}, prefixes=prefixes
            )
            with run.started([kind], len(hosts)) as worlds:
                for place in options.places:
                    found, *_ = worlds["hosts"].ask("count", nbytes, options.calls, int(place))
                    name, sent, received, seconds = found
                    rows.append(
                        [
                            name,
                            " ".join(hosts),
                            place,
                            f"{sent / nbytes:.3f}",
                            f"{received / nbytes:.3f}",
                            f"{seconds * 1e3:,.1f}",
                        ]
                    )
    run.print(
        "Between two hosts",
        [
            "backend",
            "hosts of the ranks",
            "arrays at",
            "first to second, x buffer",
            "back, x buffer",
            "ms",
        ],
        rows,
        left=2,
    )
