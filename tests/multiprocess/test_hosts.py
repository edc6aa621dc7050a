"""Which backend "auto" chooses where, and what becomes of a group between hosts when a rank fails."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from host_ranks import group_on, held
from pool import RankPool

import colltensor as col
from colltensor.backends import get_backend, is_available, reason
from colltensor.backends.auto import AutoSpec
from colltensor.backends.gloo import library as gloo_library
from colltensor.backends.hierarchical.topology import Hosts

pytestmark = pytest.mark.skipif(not is_available("shm"), reason=str(reason("shm")))


def fresh() -> str:
    return f"hosts-{uuid4().hex[:8]}"


def choose(
    rank: int, size: int, hosts: str, name: str, options: dict[str, Any]
) -> tuple[str, float]:
    with group_on(hosts, rank, name, **options) as group:
        return group.backend, float(group.allreduce(np.full(5, rank + 1.0))[0])


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("hosts", "options", "backend"),
    [
        ("a", {}, "loopback"),
        ("aa", {}, "shm"),
        ("aaa", {"interface": "lo"}, "shm"),
        ("ab", {}, "gloo"),
        ("abc", {}, "gloo"),
        ("aab", {}, "hierarchical"),
        ("abab", {}, "hierarchical"),
        ("aa", {"backend": "gloo"}, "gloo"),
        ("aab", {"backend": "gloo"}, "gloo"),
        ("aa", {"backend": "hierarchical"}, "shm"),
        ("ab", {"backend": "hierarchical"}, "gloo"),
    ],
)
def test_the_backend_for_the_hosts(
    pool: RankPool, hosts: str, options: dict[str, Any], backend: str
) -> None:
    size = len(hosts)
    assert (
        pool.run(size, choose, hosts, fresh(), options) == [(backend, size * (size + 1) / 2)] * size
    )


def test_one_host_needs_no_gloo(pool: RankPool) -> None:
    assert pool.run(2, choose, "aa", fresh(), {}) == [("shm", 3.0)] * 2


@pytest.mark.parametrize("hosts", ["aa", "aab"])
def test_a_provider_means_gloo(pool: RankPool, provider: str, hosts: str) -> None:
    size = len(hosts)
    for found in pool.run(size, choose, hosts, fresh(), {"provider": provider}):
        assert found == ("gloo", size * (size + 1) / 2)


MISSING = "/nowhere/libcolltensor.so"
PROVIDER = re.compile(r"\bGloo.*'(native|torch|pygloo)'")


def without_library(
    rank: int,
    size: int,
    hosts: str,
    name: str,
    lacking: int,
    options: dict[str, Any],
    instead: str = MISSING,
) -> tuple[str, str]:
    """Make a group while one rank has no native library; return its backend or the error, and what was logged."""
    from colltensor.backends.shm import library

    loaded = list(library._loaded)
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("colltensor")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    variable = "COLLTENSOR_LIBRARY"
    place = os.environ.get(variable)
    if rank == lacking:
        library._loaded.clear()
        os.environ[variable] = instead
    before = held()
    try:
        with group_on(hosts, rank, name, **options) as group:
            assert group.allreduce(np.full(5, rank + 1.0))[0] == size * (size + 1) / 2
            found = group.backend
    except col.BackendUnavailableError as error:
        found = str(error)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        if rank == lacking:
            library._loaded[:] = loaded
            os.environ.pop(variable)
            if place is not None:
                os.environ[variable] = place
    wait_for(
        lambda: (
            held()[1:] == before[1:]
            and (options.get("backend") is None or nothing_more_than(before))
        ),
        before,
    )
    return found, "\n".join(logged)


def nothing_more_than(before: tuple[int, int, int]) -> bool:
    """Return True if this process holds no more; less where an earlier test's Gloo came to its timeout meanwhile."""
    return all(now <= then for now, then in zip(held(), before, strict=True))


def wait_for(condition: Callable[[], bool], what: object) -> None:
    deadline = time.monotonic() + 3.0
    while not condition():
        threads = [thread.name for thread in threading.enumerate()]
        assert time.monotonic() < deadline, f"{held()} instead of {what}: {threads}"
        time.sleep(0.02)


@pytest.mark.gloo
@pytest.mark.parametrize(("hosts", "lacking"), [("aa", 1), ("aabb", 0), ("aabb", 3), ("abb", 2)])
def test_gloo_where_memory_cannot_be_shared(pool: RankPool, hosts: str, lacking: int) -> None:
    for found, logged in pool.run(len(hosts), without_library, hosts, fresh(), lacking, {}):
        assert found == "gloo"
        assert "using 'gloo'" in logged
        assert MISSING in logged


@contextlib.contextmanager
def records() -> Iterator[list[logging.LogRecord]]:
    """What is logged meanwhile."""
    found: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = found.append  # type: ignore[method-assign, assignment]
    logger = logging.getLogger("colltensor")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def told(
    rank: int, size: int, hosts: str, options: dict[str, Any], trouble: str
) -> tuple[list[str], list[str]]:
    """Make two groups while something is amiss on one rank; return what both say of it, and the warnings and hints."""
    from colltensor import options as group_options
    from colltensor.backends import auto
    from colltensor.backends.shm import library, segment

    auto._warned.clear()
    group_options._hinted.clear()
    if gloo_library.reason() is None:  # which lies beside the library that is missing below
        gloo_library.load()
    name = options.pop("name")
    with records() as found, pytest.MonkeyPatch.context() as patch:
        if trouble == "library" and rank == size - 1:
            patch.setattr(library, "_loaded", [])
            patch.setenv("COLLTENSOR_LIBRARY", MISSING)
        elif trouble == "filter":
            patch.setattr(segment.os, "memfd_create", refused)
        elif trouble == "memory":
            patch.setattr(segment.cgroup, "spare_nbytes", lambda: 1 << 20)
        elif trouble == "reading" and rank == 0:
            patch.setenv("COLLTENSOR_READ_PEERS", "0")
        with (
            group_on(hosts, rank, name, **options) as first,
            group_on(hosts, rank, name + "-2", **options) as second,
        ):
            whys = [first.why, second.why, first.split(0).why]
    levels = {logging.WARNING: "warning", logging.INFO: "hint"}
    return whys, [
        f"{levels[record.levelno]}: {record.getMessage()}"
        for record in found
        if record.levelno in levels
    ]


def refused(name: str, flags: int) -> int:
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.gloo
@pytest.mark.parametrize("hosts", ["aaa", "aabb"])
@pytest.mark.parametrize(
    ("trouble", "words"),
    [("library", "COLLTENSOR_LIBRARY"), ("filter", "[Errno 1]"), ("memory", " 1.0 MiB ")],
)
def test_gloo_in_the_place_of_shared_memory_is_told_once(
    pool: RankPool, hosts: str, trouble: str, words: str
) -> None:
    """Hundreds of times slower was a debug line, and on one rank."""
    for rank, (whys, lines) in enumerate(
        pool.run(len(hosts), told, hosts, {"name": fresh()}, trouble)
    ):
        for why in whys:
            assert why.startswith("backend='auto': "), rank
            assert words in why
            assert PROVIDER.search(why)
        assert len(lines) == 1, rank
        assert lines[0].startswith("warning: group 'hosts-")
        assert f"(rank {rank}): " in lines[0]
        assert "'gloo'" in lines[0]
        assert words in lines[0]
        if trouble == "library" and hosts == "aaa":
            assert re.search(rf"rank 2: .*{MISSING}", lines[0])


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("hosts", "options", "words", "hinted"),
    [
        ("a", {}, r"^[^'=]+$", False),
        ("aa", {}, r"^backend='auto': .*\b2\b", False),
        ("ab", {}, r"^backend='auto': .*\(rank 0: simulated-a, rank 1: sim", False),
        ("abcdef", {}, r"\(rank 0: simulated-a, rank 1: ", False),
        ("aab", {}, rf"^backend='auto': .*\b3 .*\b2 .*; {PROVIDER.pattern}", False),
        ("aa", {"backend": "shm"}, "^backend='shm' ", False),
        ("aa", {"backend": "hierarchical"}, "^backend='hierarchical' ", False),
        ("ab", {"backend": "hierarchical"}, "^backend='hierarchical' ", False),
        ("ab", {"backend": "gloo"}, rf"^backend='gloo' .*; {PROVIDER.pattern}", False),
        ("aa", {"backend": "gloo"}, r"^backend='gloo' .*backend='auto'", True),
    ],
)
def test_why(pool: RankPool, hosts: str, options: dict[str, Any], words: str, hinted: bool) -> None:
    for whys, lines in pool.run(len(hosts), told, hosts, {"name": fresh(), **options}, ""):
        assert all(re.search(words, why) for why in (whys if len(set(hosts)) == 1 else whys[:2])), (
            whys
        )
        assert len(lines) == hinted, lines
        assert all("hint: group 'hosts-" in line and "backend='auto'" in line for line in lines)


def test_why_a_provider(pool: RankPool, provider: str) -> None:
    for whys, lines in pool.run(2, told, "aa", {"name": fresh(), "provider": provider}, ""):
        assert re.match(f"provider={provider!r} .*gloo", whys[0])
        assert len(lines) == 1  # the hint


def test_why_memory_is_not_read(pool: RankPool) -> None:
    for whys, lines in pool.run(2, told, "aa", {"name": fresh()}, "reading"):
        assert "(rank 0: COLLTENSOR_READ_PEERS" in whys[0]
        assert not lines


PROGRAM = """
import sys, numpy, colltensor
group = colltensor.init_collective_group(2, int(sys.argv[1]), init_method=sys.argv[2])
group.allreduce(numpy.ones(3))
group.split(0)
"""


@pytest.mark.gloo
@pytest.mark.needs("torch")  # whose Gloo is there without the native library
def test_a_plain_script_shows_the_warning(tmp_path: Path) -> None:
    """Once, where nobody configured logging."""
    gloo, missing = gloo_library.path(), tmp_path / "lib" / "libcolltensor.so"
    missing.parent.mkdir()
    if gloo.is_file():
        missing.with_name(gloo.name).symlink_to(gloo)
    environment = {
        **os.environ,
        "COLLTENSOR_LIBRARY": str(missing),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), tmp_path.as_uri()],
            env=environment,
            text=True,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(ranks):
        _, printed = process.communicate(timeout=90)
        assert process.returncode == 0, printed
        assert printed.count("group 'default' (rank") == 1, printed
        assert f"(rank {rank})" in printed
        assert str(missing) in printed


@pytest.fixture
def broken(tmp_path: Path) -> str:
    """A library that is there and cannot be loaded."""
    path = tmp_path / "libcolltensor.so"
    path.write_text("no library")
    return str(path)


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("hosts", "backend", "lacking"),
    [
        ("aa", "shm", 0),
        ("aa", "shm", 1),
        ("aabb", "hierarchical", 0),
        ("aabb", "hierarchical", 3),
        ("abb", "hierarchical", 2),
    ],
)
def test_an_explicit_backend_is_not_replaced(
    pool: RankPool, broken: str, hosts: str, backend: str, lacking: int
) -> None:
    options = {"backend": backend}
    for error, logged in pool.run(
        len(hosts), without_library, hosts, fresh(), lacking, options, broken
    ):
        assert f"'{backend}' " in error
        assert f"{broken} " in error
        assert "using 'gloo'" not in logged


@pytest.mark.gloo
def test_a_rank_alone_on_its_host_needs_no_library(pool: RankPool, broken: str) -> None:
    options = {"backend": "hierarchical"}
    found = pool.run(3, without_library, "abb", fresh(), 0, options, broken)
    assert [backend for backend, _ in found] == ["hierarchical"] * 3


def without_both(rank: int, size: int, hosts: str, name: str, broken: str) -> str:
    """Make a group where there is no Gloo, and a library that cannot be loaded on rank 1."""
    from colltensor.backends import gloo

    with pytest.MonkeyPatch.context() as patch:
        # Not library.reason(): an earlier test may have loaded the native Gloo in this process.
        patch.setattr(gloo, "usable_providers", lambda: ({}, {"native": "it was not built"}))
        return without_library(rank, size, hosts, name, 1, {}, broken)[0]


@pytest.mark.parametrize("hosts", ["aa", "aab"])
def test_neither_says_both_reasons(pool: RankPool, broken: str, hosts: str) -> None:
    for found in pool.run(len(hosts), without_both, hosts, fresh(), broken):
        assert f"build {broken} " in found
        assert re.search(r"pip install .*\btorch\b", found)


def test_auto_is_available_with_either(monkeypatch: pytest.MonkeyPatch) -> None:
    shm, gloo = type(get_backend("shm")), type(get_backend("gloo"))
    monkeypatch.setattr(shm, "available", lambda self: "no library")
    monkeypatch.setattr(gloo, "available", lambda self: None)
    assert AutoSpec().available() is None
    monkeypatch.setattr(gloo, "available", lambda self: "no Gloo")
    assert AutoSpec().available() == "no library; no Gloo"
    monkeypatch.setattr(shm, "available", lambda self: None)
    assert AutoSpec().available() is None


def test_hosts_by_name() -> None:
    hosts = Hosts.of(("x", "y", "x", "x", "y"), 3)
    assert hosts.members == ((0, 2, 3), (1, 4))
    assert hosts.index == (0, 1, 0, 0, 1)
    assert hosts.local == (0, 0, 1, 2, 1)
    assert (hosts.host, hosts.position, hosts.shards) == (0, 2, 2)
    assert hosts.neighbours == (0, 2, 3)
    assert hosts.leaders() == (0, 1)
    assert hosts.leaders(root=4) == (0, 4)
    assert Hosts.of(("x", "y", "x", "x", "y"), 4).counterparts() == (2, 4)


def couriers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.endswith(" hosts")]


CALLS: dict[str, Callable[[Any, np.ndarray[Any, Any]], object]] = {
    "allreduce": lambda group, data: group.allreduce(data),
    "broadcast": lambda group, data: group.broadcast(data, 1),
    "reduce": lambda group, data: group.reduce(data, 2),
    "allgather": lambda group, data: group.allgather([np.empty_like(data) for _ in range(4)], data),
}


def call_for_ever(group: Any, call: str, data: np.ndarray[Any, Any]) -> None:
    while True:
        data[:] = 1
        CALLS[call](group, data)


def lose_a_rank(
    rank: int, size: int, hosts: str, name: str, victim: int, after_s: float, call: str, count: int
) -> tuple[float, str, tuple[int, ...], float]:
    """One rank is killed in the middle of a call; return when the others knew, what, and how long leaving took."""
    before, of_others = (
        held(),
        couriers(),
    )  # those of groups that earlier tests have left in this process
    with group_on(hosts, rank, name) as group:
        assert group.backend == "hierarchical"
        data = np.ones(count, np.float32)
        CALLS[call](group, data)
        died = time.monotonic() + after_s
        if rank == victim:
            threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
        with pytest.raises(col.CollectiveError) as caught:
            call_for_ever(group, call, data)
        took = time.monotonic() - died
        with pytest.raises(col.GroupError) as refused:
            group.allreduce(data)
        assert isinstance(refused.value.__cause__, col.CollectiveError)
        began = time.monotonic()
        group.destroy()
        left = time.monotonic() - began
    # Of Gloo something may stay until its own timeout: what was half received from the rank that died does not end.
    wait_for(lambda: held()[1] == before[1] and couriers() == of_others, before)
    return took, type(caught.value).__name__, getattr(caught.value, "ranks", ()), left


@pytest.mark.gloo
@pytest.mark.needs("torch")
@pytest.mark.parametrize(
    ("call", "count", "victims"),
    [
        ("allreduce", 8_000_000, (0, 1)),
        ("allreduce", 5, (1, 2)),
        ("broadcast", 8_000_000, (2, 3)),
        ("reduce", 8_000_000, (3, 0)),
        ("allgather", 1_000_000, (0, 3)),
    ],
)
@pytest.mark.parametrize("hosts", ["aabb", "abab"])
def test_a_killed_rank_is_named_everywhere(
    pool: RankPool, hosts: str, call: str, count: int, victims: tuple[int, ...]
) -> None:
    chance = random.Random(f"{hosts} {call} {count}")
    for victim in victims:
        after_s = chance.uniform(0.05, 0.5)
        found = pool.run(
            4, lose_a_rank, hosts, fresh(), victim, after_s, call, count, may_die={victim}
        )
        for rank, outcome in enumerate(found):
            if rank != victim:
                took, kind, ranks, left = outcome
                assert (kind, ranks) == ("PeerLostError", (victim,)), (rank, outcome)
                assert took < 2.5, (rank, outcome)
                assert left < 2.5, (rank, outcome)


def stop_a_rank(
    rank: int, size: int, hosts: str, name: str, victim: int
) -> tuple[str, tuple[int, ...], float]:
    with group_on(hosts, rank, name, timeout_s=1.5) as group:
        data = np.ones(4_000_000, np.float32)
        pids = group.allgather_object(os.getpid())
        began = time.monotonic()
        other = (victim + 1) % size
        if rank == other:
            threading.Timer(0.3, os.kill, (pids[victim], signal.SIGSTOP)).start()
            threading.Timer(5.0, os.kill, (pids[victim], signal.SIGCONT)).start()
        with pytest.raises(col.CollectiveError) as caught:
            call_for_ever(group, "allreduce", data)
        took = time.monotonic() - began
        if rank == other:
            time.sleep(max(0.0, began + 5.2 - time.monotonic()))
        return type(caught.value).__name__, getattr(caught.value, "ranks", ()), took


@pytest.mark.gloo
@pytest.mark.needs("torch")
@pytest.mark.parametrize("victim", [0, 3])
def test_a_stopped_rank_is_late(pool: RankPool, victim: int) -> None:
    found = pool.run(4, stop_a_rank, "aabb", fresh(), victim)
    assert [kind for kind, _, _ in found] == ["CollectiveTimeoutError"] * 4
    for rank, (_, ranks, took) in enumerate(found):
        assert ranks == (victim,), found
        assert rank == victim or took < 5.0


def come_late(rank: int, size: int, hosts: str, name: str) -> tuple[int, ...]:
    with group_on(hosts, rank, name, timeout_s=1.0) as group:
        group.barrier()
        if rank == 2:
            time.sleep(2.0)
        with pytest.raises(col.CollectiveTimeoutError) as caught:
            group.allreduce(np.ones(3_000_000))
        return caught.value.ranks


@pytest.mark.gloo
def test_a_late_rank_is_named_on_every_rank(pool: RankPool) -> None:
    assert pool.run(4, come_late, "aabb", fresh()) == [(2,)] * 4


def interrupt(rank: int, size: int, hosts: str, name: str) -> tuple[str, float]:
    with group_on(hosts, rank, name) as group:
        data = np.ones(8_000_000, np.float32)
        group.allreduce(data)
        began = time.monotonic()
        with pytest.raises((col.GroupError, KeyboardInterrupt)) as caught:
            call_until_interrupted(group, data, at_rank=1)
        took = time.monotonic() - began
        return f"{type(caught.value).__name__} {caught.value}", took


def call_until_interrupted(group: col.Group, data: np.ndarray[Any, Any], at_rank: int) -> None:
    """Call until an interrupt ends a call; one that comes between two calls concerns neither."""
    while True:
        if group.rank == at_rank:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            call_for_ever(group, "allreduce", data)
        except KeyboardInterrupt:
            if group.broken is not None:
                raise


@pytest.mark.gloo
@pytest.mark.needs("torch")
def test_an_interrupt_ends_the_call_everywhere(pool: RankPool) -> None:
    found = pool.run(4, interrupt, "abab", fresh())
    for rank, (what, took) in enumerate(found):
        assert what.startswith("KeyboardInterrupt" if rank == 1 else "GroupError"), found
        assert "rank 1" in what or rank == 1
        assert took < 2.5, found


def disagree(rank: int, size: int, hosts: str, name: str) -> None:
    with group_on(hosts, rank, name) as group:
        for count in (3, 1_000_000):
            data = np.full(count, rank, np.float32)
            with pytest.raises(col.MismatchError) as caught:
                group.allreduce(data if rank != 2 else data[:-1])
            assert caught.value.ranks == (2,)
            assert (data == rank).all()
            assert group.allreduce(np.ones(count))[0] == size


@pytest.mark.gloo
def test_a_mismatch_leaves_the_group_whole(pool: RankPool) -> None:
    pool.run(4, disagree, "aabb", fresh())


def make_and_destroy(rank: int, size: int, hosts: str, names: list[str]) -> None:
    for number, name in enumerate(names):
        if number == 1:
            before = held()
        with group_on(hosts, rank, name) as group:
            data = np.ones(3_000_000, np.float32)
            group.allreduce(data)
            assert (data == size).all()
    wait_for(lambda: nothing_more_than(before), before)


@pytest.mark.gloo
@pytest.mark.parametrize("hosts", ["aabb", "abb"])
def test_nothing_is_left_of_a_group(pool: RankPool, hosts: str) -> None:
    pool.run(len(hosts), make_and_destroy, hosts, [fresh() for _ in range(4)])


def die_while_it_is_made(
    rank: int, size: int, hosts: str, name: str, victim: int, after_s: float
) -> tuple[str, tuple[int, ...], float]:
    """One rank is killed while the backend is being made; what had been made by then is gone afterwards."""
    with group_on(hosts, rank, f"{name}-first"):
        pass  # what a process loads once is loaded
    before = held()
    if rank == victim:
        spec = type(get_backend("hierarchical"))
        make = spec.create

        def make_and_die(*arguments: Any, **options: Any) -> Any:
            threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
            make(*arguments, **options)
            time.sleep(10)

        spec.create = make_and_die  # type: ignore[method-assign, assignment]
    began = time.monotonic()
    found = error_of_calls(hosts, rank, name)
    took = time.monotonic() - began
    gc.collect()
    wait_for(lambda: nothing_more_than(before), before)
    return *found, took


def error_of_calls(hosts: str, rank: int, name: str) -> tuple[str, tuple[int, ...]]:
    """Make a group and call until something goes wrong; nothing refers to the error any more on return."""
    try:
        with group_on(hosts, rank, name, "hierarchical") as group:
            call_for_ever(group, "allreduce", np.ones(1000, np.float32))
    except col.CollectiveError as error:
        return type(error).__name__, getattr(error, "ranks", ())
    raise AssertionError("the calls ended")


@pytest.mark.gloo
@pytest.mark.needs("torch")
@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.02, 0.05, 0.3])
@pytest.mark.parametrize("victim", [0, 3])
def test_a_rank_that_dies_while_the_group_is_made(
    pool: RankPool, victim: int, after_s: float
) -> None:
    found = pool.run(4, die_while_it_is_made, "aabb", fresh(), victim, after_s, may_die={victim})
    for rank, outcome in enumerate(found):
        if rank != victim:
            kind, ranks, took = outcome
            assert (kind, ranks) == ("PeerLostError", (victim,)), found
            assert took < 4.0, found
