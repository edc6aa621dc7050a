"""Random collectives in shared memory against numpy: a plan that every rank draws from one seed, and its execution.

Every step draws an operation, a dtype, a size near one of the core's thresholds, a reduce op, a root; each rank its
own memory layouts, whether it calls asynchronously, and delays. Results are compared bit by bit: the order of floating
point sums is the ranks' order, 16-bit floats are combined in float32 and rounded once.
"""

from __future__ import annotations

import random
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from shm_ranks import Array, numpy_dtype, own_group, strided

import colltensor as col
from colltensor.types import DTYPES, DType

COUNT_LIMIT = 1 << 20
"""Bytes of the largest message: more than all staging of a group of two, twice."""
NEAR = (0, 1, 64, 4096, 16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20)
"""Bytes near which sizes are drawn: a message inline, without the interpreter lock, direct, in blocks, in halves."""
LARGE_NBYTES = (2 << 20, 5 << 20)
REDUCIBLE = (
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex64",
    "complex128",
)
OPERATIONS = (
    "allreduce",
    "allreduce",
    "allreduce",
    "reduce",
    "reducescatter",
    "broadcast",
    "allgather",
    "gather",
    "scatter",
    "alltoall",
    "sendrecv",
    "pairs",
    "barrier",
    "tree",
    "mismatch",
    "pair mismatch",
)
POOL = 1 << 14
"""Numbers from which values are cut; prime steps keep one place's values from another's."""


class Step(NamedTuple):
    """What all ranks agree on in one step."""

    number: int
    operation: str
    dtype: DType
    count: int
    op: str | None
    root: int
    shift: int
    odd: int

    def __str__(self) -> str:
        return f"step {self.number}: {self.operation} of {self.dtype}[{self.count}], op {self.op}, root {self.root}"


class Values:
    """Arguments by rank, step and part; every rank can compute everybody's."""

    def __init__(self, size: int, seed: int) -> None:
        self._numbers = [
            np.random.default_rng([seed, rank]).integers(1, 1 << 62, POOL) for rank in range(size)
        ]

    def moved(self, rank: int, step: Step, part: int = 0) -> Array:
        """Bytes that no other rank, step or part has."""
        nbytes = step.count * step.dtype.itemsize
        first = zlib.crc32(b"%d %d" % (step.number, part)) % POOL
        words = self._cut(rank, first, nbytes // 8 + 1).view(np.uint8)[:nbytes]
        return (
            (words & 1).astype(bool)
            if step.dtype.kind == "b"
            else words.view(numpy_dtype(step.dtype))
        )

    def reduced(self, rank: int, step: Step, part: int = 0) -> Array:
        """Numbers whose floating-point sums are inexact and depend on their order."""
        kind, dtype = step.dtype.kind, numpy_dtype(step.dtype)
        numbers = self._cut(rank, zlib.crc32(b"%d %d" % (part, step.number)) % POOL, step.count)
        if kind == "b":
            return numbers % 3 == 0
        if kind in "iu":
            return numbers.astype(dtype)
        if kind == "c":
            return ((numbers % 2003 - 1001) / 7 + 1j * (numbers % 1009 - 504) / 3).astype(dtype)
        return ((numbers % 2003 - 1001) / 701).astype(dtype)

    def _cut(self, rank: int, first: int, count: int) -> Array:
        row = self._numbers[rank]
        if first + count <= POOL:
            return row[first : first + count]
        repeated = np.tile(row, (first + count) // POOL + 1)[first : first + count]
        # no repetition that a shift by the pool's size would hide
        return repeated + np.arange(count) // POOL * 7


FUNCTIONS: dict[str, Callable[..., Array]] = {
    "SUM": np.add,
    "AVERAGE": np.add,
    "PRODUCT": np.multiply,
    "MIN": np.minimum,
    "MAX": np.maximum,
    "BAND": np.bitwise_and,
    "BOR": np.bitwise_or,
    "BXOR": np.bitwise_xor,
}
OF_BOOL = {
    "SUM": np.logical_or,
    "MAX": np.logical_or,
    "PRODUCT": np.logical_and,
    "MIN": np.logical_and,
}


def combined(step: Step, given: list[Array]) -> Array:
    """Reduce in rank order as the core promises, bit for bit."""
    op, dtype = step.op, numpy_dtype(step.dtype)
    assert op is not None
    function = OF_BOOL.get(op, FUNCTIONS[op]) if step.dtype.kind == "b" else FUNCTIONS[op]
    halves = step.dtype.kind == "f" and step.dtype.itemsize == 2
    parts = [array.astype(np.float32) for array in given] if halves else given
    with np.errstate(all="ignore"):
        total = parts[0]
        for array in parts[1:]:
            total = function(total, array)
        if op == "AVERAGE":
            real = {8: np.float32, 16: np.float64}.get(
                step.dtype.itemsize if step.dtype.kind == "c" else 0
            )
            total = (
                total / len(given)
                if real is None
                else (total.view(real) / real(len(given))).view(dtype)
            )
        return total.astype(dtype)


def draw(random_: random.Random, number: int, size: int) -> Step:
    operation = random_.choice(OPERATIONS)
    reduces = operation in ("allreduce", "reduce", "reducescatter", "mismatch")
    name = random_.choice(REDUCIBLE if reduces else tuple(DTYPES))
    dtype = DTYPES[name]
    ops = ["SUM", "AVERAGE"] if dtype.kind == "c" else ["SUM", "PRODUCT", "MIN", "MAX"]
    if dtype.kind in "iub":
        ops += ["BAND", "BOR", "BXOR"]
    elif dtype.kind == "f":
        ops.append("AVERAGE")
    luck = random_.random()
    if luck < 0.004:
        nbytes = random_.randint(*LARGE_NBYTES)
    elif luck < 0.7:
        nbytes = random_.choice(NEAR[:7])
    else:
        nbytes = random_.randint(0, 5000) if luck < 0.9 else random_.choice(NEAR)
    if operation in ("reducescatter", "scatter", "alltoall") and random_.random() < 0.7:
        nbytes //= size  # these pass all parts at once
    count = max(0, nbytes // dtype.itemsize + random_.choice((-1, 0, 0, 1, 3)))
    shift = random_.randrange(1, size)
    return Step(
        number,
        operation,
        dtype,
        count,
        random_.choice(ops) if reduces else None,
        random_.randrange(size),
        shift,
        random_.randrange(size),
    )


class Player:
    """Plays a plan on one group, as one rank, in one thread."""

    def __init__(self, group: Any, seed: int) -> None:
        self._group = group
        self._rank, self._size = group.rank, group.world_size
        self._values = Values(self._size, seed)
        self._plan = random.Random(seed)
        self._own = random.Random(seed * 1009 + self._rank)
        self._pending: deque[tuple[Any, Callable[[], None], Step]] = deque()
        self._seed = seed

    def play(self, steps: int) -> None:
        """Run so many steps.

        Raises:
            AssertionError: Says which step of which seed went wrong.
        """
        for number in range(steps):
            step = draw(self._plan, number, self._size)
            try:
                self._delay()
                self._run(step)
                while self._pending and (len(self._pending) > 6 or self._own.random() < 0.4):
                    step = self._check_next()
            except BaseException as error:
                raise AssertionError(f"{self}: {step}: {type(error).__name__}: {error}") from error
        while self._pending:
            self._check_next()

    def __str__(self) -> str:
        return f"seed {self._seed}, rank {self._rank} of {self._size}, {self._group.name}"

    def _delay(self) -> None:
        luck = self._own.random()
        if luck < 0.001:
            time.sleep(0.06)  # more than a slice of the others' sleep
        elif luck < 0.02:
            time.sleep(self._own.random() * 0.002)
        elif luck < 0.03:
            until = time.perf_counter() + self._own.random() * 0.001
            while time.perf_counter() < until:
                pass

    def _check_next(self) -> Step:
        work, check, step = self._pending.popleft()
        work.wait()
        check()
        return step

    def _call(
        self, step: Step, check: Callable[[], None], method: Callable[..., Any], *arguments: Any
    ) -> None:
        """Call now and check, or issue and check later."""
        if self._own.random() < 0.2:
            self._pending.append((method(*arguments, async_op=True), check, step))
        else:
            method(*arguments)
            check()

    def _lay(self, array: Array) -> Array:
        return strided(array.copy(), self._own.randrange(12))

    def _room(self, step: Step) -> Array:
        return self._lay(np.zeros(step.count, numpy_dtype(step.dtype)))

    def _run(self, step: Step) -> None:
        getattr(self, "_" + step.operation.replace(" ", "_"))(step)

    def _barrier(self, step: Step) -> None:
        self._call(step, lambda: None, self._group.barrier)

    def _allreduce(self, step: Step) -> None:
        given = [self._values.reduced(rank, step) for rank in range(self._size)]
        mine = self._lay(given[self._rank])
        self._call(
            step,
            lambda: same(mine, combined(step, given)),
            self._group.allreduce,
            mine,
            col.ReduceOp[step.op],
        )

    def _reduce(self, step: Step) -> None:
        given = [self._values.reduced(rank, step) for rank in range(self._size)]
        mine, here = self._lay(given[self._rank]), self._rank == step.root

        def check() -> None:
            same(mine, combined(step, given) if here else given[self._rank])

        self._call(step, check, self._group.reduce, mine, step.root, col.ReduceOp[step.op])

    def _reducescatter(self, step: Step) -> None:
        sources = [
            self._lay(self._values.reduced(self._rank, step, part)) for part in range(self._size)
        ]
        target = self._room(step)

        def check() -> None:
            same(
                target,
                combined(
                    step,
                    [self._values.reduced(rank, step, self._rank) for rank in range(self._size)],
                ),
            )

        self._call(step, check, self._group.reducescatter, target, sources, col.ReduceOp[step.op])

    def _broadcast(self, step: Step) -> None:
        mine = self._lay(self._values.moved(self._rank, step))
        self._call(
            step,
            lambda: same(mine, self._values.moved(step.root, step)),
            self._group.broadcast,
            mine,
            step.root,
        )

    def _allgather(self, step: Step) -> None:
        outputs = [self._room(step) for _ in range(self._size)]

        def check() -> None:
            for rank, output in enumerate(outputs):
                same(output, self._values.moved(rank, step))

        self._call(
            step,
            check,
            self._group.allgather,
            outputs,
            self._lay(self._values.moved(self._rank, step)),
        )

    def _gather(self, step: Step) -> None:
        outputs = [self._room(step) for _ in range(self._size)] if self._rank == step.root else None

        def check() -> None:
            for rank, output in enumerate(outputs or ()):
                same(output, self._values.moved(rank, step))

        self._call(
            step,
            check,
            self._group.gather,
            outputs,
            self._lay(self._values.moved(self._rank, step)),
            step.root,
        )

    def _scatter(self, step: Step) -> None:
        target, here = self._room(step), self._rank == step.root
        parts = (
            [self._lay(self._values.moved(self._rank, step, part)) for part in range(self._size)]
            if here
            else None
        )
        self._call(
            step,
            lambda: same(target, self._values.moved(step.root, step, self._rank)),
            self._group.scatter,
            target,
            parts,
            step.root,
        )

    def _alltoall(self, step: Step) -> None:
        outputs = [self._room(step) for _ in range(self._size)]
        sources = [
            self._lay(self._values.moved(self._rank, step, part)) for part in range(self._size)
        ]

        def check() -> None:
            for rank, output in enumerate(outputs):
                same(output, self._values.moved(rank, step, self._rank))

        self._call(step, check, self._group.alltoall, outputs, sources)

    def _sendrecv(self, step: Step) -> None:
        target, source = self._room(step), (self._rank - step.shift) % self._size
        self._call(
            step,
            lambda: same(target, self._values.moved(source, step)),
            self._group.sendrecv,
            self._lay(self._values.moved(self._rank, step)),
            (self._rank + step.shift) % self._size,
            target,
            source,
        )

    def _pairs(self, step: Step) -> None:
        """Some ranks send one after the other to one rank; the rest go on."""
        to = (step.root + step.shift) % self._size
        for source in {step.root, step.odd} - {to}:
            if self._rank == source:
                self._call(
                    step,
                    lambda: None,
                    self._group.send,
                    self._lay(self._values.moved(source, step)),
                    to,
                )
            elif self._rank == to:
                target = self._room(step)
                self._call(
                    step,
                    lambda target=target, source=source: same(
                        target, self._values.moved(source, step)
                    ),
                    self._group.recv,
                    target,
                    source,
                )

    def _tree(self, step: Step) -> None:
        """Leaves that share a transfer and leaves that do not, of two dtypes."""
        counts = (step.count, 3, 300_000 if step.number % 8 == 0 else 100)
        leaves = {
            str(n): np.full(count, self._rank + n + step.number % 89, numpy_dtype(DTYPES[name]))
            for n, (count, name) in enumerate(
                zip(counts, ("int32", "float64", "float32"), strict=True)
            )
        }

        def check() -> None:
            for n, leaf in enumerate(leaves.values()):
                wanted = sum(range(self._size)) + self._size * (n + step.number % 89)
                assert (leaf == wanted).all(), f"leaf {n} is {leaf}, not {wanted}"

        self._call(step, check, self._group.allreduce, leaves)

    def _mismatch(self, step: Step) -> None:
        """One rank brings another count; nobody's data is touched."""
        mine = self._lay(
            self._values.reduced(
                self._rank, step._replace(count=step.count + (self._rank == step.odd))
            )
        )
        kept = mine.copy()
        try:
            self._group.allreduce(mine, col.ReduceOp[step.op])
        except col.MismatchError as error:
            named = error.ranks
        else:
            raise AssertionError("the ranks did not disagree")
        assert named == (step.odd,) or self._size == 2, named
        same(mine, kept.ravel())

    def _pair_mismatch(self, step: Step) -> None:
        """One end of a transfer differs; the other ranks go on."""
        to = (step.root + step.shift) % self._size
        room = self._room(step._replace(count=step.count + 1))
        kept = room.copy()
        try:
            if self._rank == step.root:
                self._group.send(self._lay(self._values.moved(self._rank, step)), to)
            elif self._rank == to:
                self._group.recv(room, step.root)
            else:
                return
        except col.MismatchError:
            same(room, kept.ravel())
        else:
            raise AssertionError("the two ranks did not disagree")


def same(got: Array, wanted: Array) -> None:
    """Compare bit by bit, in row-major order."""
    got = np.ascontiguousarray(got).reshape(-1)
    assert got.dtype == wanted.dtype
    if got.tobytes() != wanted.tobytes():
        unsigned = f"V{got.itemsize}"
        places = np.flatnonzero(got.view(unsigned) != np.ascontiguousarray(wanted).view(unsigned))
        first = places[0] if len(places) else -1
        raise AssertionError(
            f"{len(places)} of {got.size} elements differ, first {first}: {got[first]} instead of "
            f"{wanted[first]}"
        )


def play(rank: int, size: int, name: str, seed: int, steps: int, threads: int) -> int:
    """Play a plan in each of one or two threads at once, each with a group of its own; return the steps."""
    failures: list[BaseException] = []

    def run(group: Any, seed: int) -> None:
        try:
            Player(group, seed).play(steps)
        except BaseException as error:
            failures.append(error)

    with (
        own_group(rank, size, name, timeout_s=60.0) as first,
        own_group(rank, size, name + "b", 60.0) as second,
    ):
        other = threading.Thread(target=run, args=(second, seed + 500_000))
        if threads > 1:
            other.start()
        run(first, seed)
        if threads > 1:
            other.join()
        if failures:
            raise failures[0]
        first.barrier()
        second.barrier()
    return steps * threads
