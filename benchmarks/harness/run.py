"""One run of a subject: its command line, the worlds that it starts, and what it has found."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import plots
from harness.rank import NUMPY_PLACE
from harness.rounds import Contestant, Samples, measure
from harness.world import Kind, World, started

THIS, BASELINE = "this", "baseline"
COMMON = {"rounds": 15, "round_ms": 5.0, "pin": False, "json": ""}
HELP = {
    "rounds": "of each contestant",
    "round_ms": "how long a round is, about",
    "pin": "run rank r on core r modulo the cores",
    "json": "write all that was measured into this file",
    "baseline": "another build in turns with this one, [CHECKOUT:]LIBRARY",
    "places": "where in a page arrays begin, on all ranks, or with a comma on each",
    "plot": "draw the result into this PNG file",
    "sizes": "bytes",
    "seconds": "how long each measurement is, about",
}


def parse(name: str, subject: Any, words: list[str]) -> argparse.Namespace:
    """Return what the command line of a subject says.

    Its ``OPTIONS`` are defaults by name, beside ``COMMON``. A default says what is accepted: False
    a flag, a tuple several of its kind, with spaces or commas between them. ``CHOICES`` has the
    only words that an option accepts.
    """
    parser = argparse.ArgumentParser(
        f"python benchmarks {name}",
        description=subject.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = {**COMMON, **subject.OPTIONS}
    choices: Mapping[str, Sequence[str]] = getattr(subject, "CHOICES", {})
    for option, default in defaults.items():
        flag, several = "--" + option.replace("_", "-"), isinstance(default, tuple)
        words_of = " ".join(map(str, default)) if several else str(default)
        said = f"{HELP.get(option, '')} ({words_of})".removesuffix(" ()").strip()
        if default is False:
            parser.add_argument(flag, action="store_true", help=HELP.get(option))
        elif several:
            parser.add_argument(flag, nargs="+", help=said, metavar=option.upper())
        else:
            parser.add_argument(flag, type=type(default), default=default, help=said)
    options = parser.parse_args(words)
    for option, default in defaults.items():
        if isinstance(default, tuple):
            given = getattr(options, option)
            if given and option != "places":
                given = [type(default[0])(word) for some in given for word in some.split(",")]
            setattr(options, option, given or list(default))
        for word in getattr(options, option) if option in choices else ():
            if word not in choices[option]:
                parser.error(f"--{option}: {word!r} is none of {', '.join(choices[option])}")
    return options


def everywhere(worlds: Iterable[str], operations: Iterable[str]) -> list[Contestant]:
    """Return every operation in every world, labelled with both."""
    return [
        Contestant(f"{world} {operation}", world, operation)
        for operation in operations
        for world in worlds
    ]


class Run:
    """Measures a subject and reports it; ``options`` are what the command line says."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._facts, self._command = _machine(), shlex.join(["python", *sys.argv])
        self._found: dict[str, Any] = {"tables": [], "measured": []}

    def note(self, **facts: object) -> None:
        """Add what the head of the output should say."""
        self._facts.update({name: str(value) for name, value in facts.items()})

    def builds(self, library: str, **settings: Any) -> list[Kind]:
        """Return a world of this build and, where one is asked for, of the baseline."""
        kinds = [Kind(THIS, library, **settings)]
        if given := getattr(self.options, "baseline", ""):
            checkout, _, built = given.rpartition(":")
            own = {"COLLTENSOR_LIBRARY": str(Path(built).resolve())}
            kinds.append(
                Kind(BASELINE, library, environment=own, folder=checkout or None, **settings)
            )
        return kinds

    @contextmanager
    def started(self, kinds: Sequence[Kind], ranks: int = 2) -> Iterator[dict[str, World]]:
        """Start worlds, as ``harness.world.started`` does, and note their versions."""
        _say(f"{ranks} ranks: starting {', '.join(kind.name for kind in kinds)}")
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

        ``table`` is what the file of ``--json`` calls it, and ``times`` how many times as long as
        usual a round is.
        """
        _say(f"{table} {' '.join(map(str, case))}")
        rounds, round_ms = rounds or self.options.rounds, self.options.round_ms * times
        found = measure(worlds, contestants, *case, rounds=rounds, round_ms=round_ms, calls=calls)
        self._found["measured"] += [
            {"table": table, "case": case, "label": label, **asdict(samples)}
            for label, samples in found.items()
        ]
        return found

    def medians(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Do what ``measure`` does, and return the medians by label, in microseconds."""
        found = self.measure(*arguments, **options)
        return {label: samples.median_us for label, samples in found.items()}

    def print(
        self, title: str, head: Sequence[str], rows: Sequence[Sequence[object]], *, left: int = 1
    ) -> None:
        """Print a table in Markdown, whose first columns are text.

        Numbers are microseconds unless they are words.
        """
        if not self._found["tables"]:
            self._print_head()
        rule = "| --- " * left + "| ---: " * (len(head) - left) + "|"
        lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in (head, *rows)]
        print("\n".join((f"\n{title}:\n", lines[0], rule, *lines[1:])), flush=True)
        self._found["tables"].append({"title": title, "head": head, "rows": rows})

    def plot(self, panels: Sequence[plots.Panel], *labels: Any) -> None:
        """Draw the panels where ``--plot`` asks for it; the labels are ``plots.draw``'s."""
        if self.options.plot:
            plots.draw(self.options.plot, panels, *labels)

    def close(self) -> None:
        """Write the file of ``--json``, where one is asked for."""
        if self.options.json:
            found = {"command": self._command, "machine": self._facts, **self._found}
            Path(self.options.json).write_text(json.dumps(found, indent=1) + "\n")

    def _print_head(self) -> None:
        facts = ", ".join(f"{name} {value}" for name, value in self._facts.items())
        pinned = "rank r on core r modulo the cores" if self.options.pin else "no process pinned"
        print(
            f"`{self._command}`\n\n{facts}; {os.confstr('CS_GNU_LIBC_VERSION')}; {pinned}. Medians of "
            f"{self.options.rounds} rounds of about {self.options.round_ms:g} ms each, of the slowest rank, in "
            f"microseconds a call, where nothing else is said. numpy's arrays begin {NUMPY_PLACE} bytes into a page "
            "where nothing else is said."
        )


def ratio(one: float, other: float) -> str:
    """Return how many times as long one time is as another."""
    return f"{one / other:.2f}"


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _cell(value: object) -> str:
    """Return a time in microseconds as a table has it, and words as they are."""
    if not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _machine() -> dict[str, str]:
    """Return what the measurement runs on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "CPU": models[0] if models else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{gigabytes:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "date": time.strftime("%Y-%m-%d"),
    }
