"""What ``backend="auto"`` means for several ranks: the fastest transport for where they are.

    all on one host                      shm
    several hosts, one rank on each      gloo
    several hosts, several ranks on some hierarchical

Where memory cannot be shared the ranks agree on Gloo. No entry of the table of backends: groups
made by it have one of those.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any, Final

from colltensor import backends
from colltensor.backends import hierarchical
from colltensor.backends.base import Backend, ControlPlane
from colltensor.errors import BackendUnavailableError

_LOG = logging.getLogger(__name__)
_SHOWN: Final = 4

_warned: Final = threading.Event()
"""Whether this process was told of Gloo in the place of shared memory."""


class AutoSpec:
    """Chooses a backend once the ranks have met; the choice is the same on every rank."""

    def available(self) -> str | None:
        """Return None if there is a backend for CPU tensors here, else what to do."""
        return backends.reason("auto")

    def prepare(self, provider: str | None, host_ids: Sequence[str]) -> None:
        """Load what ``choose`` needs where ranks are on these hosts."""
        if len(set(host_ids)) > 1:
            hierarchical.SPEC.prepare(provider, host_ids)
            return
        loads = "gloo" if backends.reason("shm") else "shm"
        # Our own backends have ``prepare``; the protocol does not name it.
        backends.get_backend(loads).prepare(provider, host_ids)  # type: ignore[attr-defined]

    def create(
        self,
        control: Any,
        meeting: Any,
        *,
        timeout_s: float,
        interface: str | None,
        provider: str | None,
    ) -> Backend:
        """Make the backend that fits the hosts of ``meeting``; see ``choose``."""
        return self.choose(
            control, meeting, timeout_s=timeout_s, interface=interface, provider=provider
        )[0]

    def choose(
        self,
        control: Any,
        meeting: Any,
        *,
        timeout_s: float,
        interface: str | None,
        provider: str | None,
    ) -> tuple[Backend, str]:
        """Make the backend that fits the hosts of ``meeting``, and say in words why it is this one.

        All ranks call; arguments as for the backends. Where ranks of one host cannot share memory,
        the first group of this process warns. It does so on every rank, with the reason of the rank
        that lacks something.

        Raises:
            BackendUnavailableError: Neither shared memory nor Gloo can be used; says why for both.
            CollectiveError: As the backends.
        """
        hosts = list(meeting.host_ids)
        count = len(set(hosts))
        options: dict[str, Any] = {
            "timeout_s": timeout_s,
            "interface": interface,
            "provider": provider,
        }

        refused: BackendUnavailableError | None = None
        try:
            if count == 1:
                shm = backends.get_backend("shm").create(control, meeting, **options)
                return shm, f"backend='auto': all {len(hosts)} ranks are on one host"
            sharing = (
                hierarchical.share(control, meeting, timeout_s) if count < len(hosts) else None
            )
        except BackendUnavailableError as error:  # on every rank alike
            refused, sharing = error, None
        if sharing is not None:
            why = f"backend='auto': the {len(hosts)} ranks are on {count} hosts, several of them on one"
            return sharing.connect(meeting, **options), why

        try:
            gloo = backends.get_backend("gloo").create(control, meeting, **options)
        except BackendUnavailableError as error:
            if refused is None:
                raise
            raise BackendUnavailableError(f"{refused}; and instead of it: {error}") from refused

        if refused is None:
            return gloo, f"backend='auto': each rank is on a host of its own ({_listed(hosts)})"

        reason = str(refused).removeprefix(f"group '{control.group_name}' (rank {control.rank}): ")
        _warn(control, reason)
        return gloo, f"backend='auto': ranks of one host cannot share memory: {reason}"


SPEC: Final = AutoSpec()


def _listed(hosts: Sequence[str]) -> str:
    shown = [f"rank {rank}: {host}" for rank, host in enumerate(hosts[:_SHOWN])]
    return ", ".join([*shown, "..."] if len(hosts) > _SHOWN else shown)


def _warn(control: ControlPlane, reason: str) -> None:
    """Say that Gloo takes the place of shared memory.

    It warns once a process, and logs a debug line later. The warning is a line of the log rather
    than Python's: that shows in scripts and in Ray's workers where nobody configured logging. And
    no filter turns it into an error of one rank in the middle of a call of all ranks.
    """
    if _warned.is_set():
        _LOG.debug(
            "group %r (rank %d): using 'gloo' within one host: %s",
            control.group_name,
            control.rank,
            reason,
        )
        return

    _warned.set()
    _LOG.warning(
        "group %r (rank %d): colltensor is using 'gloo' between ranks of one host, where small messages take hundreds "
        "of times as long as in shared memory (backend='gloo' chooses it without this warning): %s",
        control.group_name,
        control.rank,
        reason,
    )
