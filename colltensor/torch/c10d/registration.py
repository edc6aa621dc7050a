"""Registers the backend ``colltensor`` with torch.distributed; the rest is imported when a group is made.

Imports torch, and nothing of the package but what makes the process group, then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from colltensor.torch.c10d.process_group import ColltensorProcessGroup

NAME = "colltensor"


def register() -> None:
    """Let ``dist.init_process_group`` and ``dist.new_group`` know the backend; nothing where there is no c10d."""
    if dist.is_available():
        dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu"])


def _create(options: Any, backend_options: Any) -> ColltensorProcessGroup:
    """Make the process group of the ranks that torch names; all of them call.

    Args:
        options: torch's ``DistributedBackendOptions``: store, rank, size, timeout, name.
        backend_options: What ``init_process_group`` got as ``pg_options``; there are none for this backend.

    Raises:
        CollectiveError: The ranks do not meet before the timeout, or cannot be connected.
    """
    from colltensor.errors import OptionError
    from colltensor.torch.c10d.process_group import ColltensorProcessGroup

    if backend_options is not None:
        raise OptionError(f"init_process_group: pg_options: backend '{NAME}' has none, got {backend_options!r}")
    return ColltensorProcessGroup(
        options.store, options.group_rank, options.group_size, options.timeout, options.group_id
    )
