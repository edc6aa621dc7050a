"""The backends of other devices than the CPU in a process group.

One such group is ``"cpu:colltensor,cuda:nccl"``. torch makes no further backend once one of them is
a ProcessGroup. So they are made here when the first of their tensors comes.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from colltensor._compat.torch import backend_config
from colltensor.errors import DeviceError, OptionError

_TYPES = {"gloo": dist.ProcessGroup.BackendType.GLOO, "nccl": dist.ProcessGroup.BackendType.NCCL}


class DelegatedBackends:
    """The backends of other devices, in a process group of torch's own."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._timeout = timeout
        self._group: Any = None
        self._made: dict[str, Any] = {}
        self._config: str | None = None

    def inherit(self, owner: Any, others: DelegatedBackends) -> None:
        """Have the backends that ``owner``, which has ``others``, was asked for."""
        self._config = others._asked_config(owner)

    def known(self, owner: Any) -> bool:
        """Return True once torch has told for which devices ``owner`` is, after making it."""
        return self._config is not None or backend_config(owner) is not None

    def devices(self, owner: Any) -> list[torch.device]:
        """Return the devices that ``init_process_group`` was asked for, beside the CPU."""
        return [torch.device(device) for device in self._asked(owner)]

    def group_for(self, owner: Any, device: torch.device) -> Any:
        """Return the process group for tensors on a device.

        Raises:
            DeviceError: ``owner`` was made without a backend for it.
            OptionError: With one that cannot be made here.
        """
        self.backend_for(owner, device)
        return self._group

    def backend_for(self, owner: Any, device: torch.device) -> Any:
        """Return the backend for tensors on a device; raises as ``group_for``."""
        found = self._made.get(device.type)
        if found is not None:
            return found
        name = self._asked(owner).get(device.type)
        if name is None:
            raise DeviceError(
                f"the tensor is on {device}, but the process group has backend 'colltensor' for cpu only; move the "
                f"tensor, or name a backend for it: init_process_group('cpu:colltensor,{device.type}:nccl')"
            )
        backend = self._make(name, distributed_c10d.PrefixStore(f"{device.type}/", self._store))
        if self._group is None:
            self._group = dist.ProcessGroup(self._store, self._rank, self._size)
        self._group._register_backend(torch.device(device.type), _TYPES[name], backend)
        self._made[device.type] = backend
        return backend

    def set_timeout(self, timeout: timedelta) -> None:
        """Let calls wait so long."""
        self._timeout = timeout
        if self._group is not None:
            self._group.set_timeout(timeout)

    def shutdown(self) -> None:
        """End the backends."""
        self._store = None
        if self._group is not None:
            self._group.shutdown()

    def abort(self) -> None:
        """Abort the backends."""
        self._store = None
        if self._group is not None:
            self._group.abort()

    def _make(self, name: str, store: Any) -> Any:
        if name == "gloo" and dist.is_gloo_available():
            return dist.ProcessGroupGloo(store, self._rank, self._size, self._timeout)
        if name == "nccl" and dist.is_nccl_available():
            chosen = dist.ProcessGroupNCCL.Options()
            chosen._timeout = self._timeout
            return dist.ProcessGroupNCCL(store, self._rank, self._size, chosen)
        raise OptionError(
            f"init_process_group: backend '{name}' cannot stand beside cpu:colltensor here; expected one of "
            f"{', '.join(_TYPES)} that this torch was built with"
        )

    def _asked(self, owner: Any) -> dict[str, str]:
        """Return the backend asked for by device, but for the CPU's."""
        pairs = (pair.split(":") for pair in self._asked_config(owner).split(","))
        return {device: name for device, name in pairs if device != "cpu"}

    def _asked_config(self, owner: Any) -> str:
        return backend_config(owner) or self._config or "cpu:colltensor"
