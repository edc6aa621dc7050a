"""Random sequences of calls in random libraries, dtypes, shapes, layouts and groups, against numpy.

hypothesis draws the steps; the ranks of the pool run them on groups that earlier examples used, some
of them asynchronously and looked at only after the last step.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from oracle import DTYPES, REDUCIBLE, Array, combined, moved, numpy_dtype, ops_of, reduced
from pool import RankPool, group_of
from samples import Layout, Sample, library_for
from worlds import World, assert_same_bits

import colltensor as col

MOVES = ("broadcast", "allgather", "gather", "scatter", "alltoall", "sendrecv", "send")
REDUCTIONS = ("allreduce", "reduce", "reducescatter")
SEQUENCES = int(os.environ.get("COLLTENSOR_TEST_SEQUENCES") or "800")
COUNTS = st.one_of(st.integers(0, 9), st.integers(10, 3000), st.sampled_from([4096, 20_001]))


@dataclass(frozen=True)
class Step:
    """One call of every rank; ``seed`` decides values, layouts and libraries."""

    operation: str
    dtype: str
    op: str
    count: int
    root: int
    seed: int
    deferred: bool


@st.composite
def steps(draw: st.DrawFn) -> Step:
    operation = draw(st.sampled_from((*MOVES, *REDUCTIONS, "tree", "mismatch", "barrier")))
    dtype = draw(st.sampled_from(DTYPES if operation in MOVES else REDUCIBLE))
    op = draw(st.sampled_from(ops_of(dtype))) if dtype in REDUCIBLE else ""
    deferred = draw(st.booleans()) and operation != "mismatch"
    return Step(
        operation,
        dtype,
        op,
        draw(COUNTS),
        draw(st.integers(0, 5)),
        draw(st.integers(0, 9999)),
        deferred,
    )


def random_layout(count: int, seed: int) -> Layout:
    """Return any layout without overlaps: axes in any memory order, with gaps, forwards and backwards."""
    source = random.Random(seed)
    if source.random() < 0.4:
        return Layout("C", (count,), (1,), 0, count)
    shape, rest = [], count
    for divisor in (2, 3, 5):
        if rest and rest % divisor == 0 and source.random() < 0.6:
            shape.append(divisor)
            rest //= divisor
    shape.insert(source.randrange(len(shape) + 1), rest)
    strides = [0] * len(shape)
    step, offset = source.choice([1, 1, 2, 3]), source.randrange(3)
    for axis in source.sample(range(len(shape)), len(shape)):
        backwards = source.random() < 0.25
        strides[axis] = -step if backwards else step
        offset += step * max(shape[axis] - 1, 0) if backwards else 0
        step = step * max(shape[axis], 1) + source.choice([0, 0, 1, 4])
    return Layout(f"random {shape} {strides}", tuple(shape), tuple(strides), offset, step + 3)


class Runner:
    """Runs steps in one rank; what is deferred is checked by ``finish``."""

    def __init__(self, group: Any, libraries: tuple[str, ...]) -> None:
        self.group, self.rank, self.size = group, group.rank, group.world_size
        self.digests: dict[str, str] = {}
        self._libraries = libraries
        self._pending: list[Callable[[], None]] = []

    def run(self, step: Step) -> None:
        """Make one call, and check it or remember to."""
        check = getattr(self, f"_{step.operation}")(step)
        if step.deferred:
            self._pending.append(check)
        else:
            check()

    def finish(self) -> None:
        """Check what was deferred, the last first: waiting in another order than that of issue is fine."""
        for check in reversed(self._pending):
            check()

    def _sample(self, step: Step, values: Array, number: int = 0) -> Sample:
        seed = step.seed * 31 + self.rank * 7 + number
        layout = random_layout(len(values), seed)
        libraries = (self._libraries[seed % len(self._libraries)], "numpy")
        return Sample(
            library_for(libraries, 0, step.dtype, layout) or "numpy", step.dtype, layout, values
        )

    def _given(self, step: Step, rank: int, salt: int = 0) -> Array:
        make = moved if step.operation in MOVES else reduced
        return make(step.dtype, step.count, rank, step.seed + salt)

    def _blanks(self, step: Step) -> list[Sample]:
        return [
            self._sample(step, np.zeros(step.count, numpy_dtype(step.dtype)), 50 + n)
            for n in range(self.size)
        ]

    def _issue(self, step: Step, *args: Any) -> Callable[[], Any]:
        outcome = getattr(self.group, step.operation)(*args, async_op=step.deferred)
        return outcome.result if step.deferred else lambda: outcome

    def _allreduce(self, step: Step) -> Callable[[], None]:
        inputs = [self._given(step, peer) for peer in range(self.size)]
        sample = self._sample(step, inputs[self.rank])
        result = self._issue(step, sample.tensor, col.ReduceOp[step.op])
        return lambda: self._keep(
            step, sample.check_result(result(), *combined(step.dtype, step.op, inputs))
        )

    def _keep(self, step: Step, got: Array) -> None:
        self.digests[repr(step)] = got.tobytes().hex()[:2000]

    def _reduce(self, step: Step) -> Callable[[], None]:
        root = step.root % self.size
        inputs = [self._given(step, peer) for peer in range(self.size)]
        sample = self._sample(step, inputs[self.rank])
        result = self._issue(step, sample.tensor, root, col.ReduceOp[step.op])

        def check() -> None:
            found = result()
            if self.rank == root:
                sample.check_result(found, *combined(step.dtype, step.op, inputs))
            else:
                sample.check_untouched()

        return check

    def _reducescatter(self, step: Step) -> Callable[[], None]:
        given = [
            [self._given(step, peer, part) for part in range(self.size)]
            for peer in range(self.size)
        ]
        sources = [self._sample(step, values, n) for n, values in enumerate(given[self.rank])]
        target = self._blanks(step)[0]
        result = self._issue(
            step, target.tensor, [source.tensor for source in sources], col.ReduceOp[step.op]
        )

        def check() -> None:
            target.check_result(
                result(), *combined(step.dtype, step.op, [parts[self.rank] for parts in given])
            )
            for source in sources:
                source.check_untouched()

        return check

    def _broadcast(self, step: Step) -> Callable[[], None]:
        root = step.root % self.size
        sample = self._sample(step, self._given(step, self.rank))
        result = self._issue(step, sample.tensor, root)

        def check() -> None:
            found = result()
            if self.rank == root:
                sample.check_untouched()
            else:
                sample.check_result(found, self._given(step, root))

        return check

    def _allgather(self, step: Step) -> Callable[[], None]:
        source, targets = self._sample(step, self._given(step, self.rank)), self._blanks(step)
        result = self._issue(step, [target.tensor for target in targets], source.tensor)
        return lambda: self._check_list(
            result(), targets, [self._given(step, peer) for peer in range(self.size)]
        )

    def _check_list(self, tensors: Any, targets: list[Sample], expected: list[Array]) -> None:
        for tensor, target, values in zip(tensors, targets, expected, strict=True):
            target.check_result(tensor, values)

    def _gather(self, step: Step) -> Callable[[], None]:
        root = step.root % self.size
        source, targets = self._sample(step, self._given(step, self.rank)), self._blanks(step)
        here = self.rank == root
        result = self._issue(
            step, [target.tensor for target in targets] if here else None, source.tensor, root
        )

        def check() -> None:
            found = result()
            if here:
                self._check_list(
                    found, targets, [self._given(step, peer) for peer in range(self.size)]
                )
            source.check_untouched()

        return check

    def _scatter(self, step: Step) -> Callable[[], None]:
        root = step.root % self.size
        target = self._blanks(step)[0]
        parts = [
            self._sample(step, self._given(step, self.rank, part), part)
            for part in range(self.size)
        ]
        given = [part.tensor for part in parts] if self.rank == root else None
        result = self._issue(step, target.tensor, given, root)
        return lambda: self._keep_none(
            target.check_result(result(), self._given(step, root, self.rank)), parts
        )

    def _keep_none(self, got: Array, untouched: list[Sample]) -> None:
        assert got is not None
        for sample in untouched:
            sample.check_untouched()

    def _alltoall(self, step: Step) -> Callable[[], None]:
        targets = self._blanks(step)
        sources = [
            self._sample(step, self._given(step, self.rank, part), part)
            for part in range(self.size)
        ]
        result = self._issue(
            step, [target.tensor for target in targets], [source.tensor for source in sources]
        )
        return lambda: self._check_list(
            result(), targets, [self._given(step, peer, self.rank) for peer in range(self.size)]
        )

    def _sendrecv(self, step: Step) -> Callable[[], None]:
        if self.size == 1:
            return lambda: None
        distance = 1 + step.root % (self.size - 1)
        to, of = (self.rank + distance) % self.size, (self.rank - distance) % self.size
        source, target = self._sample(step, self._given(step, self.rank)), self._blanks(step)[0]
        result = self._issue(step, source.tensor, to, target.tensor, of)
        return lambda: self._keep_none(
            target.check_result(result(), self._given(step, of)), [source]
        )

    def _send(self, step: Step) -> Callable[[], None]:
        root = step.root % self.size
        peer = (root + 1) % self.size
        if self.size == 1 or self.rank not in (root, peer):
            return lambda: None
        sample = self._sample(step, self._given(step, self.rank))
        if self.rank == root:
            sent = self._issue(step, sample.tensor, peer)
            return lambda: self._keep_none(sent(), [sample])
        outcome = self.group.recv(sample.tensor, root, async_op=step.deferred)
        return lambda: self._keep_none(
            sample.check_result(
                outcome.result() if step.deferred else outcome, self._given(step, root)
            ),
            [],
        )

    def _tree(self, step: Step) -> Callable[[], None]:
        """A dict of three leaves, inserted in an order of this rank's own."""
        names = random.Random(step.seed + self.rank).sample(["x", "y", "z"], 3)
        inputs = {
            name: [self._given(step, peer, salt) for peer in range(self.size)]
            for salt, name in enumerate(("x", "y", "z"))
        }
        samples = {name: self._sample(step, inputs[name][self.rank], ord(name)) for name in names}
        tree = {name: sample.tensor for name, sample in samples.items()}
        outcome = self.group.allreduce(tree, col.ReduceOp[step.op], async_op=step.deferred)

        def check() -> None:
            result = outcome.result() if step.deferred else outcome
            for name, sample in samples.items():
                sample.check_result(result[name], *combined(step.dtype, step.op, inputs[name]))

        return check

    def _mismatch(self, step: Step) -> Callable[[], None]:
        """One rank brings an element more: everybody hears of it, nothing changes, and the sequence goes on."""
        if self.size == 1:
            return lambda: None
        odd = step.root % self.size == self.rank
        sample = self._sample(step, reduced(step.dtype, step.count + odd, self.rank))
        with pytest.raises(col.MismatchError):
            self.group.allreduce(sample.tensor, col.ReduceOp[step.op])
        return sample.check_untouched

    def _barrier(self, step: Step) -> Callable[[], None]:
        outcome = self.group.barrier(async_op=step.deferred)
        return lambda: outcome.wait() if step.deferred else None


def run_sequence(
    rank: int, world_size: int, world: World, libraries: tuple[str, ...], sequence: list[Step]
) -> dict[str, str]:
    runner = Runner(group_of(world.size, world.backend, world.provider, timeout_s=10.0), libraries)
    for step in sequence:
        try:
            runner.run(step)
        except Exception as error:
            raise AssertionError(f"{step}: {error}") from error
    runner.finish()
    return runner.digests


@pytest.mark.timeout(180)
@hypothesis.settings(max_examples=SEQUENCES, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(data=st.data())
def test_random_sequences(
    pool: RankPool, worlds: list[World], libraries: tuple[str, ...], data: st.DataObject
) -> None:
    small = [World(1, "loopback", None), *(world for world in worlds if world.size < 4)]
    world = data.draw(st.sampled_from(small), label="world")
    sequence = data.draw(st.lists(steps(), min_size=1, max_size=8), label="sequence")
    assert_same_bits(pool.run(world.size, run_sequence, world, libraries, sequence, timeout_s=40))
