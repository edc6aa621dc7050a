"""Names the backend to torch, no more, when ``import torch`` runs this entry point.

It is one of the entry points ``torch.backends``. So ``dist.init_process_group("cpu:colltensor")``
works in processes that nobody had import ``colltensor.torch``, as the workers of Ray Train. It
stands beside ``colltensor``, because else an ``import torch`` would load all of that.
TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns such entry points off.
"""

from __future__ import annotations

import logging
from typing import Any


def register() -> None:
    """Let torch.distributed know the backend ``colltensor``.

    Never raises: that would fail ``import torch``.
    """
    try:
        import torch.distributed as dist

        if dist.is_available():
            dist.Backend.register_backend("colltensor", _create, extended_api=True, devices=["cpu"])
    except Exception:  # whatever a torch of another version raises, `import torch` goes on
        logging.getLogger(__name__).debug(
            "torch.distributed does not take the backend 'colltensor'", exc_info=True
        )


def _create(options: Any, backend_options: Any) -> Any:
    """Make a process group: import what makes it."""
    from colltensor.torch import c10d

    return c10d.create(options, backend_options)
