"""Observers between processes: whichever way a call takes, it is seen, with what the caller waited for."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pool import RankPool, group_of
from shm_ranks import fresh, own_group

import colltensor as col

LATE_S = 0.4


class Watch:
    """Collects operations when they are over."""

    def __init__(self) -> None:
        self.seen: list[col.Operation] = []

    def __enter__(self) -> list[col.Operation]:
        col.add_observer(self.observe)
        return self.seen

    def __exit__(self, *_: object) -> None:
        col.remove_observer(self.observe)

    def observe(self, operation: col.Operation) -> Callable[[], None]:
        return lambda: self.seen.append(operation)


def wait_for_late(
    rank: int, world_size: int, backend: str, provider: str | None
) -> list[tuple[str, int, int, bool]]:
    """Rank 1 comes late to a synchronous and to an asynchronous call, in the direct and in the slow path."""
    group = group_of(world_size, backend, provider)
    x = np.ones(64, np.float32)
    with Watch() as seen:
        for call in (
            lambda: group.allreduce(x),
            lambda: group.allreduce(x[::2]),
            lambda: group.allreduce(x, async_op=True),
        ):
            group.barrier()
            if rank == 1:
                time.sleep(LATE_S)
            work = call()
            if isinstance(work, col.Work):
                work.wait()
        group.barrier()
    return [
        (operation.name, operation.rank, operation.nbytes, operation.duration_s > LATE_S / 2)  # type: ignore[operator]
        for operation in seen
        if operation.name != "barrier"
    ]


def check_waits(found: list[list[tuple[str, int, int, bool]]]) -> None:
    assert found[0] == [
        ("allreduce", 0, 256, True),
        ("allreduce", 0, 128, True),
        ("allreduce", 0, 256, True),
    ]
    assert found[1] == [
        ("allreduce", 1, 256, False),
        ("allreduce", 1, 128, False),
        ("allreduce", 1, 256, False),
    ]


@pytest.mark.shm
def test_the_duration_is_the_callers_wait_in_shared_memory(pool: RankPool) -> None:
    check_waits(pool.run(2, wait_for_late, "shm", None))


def test_the_duration_is_the_callers_wait_over_gloo(pool: RankPool, provider: str) -> None:
    check_waits(pool.run(2, wait_for_late, "gloo", provider))


def only_rank_0_observes(rank: int, world_size: int) -> tuple[list[str], list[float]]:
    """Observation is each rank's own affair: the others need not know."""
    group = group_of(world_size, "shm")
    with Watch() as seen:
        if rank != 0:
            col.remove_observer(col.observers._observers[0])
        x = np.full(3, rank + 1.0)
        group.allreduce(x)
        parts = [np.zeros(3) for _ in range(world_size)]
        group.allgather(parts, x)
        if rank == 0:
            group.send(x, 1)
        elif rank == 1:
            group.recv(x, 0)
    return [operation.name for operation in seen], parts[-1].tolist()


@pytest.mark.shm
def test_one_rank_may_observe_alone(pool: RankPool) -> None:
    names = ["allreduce", "allgather", "send"]
    assert pool.run(3, only_rank_0_observes) == [
        (names, [6.0] * 3),
        ([], [6.0] * 3),
        ([], [6.0] * 3),
    ]


def disagree(rank: int, world_size: int, name: str) -> tuple[list[str], list[str]]:
    """A mismatch, then a rank that leaves: return the errors seen, and the log lines."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("colltensor")
    logger.addHandler(handler)
    level, _ = logger.level, logger.setLevel(logging.INFO)
    try:
        with Watch() as seen, own_group(rank, world_size, name) as group:
            for call in (
                lambda: group.allreduce(np.zeros(3 + rank)),
                lambda: group.broadcast(np.zeros(3)),
            ):
                if rank == 1 and seen:
                    break
                try:
                    call()
                except col.CollectiveError:
                    continue
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return [type(operation.error).__name__ for operation in seen], lines


@pytest.mark.shm
def test_errors_are_seen_and_a_broken_group_is_logged(pool: RankPool) -> None:
    name = fresh()
    (errors, lines), (others, quiet) = pool.run(2, disagree, name)
    assert errors == ["MismatchError", "PeerLostError"]
    assert others == ["MismatchError"]
    assert len(lines) == 1
    assert lines[0].startswith(f"group '{name}' (rank 0): broken: broadcast")
    assert quiet == []


def jitted(rank: int, world_size: int, name: str) -> tuple[list[str], list[str], list[float]]:
    """Jitted calls reach shared memory without Python, unless somebody observes."""
    jax, cj = importlib.import_module("jax"), importlib.import_module("colltensor.jax")
    with own_group(rank, world_size, name) as group:
        step = jax.jit(lambda x: cj.allreduce(cj.allreduce(x, group=group), group=group))
        x = jax.numpy.full(5, rank + 1.0, "float32")
        before = step(x).tolist()
        with Watch() as seen:
            jax.block_until_ready(step(x))
            first = [f"{operation.name} {operation.nbytes}" for operation in seen]
            later = jax.jit(lambda x: cj.broadcast(x, group=group))
            jax.block_until_ready(later(x))
        jax.block_until_ready(step(x))
    return first, [operation.name for operation in seen[len(first) :]], before


@pytest.mark.shm
@pytest.mark.needs("jax")
@pytest.mark.skipif(sys.version_info < (3, 11), reason="jax-tvm-ffi has no wheel for Python 3.10")
def test_jitted_calls_are_seen(pool: RankPool) -> None:
    expected = (["allreduce 20", "allreduce 20"], ["broadcast"], [6.0] * 5)
    assert pool.run(2, jitted, fresh()) == [expected] * 2


def grouped_while_observed(rank: int, world_size: int, name: str) -> list[str]:
    """A group whose jitted calls are the first to come, when there is an observer already."""
    jax, cj = importlib.import_module("jax"), importlib.import_module("colltensor.jax")
    with Watch() as seen, own_group(rank, world_size, name) as group:
        jax.block_until_ready(
            jax.jit(lambda x: cj.allreduce(x, group=group))(jax.numpy.ones(2, "float32"))
        )
    return [operation.name for operation in seen]


@pytest.mark.shm
@pytest.mark.needs("jax")
@pytest.mark.skipif(sys.version_info < (3, 11), reason="jax-tvm-ffi has no wheel for Python 3.10")
def test_jitted_calls_of_a_group_that_is_made_later_are_seen(pool: RankPool) -> None:
    assert pool.run(2, grouped_while_observed, fresh()) == [["allreduce"]] * 2


def backward_passes(rank: int, world_size: int, name: str) -> list[str]:
    torch, ct = importlib.import_module("torch"), importlib.import_module("colltensor.torch")
    with own_group(rank, world_size, name) as group:
        model = torch.nn.Linear(3, 2)
        ct.sync_gradients(model, group)
        model(torch.ones(1, 3)).sum().backward()
        with Watch() as seen:
            model(torch.ones(1, 3)).sum().backward()
    return [operation.name for operation in seen]


@pytest.mark.shm
@pytest.mark.needs("torch")
def test_what_holds_a_group_since_before_is_seen(pool: RankPool) -> None:
    for names in pool.run(2, backward_passes, fresh()):
        assert set(names) == {"allreduce"}


def asked_outside_ray(rank: int, world_size: int, name: str) -> tuple[str, bool]:
    os.environ["COLLTENSOR_OBSERVE"] = "metrics"
    try:
        col.init_collective_group(1, 0, group_name=name)
    except col.OptionError as error:
        return str(error), col.is_group_initialized(name)
    finally:
        del os.environ["COLLTENSOR_OBSERVE"]
    return "nothing", True


@pytest.mark.needs("ray")
def test_what_only_ray_has_is_an_error_outside_of_it(pool: RankPool) -> None:
    ((error, made),) = pool.run(1, asked_outside_ray, fresh())
    assert "ray.init()" in error
    assert not made


def fork_while_observed(rank: int, world_size: int, name: str) -> tuple[int, list[str]]:
    """A forked child's refused call tells the child's observers and no one else."""
    with Watch() as seen, own_group(rank, world_size, name) as group:
        child = os.fork()
        if child == 0:
            try:
                group.allreduce(np.zeros(3))
            except col.GroupError as error:
                os._exit(0 if [operation.error for operation in seen] == [error] else 1)
            os._exit(2)
        code: Any = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        group.allreduce(np.zeros(3))
    return code, [operation.name for operation in seen]


@pytest.mark.shm
def test_a_forked_childs_call(pool: RankPool) -> None:
    assert pool.run(2, fork_while_observed, fresh()) == [(0, ["allreduce"])] * 2
