"""Hierarchical: shared memory within hosts, Gloo between them.

An element crosses between two hosts once each way.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from colltensor.backends.base import Backend, ControlPlane
from colltensor.backends.gloo import SPEC as GLOO
from colltensor.backends.hierarchical.topology import Hosts
from colltensor.backends.shm import SPEC as SHM
from colltensor.errors import BackendUnavailableError, GroupError

if TYPE_CHECKING:
    from colltensor.backends.hierarchical.watch import Watch
    from colltensor.backends.shm.backend import ShmBackend


class HierarchicalSpec:
    """The table entry of ``HierarchicalBackend``."""

    def available(self) -> str | None:
        """Return None if shared memory and Gloo can be used here, else what to do."""
        reasons = [why for why in (SHM.available(), GLOO.available()) if why is not None]
        return "; ".join(reasons) or None

    def prepare(self, provider: str | None, host_ids: Sequence[str]) -> None:
        """Load what ``create`` needs."""
        hosts = len(set(host_ids))
        if hosts != len(host_ids):
            SHM.prepare(None, host_ids)
        if hosts != 1:
            GLOO.prepare(provider, host_ids)
            from colltensor.backends.hierarchical import backend, watch  # noqa: F401 - for create()

    def create(
        self,
        control: Any,
        meeting: Any,
        *,
        timeout_s: float,
        interface: str | None,
        provider: str | None,
    ) -> Backend:
        """Share memory on every host and connect Gloo between all ranks. All ranks call.

        Where all ranks are on one host that is backend ``shm``, and with one rank on every host
        ``gloo``.

        Args:
            control: The group's control plane.
            meeting: Where the ranks met, with the host of each.
            timeout_s: How long each of the two may take.
            interface: Gloo's.
            provider: Gloo's.

        Raises:
            BackendUnavailableError: On some host the ranks cannot share memory, or there is no
                Gloo. Raised on every rank; nothing is left behind and ``control`` goes on.
            CollectiveError: As the other two backends.
        """
        if control is None:
            raise GroupError(
                "backend 'hierarchical' needs a control plane; use backend='loopback' for one rank"
            )

        hosts = Hosts.of(meeting.host_ids, control.rank)
        if len(hosts.members) == 1:
            return SHM.create(
                control, meeting, timeout_s=timeout_s, interface=interface, provider=None
            )
        if max(map(len, hosts.members)) == 1:
            return GLOO.create(
                control, meeting, timeout_s=timeout_s, interface=interface, provider=provider
            )

        return share(control, meeting, timeout_s).connect(
            meeting, timeout_s=timeout_s, interface=interface, provider=provider
        )


SPEC: Final = HierarchicalSpec()


@dataclass(frozen=True, slots=True)
class Sharing:
    """Hosts whose ranks share memory, and that are not connected yet.

    Attributes:
        hosts: The hosts.
        watch: The control plane for what is between and within them.
        local: This host's transport, None where it has one rank.
    """

    hosts: Hosts
    watch: Watch
    local: ShmBackend | None

    def connect(
        self, meeting: Any, *, timeout_s: float, interface: str | None, provider: str | None
    ) -> Backend:
        """Connect Gloo between all ranks, or close what there is.

        All ranks call; arguments as for ``create``.

        Raises:
            CollectiveError: As the Gloo backend.
        """
        from colltensor.backends.hierarchical.backend import HierarchicalBackend

        try:
            gloo = GLOO.create(
                self.watch, meeting, timeout_s=timeout_s, interface=interface, provider=provider
            )
        except BaseException:
            if self.local is not None:
                self.local.close()
            raise
        return HierarchicalBackend(self.hosts, self.watch, self.local, gloo)


def share(control: ControlPlane, meeting: Any, timeout_s: float) -> Sharing:
    """Share memory between the ranks of each host, on all hosts at the same time. All ranks call.

    Raises:
        BackendUnavailableError: On every rank, where it cannot be done on some host; nothing is
            left behind.
        CollectiveError: A rank died or did not come.
    """
    from colltensor.backends.hierarchical.watch import HostControl, Watch

    deadline = time.monotonic() + timeout_s
    watch = Watch(control)
    hosts = Hosts.of(meeting.host_ids, control.rank)
    host = HostControl(watch, hosts, meeting)
    local, trouble = None, ""

    if len(hosts.neighbours) > 1:
        try:
            local = SHM.create(host, host, timeout_s=timeout_s, interface=None, provider=None)
        except BackendUnavailableError as error:
            trouble = str(error)

    # A rank without shared memory says so, because all must refuse alike.
    try:
        found = list(dict.fromkeys(filter(None, host.conclude(trouble, deadline))))
        if found:
            raise BackendUnavailableError(
                f"group '{watch.group_name}' (rank {watch.rank}): backend 'hierarchical' cannot be used: {found[0]}"
            )
    except BaseException:
        if local is not None:
            local.close()
        raise

    return Sharing(hosts, watch, local)
