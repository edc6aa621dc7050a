"""How a buffer is cut into blocks and slices. Imports no framework."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from colltensor.types import DType
from colltensor.view import BufferView

BLOCK_NBYTES: Final = 2 << 20
"""Bytes of a slice of a block, which is what one rank sends to one other host at a time."""
_LINE: Final = 64


def flat(view: BufferView) -> BufferView:
    """Return a contiguous view as one of one axis that keeps it alive."""
    return view.slice(0, view.count)


def blocks(view: BufferView, slices: int, slice_nbytes: int = BLOCK_NBYTES) -> Iterator[BufferView]:
    """Divide a buffer into blocks whose counts are multiples of ``slices``, but for the last, which has the rest."""
    line = max(_LINE // view.dtype.itemsize, 1)
    step = max(slice_nbytes // view.dtype.itemsize // line, 1) * line * slices
    even = view.count - view.count % slices
    for start in range(0, even, step):
        yield view.slice(start, min(start + step, even))
    if even < view.count:
        yield view.slice(even, view.count)


def parts(block: BufferView, slices: int) -> list[BufferView]:
    """Divide a block into equal slices."""
    count = block.count // slices
    return [block.slice(index * count, (index + 1) * count) for index in range(slices)]


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
