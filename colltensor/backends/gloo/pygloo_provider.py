"""Gloo through pygloo 0.2.1, which has wheels for CPython 3.10 and below.

The one module of the Gloo backend that imports pygloo. pygloo blocks: it holds the GIL while it
waits, its 30 s timeout cannot be changed, and Ctrl-C waits for it. So the payload of one group
stops all Python threads of the process. Two threads must not use two groups of one process in
different orders on different ranks. The control plane has made sure before each payload that all
ranks are there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pygloo

from colltensor.backends.base import ControlPlane
from colltensor.backends.gloo.provider import (
    KeyExchange,
    Pair,
    Transfer,
    expired,
    native_pairs,
    never_free,
    track,
    turn,
)
from colltensor.backends.gloo.scheduling import SocketThreads
from colltensor.types import ReduceOp

_TYPES: Final = {
    name: getattr(pygloo.glooDataType_t, f"gloo{name.capitalize()}")
    for name in ("int8", "uint8", "int32", "uint32", "int64", "uint64", "float32", "float64")
}
_OPS: Final = {
    op: getattr(pygloo.ReduceOp, op.name)
    for op in (ReduceOp.SUM, ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.MAX)
}
_UINT8: Final = _TYPES["uint8"]


class PyglooProvider:
    """One pygloo context between all ranks of a group."""

    name = "pygloo"
    crosses = False
    natives: Mapping[Pair, Pair] = native_pairs(tuple(_TYPES), bitwise=False)

    def __init__(
        self, control: ControlPlane, meeting: object, *, address: str, timeout_s: float
    ) -> None:
        """Connect. All ranks call.

        Args:
            control: The group's control plane, through which the ranks learn each other's
                addresses.
            meeting: Not used: this Gloo makes its connections by itself, and asks for no secret.
            address: The address of this host to bind, by which the other ranks reach it.
            timeout_s: How long the ranks' addresses are waited for; connecting has pygloo's own 30
                s.
        """
        self._control = control
        self._rank = control.rank
        self._size = control.world_size

        attributes = pygloo.transport.tcp.attr(address)
        keys = _Keys(KeyExchange(control, time.monotonic() + timeout_s))
        self._store: Any = (keys, pygloo.rendezvous.CustomStore(keys))
        self._device: Any
        self._device, self._threads = SocketThreads.started_by(
            lambda: pygloo.transport.tcp.CreateDevice(attributes)
        )

        self._context: Any = pygloo.rendezvous.Context(self._rank, self._size)
        self._context.connectFullMesh(self._store[1], self._device)
        track(self)

    def allreduce(self, pointer: int, nbytes: int, pair: Pair, deadline: float) -> None:
        """Combine in place."""
        self._threads.prepare(nbytes)
        dtype, op = pair
        pygloo.allreduce(
            self._connected("allreduce", deadline),
            pointer,
            pointer,
            nbytes // dtype.itemsize,
            _TYPES[dtype.name],
            _OPS[op],
            pygloo.allreduceAlgorithm.RING,
        )

    def broadcast(self, pointer: int, nbytes: int, root: int, deadline: float) -> None:
        """Overwrite with the root's bytes."""
        self._threads.prepare(nbytes)
        pygloo.broadcast(
            self._connected("broadcast", deadline), pointer, pointer, nbytes, _UINT8, root
        )

    def exchange(
        self, receives: Sequence[Transfer], sends: Sequence[Transfer], deadline: float
    ) -> None:
        """Do all transfers, one after the other, so that no two ranks wait for each other.

        pygloo's send waits until the receiver takes.
        """
        self._threads.prepare(sum(item.nbytes for item in (*receives, *sends)))
        steps = [(turn(self._rank, item.peer, self._size), True, item) for item in sends]
        steps += [(turn(item.peer, self._rank, self._size), False, item) for item in receives]
        for _, sending, (peer, pointer, nbytes) in sorted(steps):
            context = self._connected("an exchange of bytes", deadline)
            (pygloo.send if sending else pygloo.recv)(context, pointer, nbytes, _UINT8, peer)

    def reductions(self, members: Sequence[int]) -> None:
        """Return None: Gloo's own lack some, and get others wrong."""

    def close(self) -> bool:
        """Close the connections; nothing is in flight, since pygloo blocks."""
        context, self._context, self._device, self._store = self._context, None, None, None
        if context is not None:
            context.closeConnections()
        return True

    def disown(self) -> None:
        """Leave the parent's context alone."""
        never_free(self._context, self._device, self._store)
        self._context = self._device = self._store = None

    def _connected(self, operation: str, deadline: float) -> Any:
        if self._context is None:
            raise RuntimeError("gloo: the connection is closed")
        self._control.check()
        if time.monotonic() > deadline:
            raise expired(operation, self._control)
        return self._context


class _Keys:
    """What pygloo calls on a store that is written in Python."""

    def __init__(self, keys: KeyExchange) -> None:
        self._keys = keys

    def set(self, key: str, data: bytes) -> bool:
        """Publish; pygloo sets two keys."""
        self._keys.set(key, data)
        return True

    def get(self, key: str) -> bytes:
        """Return what a rank has published."""
        return self._keys.get(key)

    def wait(self, keys: list[str]) -> bool:
        """Return at once: what is published came with this rank's own keys."""
        for key in keys:
            self._keys.get(key)
        return True

    def del_keys(self, keys: list[str]) -> bool:
        """Nothing is left to delete."""
        return True
