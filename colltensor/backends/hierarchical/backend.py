"""HierarchicalBackend: shared memory within a host, Gloo between hosts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Concatenate, Final, ParamSpec

from colltensor.backends.base import BackendBase
from colltensor.backends.gloo.backend import GlooBackend
from colltensor.backends.gloo.composed import copy
from colltensor.backends.hierarchical.data_movement import DataMovement
from colltensor.backends.hierarchical.reductions import WIDENED, Reductions
from colltensor.backends.hierarchical.topology import Hosts
from colltensor.backends.hierarchical.watch import HaltedError, Watch
from colltensor.backends.hierarchical.worker import Worker
from colltensor.backends.shm.backend import ShmBackend
from colltensor.errors import CollectiveError, CollectiveTimeoutError, is_from_handler
from colltensor.operations import REDUCTIONS
from colltensor.types import DType, ReduceOp
from colltensor.view import BufferView

_END_S: Final = 2.0
"""How long a failed call waits for its other half.

That looks ten times a second whether it should end.
"""

_P = ParamSpec("_P")


def _in_two_halves(
    method: Callable[Concatenate[HierarchicalBackend, _P], None],
) -> Callable[Concatenate[HierarchicalBackend, _P], None]:
    """End both halves of a call when one fails, and raise what the group can make sense of."""

    @functools.wraps(method)
    def call(backend: HierarchicalBackend, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            method(backend, *args, **kwargs)
        except BaseException as error:
            verdict = backend._verdict(error)
            if verdict is error:
                raise
            raise verdict from error

    return call


@contextlib.contextmanager
def _joined(local: ShmBackend, source: int, destination: int, deadline: float) -> Iterator[None]:
    """Let a transfer within the host run beside those of other threads."""
    local.join(deadline)
    try:
        yield
    finally:
        local.part(source, destination)


class HierarchicalBackend(BackendBase):
    """Collectives between hosts of which some have several ranks.

    allreduce, reduce, broadcast and allgather send an element between two hosts once each way, in
    blocks: while one block is on the network the next is in shared memory. send, recv and sendrecv
    between ranks of one host go through shared memory. gather, scatter, reducescatter and alltoall,
    and transfers between hosts, go over Gloo between all ranks. The ranks agree on the control
    plane before each call, so the steps within one need no agreement.

    Attributes:
        details: The provider of Gloo, and why it is this one, in words.
        crosses: Whether the provider lets transfers run at the same time.
    """

    name = "hierarchical"

    def __init__(
        self, hosts: Hosts, watch: Watch, local: ShmBackend | None, gloo: GlooBackend
    ) -> None:
        """Take over both transports; ``local`` is None on a host with one rank."""
        self._hosts = hosts
        self._watch = watch
        self._local = local
        self._gloo = gloo
        self.details = gloo.details
        self.crosses = gloo.crosses
        self._worker = Worker(f"colltensor {watch.group_name} hosts", watch.halt)
        self._data_movement = DataMovement(hosts, local, gloo, self._worker)
        self._reductions = Reductions(hosts, local, gloo, self._worker)

    def stages_dtype(self, operation: str, dtype: DType, op: ReduceOp | None) -> bool:
        """Return True for reductions of 16-bit floats, which are widened and rounded back."""
        return dtype.name in WIDENED and operation in REDUCTIONS

    def piggybacks(self, buffers: Sequence[BufferView], op: ReduceOp) -> bool:
        """Return whether an allreduce travels with the agreement, past hosts and Gloo."""
        return self._gloo.piggybacks(buffers, op)

    def pack(self, buffers: Sequence[BufferView]) -> bytes:
        """Return the buffers' bytes, one after the other."""
        return self._gloo.pack(buffers)

    def unpack(
        self, buffers: Sequence[BufferView], op: ReduceOp, contributions: Sequence[bytes]
    ) -> None:
        """Combine into the buffers what all ranks packed, in their order."""
        self._gloo.unpack(buffers, op, contributions)

    @_in_two_halves
    def allreduce(self, buffers: Sequence[BufferView], op: ReduceOp, deadline: float) -> None:
        """Combine in place on every rank, each buffer on its own.

        On each host, then between hosts, in rank order.
        """
        for buffer in buffers:
            if buffer.count:
                self._reductions.allreduce(buffer, op, deadline)

    @_in_two_halves
    def reduce(
        self, buffers: Sequence[BufferView], root: int, op: ReduceOp, deadline: float
    ) -> None:
        """Combine in place on ``root``; elsewhere the buffers are only read."""
        for buffer in buffers:
            if buffer.count:
                self._reductions.reduce(buffer, root, op, deadline)

    @_in_two_halves
    def broadcast(self, buffers: Sequence[BufferView], root: int, deadline: float) -> None:
        """Overwrite with ``root``'s bytes on the other ranks, each buffer on its own."""
        for buffer in buffers:
            if buffer.count:
                self._data_movement.broadcast(buffer, root, deadline)

    @_in_two_halves
    def allgather(self, outputs: Sequence[BufferView], source: BufferView, deadline: float) -> None:
        """Send ``source`` to a rank of every other host, and copy what comes to its neighbours."""
        if source.count:
            self._data_movement.allgather(outputs, source, deadline)

    @_in_two_halves
    def gather(
        self, outputs: Sequence[BufferView] | None, source: BufferView, root: int, deadline: float
    ) -> None:
        """Send ``source`` to ``root``, over Gloo."""
        self._gloo.gather(outputs, source, root, deadline)

    @_in_two_halves
    def scatter(
        self, target: BufferView, sources: Sequence[BufferView] | None, root: int, deadline: float
    ) -> None:
        """Send ``root``'s ``sources`` to their ranks, over Gloo."""
        self._gloo.scatter(target, sources, root, deadline)

    @_in_two_halves
    def reducescatter(
        self, target: BufferView, sources: Sequence[BufferView], op: ReduceOp, deadline: float
    ) -> None:
        """Combine all ranks' ``sources[rank]`` into ``target``, over Gloo."""
        self._gloo.reducescatter(target, sources, op, deadline)

    @_in_two_halves
    def alltoall(
        self, outputs: Sequence[BufferView], sources: Sequence[BufferView], deadline: float
    ) -> None:
        """Send every rank its source, over Gloo."""
        self._gloo.alltoall(outputs, sources, deadline)

    @_in_two_halves
    def send(self, buffers: Sequence[BufferView], peer: int, deadline: float) -> None:
        """Send each buffer to ``peer``, one after the other."""
        local = self._local_to(peer)
        if local is None:
            self._gloo.send(buffers, peer, deadline)
        else:
            with _joined(local, self._hosts.position, self._hosts.local[peer], deadline):
                local.send(buffers, self._hosts.local[peer], deadline)

    @_in_two_halves
    def recv(self, buffers: Sequence[BufferView], peer: int, deadline: float) -> None:
        """Receive each buffer from ``peer``, one after the other."""
        local = self._local_to(peer)
        if local is None:
            self._gloo.recv(buffers, peer, deadline)
        else:
            with _joined(local, self._hosts.local[peer], self._hosts.position, deadline):
                local.recv(buffers, self._hosts.local[peer], deadline)

    @_in_two_halves
    def sendrecv(
        self, source: BufferView, dst: int, target: BufferView, src: int, deadline: float
    ) -> None:
        """Send to ``dst`` and receive from ``src`` at once.

        Both may be one rank, this one included.
        """
        to, of = self._local_to(dst), self._local_to(src)

        if dst == self._watch.rank:
            copy(target.pointer, source.pointer, target.nbytes)
        elif to is not None and of is not None:
            to.sendrecv(source, self._hosts.local[dst], target, self._hosts.local[src], deadline)
        elif to is not None:
            # Both halves run at once, because each may wait for a rank that waits for the other.
            task = self._worker.send(lambda: self._gloo.recv([target], src, deadline))
            to.send([source], self._hosts.local[dst], deadline)
            task.wait()
        elif of is not None:
            task = self._worker.send(lambda: self._gloo.send([source], dst, deadline))
            of.recv([target], self._hosts.local[src], deadline)
            task.wait()
        else:
            self._gloo.sendrecv(source, dst, target, src, deadline)

    def barrier(self, deadline: float) -> None:
        """Wait for all ranks on the control plane."""
        self._watch.allgather(b"", deadline)

    def close(self) -> None:
        """End what is in flight and free both transports."""
        self._watch.halt()
        if self._local is not None:
            self._local.close()
        self._worker.end(_END_S)
        self._gloo.close()

    def _local_to(self, peer: int) -> ShmBackend | None:
        """Return this host's backend if the peer is on it, else None."""
        return self._local if self._hosts.index[peer] == self._hosts.host else None

    def _verdict(self, error: BaseException) -> BaseException:
        """End the other half of a call that failed, and return what the group gets.

        What the whole group's control plane said has the ranks of the group and is returned as it
        is. What shared memory found out names positions on a host: a plain error has the group ask
        every rank itself.
        """
        self._watch.halt()
        self._worker.end(_END_S)
        if not isinstance(error, Exception) or is_from_handler(error):
            return error
        if isinstance(error, HaltedError) and self._worker.failure is not None:
            error = self._worker.failure
        if self._watch.failure is not None:
            return self._watch.failure
        if isinstance(error, CollectiveTimeoutError):
            return TimeoutError(str(error))
        return RuntimeError(str(error)) if isinstance(error, CollectiveError) else error
