"""What an allreduce sends between two hosts, and how long it takes: hierarchical beside flat Gloo.

    python benchmarks/hosts_traffic.py --mib 64 --ranks 2 --rate 1gbit

Two hosts are two network namespaces of this machine with a veth pair between them (which needs root, and `ip`,
`unshare` and `nsenter`). Each has so many ranks, in the order of the hosts (A A B B) or interleaved (A B A B). The
bytes are the link's own count in both directions, headers and the control plane's included, of one float32 allreduce
in place on numpy arrays, over the buffer's; the time is the median of the calls on rank 0, with the ranks of both
hosts on the same cores. The array begins where numpy puts it, 16 bytes into a page if it is large. `--rate` limits
the link, each way, as `tc` spells it.

The namespaces have no names: they and the link are gone with the processes in them, however those end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

LINK = "colltensor0"
ADDRESSES = ("10.231.77.1", "10.231.77.2")
RUN_S = 120.0


class NotPermittedError(Exception):
    """Network namespaces cannot be made here; says why."""


class Case(NamedTuple):
    """One row of the table: a backend, and the host of each rank."""

    backend: str
    hosts: str


class Traffic(NamedTuple):
    """What one allreduce takes.

    Attributes:
        backend: The backend that the group has.
        sent: Bytes from the first host to the second.
        received: Bytes from the second host to the first.
        seconds: The median time of a call.
    """

    backend: str
    sent: int
    received: int
    seconds: float


def cases(ranks: int) -> list[Case]:
    """The hierarchical backend, and flat Gloo with both orders of the ranks."""
    in_order = "A" * ranks + "B" * ranks
    return [Case("auto", in_order), Case("gloo", in_order), Case("gloo", "AB" * ranks)]


@contextlib.contextmanager
def two_hosts(rate: str | None = None) -> Iterator[list[int]]:
    """Two network namespaces with a link between them; yields a process in each, by its number.

    Raises:
        NotPermittedError: This machine or user does not allow it.
    """
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            raise NotPermittedError(f"{tool} is not installed (iproute2, util-linux)")
    with contextlib.ExitStack() as undo:
        holders = []
        for _ in ADDRESSES:
            holder = undo.enter_context(
                subprocess.Popen(
                    ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE, text=True,
                )
            )  # ends with its input, and so with this process
            undo.callback(holder.kill)
            _await_namespace(holder)
            holders.append(holder.pid)
        first, second = holders
        _network(first, f"ip link add {LINK} type veth peer name {LINK} netns {second}")
        for holder, address in zip(holders, ADDRESSES, strict=True):
            _network(holder, f"ip address add {address}/30 dev {LINK}")
            _network(holder, "ip link set lo up")
            _network(holder, f"ip link set {LINK} up")
            _network(holder, f"ip route add default dev {LINK}")
            if rate is not None:
                _network(holder, f"tc qdisc add dev {LINK} root tbf rate {rate} burst 1mb latency 50ms")
        yield holders


def _await_namespace(holder: subprocess.Popen[str]) -> None:
    """Return once the process is in a namespace of its own."""
    while os.readlink(f"/proc/{holder.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        if holder.poll() is not None:
            assert holder.stderr is not None
            raise NotPermittedError(f"unshare --net: {holder.stderr.read().strip()}")
        time.sleep(0.005)


def inside(holder: int, command: Sequence[str]) -> list[str]:
    """Return the command that runs `command` on the host of a process that `two_hosts` yields, in its place."""
    return ["nsenter", f"--net=/proc/{holder}/ns/net", *command]


def _network(holder: int, command: str) -> None:
    done = subprocess.run(inside(holder, command.split()), capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotPermittedError(f"{command}: {done.stderr.strip()}")


def measure(holders: Sequence[int], case: Case, nbytes: int, calls: int) -> Traffic:
    """Run the ranks of one case, which sum arrays and compare the result, and return what rank 0 counted."""
    with tempfile.TemporaryDirectory() as folder:
        programs = [
            inside(holders[host != case.hosts[0]],
                   [sys.executable, __file__, "--as-rank", json.dumps([rank, case, folder, nbytes, calls])])
            for rank, host in enumerate(case.hosts)
        ]  # fmt: skip
        return Traffic(*json.loads(outputs_of(programs, RUN_S)[0].splitlines()[-1]))


def outputs_of(programs: Sequence[Sequence[str]], within_s: float) -> list[str]:
    """Run the programs, one a rank, at the same time, and return what each printed; none is left.

    Raises:
        RuntimeError: A rank failed; with what it printed.
        subprocess.TimeoutExpired: They were not done in time.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    with contextlib.ExitStack() as undo:
        ranks = []
        for program in programs:
            process = subprocess.Popen(
                program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
            )
            undo.callback(process.wait)
            undo.callback(process.kill)
            ranks.append(process)
        deadline = time.monotonic() + within_s
        outputs = [rank.communicate(timeout=max(1.0, deadline - time.monotonic()))[0] for rank in ranks]
    for rank, (process, output) in enumerate(zip(ranks, outputs, strict=True)):
        if process.returncode:
            raise RuntimeError(f"rank {rank} ended with {process.returncode}:\n{output}")
    return outputs


def _be_rank(rank: int, case: Case, folder: str, nbytes: int, calls: int) -> None:
    import numpy as np

    import colltensor as col

    size = len(case.hosts)
    group = col.init_collective_group(
        size, rank, case.backend, "counted", init_method=f"file://{folder}", timeout_s=RUN_S / 2
    )
    data = np.empty(nbytes // 4, np.float32)
    seconds = []
    counts = []
    for _ in range(1 + calls):
        data[:] = np.arange(len(data), dtype=np.float32) % 1000 + rank
        group.barrier()
        before = _counted()
        began = time.perf_counter()
        group.allreduce(data)
        seconds.append(time.perf_counter() - began)
        group.barrier()
        counts.append([after - start for start, after in zip(before, _counted(), strict=True)])
        group.barrier()
        expected = size * (np.arange(len(data), dtype=np.float32) % 1000) + sum(range(size))
        assert (data == expected).all(), "the sums are wrong"
    sent, received = (int(statistics.median(column)) for column in zip(*counts[1:], strict=True))
    print(json.dumps(Traffic(group.backend, sent, received, statistics.median(seconds[1:]))))
    col.destroy_collective_group("counted")


def _counted() -> tuple[int, int]:
    """Return the bytes sent and received by this host's end of the link, as /proc/net/dev has them."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, columns = line.partition(":")
        if name.strip() == LINK:
            numbers = columns.split()
            return int(numbers[8]), int(numbers[0])
    raise RuntimeError(f"this process is not on a host with an interface {LINK!r}")


def table(results: dict[Case, Traffic], nbytes: int) -> str:
    """Return the results in Markdown."""
    lines = ["| backend | hosts of the ranks | first to second, x buffer | back, x buffer | ms |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    for case, traffic in results.items():
        lines.append(
            f"| {traffic.backend} | {' '.join(case.hosts)} | {traffic.sent / nbytes:.3f} | "
            f"{traffic.received / nbytes:.3f} | {traffic.seconds * 1e3:,.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Count every case, or be a rank of one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=2, help="ranks on each host")
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--rate", help="what the link carries each way, as tc spells it; by default what it can")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_rank is not None:
        rank, case, folder, nbytes, calls = json.loads(arguments.as_rank)
        _be_rank(rank, Case(*case), folder, nbytes, calls)
        return
    nbytes = arguments.mib << 20
    with two_hosts(arguments.rate) as holders:
        print(table({case: measure(holders, case, nbytes, arguments.calls) for case in cases(arguments.ranks)}, nbytes))


if __name__ == "__main__":
    main()
