"""What the package uses of torch that has no public name. Tested with torch 2.6 to 2.13."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final

import torch

from colltensor._compat import note_version

note_version("torch", torch.__version__, "2.13")

increment_version: Final = getattr(
    torch._C, "_increment_version", torch.autograd.graph.increment_version
)
"""torch's own function below its public one, or the public one where there is no other.

The public one's isinstance check takes a third of its time.
"""

current_raw_stream: Final = getattr(torch._C, "_cuda_getCurrentRawStream", None)
"""The number of a device's current stream. None in builds without CUDA.

torch's own compiled code asks this function. ``torch.cuda.current_stream`` makes an object and
costs five times as much.
"""

tensor_guards: Final[Any] = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None
)
"""The check of many tensors at once that guards torch's compiled code; None without one."""

is_functional_tensor: Final = getattr(torch, "_is_functional_tensor", lambda tensor: False)
foreach_copy: Final = torch._foreach_copy_
"""Copies many tensors in one call; torch's optimizers use it."""


def current_autograd_node() -> Callable[[], Any]:
    """Return what gives the node that autograd runs in this thread, None outside of it."""
    return torch._C._current_autograd_node


def queue_callback() -> Callable[[Callable[[], None]], None]:
    """Return what has a function called when the backward pass is over."""
    queue: Callable[[Callable[[], None]], None] = (
        torch.autograd.Variable._execution_engine.queue_callback
    )
    return queue


def c10d() -> Any:
    """Return torch.distributed's own module, whose stubs leave out what is new."""
    return torch._C._distributed_c10d


def backend_config(group: Any) -> str | None:
    """Return what was asked for a group, ``"cpu:gloo,cuda:nccl"``; None before torch knows."""
    from torch.distributed import distributed_c10d

    found: str | None = distributed_c10d._world.pg_backend_config.get(group)
    return found


def registered_backends() -> Collection[str]:
    """Return the names of the backends of others that torch.distributed knows, in capitals."""
    from torch.distributed import Backend

    known: Collection[str] = getattr(Backend, "_plugins", ())
    return known


def profiler_enabled() -> Callable[[], bool]:
    """Return what returns whether torch's profiler records."""
    return torch.autograd._profiler_enabled  # type: ignore[attr-defined]
