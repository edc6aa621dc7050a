"""What ranks of the tests of the torch.distributed backend do first."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def world(
    rank: int,
    world_size: int,
    path: Path,
    *,
    backend: str = "cpu:colltensor",
    timeout_s: float = 20.0,
) -> Iterator[tuple[Any, Any]]:
    """Yield torch and torch.distributed, initialised through a file of that name; destroyed in the end."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    importlib.import_module("colltensor.torch")
    dist = torch.distributed
    dist.init_process_group(
        backend,
        init_method=f"file://{path}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        yield torch, dist
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def values(torch: Any, rank: int, count: int = 6, dtype: Any = None) -> Any:
    """Return values of a rank's own, small and without rounding in sums and products of three ranks."""
    return (torch.arange(count) % 4 + rank + 1).to(dtype or torch.float32)


def plain(value: Any) -> Any:
    """Return what can be compared and pickled."""
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if hasattr(value, "dtype"):
        return str(value.dtype), tuple(value.shape), value.resolve_conj().reshape(-1).tolist()
    return value
