"""Measures colltensor, beside other libraries and builds where that is possible: one subject a command.

    python benchmarks                          the subjects
    python benchmarks collectives --help       what one of them measures, and its options

Contestants take turns in one run. Compare the ratios of one run, and not the times of two.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import signal
import sys
from pathlib import Path

from harness.run import Run
from harness.world import WorldError

SUBJECTS = {
    path.stem.replace("_", "-"): path
    for path in sorted(Path(__file__).parent.glob("subjects/*.py"))
}


def listing() -> str:
    """Return the subjects, each with the first line of what it says about itself."""
    lines = {
        name: (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        for name, path in SUBJECTS.items()
    }
    return "\n".join(f"  {name:14} {line}" for name, line in lines.items())


def main(words: list[str]) -> int:
    """Measure what the command line names, and return its exit status."""
    if not words or words[0] not in SUBJECTS:
        print(f"{__doc__}\nSubjects:\n{listing()}")
        return 0 if words in ([], ["-h"], ["--help"]) else 2
    sys.path.insert(1, str(Path.cwd()))  # as the ranks have it, which are started by -m
    # for Ray
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [*sys.path[:2], os.environ.get("PYTHONPATH")])
    )
    subject = importlib.import_module(f"subjects.{SUBJECTS[words[0]].stem}")
    parser = argparse.ArgumentParser(
        f"python benchmarks {words[0]}",
        description=subject.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subject.add_arguments(parser)
    run = Run(parser.parse_args(words[1:]))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        status: int | None = subject.measure(run, run.options)
    except WorldError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        return 130
    run.close()
    return status or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
