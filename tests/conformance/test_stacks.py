"""One array of all ranks' elements where an operation takes a list of tensors: the same results, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from oracle import Array, moved, numpy_dtype
from pool import RankPool
from samples import Layout, Sample, as_numpy, dense, library_for
from worlds import Report, Transport, World

import colltensor as col

DTYPES = ("float32", "bfloat16", "int64", "uint8")
COUNTS = (3, 0, 1, 700, 2049)
LARGE = 1_500_001


def stacked(size: int, count: int) -> Layout:
    """A row for each rank."""
    return dense(size, count)


def in_a_row(size: int, count: int) -> Layout:
    """One after another, with no axis for the ranks."""
    return dense(size * count)


def apart(size: int, count: int) -> Layout:
    """Rows with gaps between them: each is contiguous."""
    return Layout("rows-apart", (size, count), (count + 3, 1), 2, size * (count + 3) + 2)


def every_other(size: int, count: int) -> Layout:
    """Columns of a wider matrix: nothing is contiguous, and the rows are cut out of the first axis."""
    return Layout("every-other", (size * count,), (2,), 1, 2 * size * count + 1)


SHAPES: tuple[Callable[[int, int], Layout], ...] = (stacked, in_a_row, apart, every_other)


class Stacks:
    """Makes one rank's arrays of one case; ranks with odd numbers bring lists if it is ``mixed``."""

    def __init__(self, group: Any, library: str, dtype: str, layout: Layout, mixed: bool) -> None:
        self.group, self.rank, self.size = group, group.rank, group.world_size
        self.count = layout.count // self.size
        self.lists = mixed and self.rank % 2 == 1
        self._library, self.dtype, self._layout = library, dtype, layout

    def values(self, rank: int, part: int) -> Array:
        """What ``rank`` has for rank ``part``."""
        return moved(self.dtype, self.count, rank, part)

    def one(self, values: Array | None = None) -> Any:
        """A tensor of one block."""
        filled = np.zeros(self.count, numpy_dtype(self.dtype)) if values is None else values
        return self.sample(dense(self.count), filled)

    def sample(self, layout: Layout, values: Array) -> Any:
        return Sample(self._library, self.dtype, layout, values)

    def all(self, blocks: list[Array] | None = None) -> Stack:
        """An array of all blocks, or a list."""
        filled = blocks or [np.zeros(self.count, numpy_dtype(self.dtype))] * self.size
        if self.lists:
            return Stack([self.one(block) for block in filled], True)
        return Stack([self.sample(self._layout, np.concatenate(filled))], False)


class Stack:
    """What stands for a list of tensors."""

    def __init__(self, samples: list[Any], is_list: bool) -> None:
        self._samples, self._is_list = samples, is_list
        tensors = [sample.tensor for sample in samples]
        self.given: Any = tensors if is_list else tensors[0]

    def check_result(self, result: Any, blocks: list[Array]) -> None:
        if self._is_list:
            assert result is self.given
            for sample, tensor, block in zip(self._samples, result, blocks, strict=True):
                sample.check_result(tensor, block)
        else:
            self._samples[0].check_result(result, np.concatenate(blocks))

    def check_untouched(self) -> None:
        for sample in self._samples:
            sample.check_untouched()


def allgather(stacks: Stacks, root: int) -> None:
    source, targets = stacks.one(stacks.values(stacks.rank, 0)), stacks.all()
    result = stacks.group.allgather(targets.given, source.tensor)
    targets.check_result(result, [stacks.values(rank, 0) for rank in range(stacks.size)])
    source.check_untouched()


def gather(stacks: Stacks, root: int) -> None:
    source, targets = stacks.one(stacks.values(stacks.rank, 0)), stacks.all()
    if stacks.rank == root:
        result = stacks.group.gather(targets.given, source.tensor, root)
        targets.check_result(result, [stacks.values(rank, 0) for rank in range(stacks.size)])
    else:
        assert stacks.group.gather(None, source.tensor, root) is None
    source.check_untouched()


def scatter(stacks: Stacks, root: int) -> None:
    target = stacks.one()
    sources = stacks.all([stacks.values(stacks.rank, part) for part in range(stacks.size)])
    result = stacks.group.scatter(
        target.tensor, sources.given if stacks.rank == root else None, root
    )
    target.check_result(result, stacks.values(root, stacks.rank))
    sources.check_untouched()


def alltoall(stacks: Stacks, root: int) -> None:
    sources = stacks.all([stacks.values(stacks.rank, part) for part in range(stacks.size)])
    targets = stacks.all()
    result = stacks.group.alltoall(targets.given, sources.given)
    targets.check_result(result, [stacks.values(rank, stacks.rank) for rank in range(stacks.size)])
    sources.check_untouched()


def alltoall_from_an_array_into_a_list(stacks: Stacks, root: int) -> None:
    sources = stacks.all([stacks.values(stacks.rank, part) for part in range(stacks.size)])
    stacks.lists = not stacks.lists
    targets = stacks.all()
    result = stacks.group.alltoall(targets.given, sources.given)
    targets.check_result(result, [stacks.values(rank, stacks.rank) for rank in range(stacks.size)])


def reducescatter(stacks: Stacks, root: int) -> None:
    """SUM of small whole numbers, which every dtype adds exactly."""

    def small(rank: int, part: int) -> Array:
        return ((np.arange(stacks.count) + rank + 3 * part) % 5).astype(numpy_dtype(stacks.dtype))

    target = stacks.one()
    sources = stacks.all([small(stacks.rank, part) for part in range(stacks.size)])
    result = stacks.group.reducescatter(target.tensor, sources.given)
    target.check_result(result, sum(small(rank, stacks.rank) for rank in range(stacks.size)))
    sources.check_untouched()


OPERATIONS: tuple[Callable[[Stacks, int], None], ...] = (
    allgather,
    gather,
    scatter,
    alltoall,
    alltoall_from_an_array_into_a_list,
    reducescatter,
)


def work_on_stacks(
    rank: int, world_size: int, world: World, libraries: tuple[str, ...]
) -> dict[str, str]:
    group = world.group()
    report = Report(group)
    number = 0
    for dtype in DTYPES:
        for operation in OPERATIONS:
            for shape in SHAPES:
                number += 1
                layout = shape(world_size, COUNTS[number % len(COUNTS)])
                library = library_for(libraries, rank, dtype, layout)
                if library is None:
                    continue
                for mixed in (False, True):
                    with report.case(
                        operation.__name__,
                        dtype,
                        layout.name,
                        layout.count,
                        "mixed" if mixed else "",
                    ):
                        operation(Stacks(group, library, dtype, layout, mixed), number % world_size)
    return report.done()


def test_every_operation_that_takes_lists(
    pool: RankPool, world: World, arrays: tuple[str, ...]
) -> None:
    pool.run(world.size, work_on_stacks, world, arrays)


def move_large(rank: int, world_size: int, world: World) -> None:
    group = world.group()
    report = Report(group)
    for operation in OPERATIONS:
        for shape in (stacked, every_other):
            layout = shape(world_size, LARGE)
            with report.case(operation.__name__, layout.name):
                operation(Stacks(group, "numpy", "float32", layout, False), world_size - 1)
    report.done()


def test_stacks_of_many_megabytes(pool: RankPool, transport: Transport) -> None:
    pool.run(2, move_large, World(2, *transport))


def gather_in_place(rank: int, world_size: int, world: World) -> None:
    """As ``MPI_IN_PLACE`` does: the tensor that is sent is the own block of the result, contiguous and not."""
    group = world.group()
    for wide in (
        np.zeros((world_size, 6), np.int32),
        np.zeros((world_size, 2, 5), np.int32)[:, :, ::2],
    ):
        for dst in (None, world_size - 1):
            wide[...] = 100
            wide[rank] = rank
            if dst is None:
                assert group.allgather(wide, wide[rank]) is wide
            else:
                group.gather(wide if rank == dst else None, wide[rank], dst)
            if dst in (None, rank):
                assert (np.arange(world_size) == wide.reshape(world_size, -1).T).all()


def test_the_own_block_may_be_the_tensor_itself(pool: RankPool, world: World) -> None:
    pool.run(world.size, gather_in_place, world)


def later(rank: int, world_size: int, world: World, library: str) -> None:
    group = world.group()
    stacks = Stacks(group, library, "float32", stacked(world_size, 5), False)
    source, targets = stacks.one(stacks.values(rank, 0)), stacks.all()
    work = group.allgather(targets.given, source.tensor, async_op=True)
    targets.check_result(work.result(), [stacks.values(peer, 0) for peer in range(world_size)])


def test_an_asynchronous_call(pool: RankPool, world: World, libraries: tuple[str, ...]) -> None:
    for library in libraries:
        pool.run(world.size, later, world, library)


def read_only(rank: int, world_size: int, world: World) -> None:
    group = world.group()
    given = np.full((world_size, 4), rank, np.float32)
    given.flags.writeable = False
    result = group.alltoall(np.zeros((world_size, 4), np.float32), given)
    assert (np.arange(world_size) == result.T).all()
    assert (group.reducescatter(np.zeros(4, np.float32), given) == sum(range(world_size))).all()
    with pytest.raises(col.ReadOnlyError, match="tensor_list"):
        group.allgather(given, np.zeros(4, np.float32))


def test_inputs_may_be_read_only(pool: RankPool, world: World) -> None:
    pool.run(world.size, read_only, world)


def disagree(rank: int, world_size: int, world: World) -> list[str]:
    """Ranks whose blocks differ in count say so as with lists, whoever brings which; nothing is written."""
    group, found = world.group(), []
    count = 3 + (rank == 1)
    for as_list in (False, True):
        whole, given = np.zeros((world_size, count)), np.ones((world_size, count))
        outputs = list(whole) if as_list and rank == 0 else whole
        for call in (
            lambda to=outputs, of=given: group.alltoall(to, of),
            lambda to=outputs, of=given: group.allgather(to, of[0]),
        ):
            with pytest.raises(col.MismatchError) as caught:
                call()
            found.append(str(caught.value))
            assert not whole.any()
    return found


def test_blocks_that_differ_between_ranks(pool: RankPool, transport: Transport) -> None:
    for messages in pool.run(3, disagree, World(3, *transport)):
        assert all("float64[3]" in message and "float64[4]" in message for message in messages)


def leave_it_alone(rank: int, world_size: int, world: World, library: str) -> None:
    """What autograd guards, or an immutable array, is treated as in a list."""
    group = world.group()
    stacks = Stacks(group, library, "float32", stacked(world_size, 5), False)
    targets = stacks.all()
    version = getattr(targets.given, "_version", None)
    result = group.allgather(targets.given, stacks.one(stacks.values(rank, 0)).tensor)
    assert as_numpy(result, "float32").tolist() == [
        float(value) for peer in range(world_size) for value in stacks.values(peer, 0)
    ]
    if version is not None:
        assert result._version > version


def test_the_frameworks_own_rules(pool: RankPool, world: World, libraries: tuple[str, ...]) -> None:
    for library in libraries:
        pool.run(world.size, leave_it_alone, world, library)
