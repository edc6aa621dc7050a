"""Groups of more actors than cores: they meet within seconds, and every rank has the sum."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
from crew import FIRST_NODE, new_name

import colltensor as col

RANKS = 16
MEET_WITHIN_S = 10.0
"""What `python benchmarks scale` holds 64 ranks to; these take a tenth of it and less."""


def join(rank: int, name: str) -> str:
    return col.init_collective_group(RANKS, rank, group_name=name).backend


def total(rank: int, name: str) -> list[float]:
    return col.allreduce(np.full(256, rank + 1.0, np.float32), name)[[0, -1]].tolist()


def test_sixteen_actors_meet(spawn: Callable[..., Any]) -> None:
    actors = [spawn(resources={FIRST_NODE: 0.01}) for _ in range(RANKS)]
    ray.get([actor.pid.remote() for actor in actors], timeout=60)
    for way in ("declared", "imperative"):
        name = new_name()
        began = time.monotonic()
        if way == "declared":
            col.create_collective_group(actors, group_name=name)
        else:
            joined = [actor.run.remote(join, rank, name) for rank, actor in enumerate(actors)]
            assert set(ray.get(joined, timeout=60)) == {"shm"}
        assert time.monotonic() - began < MEET_WITHIN_S, way
        sums = ray.get(
            [actor.run.remote(total, rank, name) for rank, actor in enumerate(actors)], timeout=60
        )
        assert sums == [[RANKS * (RANKS + 1) / 2] * 2] * RANKS
        ray.get(
            [actor.run.remote(col.destroy_collective_group, name) for actor in actors], timeout=60
        )
