"""Prints what was measured as Markdown, and writes it as JSON."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from worlds.rounds import Samples
from worlds.targets import GLOO, MPI_TORCH, MPIS, OURS, OURS_AT_PAGE, OURS_LISTED, PAGED, Results, Verdict, size

ALLREDUCE_COLUMNS = (OURS, OURS_AT_PAGE, "col.allreduce", *MPIS, GLOO, "ray")
FRAMEWORK_COLUMNS = ("numpy", PAGED, "torch", "JAX", MPI_TORCH)
COPY_COLUMNS = ("copyto", "memmove")


def machine() -> dict[str, str]:
    """Return what the measurement ran on."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    models = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "CPU": models[0] if models else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{gigabytes:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "date": time.strftime("%Y-%m-%d"),
    }


def allreduce_table(results: Results, ranks: int) -> str:
    """Return the table of the libraries, with how many times faster ours is than the faster MPI and than Gloo."""
    columns = _present(results, ranks, "allreduce", ALLREDUCE_COLUMNS)
    head = [f"bytes, {ranks} ranks", *columns, "GB/s, ours", "faster MPI / ours", "Gloo / ours", "ray / ours"]
    rows = []
    for nbytes, samples in _rows(results, ranks, "allreduce"):
        ours = samples.get(OURS)
        peers = [samples[name].median_us for name in MPIS if name in samples]
        speed = f"{nbytes / ours.median_us / 1e3:.2f}" if ours else ""
        ratios = [min(peers, default=None), *(samples[name].median_us if name in samples else None
                                              for name in (GLOO, "ray"))]
        rows.append([
            f"{nbytes:,}", *(_cell(samples, name) for name in columns), speed,
            *(f"{peer / ours.median_us:.2f}" if ours and peer else "" for peer in ratios),
        ])
    return markdown(head, rows)


def frameworks_table(results: Results, ranks: int) -> str:
    """Return the table of tensors of other frameworks through colltensor, in a world of its own."""
    columns = _present(results, ranks, "frameworks", FRAMEWORK_COLUMNS)
    others = [name for name in columns if name in ("torch", "JAX")]
    head = [f"bytes, {ranks} ranks", *columns, *(f"{name} - numpy" for name in others), "quartiles of numpy"]
    rows = []
    for nbytes, samples in _rows(results, ranks, "frameworks"):
        low, high = samples["numpy"].quartiles_us()
        more = [samples[name].median_us - samples["numpy"].median_us for name in others]
        rows.append([
            f"{nbytes:,}", *(_cell(samples, name) for name in columns), *(f"{value:+,.2f}" for value in more),
            f"{low:,.2f} to {high:,.2f}",
        ])
    return markdown(head, rows)


def operations_table(results: Results, ranks: int, operations: Sequence[str]) -> str:
    """Return the table of the other operations."""
    columns = [name for name in (OURS, OURS_LISTED, *MPIS) if any(
        name in samples for (n, table, _), samples in results.items() if n == ranks and table in operations
    )]
    rows = []
    for operation in operations:
        for nbytes, samples in _rows(results, ranks, operation):
            ours = samples.get(OURS)
            peer = min((samples[name].median_us for name in MPIS if name in samples), default=None)
            ratio = f"{peer / ours.median_us:.2f}" if ours and peer else ""
            where = "" if operation == "barrier" else size(nbytes)
            rows.append([operation, where, *(_cell(samples, name) for name in columns), ratio])
    return markdown([f"operation, {ranks} ranks", "S", *columns, "faster MPI / ours"], rows)


def limit_table(results: Results, ranks: int) -> str:
    """Return the table of the plain copies beside our allreduce."""
    rows = []
    for nbytes, samples in _rows(results, ranks, "allreduce"):
        copies = [name for name in COPY_COLUMNS if name in samples]
        if copies and OURS in samples:
            rows += [[
                size(nbytes), name, _cell(samples, name), _cell(samples, OURS),
                f"{samples[name].median_us / samples[OURS].median_us:.2f}",
            ] for name in copies]
    return markdown([f"size, {ranks} ranks", "copy", "copy", f"allreduce, {OURS}", "copy / ours"], rows)


def targets_table(verdicts: Sequence[Verdict]) -> str:
    """Return the table of the targets."""
    rows = [[v.target, v.ours, v.other, v.reached, "yes" if v.holds else "**no**"] for v in verdicts]
    return markdown(["target", "ours", "other", "reached", "holds"], rows, left=1)


def write_json(path: Path, results: Results, verdicts: Sequence[Verdict], facts: dict[str, Any]) -> None:
    """Write everything that was measured."""
    measured = [
        {"ranks": ranks, "table": table, "bytes": nbytes, "label": label, **asdict(sample)}
        for (ranks, table, nbytes), samples in results.items() for label, sample in samples.items()
    ]
    content = {**facts, "measured": measured, "targets": [asdict(verdict) for verdict in verdicts]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def microseconds(time_us: float) -> str:
    """Return a time as a table has it."""
    return f"{time_us:,.2f}" if time_us < 100 else f"{time_us:,.0f}"


def _present(results: Results, ranks: int, table: str, columns: Sequence[str]) -> list[str]:
    there = {label for _, samples in _rows(results, ranks, table) for label in samples}
    return [name for name in columns if name in there]


def _rows(results: Results, ranks: int, table: str) -> list[tuple[int, dict[str, Samples]]]:
    return [(nbytes, samples) for (n, name, nbytes), samples in results.items() if (n, name) == (ranks, table)]


def _cell(samples: dict[str, Samples], name: str) -> str:
    if name not in samples:
        return ""
    return microseconds(samples[name].median_us)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """Return a table in Markdown, with so many columns at its left side that are text."""
    rule = "| --- " * left + "| ---: " * (len(head) - left) + "|"
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)])
