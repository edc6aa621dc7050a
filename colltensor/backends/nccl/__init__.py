"""nccl: CUDA tensors of every framework, through ``cupy.cuda.nccl``.

Imports cupy only where a group is made.

    backend          the operations, as calls of NCCL
    reductions       how data types and reduce ops are spelt, and what stands in where NCCL has none
    communicators    made on first use, one for all ranks and one for each pair
    streams          streams and events: what comes after what
    watchdog         the thread that notices late and dead peers, and ends what waits for them
    driver           CUDA and NCCL as cupy offers them
"""

from __future__ import annotations

import functools
import importlib
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from colltensor.errors import BackendUnavailableError

if TYPE_CHECKING:
    from colltensor.backends.nccl.backend import NcclBackend

_INSTALL: Final = (
    "pip install 'cupy-cuda13x>=14', which needs CUDA 13 (for CUDA 12: pip install cupy-cuda12x)"
)


class NcclSpec:
    """The backend's entry in the table."""

    def available(self) -> str | None:
        """Return None if there are CuPy, libnccl and a CUDA device, else what to do."""
        if find_spec("cupy") is None:
            return f"NCCL is used through CuPy, which is not installed: {_INSTALL}"
        return _missing(os.environ.get("CUDA_VISIBLE_DEVICES"))

    def create(
        self,
        control: Any,
        meeting: Any,
        *,
        timeout_s: float,
        interface: str | None,
        provider: str | None,
    ) -> NcclBackend:
        """Make the backend. Nothing is connected before the first call that needs it.

        Args:
            control: The group's ControlPlane; None for one rank on its own.
            meeting: Not used: NCCL finds its own way between the ranks.
            timeout_s: How long a call may take once its turn has come on the device.
            interface: Not used; NCCL reads ``NCCL_SOCKET_IFNAME``.
            provider: Not used.

        Raises:
            BackendUnavailableError: NCCL cannot be used here.
        """
        reason = self.available()
        if reason is not None:
            raise BackendUnavailableError(f"backend 'nccl' cannot be used here: {reason}")
        driver = importlib.import_module("colltensor.backends.nccl.driver").CupyDriver()
        backend: NcclBackend = importlib.import_module(
            "colltensor.backends.nccl.backend"
        ).NcclBackend(control, timeout_s, driver)
        return backend


SPEC: Final = NcclSpec()


@functools.lru_cache(maxsize=4)
def _missing(visible: str | None) -> str | None:
    """Return what is missing, given CUDA_VISIBLE_DEVICES.

    It is looked at once, because that imports cupy.
    """
    try:
        nccl = importlib.import_module("cupy.cuda.nccl")
        runtime = importlib.import_module("cupy.cuda.runtime")
    except ImportError as error:
        return f"CuPy is installed but cannot be imported: {error}; {_INSTALL}"
    if not nccl.available:
        return "CuPy finds no libnccl: pip install nvidia-nccl-cu13 (for CUDA 12: nvidia-nccl-cu12)"
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return f"there is no CUDA device that can be used: {error}; check nvidia-smi and the driver"
    return None if count else f"CUDA sees no device (CUDA_VISIBLE_DEVICES is {visible!r})"
