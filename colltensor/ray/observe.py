"""Collectives as Ray's metrics and in ``ray timeline``, where they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

from ray.util.metrics import Counter, Histogram

from colltensor._compat.ray import is_connected, timeline_event
from colltensor.errors import OptionError
from colltensor.observers import Operation, add_observer, remove_observer

_TAGS: Final = ("group", "operation", "rank")
_BOUNDARIES_S: Final = [1e-6 * 4**power for power in range(14)]
"""From 1 us to 67 s, each four times the one before."""

_lock: Final = threading.Lock()
_observing: Final[list[Callable[[Operation], Any]]] = []


def observe(*, metrics: bool = True, timeline: bool = True) -> None:
    """Observe the operations of all groups of this process through Ray.

    These are the groups there are and those to come. A call replaces the wishes of an earlier one,
    so ``observe(metrics=False, timeline=False)`` ends it. The variable ``COLLTENSOR_OBSERVE``
    (``metrics``, ``timeline`` or both with a comma) asks for it when a process makes its first
    group. In Ray's ``runtime_env`` it does so in all workers of a job or an actor.

    Args:
        metrics: Count operations, bytes and errors, and keep a histogram of durations, as metrics
            of Ray. Their tags are ``group``, ``operation`` and ``rank``, their names
            ``colltensor_operations``, ``colltensor_bytes``, ``colltensor_errors`` and
            ``colltensor_duration_seconds``.
        timeline: Have every operation in ``ray timeline`` as an event of the category
            ``colltensor``.

    Raises:
        OptionError: This process is not a part of a Ray cluster.
    """
    if (metrics or timeline) and not is_connected():
        raise OptionError(
            "colltensor.ray.observe: this process is not part of a Ray cluster (a driver through Ray Client is not "
            "either); call it in a worker, or after ray.init()"
        )
    with _lock:
        while _observing:
            remove_observer(_observing.pop())
        _observing.extend([Metrics().observe] * bool(metrics) + [show_in_timeline] * bool(timeline))
        for observer in _observing:
            add_observer(observer)


class Metrics:
    """The metrics of all groups of this process."""

    def __init__(self) -> None:
        self._operations = Counter("colltensor_operations", "Collective operations.", _TAGS)
        what = "Bytes that ranks bring to collective operations."
        self._bytes = Counter("colltensor_bytes", what, _TAGS)
        self._errors = Counter("colltensor_errors", "Collective operations that raised.", _TAGS)
        name, what = "colltensor_duration_seconds", "Duration of collective operations in seconds."
        self._duration = Histogram(name, what, _BOUNDARIES_S, _TAGS)

    def observe(self, operation: Operation) -> Callable[[], None]:
        """Count an operation once it is over."""
        return lambda: self._record(operation)

    def _record(self, operation: Operation) -> None:
        tags = {"group": operation.group, "operation": operation.name, "rank": str(operation.rank)}
        if operation.error is not None:
            self._errors.inc(1, tags)
            return
        self._operations.inc(1, tags)
        if operation.nbytes:  # a counter takes no 0
            self._bytes.inc(operation.nbytes, tags)
        assert operation.duration_s is not None
        self._duration.observe(operation.duration_s, tags)


def show_in_timeline(operation: Operation) -> Callable[[], None] | None:
    """Open an event of ``ray timeline``, and close it when the operation is over."""
    if not is_connected():  # Ray was shut down
        return None
    facts = {
        "name": f"{operation.name} '{operation.group}'", "group": operation.group, "operation": operation.name,
        "rank": str(operation.rank), "world_size": str(operation.world_size), "nbytes": str(operation.nbytes),
    }  # fmt: skip
    event = timeline_event(b"colltensor", facts)
    event.__enter__()

    def end() -> None:
        if operation.error is not None:
            facts["error"] = f"{type(operation.error).__name__}: {operation.error}"
        event.__exit__(None, None, None)

    return end
