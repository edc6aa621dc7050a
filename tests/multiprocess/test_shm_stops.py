"""Ranks that are late, stopped or slow: named by the timeout on every rank, in whatever they were doing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
from kills import PHASES
from pool import RankPool
from shm_ranks import fresh, own_group

import colltensor as col

pytestmark = [pytest.mark.shm, pytest.mark.slow]


def repeat(group: Any, phase: str) -> None:
    draw = random.Random(phase)
    while True:
        PHASES[phase][0](group, draw)


def stop_in(rank: int, size: int, name: str, phase: str) -> tuple[float, tuple[int, ...]]:
    """Rank 0 stops rank 1 in the middle of what all repeat, and lets it go on when all others have given up."""
    with own_group(rank, size, name, timeout_s=1.5) as group:
        pids = group.allgather_object(os.getpid())
        stopped_at = time.monotonic() + 0.21
        if rank == 0:
            threading.Timer(0.21, os.kill, (pids[1], signal.SIGSTOP)).start()
            resume = threading.Timer(3.0, os.kill, (pids[1], signal.SIGCONT))
            resume.start()
        with pytest.raises(col.CollectiveTimeoutError) as caught:
            repeat(group, phase)
        took = time.monotonic() - stopped_at
        if rank == 0:
            resume.join()
        return took, caught.value.ranks


@pytest.mark.parametrize("phase", ["small", "asleep", "transfers", "asynchronous", "others"])
def test_a_stopped_rank_is_late_whatever_it_did(pool: RankPool, phase: str) -> None:
    found = pool.run(3, stop_in, fresh(), phase)
    assert [ranks for _, ranks in found] == [(1,)] * 3
    assert max(found[0][0], found[2][0]) < 2.3, found


class Slow:
    """A control plane whose rank takes its time to say what it disagrees about."""

    def __init__(self, control: Any) -> None:
        self._control = control

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._control, name)
        if name not in ("agree", "start_pair"):
            return found

        def later(*arguments: Any) -> Any:
            time.sleep(0.6)
            return found(*arguments)

        return later


def disagree_late(rank: int, size: int, name: str, transfer: bool) -> None:
    """The last rank comes within the timeout, and is slow to say its part: still a mismatch, and the group goes on."""
    with own_group(rank, size, name, timeout_s=1.0) as group:
        group.barrier()
        if rank == 1:
            time.sleep(0.6)
            outcomes = group._backend._error_mapping
            outcomes._control = Slow(outcomes._control)
        mine = np.ones(5 + rank)
        call = group.allreduce
        if transfer:
            call = partial(group.send, dst_rank=1) if rank == 0 else partial(group.recv, src_rank=0)
        with pytest.raises(col.MismatchError):
            call(mine)
        assert (mine == 1).all()
        assert float(group.allreduce(np.ones(3))[0]) == size


@pytest.mark.parametrize("transfer", [False, True])
def test_a_mismatch_just_before_the_timeout(pool: RankPool, transfer: bool) -> None:
    pool.run(2, disagree_late, fresh(), transfer)


def hold_the_lock(rank: int, size: int, name: str) -> float:
    """Rank 0's other thread holds the interpreter lock while rank 0 waits: rank 2, which is late, is named alone."""
    import ctypes

    with own_group(rank, size, name, timeout_s=1.2) as group:
        group.barrier()
        if rank == 0:
            threading.Timer(0.3, ctypes.PyDLL(None).usleep, (1_500_000,)).start()
        if rank == 2:
            time.sleep(2.2)
        with pytest.raises(col.CollectiveTimeoutError) as caught:
            group.allreduce(np.ones(900_000))
        assert caught.value.ranks == (2,)
        return 0.0


def test_a_busy_interpreter_is_not_a_late_rank(pool: RankPool) -> None:
    pool.run(3, hold_the_lock, fresh())


BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"


def wait_beside_busy_loops(rank: int, size: int, name: str) -> tuple[float, float]:
    """All on one core; the last rank comes neither for the first call nor for the second, in a group of its own."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(3 if rank == 0 else 0)]
    took = [0.0, 0.0]
    try:
        for number, timeout_s in enumerate((1.0, 60.0)):
            with own_group(rank, size, f"{name}-{number}", timeout_s=60) as group:
                for _ in range(20):
                    group.allreduce(np.ones(4))
                group.set_timeout(timeout_s)
                if rank == size - 1:
                    time.sleep(3)
                    continue
                began = time.monotonic()
                if number == 1 and rank == 0:
                    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
                with pytest.raises((col.CollectiveError, KeyboardInterrupt)):
                    group.allreduce(np.ones(4))
                took[number] = time.monotonic() - began
    finally:
        for loop in busy:
            loop.kill()
            loop.wait()
        os.sched_setaffinity(0, cores)
    return took[0], took[1]


def test_timeouts_and_interrupts_hold_beside_busy_loops(pool: RankPool) -> None:
    (late, interrupted), *_ = pool.run(2, wait_beside_busy_loops, fresh())
    assert 1.0 <= late < 2.5
    assert interrupted < 1.3
