"""Gloo when a rank dies, is late, is interrupted, leaves or forks: every wait ends, and so does close."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from fake_control import FakeControl
from gloo_ranks import SUM, Ranks, soon, view
from pool import RankPool
from shm_ranks import fresh, own_group

from colltensor.backends.gloo import library
from colltensor.errors import CollectiveError

pytestmark = pytest.mark.gloo


@pytest.fixture
def path() -> str:
    """A path for the ranks' fake control planes to meet at."""
    return f"{tempfile.gettempdir()}/{uuid4().hex[:8]}"


WAITS = {
    "allreduce": lambda backend, array, deadline: backend.allreduce([view(array)], SUM, deadline),
    "broadcast": lambda backend, array, deadline: backend.broadcast([view(array)], 1, deadline),
    "recv": lambda backend, array, deadline: backend.recv([view(array)], 1, deadline),
}
"""Calls of rank 0 that wait for rank 1."""


def wait_alone(
    rank: int, size: int, path: str, provider: str, call: str, how: str
) -> dict[str, Any]:
    """Rank 0 calls and rank 1 does not; return what rank 0 saw."""
    ranks = Ranks(path, rank, size, provider)
    array = np.ones(1 << 20)
    WAITS["allreduce"](ranks.backend, array, soon())
    if rank == 1:
        time.sleep(0.2)
        if how == "dies":
            os._exit(1)
        ranks.control.allgather(b"", soon())
        ranks.backend.close()
        ranks.control.close()
        return {}
    array[:] = 1
    timer = threading.Timer(0.5, _disturb, [ranks.control, how])
    timer.start()
    began, used = time.monotonic(), time.process_time()
    seen: BaseException | None = None
    try:
        WAITS[call](ranks.backend, array, soon(1.0 if how == "expires" else 20.0))
    except (RuntimeError, OSError, KeyboardInterrupt) as error:
        seen = error
    report = {
        "after_s": time.monotonic() - began,
        "cpu_s": time.process_time() - used,
        "error": repr(seen),
    }
    timer.join()
    began = time.monotonic()
    ranks.backend.close()
    report["close_s"] = time.monotonic() - began
    array[:] = 7
    if how != "dies":
        ranks.control.allgather(b"", soon())
    time.sleep(0.1)
    report["intact"] = bool((array == 7).all())
    ranks.control.close()
    return report


def _disturb(control: FakeControl, how: str) -> None:
    if how == "is told":
        control.failure = ConnectionError("rank 1 is lost, says the control plane")
    elif how == "is interrupted":
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("call", WAITS)
@pytest.mark.parametrize(
    ("how", "error", "after_s"),
    [
        ("dies", "RuntimeError", 0.8),
        ("expires", "TimeoutError", 1.0),
        ("is told", "ConnectionError", 0.5),
        ("is interrupted", "KeyboardInterrupt", 0.5),
    ],
)
def test_a_wait_ends_and_close_does_not_hang(
    pool: RankPool, path: str, provider: str, call: str, how: str, error: str, after_s: float
) -> None:
    if provider == "pygloo":
        pytest.skip("pygloo holds the GIL while it waits: nothing can end it")
    report = pool.run(
        2, wait_alone, path, provider, call, how, may_die={1} if how == "dies" else ()
    )[0]
    assert report["error"].startswith(error), report
    assert report["after_s"] < after_s + 1.0, report
    assert report["close_s"] < 1.0, report
    assert report["cpu_s"] < 0.3, report
    assert report["intact"], "Gloo wrote after close"


def lose_a_peer(rank: int, size: int, path: str, provider: str) -> tuple[str, float]:
    ranks = Ranks(path, rank, size, provider)
    array = np.ones(1000)
    ranks.backend.allreduce([view(array)], SUM, soon())
    if rank == 1:
        os._exit(1)
    try:
        for _ in range(100):
            ranks.backend.allreduce([view(array)], SUM, soon())
    except RuntimeError as error:
        seen = type(error).__name__
    began = time.monotonic()
    ranks.backend.close()
    ranks.backend.close()
    return seen, time.monotonic() - began


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_dead_peer_is_an_error(pool: RankPool, path: str, provider: str, world_size: int) -> None:
    reports = pool.run(world_size, lose_a_peer, path, provider, may_die={1})
    for kind, close_s in (report for report in reports if report is not None):
        assert kind == "RuntimeError"
        assert close_s < 3.0


def use_after_close(rank: int, size: int, path: str, provider: str) -> None:
    ranks = Ranks(path, rank, size, provider)
    ranks.backend.close()
    with pytest.raises(RuntimeError, match="closed"):
        ranks.backend.allreduce([view(np.ones(100_000))], SUM, soon())
    ranks.control.close()


def test_a_closed_backend_says_so(pool: RankPool, path: str, provider: str) -> None:
    pool.run(2, use_after_close, path, provider)


def leave_at_once(rank: int, size: int, path: str, provider: str) -> None:
    ranks = Ranks(path, rank, size, provider)
    array = np.full(4 << 20, float(rank + 1))
    ranks.backend.broadcast([view(array)], 0, soon())
    ranks.backend.close()
    assert (array == 1.0).all()


def test_a_root_may_close_at_once(pool: RankPool, path: str, provider: str) -> None:
    pool.run(3, leave_at_once, path, provider)


PROGRAM = """
import os, sys, threading, time
sys.path[:0] = {path!r}
import numpy as np
from gloo_ranks import Ranks, SUM, soon, view
rank = int(sys.argv[1])
ranks = Ranks(sys.argv[2], rank, 2, sys.argv[3])
array = np.ones(3)
ranks.backend.allreduce([view(array)], SUM, soon())
{end}
"""
IN_GROUP = """
import sys, threading, time
sys.path[:0] = {path!r}
import numpy as np
import colltensor as col
rank = int(sys.argv[1])
place = "file://" + sys.argv[2] + "-group"
group = col.init_collective_group(2, rank, "gloo", init_method=place, provider=sys.argv[3], interface="lo")
array = np.ones(3)

class ranks:
    class backend:
        recv = staticmethod(lambda views, peer, deadline: group.recv(array, peer))

view, soon = np.asarray, time.monotonic
group.allreduce(array)
{end}
"""
ENDS = {
    "without close": "",
    "in flight": """
if rank == 0:
    threading.Thread(target=lambda: ranks.backend.recv([view(array)], 1, soon()), daemon=True).start()
    time.sleep(0.3)
else:
    time.sleep(1.5)
""",
    "forked": """
child = os.fork()
if child == 0:
    ranks.backend.close()
    del ranks
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
ranks.backend.allreduce([view(array)], SUM, soon())
assert array[0] == 4
ranks.control.allgather(b"", soon())
ranks.backend.close()
""",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_process_ends_cleanly(path: str, provider: str, end: str) -> None:
    if end == "in flight" and provider == "pygloo":
        pytest.skip("pygloo holds the GIL while it waits: nothing can end it")
    # It is the group that sees to it that no thread is left in torch, whose frames would end the process.
    within = IN_GROUP if end == "in flight" and provider == "torch" else PROGRAM
    program = within.format(path=sys.path, end=ENDS[end])
    arguments = [sys.executable, "-c", program]
    ranks = [
        subprocess.Popen(
            [*arguments, str(rank), path, provider],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        for rank, process in enumerate(ranks):
            output, _ = process.communicate(timeout=25)
            assert process.returncode == 0, (
                f"rank {rank} ended with {process.returncode}: {output.decode()}"
            )
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def meet_a_stopped_peer(rank: int, size: int, path: str, provider: str, how: str) -> dict[str, Any]:
    """Rank 1 is stopped in the middle of a large payload and goes on once rank 0 has given up; see what rank 0 saw."""
    ranks = Ranks(path, rank, size, provider)
    pids = [int(reply) for reply in ranks.control.allgather(str(os.getpid()).encode(), soon())]
    array = np.full(32 << 20, 1.0, np.float32)
    if rank == 1:
        try:
            for _ in range(100):
                ranks.backend.allreduce([view(array)], SUM, soon())
        except RuntimeError as error:
            ranks.control.allgather(b"", soon())
            ranks.backend.close()
            ranks.control.close()
            return {"error": repr(error)}
        return {}
    stop = threading.Timer(0.3, os.kill, [pids[1], signal.SIGSTOP])
    stop.start()
    interrupt = threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGINT])
    if how == "is interrupted":
        interrupt.start()
    began = time.monotonic()
    seen: BaseException | None = None
    try:
        for _ in range(100):
            array[:] = 1
            ranks.backend.allreduce([view(array)], SUM, soon(1.5))
    except (RuntimeError, OSError, KeyboardInterrupt) as error:
        seen = error
    array[:] = 7  # before close(): whatever failed must have let go of the memory by itself
    report: dict[str, Any] = {"error": repr(seen), "after_s": time.monotonic() - began}
    os.kill(pids[1], signal.SIGCONT)
    ranks.control.allgather(b"", soon())
    time.sleep(0.2)
    report["intact"] = bool((array == 7).all())
    ranks.backend.close()
    ranks.control.close()
    return report


@pytest.mark.parametrize(
    ("how", "error"), [("expires", "TimeoutError"), ("is interrupted", "KeyboardInterrupt")]
)
def test_a_payload_under_way_ends_and_its_memory_is_left_alone(
    pool: RankPool, path: str, provider: str, how: str, error: str
) -> None:
    if provider != "native":
        pytest.skip(
            "torch and pygloo let go of memory with close() only, which is why the backend keeps it"
        )
    waiting, peer = pool.run(2, meet_a_stopped_peer, path, provider, how)
    assert waiting["error"].startswith(error), waiting
    assert waiting["after_s"] < 4.0, waiting
    assert waiting["intact"], "Gloo wrote after the call had failed"
    assert peer["error"].startswith("RuntimeError"), peer


def give_away(rank: int, size: int, name: str) -> str:
    """Rank 0 deletes an array while the call that it is for waits for its turn."""
    from jax import numpy as jnp

    with own_group(rank, size, name, backend="gloo") as group:
        array = jnp.ones(4)
        group.barrier()
        if rank == 1:
            time.sleep(0.3)
        before = group.allreduce(np.ones(3), async_op=True)

        def call() -> None:  # on rank 1 it may raise at once, when rank 0 has told it already
            work = group.allreduce(array, async_op=True)
            if rank == 0:
                array.delete()
            before.wait()
            work.wait()

        with pytest.raises(CollectiveError) as caught:
            call()
        return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.needs("jax")
@pytest.mark.skipif(library.reason() is not None, reason="the library was built without Gloo")
def test_nobody_gets_the_memory_of_an_array_that_is_gone(pool: RankPool) -> None:
    errors = pool.run(2, give_away, fresh())
    assert "deleted" in errors[0]
    assert "rank 0" in errors[1]
