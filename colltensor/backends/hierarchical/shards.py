"""How a buffer is cut into blocks and shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from colltensor.types import DType
from colltensor.view import BufferView

SHARD_NBYTES: Final = 4 << 20
"""Bytes of a shard of a block, as they are summed: what one rank sends to one other host at a time.

Measured with 2 x 2 ranks on one machine of 2 cores, 64 MiB of float32, two rounds. It took 172 to
165 ms with shards of 256 KiB, 113 to 115 with 1 MiB and 78 to 94 with 2 MiB. It took 79 to 85 with
4 MiB, and 73 to 81 with 16 MiB, which leaves nothing to overlap in smaller buffers.
"""
BLOCK_NBYTES: Final = 16 << 20
"""Bytes of a whole block at most.

What is widened to float32 needs two such pieces of memory, and no more.
"""
_LINE: Final = 64


def flat(view: BufferView) -> BufferView:
    """Return a contiguous view as one of one axis that keeps it alive."""
    return view.slice(0, view.count)


def blocks(view: BufferView, shards: int, itemsize: int | None = None) -> Iterator[BufferView]:
    """Divide a buffer into blocks whose counts are multiples of ``shards``.

    The last one has the rest.

    Args:
        view: The buffer.
        shards: The number of shards of a block.
        itemsize: Bytes of an element as it travels, where that is not what it has in the buffer.
    """
    line = max(_LINE // view.dtype.itemsize, 1)
    nbytes = min(SHARD_NBYTES, BLOCK_NBYTES // shards)
    step = max(nbytes // (itemsize or view.dtype.itemsize) // line, 1) * line * shards
    even = view.count - view.count % shards
    for start in range(0, even, step):
        yield view.slice(start, min(start + step, even))
    if even < view.count:
        yield view.slice(even, view.count)


def shards(block: BufferView, shards: int) -> list[BufferView]:
    """Divide a block into equal shards."""
    count = block.count // shards
    return [block.slice(index * count, (index + 1) * count) for index in range(shards)]


class Scratch:
    """Memory that is kept from call to call, several pieces of it by number."""

    def __init__(self) -> None:
        self._pieces: dict[int, BufferView] = {}

    def take(self, number: int, count: int, dtype: DType) -> BufferView:
        """Return ``count`` elements of piece ``number``; what they hold is not defined."""
        nbytes = count * dtype.itemsize
        piece = self._pieces.get(number)
        if piece is None or piece.count < nbytes:
            piece = self._pieces[number] = BufferView.from_buffer(bytearray(nbytes))
        return piece.slice(0, nbytes).cast(dtype)
