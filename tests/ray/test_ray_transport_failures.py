"""Direct transport when something goes wrong: who is dead, late, killed, mistaken, or no receiver at all."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from crew import FIRST_NODE, PATIENCE_S, kill_process, outcome
from direct import (
    FRAMEWORKS,
    backends_of_links,
    counted,
    describe_by_hand,
    give,
    is_alive,
    kept,
    receive_by_hand,
    remember,
    result,
    total,
)
from direct_actors import Counter

import colltensor as col
import colltensor.ray as cr
from colltensor.ray import link, source


def test_a_dead_source_is_named(actors: SimpleNamespace, spawn_direct: Callable[..., Any]) -> None:
    doomed = spawn_direct()
    pid = ray.get(doomed.pid.remote(), timeout=PATIENCE_S)
    refs = [give(doomed, "numpy", counted, "numpy", 10) for _ in range(2)]
    assert result(actors.first, total, refs[0]) == 45.0  # leaves a link to it
    ray.wait([refs[1]], timeout=PATIENCE_S)
    kill_process(doomed, pid)
    start = time.monotonic()
    for receiver in (actors.first, actors.second):
        error = outcome(receiver.run.remote(total, refs[1]))
        assert isinstance(error, col.PeerLostError)
        assert f"process {pid}" in str(error)
    assert time.monotonic() - start < 10
    assert result(actors.first, total, give(actors.second, "numpy", counted, "numpy", 3)) == 3.0


def test_a_late_source_is_named(actors: SimpleNamespace, spawn_direct: Callable[..., Any]) -> None:
    """A source that does not answer is an error in time, can be aborted, and is used again when it does."""
    slow = spawn_direct()
    pid = ray.get(slow.pid.remote(), timeout=PATIENCE_S)
    refs = [give(slow, "numpy", counted, "numpy", 10) for _ in range(4)]
    assert result(actors.first, total, refs[0]) == 45.0
    ray.wait(refs, num_returns=4, timeout=PATIENCE_S)
    result(actors.first, set_timeout, 1.0)
    aborted: list[Any] = []
    with stopped(pid):
        error = outcome(actors.first.run.remote(total, refs[1]))
        assert isinstance(error, col.CollectiveTimeoutError)
        assert f"process {pid}" in str(error)
        with pytest.raises(ray.exceptions.GetTimeoutError):
            ray.get(refs[2], timeout=0.5)
        thread = threading.Thread(target=lambda: aborted.append(outcome_of_get(refs[3])))
        thread.start()
        deadline = time.monotonic() + 10
        while refs[3].hex() not in link.LINKS._busy.values():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        link.LINKS.abort(refs[3].hex())
        thread.join(5)
        assert isinstance(aborted[0], col.CollectiveError)
    result(actors.first, set_timeout, 30.0)
    assert result(actors.first, total, refs[1]) == 45.0
    assert total(ray.get(refs[2], timeout=PATIENCE_S)) == 45.0


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def set_timeout(seconds: float) -> None:
    link.TIMEOUT_S = seconds  # type: ignore[misc]


def outcome_of_get(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except Exception as error:
        return error


@pytest.mark.parametrize("sender", ["first", "far"])
def test_a_receiver_that_dies_halfway_hurts_nobody(
    actors: SimpleNamespace, spawn_direct: Callable[..., Any], sender: str
) -> None:
    origin, doomed = getattr(actors, sender), spawn_direct(resources={FIRST_NODE: 0.01})
    result(origin, log_here)
    ref = give(origin, "numpy", counted, "numpy", 1 << 20)
    result(doomed, die_when_receiving)
    assert isinstance(outcome(doomed.run.remote(total, ref)), ray.exceptions.RayActorError)
    assert result(actors.second, total, ref) == sum(range(1 << 20))
    deadline = time.monotonic() + 20
    while not any("(rank 0): " in line for line in result(origin, log_lines)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def die_when_receiving() -> None:
    link.Link.receive = lambda self, buffers, on_device: os.kill(os.getpid(), 9)  # type: ignore[method-assign,assign,return-value]


def log_here() -> None:
    lines: list[str] = []
    kept["lines"] = lines
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(source.__name__)
    logger.handlers[:] = [handler]


def log_lines() -> list[str]:
    return list(kept["lines"])


@pytest.mark.parametrize("receiver", ["second", "far"])
def test_a_mismatch_is_an_error_on_both_sides(actors: SimpleNamespace, receiver: str) -> None:
    """The receiver is told a wrong shape, as if the array had been replaced behind the metadata."""
    origin, target = actors.first, getattr(actors, receiver)
    result(origin, log_here)
    description = result(origin, describe_by_hand, "by-hand")
    error = outcome(target.run.remote(receive_by_hand, description, (5,)))
    assert isinstance(error, col.MismatchError)
    deadline = time.monotonic() + 10
    while not any("(rank 0): " in line for line in result(origin, log_lines)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert result(target, receive_by_hand, description, (2, 2)) == [[0.0, 1.0], [2.0, 3.0]]
    result(origin, source.let_go, "by-hand")
    error = outcome(target.run.remote(receive_by_hand, description, (2, 2)))
    assert isinstance(error, col.GroupError)
    assert "freed" in str(error)


def test_what_cannot_be_sent_fails_where_it_is_returned(actors: SimpleNamespace) -> None:
    ref = give(actors.first, "numpy", objects)
    error = outcome(ref)
    assert isinstance(error, col.UnsupportedDTypeError)
    assert "COLLTENSOR_NUMPY" in str(error)
    assert "1 of 2" in str(error)
    assert isinstance(outcome(actors.second.run.remote(total, ref)), col.UnsupportedDTypeError)
    assert not result(actors.first, is_alive)


def objects() -> Any:
    good = np.ones(3)
    kept["watch"] = weakref.ref(good)
    return [cr.NumpyArray(good), cr.NumpyArray(np.array([object()]))]


@pytest.mark.parametrize("framework", FRAMEWORKS[1:])
def test_an_array_given_up_after_the_return_is_an_error_of_its_receiver(
    actors: SimpleNamespace, framework: str
) -> None:
    ref = give(actors.first, framework, remember, counted(framework, 100))
    assert result(actors.first, give_up_value, framework)
    error = outcome(actors.second.run.remote(total, ref))
    assert isinstance(error, col.CollectiveError)
    assert ("deleted" if framework == "jax" else "resize_(0)") in str(error)
    assert result(actors.second, total, give(actors.first, framework, counted, framework, 3)) == 3.0


def give_up_value(framework: str) -> bool:
    value = kept.pop("value")
    if framework == "jax":
        value.delete()
    else:
        value.untyped_storage().resize_(0)
    return True


def test_a_link_that_the_source_gave_up_is_made_again(actors: SimpleNamespace) -> None:
    ref = give(actors.first, "numpy", counted, "numpy", 10)
    assert result(actors.second, total, ref) == 45.0
    result(actors.first, hang_up)
    assert result(actors.second, total, ref) == 45.0
    result(actors.second, expire_links)
    assert result(actors.second, total, ref) == 45.0
    assert len(result(actors.second, backends_of_links)) == 1


def hang_up() -> None:
    import socket

    for sock in list(source._sources[0]._serving):
        sock.shutdown(socket.SHUT_RDWR)


def expire_links() -> None:
    for links in link.LINKS._idle.values():
        for one in links:
            one.idle_since -= 1000


def test_a_stranger_gets_nothing(actors: SimpleNamespace) -> None:
    description = result(actors.first, describe_by_hand, "secret")
    forged = dataclasses.replace(description.endpoint, secret=b"x" * 32)
    error = outcome(actors.second.run.remote(
        receive_by_hand, dataclasses.replace(description, endpoint=forged), (2, 2)))  # fmt: skip
    assert isinstance(error, col.PeerLostError)
    assert "secret" not in repr(description)
    result(actors.first, source.let_go, "secret")


def test_an_actor_that_restarted_sends_again(
    actors: SimpleNamespace, spawn_direct: Callable[..., Any]
) -> None:
    """Ray registers transports in an actor once; the module of the class does it in every process."""
    phoenix = spawn_direct(Counter, max_restarts=1)
    assert result(actors.first, total, phoenix.count.remote(10)) == 45.0
    kill_process_that_restarts(phoenix)
    assert result(actors.first, total, phoenix.count.remote(5)) == 10.0


def kill_process_that_restarts(actor: Any) -> None:
    pid = ray.get(actor.pid.remote(), timeout=PATIENCE_S)
    os.kill(pid, 9)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(ray.exceptions.RayActorError):
            assert ray.get(actor.pid.remote(), timeout=PATIENCE_S) != pid
            return
        assert time.monotonic() < deadline
        time.sleep(0.1)


def hold(where: tuple[str, int], number: int) -> list[int]:
    """Hold connections to this process's source that say a byte; return how many threads and descriptors it takes."""
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    clients = [socket.create_connection(where) for _ in range(number)]
    for client in clients:
        client.sendall(b"?")  # else the kernel would keep them from the source
    time.sleep(0.2)
    # without our own ends
    after = threading.active_count(), len(os.listdir("/proc/self/fd")) - number
    for client in clients:
        client.close()
    return [now - then for now, then in zip(after, before, strict=True)]


def source_of() -> tuple[str, int]:
    endpoint = source.local_source().endpoint
    return endpoint.address, endpoint.port


def test_strangers_at_a_source_are_bounded(actors: SimpleNamespace) -> None:
    ref = give(actors.first, "numpy", counted, "numpy", 10)
    where = result(actors.first, source_of)
    threads, descriptors = result(actors.first, hold, where, 300)
    assert threads <= 2
    assert descriptors <= 70
    assert result(actors.second, total, ref) == 45.0
