"""Measures colltensor, beside other libraries and builds where possible: a subject a command.

    python benchmarks                          the subjects
    python benchmarks collectives --help       what one of them measures, and its options

Contestants take turns in one run. Compare the ratios of one run, and not the times of two.
"""

from __future__ import annotations

import ast
import importlib
import os
import signal
import sys
from pathlib import Path

from harness.run import Run, parse
from harness.world import WorldError

FILES = sorted(Path(__file__).parent.glob("subjects/*.py"))
SUBJECTS = {path.stem.replace("_", "-"): path for path in FILES}


def listing() -> str:
    """Return the subjects, each with the first line of what it says about itself."""
    said = {name: ast.get_docstring(ast.parse(file.read_text())) for name, file in SUBJECTS.items()}
    return "\n".join(
        f"  {name:14} {(text or '').partition(chr(10))[0]}" for name, text in said.items()
    )


def main(words: list[str]) -> int:
    """Measure what the command line names, and return its exit status."""
    if not words or words[0] not in SUBJECTS:
        print(f"{__doc__}\nSubjects:\n{listing()}")
        return 0 if words in ([], ["-h"], ["--help"]) else 2
    sys.path.insert(1, str(Path.cwd()))  # as the ranks have it, which are started by -m
    path = [*sys.path[:2], *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)  # for Ray
    subject = importlib.import_module(f"subjects.{SUBJECTS[words[0]].stem}")
    run = Run(parse(words[0], subject, words[1:]))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        status: int | None = subject.measure(run)
    except WorldError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        return 130
    run.close()
    return status or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
