"""Starts Ray on this machine and an actor for each rank, waits for them, and stops Ray.

python -m harness.ray_world SETTINGS
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import contextmanager
from typing import Any

import ray

from harness.rank import Settings, serve


@contextmanager
def local_ray(cpus: int, **options: Any) -> Any:
    """Run Ray on this machine for the length of a ``with`` block."""
    small = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 100 << 20}
    try:
        yield ray.init(num_cpus=cpus, **small, **options)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    settings = Settings(**json.loads(sys.argv[1]))
    own = {"_node_ip_address": "127.0.0.1", "_temp_dir": f"{settings.folder}/ray"}
    with local_ray(settings.ranks, **own):
        rank_of = ray.remote(num_cpus=1)(serve)
        ray.get([rank_of.remote(settings, rank) for rank in range(settings.ranks)])
