"""Private names of torch, JAX and Ray that the package uses: a module for each, and nowhere else.

Each module says with which versions it was tested. Beyond them there is one debug line a process,
so that whoever looks into a failure sees it.
"""

from __future__ import annotations

import logging
import re
from typing import Final

_log: Final = logging.getLogger(__name__)


def note_version(framework: str, version: str, tested: str) -> None:
    """Log that a framework is newer than what the use of its private names was tested with."""
    if _numbers(version) > _numbers(tested):
        _log.debug(
            "%s %s is newer than %s, the last with which colltensor's use of its private names was tested",
            framework,
            version,
            tested,
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:2])
