"""The pool of ranks itself: results by rank, reuse, and what is said of ranks that fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pool import RankPool, RanksFailedError, group_of

pytestmark = pytest.mark.slow


def rank_and_pid(rank: int, world_size: int, factor: int) -> tuple[int, int, int]:
    return rank * factor, world_size, os.getpid()


def threads_and_platform(rank: int, world_size: int) -> list[str | None]:
    return [
        os.environ.get(name)
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "JAX_PLATFORMS")
    ]


def raise_in_rank(rank: int, world_size: int, culprit: int) -> int:
    if rank == culprit:
        raise ValueError(f"rank {rank} of {world_size} does not want to")
    return rank


def die_in_rank(rank: int, world_size: int, culprit: int) -> int:
    if rank == culprit:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return rank


def sleep_in_rank(rank: int, world_size: int, culprit: int, stop: bool) -> int:
    if rank == culprit:
        if stop:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)
    return rank


def exit_in_rank(rank: int, world_size: int) -> None:
    sys.exit(3)


def start_grandchild_and_hang(rank: int, world_size: int, pid_file: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(pid_file).write_text(str(child.pid))
    time.sleep(60)


def assert_in_rank(rank: int, world_size: int) -> None:
    total = 41 + rank
    assert total == 42


def unpicklable(rank: int, world_size: int) -> object:
    return lambda: rank


def same_group_twice(rank: int, world_size: int) -> tuple[int, int]:
    first, again = group_of(1, "loopback"), group_of(1, "loopback")
    assert first is again
    return id(first), first.world_size


def destroy_the_kept_group(rank: int, world_size: int) -> None:
    group_of(1, "loopback").destroy()


@pytest.fixture
def small_pool(tmp_path: Path) -> RankPool:
    ranks = RankPool(tmp_path)
    yield ranks
    ranks.close()


def word_and_pid(rank: int, world_size: int) -> tuple[str | None, int]:
    return os.environ.get("WORD"), os.getpid()


def test_words_before_the_command_take_turns(tmp_path: Path) -> None:
    ranks = RankPool(tmp_path, prefixes=(("env", "WORD=even"), ("env", "WORD=odd")))
    try:
        results = ranks.run(3, word_and_pid)
        assert [word for word, _ in results] == ["even", "odd", "even"]
        assert tuple(pid for _, pid in results) == ranks.pids
    finally:
        ranks.close()


def test_results_come_by_rank_and_processes_are_reused(pool: RankPool) -> None:
    first = pool.run(3, rank_and_pid, 10)
    assert [result[:2] for result in first] == [(0, 3), (10, 3), (20, 3)]
    pids = [result[2] for result in first]
    assert len(set(pids)) == 3
    assert pool.pids[:3] == tuple(pids)
    assert [result[2] for result in pool.run(2, rank_and_pid, 1)] == pids[:2]


def test_ranks_have_one_thread_each(pool: RankPool) -> None:
    assert pool.run(1, threads_and_platform) == [["1", "1", "cpu"]]


def test_failure_shows_the_traceback_and_keeps_the_processes(pool: RankPool) -> None:
    pids = [result[2] for result in pool.run(2, rank_and_pid, 1)]
    with pytest.raises(RanksFailedError, match=r"1 of 2 .*test_pool\.raise_in_rank") as failure:
        pool.run(2, raise_in_rank, 1)
    assert "ValueError: rank 1 of 2" in str(failure.value)
    assert "in raise_in_rank" in failure.value.reports[1]
    assert isinstance(failure.value.errors[1], ValueError)
    assert failure.value.results == {0: 0}
    assert [result[2] for result in pool.run(2, rank_and_pid, 1)] == pids


def test_bare_assert_shows_its_variables(pool: RankPool) -> None:
    with pytest.raises(RanksFailedError, match=r"(?s)assert total == 42.*total = 41"):
        pool.run(2, assert_in_rank)


def test_exit_is_reported_not_obeyed(pool: RankPool) -> None:
    with pytest.raises(RanksFailedError, match="SystemExit: 3"):
        pool.run(1, exit_in_rank)


def test_result_that_cannot_be_pickled_is_a_failure(pool: RankPool) -> None:
    with pytest.raises(RanksFailedError, match="unpicklable"):
        pool.run(1, unpicklable)


def test_function_must_be_top_level(pool: RankPool) -> None:
    with pytest.raises((AttributeError, TypeError), match=r"lambda|pickle"):
        pool.run(1, lambda rank, world_size: rank)


def test_dead_rank_is_reported_and_replaced(small_pool: RankPool) -> None:
    pids = [result[2] for result in small_pool.run(2, rank_and_pid, 1)]
    with pytest.raises(RanksFailedError, match="SIGKILL") as failure:
        small_pool.run(2, die_in_rank, 1)
    assert "last words" in failure.value.reports[1]
    again = [result[2] for result in small_pool.run(2, rank_and_pid, 1)]
    assert again[0] == pids[0]
    assert again[1] != pids[1]


def test_expected_death_is_no_failure(small_pool: RankPool) -> None:
    assert small_pool.run(2, die_in_rank, 1, may_die=(1,)) == [0, None]


@pytest.mark.parametrize("stop", [False, True], ids=["sleeping", "stopped"])
def test_overrun_shows_the_stack_and_ends_the_rank(small_pool: RankPool, stop: bool) -> None:
    small_pool.run(2, rank_and_pid, 1)
    pids = small_pool.pids
    began = time.monotonic()
    with pytest.raises(RanksFailedError, match="rank 1: ") as failure:
        small_pool.run(2, sleep_in_rank, 1, stop, timeout_s=0.5)
    assert time.monotonic() - began < 5
    assert "sleep_in_rank" in failure.value.reports[1]
    assert list(failure.value.reports) == [1]
    with pytest.raises(ProcessLookupError):
        os.kill(pids[1], 0)
    assert small_pool.run(2, rank_and_pid, 1)[0][2] == pids[0]


def test_overrun_ends_what_the_rank_started(small_pool: RankPool, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(RanksFailedError):
        small_pool.run(1, start_grandchild_and_hang, str(pid_file), timeout_s=1.5)
    stat = Path(f"/proc/{pid_file.read_text()}/stat")
    deadline = time.monotonic() + 5
    while stat.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not stat.exists()


def test_close_ends_every_process(tmp_path: Path) -> None:
    ranks = RankPool(tmp_path)
    ranks.run(2, rank_and_pid, 1)
    pids = ranks.pids
    ranks.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    ranks.close()


def test_idle_rank_that_died_is_replaced_in_the_run_after(small_pool: RankPool) -> None:
    small_pool.run(1, rank_and_pid, 1)
    os.kill(small_pool.pids[0], signal.SIGKILL)
    with pytest.raises(RanksFailedError, match="SIGKILL"):
        small_pool.run(1, rank_and_pid, 1)
    assert small_pool.run(1, rank_and_pid, 1)[0][0] == 0


def test_kept_group_is_reused(pool: RankPool) -> None:
    pool.run(1, rank_and_pid, 1)
    first = pool.run(1, same_group_twice)[0]
    assert first[1] == 1
    assert pool.run(1, same_group_twice)[0] == first


def test_destroyed_kept_group_is_made_again(pool: RankPool) -> None:
    pool.run(1, destroy_the_kept_group)
    assert pool.run(1, same_group_twice)[0][1] == 1


def test_group_of_works_in_ranks_only() -> None:
    with pytest.raises(RuntimeError, match=r"\bgroup_of\b"):
        group_of(1, "loopback")
