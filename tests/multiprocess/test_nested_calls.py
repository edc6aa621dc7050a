"""Calls from inside a waiting call of the same thread and group: refused at once, and the outer call goes on."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from c10d_ranks import world
from host_ranks import group_on
from pool import RankPool
from shm_ranks import fresh, own_group

import colltensor as col

BACKENDS = [
    pytest.param("shm", marks=pytest.mark.shm),
    pytest.param("native", marks=pytest.mark.gloo),
    pytest.param("torch", marks=[pytest.mark.gloo, pytest.mark.needs("torch")]),
    pytest.param("hierarchical", marks=[pytest.mark.shm, pytest.mark.gloo]),
]


@contextlib.contextmanager
def made(backend: str, rank: int, size: int, name: str, timeout_s: float = 20.0) -> Iterator[Any]:
    """A group of a backend; two hosts where it is hierarchical. A short timeout begins when all have come."""
    with _made(backend, rank, size, name) as group:
        if timeout_s != 20.0:
            group.barrier()
            group.set_timeout(timeout_s)
        yield group


@contextlib.contextmanager
def _made(backend: str, rank: int, size: int, name: str) -> Iterator[Any]:
    if backend in ("shm", "native"):
        with own_group(rank, size, name, 20.0, "gloo" if backend == "native" else "shm") as group:
            yield group
        return
    options = {"provider": "torch", "interface": "lo"} if backend == "torch" else {}
    hosts = "aabb"[:size] if backend == "hierarchical" else "a" * size
    with group_on(
        hosts, rank, name, "gloo" if backend == "torch" else backend, 20.0, **options
    ) as group:
        yield group


class Collected:
    """Calls something when it is freed."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        self.itself = self

    def __del__(self) -> None:
        self.call()


def collect(call: Callable[[], object]) -> None:
    """Make the call from ``__del__``, run by the collector; raise what it does."""
    raised: list[BaseException] = []

    def quietly() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    Collected(quietly)
    gc.collect()
    if raised:
        raise raised[0]


OUTER: dict[str, Callable[[Any], Any]] = {
    "small": lambda group: float(group.allreduce(np.ones(3))[0]),
    "large": lambda group: float(group.allreduce(np.ones(1_000_000))[0]),
    "tree": lambda group: float(group.allreduce({"a": np.ones(300_000), "b": np.ones(3)})["a"][0]),
    "barrier": lambda group: group.barrier() or float(group.world_size),
    "objects": lambda group: float(len(group.allgather_object("word"))),
}
INNER: dict[str, Callable[[Any], Any]] = {
    "allreduce": lambda group: group.allreduce(np.ones(3)),
    "barrier": lambda group: group.barrier(),
    "objects": lambda group: group.allgather_object("word"),
    "collected": lambda group: collect(lambda: group.allreduce(np.ones(3))),
}


def call_from_a_handler(
    rank: int, size: int, name: str, backend: str, outer: str, inner: str
) -> tuple[float, str, float]:
    """Rank 0 waits for the others, which come late, and its handler calls meanwhile; all go on afterwards."""
    with made(backend, rank, size, name) as group:
        group.allreduce(np.ones(3))
        found: list[tuple[float, str]] = []

        def handle(*_: Any) -> None:
            began = time.monotonic()
            with pytest.raises(col.GroupError) as caught:
                INNER[inner](group)
            found.append((time.monotonic() - began, str(caught.value)))

        if rank == 0:
            previous = signal.signal(signal.SIGUSR2, handle)
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        else:
            time.sleep(1.0)
        try:
            got = OUTER[outer](group)
        finally:
            if rank == 0:
                signal.signal(signal.SIGUSR2, previous)
        assert float(group.allreduce(np.ones(3))[0]) == size
        group.barrier()
        took, words = found[0] if found else (0.0, "")
        return took, words, got


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("outer", OUTER)
def test_a_handler_that_calls_while_its_thread_waits(
    pool: RankPool, backend: str, outer: str
) -> None:
    size = 4 if backend == "hierarchical" else 2
    found = pool.run(size, call_from_a_handler, fresh(), backend, outer, "allreduce")
    assert "__del__" in found[0][1]
    assert found[0][0] < 0.5
    assert [got for _, _, got in found] == [size] * size


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inner", list(INNER)[1:])
def test_whatever_the_handler_calls(pool: RankPool, backend: str, inner: str) -> None:
    size = 4 if backend == "hierarchical" else 2
    found = pool.run(size, call_from_a_handler, fresh(), backend, "small", inner)
    assert "__del__" in found[0][1]
    assert [got for _, _, got in found] == [size] * size


def wait_in_a_handler(rank: int, size: int, name: str, backend: str) -> list[str]:
    """What a handler issues asynchronously comes after the call that waits: it can be waited for when that is done."""
    with made(backend, rank, size, name) as group:
        group.allreduce(np.ones(3))
        issued: list[Any] = []
        refused: list[str] = []
        data = np.ones(5)

        def handle(*_: Any) -> None:
            issued.append(group.allreduce(data, async_op=True))
            with pytest.raises(col.GroupError) as caught:
                issued[0].wait()
            refused.append(str(caught.value))

        if rank == 0:
            previous = signal.signal(signal.SIGUSR2, handle)
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        else:
            time.sleep(1.0)
        group.allreduce(np.ones(3))
        if rank == 0:
            signal.signal(signal.SIGUSR2, previous)
            issued[0].wait()
        else:
            group.allreduce(data)
        assert (data == size).all()
        return refused


@pytest.mark.parametrize("backend", BACKENDS)
def test_work_that_cannot_be_waited_for_in_a_handler(pool: RankPool, backend: str) -> None:
    size = 4 if backend == "hierarchical" else 2
    found = pool.run(size, wait_in_a_handler, fresh(), backend)
    assert ["__del__" in words for words in found[0]] == [True]


def call_from_a_callback(rank: int, size: int, name: str, backend: str) -> str:
    """A done callback runs in the thread that ends operations: a call there could never end."""
    with made(backend, rank, size, name) as group:
        found: list[str] = []
        called = threading.Event()

        def call_back(_: object) -> None:
            try:
                group.barrier()
            except col.GroupError as error:
                found.append(str(error))
                raise  # which must not end that thread
            finally:
                called.set()

        # later: a call whose peers have come is done at once, and so is what it calls back
        if rank:
            time.sleep(0.5)
        work = group.allreduce(np.ones(3), async_op=True)
        if rank == 0:
            work.add_done_callback(call_back)
        work.wait()
        if rank == 0 and not called.wait(5.0):
            return "not called"
        group.allreduce(np.ones(3), async_op=True).wait()
        return found[0] if found else ""


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_a_done_callback_that_calls(pool: RankPool, backend: str) -> None:
    words, nothing = pool.run(2, call_from_a_callback, fresh(), backend)
    # empty where it was done before the callback was added
    assert "__del__" in words or words == ""
    assert nothing == ""


def call_from_a_callback_of_a_transfer(rank: int, size: int, name: str, backend: str) -> list[str]:
    """A send of rank 0 ends, and its callback calls, while a recv beside it goes on."""
    with made(backend, rank, size, name) as group:
        peer, data = size - 1 - rank, np.zeros(3)
        found: list[str] = []
        later: list[Any] = []
        called = threading.Event()

        def call_back(_: object) -> None:
            try:
                for call in (
                    lambda: group.send(np.ones(3), peer),
                    lambda: group.recv(np.ones(3), peer),
                    lambda: group.allreduce(np.ones(3)),
                    group.barrier,
                ):
                    with pytest.raises(col.GroupError) as caught:
                        call()
                    found.append(str(caught.value))
                later.append(group.send(np.full(3, 9.0), peer, async_op=True))
                with pytest.raises(col.GroupError) as caught:
                    later[0].wait()
                found.append(str(caught.value))
            finally:
                called.set()

        if rank == 0:
            receiving = group.recv(data, peer, async_op=True)
            sending = group.send(np.ones(3), peer, async_op=True)
            sending.add_done_callback(call_back)
            assert called.wait(5.0)
            assert not receiving.done()
            assert receiving.result().tolist() == [7.0] * 3
            later[0].wait()
        elif peer == 0:
            time.sleep(0.3)
            group.recv(data, 0)
            time.sleep(0.5)
            group.send(np.full(3, 7.0), 0)
            assert group.recv(data, 0).tolist() == [9.0] * 3
        assert group.allreduce(np.ones(3)).tolist() == [size] * 3
        return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_done_callback_that_calls_while_other_transfers_run(pool: RankPool, backend: str) -> None:
    size = 4 if backend == "hierarchical" else 2
    found = pool.run(size, call_from_a_callback_of_a_transfer, fresh(), backend)[0]
    assert all("__del__" in words for words in found)
    assert ["group '" in words for words in found] == [True] * 4 + [False]  # the last one waits


def call_from_a_handler_in_jit(
    rank: int, size: int, name: str, backend: str, inner: str
) -> list[str]:
    import jax
    import jax.numpy as jnp

    import colltensor.jax as cj

    with made(backend, rank, size, name) as group:
        summed = jax.jit(lambda x: cj.allreduce(x, group))
        assert float(summed(jnp.ones(3))[0]) == size
        refused: list[str] = []

        def handle(*_: Any) -> None:
            with pytest.raises((col.GroupError, jax.errors.JaxRuntimeError)) as caught:
                summed(jnp.ones(3)).block_until_ready() if inner == "jitted" else group.allreduce(
                    np.ones(3)
                )
            refused.append(str(caught.value))

        if rank == 0:
            previous = signal.signal(signal.SIGUSR2, handle)
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        else:
            time.sleep(1.0)
        got = float(summed(jnp.ones(3))[0])
        if rank == 0:
            signal.signal(signal.SIGUSR2, previous)
        assert got == size
        assert float(group.allreduce(np.ones(3))[0]) == size
        return refused


@pytest.mark.needs("jax")
@pytest.mark.skipif(sys.version_info < (3, 11), reason="jax-tvm-ffi has no wheel for Python 3.10")
@pytest.mark.parametrize("inner", ["eager", "jitted"])
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_a_handler_that_calls_while_a_computation_waits(
    pool: RankPool, backend: str, inner: str
) -> None:
    """Where XLA computes in the caller's thread, which it does as long as there is little to compute."""
    [words], nothing = pool.run(2, call_from_a_handler_in_jit, fresh(), backend, inner)
    assert "__del__" in words
    assert nothing == []


def call_c10d_from_a_handler(rank: int, size: int, path: Path) -> tuple[list[str], float]:
    with world(rank, size, path) as (torch, dist):
        dist.all_reduce(torch.ones(3))
        found: list[str] = []

        def handle(*_: Any) -> None:
            for call in (
                lambda: dist.all_reduce(torch.ones(3)),
                lambda: dist.barrier(),
                lambda: dist.all_reduce(later, async_op=True).wait(),
            ):
                with pytest.raises(RuntimeError) as caught:
                    call()
                found.append(str(caught.value))

        later = torch.ones(5)
        if rank == 0:
            previous = signal.signal(signal.SIGUSR2, handle)
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        else:
            time.sleep(1.0)
        data = torch.ones(3)
        dist.all_reduce(data)
        if rank == 0:
            signal.signal(signal.SIGUSR2, previous)
        else:
            dist.all_reduce(later)
        dist.barrier()
        return found, float(data[0]) + float(later[0])


@pytest.mark.shm
@pytest.mark.needs("torch")
def test_a_handler_that_calls_torch_distributed(pool: RankPool, tmp_path: Path) -> None:
    (words, total), (_, other) = pool.run(2, call_c10d_from_a_handler, tmp_path / "meet")
    assert len(words) == 3
    assert all("__del__" in said for said in words)
    assert total == other == 4


def call_in_two_threads(rank: int, size: int, name: str, backend: str, at_once: bool) -> list[str]:
    """Two threads of rank 0 call, while the other ranks come late or in between; what the log has."""
    words: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            words.append(record.getMessage())

    handler = Kept(logging.WARNING)
    logger = logging.getLogger("colltensor")
    with made(backend, rank, size, name) as group:
        group.barrier()
        logger.addHandler(handler)
        try:
            for _ in range(2):
                if rank:
                    time.sleep(0.3)
                    group.allreduce(np.ones(3))
                    group.allreduce(np.ones(3))
                    continue
                threads = [
                    threading.Thread(target=group.allreduce, args=(np.ones(3),)) for _ in range(2)
                ]
                for thread in threads:
                    thread.start()
                    if not at_once:
                        thread.join()
                for thread in threads:
                    thread.join()
        finally:
            logger.removeHandler(handler)
    return words


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_threads_that_call_at_once_are_warned_of(pool: RankPool, backend: str) -> None:
    size = 4 if backend == "hierarchical" else 2
    found = pool.run(size, call_in_two_threads, fresh(), backend, True)
    assert ["thread" in words for words in found[0]] == [True]  # once
    assert found[1:] == [[]] * (size - 1)
    assert pool.run(size, call_in_two_threads, fresh(), backend, False) == [[]] * size
