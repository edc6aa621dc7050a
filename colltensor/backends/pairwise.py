"""Every collective through sends and receives alone, for backends that bring nothing faster.

Roots deal with one rank after another. Elements are combined in rank order and in one place, so
that all ranks get the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from colltensor.types import ReduceOp
from colltensor.view import BufferView


class PairwiseCollectives:
    """The collectives of contiguous host memory, made of a backend's ``send`` and ``recv``.

    All ranks make their transfers in one order, so a ``send`` may wait for its ``recv``.

    Attributes:
        control: The group's ``ControlPlane``, which knows the rank and the number of ranks.
    """

    control: Any

    if TYPE_CHECKING:

        def send(self, buffers: Sequence[BufferView], peer: int, deadline: float) -> None:
            """Send to ``peer``, which calls ``recv``."""

        def recv(self, buffers: Sequence[BufferView], peer: int, deadline: float) -> None:
            """Receive from ``peer``, which calls ``send``."""

    def allreduce(self, buffers: Sequence[BufferView], op: ReduceOp, deadline: float) -> None:
        """Combine on rank 0, whose result all get."""
        self.reduce(buffers, 0, op, deadline)
        self.broadcast(buffers, 0, deadline)

    def reduce(
        self, buffers: Sequence[BufferView], root: int, op: ReduceOp, deadline: float
    ) -> None:
        """Combine in place on ``root``, which receives one buffer of all ranks at a time."""
        rank = self.control.rank
        if rank != root:
            self.send(buffers, root, deadline)
            return
        for view in buffers:
            parts = [view if peer == rank else _like(view) for peer in self._ranks()]
            for peer in self._ranks():
                if peer != rank:
                    self.recv([parts[peer]], peer, deadline)
            _combine(view, parts, op)

    def broadcast(self, buffers: Sequence[BufferView], root: int, deadline: float) -> None:
        """Send ``root``'s contents to each of the other ranks."""
        if self.control.rank != root:
            self.recv(buffers, root, deadline)
            return
        for peer in self._ranks():
            if peer != root:
                self.send(buffers, peer, deadline)

    def allgather(self, outputs: Sequence[BufferView], source: BufferView, deadline: float) -> None:
        """Send ``source`` to all ranks, and receive theirs."""
        self.alltoall(outputs, [source] * self.control.world_size, deadline)

    def gather(
        self, outputs: Sequence[BufferView] | None, source: BufferView, root: int, deadline: float
    ) -> None:
        """Send ``source`` to ``root``."""
        self._exchange([(root, source)], list(enumerate(outputs or ())), deadline)

    def scatter(
        self, target: BufferView, sources: Sequence[BufferView] | None, root: int, deadline: float
    ) -> None:
        """Receive ``target`` from ``root``."""
        self._exchange(list(enumerate(sources or ())), [(root, target)], deadline)

    def reducescatter(
        self, target: BufferView, sources: Sequence[BufferView], op: ReduceOp, deadline: float
    ) -> None:
        """Receive this rank's part of all ranks, and combine it here."""
        parts = [_like(target) for _ in sources]
        self.alltoall(parts, sources, deadline)
        _combine(target, parts, op)

    def alltoall(
        self, outputs: Sequence[BufferView], sources: Sequence[BufferView], deadline: float
    ) -> None:
        """Send ``sources[r]`` to rank r, and receive ``outputs[r]`` from it."""
        self._exchange(list(enumerate(sources)), list(enumerate(outputs)), deadline)

    def sendrecv(
        self, source: BufferView, dst: int, target: BufferView, src: int, deadline: float
    ) -> None:
        """Send and receive in the order that all ranks keep."""
        self._exchange([(dst, source)], [(src, target)], deadline)

    def _ranks(self) -> range:
        return range(self.control.world_size)

    def _exchange(
        self,
        outgoing: Sequence[tuple[int, BufferView]],
        incoming: Sequence[tuple[int, BufferView]],
        deadline: float,
    ) -> None:
        """Make transfers to and from ranks, which may be this one, one after another.

        They are ordered by the distance between the ranks, then by the sender. Every rank keeps
        that order, so the first transfer that is left has both of its ranks ready: nobody waits in
        a circle.
        """
        rank, size = self.control.rank, self.control.world_size
        transfers = [(rank, peer, view) for peer, view in outgoing]
        transfers += [(peer, rank, view) for peer, view in incoming if peer != rank]
        transfers.sort(key=lambda transfer: ((transfer[1] - transfer[0]) % size, transfer[0]))

        for sender, receiver, view in transfers:
            if receiver != rank:
                self.send([view], receiver, deadline)
            elif sender != rank:
                self.recv([view], sender, deadline)
            else:
                # Both may be the same memory, which an allgather allows.
                ctypes.memmove(dict(incoming)[rank].pointer, view.pointer, view.nbytes)


def inherits_collectives(backend: object) -> bool:
    """Return whether a backend has a collective from here, which needs its ``control``."""
    return any(
        getattr(type(backend), name, None) is function
        for name, function in vars(PairwiseCollectives).items()
        if callable(function) and not name.startswith("_")
    )


def _like(view: BufferView) -> BufferView:
    """Return a view of new memory for as many elements."""
    return BufferView.from_buffer(bytearray(view.nbytes)).cast(view.dtype)


def _combine(target: BufferView, parts: Sequence[BufferView], op: ReduceOp) -> None:
    from colltensor.backends.arithmetic import combine  # imports numpy, only when needed

    if target.count:
        combine(target.pointer, [part.pointer for part in parts], target.count, target.dtype, op)
