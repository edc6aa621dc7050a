"""One agreement of all ranks on the control plane, beside a bare ping of as many bytes.

A round's figure is the mean of its exchanges, as rank 0 and the others see it; the table has the
10th and the 90th percentile of the rounds as well.
"""

from __future__ import annotations

import socket
import statistics
import time

from harness.rank import Loop, Settings, Timed, repeat
from harness.rounds import Contestant
from harness.run import Run
from harness.world import Kind

OPTIONS = {"rounds": 100, "ranks": (2, 4, 8)}
SIGNATURE, FRAME = b"\x5a" * 32, b"f" * 48


class Ranks(Timed):
    """The ranks, which the coordinator makes known to each other."""

    def __init__(self, settings: Settings, rank: int) -> None:
        super().__init__(settings, rank)
        from colltensor import net

        self._listener, self._tune = net.listen("127.0.0.1"), net.tune

    def address(self) -> tuple[str, int]:
        return self._listener.getsockname()[:2]

    def meet(self, addresses: list[tuple[str, int]]) -> None:
        if self.settings.world == "bare sockets":
            own = (
                socket.create_connection(addresses[0]) if self.rank else self._listener.accept()[0]
            )
            self._tune(own)
            self._exchange = lambda: (own.send(FRAME), own.recv(len(FRAME), socket.MSG_WAITALL))
            return
        from colltensor.control import Control
        from colltensor.rendezvous import Meeting

        deadline, places = time.monotonic() + 600, tuple(map(tuple, addresses))
        secrets, hosts = (b"8 bytes.", b"s" * 32), ("here",) * self.ranks
        group = (self.rank, self.ranks, "benchmark", *secrets, places, hosts, self._listener)
        control = Control(Meeting(*group), deadline)
        self._exchange = lambda: control.agree(SIGNATURE, lambda: "benchmark", deadline)

    def loop(self, operation: str) -> Loop:
        return repeat(self._exchange)


def measure(run: Run) -> None:
    rows = []
    for name, ranks in (("bare sockets", 2), *(("agree", ranks) for ranks in run.options.ranks)):
        with run.started([Kind(name, "subjects.control:Ranks")], ranks) as worlds:
            worlds[name].ask("meet", worlds[name].ask("address"))
            one = [Contestant(name, name, name)]
            found = run.measure(worlds, one, table=f"{ranks} ranks")[name]
        low, *_, high = statistics.quantiles(found.rounds_us, n=10, method="inclusive")
        rows.append([name, str(ranks), found.median_us, low, high])
    run.print("One exchange", ["what", "ranks", "median", "10th percentile", "90th"], rows)
