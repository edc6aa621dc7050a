"""tools/gpu_check on a fake device: it must not be itself what fails where there is a card, and little time."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).resolve().parent.parent.parent / "tools" / "gpu_check"
INJECTED = {
    "fails": "FAIL",
    "hangs": "FAIL",
    "dies": "FAIL",
    "leaves": "FAIL",
    "spoils": "FAIL",
    "goes on": "ok",
    "is left out": "skip",
}
SAID = {
    "fails": "AssertionError",
    "hangs": "injected.py",
    "dies": "SIGKILL",
    "leaves": "SystemExit",
    "spoils": "AssertionError",
    "is left out": "on purpose",
}
"""A part of the error: of a check that hangs, where it did."""
WITHOUT_TORCH = {
    "host time of 4 KiB, beside torch.distributed",
    "1 GiB on one rank, beside torch.distributed",
    "bandwidth of two ranks",
}


def checked(out: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Run the tool without a card; returns its exit code, its file and its lines."""
    command = [sys.executable, str(TOOL), "run", "--cpu", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    assert not done.stderr, done.stderr
    return done.returncode, json.loads((out / "gpu_check.json").read_text()), done.stdout


@pytest.mark.slow
def test_a_check_that_fails_hangs_or_dies_does_not_end_the_others(tmp_path: Path) -> None:
    code, report, lines = checked(
        tmp_path, "--inject", "--stages", "i", "--wheels", str(tmp_path / "none")
    )
    assert code == 1
    assert report["complete"]
    wheels, *found = report["checks"]
    assert wheels["outcome"] == "FAIL"
    assert str(tmp_path / "none") in wheels["error"]
    assert {check["name"]: check["outcome"] for check in found} == INJECTED
    for check in found:
        assert SAID.get(check["name"], "") in check.get("error", "")
        assert f"{check['outcome']:4}  injected  {check['name']}" in lines
    assert [stage["name"] for stage in report["stages"]] == ["injected"]


@pytest.mark.slow
def test_it_ends_by_itself(tmp_path: Path) -> None:
    began = time.monotonic()
    code, report, _ = checked(tmp_path, "--inject", "--stages", "ia", "--seconds", "4")
    assert code == 1
    assert report["complete"]
    assert report["checks"][-1]["outcome"] == "skip"
    assert "no time" in report["checks"][-1]["error"]
    assert time.monotonic() - began < 30


def test_wheels_are_unpacked_if_their_sums_agree(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "one-1-py3-none-any.whl", "w") as archive:
        archive.writestr("one/__init__.py", "")
        archive.writestr("one-1.data/purelib/two.py", "")
        archive.writestr("one-1.data/scripts/three", "")
    sum_ = hashlib.sha256((wheels / "one-1-py3-none-any.whl").read_bytes()).hexdigest()
    program = "import sys, pathlib as p; sys.path.insert(0, sys.argv[1]); import gather; "
    program += "print(gather.install(p.Path(sys.argv[2]), p.Path(sys.argv[3])))"
    command = [sys.executable, "-c", program, str(TOOL), str(wheels), str(tmp_path / "site")]
    (wheels / "SHA256SUMS").write_text(f"{sum_}  one-1-py3-none-any.whl\n")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "1 wheels, 0.0 MiB" in done.stdout
    made = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("*.py")}
    assert made == {"one/__init__.py", "two.py"}
    (wheels / "SHA256SUMS").write_text(f"{'0' * 64}  one-1-py3-none-any.whl\n")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "one-1-py3-none-any.whl" in done.stderr


@pytest.mark.needs("jax")
@pytest.mark.shm
@pytest.mark.skipif(
    os.environ.get("COLLTENSOR_TEST_INSTALLED") == "1" and sys.version_info[:2] != (3, 12),
    reason="of nox's sessions the one with the Python of the card's machine runs it",
)
def test_every_check_passes_on_a_fake_device(tmp_path: Path) -> None:
    code, report, lines = checked(tmp_path, "--seconds", "100")
    outcomes = {check["name"]: check["outcome"] for check in report["checks"]}
    assert code == 0, lines
    skipped = {"which libnccl"} | (set() if importlib.util.find_spec("torch") else WITHOUT_TORCH)
    assert {name for name, outcome in outcomes.items() if outcome == "skip"} == skipped
    assert [stage["name"][0] for stage in report["stages"]] == list("abcdefg")
    assert report["versions"]["numpy"]
    assert report["nccl_warnings"] == []


@pytest.mark.needs("torch")
@pytest.mark.slow
def test_it_measures_beside_torch(tmp_path: Path) -> None:
    code, report, lines = checked(tmp_path, "--stages", "e")
    assert code == 0, lines
    assert [check["outcome"] for check in report["checks"]] == ["ok", "ok"]
    assert len(report["versions"]["host_time"]) == 2
    assert len(report["versions"]["large_call"]) == 2
