"""Runs a part of the tests in this process and tells the outcome of each."""

from __future__ import annotations

import importlib
import signal
from pathlib import Path
from typing import Any

import pytest
from child import ROOT, Channel, SkippedError

_SHARED_SINCE = 23000
_OUTCOMES = {"passed": "ok", "failed": "FAIL", "skipped": "skip"}


class Reporter:
    """A plugin that passes on what pytest reports."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.counts = {"ok": 0, "FAIL": 0, "skip": 0}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Tell a test's outcome; setup and teardown only where they decide it."""
        if report.when != "call" and report.passed:
            return
        outcome = _OUTCOMES[report.outcome]
        self.counts[outcome] += 1
        error = (
            ""
            if report.passed
            else str(report.longrepr[2] if report.skipped else report.longrepr)[-6000:]
        )
        self._channel.part(report.nodeid.rpartition("/")[2], outcome, report.duration, error)

    def pytest_collectreport(self, report: Any) -> None:
        """Tell of a file that cannot be imported."""
        if report.failed:
            self.counts["FAIL"] += 1
            self._channel.part(report.nodeid, "FAIL", 0.0, str(report.longrepr)[-6000:])


def run(words: str, shares: bool, *, channel: Channel, folder: Path, cpu: bool) -> str:
    """Run the tests of CUDA devices whose names fit ``words``; returns how many passed.

    With a fake device, those of that.

    Raises:
        SkippedError: They put several ranks on one device, and libnccl is too old for that.
    """
    version = 0 if cpu else importlib.import_module("cupy.cuda.nccl").get_version()
    if shares and not cpu and version < _SHARED_SINCE:
        raise SkippedError(
            f"several ranks on one device need libnccl 2.30 or later, this is {version}"
        )
    where = (
        ["tests/multiprocess/nccl/test_nccl_operations.py"] if cpu else ["tests/gpu", "-m", "gpu"]
    )
    frameworks = "numpy" if cpu else "torch,cupy,jax"
    reporter = Reporter(channel)
    before = signal.getsignal(signal.SIGTERM)
    arguments = [
        str(ROOT / where[0]), *where[1:], "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-k", words,
        "--frameworks", frameworks, "--providers", "" if cpu else "torch", "-p", "no:cacheprovider",
        "--basetemp", str(folder / "pytest"), "--tb=short",
    ]  # fmt: skip
    try:
        code = pytest.main(arguments, plugins=[reporter])
    finally:
        signal.signal(signal.SIGTERM, before)
    counts = reporter.counts
    said = f"{counts['ok']} passed, {counts['FAIL']} failed, {counts['skip']} skipped"
    assert code in (0, 1), f"pytest ended with {code!r}; {said}"
    assert not counts["FAIL"], said
    if not counts["ok"]:
        raise SkippedError(said)
    return said
