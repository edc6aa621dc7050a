"""Host time and bandwidth beside torch.distributed's, in little time.

They are what ``benchmarks nccl`` measures.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from child import ROOT, Channel, SkippedError

sys.path.insert(0, str(ROOT / "benchmarks"))
benchmark: Any = importlib.import_module("subjects.nccl")
worlds: Any = importlib.import_module("harness.world")
rounds: Any = importlib.import_module("harness.rounds")
ROUNDS, CALLS = 10, 50
LARGE_ROUNDS = 5
WAYS_NBYTES, FAKE_NBYTES = 64 << 20, 1 << 20


def host_time(*, channel: Channel, folder: Path, cpu: bool) -> str:
    """Measure what a call of 4 KiB takes the host; the target is no condition of the check."""
    names = (benchmark.OURS_TORCH, benchmark.OURS_CUPY, benchmark.THEIRS)
    with _here(folder / "host-time", cpu) as started:
        times = _times(
            started, benchmark.contestants(*names), benchmark.SMALL_NBYTES, ROUNDS, CALLS
        )
    rows, holds = benchmark.host_rows(times)
    channel.facts(host_time=[_line(row) for row in rows])
    said = ", ".join(f"{name} {samples.median_us:.1f} us" for name, samples in times.items())
    return f"{said}: {'holds' if holds else 'does NOT hold'}"


def large_call(*, channel: Channel, folder: Path, cpu: bool) -> str:
    """Measure 1 GiB on one rank.

    An allreduce in place should cost nothing; an allgather copies.
    """
    nbytes, said = FAKE_NBYTES if cpu else benchmark.LARGE_NBYTES, []
    pairs = {
        "allreduce in place": (benchmark.OURS_TORCH, benchmark.THEIRS),
        "allgather": ("allgather, ours", "allgather, theirs"),
    }
    with _here(folder / "large", cpu) as started:
        for name, pair in pairs.items():
            times = _times(
                started, benchmark.contestants(*pair, end=benchmark.DONE), nbytes, LARGE_ROUNDS, 1
            )
            ours, theirs = (times[label].median_us for label in pair)
            said.append(
                f"{name}: ours {ours / 1e3:.3f} ms, {nbytes / ours / 1e3:.0f} GB/s, "
                f"{theirs / ours:.3f} of torch.distributed's"
            )
    channel.facts(large_call=said)
    return "; ".join(said)


def two_ranks(*, channel: Channel, folder: Path, cpu: bool) -> str:
    """Measure two ranks on one device.

    1 GiB beside torch.distributed, 64 MiB beside copies through the host.
    """
    if not cpu:
        _needs_two()
    large, ways = (FAKE_NBYTES, FAKE_NBYTES) if cpu else (benchmark.LARGE_NBYTES, WAYS_NBYTES)
    both = (benchmark.OURS_TORCH, benchmark.BY_HOST)
    with worlds.started([benchmark.world([] if cpu else [0, 0])], 2) as started:
        pair = benchmark.contestants(benchmark.OURS_TORCH, benchmark.THEIRS, end=benchmark.DONE)
        row, _ = benchmark.large_row(_times(started, pair, large, 3, 1), "one device")
        times = _times(
            started, benchmark.contestants(*both, end=benchmark.DONE), ways, LARGE_ROUNDS, 1
        )
    line, found = _line(row), {name: times[name].median_us / 1e6 for name in both}
    channel.facts(two_ranks=line, through_the_host=found)
    return (
        f"{line} {', '.join(f'{name} {seconds * 1e3:.1f} ms' for name, seconds in found.items())}"
    )


@contextlib.contextmanager
def _here(folder: Path, cpu: bool) -> Iterator[Any]:
    """A world of one rank in this process."""
    folder.mkdir(exist_ok=True)
    here = worlds.Here(benchmark.Ranks, str(folder), {"devices": [] if cpu else [0]})
    yield {"nccl": here}
    here.ask("leave")


def _times(started: Any, contestants: Any, nbytes: int, count: int, calls: int) -> Any:
    return rounds.measure(started, contestants, nbytes, rounds=count, round_ms=0, calls=calls)


def _line(row: list[str]) -> str:
    return f"| {' | '.join(row)} |"


def _needs_two() -> None:
    version = importlib.import_module("cupy.cuda.nccl").get_version()
    if version < benchmark.SHARED_SINCE:
        raise SkippedError(f"two ranks on one device need libnccl 2.30 or later, this is {version}")
