"""FastPath: calls whose tensors go to the backend as their frameworks made them.

What is not directly exportable takes the slow path through ``arguments``, ``buffers`` and
``engine``. That is several tensors of which one is strided, read-only, immutable, of a type that
DLPack cannot name, or in a tree. The ranks of one call may come either way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from colltensor.adapters import is_exportable, no_write_notice, notify_all_written, notify_written
from colltensor.arguments import Arguments
from colltensor.backends.base import (
    FAST_BUSY,
    FAST_DONE,
    FAST_LARGE,
    FAST_MISMATCH,
    FAST_PENDING,
    AgreeingBackend,
)
from colltensor.buffers import Buffers
from colltensor.dlpack import export
from colltensor.engine import Call, Engine, Transfer
from colltensor.errors import CollectiveError, MismatchError
from colltensor.operations import COMPARES_LAST, NATIVE, NATIVE_NAMES
from colltensor.types import ReduceOp
from colltensor.work import EndedWork, IssuedWork, Work, failed_work

NO_OP: Final = 255
NO_RANK: Final = -1
_NOBODY: Final = -2
"""No rank, and not none either: a backend refuses it."""

_SENDS, _RECEIVES = 256, 512


class FastPath:
    """The fast calls of one group, each a function of its own.

    So nothing is passed that is known beforehand.

    Attributes:
        before: Called first in every call, or None.
        barrier, allgather, alltoall: Those.
        allreduce, reducescatter: By reduce op.
        reduce: By reduce op, then by root.
        broadcast, gather, scatter: By root.
        send, recv: By the other rank.
        sendrecv: By the rank to send to, then by the rank to receive from.
        allgather_stack, gather_stack, reducescatter_stack, scatter_stack, alltoall_stack: Those of
            one array of all ranks' tensors, where the others have lists of them.
    """

    def __init__(
        self,
        backend: AgreeingBackend,
        engine: Engine,
        arguments: Arguments,
        rank: int,
        world_size: int,
    ) -> None:
        self.before: Callable[[], None] | None = None
        self.backend = backend
        self.engine = engine
        self.arguments = arguments
        self.rank = rank
        self._world_size = world_size
        self.renew()

    def renew(self) -> None:
        """Make the functions, whose timeout is the backend's of now."""
        self.barrier = self._one("barrier")
        self.allreduce = [self._one("allreduce", op) for op in ReduceOp]
        self.reduce = [self._by_rank("reduce", op) for op in ReduceOp]
        self.broadcast = self._by_rank("broadcast")

        self.allgather, self.allgather_stack = (
            self._one("allgather", stacked=stacked) for stacked in (False, True)
        )
        self.gather, self.gather_stack = (
            self._by_rank("gather", stacked=stacked) for stacked in (False, True)
        )
        self.reducescatter, self.reducescatter_stack = (
            [self._one("reducescatter", op, stacked=stacked) for op in ReduceOp]
            for stacked in (False, True)
        )

        self.scatter, self.scatter_stack = (
            self._by_rank("scatter", stacked=stacked) for stacked in (False, True)
        )
        self.alltoall, self.alltoall_stack = (
            self._one("alltoall", stacked=stacked) for stacked in (False, True)
        )

        self.send = self._by_rank("transfer")
        self.recv = Ranks(
            self._world_size, lambda source: self._one("transfer", NO_OP, NO_RANK, source)
        )
        self.sendrecv = Ranks(
            self._world_size,
            lambda to: Ranks(
                self._world_size, lambda source: self._one("transfer", NO_OP, to, source)
            ),
        )

    def complete(
        self, operation: int, op: int, root: int, source: int, tensors: Sequence[Any], code: int
    ) -> bool:
        """End a call that was begun on the backend itself and came to ``code``.

        See ``bridge.complete``.
        """
        return self._one(NATIVE_NAMES[operation], op, root, source).finish(tensors, code)

    def _one(
        self,
        name: str,
        op: int = NO_OP,
        root: int = NO_RANK,
        source: int = NO_RANK,
        stacked: bool = False,
    ) -> FastCall:
        return FastCall(self, name, op, root, source, stacked)

    def _by_rank(self, name: str, op: int = NO_OP, stacked: bool = False) -> Ranks:
        return Ranks(self._world_size, lambda rank: self._one(name, op, rank, stacked=stacked))


class Ranks(dict[int, Any]):
    """Something for each rank of a group, made when it is first asked for.

    For what is no rank, it is what always refuses.
    """

    def __init__(self, world_size: int, make: Callable[[int], Any]) -> None:
        super().__init__()
        self._world_size = world_size
        self._make = make

    def __missing__(self, rank: int) -> Any:
        if not 0 <= rank < self._world_size:
            return self._make(_NOBODY)
        made = self[rank] = self._make(rank)
        return made


class FastCall:
    """One operation of one group, with its op and its ranks."""

    __slots__ = (
        "_backend",
        "_call",
        "_engine",
        "_group",
        "_issue",
        "_operation",
        "_patient",
        "_queue",
        "_stacked",
        "function",
    )

    def __init__(
        self, group: FastPath, operation: str, op: int, root: int, source: int, stacked: bool
    ) -> None:
        self._group = group
        self._backend = group.backend
        self._engine = group.engine
        self._queue = group.engine.queue
        self._operation = operation
        self._call = op, root, source
        self._stacked = stacked
        self._issue: Callable[..., int] | None = None
        self.function, self._patient = self._functions()

    def _functions(self) -> tuple[Callable[..., int], Callable[..., int]]:
        """Return the backend's functions for this call."""
        return self._backend.fast_call(NATIVE[self._operation], *self._call, self._stacked)

    def run(self, tensors: Sequence[Any], written: int, written_end: int) -> bool:
        """Run it on tensors as they are; False if it must go the slow path.

        Args:
            tensors: All tensors of the call, in the backend's order.
            written: The first of them that is written on this rank.
            written_end: The one after the last.

        Raises:
            CollectiveError: As every collective.
        """
        if self._group.before is not None:
            self._group.before()
        if not self._queue.idle and not self._queue.rests():
            return False

        needs_write_notice = False
        for tensor in tensors:
            if tensor.__class__ not in no_write_notice:
                needs_write_notice = True
                if not is_exportable(tensor):
                    return False

        try:
            code = self.function(*tensors)
        except BaseException as error:  # noqa: BLE001 - raised on there, unless it is an export's
            self.failed(tensors, error)
            return False

        if code and not self.finish(tensors, code):
            return False
        if needs_write_notice:
            for tensor in tensors[written:written_end]:
                notify_written(tensor)
        return True

    def pair(self, first: Any, second: Any, written: Any) -> bool:
        """Do as ``run`` with two tensors, of which ``written`` is one."""
        if self._group.before is not None:
            self._group.before()
        if not self._queue.idle and not self._queue.rests():
            return False

        needs_write_notice = (
            first.__class__ not in no_write_notice or second.__class__ not in no_write_notice
        )
        if needs_write_notice and not (is_exportable(first) and is_exportable(second)):
            return False

        try:
            code = self.function(first, second)
        except BaseException as error:  # noqa: BLE001 - raised on there, unless it is an export's
            self.failed((first, second), error)
            return False

        if code and not self.finish((first, second), code):
            return False
        if needs_write_notice:
            notify_written(written)
        return True

    def issue(
        self, tensors: Sequence[Any], written: int, written_end: int, result: Any
    ) -> Work | None:
        """Begin it on tensors as they are, behind what was issued before.

        Returns None if it must go the slow path. Where nothing is before it and the other ranks are
        there it is made at once. The framework of a written tensor is notified when somebody sees
        that the call has ended.

        Args:
            tensors: As for ``run``.
            written: As for ``run``.
            written_end: As for ``run``.
            result: What the call returns.

        Raises:
            RuntimeError: No thread can be started; nothing was begun.
        """
        queue, engine = self._queue, self._engine
        if self._group.before is not None or engine.broken is not None or queue.busy:
            return None

        needs_write_notice: Sequence[Any] = ()
        for tensor in tensors:
            if tensor.__class__ not in no_write_notice:
                if not is_exportable(tensor):
                    return None
                needs_write_notice = tensors[written:written_end]

        code = FAST_LARGE
        queue.man_native()
        try:
            if (queue.idle or queue.rests()) and self.function is not self._patient:
                code = self.function(*tensors)
                if code == FAST_DONE:
                    if needs_write_notice:
                        notify_all_written(needs_write_notice)
                    return EndedWork(result)

            if code in (FAST_PENDING, FAST_LARGE, FAST_BUSY) and queue.is_native:
                exports = [export(tensor) for tensor in tensors]
                work = IssuedWork(
                    self._operation,
                    queue,
                    (tensors, exports),
                    result,
                    self._end,
                    needs_write_notice,
                    notify_all_written,
                )

                if code == FAST_PENDING:
                    issued = queue.issue(work, self._backend.hand_over, (), first=True)
                else:
                    issued = queue.issue(work, self._issue or self._issuing(), exports)
                if issued:
                    return work

                # A call that has begun cannot go the slow path any more: it is ended below.
                if code != FAST_PENDING:
                    return None
        except BaseException as error:  # noqa: BLE001 - raised on there, unless it is an export's
            self.failed(tensors, error)
            return None

        try:
            if not self.finish(tensors, code):
                return None
        except CollectiveError as error:
            return failed_work(error)
        return EndedWork(result)

    def _issuing(self) -> Callable[..., int]:
        self._issue = self._backend.issuing(NATIVE[self._operation], *self._call, self._stacked)
        return self._issue

    def finish(self, tensors: Sequence[Any], code: int) -> bool:
        """End a call that was not done at once; False if it must go the slow path."""
        if self._engine.broken is not None:
            self._backend.abandon_pending()
            self._engine.check(self._operation)
        if code == FAST_BUSY and not self._queue.is_inside():
            self._queue.warn_of_threads("another")
        try:
            if code == FAST_LARGE:
                code = self._patient(*tensors)
            code = self._backend.complete(self._operation, code)
        except BaseException as error:  # noqa: BLE001 - abort() raises
            self._engine.abort(self._operation, error)
        if code & 0xFF == FAST_MISMATCH:
            self._explain(tensors, code)
        return code == FAST_DONE

    def _end(self, tensors: Sequence[Any], code: int) -> bool:
        """End a call that was issued and came to ``code`` in the queue's thread; see ``finish``."""
        self._engine.check_issued(self._operation)
        return self.finish(tensors, code)

    def failed(self, tensors: Sequence[Any], error: BaseException) -> None:
        """Return if a tensor could not be exported, which the slow path explains.

        Break the group over the rest. A signal's handler may raise the same types, before, between
        or after the steps of the call.
        """
        if isinstance(error, (BufferError, TypeError, ValueError)) and not self._backend.exports(
            tensors
        ):
            return
        self._engine.abort(self._operation, error)

    def _explain(self, tensors: Sequence[Any], code: int) -> NoReturn:
        """Raise the MismatchError of a call on which the ranks disagree.

        Its words are those of the slow path.
        """
        name, (op, root, _), group = self._operation, self._call, self._group
        reduce_op = None if op == NO_OP else ReduceOp(op)
        buffers = [
            group.arguments.tensor(name, "tensor", tensor, reduce_op, False, False, None, False)
            for tensor in tensors
        ]

        if name == "transfer":
            self.explain_transfers(buffers[0], buffers[-1], code)

        argument = (buffers[-1] if name in COMPARES_LAST else buffers[0]) if buffers else None
        if self._stacked and name == "alltoall":
            argument = group.arguments.blocks(
                name, "input_list", tensors[-1], None, None, False, None
            )

        self.explain_collective(
            Call(name, argument, reduce_op, root, True, (), moves_nothing, (), nothing)
        )

    def explain_transfers(self, sent: Buffers, received: Buffers, code: int) -> NoReturn:
        """Raise the MismatchError of the transfers that differ."""
        rank, (_, to, source) = self._group.rank, self._call
        pairs = []
        if code & _SENDS:
            pairs.append(Transfer(rank, to, sent, moves_nothing))
        if code & _RECEIVES:
            pairs.append(Transfer(source, rank, received, moves_nothing))
        signatures = self._engine.signatures(pairs)
        self._raise_mismatch(lambda deadline: self._backend.explain_transfer(signatures, deadline))

    def explain_collective(self, call: Call) -> NoReturn:
        """Raise the MismatchError of a collective."""
        sequence = self._backend.calls()
        signature = call.signature(sequence)
        self._raise_mismatch(
            lambda deadline: self._backend.explain(
                signature, lambda: call.describe(sequence), deadline
            )
        )

    def _raise_mismatch(self, explain: Callable[[float], None]) -> NoReturn:
        """Have the ranks tell each other what they called; ``explain`` raises what comes of it."""
        try:
            explain(time.monotonic() + self._engine.timeout_s)
        except MismatchError:
            raise
        except BaseException as error:  # noqa: BLE001 - abort() raises
            self._engine.abort(self._operation, error)
        raise AssertionError("explain() always raises")


def moves_nothing(deadline: float) -> None:
    """Stand for the payload of a call that is only explained."""


def nothing() -> None:
    """Stand for its result."""
