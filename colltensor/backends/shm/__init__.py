"""Shared memory: collectives of host memory between the ranks of one host, in a native library."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from colltensor.errors import GroupError, OptionError

if TYPE_CHECKING:
    from colltensor.backends.shm.backend import ShmBackend


class ShmSpec:
    """The table entry of ``ShmBackend``."""

    def available(self) -> str | None:
        """Return None if the native library is installed and fits this system, else what to do."""
        from colltensor.backends.shm import library

        return library.reason()

    def prepare(self, provider: str | None, host_ids: Sequence[str]) -> None:
        """Load the native library, and what else ``create`` needs."""
        from colltensor.backends.shm import backend, library, segment  # noqa: F401 - for create()

        library.load()

    def create(
        self,
        control: Any,
        meeting: Any,
        *,
        timeout_s: float,
        interface: str | None,
        provider: str | None,
    ) -> ShmBackend:
        """Make the segment and share it. All ranks call.

        Args:
            control: The group's control plane.
            meeting: Where the ranks met: its secret guards the hand-over, its host ids say who
                shares a host.
            timeout_s: How long that may take.
            interface: Ignored: nothing goes over the network.
            provider: Not an option here.

        Raises:
            BackendUnavailableError: The ranks are not all on this host, or a rank has no library.
                Or there is not enough memory, or it turns out not to be shared. Raised on every
                rank; ``control`` goes on.
            OptionError: A ``provider``.
        """
        if control is None:
            raise GroupError(
                "backend 'shm' needs a control plane; use backend='loopback' for one rank on its own"
            )
        if provider is not None:
            raise OptionError(
                f"backend 'shm' has no providers: expected provider=None, got {provider!r}"
            )
        from colltensor.backends.shm import segment
        from colltensor.backends.shm.backend import ShmBackend

        return ShmBackend(
            control, segment.share(control, meeting, time.monotonic() + timeout_s), timeout_s
        )


SPEC: Final = ShmSpec()
