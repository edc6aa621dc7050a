"""What the package uses of Ray that has no public name. Tested with Ray 2.50 to 2.60."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from colltensor._compat import note_version

note_version("ray", ray.__version__, "2.60")


def is_connected() -> bool:
    """Return whether this process is a part of a cluster, without starting one."""
    return bool(ray._private.worker.global_worker.connected)


def timeline_event(category: bytes, facts: Mapping[str, str]) -> Any:
    """Return a context that is an event of ``ray timeline``.

    ``ray._private.profiling.profile`` makes the same one, but only under RAY_PROFILING.
    """
    return ray._private.worker.global_worker.core_worker.profile_event(category, facts)


def collective_registry(module: Any) -> Any:
    """Return what Ray knows of others' backends, for which it has no public question."""
    return module._global_registry
