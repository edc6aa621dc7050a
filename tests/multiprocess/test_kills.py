"""A few ranks killed at random moments; ``campaign.py --kills 50`` kills more."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
from kills import LIMIT_S, Trial, run_trial, trials
from pool import RankPool
from shm_ranks import Held, fresh, own_group

import colltensor as col
from colltensor.backends.gloo import library, meshing

needs_native = pytest.mark.skipif(
    library.reason() is not None, reason="the library was built without Gloo"
)
NAMED = "{0.phase}-{0.victim}-of-{0.size}".format


@pytest.mark.slow
@pytest.mark.shm
@pytest.mark.parametrize("trial", trials(10, 7, "shm"), ids=NAMED)
def test_the_survivors_of_a_killed_rank(pool: RankPool, trial: Trial) -> None:
    run_trial(pool, trial)


@pytest.mark.slow
@pytest.mark.gloo
@needs_native
@pytest.mark.parametrize("trial", trials(8, 7, "gloo"), ids=NAMED)
def test_the_survivors_of_a_rank_killed_in_gloo(pool: RankPool, trial: Trial) -> None:
    run_trial(pool, trial)


@pytest.mark.slow
@pytest.mark.shm
@pytest.mark.gloo
@needs_native
@pytest.mark.parametrize("trial", trials(9, 7, "hierarchical")[4::2], ids=NAMED)
def test_the_survivors_of_a_rank_killed_on_one_of_several_hosts(
    pool: RankPool, trial: Trial
) -> None:
    run_trial(pool, trial)


def die_while_connecting(
    rank: int, size: int, name: str, victim: int
) -> tuple[tuple[int, ...], float, list[str]]:
    """A rank dies when all know its address and nobody has reached it; return what the others saw, and when."""
    death = Path(tempfile.gettempdir()) / f"{name}.died"
    if rank == victim:

        def die(*arguments: Any) -> NoReturn:
            death.write_text(str(time.monotonic()))
            os._exit(1)

        meshing._Mesh._is_complete = die  # type: ignore[method-assign]
    before = Held.now()
    with pytest.raises(col.PeerLostError) as caught, own_group(rank, size, name, backend="gloo"):
        pass
    after_s = time.monotonic() - float(death.read_text())
    return caught.value.ranks, after_s, before.left_behind()


@pytest.mark.gloo
@needs_native
@pytest.mark.parametrize("victim", [0, 3])
def test_a_rank_that_dies_while_the_others_connect_to_it(pool: RankPool, victim: int) -> None:
    found = pool.run(4, die_while_connecting, fresh(), victim, may_die=[victim])
    lived = [outcome for rank, outcome in enumerate(found) if rank != victim]
    assert [(ranks, left) for ranks, _, left in lived] == [((victim,), [])] * 3
    assert max(after_s for _, after_s, _ in lived) < LIMIT_S, found
