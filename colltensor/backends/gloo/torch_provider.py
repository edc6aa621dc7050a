"""Gloo through torch: ``torch.distributed.ProcessGroupGloo``, without ``init_process_group``.

The one module of the Gloo backend that imports torch. A process may have any number of groups, each
with its own timeout and interface. Waiting holds no GIL and looks at the control plane ten times a
second.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any, Final

import torch
import torch.distributed as dist

from colltensor.backends.arithmetic import ANY_MEMORY
from colltensor.backends.base import ControlPlane
from colltensor.backends.gloo.provider import (
    KeyExchange,
    Pair,
    Transfer,
    expired,
    native_pairs,
    never_free,
    remaining_s,
    track,
)
from colltensor.backends.gloo.scheduling import SocketThreads
from colltensor.backends.gloo.sockets import listeners, shut_connections
from colltensor.errors import is_from_handler
from colltensor.types import ReduceOp

_log = logging.getLogger(__name__)

_TYPES: Final = {
    name: getattr(torch, name) for name in ("int8", "uint8", "int32", "int64", "float32", "float64")
}
_OPS: Final[dict[ReduceOp, Any]] = {
    op: getattr(dist.ReduceOp, op.name) for op in ReduceOp if op is not ReduceOp.AVERAGE
}
_ProcessGroupGloo: Final[Any] = dist.ProcessGroupGloo
"""Any: torch's stubs know little of it."""
_SLICE_S: Final = 0.1
_SLICE: Final = timedelta(seconds=_SLICE_S)
_LONG_NBYTES: Final = 4 << 20
"""From this size on a thread waits for a collective.

The hand-over, 15 us, is less than 1 % then.
"""
_CLOSE_S: Final = 2.0
"""How long ``close`` waits for operations to end after their connections were shut."""


class TorchProvider:
    """One ``ProcessGroupGloo`` between all ranks of a group."""

    name = "torch"
    crosses = True
    natives: Mapping[Pair, Pair] = native_pairs(tuple(_TYPES), bitwise=True)

    def __init__(
        self, control: ControlPlane, meeting: object, *, address: str, timeout_s: float
    ) -> None:
        """Connect. All ranks call.

        Args:
            control: The group's control plane, through which the ranks learn each other's
                addresses.
            meeting: Not used: this Gloo makes its connections by itself, and asks for no secret.
            address: The address of this host to bind, by which the other ranks reach it.
            timeout_s: How long connecting may take.
        """
        self._control = control

        options = _ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=timeout_s)
        device, self._threads = SocketThreads.started_by(
            lambda: _ProcessGroupGloo.create_device(hostname=address)
        )
        options._devices = [device]

        keys = KeyExchange(control, time.monotonic() + timeout_s)
        self._store: Any = _Store(keys)
        self._group: Any = _ProcessGroupGloo(self._store, control.rank, control.world_size, options)
        self._listeners = listeners(keys.values())

        self._waiters: list[_Waiter] = []  # those that wait for nothing
        self._unfinished: list[Any] = []
        self._allreduce_options: Any = dist.AllreduceOptions()
        self._broadcast_options: Any = dist.BroadcastOptions()
        track(self)

    def allreduce(self, pointer: int, nbytes: int, pair: Pair, deadline: float) -> None:
        """Combine in place."""
        dtype, op = pair
        tensor = torch.frombuffer(
            ANY_MEMORY.from_address(pointer),
            dtype=_TYPES[dtype.name],
            count=nbytes // dtype.itemsize,
        )
        self._threads.prepare(nbytes)
        options = self._allreduce_options
        options.reduceOp = _OPS[op]
        options.timeout = timedelta(seconds=remaining_s(deadline))
        self._finish("allreduce", self._connected().allreduce([tensor], options), nbytes, deadline)

    def broadcast(self, pointer: int, nbytes: int, root: int, deadline: float) -> None:
        """Overwrite with the root's bytes."""
        self._threads.prepare(nbytes)
        options = self._broadcast_options
        options.rootRank = root
        options.timeout = timedelta(seconds=remaining_s(deadline))
        self._finish(
            "broadcast",
            self._connected().broadcast([_bytes(pointer, nbytes)], options),
            nbytes,
            deadline,
        )

    def exchange(
        self, receives: Sequence[Transfer], sends: Sequence[Transfer], deadline: float
    ) -> None:
        """Do all transfers at once.

        Gloo gets its unbound buffers, which need neither a copy nor a worker thread. But their wait
        cannot be divided, because an expired one closes all connections. So a thread of ours does
        it.
        """
        group = self._connected()
        self._threads.prepare(sum(item.nbytes for item in (*receives, *sends)))

        works: list[Any] = []
        try:
            for peer, pointer, nbytes in receives:
                works.append(group.recv([_bytes(pointer, nbytes)], peer, 0))
            for peer, pointer, nbytes in sends:
                works.append(group.send([_bytes(pointer, nbytes)], peer, 0))
        except BaseException:
            waiter = None
            try:
                waiter = self._wait_beside(works, deadline)
            finally:
                self._abandon(works, waiter)
            raise

        self._finish_beside("an exchange of bytes", works, deadline)

    def reductions(self, members: Sequence[int]) -> None:
        """Return None: Gloo's own lack some, and get others wrong."""

    def close(self) -> bool:
        """Free the process group. Operations in flight are ended by shutting their connections."""
        group, self._group, self._store = self._group, None, None
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.end()
        for waiter in waiters:
            waiter.join(_CLOSE_S)
        ended = not self._unfinished or self._end_unfinished()
        if not ended:
            _log.debug(
                "group %r (rank %d): an operation of Gloo in flight does not end; its process group is never freed",
                self._control.group_name,
                self._control.rank,
            )
            never_free(group, self._unfinished)
        self._unfinished = []
        return ended

    def disown(self) -> None:
        """Leave the parent's process group alone."""
        never_free(self._group, self._store, self._unfinished)
        self._group = self._store = None
        self._waiters, self._unfinished = [], []

    def _end_unfinished(self) -> bool:
        """Shut the connections; return whether all operations have ended."""
        shut_connections(self._listeners)
        deadline = time.monotonic() + _CLOSE_S
        while not all(work.is_completed() for work in self._unfinished):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def _connected(self) -> Any:
        if self._group is None:
            raise RuntimeError("gloo: the connection is closed")
        return self._group

    def _finish(self, operation: str, work: Any, nbytes: int, deadline: float) -> None:
        """Wait for a collective of Gloo's worker threads.

        Its wait can be divided: an expired one changes nothing. A thread waits for a long one
        nevertheless, because torch's expired waits raise. The first such exception of a process
        takes more than 2 MiB for its C++ stack trace.
        """
        if nbytes >= _LONG_NBYTES:
            self._finish_beside(operation, [work], deadline)
            return

        try:
            while True:
                try:
                    work.wait(_SLICE)
                    return
                except RuntimeError as error:
                    if is_from_handler(error):
                        raise
                    # it failed, or ended just after the wait expired: this tells
                    if work.is_completed():
                        work.wait()
                        return

                self._control.check()
                if time.monotonic() > deadline:
                    raise expired(operation, self._control)
        except BaseException:
            self._unfinished.append(work)
            raise

    def _finish_beside(self, operation: str, works: list[Any], deadline: float) -> None:
        """Wait for works in the waiter's thread, and look at the control plane meanwhile."""
        waiter = None
        try:
            # if it cannot be started, the works go on all the same
            waiter = self._wait_beside(works, deadline)
            while not waiter.finished(_SLICE_S):
                self._control.check()
                if time.monotonic() > deadline:
                    raise expired(operation, self._control)
        except BaseException:
            self._abandon(works, waiter)
            raise
        self._waiters.append(waiter)

    def _wait_beside(self, works: list[Any], deadline: float) -> _Waiter:
        try:
            waiter = self._waiters.pop()
        except IndexError:  # in use, by other threads
            waiter = _Waiter(f"colltensor-gloo-{self._control.group_name}")
        try:
            waiter.start_waiting(works, deadline)
        except BaseException:
            waiter.end()
            raise
        return waiter

    def _abandon(self, works: list[Any], waiter: _Waiter | None) -> None:
        """Keep works that did not end, and let their waiter, if there is one, end with them."""
        self._unfinished += works
        if waiter is not None:
            waiter.end()


# torch's stubs do not export Store.
class _Store(dist.Store):  # type: ignore[misc,name-defined,unused-ignore]
    """A c10d store that lives on the control plane.

    Gloo sets one key, and waits for and gets the others'.
    """

    def __init__(self, keys: KeyExchange) -> None:
        super().__init__()
        self._keys = keys

    def set(self, key: str, value: Any) -> None:
        self._keys.set(key, value)

    def get(self, key: str) -> bytes:
        return self._keys.get(key)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self._keys.get(key)


class _Waiter(threading.Thread):
    """Waits for point-to-point works, one list at a time.

    It waits in a thread that holds no GIL meanwhile.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._jobs: SimpleQueue[tuple[list[Any], float] | None] = SimpleQueue()
        self._outcomes: SimpleQueue[BaseException | None] = SimpleQueue()
        self.start()

    def start_waiting(self, works: list[Any], deadline: float) -> None:
        """Begin to wait for all of ``works``."""
        self._jobs.put((works, deadline))

    def finished(self, timeout_s: float) -> bool:
        """Return whether the works have ended, after at most ``timeout_s``.

        Raise the error of the first that failed.
        """
        try:
            outcome = self._outcomes.get(timeout=timeout_s)
        except Empty:
            return False
        if outcome is not None:
            raise outcome
        return True

    def end(self) -> None:
        """Let the thread end once its works have."""
        self._jobs.put(None)

    def run(self) -> None:
        """Wait for one list after the other."""
        while (job := self._jobs.get()) is not None:
            outcome = _first_failure(*job)
            # The caller has the last references then. Freeing a work takes the GIL anew, and a
            # daemon thread that does so while the interpreter exits ends the process.
            del job
            self._outcomes.put(outcome)


def _first_failure(works: list[Any], deadline: float) -> BaseException | None:
    """Wait for all works; return what the first one that failed raised."""
    failure = None
    for work in works:
        try:
            work.wait(timedelta(seconds=remaining_s(deadline)))
        except RuntimeError as error:
            failure = failure or error
    return failure


def _bytes(pointer: int, nbytes: int) -> torch.Tensor:
    return torch.frombuffer(ANY_MEMORY.from_address(pointer), dtype=torch.uint8, count=nbytes)
