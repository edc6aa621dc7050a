"""The processor time and memory that control groups grant this process.

Version 1 and 2, as https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html
describe their files.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_MOUNTED: Final = Path("/sys/fs/cgroup")
_MEMBERSHIPS: Final = Path("/proc/self/cgroup")
_RECLAIMABLE: Final = (
    "total_active_file",
    "total_inactive_file",
    "active_file",
    "inactive_file",
    "slab_reclaimable",
)
_FILES: Final = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def processors() -> float:
    """Return how many processors' time the control groups grant; infinity if they do not say."""
    return min(map(_processors, _folders("cpu")), default=math.inf)


def spare_nbytes() -> float:
    """Return how many more bytes of memory the control groups grant, infinity if they do not say.

    Files that the kernel caches, and can drop, count as spare. A process that asks for more is
    killed: the kernel's reservation of pages does not fail at such a limit.
    """
    return min(map(_spare_nbytes, _folders("memory")), default=math.inf)


def _folders(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups, inner ones first.

    A container shows them only as far as it sees them.
    """
    with contextlib.suppress(OSError):
        for line in _MEMBERSHIPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root = _MOUNTED / controller if controllers else _MOUNTED
            inner = root / path.lstrip("/")
            yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(root))


def _processors(folder: Path) -> float:
    with contextlib.suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return float(quota) / float(period)
    with contextlib.suppress(OSError):
        quota, period = (
            (folder / name).read_text() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        )
        return float(quota) / float(period) if int(quota) > 0 else math.inf
    return math.inf


def _spare_nbytes(folder: Path) -> float:
    for limit, used in _FILES:
        with contextlib.suppress(OSError, ValueError):  # ValueError: no limit is the word "max"
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
            pages = {name: int(value) for name, value in lines if name in _RECLAIMABLE}
            whole = [
                nbytes for name, nbytes in pages.items() if name.startswith("total_")
            ] or pages.values()
            return max(0, left + sum(whole))
    return math.inf
