"""Transfers: send and recv of a process group, matched by source and tag as MPI does.

Every direction of every pair of ranks has a group and a thread of its own, made when it is first
used. So nothing that one of them waits for keeps another waiting. Two ranks may both send before
they receive, and a receive may name a later message's tag. A message is a header, which contains
the bytes of a short one. Those of a long one follow when a receive was issued that takes it.
"""

from __future__ import annotations

import collections
import functools
import threading
import time
import weakref
from collections.abc import Callable
from typing import Final, NamedTuple

import torch

from colltensor.errors import CollectiveError, CollectiveTimeoutError, GroupError, without_frames
from colltensor.group import Group
from colltensor.torch.c10d.inbox import Header, Inbox, Receive, bytes_of, translating
from colltensor.torch.c10d.standoffs import Progress, Standoffs
from colltensor.torch.c10d.work import ProcessGroupQueue, QueuedCall

PATIENCE_S: Final = 7 * 86400.0
"""The timeout of the groups in here.

``Deadlines`` ends operations, and between them a group waits for the next.
"""
_RECEIVER: Final = 1
_PRUNE_FROM: Final = 64
_LONGEST_WAIT_S: Final = 86400.0

Connect = Callable[[int, int, Callable[[], None]], Group]
"""Makes the group of a source and a destination, in whose order the two are its ranks.

Calls the function meanwhile.
"""


class Transfers:
    """All transfers of one rank of a process group."""

    def __init__(
        self,
        name: str,
        rank: int,
        size: int,
        connect: Connect,
        ask: Callable[[int, bytes], bytes | None],
        lost: Callable[[int], CollectiveError | None],
    ) -> None:
        """Begin with none; ``ask`` and ``lost`` are those of ``Group``, for the ``standoffs``."""
        self._name = name
        self._rank = rank
        self._connect = connect
        self._failure: CollectiveError | None = None

        self._guard = threading.Lock()
        self._outboxes: dict[int, ProcessGroupQueue] = {}
        self._headers: dict[int, Header] = {}
        self._groups: dict[tuple[int, int], Group] = {}
        self._deadlines = Deadlines(self._expire)
        self._inbox = Inbox(name, rank, size, self._group)
        self.standoffs = Standoffs(name, rank, ask, lost, self.close)

        # the number of the last message, by destination
        self._issued: collections.Counter[int] = collections.Counter()
        # and of the last that was sent, or is
        self._sent: collections.Counter[int] = collections.Counter()
        # those that are not done, and count
        self._open: collections.defaultdict[int, set[int]] = collections.defaultdict(set)
        self._held: dict[tuple[int, int], threading.Event] = {}  # of those that may soon

    def send(
        self, tensor: torch.Tensor, destination: int, tag: int, timeout_s: float
    ) -> QueuedCall:
        """Send; ends when a receive there has taken the message, or the rank a short one."""
        with self._guard:
            if self._failure is not None:
                raise self._refusal("send")
            outbox = self._outboxes.get(destination)
            if outbox is None:
                outbox = ProcessGroupQueue(f"{self._name} to {destination}")
                self._outboxes[destination], self._headers[destination] = outbox, Header()
            number = self._issued[destination] = self._issued[destination] + 1
            self._open[destination].add(number)

        operation = QueuedCall(
            f"send to rank {destination}, tag {tag}",
            lambda: self._deliver(tensor, destination, number, tag),
        )
        operation.watch = functools.partial(self._watch_send, operation, destination, number)
        self._deadlines.add(operation, timeout_s, (destination,))

        try:
            outbox.put(operation)
        except RuntimeError as error:  # no thread can be started
            self._open[destination].discard(number)
            operation.end(error)  # it does not expire
            raise
        return operation

    def recv(self, tensor: torch.Tensor, source: int | None, tag: int, timeout_s: float) -> Receive:
        """Receive the next message of ``source``, or of any rank, with such a tag."""
        whom = "any rank" if source is None else f"rank {source}"
        receive = Receive(source, tag, tensor, QueuedCall(f"recv from {whom}, tag {tag}"))
        if source is not None:
            receive.operation.watch = functools.partial(self._watch_receive, receive, source)
        with self._guard:
            if self._failure is not None:
                raise self._refusal("recv")
        self._deadlines.add(receive.operation, timeout_s, () if source is None else (source,))
        try:
            self._inbox.add(receive)
        except RuntimeError as error:  # no thread can be started
            receive.operation.end(error)  # it does not expire
            raise
        return receive

    def drain(self, deadline: float) -> None:
        """Wait until everything was sent, or until ``deadline`` on ``time.monotonic()``."""
        with self._guard:
            outboxes = dict(self._outboxes)
        for destination, outbox in outboxes.items():
            if self._open[destination]:  # else what runs there is a message that was refused
                outbox.drain(deadline)

    def close(self, error: CollectiveError) -> None:
        """End everything with ``error``; idempotent."""
        with self._guard:
            if self._failure is not None:
                return
            self._failure = error
            groups, outboxes = list(self._groups.values()), list(self._outboxes.values())
        self._deadlines.close()
        self._inbox.close(error)
        for group in groups:
            group.destroy()
        for outbox in outboxes:
            outbox.close(error)

    def _refusal(self, name: str) -> GroupError:
        error = GroupError(
            f"{name}: the transfers of group '{self._name}' (rank {self._rank}) have ended: {self._failure}; destroy "
            "the process group and make it again on all ranks"
        )
        error.__cause__ = self._failure
        return error

    def _check(self) -> None:
        if self._failure is not None:
            raise without_frames(self._failure)

    def _group(self, source: int, destination: int) -> Group:
        """Return the group of one direction; only one thread asks for it."""
        found = self._groups.get((source, destination))
        if found is None:
            found = self._connect(source, destination, self._check)
            with self._guard:
                if self._failure is None:
                    self._groups[source, destination] = found
                    return found
            found.destroy()
            self._check()
        return found

    def _watch_send(self, operation: QueuedCall, destination: int, number: int) -> None:
        """Wait for a send."""
        self.standoffs.wait_for(
            operation,
            True,
            destination,
            functools.partial(self._send_progress, operation, destination, number),
            functools.partial(self._held.__setitem__, (destination, number), threading.Event()),
            functools.partial(self._release, destination, number),
            functools.partial(self._refuse_send, operation, destination, number),
        )

    def _watch_receive(self, receive: Receive, source: int) -> None:
        """Wait for a receive."""
        inbox = self._inbox
        self.standoffs.wait_for(
            receive.operation,
            False,
            source,
            functools.partial(self._receive_progress, receive, source),
            functools.partial(inbox.hold, receive),
            functools.partial(inbox.release, receive),
            lambda error, _: inbox.refuse(receive, error),
        )

    def _send_progress(
        self, operation: QueuedCall, destination: int, number: int
    ) -> Progress | None:
        """Return how far the two ranks are, if a send waits for its recv.

        Return None if a recv of this rank is issued that ``destination`` may wait for. Other sends
        that were issued before may wait as well: they are taken first, by a recv all the same.
        """
        taken = self._inbox.taken(destination)
        if taken is None or operation.done() or number not in self._open[destination]:
            return None
        return Progress(number, taken)

    def _receive_progress(self, receive: Receive, source: int) -> Progress | None:
        """Return how far the two ranks are, if a recv waits for a send and none is issued."""
        taken = self._inbox.taken_before(receive)
        return None if taken is None or self._open[source] else Progress(self._sent[source], taken)

    def _refuse_send(
        self,
        operation: QueuedCall,
        destination: int,
        number: int,
        error: CollectiveError,
        other: Progress,
    ) -> None:
        """End a send that both ranks count for nothing, as they do the other rank's."""
        self._inbox.withdraw(destination, other.sent)
        self._open[destination].discard(number)
        operation.end(error)
        self._outboxes[destination].withdraw(operation)
        self._release(destination, number)

    def _release(self, destination: int, number: int) -> None:
        held = self._held.pop((destination, number), None)
        if held is not None:
            held.set()

    def _counts(self, destination: int, number: int) -> bool:
        """Return whether a message is to be delivered, once it is decided."""
        held = self._held.get((destination, number))
        if held is not None:
            held.wait()
        return number in self._open[destination]

    def _deliver(self, tensor: torch.Tensor, destination: int, number: int, tag: int) -> None:
        try:
            group = self._group(self._rank, destination)
            if not self._counts(destination, number):
                return

            message = tensor.resolve_conj().resolve_neg().contiguous()
            header = self._headers[destination]
            is_inline = header.write(message, number, tag)
            self._sent[destination] = number
            with translating(f"group '{self._name}' (rank {self._rank})", self._rank, destination):
                group.send(header.tensor, _RECEIVER)
                if self._counts(destination, number) and not is_inline:
                    group.send(bytes_of(message), _RECEIVER)
        except CollectiveError as error:
            if self._failure is not None:
                raise without_frames(self._failure) from error
            raise
        finally:
            self._open[destination].discard(number)

    def _expire(self, deadline: Deadline) -> None:
        operation, ranks = deadline.operation(), deadline.ranks
        if operation is None:
            return
        whom = f"rank {ranks[0]} did not come" if ranks else "no rank came"
        tags = self._inbox.tags_beside(operation)
        if tags:
            whom += (
                f" with that tag, only with {', '.join(map(str, tags))}, for which no recv waits"
            )
        error = CollectiveTimeoutError(
            f"{operation.name}: group '{self._name}' (rank {self._rank}): timed out after {deadline.timeout_s:g} s: "
            f"{whom}; make the process group again on all ranks, with a longer timeout if that is how long it takes",
            ranks,
        )
        if operation.end(error):
            self.close(error)
            operation.notify()


class Deadline(NamedTuple):
    """When an operation expires, and what is said then."""

    at: float
    operation: weakref.ref[QueuedCall]
    timeout_s: float
    ranks: tuple[int, ...]

    def is_over(self) -> bool:
        """Return whether the operation is done; nothing else keeps one that is."""
        operation = self.operation()
        return operation is None or operation.done()


class Deadlines:
    """Calls ``expire`` for each operation that is not done in time."""

    def __init__(self, expire: Callable[[Deadline], None]) -> None:
        self._expire = expire
        self._changed = threading.Condition(threading.Lock())
        self._pending: list[Deadline] = []
        self._prune_at = _PRUNE_FROM
        self._wake_at = 0.0
        self._started = self._closed = False

    def add(self, operation: QueuedCall, timeout_s: float, ranks: tuple[int, ...]) -> None:
        """Let ``operation`` expire after ``timeout_s``, for which ``ranks`` are to blame.

        Raises:
            RuntimeError: No thread can be started; nothing is left behind.
        """
        deadline = Deadline(time.monotonic() + timeout_s, weakref.ref(operation), timeout_s, ranks)
        with self._changed:
            if len(self._pending) >= self._prune_at:
                self._pending = [entry for entry in self._pending if not entry.is_over()]
                self._prune_at = 2 * len(self._pending) + _PRUNE_FROM
            if not self._started:
                threading.Thread(
                    target=self._serve, name="colltensor deadlines", daemon=True
                ).start()
                self._started = True
            self._pending.append(deadline)
            if deadline.at < self._wake_at:
                self._changed.notify_all()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._pending.clear()
            self._changed.notify_all()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._wake_at = min((entry.at for entry in self._pending), default=float("inf"))
                left_s = min(self._wake_at - time.monotonic(), _LONGEST_WAIT_S)
                if left_s > 0 and not self._closed:
                    self._changed.wait(left_s)
                if self._closed:
                    return
                now = time.monotonic()
                late = [entry for entry in self._pending if entry.at <= now]
                self._pending = [entry for entry in self._pending if entry.at > now]
            for entry in late:
                if not entry.is_over():
                    self._expire(entry)
