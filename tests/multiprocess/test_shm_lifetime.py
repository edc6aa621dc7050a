"""From the making of groups in shared memory to their end: what is refused, what is left, who may use them."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import RankPool
from shm_ranks import Held, fresh, own_group, shared_mappings

import colltensor as col

pytestmark = pytest.mark.shm


def many_groups(rank: int, size: int, names: list[str]) -> None:
    before, mapped = Held.now(), shared_mappings()  # the pool may have groups of its own
    for name in names:
        with own_group(rank, size, name) as group:
            group.allreduce(np.ones(20_000))
            group.allreduce(np.ones(3), async_op=True).wait()
            assert shared_mappings() == mapped + 1
    assert before.left_behind() == []
    groups = [
        col.init_collective_group(
            size, rank, "shm", name, init_method=f"file://{os.environ['TMPDIR']}"
        )
        for name in names[:20]
    ]
    assert shared_mappings() == mapped + 20
    for group in reversed(groups):
        assert float(group.allreduce(np.ones(1))[0]) == size
    for group in groups:
        group.destroy()
    assert before.left_behind() == []


def test_fifty_groups_leave_nothing(pool: RankPool) -> None:
    pool.run(2, many_groups, [fresh() for _ in range(50)])


def no_memory(rank: int, size: int, name: str, way: str) -> tuple[str, list[str]]:
    before = Held.now()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    fallocate = os.posix_fallocate
    try:
        if way == "reserve" and rank == 0:

            def refuse(*_: Any) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            os.posix_fallocate = refuse
        if way == "map" and rank == size - 1:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(
                resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 20), limits[1])
            )
        with pytest.raises(col.BackendUnavailableError) as caught, own_group(rank, size, name):
            pass
    finally:
        os.posix_fallocate = fallocate
        resource.setrlimit(resource.RLIMIT_AS, limits)
    with own_group(rank, size, name) as group:
        group.barrier()
    return str(caught.value), before.left_behind()


@pytest.mark.parametrize(("way", "words"), [("reserve", "[Errno 28]"), ("map", "rank 2: ")])
def test_not_enough_memory_is_said_on_every_rank(pool: RankPool, way: str, words: str) -> None:
    for message, left in pool.run(3, no_memory, fresh(), way):
        assert words in message
        assert left == []


def make_control_group() -> Path:
    """Make a control group whose memory can be limited, below the mounted root; the caller removes it."""
    for parent, needed in ((Path("/sys/fs/cgroup/memory"), ""), (Path("/sys/fs/cgroup"), "memory")):
        try:
            offered = (parent / "cgroup.subtree_control").read_text() if needed else ""
            if needed in offered.split() or not needed:
                made = parent / f"colltensor-test-{os.getpid()}"
                made.mkdir()
                return made
        except OSError:
            continue
    pytest.skip("no control group with a limit of memory can be made here")


def in_control_group(rank: int, size: int, name: str, folder: str) -> tuple[str, str]:
    """Make the group while rank 0 may have a little less memory than it takes, and then a little more."""
    from colltensor.backends.shm import library

    native = library.load()
    nbytes = native.shm_nbytes(size, native.shm_half_nbytes(size))
    limit = next(
        path
        for path in (Path(folder, "memory.limit_in_bytes"), Path(folder, "memory.max"))
        if path.exists()
    )
    members = Path(folder, "cgroup.procs")
    if rank == 0:
        limit.write_text(str(nbytes - (64 << 10)))
        before = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        members.write_text("0")
    try:
        with pytest.raises(col.BackendUnavailableError) as caught, own_group(rank, size, name):
            pass
        with own_group(rank, size, name, backend="auto") as group:
            group.allreduce(np.ones(4))
            fallen_back = group.backend
        if rank == 0:
            limit.write_text(str(nbytes + (8 << 20)))
        with own_group(rank, size, name) as group:
            group.allreduce(np.ones(4))
    finally:
        if rank == 0:
            wanted = "memory" if "memory.limit_in_bytes" in limit.name else ""
            [own] = [path for _, controllers, path in before if wanted in controllers.split(",")]
            back = members.parents[1] / own.lstrip("/")
            ((back if back.exists() else members.parents[1]) / "cgroup.procs").write_text("0")
    return str(caught.value), fallen_back


@pytest.mark.slow
@pytest.mark.gloo
def test_a_control_group_without_the_memory_kills_nobody(pool: RankPool) -> None:
    folder = make_control_group()
    try:
        for message, fallen_back in pool.run(3, in_control_group, fresh(), str(folder)):
            assert "[Errno 12]" in message
            assert fallen_back == "gloo"
    finally:
        folder.rmdir()


def another_memory(rank: int, size: int, name: str) -> str:
    """Rank 1 maps a memory of its own, which looks just like the group's."""
    from colltensor.backends.shm import segment

    fetch = segment._fetch

    def fetch_and_copy(*arguments: Any) -> int:
        given = fetch(*arguments)
        nbytes = os.fstat(given).st_size
        own = os.memfd_create("colltensor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.posix_fallocate(own, 0, nbytes)
        os.pwrite(own, os.pread(given, 4096, 0), 0)
        import fcntl

        fcntl.fcntl(own, fcntl.F_ADD_SEALS, segment._SEALS)
        os.close(given)
        return own

    before = Held.now()
    try:
        if rank == 1:
            segment._fetch = fetch_and_copy
        with pytest.raises(col.BackendUnavailableError) as caught, own_group(rank, size, name):
            pass
    finally:
        segment._fetch = fetch
    assert before.left_behind() == []
    return str(caught.value)


def test_memory_that_is_not_shared_is_refused_on_every_rank(pool: RankPool) -> None:
    for message in pool.run(3, another_memory, fresh()):
        assert re.search(r"rank 0: .*\[1\]", message), message


def out_of_reach(rank: int, size: int, name: str) -> tuple[str, float, str]:
    """The last rank is in another network namespace, say, where rank 0's socket does not exist."""
    from colltensor.backends.shm import segment

    reach = segment._reach

    def reach_nothing(_: bytes, deadline: float) -> Any:
        return reach(b"\0colltensor-that-nobody-listens-at", deadline)

    before = Held.now()
    try:
        if rank == size - 1:
            segment._reach = reach_nothing
        began = time.monotonic()
        with pytest.raises(col.BackendUnavailableError) as caught, own_group(rank, size, name):
            pass
        took = time.monotonic() - began
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            with own_group(rank, size, name, backend="auto") as group:
                group.allreduce(np.ones(4))
                fallen_back = group.backend
    finally:
        segment._reach = reach
    assert before.left_behind() == []
    return str(caught.value), took, fallen_back


@pytest.mark.gloo
def test_a_rank_that_cannot_fetch_the_memory_is_not_waited_for(pool: RankPool) -> None:
    for message, took, fallen_back in pool.run(3, out_of_reach, fresh()):
        assert re.search(rf"rank 2: .*\[Errno {errno.ECONNREFUSED}\]", message), message
        assert took < 5.0
        assert fallen_back == "gloo"


def without_seals(rank: int, size: int, name: str) -> str:
    from colltensor.backends.shm import segment

    seals = segment._SEALS
    try:
        if rank == 0:
            segment._SEALS = 0
        with pytest.raises(col.BackendUnavailableError) as caught, own_group(rank, size, name):
            pass
    finally:
        segment._SEALS = seals
    return str(caught.value)


def test_memory_that_could_shrink_is_refused(pool: RankPool) -> None:
    for message in pool.run(2, without_seals, fresh()):
        assert "sealed" in message


def end_otherwise(
    rank: int, size: int, name: str, way: str
) -> tuple[float, tuple[int, ...]] | None:
    """The last rank goes in its own way while the others wait for it, one of them in a transfer."""
    group = col.init_collective_group(
        size, rank, "shm", name, init_method=f"file://{os.environ['TMPDIR']}"
    )
    group.barrier()
    if rank == size - 1:
        time.sleep(0.2)
        if way == "exit":
            os._exit(0)
        if way == "system exit":
            raise SystemExit(0)
        if way == "raise":
            with pytest.raises(ZeroDivisionError):  # its own business, as long as it comes back
                _ = 1 / 0
        group.destroy()
        return None
    began = time.monotonic()
    with pytest.raises(col.PeerLostError) as caught:
        group.allreduce(np.ones(900_000)) if rank == 0 else group.recv(np.ones(3), size - 1)
    group.destroy()
    return time.monotonic() - began, caught.value.ranks


@pytest.mark.parametrize("way", ["destroy", "exit", "raise"])
def test_a_rank_that_goes_is_named_soon(pool: RankPool, way: str) -> None:
    found = pool.run(3, end_otherwise, fresh(), way, may_die=[2] if way == "exit" else ())
    for took, ranks in found[:2]:
        assert took < 1.7
        assert ranks == (2,)


def fork_in_the_middle(rank: int, size: int, name: str) -> None:
    """Fork while an operation runs in the worker, and while another thread makes and destroys groups."""
    stop = threading.Event()

    def make_and_destroy() -> None:
        while not stop.is_set():
            col.init_collective_group(
                1, 0, "shm", name + "-alone", init_method=f"file://{os.environ['TMPDIR']}/{rank}"
            )
            col.destroy_collective_group(name + "-alone")

    Path(f"{os.environ['TMPDIR']}/{rank}").mkdir(exist_ok=True)
    maker = threading.Thread(target=make_and_destroy)
    with own_group(rank, size, name) as group:
        maker.start()
        try:
            for _ in range(15):
                data = np.full(400_000, rank + 1.0)
                work = group.allreduce(data, async_op=True)
                assert _child(group) == 0
                work.wait()
                assert (data == size * (size + 1) / 2).all()
        finally:
            stop.set()
            maker.join()
        group.barrier()


def _child(group: Any) -> int:
    """Fork; the child must be refused, and be able to let go of the group. Return its exit code, -1 if it hung."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(0)
            for call in (
                lambda: group.allreduce(np.ones(3)),
                group.barrier,
                lambda: group.send(np.ones(3), 0),
            ):
                try:
                    call()
                    os._exit(2)
                except (col.GroupError, col.RankError):
                    pass
            group._backend.close()
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_child_forked_in_the_middle_disturbs_nobody(pool: RankPool) -> None:
    pool.run(2, fork_in_the_middle, fresh())


def destroy_under_a_wait(rank: int, size: int, name: str, way: str) -> tuple[float, str]:
    """A thread of rank 0 waits while another destroys the group; the others wait for rank 0."""
    found: list[BaseException] = []

    def wait(group: Any) -> None:
        try:
            if way == "recv":
                group.recv(np.ones(3), 1)
            elif way == "async":
                group.allreduce(np.ones(3), async_op=True).wait()
            else:
                group.allreduce(np.ones(900_000))
        except BaseException as error:
            found.append(error)

    with own_group(rank, size, name) as group:
        group.barrier()
        began = time.monotonic()
        if rank == 0:
            waiter = threading.Thread(target=wait, args=(group,))
            waiter.start()
            time.sleep(0.3)
            group.destroy()
            waiter.join(5.0)
            return time.monotonic() - began, str(found[0])
        with pytest.raises(col.PeerLostError) as caught:
            # two that both receive would be told so
            group.barrier() if way == "recv" else group.recv(np.ones(3), 0)
        assert caught.value.ranks == (0,)
        return time.monotonic() - began, str(caught.value)


@pytest.mark.parametrize("way", ["large", "recv", "async"])
def test_destroying_a_group_in_which_a_thread_waits(pool: RankPool, way: str) -> None:
    found = pool.run(3, destroy_under_a_wait, fresh(), way)
    assert all(took < 1.3 for took, _ in found), found
    assert "destroyed" in found[0][1], found


@pytest.mark.slow
def test_more_than_sixty_four_ranks(tmp_path: Path) -> None:
    """More ranks than one word of a set names, and smaller staging; processes of their own."""
    (tmp_path / "many").mkdir()
    pool = RankPool(tmp_path / "many")
    try:
        assert pool.run(66, work_together, fresh(), timeout_s=100.0) == [(64,)] * 64 + [None, (64,)]
    finally:
        pool.close()


def work_together(rank: int, size: int, name: str) -> tuple[int, ...] | None:
    with own_group(rank, size, name, timeout_s=60.0) as group:
        for count in (1, 1025, 9001, 100_003):
            data = np.full(count, rank + 1, np.int64)
            group.allreduce(data)
            assert (data == size * (size + 1) // 2).all()
        outputs = [np.zeros(5, np.int16) for _ in range(size)]
        group.alltoall(outputs, [np.full(5, 100 * rank + peer, np.int16) for peer in range(size)])
        assert [int(output[4]) for output in outputs] == [
            int(np.int16(100 * peer + rank)) for peer in range(size)
        ]
        group.barrier()
        if rank == 64:
            return None
        with pytest.raises(col.CollectiveError) as caught:
            group.barrier()
        return caught.value.ranks
