"""broadcast, gathers, scatter, all-to-all, send, recv, sendrecv, barrier: every dtype in every library, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from oracle import DTYPES, Array, moved, numpy_dtype
from pool import RankPool
from samples import Layout, Sample, dense, library_for
from worlds import Report, Transport, World

SIZES = (7, 0, 1, 2049)
LARGE = 3_000_001


class Mover:
    """Makes a rank's samples for one case: dtype, layout, libraries."""

    def __init__(self, group: Any, libraries: tuple[str, ...], dtype: str, layout: Layout) -> None:
        library = library_for(libraries, group.rank, dtype, layout)
        assert library is not None
        self.group, self.rank, self.size = group, group.rank, group.world_size
        self._library, self._dtype, self._layout = library, dtype, layout

    def values(self, rank: int, salt: int = 0) -> Array:
        """The values that ``rank`` has to give; ``salt`` tells its tensors apart."""
        return moved(self._dtype, self._layout.count, rank, salt)

    def given(self, salt: int = 0) -> Sample:
        """A tensor with this rank's values."""
        return Sample(self._library, self._dtype, self._layout, self.values(self.rank, salt))

    def target(self) -> Sample:
        """A tensor to be overwritten."""
        blank = np.zeros(self._layout.count, numpy_dtype(self._dtype))
        return Sample(self._library, self._dtype, self._layout, blank)


def broadcast(mover: Mover, root: int) -> None:
    sample = mover.given()
    result = mover.group.broadcast(sample.tensor, root)
    if mover.rank == root:
        assert result is sample.tensor
        sample.check_untouched()
    else:
        sample.check_result(result, mover.values(root))


def allgather(mover: Mover, root: int) -> None:
    source, targets = mover.given(), [mover.target() for _ in range(mover.size)]
    tensors = [target.tensor for target in targets]
    assert mover.group.allgather(tensors, source.tensor) is tensors
    for rank, target in enumerate(targets):
        target.check_result(tensors[rank], mover.values(rank))
    source.check_untouched()


def gather(mover: Mover, root: int) -> None:
    source, targets = mover.given(), [mover.target() for _ in range(mover.size)]
    if mover.rank == root:
        tensors = [target.tensor for target in targets]
        assert mover.group.gather(tensors, source.tensor, root) is tensors
        for rank, target in enumerate(targets):
            target.check_result(tensors[rank], mover.values(rank))
    else:
        assert mover.group.gather(None, source.tensor, root) is None
    source.check_untouched()


def scatter(mover: Mover, root: int) -> None:
    target, sources = mover.target(), [mover.given(salt) for salt in range(mover.size)]
    tensors = [source.tensor for source in sources] if mover.rank == root else None
    target.check_result(
        mover.group.scatter(target.tensor, tensors, root), mover.values(root, mover.rank)
    )
    for source in sources:
        source.check_untouched()


def alltoall(mover: Mover, root: int) -> None:
    targets, sources = (
        [mover.target() for _ in range(mover.size)],
        [mover.given(salt) for salt in range(mover.size)],
    )
    tensors = [target.tensor for target in targets]
    assert mover.group.alltoall(tensors, [source.tensor for source in sources]) is tensors
    for rank, target in enumerate(targets):
        target.check_result(tensors[rank], mover.values(rank, mover.rank))
    for source in sources:
        source.check_untouched()


def send_and_recv(mover: Mover, root: int) -> None:
    """From the root to the next rank; the others have no part in it."""
    peer = (root + 1) % mover.size
    if peer == root:
        return
    sample = mover.given()
    if mover.rank == root:
        assert mover.group.send(sample.tensor, peer) is sample.tensor
        sample.check_untouched()
    elif mover.rank == peer:
        sample.check_result(mover.group.recv(sample.tensor, root), mover.values(root))


def sendrecv(mover: Mover, root: int) -> None:
    """A shift around the ring."""
    if mover.size == 1:
        return
    source, target = mover.given(), mover.target()
    before, after = (mover.rank - 1) % mover.size, (mover.rank + 1) % mover.size
    target.check_result(
        mover.group.sendrecv(source.tensor, after, target.tensor, before), mover.values(before)
    )
    source.check_untouched()


OPERATIONS: tuple[Callable[[Mover, int], None], ...] = (
    broadcast,
    allgather,
    gather,
    scatter,
    alltoall,
    send_and_recv,
    sendrecv,
)


def move_all(
    rank: int, world_size: int, world: World, libraries: tuple[str, ...], skip: int
) -> dict[str, str]:
    group = world.group()
    report = Report(group)
    number = 0
    for dtype in DTYPES:
        for operation in OPERATIONS:
            number += 1
            layout = dense(SIZES[(number + skip) % len(SIZES)])
            if library_for(libraries, rank, dtype, layout) is None:
                continue
            root = number % world_size
            with report.case(operation.__name__, dtype, layout.name, "root", root):
                operation(Mover(group, libraries, dtype, layout), root)
    return report.done()


def test_every_move_of_every_dtype(pool: RankPool, world: World, arrays: tuple[str, ...]) -> None:
    pool.run(world.size, move_all, world, arrays, 0)


@pytest.mark.parametrize("skip", [1, 2, 3])
def test_every_move_of_every_dtype_at_other_sizes(
    pool: RankPool, transport: Transport, skip: int, libraries: tuple[str, ...]
) -> None:
    pool.run(3, move_all, World(3, *transport), libraries, skip)


def move_large(rank: int, world_size: int, world: World, libraries: tuple[str, ...]) -> None:
    group = world.group()
    report = Report(group)
    for number, operation in enumerate(OPERATIONS):
        with report.case(operation.__name__):
            operation(Mover(group, libraries, "float32", dense(LARGE)), number % world_size)
    report.done()


def test_moves_of_many_megabytes(
    pool: RankPool, transport: Transport, libraries: tuple[str, ...]
) -> None:
    pool.run(2, move_large, World(2, *transport), libraries)


def move_from_every_root(rank: int, world_size: int, world: World) -> None:
    group = world.group()
    report = Report(group)
    for root in range(world_size):
        for operation in OPERATIONS:
            with report.case(operation.__name__, "root", root):
                operation(Mover(group, ("numpy",), "uint16", dense(5)), root)
    report.done()


def test_every_rank_is_the_root_once(pool: RankPool, world: World) -> None:
    pool.run(world.size, move_from_every_root, world)


def gather_in_place(rank: int, world_size: int, world: World) -> None:
    group = world.group()
    for dst in (None, world_size - 1):
        tensors = [np.full(3, rank * 10 + entry, np.int32) for entry in range(world_size)]
        own = tensors[rank]
        if dst is None:
            group.allgather(tensors, own)
        else:
            group.gather(tensors if rank == dst else None, own, dst)
        assert tensors[rank] is own
        if dst in (None, rank):
            assert [int(tensor[2]) for tensor in tensors] == [
                peer * 11 for peer in range(world_size)
            ]


def test_the_own_entry_may_be_the_tensor_itself(pool: RankPool, world: World) -> None:
    pool.run(world.size, gather_in_place, world)


def gather_into_tuple(rank: int, world_size: int, world: World, library: str) -> None:
    mover = Mover(world.group(), (library,), "float32", dense(4))
    targets = [mover.target() for _ in range(world_size)]
    given = tuple(target.tensor for target in targets)
    result = mover.group.allgather(given, mover.given().tensor)
    assert isinstance(result, tuple)
    for peer, target in enumerate(targets):
        target.check_result(result[peer], mover.values(peer))


def test_a_tuple_comes_back_as_a_tuple(
    pool: RankPool, ranks: World, libraries: tuple[str, ...]
) -> None:
    for library in libraries:
        pool.run(ranks.size, gather_into_tuple, ranks, library)


def meet_at_barriers(rank: int, world_size: int, world: World) -> list[int]:
    group = world.group()
    for _ in range(5):
        assert group.barrier() is None
    work = group.barrier(async_op=True)
    assert work.result() is None
    return group.allgather_object(rank)


def test_barrier(pool: RankPool, world: World) -> None:
    assert pool.run(world.size, meet_at_barriers, world) == [list(range(world.size))] * world.size
