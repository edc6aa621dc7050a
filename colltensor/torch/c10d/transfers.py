"""Transfers: send and recv of a process group, matched by source and tag as MPI does.

Every direction of every pair of ranks has a group and a thread of its own, made when it is first used, so that nothing
that one of them waits for keeps another waiting: two ranks may both send before they receive, and a receive may name a
later message's tag. A message is a header, in which a short one is, and, when a receive was issued that takes it, the
bytes of a long one.

Imports torch, and of the package errors and group.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

import torch

from colltensor.errors import CollectiveError, CollectiveTimeoutError, GroupError
from colltensor.group import Group
from colltensor.torch.c10d.deadlines import Deadline, Deadlines
from colltensor.torch.c10d.header import Header
from colltensor.torch.c10d.inbox import Inbox, Receive, bytes_of, translating
from colltensor.torch.c10d.line import Line
from colltensor.torch.c10d.work import Operation

PATIENCE_S: Final = 7 * 86400.0
"""The timeout of the groups in here: ``Deadlines`` ends operations, and between them a group waits for the next."""
_RECEIVER: Final = 1

Connect = Callable[[int, int, Callable[[], None]], Group]
"""Makes the group of a source and a destination, in whose order the two are its ranks; calls the function meanwhile."""


class Transfers:
    """All transfers of one rank of a process group."""

    def __init__(self, name: str, rank: int, size: int, connect: Connect) -> None:
        self._name = name
        self._rank = rank
        self._connect = connect
        self._failure: CollectiveError | None = None
        self._guard = threading.Lock()
        self._outboxes: dict[int, Line] = {}
        self._headers: dict[int, Header] = {}
        self._groups: dict[tuple[int, int], Group] = {}
        self._deadlines = Deadlines(self._expire)
        self._inbox = Inbox(name, rank, size, self._group)

    def send(self, tensor: torch.Tensor, destination: int, tag: int, timeout_s: float) -> Operation:
        """Send to ``destination``; ends when a receive there has taken the message, or that rank has a short one."""
        operation = Operation(f"send to rank {destination}, tag {tag}", lambda: self._deliver(tensor, destination, tag))
        with self._guard:
            if self._failure is not None:
                raise self._refusal("send")
            outbox = self._outboxes.get(destination)
            if outbox is None:
                outbox = self._outboxes[destination] = Line(f"{self._name} to {destination}")
                self._headers[destination] = Header()
        self._deadlines.add(operation, timeout_s, (destination,))
        try:
            outbox.put(operation)
        except RuntimeError as error:  # no thread can be started
            operation.end(error)  # it does not expire
            raise
        return operation

    def recv(self, tensor: torch.Tensor, source: int | None, tag: int, timeout_s: float) -> Receive:
        """Receive the next message of ``source``, or of any rank, with such a tag."""
        whom = "any rank" if source is None else f"rank {source}"
        receive = Receive(source, tag, tensor, Operation(f"recv from {whom}, tag {tag}"))
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
        """Wait until everything was sent, or until ``deadline``, a value of ``time.monotonic()``."""
        with self._guard:
            outboxes = list(self._outboxes.values())
        for outbox in outboxes:
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
            raise self._failure

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

    def _deliver(self, tensor: torch.Tensor, destination: int, tag: int) -> None:
        try:
            group = self._group(self._rank, destination)
            message, header = tensor.resolve_conj().resolve_neg().contiguous(), self._headers[destination]
            is_inline = header.write(message, tag)
            with translating(f"group '{self._name}' (rank {self._rank})", self._rank, destination):
                group.send(header.tensor, _RECEIVER)
                if not is_inline:
                    group.send(bytes_of(message), _RECEIVER)
        except CollectiveError as error:
            if self._failure is not None and error is not self._failure:
                raise self._failure from error
            raise

    def _expire(self, deadline: Deadline) -> None:
        operation, ranks = deadline.operation, deadline.ranks
        whom = f"rank {ranks[0]} did not come" if ranks else "no rank came"
        error = CollectiveTimeoutError(
            f"{operation.name}: group '{self._name}' (rank {self._rank}): timed out after {deadline.timeout_s:g} s: "
            f"{whom}; make the process group again on all ranks, with a longer timeout if that is how long it takes",
            ranks,
        )
        if operation.end(error):
            self.close(error)
            operation.tell()
