"""Starts Ray on this machine and an actor for each rank, waits for them, and stops Ray.

python -m harness.ray_world SETTINGS
"""

from __future__ import annotations

import signal
import sys

import ray

from harness.rank import Settings, serve


@ray.remote(num_cpus=1)
class Actor:
    """One rank."""

    def serve(self, settings: str, rank: int) -> None:
        """Be the rank until the coordinator hangs up."""
        serve(Settings.load(settings), rank)


def main() -> None:
    """Hold the actors until they are done."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    settings = Settings.load(sys.argv[1])
    try:
        ray.init(
            num_cpus=settings.ranks,
            include_dashboard=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=f"{settings.folder}/ray",
            object_store_memory=100 << 20,
        )
        actors = [Actor.remote() for _ in range(settings.ranks)]
        ray.get([actor.serve.remote(sys.argv[1], rank) for rank, actor in enumerate(actors)])
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
