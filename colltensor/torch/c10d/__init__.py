"""torch.distributed on our transports, by ``dist.init_process_group("cpu:colltensor")``.

That works after ``import colltensor.torch``. This module names the backend to torch; the rest is
imported when a group is made.

process_group   the ProcessGroup: all collectives, on one Group
base            its parts: how its operations run, point-to-point, and its end
identity        what torch asks the group about itself
payloads        from torch's arguments to what moves, where that is more than one call of a Group
transfers       send and recv by tag, on a Group for each direction of a pair; their deadlines
inbox           the receives of one rank, and messages that came before them
standoffs       ranks that wait for each other in sends or receives
work            operations: their order, their handles and futures
delegated       the backends of other devices of the same group
meeting         how ranks meet through a c10d store
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from colltensor._compat import torch as _compat

if TYPE_CHECKING:
    from colltensor.torch.c10d.process_group import ColltensorProcessGroup

NAME = "colltensor"
_operators: list[Any] = []  # torch forgets an operator whose library is gone


def register() -> None:
    """Let torch.distributed know the backend; nothing where torch was built without it."""
    if dist.is_available():
        # torch 2.6 takes a name once, by any function
        if NAME.upper() not in _compat.registered_backends():
            dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu"])
        if hasattr(torch.ops._c10d_functional, "all_gather_into_tensor_out"):
            # torch types neither of the two calls.
            library = torch.library.Library("_c10d_functional", "IMPL")  # type: ignore[no-untyped-call]
            _operators.append(library)
            library.impl("all_gather_into_tensor_out", _gather_into, "CPU")  # type: ignore[no-untyped-call]


def _gather_into(source: torch.Tensor, size: int, group: Any, *, out: torch.Tensor) -> torch.Tensor:
    """Do torch's operator for CPU tensors: its own calls no method of a group made in Python."""
    c10d = _compat.c10d()
    found = c10d._resolve_process_group(group) if isinstance(group, str) else group
    opts = c10d.AllgatherOptions()
    opts.asyncOp = True
    c10d._register_work(out, found._allgather_base(out, source, opts))
    return out


def create(options: Any, backend_options: Any) -> ColltensorProcessGroup:
    """Make the process group of the ranks that torch names; all of them call.

    Args:
        options: torch's ``DistributedBackendOptions``: store, rank, size, timeout, name.
        backend_options: What ``init_process_group`` got as ``pg_options``; there are none for this
            backend.

    Raises:
        CollectiveError: The ranks do not meet before the timeout, or cannot be connected.
    """
    from colltensor.errors import OptionError
    from colltensor.torch.c10d.process_group import ColltensorProcessGroup

    refusal = None
    if backend_options is not None:  # of this rank, perhaps: the others are meeting
        refusal = OptionError(
            f"init_process_group: pg_options: backend '{NAME}' has none, got {backend_options!r}"
        )
    return ColltensorProcessGroup(
        options.store,
        options.group_rank,
        options.group_size,
        options.timeout,
        options.group_id,
        refusal,
    )
