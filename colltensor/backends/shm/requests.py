"""How a call is packed for the native library: 64-bit integers, a fixed head and then the views.

Its twin is native/src/request.h.
"""

from __future__ import annotations

import array
import struct
from collections.abc import Iterable
from typing import Final

from colltensor.operations import NATIVE
from colltensor.types import DType, ReduceOp
from colltensor.view import BufferView, JoinedView, row_major

Words = tuple[int, int, int]
"""A signature without its sequence number, as the library compares it."""

_NO_OP: Final = 255
_SEQUENCE_NBYTES: Final = 8
_WORDS: Final = struct.Struct("<qqq")
_CALL: Final = struct.Struct("<BBhBQQ")
_DETAIL: Final = 10
_VIEWS: Final = 18
_NO_SOURCE: Final = (-1, 0, 0, 0, 0, 0, 0)


def words(signature: bytes) -> Words:
    """Return the part of a call's signature that the library compares.

    That is all but the sequence number, which it counts itself.
    """
    first, second, third = _WORDS.unpack(signature[_SEQUENCE_NBYTES:].ljust(_WORDS.size, b"\0"))
    return first, second, third


def own_words(
    operation: int, dtype: DType | None, count: int, op: ReduceOp | None, root: int
) -> Words:
    """Return a signature for a call without an expected one, from what is known here."""
    leaves = 0 if dtype is None else dtype.code
    packed = _CALL.pack(100 + operation, _NO_OP if op is None else op, root, 1, count, leaves)
    return words(bytes(_SEQUENCE_NBYTES) + packed)


def collective(
    operation: int,
    shape: BufferView | None,
    op: ReduceOp | None,
    root: int,
    signature: Words,
    index: int,
    views: Iterable[BufferView],
) -> array.array[int]:
    """Pack a collective.

    Args:
        operation: Which.
        shape: A view of the call's count and dtype; None for a barrier.
        op: The reduce op, if any.
        root: The root's rank, or -1.
        signature: What all ranks must agree on.
        index: The number of this transfer within its call.
        views: All views in the order that the library expects for the operation.
    """
    code, item, count = (
        (0, 1, 0) if shape is None else (shape.dtype.code, shape.dtype.itemsize, shape.count)
    )
    number = _NO_OP if op is None else op
    fields = [operation, number, code, item, root, count, *signature, index, 0, *_NO_SOURCE]
    for view in views:
        _append(fields, view)
    return array.array("q", fields)


def transfer(
    source: BufferView | None,
    destination_rank: int,
    signature: Words,
    target: BufferView | None,
    source_rank: int,
    target_signature: Words,
    index: int,
    beside: bool = False,
) -> array.array[int]:
    """Pack a transfer to ``destination_rank``, one from ``source_rank``, or both; -1 for none.

    A view is None where nothing is moved, as of an empty tree. One of the two may be made
    ``beside`` other threads'.
    """
    item, count = (1, 0) if source is None else (source.dtype.itemsize, source.count)
    target_item, target_count = (1, 0) if target is None else (target.dtype.itemsize, target.count)
    fields = [
        NATIVE["transfer"],
        _NO_OP,
        0,
        item,
        destination_rank,
        count,
        *signature,
        index,
        int(beside),
        source_rank,
        target_item,
        target_count,
        *target_signature,
        index,
    ]

    for peer, view in ((destination_rank, source), (source_rank, target)):
        if view is not None:
            _append(fields, view)
        elif peer >= 0:
            # A transfer of nothing, such as an empty tree: the library reads a view of each
            # transfer.
            fields += (0, 0)
    return array.array("q", fields)


def rebase(request: array.array[int], views: Iterable[BufferView]) -> None:
    """Put new addresses of the views into a request that was packed with them.

    A view that was strided may be row-major now.
    """
    place = _VIEWS
    for view in views:
        if isinstance(view, JoinedView):
            place += 2
            for part in view.views:
                place = _rebase(request, place + 1, part)
        else:
            place = _rebase(request, place, view)


def _rebase(request: array.array[int], place: int, view: BufferView) -> int:
    """Do so with a view that is packed at ``place``; return the place behind it."""
    request[place] = view.pointer
    axes = request[place + 1]
    end = place + 2 + 2 * axes
    if axes and view.strides is None:
        request[end - axes : end] = array.array("q", row_major(view.shape))
    return end


def differing(request: array.array[int]) -> tuple[bool, bool]:
    """Return whether the send and the receive of a transfer that ended in a mismatch differ."""
    return bool(request[_DETAIL] & 1), bool(request[_DETAIL] & 2)


def _append(fields: list[int], view: BufferView) -> None:
    if isinstance(view, JoinedView):
        fields += (len(view.views), -1)
        for part in view.views:
            fields.append(part.count)
            _append(fields, part)
        return
    strides = view.strides
    if strides is None or not view.count:
        fields += (view.pointer, 0)
    else:
        fields += (view.pointer, len(strides), *view.shape, *strides)
