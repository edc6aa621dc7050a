"""Ranks that meet, in processes of their own, and everything that may keep them from it.

Each test gives every process of the pool a plan: what it says of itself, when, and what happens to it meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from pool import RankPool

from colltensor import net
from colltensor.errors import (
    CollectiveError,
    CollectiveTimeoutError,
    GroupError,
    MismatchError,
    OptionError,
    PeerLostError,
    RankError,
)
from colltensor.rendezvous import (
    Directory,
    FileDirectory,
    FixedDirectory,
    Introduction,
    Meeting,
    meet_through,
    open_directory,
    stores,
    tcp,
)
from colltensor.rendezvous.protocol import Endpoint, JoinRequest, Message
from colltensor.rendezvous.server import Joiner, Stranger

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Plan:
    """What one process does.

    Attributes:
        init_method: Where it meets.
        rank: The rank that it claims.
        world_size: How many ranks it expects.
        group_name: The group.
        timeout_s: How long it waits.
        options: Further arguments of ``meet``.
        delay_s: How long it waits before it begins.
        variables: Its environment.
        signals: (seconds after it began, signal) that it gets.
        times: How often it meets, each time under the same name.
    """

    init_method: str
    rank: int
    world_size: int
    group_name: str = "g"
    timeout_s: float = 20.0
    options: dict[str, Any] = field(default_factory=dict)
    delay_s: float = 0.0
    variables: dict[str, str] = field(default_factory=dict)
    signals: tuple[tuple[float, int], ...] = ()
    times: int = 1


@dataclass(frozen=True)
class Outcome:
    """What became of it: the meeting's facts or an error, and how long it took in seconds."""

    error: BaseException | None
    took_s: float
    pid: int
    generation: bytes = b""
    secret: bytes = b""
    addresses: tuple[tuple[str, int], ...] = ()
    host_ids: tuple[str, ...] = ()


def meet(directory: Directory, *, deadline: float, **said: Any) -> Meeting:
    """Meet as a rank that says this of itself."""
    return tcp.meet(directory, Introduction(**said), deadline)


def act(rank: int, world_size: int, plans: Sequence[Plan]) -> Outcome:
    """Do what this process's plan says."""
    plan = plans[rank]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in plan.variables.items():
            patch.setenv(name, value)
        time.sleep(plan.delay_s)
        timers = [
            threading.Timer(delay, os.kill, (os.getpid(), number)) for delay, number in plan.signals
        ]
        for timer in timers:
            timer.start()
        began = time.monotonic()
        try:
            for _ in range(plan.times):
                outcome = once(plan)
        except (CollectiveError, KeyboardInterrupt) as error:
            outcome = Outcome(error, time.monotonic() - began, os.getpid())
        for timer in timers:
            timer.cancel()
    return outcome


def once(plan: Plan) -> Outcome:
    began = time.monotonic()
    directory, rank, world_size = open_directory(plan.init_method, plan.rank, plan.world_size)
    meeting = meet(directory, group_name=plan.group_name, world_size=world_size, rank=rank,
                   deadline=began + plan.timeout_s, **plan.options)  # fmt: skip
    took_s = time.monotonic() - began
    with meeting.listener:
        check_connections(meeting)
    return Outcome(None, took_s, os.getpid(), meeting.generation, meeting.secret, meeting.addresses,
                   meeting.host_ids)  # fmt: skip


def check_connections(meeting: Meeting) -> None:
    """Connect every pair of ranks as the table says; the lower rank dials."""
    deadline = time.monotonic() + 10
    assert meeting.listener.getsockname()[:2] == meeting.addresses[meeting.rank]
    for rank in range(meeting.rank + 1, meeting.world_size):
        with net.dial(meeting.addresses[rank], deadline) as sock:
            net.prove(sock, meeting.secret, meeting.generation, deadline)
            assert net.recv_frame(sock, deadline) == (1, bytes([rank]))
    meeting.listener.settimeout(10)
    for _ in range(meeting.rank):
        with meeting.listener.accept()[0] as sock:
            assert net.verify(sock, lambda _: meeting.secret, deadline) == meeting.generation
            net.send_frame(sock, 1, bytes([meeting.rank]))


@pytest.fixture
def free_port() -> int:
    with net.listen("127.0.0.1") as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture(params=["file", "tcp"])
def init_method(request: pytest.FixtureRequest, tmp_path: Path, free_port: int) -> str:
    return f"tcp://127.0.0.1:{free_port}" if request.param == "tcp" else f"file://{tmp_path}"


def run(pool: RankPool, plans: Sequence[Plan], may_die: Sequence[int] = ()) -> list[Outcome]:
    outcomes: list[Outcome] = pool.run(len(plans), act, plans, timeout_s=40, may_die=may_die)
    return outcomes


def errors_of(outcomes: Sequence[Outcome], kind: type[BaseException]) -> list[Any]:
    """Return the errors; every process must have one of this class, which names its own group and rank."""
    for outcome in outcomes:
        assert type(outcome.error) is kind, repr(outcome)
        assert "init_collective_group(group_name='g') on rank " in str(outcome.error)
    return [outcome.error for outcome in outcomes]


def check_met(outcomes: Sequence[Outcome]) -> Outcome:
    """Check that all met, and know the same."""
    for outcome in outcomes:
        assert outcome.error is None, repr(outcome)
    first = outcomes[0]
    for outcome in outcomes:
        assert replace(outcome, took_s=first.took_s, pid=first.pid) == first
    assert (len(first.generation), len(first.secret)) == (8, 32)
    assert len(set(first.addresses)) == len(outcomes) == len(first.host_ids)
    return first


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("spelling", ["file", "folder", "tcp", "tcp-name", "env"])
def test_ranks_meet(
    pool: RankPool, tmp_path: Path, free_port: int, spelling: str, world_size: int
) -> None:
    (tmp_path / "x").touch()
    init_method = {
        "file": f"file://{tmp_path}/x",
        "folder": f"file://{tmp_path}",
        "tcp": f"tcp://127.0.0.1:{free_port}",
        "tcp-name": f"tcp://localhost:{free_port}",
        "env": "env://",
    }[spelling]
    variables = (
        {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port)} if spelling == "env" else {}
    )
    name = "default" if spelling == "file" else "a/b: ünï"
    plans = [
        Plan(init_method, rank, world_size, name, variables=variables) for rank in range(world_size)
    ]
    met = check_met(run(pool, plans))
    assert {host for host, _ in met.addresses} == {"127.0.0.1"}
    left = [path.name for path in tmp_path.iterdir()]
    assert left == (["x"] if spelling != "file" or world_size == 1 else [])


@pytest.mark.parametrize("late", [0, 1])
def test_late_rank_is_waited_for(pool: RankPool, init_method: str, late: int) -> None:
    plans = [Plan(init_method, rank, 3, delay_s=0.7 * (rank == late)) for rank in range(3)]
    outcomes = run(pool, plans)
    check_met(outcomes)
    assert outcomes[late].took_s < 2


def test_missing_rank_is_named(pool: RankPool, init_method: str) -> None:
    outcomes = run(pool, [Plan(init_method, rank, 5, timeout_s=1.0) for rank in (0, 1, 3)])
    for error in errors_of(outcomes, net_timeout()):
        assert error.ranks == (2, 4)
        assert "ranks 2, 4" in str(error)
    assert max(outcome.took_s for outcome in outcomes) < 2.5


def test_earliest_deadline_counts(pool: RankPool, init_method: str) -> None:
    timeouts = {0: 15.0, 1: 15.0, 2: 0.8}
    outcomes = run(
        pool, [Plan(init_method, rank, 4, timeout_s=timeouts[rank]) for rank in range(3)]
    )
    assert [error.ranks for error in errors_of(outcomes, net_timeout())] == [(3,)] * 3
    assert max(outcome.took_s for outcome in outcomes) < 3


def test_missing_rank_0_is_named(pool: RankPool, init_method: str) -> None:
    outcomes = run(pool, [Plan(init_method, rank, 3, timeout_s=0.7) for rank in (1, 2)])
    for error in errors_of(outcomes, net_timeout()):
        assert error.ranks == (0,)
        assert "rank 0" in str(error)
        assert "group_name" in str(error)
    assert max(outcome.took_s for outcome in outcomes) < 2


def net_timeout() -> type[BaseException]:
    from colltensor.errors import CollectiveTimeoutError

    return CollectiveTimeoutError


def test_two_processes_with_one_rank(pool: RankPool, init_method: str) -> None:
    outcomes = run(pool, [Plan(init_method, rank, 4) for rank in (0, 1, 1)])
    for error in errors_of(outcomes, RankError):
        assert re.search(r" of 4: .*\brank 1 ", str(error))
        assert all(str(outcome.pid) in str(error) for outcome in outcomes[1:])
    assert max(outcome.took_s for outcome in outcomes) < 3


def test_two_processes_with_rank_0(pool: RankPool, init_method: str) -> None:
    outcomes = run(
        pool,
        [Plan(init_method, rank, 3, delay_s=0.1 * index) for index, rank in enumerate((0, 1, 0))],
    )
    for error in errors_of(outcomes, RankError):
        assert re.search(r" of 3: .*\brank 0 ", str(error))
    assert max(outcome.took_s for outcome in outcomes) < 3


@pytest.mark.parametrize("option", ["world_size", "backend"])
def test_ranks_that_disagree(pool: RankPool, init_method: str, option: str) -> None:
    plans = [Plan(init_method, rank, 3, options={"backend": "gloo"}) for rank in range(3)]
    plans[1] = (
        replace(plans[1], world_size=2) if option == "world_size" else replace(plans[1], options={})
    )
    outcomes = run(pool, plans)
    for error in errors_of(outcomes, MismatchError):
        assert error.ranks == (1,)
        assert f" {option}: " in str(error)
        assert all(str(outcome.pid) in str(error) for outcome in outcomes)


def test_rank_that_dies_meanwhile(pool: RankPool, init_method: str) -> None:
    plans = [Plan(init_method, rank, 4) for rank in range(3)]
    plans[1] = replace(plans[1], signals=((0.6, signal.SIGKILL),))
    outcomes = run(pool, plans, may_die=[1])
    for error in errors_of([outcomes[0], outcomes[2]], PeerLostError):
        assert error.ranks == (1,)
    assert outcomes[0].took_s < 3


def test_rank_0_that_dies_meanwhile(pool: RankPool, init_method: str) -> None:
    plans = [Plan(init_method, rank, 4) for rank in range(3)]
    # long enough for the others to have met it
    plans[0] = replace(plans[0], signals=((1.5, signal.SIGKILL),))
    outcomes = run(pool, plans, may_die=[0])
    for error in errors_of(outcomes[1:], PeerLostError):
        assert error.ranks == (0,)
    assert outcomes[1].took_s < 4
    # The next meeting takes place over what the dead one left, with a rank that comes first and finds it.
    check_met(
        run(pool, [Plan(init_method, rank, 3, delay_s=0.3 * (rank == 0)) for rank in range(3)])
    )
    if init_method.startswith("file://"):
        assert not list(Path(init_method[len("file://") :]).iterdir())


@pytest.mark.parametrize("interrupted", [0, 1])
def test_ctrl_c(pool: RankPool, init_method: str, interrupted: int) -> None:
    plans = [Plan(init_method, rank, 3) for rank in range(2)]
    plans[interrupted] = replace(plans[interrupted], signals=((0.5, signal.SIGINT),))
    outcomes = run(pool, plans)
    assert isinstance(outcomes[interrupted].error, KeyboardInterrupt)
    (error,) = errors_of([outcomes[1 - interrupted]], PeerLostError)
    assert error.ranks == (interrupted,)
    assert outcomes[interrupted].took_s < 1.5
    assert outcomes[1 - interrupted].took_s < 3
    if init_method.startswith("file://"):
        assert not list(Path(init_method[len("file://") :]).iterdir())


def test_ctrl_c_while_rank_0_is_looked_for(pool: RankPool, init_method: str) -> None:
    (outcome,) = run(pool, [Plan(init_method, 1, 2, signals=((0.4, signal.SIGINT),))])
    assert isinstance(outcome.error, KeyboardInterrupt)
    assert outcome.took_s < 1.4


def test_rank_0_that_is_stopped(pool: RankPool, tmp_path: Path) -> None:
    method = f"file://{tmp_path}"
    plans = [
        Plan(method, 0, 3, timeout_s=2.0, signals=((0.3, signal.SIGSTOP),)),
        Plan(method, 1, 3, timeout_s=0.6),
    ]
    watcher = threading.Timer(2.2, lambda: os.kill(pool.pids[0], signal.SIGCONT))
    watcher.start()
    outcomes = run(pool, plans)
    watcher.join()
    (error,) = errors_of(outcomes[1:], net_timeout())
    assert error.ranks == (0,)
    assert outcomes[1].took_s < 3


def test_made_again_under_the_same_name(pool: RankPool, init_method: str) -> None:
    check_met(run(pool, [Plan(init_method, rank, 3, times=15) for rank in range(3)]))


class DelayedDirectory(FixedDirectory):
    """Finds rank 0 only once a file is there: a process that is slow to come."""

    file: Path

    def find(self, key: str, deadline: float) -> Endpoint:
        while not self.file.exists():
            time.sleep(0.01)
        return super().find(key, deadline)


def left_out(rank: int, world_size: int, port: int, signals: Path) -> tuple[str, bytes]:
    """Ranks 0 and 1 meet twice; process 2 wanted to be rank 1 the first time, and comes the second time."""
    directory = FixedDirectory("127.0.0.1", port)
    deadline = time.monotonic() + 20
    if rank == 2:
        directory = DelayedDirectory("127.0.0.1", port)
        object.__setattr__(directory, "file", signals / "second")
        (signals / "asked").touch()
        try:
            meet(directory, group_name="g", world_size=2, rank=1, deadline=deadline)
        except RankError as error:
            return str(error), b""
        finally:
            (signals / "refused").touch()
    while not (signals / "asked").exists():
        time.sleep(0.01)
    meet(directory, group_name="g", world_size=2, rank=rank, deadline=deadline).listener.close()
    if rank == 0:
        threading.Timer(0.2, (signals / "second").touch).start()
    while rank == 1 and not (signals / "refused").exists():
        time.sleep(0.01)
    meeting = meet(directory, group_name="g", world_size=2, rank=rank, deadline=deadline)
    meeting.listener.close()
    return "", meeting.generation


def test_process_left_out_is_not_taken_into_the_next_group(
    pool: RankPool, tmp_path: Path, free_port: int
) -> None:
    results = pool.run(3, left_out, free_port, tmp_path, timeout_s=40)
    assert results[0] == results[1]
    assert results[0][1]
    assert re.search(r" of 2: .*\brank 1 ", results[2][0])


def threads_meet(
    rank: int, world_size: int, init_methods: Sequence[str], seed: int
) -> dict[str, bytes]:
    """Make a group for each method, every one in a thread of its own, in an order of this process's own."""
    names = [f"group {number}" for number in range(len(init_methods))]
    found: dict[str, bytes] = {}

    def make(name: str, init_method: str, number: int) -> None:
        mine = (rank + number) % world_size
        directory, _, _ = open_directory(init_method, mine, world_size)
        meeting = meet(
            directory,
            group_name=name,
            world_size=world_size,
            rank=mine,
            deadline=time.monotonic() + 20,
        )
        meeting.listener.close()
        found[name] = meeting.generation

    calls = [(name, init_methods[number], number) for number, name in enumerate(names)]
    threads = [threading.Thread(target=make, args=call) for call in calls]
    random.Random(seed * 100 + rank).shuffle(threads)
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert not [
        thread
        for thread in threading.enumerate()
        if thread.name.startswith("colltensor-rendezvous")
    ]
    return found


def test_groups_made_at_the_same_time_share_a_port_and_take_turns_as_rank_0(
    pool: RankPool, init_method: str
) -> None:
    """Each process is rank 0 of some groups: over TCP the processes have to leave each other the port."""
    results = pool.run(2, threads_meet, [init_method] * 6, 1, timeout_s=40)
    assert results[0] == results[1]
    assert len(set(results[0].values())) == 6


def test_groups_of_one_rank_0_share_a_port(pool: RankPool, free_port: int) -> None:
    methods = [f"tcp://127.0.0.1:{free_port}"] * 8
    results = pool.run(3, threads_of_one_rank_0, methods, timeout_s=40)
    assert results[0] == results[1] == results[2]
    assert len(set(results[0].values())) == 8


def threads_of_one_rank_0(
    rank: int, world_size: int, init_methods: Sequence[str]
) -> dict[str, bytes]:
    found: dict[str, bytes] = {}

    def make(name: str, init_method: str) -> None:
        directory, _, _ = open_directory(init_method, rank, world_size)
        meeting = meet(
            directory,
            group_name=name,
            world_size=world_size,
            rank=rank,
            deadline=time.monotonic() + 20,
        )
        meeting.listener.close()
        found[name] = meeting.generation

    threads = [
        threading.Thread(target=make, args=(f"g{n}", method))
        for n, method in enumerate(init_methods)
    ]
    random.Random(rank).shuffle(threads)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@contextlib.contextmanager
def stranger(answer: bytes | None) -> Iterator[int]:
    """Serve a port: answer whoever connects and hang up, or (None) say nothing."""
    with net.listen("127.0.0.1") as listener:
        kept = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    kept.append(sock)
                    with contextlib.suppress(OSError):
                        if answer is not None:
                            sock.sendall(answer)
                            sock.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for sock in kept:
                sock.close()


def test_port_taken_by_a_stranger(pool: RankPool) -> None:
    """By one that answers, one that hangs up, one that says nothing: to rank 0, and (the first two) to another."""
    with (
        stranger(b"HTTP/1.1 400 Bad Request\r\n\r\n") as talker,
        stranger(b"") as closer,
        stranger(None) as mute,
    ):
        ports = [talker, closer, mute, talker, closer]
        ranks = [0, 0, 0, 1, 1]
        plans = [
            Plan(f"tcp://127.0.0.1:{port}", rank, 2, timeout_s=timeout_s)
            for port, rank, timeout_s in zip(ports, ranks, (9.0, 9.0, 9.0, 9.0, 1.0), strict=True)
        ]
        outcomes = run(pool, plans)
    for outcome, port in zip(outcomes, ports, strict=True):
        assert str(port) in str(outcome.error)
    errors_of(outcomes[:4], OptionError)
    errors_of(outcomes[4:], net_timeout())


def test_port_that_nobody_may_listen_at(pool: RankPool) -> None:
    variables = {"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "1"}
    (outcome,) = run(pool, [Plan("env://", 1, 2, timeout_s=1.0, variables=variables)])
    (error,) = errors_of([outcome], net_timeout())
    assert "'no-such-host.invalid'" in str(error)


def test_garbage_is_ignored(pool: RankPool, free_port: int) -> None:
    """Without a secret anybody may come, and even pass the handshake; only a rank counts."""
    stop = threading.Event()
    threads = [
        threading.Thread(target=throw_garbage, args=(free_port, seed, stop)) for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    try:
        method = f"tcp://127.0.0.1:{free_port}"
        check_met(
            run(pool, [Plan(method, rank, 3, delay_s=1.2 * (rank == 2)) for rank in range(3)])
        )
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def throw_garbage(port: int, seed: int, stop: threading.Event) -> None:
    rng = random.Random(seed)
    deadline = time.monotonic() + 20
    said = {"rank": 2, "world_size": 3, "group_name": "g", "backend": "auto", "host_id": "", "address": None,
             "seen_from": "127.0.0.1", "who": "me", "age_s": 0.0, "patience_s": 9.0, "refusal": ""}  # fmt: skip
    while not stop.wait(0.01):
        with contextlib.suppress(OSError), net.dial(("127.0.0.1", port), deadline) as sock:
            sock.settimeout(1)
            if rng.random() < 0.4:
                huge = struct.pack("!BQ", 0xC1, 1 << 50)
                sock.sendall(rng.choice([b"", b"GET / HTTP/1.1\r\n\r\n", rng.randbytes(99), huge]))
                continue
            net.prove(sock, b"", b"g", deadline)
            spoilt = dict(said)
            name = rng.choice(list(said))
            spoilt[name] = rng.choice([[], {}, True, float("nan") if name == "patience_s" else 1j])
            text = (
                str(spoilt)
                .replace("'", '"')
                .replace("None", "null")
                .replace("nan", "NaN")
                .replace("True", "true")
            )
            payload = rng.choice(
                [text.encode(), b"[" * 8000, rng.randbytes(50), b"9" * 8000, b"{}"]
            )
            net.send_frame(sock, rng.choice([1, 1, 3, 9]), payload)
            if rng.random() < 0.5:
                net.recv_frame(sock, time.monotonic() + 0.2)


@pytest.mark.parametrize(
    "wrong", [{"rank": -1}, {"rank": 3}, {"nonce": "x"}, {"age_s": float("inf")}, {"who": 1}]
)
def test_what_no_rank_says_is_refused(wrong: dict[str, Any]) -> None:
    said = JoinRequest(
        1, 3, "g", "auto", "", None, "127.0.0.1", "process 1", 0.0, 9.0, nonce="5ec2e7"
    )
    assert "5ec2e7" not in repr(said)
    assert JoinRequest.decode(said.encode()) == said
    with pytest.raises(net.FrameError):
        JoinRequest.decode(replace(said, **wrong).encode())


@pytest.mark.parametrize("culprit", [0, 2])
@pytest.mark.parametrize("wrong", [{"COLLTENSOR_SECRET": "another"}, {}])
def test_a_rank_with_another_secret_is_told_to_all(
    pool: RankPool, free_port: int, wrong: dict[str, str], culprit: int
) -> None:
    """Within a second or so; and the port is free for the next meeting."""
    same = {"COLLTENSOR_SECRET": "the same"}
    plans = [Plan(f"tcp://127.0.0.1:{free_port}", rank, 3, variables=same) for rank in range(3)]
    outcomes = run(
        pool, [*plans[:culprit], replace(plans[culprit], variables=wrong), *plans[culprit + 1 :]]
    )
    for error in errors_of(outcomes, OptionError):
        assert "COLLTENSOR_SECRET" in str(error)
    if culprit:
        assert all(f"rank {culprit} (process " in str(outcomes[rank].error) for rank in range(2))
    assert max(outcome.took_s for outcome in outcomes) < 3
    check_met(run(pool, plans))


def test_one_secret_spelt_in_several_ways(pool: RankPool, free_port: int, tmp_path: Path) -> None:
    """In a file, with white space around it, of bytes that are no text."""
    secret = b"\xff\xfe hush \xe9"
    (tmp_path / "secret").write_bytes(b"\n " + secret + b"\r\n")
    variables = [
        {"COLLTENSOR_SECRET": os.fsdecode(secret)},
        {"COLLTENSOR_SECRET": os.fsdecode(secret) + "\n"},
        {"COLLTENSOR_SECRET_FILE": str(tmp_path / "secret")},
    ]
    method = f"tcp://127.0.0.1:{free_port}"
    check_met(run(pool, [Plan(method, rank, 3, variables=variables[rank]) for rank in range(3)]))


class OpenDirectory(FileDirectory):
    """A directory that strangers can read, and that knows where all ranks are."""

    secret = b"the same"
    host = "localhost"

    def address(self) -> str:
        return "127.0.0.1"


def test_who_reads_an_endpoint_cannot_come_without_the_secret_of_all(tmp_path: Path) -> None:
    directory, deadline = OpenDirectory(str(tmp_path)), time.monotonic() + 15
    found: list[Meeting] = []

    def be(rank: int) -> None:
        found.append(meet(directory, group_name="g", world_size=2, rank=rank, deadline=deadline))

    rank_0 = threading.Thread(target=be, args=(0,))
    rank_0.start()
    while not (found_file := directory.read("g", deadline)):
        time.sleep(0.01)
    endpoint = Endpoint.decode(found_file)
    assert endpoint.addresses == ("127.0.0.1",)
    for address in filter(lambda address: not net.is_loopback(address), net.local_addresses()):
        with pytest.raises(ConnectionError):
            net.dial((address, endpoint.port), deadline)
    with (
        net.dial(("127.0.0.1", endpoint.port), deadline) as sock,
        pytest.raises(net.WrongSecretError),
    ):
        net.prove(sock, endpoint.secret, b"g", deadline)
    be(1)
    rank_0.join()
    for meeting in found:
        meeting.listener.close()
    assert found[0].secret == found[1].secret


@pytest.mark.needs("torch")
def test_ranks_of_one_torchrun_agent_listen_on_the_loopback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from colltensor.torch.rendezvous import StoreDirectory

    directory = StoreDirectory("head", 1, b"")
    for everybody, here, address in (("4", "4", "127.0.0.1"), ("4", "2", None), ("", "", None)):
        monkeypatch.setenv("WORLD_SIZE", everybody)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        assert directory.address() == address


def come_with_another_secret(port: int) -> None:
    """As rank 1, with a socket of another user's."""
    deadline = time.monotonic() + 10
    said = JoinRequest(1, 2, "g", "auto", net.host_id(), None, "127.0.0.1", "stranger", 0.0, 9.0)
    os.seteuid(65534)
    try:
        sock = socket.socket()
    finally:
        os.seteuid(0)
    with sock:
        sock.connect(("127.0.0.1", port))
        with pytest.raises(net.WrongSecretError):
            net.prove(sock, b"another", b"g", deadline)
        net.send_frame(sock, Message.JOIN, said.encode(), deadline)
        assert sock.recv(1) == b""


@pytest.mark.skipif(
    os.geteuid() != 0, reason="takes a socket of another user, which root alone can make"
)
def test_a_stranger_with_another_secret_does_not_end_a_meeting(
    free_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    directory, deadline = FixedDirectory("127.0.0.1", free_port, b"the same"), time.monotonic() + 15
    found: list[Meeting] = []

    def be(rank: int) -> None:
        found.append(meet(directory, group_name="g", world_size=2, rank=rank, deadline=deadline))

    rank_0 = threading.Thread(target=be, args=(0,))
    rank_0.start()
    while rank_0.is_alive():
        with contextlib.suppress(ConnectionRefusedError):
            come_with_another_secret(free_port)
            break
    be(1)
    rank_0.join()
    for meeting in found:
        meeting.listener.close()
    assert len(found) == 2
    told = [record.getMessage() for record in caplog.records if "'stranger'" in record.getMessage()]
    assert len(told) == 2
    assert re.search(r"group 'g' \(rank 0\): .*rank 1 \('stranger'\)", told[0])
    assert re.search(r"group 'g' \(rank 1\): rank 0 .*rank 1 \('stranger'\)", told[1])


def test_another_job_with_another_secret_does_not_end_a_meeting_where_its_rank_has_come() -> None:
    """As where two jobs of one user are given one port."""
    hellos = [
        JoinRequest(rank, 3, "g", "auto", "", None, "127.0.0.1", f"process {rank}", 0.0, 9.0)
        for rank in range(3)
    ]
    near, far = socket.socketpair()
    with near, far, tcp.ServerExchange(Directory(), hellos[0], time.monotonic() + 0.3) as host:
        host._inbox.put(Joiner(far, hellos[1], time.monotonic() + 9))
        host._inbox.put(Stranger(hellos[1], is_own=True))
        with pytest.raises(net_timeout(), match=r"\brank 2 "):
            host._gather()
        host._deadline += 5
        host._inbox.put(Stranger(hellos[2], is_own=True))
        with pytest.raises(OptionError, match=r"\brank 2 .*COLLTENSOR_SECRET"):
            host._gather()


def test_who_comes_when_all_are_there_keeps_nobody_waiting() -> None:
    """The ranks are told who is there, and say where they listen; then comes one whose rank is taken."""
    hellos = [
        JoinRequest(rank, 2, "g", "auto", "", None, "127.0.0.1", f"process {rank}", 0.0, 9.0)
        for rank in range(2)
    ]
    (near, far), (late_near, late_far) = socket.socketpair(), socket.socketpair()
    deadline = time.monotonic() + 1.0
    with near, far, late_near, late_far:
        with tcp.ServerExchange(Directory(), hellos[0], deadline) as host:
            host._inbox.put(Joiner(far, hellos[1], time.monotonic() + 9))
            host._gather()
            late = replace(hellos[1], who="a latecomer")
            host._inbox.put(Joiner(late_far, late, time.monotonic() + 9))
            net.send_frame(near, Message.PLACE, b"{}")
            host._await_places(b"{}")
        assert time.monotonic() < deadline
        kind, words = net.recv_frame(late_near, deadline)
        assert (kind, b"a latecomer" in words) == (Message.FAILED, True)


@pytest.mark.parametrize("culprit", [0, 2])
@pytest.mark.parametrize("missing", [0, 1])
def test_a_refused_interface_is_heard_by_all(
    pool: RankPool, init_method: str, culprit: int, missing: int
) -> None:
    """At once, whether or not the ranks are complete, and in the culprit's own words."""
    plans = [
        Plan(init_method, rank, 3 + missing, delay_s=0.3 * (rank != culprit)) for rank in range(3)
    ]
    plans[culprit] = replace(plans[culprit], options={"interface": "eth99"})
    outcomes = run(pool, plans)
    for error in errors_of(
        [outcome for rank, outcome in enumerate(outcomes) if rank != culprit], OptionError
    ):
        assert f"rank {culprit}: {outcomes[culprit].error}" in str(error)
    assert "eth99" in str(outcomes[culprit].error)
    assert max(outcome.took_s for outcome in outcomes) < 3
    if init_method.startswith("file://"):
        assert not list(Path(init_method[len("file://") :]).iterdir())


def test_addresses_between_hosts(pool: RankPool, tmp_path: Path) -> None:
    """Four processes on two hosts, as far as they know; the file's host has the ranks 0 and 1."""
    external = net.local_addresses()[0]
    hosts = [{"COLLTENSOR_HOST_ID": host} for host in "aabb"]
    plans = [Plan(f"file://{tmp_path}", rank, 4, variables=hosts[rank]) for rank in range(4)]
    plans[3] = replace(plans[3], options={"interface": "lo"})
    met = check_met(run(pool, plans))
    assert met.host_ids == ("a", "a", "b", "b")
    assert [host for host, _ in met.addresses] == [external, external, external, "127.0.0.1"]


def test_interface_of_rank_0(pool: RankPool, tmp_path: Path) -> None:
    external = net.local_addresses()[0]
    plans = [Plan(f"file://{tmp_path}", rank, 2) for rank in range(2)]
    plans[0] = replace(plans[0], options={"interface": external})
    assert [host for host, _ in check_met(run(pool, plans)).addresses] == [external, "127.0.0.1"]


def test_unusable_files(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("somebody's data")
    for name, named in (("data", "data"), ("no/such", "no")):
        for rank in range(2):
            directory, _, _ = open_directory(f"file://{tmp_path}/{name}", rank, 2)
            with pytest.raises(OptionError, match=rf"{tmp_path}/{named}\b"):
                meet(
                    directory,
                    group_name="default",
                    world_size=2,
                    rank=rank,
                    deadline=time.monotonic() + 5,
                )
    assert (tmp_path / "data").read_text() == "somebody's data"


@pytest.mark.parametrize("world_size", [10**7, 10**30])
def test_a_world_beyond_reason_is_refused_at_once(tmp_path: Path, world_size: int) -> None:
    with pytest.raises(OptionError, match=r"world_size .*\b65536"):
        open_directory(f"file://{tmp_path}", 0, world_size)


def test_many_missing_ranks_are_counted(tmp_path: Path) -> None:
    directory, _, _ = open_directory(f"file://{tmp_path}", 0, 1000)
    with pytest.raises(net_timeout(), match=r"\b999 ranks \(1, 2, 3, .*, 20, \.\.\.\)") as caught:
        meet(directory, group_name="g", world_size=1000, rank=0, deadline=time.monotonic() + 0.2)
    assert caught.value.ranks == tuple(range(1, 1000))


def bind_a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.fspath(path))


NO_FILES: dict[str, Callable[[Path], object]] = {
    "named pipe": os.mkfifo,
    "socket": bind_a_socket,
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to a file": lambda path: path.symlink_to("an empty file"),
}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_refused_at_once_and_left_alone(
    tmp_path: Path, kind: str, rank: int
) -> None:
    (tmp_path / "an empty file").touch()
    NO_FILES[kind](tmp_path / "x")
    before = (tmp_path / "x").lstat()
    directory, _, _ = open_directory(f"file://{tmp_path}/x", rank, 2)
    began = time.monotonic()
    with pytest.raises(OptionError, match=rf"{tmp_path}/x\b"):
        meet(directory, group_name="default", world_size=2, rank=rank, deadline=began + 5)
    assert time.monotonic() - began < 1
    after = (tmp_path / "x").lstat()
    assert (before.st_mode, before.st_ino) == (after.st_mode, after.st_ino)
    assert (tmp_path / "an empty file").read_bytes() == b""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.skipif(
    os.geteuid() != 0, reason="takes files of another user, which root alone can make"
)
def test_other_users_folders_and_files_are_refused_at_once(tmp_path: Path, rank: int) -> None:
    """Whoever owns a folder decides what is in it, and in one for everybody anybody may leave an endpoint."""
    theirs, public = tmp_path / "theirs", tmp_path / "public"
    (theirs / "ours").mkdir(parents=True)
    public.mkdir()
    public.chmod(0o1777)
    (public / "x").write_bytes(Endpoint(net.host_id(), ("127.0.0.1",), 1, b"").encode())
    (public / "x").chmod(0o644)
    for path in (theirs, public / "x"):
        os.chown(path, 65534, 65534)
    for path, named in ((theirs, f"the folder {theirs} "), (theirs / "x", f"the folder {theirs} "),
                        (public / "x", f"{public / 'x'} was written ")):  # fmt: skip
        directory, _, _ = open_directory(f"file://{path}", rank, 2)
        began = time.monotonic()
        with pytest.raises(OptionError, match=f"{named}.*65534"):
            meet(directory, group_name="default", world_size=2, rank=rank, deadline=began + 5)
        assert time.monotonic() - began < 1
    assert [entry.name for entry in theirs.iterdir()] == ["ours"]
    assert (public / "x").stat().st_uid == 65534


@pytest.mark.skipif(os.geteuid() != 0, reason="gives folders away, which root alone can")
def test_a_folder_for_everybody_of_a_user_who_has_no_number_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As /tmp has in a rootless container; one that is not for everybody may be anybody's."""
    for mode, knows_all, expected in (
        (0o1777, False, None),
        (0o755, False, OptionError),
        (0o1777, True, OptionError),
    ):
        folder = tmp_path / f"{mode:o}{knows_all}"
        folder.mkdir()
        folder.chmod(mode)
        os.chown(folder, 65534, 65534)
        monkeypatch.setattr(stores, "_knows_all_users", lambda knows_all=knows_all: knows_all)
        directory = FileDirectory(str(folder / "x"))
        with pytest.raises(expected) if expected else contextlib.nullcontext():
            directory.put("default", Endpoint("", ("127.0.0.1",), 1, b"").encode(), b"")


def test_a_folder_of_ours_in_one_for_everybody_serves(pool: RankPool, tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    (tmp_path / "ours").mkdir(mode=0o777)
    for path in (tmp_path / "ours", tmp_path / "meeting"):
        check_met(run(pool, [Plan(f"file://{path}", rank, 2) for rank in range(2)]))


def test_a_port_is_free_again_where_no_thread_could_listen_at_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever keeps the error has all that it came through."""
    with net.listen("127.0.0.1") as sock:
        port = sock.getsockname()[1]

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    directory, _, _ = open_directory(f"tcp://127.0.0.1:{port}", 0, 2)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(GroupError, match=r"\bthread\b") as kept:
        meet(directory, group_name="default", world_size=2, rank=0, deadline=time.monotonic() + 10)
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        pass
    assert kept.value.__cause__ is not None


@pytest.mark.parametrize("may_write", [True, False])
def test_who_waits_for_a_file_asks_whether_rank_0_can_write_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, may_write: bool
) -> None:
    """One on another host has no way to hear of it."""
    monkeypatch.setattr(os, "access", lambda path, mode: may_write and path == tmp_path)
    directory, _, _ = open_directory(f"file://{tmp_path}/meet", 1, 2)
    with pytest.raises(CollectiveTimeoutError) as caught:
        meet(directory, group_name="default", world_size=2, rank=1, deadline=time.monotonic() + 0.1)
    assert caught.value.ranks == (0,)
    # without the right to write there this rank is told so; rank 0 may have it all the same
    assert str(tmp_path / "meet") in str(caught.value)
    assert (f" {tmp_path}; " in str(caught.value)) is not may_write


def die_before_publishing(rank: int, world_size: int, path: str) -> None:
    """As rank 0, be killed when the endpoint is written and not yet in its place."""
    os.link = os.replace = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    directory, _, _ = open_directory(f"file://{path}", 0, 2)
    meet(directory, group_name="default", world_size=2, rank=0, deadline=time.monotonic() + 10)


@pytest.mark.parametrize("name", ["meet", ""])
def test_what_a_killed_rank_0_left_is_removed_by_the_next(
    pool: RankPool, tmp_path: Path, name: str
) -> None:
    """And nothing else: neither the draft of a process that runs, nor a file of somebody else's."""
    path = tmp_path / name
    assert pool.run(1, die_before_publishing, str(path), may_die=[0], timeout_s=30) == [None]
    (draft,) = tmp_path.iterdir()
    tag = draft.name.split(".")[-3]
    running = draft.with_name(f"{draft.name.rpartition(tag)[0]}{tag}.{os.getpid()}.{'0' * 16}")
    others = [draft.with_name(draft.name + "~"), draft.with_name(".x." + draft.name), running]
    for file in others:
        file.touch()
    plans = [Plan(f"file://{path}", rank, 2, "default") for rank in range(2)]
    check_met(run(pool, plans))
    assert sorted(tmp_path.iterdir()) == sorted(others)


def say_hello_and_leave(port: int, secret: bytes, **said: Any) -> None:
    """Come to a meeting as a process of another run, and be gone before rank 0 looks."""
    deadline = time.monotonic() + 10
    request = JoinRequest(
        1, 2, "g", "auto", net.host_id(), None, "127.0.0.1", "a process of another run", 0.0, 9.0
    )
    with net.dial(("127.0.0.1", port), deadline) as sock:
        net.prove(sock, secret, b"g", deadline)
        # the end arrives together with what was said
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        net.send_frame(sock, Message.JOIN, replace(request, **said).encode(), deadline)
        sock.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "said", [{"world_size": 3}, {"backend": "gloo"}, {"world_size": 3, "rank": 2}]
)
def test_processes_of_another_run_that_are_gone_do_not_count(
    free_port: int, said: dict[str, Any]
) -> None:
    deadline = time.monotonic() + 15
    directory = FixedDirectory("127.0.0.1", free_port)
    found: dict[int, Any] = {}

    def be(rank: int) -> None:
        try:
            found[rank] = meet(
                directory, group_name="g", world_size=2, rank=rank, deadline=deadline
            )
            found[rank].listener.close()
        except CollectiveError as error:
            found[rank] = error

    threads = [threading.Thread(target=be, args=(rank,)) for rank in range(2)]
    threads[0].start()
    while True:
        with contextlib.suppress(OSError):
            say_hello_and_leave(free_port, b"", **said)
            break
        time.sleep(0.01)
    time.sleep(0.3)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert found[0].addresses == found[1].addresses


def test_file_is_private_while_it_lasts(tmp_path: Path) -> None:
    modes = set()
    directory, _, _ = open_directory(f"file://{tmp_path}", 0, 2)

    def look() -> None:
        deadline = time.monotonic() + 5
        while not modes and time.monotonic() < deadline:
            modes.update(oct(path.stat().st_mode & 0o777) for path in tmp_path.glob("colltensor-*"))

    thread = threading.Thread(target=look)
    thread.start()
    with pytest.raises(net_timeout()):
        meet(directory, group_name="g", world_size=2, rank=0, deadline=time.monotonic() + 0.5)
    thread.join()
    assert modes == {"0o600"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argument", "value", "kind"),
    [
        ("group_name", "", OptionError), ("group_name", "x" * 1025, OptionError), ("group_name", None, OptionError),
        ("group_name", "\ud800", OptionError), ("rank", 2, RankError), ("world_size", 0, OptionError),
        ("interface", "eth99", OptionError), ("backend", None, OptionError),
    ],
)  # fmt: skip
def test_bad_arguments(
    tmp_path: Path, argument: str, value: object, kind: type[BaseException]
) -> None:
    directory, _, _ = open_directory(f"file://{tmp_path}", 0, 2)
    arguments: dict[str, Any] = {"group_name": "g", "world_size": 2, "rank": 0, argument: value}
    with pytest.raises(kind, match=argument):
        meet(directory, deadline=time.monotonic() + 5, **arguments)
    assert not list(tmp_path.iterdir())


def fork_meanwhile(rank: int, world_size: int, port: int) -> bool:
    """Fork while rank 0 listens; return whether the port is free after the meeting, while the child lives."""
    directory = FixedDirectory("127.0.0.1", port)
    if rank == 1:
        time.sleep(0.5)
        meet(
            directory, group_name="g", world_size=2, rank=1, deadline=time.monotonic() + 10
        ).listener.close()
        return True
    pids: list[int] = []

    def fork() -> None:
        pid = os.fork()
        if pid == 0:
            time.sleep(30)
            os._exit(0)
        pids.append(pid)

    timer = threading.Timer(0.2, fork)
    timer.start()
    try:
        meet(
            directory, group_name="g", world_size=2, rank=0, deadline=time.monotonic() + 10
        ).listener.close()
        net.listen("127.0.0.1", port).close()
        return True
    finally:
        timer.join()
        os.kill(pids[0], signal.SIGKILL)
        os.waitpid(pids[0], 0)


def test_forked_child_does_not_keep_the_port(pool: RankPool, free_port: int) -> None:
    assert pool.run(2, fork_meanwhile, free_port) == [True, True]


def exchange_in_threads(arguments: Sequence[dict[str, Any]]) -> list[Any]:
    """Call meet_through in as many threads, which exchange over a barrier; an error is a result."""
    barrier = threading.Barrier(len(arguments), timeout=10)
    rounds: list[dict[int, bytes]] = [{}, {}]
    results: list[Any] = [None] * len(arguments)
    calls = [0] * len(arguments)

    def call(index: int) -> None:
        def exchange(payload: bytes) -> list[bytes]:
            said = rounds[calls[index]]
            calls[index] += 1
            said[index] = payload
            barrier.wait()
            return [said[key] for key in sorted(said)]

        try:
            results[index] = meet_through(exchange, Introduction(**arguments[index]))
        except CollectiveError as error:
            results[index] = error

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(arguments))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [2] * len(arguments)
    return results


def test_meet_through() -> None:
    ranks = (2, 0, 1)
    meetings = exchange_in_threads(
        [{"group_name": "s", "world_size": 3, "rank": rank} for rank in ranks]
    )
    assert [meeting.rank for meeting in meetings] == [2, 0, 1]
    assert (
        len(
            {
                (meeting.generation, meeting.secret, meeting.addresses, meeting.host_ids)
                for meeting in meetings
            }
        )
        == 1
    )
    for meeting in meetings:
        assert meeting.listener.getsockname() == meeting.addresses[meeting.rank]
        meeting.listener.close()


@pytest.mark.parametrize(
    ("change", "kind", "named"),
    [
        ({"rank": 0}, RankError, r" of 2: .*\brank 0 "),
        ({"rank": 7}, RankError, "participant 1: rank "),
        ({"world_size": 3}, MismatchError, "world_size"),
        ({"backend": "gloo"}, MismatchError, "backend"),
        ({"interface": "eth99"}, OptionError, "rank 1: interface"),
    ],
)
def test_meet_through_fails_everywhere_alike(
    change: dict[str, Any], kind: type[BaseException], named: str
) -> None:
    arguments = [{"group_name": "s", "world_size": 2, "rank": rank} for rank in range(2)]
    arguments[1].update(change)
    errors = exchange_in_threads(arguments)
    for error in errors:
        assert type(error) is kind
        assert re.search(named, str(error))


TORCHRUN_PROGRAM = """
import os, time
from colltensor.rendezvous import Introduction, meet, open_directory
for name in ("one", "two", "one"):
    directory, rank, world_size = open_directory(None, None, None)
    part = Introduction(group_name=name, world_size=world_size, rank=rank)
    meeting = meet(directory, part, time.monotonic() + 30)
    meeting.listener.close()
    line = f"MET {type(directory).__name__} {name} {rank} {world_size} {meeting.generation.hex()}"
    os.write(1, line.encode() + b"\\n")
directory, rank, _ = open_directory(None, None, None)
if rank == 0:
    from colltensor.torch.rendezvous import _name
    store = directory._store(time.monotonic() + 5)
    os.write(1, f"LEFT {store.check([_name('one')])} {store.check([_name('two')])}\\n".encode())
"""


@pytest.mark.needs("torch")
def test_torchrun(tmp_path: Path) -> None:
    """Under the real torchrun: its agent holds the port, so the ranks meet through its store."""
    program = tmp_path / "program.py"
    program.write_text(TORCHRUN_PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "127.0.0.1:0", "--log-dir", str(tmp_path / "log"), str(program)]  # fmt: skip
    paths = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("MET")]
    assert {(line[0], line[3]) for line in lines} == {("StoreDirectory", "2")}
    assert sorted(line[1] + line[2] for line in lines) == [
        "one0",
        "one0",
        "one1",
        "one1",
        "two0",
        "two1",
    ]
    assert len({line[4] for line in lines}) == 3
    assert "LEFT False False" in done.stdout


MULTIPROCESSING_PROGRAM = """
import multiprocessing, sys, time
from colltensor.rendezvous import Introduction, meet, open_directory

def child(rank, queue):
    directory, rank, world_size = open_directory("file://" + sys.argv[1], rank, 2)
    part = Introduction(group_name="g", world_size=world_size, rank=rank)
    meeting = meet(directory, part, time.monotonic() + 30)
    queue.put(meeting.generation)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[2])
    queue = context.Queue()
    children = [context.Process(target=child, args=(rank, queue)) for rank in range(2)]
    [process.start() for process in children]
    assert queue.get(timeout=30) == queue.get(timeout=30)
    [process.join() for process in children]
    assert [process.exitcode for process in children] == [0, 0]
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_plain_multiprocessing(tmp_path: Path, method: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(MULTIPROCESSING_PROGRAM)
    (tmp_path / "meet").mkdir()
    paths = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    command = [sys.executable, str(program), str(tmp_path / "meet"), method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": paths},
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "meet").iterdir())
