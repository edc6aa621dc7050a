"""GroupOptions: what a group was asked to be made of, and with it which backend makes it."""

from __future__ import annotations

import contextlib
import logging
import numbers
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from colltensor import backends, objects
from colltensor.backends import auto
from colltensor.backends.base import Backend, BackendSpec
from colltensor.errors import OptionError

_log: Final = logging.getLogger(__name__)
_LONGEST_S: Final = 1e9
"""A timeout of more than 30 years is one of 30 years: sockets and clocks end not far beyond."""
_hinted: Final = threading.Event()
"""Whether this process was told that shared memory could take the place of the Gloo asked for."""


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """What a group was asked to be made of; its parts are made of the same."""

    backend: str = "auto"
    timeout_s: float = 30.0
    interface: str | None = None
    provider: str | None = None
    check: bool = False
    allow_pickle: bool = field(default_factory=lambda: objects.pickle_allowed(None))

    def backend_for(self, world_size: int) -> str:
        """Return the backend's name; ``"auto"`` until the ranks have met and their hosts decide."""
        if self.backend != "auto":
            return self.backend
        if world_size == 1:
            return "loopback"
        return "auto" if self.provider is None else "gloo"

    def asked_of(self, world_size: int) -> str:
        """Return what all ranks must have asked for, in words."""
        return f"{self.backend_for(world_size)}{', check=True' if self.check else ''}"

    def spec_for(self, world_size: int) -> BackendSpec:
        """Return what makes the backend."""
        name = self.backend_for(world_size)
        return auto.SPEC if name == "auto" else backends.get_backend(name)

    def prepare(self, world_size: int, host_ids: Sequence[str]) -> None:
        """Import and load what making the backend will need.

        It comes before the time that connecting the backend may take begins. The ranks have met by
        then: one that imports longer than the others is not late to the meeting as well.

        Args:
            world_size: The number of ranks.
            host_ids: The host of each rank.
        """
        # a backend from elsewhere may have none
        prepare = getattr(self.spec_for(world_size), "prepare", None)
        if prepare is not None:
            # What is broken comes up again in ``make``, where the other ranks learn of it.
            with contextlib.suppress(ImportError, AttributeError, OSError, RuntimeError):
                prepare(self.provider, host_ids)

    def make(self, control: Any, meeting: Any) -> tuple[Backend, str]:
        """Make the backend of the ranks that met, and say in words why it is this one.

        All ranks call.

        Raises:
            CollectiveError: As the backends.
        """
        name = self.backend_for(meeting.world_size)
        arguments: dict[str, Any] = {"interface": self.interface, "provider": self.provider}
        arguments["timeout_s"] = self.timeout_s
        if name == "auto":
            backend, why = auto.SPEC.choose(control, meeting, **arguments)
        else:
            made = backends.get_backend(name).create(control, meeting, **arguments)
            backend = backends.check_backend(name, made)
            why = self._asked(name, backend.name, meeting)
        details = getattr(backend, "details", "")
        return backend, f"{why}; {details}" if details else why

    def _asked(self, name: str, made: str, meeting: Any) -> str:
        """Return why a backend that was asked for is used, and hint at a faster one."""
        why = f"backend={self.backend!r} was asked for"
        if self.backend == "auto":
            why = f"provider={self.provider!r} was asked for, which is one of {name}"

        hosts = len(set(meeting.host_ids))
        if made != name:
            return f"{why}, and {'all ranks are on one host' if hosts == 1 else 'each rank is on a host of its own'}"

        could_share = hosts == 1 and meeting.world_size > 1 and backends.reason("shm") is None
        if name != "gloo" or not could_share:
            return why

        if not _hinted.is_set():
            _hinted.set()
            _log.info(
                "group %r (rank %d): backend 'gloo' was asked for, and all ranks are on one host: with backend='auto' "
                "they would use shared memory, which is up to hundreds of times faster",
                meeting.group_name,
                meeting.rank,
            )
        return f"{why}; all ranks are on one host, where backend='auto' would use shared memory"


def timeout_of(timeout_s: Any) -> float:
    """Return a timeout as a group has it.

    Raises:
        OptionError: It is no number of seconds above 0, or infinite.
    """
    # numpy's scalars are, too
    is_number = isinstance(timeout_s, numbers.Real) and not isinstance(timeout_s, bool)
    if not is_number or not 0 < timeout_s < float("inf"):
        raise OptionError(
            f"timeout_s: expected seconds, more than 0 and not infinite, got {timeout_s!r}"
        )
    return float(min(timeout_s, _LONGEST_S))
