"""Gloo through colltensor's own native library.

Needs no torch and no pygloo, on any version of Python. Connections are made by ``meshing``;
messages with bounded waits and all reductions are in native/gloo. Waiting holds no GIL and looks at
the control plane ten times a second. When a call fails, its connections are shut before the error
is raised. Gloo touches its memory no more then.
"""

from __future__ import annotations

import array
import json
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from colltensor import dlpack
from colltensor.backends.base import ControlPlane
from colltensor.backends.gloo import library, meshing
from colltensor.backends.gloo.provider import Pair, Transfer, expired, track
from colltensor.backends.gloo.scheduling import SocketThreads
from colltensor.errors import BackendUnavailableError
from colltensor.rendezvous import Meeting
from colltensor.types import DType, ReduceOp

_STOPPED: Final = 1
_CLOSED: Final = 2


class NativeProvider:
    """Gloo's connections between all ranks of a group, held by the native library."""

    name = "native"
    crosses = True
    natives: Mapping[Pair, Pair] = {}

    def __init__(
        self, control: ControlPlane, meeting: Meeting, *, address: str, timeout_s: float
    ) -> None:
        """Connect. All ranks call.

        Args:
            control: The group's control plane, through which the ranks learn each other's
                addresses.
            meeting: Where the ranks met; its secret is what each end of a connection must know.
            address: The address of this host to bind, by which the other ranks reach it.
            timeout_s: How long connecting may take.

        Raises:
            BackendUnavailableError: The device cannot be used.
        """
        self._control = control
        self._size = control.world_size
        self._library = library.load()
        self._move = self._library.gloo_move
        self._waits: list[tuple[_Wait, Any]] = []  # that no call uses

        deadline = time.monotonic() + timeout_s
        place, port = self._place(address)
        try:
            self._handle, threads = SocketThreads.started_by(
                lambda: self._library.gloo_open(
                    control.rank, self._size, place, port, int(timeout_s * 1000) + 1
                )
            )
        except RuntimeError as error:
            raise BackendUnavailableError(
                f"group '{control.group_name}' (rank {control.rank}), backend 'gloo': provider {self.name!r} cannot "
                f"use {place!r}: {error}"
            ) from error

        # calm whatever the size: 64 MiB and 2 ranks took 42 ms in place of 114 and 125 on 2 cores
        threads.prepare(0)

        self._everyone = NativeReductions(self, range(self._size))
        track(self)
        try:
            self._connect(meeting, address, deadline)
        except BaseException:
            self.close()
            raise

    def _place(self, address: str) -> tuple[str, int]:
        return address, 0

    def _connect(self, meeting: Meeting, address: str, deadline: float) -> None:
        connections = meshing.connect(self._control, meeting, address, deadline)
        try:
            for peer, sock in connections.items():
                if self._library.gloo_link(self._handle, peer, sock.detach()) == _CLOSED:
                    raise RuntimeError("gloo: the connection is closed")
        finally:
            for sock in connections.values():
                sock.close()

    def allreduce(self, pointer: int, nbytes: int, pair: Pair, deadline: float) -> None:
        """Raise RuntimeError: what combines is ``reductions``."""
        raise RuntimeError("gloo: provider 'native' combines by its reductions")

    def broadcast(self, pointer: int, nbytes: int, root: int, deadline: float) -> None:
        """Overwrite with the root's bytes."""
        self._everyone.broadcast(pointer, nbytes, root, deadline)

    def exchange(
        self, receives: Sequence[Transfer], sends: Sequence[Transfer], deadline: float
    ) -> None:
        """Do all transfers at once."""
        numbers = array.array("q")
        for item in (*receives, *sends):
            numbers.extend(item)
        arguments = (numbers.buffer_info()[0], len(receives), len(sends))
        self._call("an exchange of bytes", self._move, *arguments, deadline=deadline)

    def reductions(self, members: Sequence[int]) -> NativeReductions:
        """Return the reductions of some ranks, this one among them."""
        return NativeReductions(self, members)

    def limit(self, direct_nbytes: int, block_nbytes: int, depth: int) -> None:
        """Set up to which size everyone gets everything, and the size and number of blocks.

        For tests.
        """
        self._library.gloo_limit(self._handle, direct_nbytes, block_nbytes, depth)

    def close(self) -> bool:
        """Close the connections; a call in another thread ends within a tenth of a second."""
        handle, self._handle = self._handle, 0
        if handle:
            self._library.gloo_close(handle)
        return True

    def disown(self) -> None:
        """Forget the parent's connections, which the library in the child knows nothing of."""
        self._handle = 0

    def _call(
        self, operation: str, function: Callable[..., int], *arguments: Any, deadline: float
    ) -> None:
        """Call the library, which asks ten times a second while it waits whether to go on."""
        try:
            wait, stops = self._waits.pop()
        except IndexError:  # threads own none: XLA's forget what is theirs after each call
            wait = _Wait(self._control)
            stops = dlpack.tvm_ffi().convert(wait.stops)
        wait.begin(operation, deadline)
        outcome = function(self._handle, *arguments, stops)
        raised, wait.raised = wait.raised, None
        self._waits.append((wait, stops))
        if outcome == _STOPPED:
            # None: a signal's handler raised before it could be kept.
            raise raised or KeyboardInterrupt
        if outcome == _CLOSED:
            raise RuntimeError("gloo: the connection is closed")


class _Wait:
    """What a call that waits looks at.

    Attributes:
        raised: What ended it.
    """

    def __init__(self, control: ControlPlane) -> None:
        self.raised: BaseException | None = None
        self._control = control
        self._operation = ""
        self._deadline = 0.0

    def begin(self, operation: str, deadline: float) -> None:
        """Name the call and its deadline."""
        self.raised, self._operation, self._deadline = None, operation, deadline

    def stops(self) -> int:
        """Return 1 where the call has to end, which raises ``raised`` then, else 0."""
        try:
            self._control.check()
            if time.monotonic() > self._deadline:
                raise expired(self._operation, self._control)
        except BaseException as error:  # noqa: BLE001 - it would be lost in the library
            self.raised = error
            return 1
        return 0


class IbverbsProvider(NativeProvider):
    """The same over ibverbs, by this machine's first device."""

    name = "ibverbs"

    def _place(self, address: str) -> tuple[str, int]:
        return str(self._library.gloo_ibverbs_names()).partition(",")[0], 1

    def _connect(self, meeting: Meeting, address: str, deadline: float) -> None:
        """Connect queue pairs.

        The adapter accepts each from nobody but the peer that it is told.
        """
        own = [
            bytes(self._library.gloo_address(self._handle, peer)).hex()
            for peer in range(self._size)
        ]
        frames = self._control.allgather(json.dumps(own).encode(), deadline)
        addresses = [bytes.fromhex(json.loads(frame)[self._control.rank]) for frame in frames]
        blob = b"".join(struct.pack("=I", len(address)) + address for address in addresses)
        self._call("connecting", self._library.gloo_connect, blob, deadline=deadline)


class NativeReductions:
    """Reductions of some ranks, in their order, by the native kernels.

    Roots are positions among the ranks. Addresses are of contiguous host memory.
    """

    def __init__(self, provider: NativeProvider, members: Sequence[int]) -> None:
        self._provider = provider
        self._members = array.array("q", members)
        self._ranks = (self._members.buffer_info()[0], len(self._members))
        functions = provider._library
        self._allreduce, self._reduce = functions.gloo_allreduce, functions.gloo_reduce
        self._reducescatter, self._broadcast = (
            functions.gloo_reducescatter,
            functions.gloo_broadcast,
        )
        self._combine = functions.gloo_combine

    def allreduce(
        self, pointer: int, count: int, dtype: DType, op: ReduceOp, deadline: float
    ) -> None:
        """Combine in place."""
        provider = self._provider
        arguments = (pointer, count, dtype.code, int(op))
        provider._call("allreduce", self._allreduce, *self._ranks, *arguments, deadline=deadline)

    def combine(
        self, pointer: int, contributions: Sequence[bytes], dtype: DType, op: ReduceOp
    ) -> None:
        """Combine contributions, in their order, into memory of the size of one; sends nothing."""
        self._combine(pointer, b"".join(contributions), len(contributions), dtype.code, int(op))

    def reduce(
        self, pointer: int, count: int, dtype: DType, root: int, op: ReduceOp, deadline: float
    ) -> None:
        """Combine in place on ``root``; on other ranks the memory is only read."""
        provider = self._provider
        arguments = (pointer, count, dtype.code, int(op), root)
        provider._call("reduce", self._reduce, *self._ranks, *arguments, deadline=deadline)

    def reducescatter(
        self,
        target: int,
        sources: Sequence[int],
        count: int,
        dtype: DType,
        op: ReduceOp,
        deadline: float,
    ) -> None:
        """Combine all ranks' ``sources[rank]`` into ``target``; each of ``count`` elements."""
        provider = self._provider
        places = array.array("q", sources)
        arguments = (target, places.buffer_info()[0], count, dtype.code, int(op))
        provider._call(
            "reducescatter", self._reducescatter, *self._ranks, *arguments, deadline=deadline
        )

    def broadcast(self, pointer: int, nbytes: int, root: int, deadline: float) -> None:
        """Overwrite with the root's bytes."""
        provider = self._provider
        provider._call(
            "broadcast", self._broadcast, *self._ranks, pointer, nbytes, root, deadline=deadline
        )
