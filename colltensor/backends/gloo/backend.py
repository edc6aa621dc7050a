"""GlooBackend: every collective over a Gloo provider.

A collective is composed where Gloo has none or a wrong one.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Concatenate, Final, ParamSpec

from colltensor.backends.arithmetic import divide, float_state
from colltensor.backends.base import BackendBase, ControlPlane
from colltensor.backends.gloo.composed import Composer, copy
from colltensor.backends.gloo.part import GlooPart
from colltensor.backends.gloo.provider import Provider, Transfer, never_free
from colltensor.operations import REDUCTIONS
from colltensor.types import DType, ReduceOp
from colltensor.view import BufferView

DIRECT_NBYTES: Final = 256 << 10
"""Up to this size of all that a rank sends, an allreduce sends everything to everyone.

Measured with torch on one host of 2 cores. For 1 KiB and 2 ranks it took 0.14 ms against 0.27 of
Gloo's ring, for 4 ranks 0.37 against 1.0.
"""

PIGGYBACKED_NBYTES: Final = 64 << 10
"""Up to this size of all ranks' elements, native allreduces travel with the agreement.

Measured on one host of 2 cores. For 32 KiB and 2 ranks that took 0.06 ms in place of 0.14. For 16
KiB and 4 ranks it took 0.36 in place of 0.48. For twice as much it took longer.
"""

_EMULATED: Final = frozenset({"float16", "bfloat16"})
_P = ParamSpec("_P")


def _keeps_buffers(
    method: Callable[Concatenate[GlooBackend, _P], None],
) -> Callable[Concatenate[GlooBackend, _P], None]:
    """Keep a failed call's arguments until ``close``.

    Gloo may still read and write their memory.
    """

    @functools.wraps(method)
    def call(backend: GlooBackend, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            method(backend, *args, **kwargs)
        except BaseException:
            backend.kept.append((args, kwargs))
            raise

    return call


class GlooBackend(BackendBase):
    """Collectives of host memory between any number of hosts.

    Every rank chooses the same way through: by operation, dtype, op, size and provider, on which
    all agree. Zero bytes stay off the transport, and so does a group of one rank.

    Attributes:
        kept: The arguments of calls that failed.
        details: The provider, and why it is this one, in words.
        crosses: Whether the provider lets transfers run at the same time.
    """

    name = "gloo"

    def __init__(self, provider: Provider, control: ControlPlane, details: str = "") -> None:
        self.kept: list[object] = []
        self.details = details
        self.crosses = provider.crosses
        self._provider = provider
        self._control = control
        self._rank = control.rank
        self._size = control.world_size
        self._composer = Composer(provider, self._rank, self._size)
        self._own = provider.reductions(range(self._size))

    def stages_dtype(self, operation: str, dtype: DType, op: ReduceOp | None) -> bool:
        """Return True for reductions of 16-bit floats.

        numpy widens those to float32 and rounds back.
        """
        return self._own is None and dtype.name in _EMULATED and operation in REDUCTIONS

    def piggybacks(self, buffers: Sequence[BufferView], op: ReduceOp) -> bool:
        """Return whether an allreduce of the buffers travels with the ranks' agreement."""
        if self._own is None:
            return False
        nbytes = 0
        for buffer in buffers:
            nbytes += buffer.count * buffer.dtype.itemsize
        return 0 < nbytes * self._size <= PIGGYBACKED_NBYTES

    def pack(self, buffers: Sequence[BufferView]) -> bytes:
        """Return the buffers' bytes, one after the other."""
        contents = []
        for buffer in buffers:
            if buffer.count:
                kind = ctypes.c_char * (buffer.count * buffer.dtype.itemsize)
                contents.append(kind.from_address(buffer.pointer).raw)
        return contents[0] if len(contents) == 1 else b"".join(contents)

    def unpack(
        self, buffers: Sequence[BufferView], op: ReduceOp, contributions: Sequence[bytes]
    ) -> None:
        """Combine into the buffers what all ranks packed, in their order."""
        assert self._own is not None
        start = 0
        for buffer in buffers:
            end = start + buffer.count * buffer.dtype.itemsize
            if len(buffers) == 1:
                self._own.combine(buffer.pointer, contributions, buffer.dtype, op)
            elif buffer.count:
                parts = [contribution[start:end] for contribution in contributions]
                self._own.combine(buffer.pointer, parts, buffer.dtype, op)
            start = end

    @_keeps_buffers
    def allreduce(self, buffers: Sequence[BufferView], op: ReduceOp, deadline: float) -> None:
        """Combine in place on every rank, each buffer on its own."""
        for buffer in buffers:
            if buffer.count and self._size > 1:
                self._allreduce(buffer, op, deadline)

    def _allreduce(self, buffer: BufferView, op: ReduceOp, deadline: float) -> None:
        dtype, count = buffer.dtype, buffer.count
        if self._own is not None:
            self._own.allreduce(buffer.pointer, count, dtype, op, deadline)
            return

        nbytes = count * dtype.itemsize
        # MIN and MAX of 0.0 and -0.0 depend on the processor and the alignment: one rank must
        # decide.
        decided = dtype.kind == "f" and (op is ReduceOp.MIN or op is ReduceOp.MAX)
        if nbytes * (self._size - 1) <= DIRECT_NBYTES and not decided:
            self._composer.allreduce_direct(buffer.pointer, count, dtype, op, deadline)
            return

        pair = self._provider.natives.get((dtype, op))
        if pair is None:
            self._composer.allreduce(buffer.pointer, count, dtype, op, deadline)
            return

        with float_state():  # pygloo adds in this thread
            self._provider.allreduce(buffer.pointer, nbytes, pair, deadline)
        if op is ReduceOp.AVERAGE:
            divide(buffer.pointer, count, dtype, self._size)

    @_keeps_buffers
    def reduce(
        self, buffers: Sequence[BufferView], root: int, op: ReduceOp, deadline: float
    ) -> None:
        """Combine in place on ``root``; elsewhere the buffers are only read."""
        for buffer in buffers:
            if buffer.count and self._size > 1:
                (self._own or self._composer).reduce(
                    buffer.pointer, buffer.count, buffer.dtype, root, op, deadline
                )

    @_keeps_buffers
    def reducescatter(
        self, target: BufferView, sources: Sequence[BufferView], op: ReduceOp, deadline: float
    ) -> None:
        """Combine all ranks' ``sources[rank]`` into ``target``."""
        if self._size == 1:
            copy(target.pointer, sources[0].pointer, target.nbytes)
        elif target.count:
            pointers = [source.pointer for source in sources]
            reductions = self._own or self._composer
            reductions.reducescatter(
                target.pointer, pointers, target.count, target.dtype, op, deadline
            )

    @_keeps_buffers
    def broadcast(self, buffers: Sequence[BufferView], root: int, deadline: float) -> None:
        """Overwrite with ``root``'s bytes on the other ranks, each buffer on its own."""
        for buffer in buffers:
            if buffer.count and self._size > 1:
                self._provider.broadcast(buffer.pointer, buffer.nbytes, root, deadline)

    @_keeps_buffers
    def allgather(self, outputs: Sequence[BufferView], source: BufferView, deadline: float) -> None:
        """Send ``source`` to every rank; receive straight into ``outputs``."""
        self._move(
            list(enumerate(outputs)), [(rank, source) for rank in range(self._size)], deadline
        )

    @_keeps_buffers
    def gather(
        self, outputs: Sequence[BufferView] | None, source: BufferView, root: int, deadline: float
    ) -> None:
        """Send ``source`` to ``root``, which receives straight into ``outputs``."""
        self._move(list(enumerate(outputs or ())), [(root, source)], deadline)

    @_keeps_buffers
    def scatter(
        self, target: BufferView, sources: Sequence[BufferView] | None, root: int, deadline: float
    ) -> None:
        """Send ``root``'s ``sources`` to their ranks."""
        self._move([(root, target)], list(enumerate(sources or ())), deadline)

    @_keeps_buffers
    def alltoall(
        self, outputs: Sequence[BufferView], sources: Sequence[BufferView], deadline: float
    ) -> None:
        """Send every rank its source; receive straight into ``outputs``."""
        self._move(list(enumerate(outputs)), list(enumerate(sources)), deadline)

    @_keeps_buffers
    def send(self, buffers: Sequence[BufferView], peer: int, deadline: float) -> None:
        """Send each buffer to ``peer``, one after the other."""
        for buffer in buffers:
            self._move([], [(peer, buffer)], deadline)

    @_keeps_buffers
    def recv(self, buffers: Sequence[BufferView], peer: int, deadline: float) -> None:
        """Receive each buffer from ``peer``, one after the other."""
        for buffer in buffers:
            self._move([(peer, buffer)], [], deadline)

    @_keeps_buffers
    def sendrecv(
        self, source: BufferView, dst: int, target: BufferView, src: int, deadline: float
    ) -> None:
        """Send to ``dst`` and receive from ``src`` at once.

        Both may be one rank, this one included.
        """
        self._move([(src, target)], [(dst, source)], deadline)

    @_keeps_buffers
    def exchange(
        self,
        targets: list[tuple[int, BufferView]],
        sources: list[tuple[int, BufferView]],
        deadline: float,
    ) -> None:
        """Receive into ``targets`` and send ``sources``, all at once.

        Each peer has at most one of each.
        """
        self._move(targets, sources, deadline)

    def part(self, members: Sequence[int]) -> GlooPart:
        """Return the collectives of some ranks, this one among them, over these connections.

        Opens nothing. Its calls and this backend's take turns; the caller sees to that.
        """
        return GlooPart(self._provider, members, self._rank, self.kept)

    def barrier(self, deadline: float) -> None:
        """Wait for all ranks on the control plane; Gloo has no part in it."""
        self._control.allgather(b"", deadline)

    def close(self) -> None:
        """Close Gloo's connections and end operations in flight.

        Let go of failed calls' memory then.
        """
        if not self._provider.close():
            never_free(self.kept, self._composer)
        self.kept = []

    def _move(
        self,
        targets: list[tuple[int, BufferView]],
        sources: list[tuple[int, BufferView]],
        deadline: float,
    ) -> None:
        """Move bytes to and from other ranks; what this rank has for itself is copied."""
        own = self._rank
        mine = [view for peer, view in targets if peer == own]
        if mine:
            given = next(view for peer, view in sources if peer == own)
            copy(mine[0].pointer, given.pointer, given.nbytes)

        receives = [
            Transfer(peer, view.pointer, view.nbytes)
            for peer, view in targets
            if peer != own and view.count
        ]
        sends = [
            Transfer(peer, view.pointer, view.nbytes)
            for peer, view in sources
            if peer != own and view.count
        ]

        if receives or sends:
            self._provider.exchange(receives, sends, deadline)
