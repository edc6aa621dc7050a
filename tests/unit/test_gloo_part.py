"""The transport between some of a group's ranks, over a provider of threads and queues."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from colltensor.backends.arithmetic import ANY_MEMORY
from colltensor.backends.gloo.part import GlooPart
from colltensor.backends.gloo.provider import Transfer
from colltensor.backends.hierarchical import shards
from colltensor.types import DTYPES, ReduceOp
from colltensor.view import BufferView

MEMBERS = (7, 2, 11, 3, 5, 8, 13, 1, 4)


class Threads:
    """Moves bytes between threads; one object for each rank, with the queues of all.

    Attributes:
        sent: The bytes that this rank has sent.
    """

    def __init__(self, rank: int, queues: dict[tuple[int, int], SimpleQueue[bytes]]) -> None:
        self.rank, self.sent, self._queues = rank, 0, queues

    def reductions(self, members: Sequence[int]) -> None:
        """Return None: shards compose theirs."""

    def exchange(
        self, receives: Sequence[Transfer], sends: Sequence[Transfer], deadline: float
    ) -> None:
        for peer, pointer, nbytes in sends:
            self.sent += nbytes
            self._queues[self.rank, peer].put(
                bytes(memoryview(ANY_MEMORY.from_address(pointer))[:nbytes])
            )
        for peer, pointer, nbytes in receives:
            data = self._queues[peer, self.rank].get(timeout=max(0.0, deadline - time.monotonic()))
            assert len(data) == nbytes
            memoryview(ANY_MEMORY.from_address(pointer)).cast("B")[:nbytes] = data


def run(size: int, call: Callable[[int, GlooPart, float], Any]) -> tuple[list[Any], list[int]]:
    """Call on each member in a thread; return the results and what each has sent."""
    queues: dict[tuple[int, int], SimpleQueue[bytes]] = defaultdict(SimpleQueue)
    members = MEMBERS[:size]
    providers: list[Any] = [Threads(rank, queues) for rank in members]
    results: list[Any] = [None] * size
    deadline = time.monotonic() + 10

    def work(position: int) -> None:
        part = GlooPart(providers[position], members, members[position], [])
        results[position] = call(position, part, deadline)

    threads = [threading.Thread(target=work, args=(position,)) for position in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(queue.empty() for queue in queues.values())
    return results, [provider.sent for provider in providers]


def seen(array: np.ndarray[Any, Any]) -> BufferView:
    return BufferView.from_address(
        array.ctypes.data, array.shape, DTYPES[array.dtype.name], owner=array
    )


@pytest.mark.parametrize("size", range(1, len(MEMBERS) + 1))
def test_a_broadcast_reaches_every_member_once(size: int) -> None:
    for root in range(size):

        def call(position: int, part: GlooPart, deadline: float, root: int = root) -> list[int]:
            array = np.full(5, position, np.int16)
            part.broadcast(seen(array), root, deadline)
            return array.tolist()

        results, sent = run(size, call)
        assert results == [[root] * 5] * size
        assert sum(sent) == 10 * (size - 1)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("count", [1, 1000, 200_000])
@pytest.mark.parametrize(("op", "function"), [(ReduceOp.SUM, np.add), (ReduceOp.MAX, np.maximum)])
def test_reductions_in_the_order_of_the_members(
    size: int, count: int, op: ReduceOp, function: Any
) -> None:
    given = [
        np.sin(np.arange(count) * 1.7 + position).astype(np.float32) for position in range(size)
    ]
    expected = given[0]
    for other in given[1:]:
        expected = function(expected, other)

    def allreduce(position: int, part: GlooPart, deadline: float) -> bytes:
        array = given[position].copy()
        part.allreduce(seen(array), op, deadline)
        return array.tobytes()

    def reduce(position: int, part: GlooPart, deadline: float) -> bytes:
        array = given[position].copy()
        part.reduce(seen(array), size - 1, op, deadline)
        return array.tobytes()

    results, sent = run(size, allreduce)
    assert results == [expected.tobytes()] * size
    if size == 2 and op is ReduceOp.SUM:
        assert sent == [4 * count] * 2
    results, _ = run(size, reduce)
    assert results == [*(array.tobytes() for array in given[:-1]), expected.tobytes()]


@pytest.mark.parametrize("slices", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("name", ["uint8", "float32", "complex128"])
@pytest.mark.parametrize("count", [1, 6, 63, 64, 4096, 70_001, 5_000_001])
def test_blocks_cover_a_buffer_in_order(slices: int, name: str, count: int) -> None:
    view = BufferView.from_address(1 << 20, (count,), DTYPES[name], owner=None)
    end = view.pointer
    pieces = list(shards.blocks(view, slices))
    for number, piece in enumerate(pieces):
        assert piece.pointer == end
        end += piece.nbytes
        assert piece.nbytes <= min(slices * shards.SHARD_NBYTES, shards.BLOCK_NBYTES + slices * 64)
        if number < len(pieces) - 1 or count % slices == 0:
            assert piece.count % slices == 0
            assert [part.count for part in shards.shards(piece, slices)] == [
                piece.count // slices
            ] * slices
    assert end == view.pointer + view.nbytes
    assert sum(piece.count < slices for piece in pieces) <= 1
