"""Reductions composed of an exchange of bytes between ranks and arithmetic on the host.

They replace Gloo's own allreduce where it lacks a reduction or does it wrongly. They also do reduce
and reduce-scatter: Gloo's reduce overwrites the other ranks' inputs, and torch's reduce-scatter
copies all of them. For small buffers one exchange takes half the time of Gloo's ring. Elements are
combined in rank order in one place, so all ranks get the same bits.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Final

import numpy as np

from colltensor.backends.arithmetic import combine
from colltensor.backends.gloo.provider import Provider, Transfer
from colltensor.types import DType, ReduceOp

BLOCK_NBYTES: Final = 8 << 20
"""A buffer is worked on in blocks of this size, so that memory for arriving data stays bounded."""
WHOLE_NBYTES: Final = 64 << 10
"""A reduce sends blocks up to this size to its root as a whole, in one step instead of two."""
_LINE: Final = 64
"""Parts of a block begin at multiples of a cache line."""


class Composer:
    """Composed reductions of one rank, over ``provider.exchange``.

    Addresses are of contiguous host memory.
    """

    def __init__(
        self,
        provider: Provider,
        rank: int,
        world_size: int,
        *,
        block_nbytes: int = BLOCK_NBYTES,
        whole_nbytes: int = WHOLE_NBYTES,
    ) -> None:
        self._provider = provider
        self._rank = rank
        self._size = world_size
        self._block_nbytes = max(block_nbytes, world_size * _LINE)
        self._whole_nbytes = whole_nbytes
        self._peers = [peer for peer in range(world_size) if peer != rank]
        self._memory = np.empty(0, np.uint8)

    def allreduce_direct(
        self, pointer: int, count: int, dtype: DType, op: ReduceOp, deadline: float
    ) -> None:
        """Send everything to everyone and combine it everywhere: one step, for small buffers."""
        nbytes = count * dtype.itemsize
        inputs = self._inputs(pointer, nbytes)
        self._provider.exchange(
            [Transfer(peer, inputs[peer], nbytes) for peer in self._peers],
            [Transfer(peer, pointer, nbytes) for peer in self._peers],
            deadline,
        )
        combine(pointer, inputs, count, dtype, op)

    def allreduce(
        self, pointer: int, count: int, dtype: DType, op: ReduceOp, deadline: float
    ) -> None:
        """Combine in place: each rank combines its part of a block and sends it to everyone."""
        for block, length in self._blocks(pointer, count, dtype, self._block_nbytes):
            parts = self._parts(block, length, dtype)
            own, nbytes = parts[self._rank]
            inputs = self._collect(parts, deadline)
            if nbytes:
                combine(own, inputs, nbytes // dtype.itemsize, dtype, op)
            self._exchange(
                [Transfer(peer, *parts[peer]) for peer in self._peers],
                [Transfer(peer, own, nbytes) for peer in self._peers],
                deadline,
            )

    def reduce(
        self, pointer: int, count: int, dtype: DType, root: int, op: ReduceOp, deadline: float
    ) -> None:
        """Combine in place on ``root``; on other ranks the memory is only read."""
        for block, length in self._blocks(pointer, count, dtype, self._block_nbytes):
            if self._size == 2 or length * dtype.itemsize <= self._whole_nbytes:
                parts = [
                    (block, length * dtype.itemsize if rank == root else 0)
                    for rank in range(self._size)
                ]
            else:
                parts = self._parts(block, length, dtype)

            own, nbytes = parts[self._rank]
            inputs = self._collect(parts, deadline)

            if self._rank == root:
                if nbytes:
                    combine(own, inputs, nbytes // dtype.itemsize, dtype, op)
                self._exchange([Transfer(peer, *parts[peer]) for peer in self._peers], [], deadline)
            elif nbytes:
                result = inputs[root]
                combine(result, inputs, nbytes // dtype.itemsize, dtype, op)
                self._exchange([], [Transfer(root, result, nbytes)], deadline)

    def reducescatter(
        self,
        target: int,
        sources: Sequence[int],
        count: int,
        dtype: DType,
        op: ReduceOp,
        deadline: float,
    ) -> None:
        """Combine all ranks' ``sources[rank]`` into ``target``; each of ``count`` elements."""
        starts = self._blocks(0, count, dtype, self._block_nbytes // self._size)
        for start, length in starts:
            nbytes = length * dtype.itemsize
            inputs = self._inputs(sources[self._rank] + start, nbytes)
            self._provider.exchange(
                [Transfer(peer, inputs[peer], nbytes) for peer in self._peers],
                [Transfer(peer, sources[peer] + start, nbytes) for peer in self._peers],
                deadline,
            )
            combine(target + start, inputs, length, dtype, op)

    def _collect(self, parts: Sequence[tuple[int, int]], deadline: float) -> list[int]:
        """Send every other rank its part of this rank's block.

        Return where all ranks' own part lies.
        """
        own, nbytes = parts[self._rank]
        inputs = self._inputs(own, nbytes)
        self._exchange(
            [Transfer(peer, inputs[peer], nbytes) for peer in self._peers],
            [Transfer(peer, *parts[peer]) for peer in self._peers],
            deadline,
        )
        return inputs

    def _exchange(
        self, receives: Sequence[Transfer], sends: Sequence[Transfer], deadline: float
    ) -> None:
        receives, sends = (
            [item for item in receives if item.nbytes],
            [item for item in sends if item.nbytes],
        )
        if receives or sends:
            self._provider.exchange(receives, sends, deadline)

    def _inputs(self, own: int, nbytes: int) -> list[int]:
        """Return an address of ``nbytes`` for each rank, in rank order.

        It is ``own`` for this rank and scratch memory for others.
        """
        step = -(-nbytes // _LINE) * _LINE
        if len(self._memory) < len(self._peers) * step + _LINE:
            self._memory = np.empty(len(self._peers) * step + _LINE, np.uint8)
        base = -(-self._memory.ctypes.data // _LINE) * _LINE
        places = itertools.count(base, step)
        return [own if rank == self._rank else next(places) for rank in range(self._size)]

    def _parts(self, block: int, count: int, dtype: DType) -> list[tuple[int, int]]:
        """Divide a block among the ranks; return each part's address and bytes.

        The last ones may be empty.
        """
        nbytes = count * dtype.itemsize
        step = -(-nbytes // (self._size * _LINE)) * _LINE
        bounds = [min(rank * step, nbytes) for rank in range(self._size + 1)]
        return [(block + start, stop - start) for start, stop in itertools.pairwise(bounds)]

    def _blocks(
        self, pointer: int, count: int, dtype: DType, block_nbytes: int
    ) -> list[tuple[int, int]]:
        """Divide a buffer into blocks; return each one's address and number of elements."""
        step = max(block_nbytes // dtype.itemsize, 1)
        return [
            (pointer + start * dtype.itemsize, min(step, count - start))
            for start in range(0, count, step)
        ]


def copy(target: int, source: int, nbytes: int) -> None:
    """Copy host memory that does not overlap; nothing where both addresses are one."""
    if target != source and nbytes:
        ctypes.memmove(target, source, nbytes)
