"""One agreement of all ranks on the control plane over loopback TCP, beside a bare ping of as many bytes.

A round's figure is the mean of its exchanges, as rank 0 and the others see it; the table has the 10th and the 90th
percentile of the rounds as well.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import time

from harness.rank import Loop, Settings, Timed, repeat
from harness.rounds import Contestant
from harness.run import Run, add_options
from harness.world import Kind

SIGNATURE = b"\x5a" * 32
FRAME = b"f" * 48
LIMIT_S = 600.0


class Ranks(Timed):
    """The ranks, which the coordinator makes known to each other."""

    def __init__(self, settings: Settings, rank: int) -> None:
        super().__init__(settings, rank)
        from colltensor import net

        self._listener, self._tune = net.listen("127.0.0.1"), net.tune

    def address(self) -> tuple[str, int]:
        """Return where this rank listens."""
        host, port = self._listener.getsockname()[:2]
        return host, port

    def meet(self, addresses: list[tuple[str, int]]) -> None:
        """Connect a control plane or, with the option ``bare``, two sockets."""
        if self.settings.options["bare"]:
            if self.rank:
                self._socket = socket.create_connection(addresses[0])
            else:
                self._socket, _ = self._listener.accept()
            self._tune(self._socket)
            return
        from colltensor.control import Control
        from colltensor.rendezvous import Meeting

        hosts = ("here",) * self.ranks
        meeting = Meeting(
            self.rank,
            self.ranks,
            "benchmark",
            b"8 bytes.",
            b"s" * 32,
            tuple(map(tuple, addresses)),
            hosts,
            self._listener,
        )
        self._deadline = time.monotonic() + LIMIT_S
        self._control = Control(meeting, self._deadline)

    def loop(self, operation: str) -> Loop:
        """Return the loop of an exchange."""
        if self.settings.options["bare"]:
            return repeat(
                lambda: (
                    self._socket.send(FRAME),
                    self._socket.recv(len(FRAME), socket.MSG_WAITALL),
                )
            )
        return repeat(lambda: self._control.agree(SIGNATURE, lambda: "benchmark", self._deadline))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_options(parser, rounds=100)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])


def measure(run: Run, options: argparse.Namespace) -> None:
    """Print a row for each number of ranks."""
    rows = []
    for name, ranks in (("bare sockets", 2), *(("agree", ranks) for ranks in options.ranks)):
        kind = Kind(name, "subjects.control:Ranks", options={"bare": name == "bare sockets"})
        with run.started([kind], ranks) as worlds:
            worlds[name].ask("meet", worlds[name].ask("address"))
            found = run.measure(worlds, [Contestant(name, name, name)], table=f"{ranks} ranks")[
                name
            ]
        low, *_, high = statistics.quantiles(found.rounds_us, n=10, method="inclusive")
        rows.append([name, str(ranks), found.median_us, low, high])
    run.print("One exchange", ["what", "ranks", "median", "10th percentile", "90th"], rows)
