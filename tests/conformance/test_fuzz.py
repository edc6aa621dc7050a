"""Long random programs on groups that live on: every operation in any library, dtype and layout, against numpy.

Bursts of asynchronous calls that are awaited in another order, splits, a second group beside the first, objects,
timeouts that change, calls that are refused and calls that do not match. Every rank draws the same program from a seed.

    COLLTENSOR_FUZZ_STEPS=20000  How many steps for each backend; 500 by default.
    COLLTENSOR_FUZZ_SEED=7       The seed of the first 100 steps, the next have the next number; 0 by default. A failure
                                 names its seed.
    COLLTENSOR_FUZZ_LOOPS=8      So many busy loops beside the ranks; none by default.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from hashlib import blake2b
from typing import Any

import pytest
from oracle import DTYPES, REDUCIBLE, Array, in_another_order, ops_of
from pool import RankPool, RanksFailedError, group_of
from test_between_hosts import world_of
from test_property import MOVES, REDUCTIONS, Runner, Step
from worlds import Transport, World, assert_same_bits

import colltensor as col
from colltensor.backends import is_available, reason

STEPS = int(os.environ.get("COLLTENSOR_FUZZ_STEPS") or "500")
SEED = int(os.environ.get("COLLTENSOR_FUZZ_SEED") or "0")
LOOPS = int(os.environ.get("COLLTENSOR_FUZZ_LOOPS") or "0")
PART = 100
PENDING = 12
MOST_FAILURES = 3
"""After so many the campaign ends; after fewer the next seed begins, with groups of its own."""
ACTIONS = (
    (*MOVES, *REDUCTIONS) * 4
    + ("tree",) * 4
    + ("barrier", "mismatch", "objects", "split", "timeout", "refused")
)
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"


class Fuzzer(Runner):
    """A runner whose deferred calls are awaited by and by, and that does what a single call does not show."""

    def __init__(
        self, group: Any, libraries: tuple[str, ...], draw: random.Random, one_at_a_time: bool
    ) -> None:
        super().__init__(group, libraries)
        self.hash = blake2b(digest_size=8)
        self._draw = draw
        self._one_at_a_time = one_at_a_time

    def run(self, step: Step) -> None:
        """Make one call; now and then wait for some of those that are under way, in any order."""
        super().run(step)
        while len(self._pending) > PENDING or (self._pending and self._draw.random() < 0.15):
            self._pending.pop(self._draw.randrange(len(self._pending)))()

    def _keep(self, step: Step, got: Array) -> None:
        self.hash.update(got.tobytes())

    def _objects(self, step: Step) -> Callable[[], None]:
        things = [
            {"rank": peer, "step": step.seed, "text": "x" * (step.count % 500)}
            for peer in range(self.size)
        ]
        root = step.root % self.size
        assert self.group.allgather_object(things[self.rank]) == things
        assert (
            self.group.broadcast_object(things[self.rank] if self.rank == root else None, root)
            == things[root]
        )
        return lambda: None

    def _split(self, step: Step) -> Callable[[], None]:
        while self._one_at_a_time and self._pending:
            self._pending.pop()()
        colors = 1 + step.root % self.size
        part = self.group.split((self.rank + step.seed) % colors, key=-self.rank)
        try:
            inner = Runner(part, self._libraries)
            for _ in range(3):
                inner.run(drawn(self._draw, (*MOVES, *REDUCTIONS, "tree")))
            inner.finish()
        finally:
            part.destroy()
        return lambda: None

    def _timeout(self, step: Step) -> Callable[[], None]:
        self.group.set_timeout(20.0 + step.root)
        return lambda: None

    def _refused(self, step: Step) -> Callable[[], None]:
        """A call that no rank may make: refused everywhere, without a message to anybody."""
        sample = self._sample(step, self._given(step, self.rank))
        with pytest.raises(col.CollectiveError):
            self.group.broadcast(sample.tensor, self.size + step.root)
        return sample.check_untouched


def drawn(draw: random.Random, actions: tuple[str, ...] = ACTIONS) -> Step:
    """Draw a step."""
    operation = draw.choice(actions)
    dtype = draw.choice(REDUCIBLE if operation in (*REDUCTIONS, "tree", "mismatch") else DTYPES)
    op = draw.choice(ops_of(dtype)) if dtype in REDUCIBLE else ""
    count = draw.choice([draw.randrange(10), draw.randrange(3000), 4096, 20_001])
    deferred = draw.random() < 0.5 and operation not in (
        "mismatch",
        "objects",
        "split",
        "timeout",
        "refused",
    )
    return Step(operation, dtype, op, count, draw.randrange(6), draw.randrange(10_000), deferred)


def run_program(
    rank: int, size: int, world: World, libraries: tuple[str, ...], seed: int, steps: int
) -> dict[str, str]:
    """Run the steps of a seed on two groups."""
    draw = random.Random(seed)
    with ExitStack() as stack:
        if world.hosts:
            stack.enter_context(in_another_order())
        # pygloo holds the interpreter lock in a call, so that two groups at once need one order on all ranks.
        one_at_a_time = world.provider == "pygloo"
        groups = [
            group_of(size, world.backend, world.provider, timeout_s=timeout_s, hosts=world.hosts)
            for timeout_s in ((30.0,) if one_at_a_time else (30.0, 31.0))
        ]
        runners = [Fuzzer(group, libraries, draw, one_at_a_time) for group in groups]
        for number in range(steps):
            runner = runners[-1 if draw.random() < 0.2 else 0]
            step = drawn(draw)
            began = time.monotonic()
            try:
                runner.run(step)
            except Exception as error:
                took_s = time.monotonic() - began
                what = f"COLLTENSOR_FUZZ_SEED={seed}, step {number}, {step}, {runner.group.name}, after {took_s:.2f} s"
                raise AssertionError(f"{what}: {error}") from error
        for runner in runners:
            runner.finish()
    return {str(number): runner.hash.hexdigest() for number, runner in enumerate(runners)}


@pytest.fixture
def loops() -> Iterator[None]:
    """Busy processes beside the test."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(LOOPS)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def run_parts(pool: RankPool, world: World, libraries: tuple[str, ...]) -> None:
    failures: list[str] = []
    for part in range(-(-STEPS // PART)):
        steps = min(PART, STEPS - part * PART)
        try:
            results = pool.run(
                world.size,
                run_program,
                world,
                libraries,
                SEED + part,
                steps,
                timeout_s=120 + 60 * LOOPS,
            )
            assert_same_bits(results)
        except (RanksFailedError, AssertionError) as error:
            failures.append(f"COLLTENSOR_FUZZ_SEED={SEED + part}: {error}")
            if len(failures) == MOST_FAILURES:
                break
        if STEPS > 500 and part % 20 == 19:
            print(f"{world}: {(part + 1) * PART} steps, {len(failures)} failures", flush=True)
    assert not failures, "\n\n".join(failures)


@pytest.mark.timeout(max(180, STEPS))
@pytest.mark.usefixtures("loops")
def test_a_long_random_program(
    pool: RankPool, transport: Transport, libraries: tuple[str, ...]
) -> None:
    run_parts(pool, World(3, *transport), libraries)


@pytest.mark.gloo
@pytest.mark.skipif(not is_available("shm"), reason=str(reason("shm")))
@pytest.mark.timeout(max(180, STEPS))
@pytest.mark.usefixtures("loops")
def test_a_long_random_program_between_hosts(
    pool: RankPool, provider: str, libraries: tuple[str, ...]
) -> None:
    run_parts(pool, world_of("abb", provider), libraries)
