"""A short run of the random collectives; ``shm_campaign.py`` makes the long one."""

from __future__ import annotations

import pytest
from pool import RankPool
from shm_ranks import fresh
from shm_stress import play

pytestmark = [pytest.mark.shm, pytest.mark.slow]


@pytest.mark.parametrize(
    ("size", "steps", "threads"), [(2, 700, 2), (3, 500, 1), (4, 300, 2), (8, 120, 1)]
)
def test_random_collectives(pool: RankPool, size: int, steps: int, threads: int) -> None:
    assert (
        pool.run(size, play, fresh(), 1000 + size, steps, threads, timeout_s=110.0)
        == [steps * threads] * size
    )
