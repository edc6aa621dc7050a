"""How times, tables and the machine are written down."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path


def machine() -> dict[str, str]:
    """Return what the measurement ran on."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    models = [
        line.partition(":")[2].strip()
        for line in cpuinfo.splitlines()
        if line.startswith("model name")
    ]
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "CPU": models[0] if models else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{gigabytes:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "date": time.strftime("%Y-%m-%d"),
    }


def cell(value: object) -> str:
    """Return a time in microseconds as a table has it, and words as they are."""
    if not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]], left: int = 0) -> str:
    """Return a table in Markdown, with so many columns at its left side that are text."""
    rule = "| --- " * left + "| ---: " * (len(head) - left) + "|"
    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(head) + " |", rule, *lines])
