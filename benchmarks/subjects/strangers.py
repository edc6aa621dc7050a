"""What strangers who connect and say little or nothing do to a meeting and to a group.

    python benchmarks strangers
    python benchmarks strangers --strangers 1000 --seconds 10 --rounds 7
    python benchmarks strangers --bytes 1

A process of its own keeps so many connections to the meeting's port open and makes a new one for
each that is closed. Linux keeps those who say nothing from the listener for the first seconds; with
--bytes 1 they all get there. Three ranks meet at ``tcp://`` with a secret, with and without it in
turns: rank 0 first, and the others, which are timed, half a second later. Then these are at every
control port of a group over Gloo, whose ranks call collectives, send and split meanwhile. The exit
status is 1 where a rank saw an error.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import selectors
import socket
import statistics
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from harness.rank import Timed
from harness.run import Run, ratio
from harness.world import Kind

OPTIONS = {"rounds": 7, "strangers": 1000, "bytes": 0, "seconds": 10.0}
RANKS = 3
HEADSTART_S = 0.5
Addresses = list[tuple[str, int]]


class Ranks(Timed):
    def meet(self, port: int) -> float:
        """Meet, rank 0 first; return the seconds."""
        import colltensor as col

        time.sleep(HEADSTART_S if self.rank else 0)
        began, group = time.perf_counter(), (RANKS, self.rank, "gloo", "strangers")
        self.group = col.init_collective_group(*group, init_method=f"tcp://127.0.0.1:{port}")
        return time.perf_counter() - began

    def leave(self) -> None:
        self.group.destroy()

    def address(self) -> tuple[str, int]:
        """Return where this rank's control plane listens; strangers would scan for it."""
        return self.group._control._detector.meeting.addresses[self.rank]

    def counts(self) -> dict[str, float]:
        """Return what this process has: memory in MB, threads, descriptors."""
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        resident = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
        counts = (resident / 1024, threading.active_count(), len(os.listdir("/proc/self/fd")))
        return dict(zip(("memory", "threads", "descriptors"), counts, strict=True))

    def step(self, seconds: float) -> tuple[int, dict[str, float]]:
        """Call collectives, transfers and splits for so long.

        Returns how many rounds were right, and the counts.
        """
        group, rounds, until = self.group, 0, time.monotonic() + seconds
        right, left = (self.rank + 1) % RANKS, (self.rank - 1) % RANKS
        while group.broadcast_object(time.monotonic() < until, 0):
            assert (group.allreduce(np.ones(1000)) == RANKS).all()
            taken = np.zeros(10)
            group.sendrecv(np.full(10, float(self.rank)), right, taken, left)
            assert (taken == left).all()
            if rounds % 50 == 0:
                group.split(0).destroy()
            rounds += 1
        return rounds, self.counts()


def hold(addresses: Addresses, strangers: int, words: bytes, pipe: Connection) -> None:
    """Hold so many connections to each address, until told to end; answer with how many.

    ``words`` are said on each.
    """
    selector, made = selectors.DefaultSelector(), 0
    waiting = [address for address in addresses for _ in range(strangers)]
    selector.register(pipe, selectors.EVENT_READ, None)
    pipe.send(None)
    while True:
        again, waiting = waiting, []
        for address in again:
            try:
                sock = socket.create_connection(address, timeout=1.0)
            except OSError:
                waiting.append(address)
                continue
            made += 1
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                sock.send(words)
            selector.register(sock, selectors.EVENT_READ, address)
        for key, _ in selector.select(0.02 if waiting else 0.5):
            if key.data is None:
                pipe.send(made)
                return
            selector.unregister(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr] - it is a socket
            waiting.append(key.data)


@contextlib.contextmanager
def flood(addresses: Addresses, strangers: int, words: bytes) -> Iterator[list[int]]:
    """Have strangers at some addresses for the length of a block.

    What it yields has their number of connections afterwards.
    """
    made, (ours, theirs) = [], multiprocessing.Pipe()
    context, told = multiprocessing.get_context("spawn"), (addresses, strangers, words, theirs)
    process = context.Process(target=hold, args=told, daemon=True)
    process.start()
    ours.recv()
    try:
        yield made
    finally:
        ours.send(None)
        made.append(ours.recv())
        process.join()


def allow_descriptors(wanted: int) -> None:
    """Raise the limit of open files as far as it may go.

    The processes that this one starts inherit it.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if 0 <= most < wanted:
        sys.exit(
            f"{wanted} open files are needed, {most} are allowed: fewer --strangers or ulimit -n"
        )


def free_port() -> int:
    """Return a port that is free at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def measure(run: Run) -> None:
    options, secret = run.options, {"COLLTENSOR_SECRET": uuid.uuid4().hex}
    strangers, seconds, words = options.strangers, options.seconds, b"?" * options.bytes
    allow_descriptors(RANKS * strangers + 100)
    kind = Kind("ranks", "subjects.strangers:Ranks", environment=secret)
    with run.started([kind], RANKS) as worlds:
        ask: Any = worlds["ranks"].ask
        alone, beside, meetings = [], [], 0
        for number in range(2 * options.rounds + 1):
            port = free_port()
            with flood([("127.0.0.1", port)], strangers if number % 2 else 0, words) as made:
                taken = max(ask("meet", port)[1:])
            meetings += made[0]
            if number:  # not the first, which imports
                (beside if number % 2 else alone).append(taken)
            ask("leave")
        ask("meet", free_port())
        calm, before = ask("step", seconds / 2), ask("counts")
        with flood(ask("address"), strangers, words) as made:
            stepped = ask("step", seconds)
        time.sleep(0.5)
        after = ask("counts")
        ask("leave")
    one, other = (statistics.median(times) for times in (alone, beside))
    calm_rate, rate = calm[0][0] / (seconds / 2), stepped[0][0] / seconds
    rows = [
        ["a meeting, s", f"{one:.3f}", f"{other:.3f}", ratio(other, one), f"{meetings:,}"],
        [
            "rounds of a group over Gloo, a second",
            *(f"{calm_rate:.0f}", f"{rate:.0f}", ratio(rate, calm_rate), f"{made[0]:,}"),
        ],
    ]
    head = ["what", "alone", "with strangers", "with / alone", "connections"]
    run.print(f"{strangers} strangers at each port of {RANKS} ranks", head, rows)
    rows = []
    for rank in range(RANKS):
        for name in before[rank]:
            counts = (before[rank], stepped[rank][1], after[rank])
            rows.append([str(rank), name, *(f"{one[name]:.0f}" for one in counts)])
    run.print("What the ranks hold", ["rank", "", "before", "with them", "after"], rows, left=2)
