"""What strangers who connect and say nothing, or little, do to a meeting and to a group: time, memory, descriptors.

    python benchmarks strangers
    python benchmarks strangers --strangers 1000 --seconds 10 --rounds 7
    python benchmarks strangers --bytes 1

A process of its own keeps so many connections to the meeting's port open and makes a new one for each that is closed.
Linux keeps those who say nothing from the listener for the first seconds; with --bytes 1 they all get there.
Three ranks meet at ``tcp://`` with a secret, with and without it in turns: rank 0 first, and the others, which are
timed, half a second later. Then these are at every control port of a group over Gloo, whose ranks call collectives,
send and split meanwhile. The exit status is 1 where a rank saw an error.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import selectors
import socket
import statistics
import threading
import time
import uuid
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from harness.rank import Timed
from harness.run import Run, add_options
from harness.world import Kind

RANKS = 3
HEADSTART_S = 0.5
Counts = dict[str, float]


class Ranks(Timed):
    """The ranks."""

    def meet(self, port: int) -> float:
        """Meet, rank 0 first; return the seconds."""
        import colltensor as col

        time.sleep(HEADSTART_S if self.rank else 0)
        began, method = time.perf_counter(), f"tcp://127.0.0.1:{port}"
        self.group = col.init_collective_group(
            RANKS, self.rank, "gloo", "strangers", init_method=method
        )
        return time.perf_counter() - began

    def leave(self) -> None:
        """Destroy the group."""
        self.group.destroy()

    def address(self) -> tuple[str, int]:
        """Return where this rank's control plane listens; strangers would scan for it."""
        host, port = self.group._meeting.addresses[self.rank]
        return str(host), int(port)

    def counts(self) -> Counts:
        """Return what this process has: memory in MB, threads, descriptors."""
        status = dict(
            line.split(":", 1)
            for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        )
        return {
            "memory": int(status["VmRSS"].split()[0]) / 1024,
            "threads": threading.active_count(),
            "descriptors": len(os.listdir("/proc/self/fd")),
        }

    def step(self, seconds: float) -> tuple[int, Counts]:
        """Call collectives, transfers and splits for so long; return how many rounds were right, and the counts."""
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


def _flood(
    addresses: list[tuple[str, int]], strangers: int, words: bytes, pipe: Connection
) -> None:
    """Hold so many connections to each address, on which that is said, until told to end; answer with how many."""
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


class Flood:
    """Strangers at some addresses, for the length of a ``with`` block.

    Attributes:
        made: How many connections were made, once it is over.
    """

    def __init__(self, addresses: list[tuple[str, int]], strangers: int, words: bytes) -> None:
        self._ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(
            target=_flood, args=(addresses, strangers, words, theirs), daemon=True
        )
        self.made = 0

    def __enter__(self) -> Flood:
        self._process.start()
        self._ours.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.send(None)
        self.made = self._ours.recv()
        self._process.join()


def _free_port() -> int:
    """Return a port that is free at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_options(parser, rounds=7)
    parser.add_argument("--strangers", type=int, default=1000, help="connections at each port")
    parser.add_argument("--bytes", type=int, default=0, help="how many bytes each of them says")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long the group is tried")


def measure(run: Run, options: argparse.Namespace) -> None:
    """Print the tables."""
    strangers, seconds, words = options.strangers, options.seconds, b"?" * options.bytes
    secret = {"COLLTENSOR_SECRET": uuid.uuid4().hex}
    with run.started(
        [Kind("ranks", "subjects.strangers:Ranks", environment=secret)], RANKS
    ) as worlds:
        ask: Any = worlds["ranks"].ask
        alone, beside, made = [], [], 0
        for number in range(2 * options.rounds + 1):
            port = _free_port()
            with Flood([("127.0.0.1", port)], strangers if number % 2 else 0, words) as flood:
                taken = max(ask("meet", port)[1:])
            made += flood.made
            if number:  # not the first, which imports
                (beside if number % 2 else alone).append(taken)
            ask("leave")
        ask("meet", _free_port())
        addresses = ask("address")
        calm = ask("step", seconds / 2)
        before = ask("counts")
        with Flood(addresses, strangers, words) as flood:
            stepped = ask("step", seconds)
        time.sleep(0.5)
        after = ask("counts")
        ask("leave")
    medians = [statistics.median(times) for times in (alone, beside)]
    rates = [calm[0][0] / (seconds / 2), stepped[0][0] / seconds]
    run.print(
        f"{strangers} strangers at each port of {RANKS} ranks",
        ["what", "alone", "with strangers", "with / alone", "connections"],
        [
            [
                "a meeting, s",
                *(f"{time:.3f}" for time in medians),
                f"{medians[1] / medians[0]:.2f}",
                f"{made:,}",
            ],
            [
                "rounds of a group over Gloo, a second",
                *(f"{rate:.0f}" for rate in rates),
                f"{rates[1] / rates[0]:.2f}",
                f"{flood.made:,}",
            ],
        ],
    )
    run.print(
        "What the ranks hold",
        ["rank", "", "before", "with them", "after"],
        [
            [
                str(rank),
                name,
                *(
                    f"{counts[name]:.0f}"
                    for counts in (before[rank], stepped[rank][1], after[rank])
                ),
            ]
            for rank in range(RANKS)
            for name in before[rank]
        ],
        left=2,
    )
