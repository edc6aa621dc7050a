"""The command of the benchmarks: its subjects, and that a small run of some of them prints a table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SUBJECTS = sorted(path.stem.replace("_", "-") for path in (BENCHMARKS / "subjects").glob("*.py"))
SMALL = ("--rounds", "2", "--round-ms", "1")
HELP = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
main = runpy.run_path(sys.argv[1] + "/__main__.py")["main"]
for subject in sys.argv[2:]:
    try:
        main([subject, "--help"])
    except SystemExit as end:
        assert end.code == 0, subject
"""


def run(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_subject_is_listed_and_says_what_it_measures() -> None:
    listed = run(str(BENCHMARKS))
    # in one process, because each would import the same
    said = run("-c", HELP, str(BENCHMARKS), *SUBJECTS)
    for subject in SUBJECTS:
        assert f"\n  {subject} " in listed
        assert f"usage: python benchmarks {subject} " in said


PARSE = """
import sys, types
sys.path.insert(0, sys.argv[1])
from harness.run import parse
subject = types.SimpleNamespace(__doc__="", OPTIONS={"sizes": (1, 2), "places": ("0",), "names": ("a",), "fast": False},
                                CHOICES={"names": ("a", "b")})
found = parse("any", subject, ["--sizes", "4,8", "16", "--places", "0,16", "16", "--names", "b", "--rounds", "3"])
assert (found.sizes, found.places, found.names) == ([4, 8, 16], ["0,16", "16"], ["b"])
assert (found.rounds, found.round_ms, found.fast) == (3, 5.0, False)
assert parse("any", subject, ["--fast"]).sizes == [1, 2]
try:
    parse("any", subject, ["--names", "a,c"])
except SystemExit as end:
    assert end.code == 2
else:
    raise AssertionError("'c' is none of the names")
"""


def test_what_options_accept() -> None:
    run("-c", PARSE, str(BENCHMARKS))


@pytest.mark.shm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "columns", "rows"),
    [
        (("asynchronous", *SMALL), 4, 9),
        (
            ("offsets", *SMALL, "--sizes", "4096", "--operations", "broadcast", "--places", "0,16"),
            4,
            1,
        ),
        (("control", *SMALL, "--ranks", "2"), 5, 2),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_small_run_prints_a_table(
    words: tuple[str, ...], columns: int, rows: int, tmp_path: Path
) -> None:
    file = tmp_path / "found.json"
    said = run(str(BENCHMARKS), *words, "--json", str(file))
    found: dict[str, Any] = json.loads(file.read_text())
    table = found["tables"][0]
    assert len(table["head"]) == columns
    assert len(table["rows"]) == rows
    for row in table["rows"]:
        assert f"| {row[0]} |" in said
        assert all(float(str(cell).strip("*").replace(",", "")) > 0 for cell in row[1:])
    assert found["command"] in said
    assert found["machine"]["CPU"] in said
