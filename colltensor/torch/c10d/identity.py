"""Identity: what torch asks a group about itself: rank, size, names, store, what it supports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    # each of its methods has several signatures, none of which is what torch itself calls
    _ProcessGroup = object
else:
    _ProcessGroup = dist.ProcessGroup


class Identity(_ProcessGroup):
    """Who a process group is.

    Attributes:
        supports_splitting: False: torch's Python ``split_group`` is for NCCL's; the method of that
            name works.
        supports_coalescing: False: a batch of sends and receives needs no coalescing.
        supports_time_estimate: False.
    """

    supports_splitting = False
    supports_coalescing = False
    supports_time_estimate = False

    def __init__(self, rank: int, size: int, store: Any, name: str) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # see above
        self._rank = rank
        self._size = size
        self._given_store = store
        self._label = name
        self._description = "undefined"

    def rank(self) -> int:
        """Return this process's rank in the group."""
        return self._rank

    def size(self) -> int:
        """Return the number of ranks."""
        return self._size

    def getBackendName(self) -> str:  # noqa: N802 - torch's
        """Return the backend's name."""
        return "colltensor"

    name = getBackendName
    _get_backend_name = getBackendName

    def getGroupName(self) -> str:  # noqa: N802 - torch's
        """Return torch's name of the group; its own class asks a backend, and here is none."""
        return self._label

    def _set_group_name(self, name: str) -> None:
        self._label = name

    setGroupName = _set_group_name  # noqa: N815 - torch's
    group_name = property(getGroupName)

    def getGroupDesc(self) -> str:  # noqa: N802 - torch's
        """Return what the group is for, in words."""
        return self._description

    def _set_group_desc(self, description: str) -> None:
        self._description = description

    setGroupDesc = _set_group_desc  # noqa: N815 - torch's
    group_desc = property(getGroupDesc)

    def get_group_store(self) -> Any:
        """Return the store that the group was made with."""
        return self._given_store

    @property
    def bound_device_id(self) -> None:
        """None, whatever ``init_process_group`` gets as ``device_id``.

        With one, torch's ``new_group`` has the ranks that are no members of the new group take part
        in a split. It splits the backend of that device, whose other ranks, here, make a new one
        instead.
        """
        return None

    @bound_device_id.setter
    def bound_device_id(self, device: torch.device | None) -> None:
        pass
