"""The command ``colltensor``: ``doctor``, ``run`` and ``bench``.

Nothing else of the package imports it.

app               the sub-commands and their options
launcher          processes of this host, a rank each, of which none is left behind
run               a script in several ranks, with torchrun's variables
doctor            what works here: facts, the self-test's outcomes, and the verdict
report            doctor's findings on the screen
machine           what this host is: memory, processors, interfaces
selftest          a rank of the self-test, and the trial of one framework: programs
bench             a benchmark: rounds in turns, and the table
operations        each collective: sizes, bandwidths, data and what must come out
bench_rank        a rank of a benchmark: a program
worker            what a rank of a benchmark does with an order
libraries         what is measured: colltensor, and those that it is compared with
ray_workers       the ranks of a benchmark that are Ray's actors
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import Final

_EXTRA: Final = ("typer", "rich")


def main() -> int:
    """Run the command with this process's arguments; return its exit status."""
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"colltensor: the command needs {' and '.join(missing)}, which the extra 'cli' brings: "
            "pip install '.[cli]' in the folder of colltensor's sources\n"
        )
        return 2
    importlib.import_module("colltensor.cli.app").APP(prog_name="colltensor")
    return 0
