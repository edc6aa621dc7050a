"""Checks that fail in every way a check can fail, so that a test sees the rest go on."""

from __future__ import annotations

import os
import signal
import sys
import time

from child import SkippedError, spoilt


def fails() -> None:
    """Raise."""
    raise AssertionError("it failed on purpose")


def hangs() -> None:
    """Never return."""
    time.sleep(1000)


def dies() -> None:
    """Kill the process."""
    os.kill(os.getpid(), signal.SIGKILL)


def leaves() -> None:
    """Leave by way of an exception that is no error."""
    sys.exit("it left on purpose")


def spoils() -> None:
    """Fail, and leave a process in which nothing works."""
    spoilt.append("on purpose")
    raise AssertionError("it spoilt its process")


def goes_on() -> str:
    """Return a figure, in a process that is not spoilt."""
    assert not spoilt
    return "42 us"


def is_left_out() -> None:
    """Say that it cannot be made."""
    raise SkippedError("left out on purpose")
