"""Some of a group's ranks, over the Gloo connections of all of them.

What the hierarchical backend sends between hosts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from colltensor.backends.gloo.composed import Composer
from colltensor.backends.gloo.provider import Pair, Provider, Transfer
from colltensor.types import DType, ReduceOp
from colltensor.view import BufferView

DIRECT_NBYTES: Final = 256 << 10
"""Up to this size of all that a rank sends, an allreduce sends everything to everyone.

This is for more than two ranks.
"""


class PartProvider:
    """A provider whose ranks are some of another one's; only moves bytes."""

    name = "part"
    crosses = False
    natives: Mapping[Pair, Pair] = {}

    def __init__(self, provider: Provider, members: Sequence[int], rank: int) -> None:
        self._provider = provider
        self._members = members
        self._rank = rank

    def allreduce(self, pointer: int, nbytes: int, pair: Pair, deadline: float) -> None:
        """Raise RuntimeError: ``natives`` is empty."""
        raise RuntimeError("gloo: a part of a group has no reductions of Gloo's own")

    def broadcast(self, pointer: int, nbytes: int, root: int, deadline: float) -> None:
        """Overwrite with the root's bytes, down a binomial tree."""
        size = len(self._members)
        turned = (self._rank - root) % size
        lowest = turned & -turned or 1 << (size - 1).bit_length()
        if turned:
            self.exchange(
                [Transfer((turned - lowest + root) % size, pointer, nbytes)], [], deadline
            )
        step = lowest >> 1
        while step:
            if turned + step < size:
                self.exchange(
                    [], [Transfer((turned + step + root) % size, pointer, nbytes)], deadline
                )
            step >>= 1

    def exchange(
        self, receives: Sequence[Transfer], sends: Sequence[Transfer], deadline: float
    ) -> None:
        """Do all transfers at once."""
        self._provider.exchange(self._named(receives), self._named(sends), deadline)

    def reductions(self, members: Sequence[int]) -> None:
        """Return None: a part composes them."""

    def close(self) -> bool:
        """Leave the connections to the group of all."""
        return True

    def disown(self) -> None:
        """Leave the connections to the group of all."""

    def _named(self, transfers: Sequence[Transfer]) -> list[Transfer]:
        return [
            Transfer(self._members[peer], pointer, nbytes) for peer, pointer, nbytes in transfers
        ]


class GlooPart:
    """Collectives of some ranks. Ranks and roots are positions among the members.

    Views are contiguous. Elements are combined in the order of the members, so that all get the
    same bits.
    """

    def __init__(
        self, provider: Provider, members: Sequence[int], rank: int, kept: list[object]
    ) -> None:
        """Serve ``members``, of which this rank is one.

        Args:
            provider: Connects all ranks of the group.
            members: The ranks of this part, in the order in which elements are combined.
            rank: This rank, in the group.
            kept: Gets the arguments of a failed call: Gloo may still read and write them until it
                is closed.
        """
        position = members.index(rank)
        self._size = len(members)
        self._provider = PartProvider(provider, members, position)
        self._composer = Composer(self._provider, position, self._size)
        self._own = provider.reductions(members)
        self._kept = kept

    def allreduce(self, view: BufferView, op: ReduceOp, deadline: float) -> None:
        """Combine in place.

        Two ranks send each other all of it in one step, which is as much as a ring of two sends.
        """
        dtype, count = view.dtype, view.count
        try:
            if self._own is not None:
                self._own.allreduce(view.pointer, count, dtype, op, deadline)
            elif self._decided_anywhere(dtype, op) and (
                self._size == 2 or self._sent(view) <= DIRECT_NBYTES
            ):
                self._composer.allreduce_direct(view.pointer, count, dtype, op, deadline)
            else:
                self._composer.allreduce(view.pointer, count, dtype, op, deadline)
        except BaseException:
            self._kept.append((view, self._composer))
            raise

    def reduce(self, view: BufferView, root: int, op: ReduceOp, deadline: float) -> None:
        """Combine in place on ``root``; elsewhere the view is only read."""
        try:
            (self._own or self._composer).reduce(
                view.pointer, view.count, view.dtype, root, op, deadline
            )
        except BaseException:
            self._kept.append((view, self._composer))
            raise

    def broadcast(self, view: BufferView, root: int, deadline: float) -> None:
        """Overwrite with ``root``'s bytes."""
        try:
            self._provider.broadcast(view.pointer, view.nbytes, root, deadline)
        except BaseException:
            self._kept.append(view)
            raise

    def _sent(self, view: BufferView) -> int:
        return view.nbytes * (self._size - 1)

    @staticmethod
    def _decided_anywhere(dtype: DType, op: ReduceOp) -> bool:
        """Return whether all ranks come to the same bits.

        MIN and MAX of 0.0 and -0.0 depend on the processor.
        """
        return not (dtype.kind == "f" and op in (ReduceOp.MIN, ReduceOp.MAX))
