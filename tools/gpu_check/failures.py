"""Late, dead and disagreeing peers beside one rank on a device.

The host never hangs, and its stream runs on. Every libnccl shows these, because NCCL need not
connect two ranks for them: the peer is a thread or a process that has joined the group and does not
do its part.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_streams
import gpu_threads
import pytest
from child import Channel
from test_gpu_failures import runs_on, settle

import colltensor as col

TIMEOUT_S = 2.0
LIMIT_S = 15.0
HOLD_S = 7.0
"""A kernel of this length is still running when ``destroy`` has waited its five seconds."""
_DUPLICATE = "several ranks on one GPU need libnccl 2.30"


class Seams:
    """What a fake device puts its own in the place of."""

    @staticmethod
    @contextlib.contextmanager
    def replaced_connect(connect: Callable[..., Any]) -> Iterator[None]:
        """Let ``connect(original, driver, size, unique_id, rank)`` stand for the driver's."""
        driver = importlib.import_module("colltensor.backends.nccl.driver").CupyDriver
        original = driver.connect
        driver.connect = lambda self, *given: connect(original, self, *given)
        try:
            yield
        finally:
            driver.connect = original

    @staticmethod
    def write_to_nowhere() -> None:
        """Queue, on CuPy's current stream, a kernel that writes where there is no memory."""
        source = 'extern "C" __global__ void wrong(int* address) { *address = 1; }'
        importlib.import_module("cupy").RawKernel(source, "wrong")((1,), (1,), (8,))


seams: Any = Seams


def never_calls(library: str, *, channel: Channel, folder: Path, cpu: bool) -> str:
    """The peer has joined and does not call.

    A timeout names it, and a group made again would be right.
    """
    over = threading.Event()

    def function(group: Any) -> str:
        if group.rank == 1:
            over.wait(LIMIT_S)
            return ""
        try:
            return _refused(group, library, col.CollectiveTimeoutError)
        finally:
            over.set()

    said, _ = _together(library, folder / "never-calls", function, TIMEOUT_S)
    _one_rank_works(library)
    return str(said)


def never_connects(library: str, *, channel: Channel, folder: Path, cpu: bool) -> str:
    """The peer calls, but NCCL waits for it in vain.

    The host gives up, and NCCL's thread is in nobody's way.
    """
    over = threading.Event()

    def connect(original: Any, driver: Any, size: int, unique_id: bytes, rank: int) -> Any:
        if size > 1 and rank == 1:
            over.wait(LIMIT_S)
            raise RuntimeError("NCCL was not asked")
        return original(driver, size, unique_id, rank)

    def function(group: Any) -> str:
        return _refused(group, library, col.CollectiveTimeoutError, ())  # both have called

    _one_rank_works(library)
    try:
        with seams.replaced_connect(connect):
            said, _ = gpu_threads.run(
                2, folder / "never-connects", function, TIMEOUT_S, libraries=(library,)
            )
            _one_rank_works(library)
    finally:
        over.set()
    return str(said)


def is_killed(library: str, *, channel: Channel, folder: Path, cpu: bool) -> str:
    """The peer is a process that is killed when it has joined."""
    place, name, patience_s = folder / "is-killed", "killed", 2 * LIMIT_S
    program = (
        f"import sys; sys.path[:] = {sys.path!r}; import colltensor as col\n"
        f"col.init_collective_group(2, 1, {gpu_streams.BACKEND!r}, {name!r}, timeout_s={patience_s}, init_method='file://{place}')\n"
        "print('joined', flush=True); sys.stdin.read()"
    )
    if cpu:  # as for a rank that has a device; it makes no use of it
        program = f"import sys; sys.path[:] = {sys.path!r}; import stand_in; stand_in.install()\n{program}"
    peer = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        group = col.init_collective_group(
            2, 0, gpu_streams.BACKEND, name, timeout_s=patience_s, init_method=f"file://{place}"
        )
        assert peer.stdout is not None
        assert peer.stdout.readline() == "joined\n"
        os.kill(peer.pid, signal.SIGKILL)
        try:
            return _refused(group, library, col.PeerLostError)
        finally:
            group.destroy()
    finally:
        peer.kill()
        peer.communicate()


def differs(library: str, *, channel: Channel, folder: Path, cpu: bool) -> None:
    """Ranks of ``check=True`` find out that their counts differ, before NCCL is asked."""

    def function(group: Any) -> None:
        with gpu_streams.Queue(library) as queue:
            tensor = queue.full(1.0, 100 + group.rank)
            with pytest.raises(col.MismatchError) as caught:
                group.allreduce(tensor)
            assert 1 in caught.value.ranks
            assert queue.read(tensor) == {1.0}, "data was changed"

    _together(library, folder / "differs", function, LIMIT_S, check=True)


def destroyed_early(library: str, *, channel: Channel, folder: Path, cpu: bool) -> str:
    """A group is destroyed while its call waits behind a long kernel.

    It is aborted and reported, and the stream runs on.
    """
    with gpu_streams.Queue(library) as queue:
        group = col.init_collective_group(1, 0, gpu_streams.BACKEND, "destroyed early")
        tensor = queue.full(1.0)
        group.allreduce(tensor, async_op=True).wait()
        queue.synchronize()
        queue.sleep(HOLD_S)
        work = group.allreduce(tensor, async_op=True)
        began = time.monotonic()
        group.destroy()
        took = time.monotonic() - began
        try:
            settle(work)
            work.wait()
        except col.CollectiveError as error:
            said = type(error).__name__
        else:
            said = "the call was done"
        runs_on(queue)
    assert took < HOLD_S + LIMIT_S, took
    return f"destroy() took {took:.1f} s beside a kernel of {HOLD_S:.0f} s; {said}"


def long_before(library: str, *, channel: Channel, folder: Path, cpu: bool) -> None:
    """The timeout counts from when the call's turn has come on the device."""
    with gpu_streams.Queue(library) as queue:
        group = col.init_collective_group(
            1, 0, gpu_streams.BACKEND, "long before", timeout_s=TIMEOUT_S / 4
        )
        tensor = queue.full(3.0)
        group.allreduce(queue.full(0.0))
        queue.synchronize()
        queue.sleep(TIMEOUT_S / 2)
        work = group.allreduce(tensor, async_op=True)
        settle(work)
        work.wait()
        assert queue.read(tensor) == {3.0}
        group.destroy()


def two_ranks(library: str, *, channel: Channel, folder: Path, cpu: bool) -> str:
    """Two ranks of one process on one device.

    From libnccl 2.30 on right values, before that words of refusal.
    """

    def function(group: Any) -> str:
        with gpu_streams.Queue(library) as queue:
            tensor = queue.full(1.0 + group.rank)
            try:
                group.allreduce(tensor)
                group.synchronize()
            except col.CollectiveError as error:
                cause = f"{error} {error.__cause__}"
                assert _DUPLICATE in cause, cause
                return f"refused: {type(error).__name__}"
            assert queue.read(tensor) == {3.0}
            return "two ranks work"

    if not cpu:
        os.environ.update(NCCL_MULTI_RANK_GPU_ENABLE="1", NCCL_NVLS_ENABLE="0", NCCL_MAX_CTAS="1")
    said = _together(library, folder / "two-ranks", function, LIMIT_S)
    return " and ".join(sorted(set(said)))


def illegal_address(library: str, *, channel: Channel, folder: Path, cpu: bool) -> str:
    """A kernel of somebody else's breaks the device: who calls next, or waits, is told why."""
    queue = gpu_streams.Queue(library).__enter__()
    where, error = _broken(queue)
    with contextlib.suppress(RuntimeError):  # what the end of a broken stream may raise
        queue.__exit__()
    said = f"{type(error).__name__}: {error}"
    assert "illegal" in said.lower(), said
    return f"{where} raised {said}"


def _broken(queue: Any) -> tuple[str, BaseException | None]:
    """Break the device before a call; returns who raised what."""
    group = col.init_collective_group(1, 0, gpu_streams.BACKEND, "broken")
    tensor = queue.full(1.0)
    group.allreduce(tensor, async_op=True).wait()
    queue.synchronize()
    queue.sleep(0.2)
    seams.write_to_nowhere()
    where = "the call"
    try:
        work = group.allreduce(tensor, async_op=True)
        where = "wait()"
        until = time.monotonic() + LIMIT_S
        while not work.done() and time.monotonic() < until:
            time.sleep(0.01)
        work.wait()
    except RuntimeError as error:  # a CollectiveError, or what CUDA says at once
        return where, error
    return where, None


def _refused(
    group: Any, library: str, kind: type[col.CollectiveError], ranks: tuple[int, ...] = (1,)
) -> str:
    """Check that an allreduce fails in time with the right error; returns which.

    The stream must run on.
    """
    with gpu_streams.Queue(library) as queue:
        began = time.monotonic()
        tensor = queue.full(1.0)

        def call() -> None:
            group.allreduce(tensor)
            group.synchronize()

        with pytest.raises(kind) as caught:
            call()
        took = time.monotonic() - began
        assert group.rank or caught.value.ranks == ranks, caught.value.ranks
        runs_on(queue)
    assert took < LIMIT_S, took
    return f"{kind.__name__} after {took:.1f} s"


def _together(
    library: str, folder: Path, function: Callable[[Any], Any], timeout_s: float, **options: Any
) -> list[Any]:
    """Run two ranks in threads, once everything is loaded.

    Loading takes longer than they have time.
    """
    _one_rank_works(library)
    return gpu_threads.run(2, folder, function, timeout_s, libraries=(library,), **options)


def _one_rank_works(library: str) -> None:
    with gpu_streams.Queue(library) as queue:
        group = col.init_collective_group(1, 0, gpu_streams.BACKEND, "afterwards")
        tensor = queue.full(2.0)
        group.allreduce(tensor)
        assert queue.read(tensor) == {2.0}
        group.destroy()
