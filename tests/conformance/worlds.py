"""Where a conformance case runs, and what its ranks report."""

from __future__ import annotations

import contextlib
import time
import traceback
import tracemalloc
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

from pool import group_of

SHOWN = 12


class Transport(NamedTuple):
    """A backend between ranks, and its provider where it has several."""

    backend: str
    provider: str | None

    def __str__(self) -> str:
        return self.provider or self.backend


class World(NamedTuple):
    """A number of ranks with a backend between them, and the simulated host of each as ``group_of`` takes them."""

    size: int
    backend: str
    provider: str | None
    hosts: str = ""

    def __str__(self) -> str:
        return f"{self.hosts or self.size}-{self.provider or self.backend}"

    def group(self) -> Any:
        """Return this rank's group; only in a rank of the pool."""
        return group_of(self.size, self.backend, self.provider, hosts=self.hosts)


def stop_tracing() -> None:
    """Stop tracemalloc when torch's Gloo has let go of the last call's tensors.

    Its threads take the interpreter lock for that, a little after the call, and CPython dies of a thread that gets its
    state while ``tracemalloc.stop`` frees what the state is noted in.
    """
    time.sleep(0.02)
    tracemalloc.stop()


class Report:
    """Runs a rank's cases, goes on after one that fails, and raises at the end with every failed case by name.

    Attributes:
        digests: What must be equal on all ranks, by case.
    """

    def __init__(self, group: Any) -> None:
        self.digests: dict[str, str] = {}
        self._group = group
        self._failures: list[str] = []
        self._count = 0

    @contextlib.contextmanager
    def case(self, *words: object) -> Iterator[str]:
        """Run one case; the body gets its name."""
        name = " ".join(map(str, words))
        self._count += 1
        try:
            yield name
        except Exception:  # whatever a case raises is its failure, reported with its name
            lines = traceback.format_exc().splitlines()
            self._failures.append("\n    ".join([name, *lines[-7:]]))
            if self._group is not None and self._group._engine.broken is not None:
                self.done()

    def same_everywhere(self, name: str, content: bytes) -> None:
        """Remember the bytes of a result, to be compared between the ranks."""
        self.digests[name] = blake2b(content, digest_size=8).hexdigest()

    def done(self) -> dict[str, str]:
        """Return the digests.

        Raises:
            AssertionError: Cases failed.
        """
        if self._failures:
            shown = "\n".join(self._failures[:SHOWN])
            raise AssertionError(f"{len(self._failures)} of {self._count} cases failed:\n{shown}")
        return self.digests


def assert_same_bits(reports: Sequence[dict[str, str]]) -> None:
    """Compare the digests of all ranks, case by case."""
    first = reports[0]
    different = {
        name: [report.get(name) for report in reports]
        for name in first
        if any(report.get(name) != first[name] for report in reports)
    }
    assert not different, f"ranks got different bits: {different}"
    assert all(report.keys() == first.keys() for report in reports)
