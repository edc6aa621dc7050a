"""What ``backend="auto"`` means for a group of several ranks: the fastest wire for where they are.

    all on one host                      shm
    several hosts, one rank on each      gloo
    several hosts, several ranks on some hierarchical

Where memory cannot be shared the ranks agree on Gloo. No entry of the table of backends: groups made by it have one
of those. Imports no framework.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from colltensor import backends
from colltensor.backends import hierarchical
from colltensor.backends.base import Backend
from colltensor.errors import BackendUnavailableError

_LOG = logging.getLogger(__name__)


class AutoSpec:
    """Chooses a backend once the ranks have met; the choice is the same on every rank."""

    def available(self) -> str | None:
        """Return None if there is a backend for CPU tensors here, else why there is none and what to do."""
        reasons = [backends.reason(name) for name in ("shm", "gloo")]
        return "; ".join(map(str, reasons)) if None not in reasons else None

    def create(
        self, control: Any, meeting: Any, *, timeout_s: float, interface: str | None, provider: str | None
    ) -> Backend:
        """Make the backend that fits the hosts of ``meeting``. All ranks call; arguments as for the backends.

        Raises:
            BackendUnavailableError: Neither shared memory nor Gloo can be used; says why for both.
            CollectiveError: As the backends.
        """
        hosts = list(meeting.host_ids)
        options: dict[str, Any] = {"timeout_s": timeout_s, "interface": interface, "provider": provider}
        refused: BackendUnavailableError | None = None
        try:
            if len(set(hosts)) == 1:
                return backends.get_backend("shm").create(control, meeting, **options)
            sharing = hierarchical.share(control, meeting, timeout_s) if len(set(hosts)) < len(hosts) else None
        except BackendUnavailableError as error:  # on every rank alike
            refused, sharing = error, None
            _LOG.debug("group %r (rank %d): using 'gloo': %s", control.group_name, control.rank, error)
        if sharing is not None:
            return sharing.connect(meeting, **options)
        try:
            return backends.get_backend("gloo").create(control, meeting, **options)
        except BackendUnavailableError as error:
            if refused is None:
                raise
            raise BackendUnavailableError(f"{refused}; and instead of it: {error}") from refused


SPEC: Final = AutoSpec()
