"""Allreduce of numpy arrays over each provider of Gloo that is here.

    python benchmarks providers                  2 ranks over loopback
    python benchmarks providers --namespaces     2 x 2 ranks on two hosts, backend "hierarchical"
    python benchmarks providers --other-python /path/to/python3.10

pygloo exists for Python 3.10 and below only, where recent versions of torch do not:
`--other-python` names the Python of an environment of its own, with colltensor and pygloo, whose
providers take turns with these. Each provider is compared with the native one of its own Python.
Hosts are network namespaces with a link between them, which needs root.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys

from harness.namespaces import inside, two_hosts
from harness.rounds import Contestant
from harness.run import Run, ratio
from harness.world import Kind

OPTIONS = {
    "rounds": 25,
    "round_ms": 20.0,
    "places": ("16", "0"),
    "other_python": "",
    "namespaces": False,
    "sizes": (4, *(4**power for power in range(5, 14))),
}
FIND = """
import sys; from importlib.util import find_spec
print('%d.%d' % sys.version_info[:2], *filter(find_spec, ('torch', 'pygloo')))
"""


def kinds(run: Run, backend: str, prefixes: list[list[str]]) -> dict[str, Kind]:
    """Return a world for each provider of each Python."""
    found = {}
    for python in filter(None, (sys.executable, run.options.other_python)):
        find = subprocess.run([python, "-c", FIND], capture_output=True, text=True, check=True)
        version, *there = find.stdout.split()
        for provider in ("native", *there):
            own = {"options": {"backend": backend, "provider": provider}, "prefixes": prefixes}
            name = f"{provider}, {version}"
            found[name] = Kind(name, "harness.libraries:Colltensor", python, **own)
    return found


def measure(run: Run) -> None:
    options, rows = run.options, []
    ranks, backend = (4, "hierarchical") if options.namespaces else (2, "gloo")
    with contextlib.ExitStack() as undo:
        holders = undo.enter_context(two_hosts()) if options.namespaces else []
        prefixes = [inside(holder, []) for holder in holders for _ in range(2)] or [[]]
        there = kinds(run, backend, prefixes)
        worlds = undo.enter_context(run.started([*there.values()], ranks))
        ones = [
            Contestant(f"{name} at {place}", name, f"allreduce@{place}")
            for name in there
            for place in options.places
        ]
        columns = [one.label for one in ones]
        native = {label: f"native, {label.partition(', ')[2]}" for label in columns}
        others = [label for label in columns if native[label] != label]
        for nbytes in options.sizes:
            found = run.medians(worlds, ones, nbytes)
            speed = f"{nbytes / found[columns[0]] / 1e3:.2f}"
            ratios = (ratio(found[label], found[native[label]]) for label in others)
            rows.append([f"{nbytes:,}", *found.values(), speed, *ratios])
    head = [f"bytes, {ranks} ranks", *columns, "GB/s, native"]
    run.print("Allreduce by provider", [*head, *(f"{label} / native" for label in others)], rows)
