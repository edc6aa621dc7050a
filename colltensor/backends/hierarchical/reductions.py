"""Reductions between hosts: in shared memory on each, then over Gloo between them.

Elements are combined on each host in the order of its ranks, and then in the order of the hosts, each in one place or
in one order: all ranks get the same bits. Imports no framework; arithmetic imports numpy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from colltensor.backends.gloo.arithmetic import divide, narrow, widen
from colltensor.backends.gloo.backend import GlooBackend
from colltensor.backends.gloo.composed import copy
from colltensor.backends.gloo.part import GlooPart
from colltensor.backends.hierarchical.blocks import Scratch, blocks, flat, parts
from colltensor.backends.hierarchical.courier import Courier, Errand
from colltensor.backends.hierarchical.hosts import Hosts
from colltensor.backends.shm.backend import ShmBackend
from colltensor.types import DTYPES, ReduceOp
from colltensor.view import BufferView

WIDENED: Final = frozenset({"float16", "bfloat16"})
"""Types that are summed in float32 from end to end and rounded once."""

LEADER_NBYTES: Final = 64 << 10
"""Up to this size one rank of each host sends everything: one exchange between hosts."""

_FLOAT32: Final = DTYPES["float32"]
_EXACT: Final = frozenset({ReduceOp.MIN, ReduceOp.MAX})


class Reductions:
    """allreduce and reduce of one rank. Views are contiguous host memory, none empty."""

    def __init__(self, hosts: Hosts, local: ShmBackend | None, gloo: GlooBackend, courier: Courier) -> None:
        self._hosts = hosts
        self._local = local
        self._courier = courier
        self._gloo = gloo
        self._size = len(hosts.index)
        self._scratch = Scratch()
        self._slices = hosts.slices
        self._has_slice = hosts.position < hosts.slices
        self._leads = hosts.position == 0
        self._between_leaders = gloo.part(hosts.leaders()) if self._leads else None
        self._between_counterparts = gloo.part(hosts.counterparts()) if self._has_slice else None

    def allreduce(self, view: BufferView, op: ReduceOp, deadline: float) -> None:
        """Combine in place on every rank."""
        if view.nbytes <= LEADER_NBYTES:
            self._through_leaders(flat(view), op, deadline)
            return
        waiting: deque[tuple[BufferView, Errand]] = deque()
        for number, block in enumerate(blocks(view, self._slices)):
            if block.count < self._slices:  # what the slices leave over
                while waiting:
                    self._spread(*waiting.popleft(), deadline)
                self._through_leaders(block, op, deadline)
                continue
            waiting.append((block, self._collect(number % 2, block, op, deadline)))
            if len(waiting) == 2:
                self._spread(*waiting.popleft(), deadline)
        while waiting:
            self._spread(*waiting.popleft(), deadline)

    def reduce(self, view: BufferView, root: int, op: ReduceOp, deadline: float) -> None:
        """Combine in place on ``root``, which is its host's leader; each other host's sends what its ranks come to."""
        leaders = self._hosts.leaders(root)
        leader = leaders[self._hosts.host]
        leads = self._hosts.neighbours[self._hosts.position] == leader
        between = self._gloo.part(leaders) if leads else None
        waiting: deque[Errand] = deque()
        for number, block in enumerate(blocks(view, 1)):
            if len(waiting) == 2:  # whose scratch memory is used again
                waiting.popleft().wait()
            keep = leads and leader != root
            summed = self._summed_on(leader, number % 2, block, op, keep, deadline)
            if between is not None:
                waiting.append(self._courier.send(
                    self._reduction_to(between, self._hosts.index[root], leader == root, summed, block, op, deadline)
                ))
        while waiting:
            waiting.popleft().wait()

    def _collect(self, piece: int, block: BufferView, op: ReduceOp, deadline: float) -> Errand:
        """Combine a block on this host and send this rank's slice on its way; the errand ends with the result."""
        summed = self._widened(piece, block, op)
        sums = parts(summed, self._slices)
        if self._local is not None and self._slices == len(self._hosts.neighbours):
            self._local.reducescatter(sums[self._hosts.position], sums, _inner(op), deadline)
        elif self._local is not None:
            for position, part in enumerate(sums):
                self._local.reduce([part], position, _inner(op), deadline)
        between = self._between_counterparts
        if between is None:
            return _NOTHING
        own, result = sums[self._hosts.position], parts(block, self._slices)[self._hosts.position]

        def cross() -> None:
            between.allreduce(own, _inner(op), deadline)
            self._finish(own, result, op)

        return self._courier.send(cross)

    def _spread(self, block: BufferView, errand: Errand, deadline: float) -> None:
        """Give the slices of a block to all ranks of this host, once this rank's own is there."""
        errand.wait()
        if self._local is None:
            return
        results = parts(block, self._slices)
        if self._slices == len(self._hosts.neighbours):
            self._local.allgather(results, results[self._hosts.position], deadline)
        else:
            for position, part in enumerate(results):
                self._local.broadcast([part], position, deadline)

    def _through_leaders(self, view: BufferView, op: ReduceOp, deadline: float) -> None:
        """Combine on each host's first rank, between these, and copy back, in this thread."""
        summed = self._summed_on(self._hosts.neighbours[0], 0, view, op, False, deadline)
        if self._between_leaders is not None:
            self._between_leaders.allreduce(summed, _inner(op), deadline)
            self._finish(summed, view, op)
        if self._local is not None:
            self._local.broadcast([view], 0, deadline)

    def _summed_on(
        self, leader: int, piece: int, block: BufferView, op: ReduceOp, keep: bool, deadline: float
    ) -> BufferView:
        """Combine a block of this host's ranks; return where ``leader`` has the result.

        Args:
            leader: A rank of this host.
            piece: The scratch memory to use.
            block: This rank's elements.
            op: The reduce op.
            keep: Leave ``block`` as it is also on ``leader``.
            deadline: When to give up.
        """
        summed = self._widened(piece, block, op)
        if self._local is None:
            return summed
        if keep and summed is block:
            summed = self._scratch.take(piece, block.count, block.dtype)
            copy(summed.pointer, block.pointer, block.nbytes)
        self._local.reduce([summed], self._hosts.local[leader], _inner(op), deadline)
        return summed

    def _reduction_to(
        self, between: GlooPart, root: int, is_root: bool, summed: BufferView, block: BufferView, op: ReduceOp,
        deadline: float,
    ) -> Callable[[], None]:
        def cross() -> None:
            between.reduce(summed, root, _inner(op), deadline)
            if is_root:
                self._finish(summed, block, op)

        return cross

    def _widened(self, piece: int, block: BufferView, op: ReduceOp) -> BufferView:
        """Return a block's elements as they are summed: themselves, or in float32 in scratch memory."""
        if block.dtype.name not in WIDENED or op in _EXACT:
            return block
        wide = self._scratch.take(piece, block.count, _FLOAT32)
        widen(wide.pointer, block.pointer, block.count, block.dtype)
        return wide

    def _finish(self, summed: BufferView, result: BufferView, op: ReduceOp) -> None:
        """Divide an average, and round what was widened."""
        if op is ReduceOp.AVERAGE:
            divide(summed.pointer, summed.count, summed.dtype, self._size)
        if summed.dtype is not result.dtype:
            narrow(result.pointer, summed.pointer, summed.count, result.dtype)


class _Nothing(Errand):
    """The errand of a rank that has no slice."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(lambda: None)
        self._done.set()


_NOTHING: Final = _Nothing()


def _inner(op: ReduceOp) -> ReduceOp:
    """Return what is done at each step: an average is divided at the end."""
    return ReduceOp.SUM if op is ReduceOp.AVERAGE else op
