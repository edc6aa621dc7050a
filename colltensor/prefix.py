"""The prefix reduction over any backend.

The ranks' blocks are gathered, and each rank combines those up to its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from colltensor.adapters import host_memory
from colltensor.backends.arithmetic import combine
from colltensor.backends.base import Backend
from colltensor.types import ReduceOp
from colltensor.view import BufferView

_GATHERED_NBYTES: Final = 8 << 20
"""How many bytes all ranks' blocks take together.

A buffer is worked on in such blocks, so that the memory stays bounded.
"""


def scan(
    backend: Backend,
    rank: int,
    world_size: int,
    buffers: Sequence[BufferView],
    op: ReduceOp,
    deadline: float,
) -> None:
    """Write to each buffer the combination of those of ranks 0 to ``rank``, in their order.

    Args:
        backend: Moves the blocks.
        rank: This rank.
        world_size: The number of ranks.
        buffers: Host memory, written in place.
        op: How elements are combined.
        deadline: When to give up.
    """
    memory = host_memory()
    # A backend that agrees by itself does it now, and moves the views of immutable tensors to their
    # results.
    nothing = memory.allocate(1).slice(0, 0)
    backend.allgather([nothing] * world_size, nothing, deadline)

    for buffer in buffers:
        if not buffer.count:
            continue

        dense = buffer
        if buffer.strides is not None:
            dense = memory.allocate(buffer.nbytes).cast(buffer.dtype)
            memory.copy(dense, buffer)

        step = max(1, _GATHERED_NBYTES // (world_size * buffer.dtype.itemsize))
        for start in range(0, buffer.count, step):
            block = dense.slice(start, min(start + step, buffer.count))

            gathered = memory.allocate(block.nbytes * world_size).cast(block.dtype)
            outputs = [
                gathered.slice(index * block.count, (index + 1) * block.count)
                for index in range(world_size)
            ]
            backend.allgather(outputs, block, deadline)
            taken = [output.pointer for output in outputs[: rank + 1]]
            combine(block.pointer, taken, block.count, block.dtype, op)

        if dense is not buffer:
            memory.copy(buffer, dense)
