"""A few ranks killed at random moments; ``shm_campaign.py --kills 50`` kills more."""

from __future__ import annotations

import pytest
from pool import RankPool
from shm_kills import Trial, run_trial, trials

pytestmark = pytest.mark.shm


@pytest.mark.slow
@pytest.mark.parametrize("trial", trials(10, 7), ids=lambda trial: f"{trial.phase}-{trial.victim}-of-{trial.size}")
def test_the_survivors_of_a_killed_rank(pool: RankPool, trial: Trial) -> None:
    run_trial(pool, trial)
