"""Late, dead and disagreeing ranks on a device: the host never hangs, the ranks are named, the stream runs on."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_streams import Queue, shared_group
from pool import RankPool

import colltensor as col

TIMEOUT_S = 4.0
LIMIT_S = 30.0


def own_group(rank: int, folder: str, *, check: bool = False, timeout_s: float = TIMEOUT_S) -> Any:
    """Return a group that may break, and soon: made once both ranks are there, of which one may be new, and warm."""
    shared = shared_group(2)
    shared.allreduce(importlib.import_module("cupy").ones(1, "float32"))
    shared.barrier()
    return col.init_collective_group(
        2, rank, "nccl", "failing", timeout_s=timeout_s, init_method=f"file://{folder}", check=check
    )


def settle(work: Any) -> None:
    """Wait until a work is done or failed, on the host."""
    until = time.monotonic() + LIMIT_S
    while not work.done():
        assert time.monotonic() < until, "it hangs"
        time.sleep(0.01)


def runs_on(queue: Queue) -> None:
    """Check that the stream comes to its end after an abort, and can be used."""
    event = queue.mark()
    until = time.monotonic() + LIMIT_S
    while not queue.passed(event):
        assert time.monotonic() < until, "the stream hangs"
        time.sleep(0.01)
    assert queue.read(queue.full(5.0)) == {5.0}


def absent(rank: int, world_size: int, library: str, folder: str) -> Any:
    with Queue(library) as queue:
        group = own_group(rank, folder)
        tensor = queue.full(1.0)
        group.allreduce(tensor)
        group.barrier()
        error = None
        if rank == 1:
            time.sleep(TIMEOUT_S + 3)
            with pytest.raises(col.CollectiveError):
                group.allreduce(tensor)
        else:
            work = group.allreduce(tensor, async_op=True)
            settle(work)
            with pytest.raises(col.CollectiveTimeoutError) as caught:
                work.wait()
            error = str(caught.value), caught.value.ranks
            for call in (lambda: group.allreduce(tensor), lambda: group.synchronize()):
                with pytest.raises(col.CollectiveError, match="failing"):
                    call()
        runs_on(queue)
        group.destroy()
        again = own_group(rank, folder, timeout_s=LIMIT_S)  # rank 1 is still asleep
        fresh = queue.full(1.0 + rank)
        again.allreduce(fresh)
        assert queue.read(fresh) == {3.0}, "the group made again"
        again.barrier()
        again.destroy()
        return error


def test_a_rank_that_does_not_come(pair: RankPool, library: str, tmp_path: Path) -> None:
    message, ranks = pair.run(2, absent, library, str(tmp_path))[0]
    assert ranks == (1,)
    assert "failing" in message
    assert "rank 1" in message


def synchronous(rank: int, world_size: int, library: str, folder: str) -> Any:
    """A synchronous call returns before it fails: what comes next raises, and the barrier does."""
    with Queue(library) as queue:
        group = own_group(rank, folder)
        tensor = queue.full(1.0)
        group.allreduce(tensor)
        group.barrier()
        if rank == 1:
            time.sleep(TIMEOUT_S + 3)
        else:
            group.allreduce(tensor)
            time.sleep(TIMEOUT_S + 2)
        with pytest.raises(col.CollectiveError) as caught:
            group.barrier()
        runs_on(queue)
        group.destroy()
        return str(caught.value)


def test_the_next_call_raises(pair: RankPool, library: str, tmp_path: Path) -> None:
    for message in pair.run(2, synchronous, library, str(tmp_path)):
        assert "failing" in message


def killed(rank: int, world_size: int, library: str, folder: str) -> Any:
    with Queue(library) as queue:
        group = own_group(rank, folder)
        tensor = queue.full(1.0)
        group.allreduce(tensor)
        group.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        work = group.allreduce(tensor, async_op=True)
        settle(work)
        with pytest.raises(col.PeerLostError) as caught:
            work.wait()
        runs_on(queue)
        group.destroy()
        return caught.value.ranks


def test_a_rank_that_is_killed(pair: RankPool, library: str, tmp_path: Path) -> None:
    assert pair.run(2, killed, library, str(tmp_path), may_die=[1])[0] == (1,)


def never_connects(rank: int, world_size: int, library: str, folder: str) -> Any:
    with Queue(library) as queue:
        group = own_group(rank, folder)
        if rank == 1:
            time.sleep(TIMEOUT_S + 3)
            group.destroy()
            return None
        with pytest.raises(col.CollectiveTimeoutError) as caught:
            group.allreduce(queue.full(1.0))
        runs_on(queue)
        group.destroy()
        return caught.value.ranks


def test_connecting_is_bounded(pair: RankPool, library: str, tmp_path: Path) -> None:
    assert pair.run(2, never_connects, library, str(tmp_path))[0] == (1,)


def first_of_its_kind(rank: int, world_size: int, library: str, folder: str) -> Any:
    """NCCL connects the ranks of an algorithm when it is first used, and may wait for them inside the call."""
    with Queue(library) as queue:
        group = own_group(rank, folder)
        tensor = queue.full(1.0)
        group.allreduce(tensor)
        group.barrier()
        began = time.monotonic()
        if rank == 1:
            time.sleep(TIMEOUT_S + 3)
        with contextlib.suppress(col.CollectiveError):
            group.alltoall(
                [queue.full(0.0), queue.full(0.0)], [tensor, tensor]
            ) if rank == 0 else None
        if rank == 0:
            time.sleep(max(0.0, TIMEOUT_S + 2 - (time.monotonic() - began)))
        with pytest.raises(col.CollectiveError) as caught:
            group.barrier()
        assert time.monotonic() - began < LIMIT_S
        runs_on(queue)
        group.destroy()
        return str(caught.value)


def test_a_call_that_connects_is_bounded(pair: RankPool, library: str, tmp_path: Path) -> None:
    for message in pair.run(2, first_of_its_kind, library, str(tmp_path)):
        assert "rank 1" in message


def disagree(rank: int, world_size: int, library: str, folder: str) -> Any:
    with Queue(library) as queue:
        group = own_group(rank, folder, check=True)
        tensor = queue.full(1.0 + rank)
        with pytest.raises(col.MismatchError) as caught:
            group.allreduce(tensor[:7] if rank == 1 else tensor)
        assert queue.read(tensor) == {1.0 + rank}, "data was changed"
        group.allreduce(tensor)
        assert queue.read(tensor) == {3.0}
        group.barrier()
        group.destroy()
        return caught.value.ranks


def test_check_names_who_differs(pair: RankPool, library: str, tmp_path: Path) -> None:
    for ranks in pair.run(2, disagree, library, str(tmp_path)):
        assert 1 in ranks


def long_before(rank: int, world_size: int, library: str, folder: str) -> None:
    """The group's timeout counts from when the call's turn has come on the device."""
    with Queue(library) as queue:
        group = own_group(rank, folder)
        tensor = queue.full(1.0 + rank)
        group.allreduce(queue.full(0.0))
        queue.synchronize()
        group.barrier()
        queue.sleep(TIMEOUT_S + 2)
        group.allreduce(tensor)
        assert queue.read(tensor) == {3.0}
        group.barrier()
        group.destroy()


def test_a_long_kernel_before_is_no_timeout(pair: RankPool, library: str, tmp_path: Path) -> None:
    pair.run(2, long_before, library, str(tmp_path))


def leaves_early(rank: int, world_size: int, library: str, folder: str) -> None:
    """Rank 0 leaves as soon as it is done, while rank 1's stream has not come to reading its result."""
    with Queue(library) as queue:
        for turn in range(10):
            group = own_group(rank, folder)
            tensor = queue.full(1.0 + rank, 1 << 22)
            group.allreduce(tensor)
            if rank == 1:
                assert queue.read(tensor) == {3.0}, turn
            group.destroy()


def test_a_rank_that_leaves_at_once_harms_nobody(
    pair: RankPool, library: str, tmp_path: Path
) -> None:
    pair.run(2, leaves_early, library, str(tmp_path), timeout_s=120)


def both_ways(rank: int, world_size: int, library: str) -> None:
    """``auto`` sends each tensor its own way, whatever went before."""
    group = shared_group(2, "auto")
    with Queue(library) as queue:
        for turn in range(3):
            host, tensor = np.full(100, 1.0 + rank + turn), queue.full(1.0 + rank + turn)
            group.allreduce(host)
            work = group.allreduce(tensor, async_op=True)
            group.broadcast(host, 1)
            work.wait()
            assert host.tolist() == [3.0 + 2 * turn] * 100
            assert queue.read(tensor) == {3.0 + 2 * turn}
        group.barrier()


def test_auto_with_host_and_device(pair: RankPool, library: str) -> None:
    pair.run(2, both_ways, library)
