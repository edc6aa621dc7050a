"""One run of a subject: the options that all have, the worlds that it starts, and what it has found."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import plots, report
from harness.places import NUMPY_PLACE
from harness.rounds import Contestant, Samples, measure
from harness.world import Kind, World, started

THIS, BASELINE = "this", "baseline"
Rows = Sequence[Sequence[object]]


def add_options(
    parser: argparse.ArgumentParser,
    *,
    rounds: int = 15,
    round_ms: float = 5.0,
    baseline: bool = False,
    places: Sequence[str] = (),
    plot: bool = False,
) -> None:
    """Add the options that all subjects have, and those that this one has as well.

    Args:
        parser: The parser.
        rounds: How many rounds by default.
        round_ms: How long each of them takes by default, about.
        baseline: Whether it can be measured with another build as well.
        places: Where its arrays can begin, which are numpy's, by default.
        plot: Whether there is something to draw.
    """
    parser.add_argument("--rounds", type=int, default=rounds, help=f"of each contestant ({rounds})")
    parser.add_argument(
        "--round-ms",
        type=float,
        default=round_ms,
        help=f"how long a round is, about ({round_ms:g})",
    )
    parser.add_argument("--pin", action="store_true", help="run rank r on core r modulo the cores")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all that was measured into this file"
    )
    if baseline:
        parser.add_argument(
            "--baseline", metavar="[CHECKOUT:]LIBRARY", help="another build, in turns with this one"
        )
    if places:
        parser.add_argument(
            "--places",
            nargs="+",
            default=list(places),
            metavar="BYTES",
            help=f"where in a page arrays begin, on all ranks, or with a comma on each ({places})",
        )
    if plot:
        parser.add_argument(
            "--plot", type=Path, metavar="FILE", help="draw the result into this PNG file"
        )


def everywhere(worlds: Iterable[str], operations: Iterable[str]) -> list[Contestant]:
    """Return every operation in every world, under its own name in the first one."""
    return [
        Contestant(operation if not number else f"{world} {operation}", world, operation)
        for operation in operations
        for number, world in enumerate(worlds)
    ]


def numbers(text: str) -> list[int]:
    """Return whole numbers with commas between them, as an option has them."""
    return [int(word) for word in text.split(",")]


class Run:
    """Measures a subject and reports it.

    Attributes:
        options: What the command line says.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._facts = report.machine()
        self._more: dict[str, Any] = {}
        self._tables: list[dict[str, Any]] = []
        self._measured: list[dict[str, Any]] = []

    def note(self, **facts: object) -> None:
        """Add what the head of the output should say."""
        self._facts.update({name: str(value) for name, value in facts.items()})

    def builds(self, library: str, **settings: Any) -> list[Kind]:
        """Return a world of this build and, where one is asked for, of the baseline."""
        kinds = [Kind(THIS, library, **settings)]
        if given := getattr(self.options, "baseline", None):
            checkout, _, built = given.rpartition(":")
            environment = {
                **settings.pop("environment", {}),
                "COLLTENSOR_LIBRARY": str(Path(built).resolve()),
            }
            folder = checkout or None
            kinds.append(
                Kind(BASELINE, library, environment=environment, folder=folder, **settings)
            )
        return kinds

    @contextmanager
    def started(self, kinds: Sequence[Kind], ranks: int = 2) -> Iterator[dict[str, World]]:
        """Start worlds, as ``harness.world.started`` does, and note their versions."""
        print(
            f"{ranks} ranks: starting {', '.join(kind.name for kind in kinds)}",
            file=sys.stderr,
            flush=True,
        )
        with started(kinds, ranks, pin=self.options.pin) as worlds:
            for world in reversed(worlds.values()):
                self.note(**world.versions)
            yield worlds

    def measure(
        self,
        worlds: dict[str, World],
        contestants: Sequence[Contestant],
        *case: Any,
        table: str = "",
        times: float = 1,
        rounds: int | None = None,
        calls: int | None = None,
    ) -> dict[str, Samples]:
        """Measure contestants in turns; see ``rounds.measure``.

        Args:
            worlds: The worlds.
            contestants: Who takes part.
            case: What their operations need to know; mostly the size.
            table: What the file of ``--json`` calls it.
            times: How many times as long as usual a round is.
            rounds: The number of rounds, if not that of the options.
            calls: The calls of a round, if it is not to be found out.
        """
        print(f"{table} {' '.join(map(str, case))}", file=sys.stderr, flush=True)
        found = measure(
            worlds,
            contestants,
            *case,
            rounds=rounds or self.options.rounds,
            round_ms=self.options.round_ms * times,
            calls=calls,
        )
        self._measured += [
            {"table": table, "case": case, "label": label, **asdict(samples)}
            for label, samples in found.items()
        ]
        return found

    def print(self, title: str, head: Sequence[str], rows: Rows, *, left: int = 1) -> None:
        """Print a table in Markdown, whose first columns are text; numbers are microseconds unless they are words."""
        if not self._tables:
            self._print_head()
        print(f"\n{title}:\n\n{report.markdown(head, rows, left)}", flush=True)
        self._tables.append({"title": title, "head": head, "rows": rows})

    def plot(self, panels: Sequence[plots.Panel], *labels: Any) -> None:
        """Draw the panels where ``--plot`` asks for it; the labels are ``plots.draw``'s."""
        if self.options.plot:
            plots.draw(self.options.plot, panels, *labels)

    def keep(self, **more: Any) -> None:
        """Put more into the file of ``--json``."""
        self._more.update(more)

    def close(self) -> None:
        """Write the file of ``--json``, where one is asked for."""
        if self.options.json:
            content = {
                "command": self._command(),
                "machine": self._facts,
                "tables": self._tables,
                "measured": self._measured,
                **self._more,
            }
            self.options.json.write_text(json.dumps(content, indent=1) + "\n")

    def _command(self) -> str:
        return shlex.join(["python", *sys.argv])

    def _print_head(self) -> None:
        facts = ", ".join(f"{name} {value}" for name, value in self._facts.items())
        pinned = "rank r on core r modulo the cores" if self.options.pin else "no process pinned"
        print(
            f"`{self._command()}`\n\n{facts}; {os.confstr('CS_GNU_LIBC_VERSION')}; {pinned}. Medians of "
            f"{self.options.rounds} rounds of about {self.options.round_ms:g} ms each, of the slowest rank, in "
            f"microseconds a call, where nothing else is said. numpy's arrays begin {NUMPY_PLACE} bytes into a page "
            "where nothing else is said."
        )
