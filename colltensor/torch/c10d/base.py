"""BaseProcessGroup: the parts of a process group, how operations run, point-to-point, its end."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final

import torch
from torch.distributed import distributed_c10d

from colltensor import bridge
from colltensor._compat import torch as _compat
from colltensor.errors import CollectiveError, GroupError, PeerLostError, RankError, is_from_handler
from colltensor.group import Group
from colltensor.options import timeout_of
from colltensor.torch.c10d.delegated import DelegatedBackends
from colltensor.torch.c10d.identity import Identity
from colltensor.torch.c10d.inbox import CLOSED, translated
from colltensor.torch.c10d.meeting import meet
from colltensor.torch.c10d.payloads import apart, bare, only
from colltensor.torch.c10d.transfers import PATIENCE_S, Connect, Transfers
from colltensor.torch.c10d.work import FinishedWork, PendingWork, ProcessGroupQueue, QueuedCall
from colltensor.work import consequence, nested

_profiler_enabled: Final = _compat.profiler_enabled()
_UNSET: Final = timedelta(milliseconds=-1)
_MERGE_TIMEOUT: Final = timedelta(minutes=30)
_DRAIN_S: Final = 5.0
_ASK_EVERY_S: Final = 0.25


class BaseProcessGroup(Identity):
    """The part of a process group that is not about collectives."""

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        timeout: timedelta,
        name: str,
        refusal: CollectiveError | None = None,
    ) -> None:
        """Meet the other ranks; all of them call.

        Args:
            store: A c10d store, with a prefix of this group's own.
            rank: This rank.
            size: The number of ranks.
            timeout: How long operations wait for other ranks, and how long the ranks may take to
                come.
            name: The group's name, for messages.
            refusal: Why this rank will not be in the group, which every rank is to raise.

        Raises:
            CollectiveError: The ranks do not meet before the timeout, or cannot be connected.
        """
        super().__init__(rank, size, store, name)
        self._timeout = timeout
        self._store = store.clone()  # torch waits in the other one, which nobody can use meanwhile
        seconds, called = timeout.total_seconds(), f"c10d {name}"
        group = self._group = meet(
            self._store, "all", rank, size, name=called, timeout_s=seconds, refusal=refusal
        )

        self._queue = ProcessGroupQueue(group.name)
        ask, lost = functools.partial(bridge.ask, group), functools.partial(bridge.lost, group)
        connect = _weakly(self._connect)
        self._transfers = Transfers(group.name, rank, size, connect, ask, lost)
        bridge.answer_with(group, self._transfers.standoffs.answer)
        self._delegated = DelegatedBackends(store, rank, size, timeout)

        self._parts = itertools.count()
        self._issued = 0
        self._ended: str | None = None
        # As with torch's own, whoever drops a process group has left it, so no other rank waits for
        # this one.
        parts = self._queue, self._transfers, group
        self._dropped = weakref.finalize(self, _leave_beside, *parts, name)
        self._dropped.atexit = False

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu"), *self._delegated.devices(self)]

    def _get_backend(self, device: torch.device) -> Any:
        # a group in the making connects nothing early
        if device.type == "cpu" or not self._delegated.known(self):
            return self
        return self._delegated.backend_for(self, device)

    def send(self, tensors: Any, dstRank: int, tag: int = 0) -> Any:  # noqa: N803 - torch's
        """Send one tensor; done when a receive has taken it, or the rank has it, if it is short."""
        tensor = only("send", "tensors", tensors)
        if not tensor.is_cpu:
            return self._elsewhere(tensor).send([tensor], dstRank, tag)
        self._peer("send", dstRank)
        send = self._transfers.send
        operation = _seen("send", send, bare(tensor), dstRank, tag, self._timeout.total_seconds())
        return PendingWork(operation, [tensor])

    def recv(self, tensors: Any, srcRank: int, tag: int = 0) -> Any:  # noqa: N803 - torch's
        """Receive one tensor with a tag from a rank."""
        tensor = only("recv", "tensors", tensors)
        if not tensor.is_cpu:
            return self._elsewhere(tensor).recv([tensor], srcRank, tag)
        self._peer("recv", srcRank)
        return self._receive(tensor, srcRank, tag)

    def recv_anysource(self, tensors: Any, tag: int = 0) -> Any:
        """Receive one tensor with a tag from any rank; ``source_rank()`` says which."""
        tensor = only("recv_anysource", "tensors", tensors)
        if not tensor.is_cpu:
            return self._elsewhere(tensor).recv_anysource([tensor], tag)
        return self._receive(tensor, None, tag)

    def set_timeout(self, timeout: timedelta) -> None:
        """Let operations that are issued from now on wait so long for other ranks.

        Raises:
            OptionError: It is not above 0; nothing has changed.
        """
        seconds = timeout_of(timeout.total_seconds())
        self._timeout = timeout
        self._delegated.set_timeout(timeout)
        self._enqueue(QueuedCall("set_timeout", lambda: self._group.set_timeout(seconds)))

    _set_default_timeout = set_timeout

    def _set_sequence_number_for_group(self) -> None:
        """Do nothing: the ranks agree on each call anyway."""

    def _get_sequence_number_for_group(self) -> int:
        """Return how many collectives this rank has issued."""
        return self._issued

    def split_group(
        self,
        new_ranks: Sequence[int],
        timeout: timedelta | None = None,
        opts: Any = None,
        group_name: str | None = None,
        group_desc: str | None = None,
        device_types: Any = None,
    ) -> Any:
        """Make a process group of some ranks of this one, in their order; None on the others.

        All ranks call, each with the ranks of the part that it will be in, or of another one.
        """
        number = next(self._parts)
        members = sorted(new_ranks)
        if self.rank() not in members:
            return None

        store = distributed_c10d.PrefixStore(
            f"split/{number}/{'-'.join(map(str, members))}/", self.get_group_store()
        )
        description = group_desc or f"{self.group_desc}:split:{number}"
        rank = members.index(self.rank())
        name = f"{self._group.name}:split:{number}"  # that of the meeting, the same on all ranks
        made = self._related(store, rank, len(members), timeout or self._timeout, name, description)
        made._set_group_name(group_name or f"{self._label}:split:{number}")
        return made

    def merge_remote_group(
        self,
        store: Any,
        size: int,
        timeout: timedelta = _MERGE_TIMEOUT,
        group_name: str | None = None,
        group_desc: str | None = None,
    ) -> Any:
        """Make a process group of the ranks of several; all of their ranks call.

        The groups need not know each other.

        Args:
            store: A c10d store that all of them reach. After a merge that failed take another, or
                another prefix.
            size: The number of ranks in all. They are numbered in the order in which they come.
            timeout: How long they may take to come, and operations wait for other ranks.
            group_name: The new group's name, for messages; this one's and ``:merge`` without it.
            group_desc: What it is for, in words; likewise.

        Raises:
            CollectiveError: The ranks do not come before the timeout, or cannot be connected.
        """
        turn, rank = divmod(store.add(f"merge/{size}", 1) - 1, size)
        prefixed = distributed_c10d.PrefixStore(f"merge/{size}/{turn}/", store)
        description = group_desc or f"{self.group_desc}:merge"
        made = self._related(prefixed, rank, size, timeout, f"merge {turn} of {size}", description)
        # which may differ from rank to rank
        made._set_group_name(group_name or f"{self._label}:merge")
        return made

    def _related(
        self, store: Any, rank: int, size: int, timeout: timedelta, name: str, description: str
    ) -> Any:
        """Make a group that has the backends for other devices that this one has."""
        made = type(self)(store, rank, size, timeout, name)
        made._description = description
        made._delegated.inherit(self, self._delegated)
        return made

    def shutdown(self) -> None:
        """Leave the group, after issued calls have run for at most 5 s.

        The others get PeerLostError if they call. A call without ``async_op`` that another thread
        is in ends at once, on all ranks.
        """
        deadline = time.monotonic() + _DRAIN_S
        self._queue.drain(deadline)
        self._transfers.drain(deadline)
        self._delegated.shutdown()
        self._end("destroyed")

    def abort(self) -> None:
        """Leave the group at once; what was issued fails, here and on ranks in a call."""
        self._delegated.abort()
        self._end("aborted")

    def _end(self, how: str) -> None:
        self._dropped.detach()
        self._ended = self._ended or f"process group '{self._label}' (rank {self.rank()}) was {how}"
        _leave(self._queue, self._transfers, self._group, self._ended)
        # a FileStore's file goes when the last of these does
        self._store = self._given_store = None

    def _run(self, name: str, *arguments: Any) -> Any:
        """Do as ``_issue``, and let a profiler see the call: all of it, or how it is issued."""
        return _seen(name, self._issue, name, *arguments)

    def _issue(
        self,
        name: str,
        opts: Any,
        tensors: list[torch.Tensor],
        call: Callable[..., Any],
        *arguments: Any,
    ) -> Any:
        """Make a call in its turn: here if nobody asks for a handle and none is before it."""
        self._issued += 1
        if opts.timeout != _UNSET:
            call, arguments = self._within, (opts.timeout.total_seconds(), call, arguments)

        if not opts.asyncOp and self._queue.enter():
            try:
                call(*arguments)
            except (PeerLostError, GroupError) as error:
                self._reword(error)
                raise
            finally:
                self._queue.turn.release()
                self._queue.pass_on()
            return FinishedWork(tensors)
        if not opts.asyncOp and self._queue.is_inside():
            raise nested(name, self._group.name)

        arguments = apart(arguments)
        inference = bool(tensors) and tensors[0].is_inference()
        broken = self._group.broken

        def run() -> None:
            if broken is None:
                self._check(name)
            try:
                _call(inference, call, arguments)
            except (PeerLostError, GroupError) as error:
                self._reword(error)
                raise

        return self._enqueue(QueuedCall(name, run), tensors)

    def _reword(self, error: PeerLostError | GroupError) -> None:
        """Say that this rank has left, or of lost ranks what programs for torch look for."""
        if is_from_handler(error):
            return
        words = self._ended if isinstance(error, GroupError) else CLOSED
        if words is None and isinstance(error.__cause__, PeerLostError):
            words = CLOSED
        if words is not None and words not in str(error):
            error.args = f"{error} ({words})", *error.args[1:]

    def _check(self, name: str) -> None:
        """Raise what an operation fails with that was issued before ranks were lost."""
        lost = consequence(name, self._group.name, self.rank(), self._group.broken)
        if lost is not None:
            raise lost

    def _enqueue(self, operation: QueuedCall, tensors: Sequence[torch.Tensor] = ()) -> Any:
        self._queue.put(operation)
        return PendingWork(operation, list(tensors))

    def _within(
        self, timeout_s: float, call: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> None:
        """Make a call that has a timeout of its own."""
        usual_s = self._group.timeout_s
        self._group.set_timeout(timeout_s)
        try:
            call(*arguments)
        finally:
            self._group.set_timeout(usual_s)

    def _receive(self, tensor: torch.Tensor, source: int | None, tag: int) -> Any:
        name, recv = "recv" if source is not None else "recv_anysource", self._transfers.recv
        receive = _seen(name, recv, bare(tensor), source, tag, self._timeout.total_seconds())
        return PendingWork(receive.operation, [tensor], lambda: receive.sender)

    def _peer(self, name: str, peer: int) -> None:
        if not 0 <= peer < self.size() or peer == self.rank():
            raise RankError(
                f"{name}: group '{self._group.name}' (rank {self.rank()}): expected another of the "
                f"{self.size()} ranks in the group, got {peer}"
            )

    def _connect(self, source: int, destination: int, check: Callable[[], None]) -> Group:
        """Meet the other end of one direction of a pair."""
        sends = source == self.rank()
        peer = destination if sends else source
        way = f"{source}>{destination}"

        asked_at = time.monotonic()
        told: CollectiveError | None = None  # in the ranks of this group

        def look() -> None:
            nonlocal asked_at, told
            try:
                check()
                if time.monotonic() > asked_at + _ASK_EVERY_S:
                    lost = bridge.lost(self._group, peer)
                    if lost is not None:
                        raise lost
                    asked_at = time.monotonic()
            except CollectiveError as error:
                told = error
                raise

        try:
            name = f"{self._group.name} {way}"
            end = 0 if sends else 1
            return meet(self._store, way, end, 2, name=name, timeout_s=PATIENCE_S, check=look)
        except CollectiveError as error:
            if error is told:
                raise
            where = f"group '{self._group.name}' (rank {self.rank()})"
            # The error has its cause, or is the original error itself.
            raise translated(error, where, source, destination)  # noqa: B904

    def _elsewhere(self, tensor: torch.Tensor) -> Any:
        return self._delegated.group_for(self, tensor.device)


def _seen(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Make a call that a profiler sees."""
    if not _profiler_enabled():
        return call(*arguments)
    with torch.profiler.record_function(f"colltensor::{name}"):
        return call(*arguments)


def _call(inference: bool, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Make a call in another thread than its issuer's; it may write inference tensors too."""
    with torch.inference_mode(inference) if inference else contextlib.nullcontext():
        call(*arguments)


def _weakly(connect: Connect) -> Connect:
    """Return what calls a method without keeping its object: threads of the transfers have it."""
    method = weakref.WeakMethod(connect)

    def connected(source: int, destination: int, check: Callable[[], None]) -> Group:
        found = method()
        if found is None:
            raise GroupError(
                f"the transfers from rank {source} to rank {destination}: the process group was dropped"
            )
        return found(source, destination, check)

    return connected


def _leave(queue: ProcessGroupQueue, transfers: Transfers, group: Group, why: str) -> None:
    error = GroupError(why)
    transfers.close(error)
    group.destroy()
    queue.close(error)


def _leave_beside(queue: ProcessGroupQueue, transfers: Transfers, group: Group, name: str) -> None:
    """Leave a group in a thread of its own: this one collects garbage, and may have any lock."""
    why = f"process group '{name}' was dropped"
    # no thread can be started: the interpreter ends, and its groups with it
    with contextlib.suppress(RuntimeError):
        leaving = threading.Thread(target=_leave, args=(queue, transfers, group, why), daemon=True)
        leaving.start()
