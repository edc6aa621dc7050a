"""Ranks killed at random moments: each trial kills one, and the survivors say what they saw and what they still hold.

The survivors must have an error that names the dead rank within ``LIMIT_S`` of its death, hold nothing of the group
once they have destroyed it, and be able to make a group of the same name again.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import numpy as np
from host_ranks import group_on
from pool import RankPool
from shm_ranks import Held, fresh, own_group

import colltensor as col

LIMIT_S = 2.0
CREATION_TIMEOUT_S = 1.7
"""Of groups whose creation is disturbed: a rank that dies before anybody has met it is noticed by that alone."""


class Trial(NamedTuple):
    """Who is killed, when, and what all ranks do meanwhile.

    Attributes:
        hosts: A letter for each rank's simulated host; "" for this one.
        parted: Whether they do it in a group that was split off, in the opposite order.
    """

    backend: str
    size: int
    victim: int
    phase: str
    delay_s: float
    hosts: str = ""
    parted: bool = False

    def group(self, rank: int, name: str, timeout_s: float = 20.0) -> AbstractContextManager[Any]:
        if self.hosts:
            return group_on(self.hosts, rank, name, self.backend, timeout_s)
        return own_group(rank, self.size, name, timeout_s, self.backend)

    def named(self) -> int:
        """Return the victim's rank where it dies."""
        return self.size - 1 - self.victim if self.parted else self.victim


class Seen(NamedTuple):
    """What one survivor saw."""

    kind: str
    ranks: tuple[int, ...]
    words: str
    at: float
    killed_at: float
    left_behind: list[str]


def small(group: Any, draw: random.Random) -> None:
    group.allreduce(np.ones(draw.randint(1, 100), np.float32))


def large(group: Any, draw: random.Random) -> None:
    group.allreduce(np.ones(draw.randint(1, 3_000_000), np.float32))


def asleep(group: Any, draw: random.Random) -> None:
    """All but rank 0 wait in their sleep for most of the time."""
    if group.rank == 0:
        time.sleep(0.15)
    group.broadcast(np.ones(draw.randint(1, 1000)), 0)
    group.barrier()


def transfers(group: Any, draw: random.Random) -> None:
    count = draw.randint(1, 800_000)
    source, target = np.ones(count), np.zeros(count)
    group.sendrecv(
        source, (group.rank + 1) % group.world_size, target, (group.rank - 1) % group.world_size
    )


def asynchronous(group: Any, draw: random.Random) -> None:
    counts = (draw.randint(1, 10), draw.randint(1, 1_000_000), draw.randint(1, 100))
    try:
        works = [group.allreduce(np.ones(count, np.float32), async_op=True) for count in counts]
    except col.GroupError as refused:  # because of a call before it, which has failed by now
        raise refused.__cause__ or refused from None
    for work in works:
        work.wait()


def others(group: Any, draw: random.Random) -> None:
    """Repeat no order of operations either."""
    size, root, count = group.world_size, draw.randrange(group.world_size), draw.randint(1, 200_000)
    ones, several, zeros = (
        np.ones(count),
        [np.ones(count)] * size,
        [np.zeros(count) for _ in range(size)],
    )
    calls: list[Callable[[], object]] = [
        lambda: group.allgather(zeros, ones),
        lambda: group.reduce(ones, root),
        lambda: group.broadcast(ones, root),
        lambda: group.reducescatter(zeros[0], several),
        lambda: group.gather(zeros if group.rank == root else None, ones, root),
        lambda: group.scatter(zeros[0], several if group.rank == root else None, root),
        lambda: group.alltoall(zeros, several),
    ]
    draw.choice(calls)()


def objects(group: Any, draw: random.Random) -> None:
    group.allgather_object(b"x" * draw.randint(1, 200_000))
    group.barrier()


def programme(group: Any, draw: random.Random) -> None:
    """Some ranks have transfers, and the others are ahead of them, in another call."""
    size, count = group.world_size, draw.choice((3, 20_000, 400_000))
    chosen = draw.sample(range(size), draw.randint(2, size))
    root = draw.randrange(size)
    if group.rank in chosen:
        at, ones, zeros = chosen.index(group.rank), np.ones(count), np.zeros(count)
        group.sendrecv(ones, chosen[(at + 1) % len(chosen)], zeros, chosen[at - 1])
        if group.rank == chosen[0]:
            group.send(ones, chosen[1])
        elif group.rank == chosen[1]:
            group.recv(zeros, chosen[0])
    if draw.random() < 0.5:
        outputs = [np.zeros(count) for _ in range(size)] if group.rank == root else None
        group.gather(outputs, np.ones(count), root)
    else:
        group.broadcast(np.ones(count), root)


PHASES: dict[str, tuple[Callable[[Any, random.Random], None], float]] = {
    "creation": (small, 0.06),
    "small": (small, 0.2),
    "large": (large, 0.3),
    "asleep": (asleep, 0.4),
    "transfers": (transfers, 0.2),
    "asynchronous": (asynchronous, 0.3),
    "others": (others, 0.3),
    "objects": (objects, 0.2),
    "programme": (programme, 0.3),
}
"""What is repeated until the rank dies, and how long it may live at most."""


def survive(rank: int, size: int, name: str, trial: Trial, pids: tuple[int, ...]) -> Seen:
    """Be one rank of a trial; the rank after the victim kills it."""
    killed_at = [0.0]

    def kill() -> None:
        os.kill(pids[trial.victim], signal.SIGKILL)
        killed_at[0] = time.monotonic()

    creating = trial.phase == "creation"
    before, draw = Held.now(), random.Random(name)
    killer = threading.Timer(trial.delay_s, kill) if rank == (trial.victim + 1) % size else None
    error: BaseException | None = None
    try:
        if killer is not None and creating:
            killer.start()
        with ExitStack() as stack:
            at_work = stack.enter_context(
                trial.group(rank, name, CREATION_TIMEOUT_S if creating else 20.0)
            )
            if trial.parted:
                at_work = at_work.split(0, key=-rank)
                stack.callback(at_work.destroy)
            at_work.barrier()
            if killer is not None and not creating:
                killer.start()
            while True:
                PHASES[trial.phase][0](at_work, draw)
    except col.CollectiveError as caught:
        at, error = time.monotonic(), caught
    if killer is not None:
        killer.join()
    ranks = tuple(getattr(error, "ranks", ()))
    return Seen(type(error).__name__, ranks, str(error), at, killed_at[0], before.left_behind())


def make_again(rank: int, size: int, name: str, backend: str) -> float:
    with own_group(rank, size, name, backend=backend) as group:
        return float(group.allreduce(np.full(5000, rank + 1.0))[0])


def own_pid(rank: int, size: int) -> int:
    return os.getpid()


def run_trial(pool: RankPool, trial: Trial) -> float:
    """Run one trial.

    Returns:
        How long after the death the last survivor had its error, in seconds.

    Raises:
        AssertionError: A survivor saw or kept something wrong.
    """
    size, victim = trial.size, trial.victim
    name = fresh()
    pids = tuple(pool.run(size, own_pid))
    results = pool.run(size, survive, name, trial, pids, may_die=[victim])
    found: dict[int, Seen] = {rank: seen for rank, seen in enumerate(results) if rank != victim}
    killed_at = max(seen.killed_at for seen in found.values())
    slowest = 0.0
    for rank, seen in found.items():
        told = f"{trial}: rank {rank} saw {seen.at - killed_at:.2f} s after the death: {seen}"
        allowed = (
            {"PeerLostError", "CollectiveTimeoutError"}
            if trial.phase == "creation"
            else {"PeerLostError"}
        )
        assert seen.kind in allowed, told
        assert seen.ranks == (trial.named(),), told
        assert seen.at - killed_at < LIMIT_S, told
        assert not seen.left_behind, told
        slowest = max(slowest, seen.at - killed_at)
    again = pool.run(size - 1, make_again, name, "gloo" if trial.hosts else trial.backend)
    assert again == [size * (size - 1) / 2] * (size - 1), f"{trial}: {again}"
    return slowest


def trials(number: int, seed: int, backend: str) -> list[Trial]:
    """Return so many trials; all phases come in turn. Of the hierarchical backend six ranks, on two or three hosts."""
    random_ = random.Random(seed)
    made = []
    for turn in range(number):
        phase = list(PHASES)[turn % len(PHASES)]
        hosts, parted = "", False
        if backend == "hierarchical":
            hosts = random_.choice(("aaabbb", "ababab", "aabbcc", "abccca"))
            parted = phase != "creation" and random_.random() < 0.5
        size = len(hosts) or random_.randint(2, 4)
        victim, delay_s = random_.randrange(size), random_.random() * PHASES[phase][1]
        made.append(Trial(backend, size, victim, phase, delay_s, hosts, parted))
    return made


def campaign(
    pool: RankPool, number: int, seed: int, backend: str, say: Callable[[str], None]
) -> float:
    """Run trials; return the longest time that a survivor waited for its error."""
    slowest = 0.0
    for turn, trial in enumerate(trials(number, seed, backend)):
        took = run_trial(pool, trial)
        slowest = max(slowest, took)
        say(
            f"{turn + 1:3} of {number}: {trial.phase}, rank {trial.victim} of {trial.size} after "
            f"{1000 * trial.delay_s:.0f} ms: errors within {took:.2f} s"
        )
    return slowest
