"""Calls that cannot begin or go on: without a thread for them, behind a call that failed, or past a changed timeout."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from c10d_ranks import world
from pool import RankPool
from shm_ranks import fresh
from test_nested_calls import BACKENDS, made

import colltensor as col


@contextlib.contextmanager
def no_threads() -> Iterator[None]:
    """As many threads as may be are there."""
    start = threading.Thread.start

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    threading.Thread.start = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        threading.Thread.start = start  # type: ignore[method-assign]


def size_of(backend: str) -> int:
    return 4 if backend == "hierarchical" else 2


def call_without_a_thread(rank: int, size: int, name: str, backend: str) -> None:
    with made(backend, rank, size, name, timeout_s=6.0) as group:
        if rank == 0:
            with no_threads():
                for _ in range(2):
                    with pytest.raises(RuntimeError, match=r"\bthread\b"):
                        group.allreduce(np.ones(3), async_op=True)
        data = np.ones(3)
        group.allreduce(data)
        assert (data == size).all()
        group.allreduce(data, async_op=True).wait()
        assert (data == size * size).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_thread_for_an_asynchronous_call(pool: RankPool, backend: str) -> None:
    pool.run(size_of(backend), call_without_a_thread, fresh(), backend)


def transfer_without_a_thread(rank: int, size: int, name: str, backend: str) -> None:
    """No thread for the first transfer; then one for it, and none for another that would run beside it."""
    peer = size - 1 - rank
    with made(backend, rank, size, name, timeout_s=6.0) as group:
        data = np.zeros(3)
        group.allreduce(data)
        if rank % 2 == 0:
            with no_threads():
                for call in (group.send, group.recv):
                    with pytest.raises(RuntimeError, match=r"\bthread\b"):
                        call(np.zeros(3), peer, async_op=True)
            group.send(np.full(3, 5.0), peer)
            sending = group.send(np.full(3, 7.0), peer, async_op=True)
            time.sleep(0.3)  # until its thread has it
            with no_threads():
                for _ in range(2):
                    with pytest.raises(RuntimeError, match=r"\bthread\b"):
                        group.recv(data, peer, async_op=True)
                # behind the send, in its thread
                assert group.allreduce(np.ones(3)).tolist() == [size] * 3
            assert sending.done()
            assert group.recv(data, peer).tolist() == [9.0] * 3
        else:
            assert group.recv(data, peer).tolist() == [5.0] * 3
            time.sleep(0.6)
            assert group.recv(data, peer).tolist() == [7.0] * 3
            group.allreduce(np.ones(3))
            group.send(np.full(3, 9.0), peer)
        works = [
            group.send(np.full(3, float(rank)), peer, async_op=True),
            group.recv(data, peer, async_op=True),
        ]
        for work in works:
            work.wait()
        assert data.tolist() == [peer] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_thread_for_a_transfer_beside_another(pool: RankPool, backend: str) -> None:
    pool.run(size_of(backend), transfer_without_a_thread, fresh(), backend)


def call_torch_without_a_thread(rank: int, size: int, path: Path) -> None:
    with world(rank, size, path, timeout_s=6.0) as (torch, dist):
        data = torch.ones(3)
        if rank == 0:
            with no_threads():
                for call in (
                    lambda: dist.all_reduce(torch.ones(3), async_op=True),
                    lambda: dist.isend(torch.ones(3), 1),
                    lambda: dist.irecv(torch.ones(3), 1),
                    lambda: dist.irecv(torch.ones(3), 1),
                ):
                    with pytest.raises(RuntimeError, match=r"\bthread\b"):
                        call()
        dist.all_reduce(data)
        dist.all_reduce(data, async_op=True).wait()
        assert (data == size * size).all()
        if rank == 0:
            dist.send(torch.full((3,), 7.0), 1)
            dist.recv(data, 1)
        else:
            dist.recv(data, 0)
            dist.send(data + 1, 0)
        assert float(data[0]) == (8 if rank == 0 else 7)
        time.sleep(0.3)
        dist.barrier()


@pytest.mark.shm
@pytest.mark.needs("torch")
def test_no_thread_for_an_operation_of_torch_distributed(pool: RankPool, tmp_path: Path) -> None:
    pool.run(2, call_torch_without_a_thread, tmp_path / "meet")


def queue_behind_a_loss(
    rank: int, size: int, name: str, backend: str, how: str
) -> list[tuple[str, tuple[int, ...]]]:
    """The last rank does not take part; the first has several calls under way."""
    with made(backend, rank, size, name, timeout_s=1.5) as group:
        group.allreduce(np.ones(3))
        if rank == size - 1:
            if how == "dies":
                time.sleep(0.3)
                os._exit(0)
            if how == "leaves":
                time.sleep(0.3)
                return []
            time.sleep(4.0)
            return []
        works = [
            group.allreduce(np.ones(3), async_op=True),
            group.allreduce(np.ones(1000), async_op=True),
            group.barrier(async_op=True),
        ]
        found: list[tuple[str, tuple[int, ...]]] = []
        for call in (*(work.wait for work in reversed(works)), works[0].result):
            with pytest.raises(col.CollectiveError) as caught:
                call()
            assert how != "late" or "timed out after 1.5 s" in str(caught.value)
            found.append((type(caught.value).__name__, getattr(caught.value, "ranks", ())))
        with pytest.raises(col.GroupError) as refused:
            group.barrier()  # issued when all was lost
        assert isinstance(refused.value.__cause__, col.CollectiveError)
        return found


@pytest.mark.parametrize("how", ["dies", "leaves", "late"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_behind_a_lost_one_name_the_same_ranks(
    pool: RankPool, backend: str, how: str
) -> None:
    size = size_of(backend)
    found = pool.run(
        size,
        queue_behind_a_loss,
        fresh(),
        backend,
        how,
        may_die=[size - 1] if how == "dies" else (),
    )
    name = "CollectiveTimeoutError" if how == "late" else "PeerLostError"
    assert found[0] == [(name, (size - 1,))] * 4


def leave_in_a_call(
    rank: int, size: int, name: str, backend: str, by_signal: bool
) -> tuple[float, str, tuple[int, ...]]:
    """The first rank destroys its group while the others wait for the last, which does not come.

    In another thread, or in a signal's handler of the thread that is in the call.
    """
    with made(backend, rank, size, name, timeout_s=20.0) as group:
        group.allreduce(np.ones(3))
        previous = signal.getsignal(signal.SIGUSR2)
        if rank == 0:
            signal.signal(signal.SIGUSR2, lambda *_: group.destroy())
            leave = (
                functools.partial(os.kill, os.getpid(), signal.SIGUSR2)
                if by_signal
                else group.destroy
            )
            threading.Timer(0.2, leave).start()
        began = time.monotonic()
        if rank == size - 1:
            while group.broken is None and time.monotonic() < began + 5.0:
                with contextlib.suppress(col.CollectiveError):
                    group._control.check()  # as a call does
                time.sleep(0.01)
            return time.monotonic() - began, type(group.broken).__name__, group.broken.ranks
        work = group.broadcast(np.ones(3), size - 1, async_op=True) if rank == 1 else None
        with pytest.raises(col.CollectiveError) as caught:
            group.broadcast(np.ones(3), size - 1) if work is None else work.wait()
        signal.signal(signal.SIGUSR2, previous)
        return (
            time.monotonic() - began,
            type(caught.value).__name__,
            getattr(caught.value, "ranks", ()),
        )


@pytest.mark.parametrize("by_signal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_that_leaves_in_a_call_ends_it_everywhere(
    pool: RankPool, backend: str, by_signal: bool
) -> None:
    found = pool.run(max(3, size_of(backend)), leave_in_a_call, fresh(), backend, by_signal)
    assert max(took_s for took_s, _, _ in found) < 3.0
    assert found[0][1:] == ("GroupError", ())
    assert [entry[1:] for entry in found[1:]] == [("PeerLostError", (0,))] * (len(found) - 1)


def queue_in_torch(rank: int, size: int, path: Path) -> list[tuple[str, tuple[int, ...]]]:
    with world(rank, size, path, timeout_s=10.0) as (torch, dist):
        dist.all_reduce(torch.ones(3))
        if rank == 1:
            time.sleep(0.3)
            os._exit(0)
        works = [
            dist.all_reduce(torch.ones(3), async_op=True),
            dist.barrier(async_op=True),
            dist.all_reduce(torch.ones(300_000), async_op=True),
        ]
        found: list[tuple[str, tuple[int, ...]]] = []
        for work in works:
            with pytest.raises(col.CollectiveError) as caught:
                work.wait()
            found.append((type(caught.value).__name__, getattr(caught.value, "ranks", ())))
        return found


@pytest.mark.shm
@pytest.mark.needs("torch")
def test_operations_of_torch_distributed_behind_a_lost_one(pool: RankPool, tmp_path: Path) -> None:
    found = pool.run(2, queue_in_torch, tmp_path / "meet", may_die=[1])
    assert found[0] == [("PeerLostError", (1,))] * 3


def refuse_timeouts(rank: int, size: int, name: str, backend: str) -> None:
    wrong: tuple[Any, ...] = (float("nan"), "x", -1, None, 0, float("inf"), True)
    with made(backend, rank, size, name, timeout_s=7.0) as group:
        for timeout_s in wrong:
            with pytest.raises(col.OptionError, match=rf"timeout_s: .*{timeout_s!r}"):
                group.set_timeout(timeout_s)
        assert group.timeout_s == 7.0
        group.set_timeout(1e30)
        assert float(group.allreduce(np.ones(3))[0]) == size
        group.set_timeout(3)
        assert group.timeout_s == 3.0
        group.set_timeout(np.float32(2))
        assert group.timeout_s == 2.0
        assert type(group.timeout_s) is float
        assert float(group.allreduce(np.ones(3), async_op=True).result()[0]) == size


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_timeout_that_is_none_is_refused(pool: RankPool, backend: str) -> None:
    pool.run(size_of(backend), refuse_timeouts, fresh(), backend)


def test_a_timeout_of_one_rank_is_checked_too() -> None:
    group = col.init_collective_group(1, 0, group_name=fresh())
    with pytest.raises(col.OptionError):
        group.set_timeout(float("nan"))
    col.destroy_collective_group(group.name)


def change_the_timeout_of_a_traced_function(rank: int, size: int, name: str, backend: str) -> float:
    import jax
    import jax.numpy as jnp

    import colltensor.jax as cj

    with made(backend, rank, size, name, timeout_s=1.0) as group:
        summed = jax.jit(lambda x: cj.allreduce(x, group))
        assert float(summed(jnp.ones(3))[0]) == size
        group.set_timeout(20.0)
        if rank == 1:
            time.sleep(2.0)
        assert float(summed(jnp.ones(3))[0]) == size  # longer than when it was traced
        group.set_timeout(0.6)
        if rank == 1:
            time.sleep(2.5)
            return 0.0
        began = time.monotonic()
        with pytest.raises(jax.errors.JaxRuntimeError, match="rank 1"):
            summed(jnp.ones(3)).block_until_ready()
        return time.monotonic() - began


@pytest.mark.needs("jax")
@pytest.mark.skipif(sys.version_info < (3, 11), reason="jax-tvm-ffi has no wheel for Python 3.10")
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_a_changed_timeout_reaches_functions_that_were_traced(pool: RankPool, backend: str) -> None:
    assert pool.run(2, change_the_timeout_of_a_traced_function, fresh(), backend)[0] < 2.0
