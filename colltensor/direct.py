"""Direct: the short way of a group's calls, on which plain tensors go to the backend as their frameworks made them.

What is not plain (strided, read-only, immutable, of a type that DLPack cannot name, in a tree) takes the general way
through ``arguments``, ``buffers`` and ``engine``; the ranks of one call may come either way. Imports no framework.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from colltensor.adapters import direct, unnoted
from colltensor.arguments import Arguments
from colltensor.backends.base import DIRECT, DIRECT_DONE, DIRECT_MISMATCH, SigningBackend
from colltensor.engine import Call, Engine, Transfer
from colltensor.errors import MismatchError
from colltensor.types import ReduceOp

NO_OP: Final = 255
NO_RANK: Final = -1


def never(tensor: Any) -> bool:
    """Return False: such a tensor is never taken as it is."""
    return False


NOT_DIRECT: Final = (never, None)
"""The entry of ``colltensor.adapters.direct`` for a type that it does not have."""

_SENDS, _RECEIVES = 256, 512
_NAMES: Final = tuple(DIRECT)


class Direct:
    """The direct calls of one group. ``Group`` takes the first step of an allreduce and of a barrier itself.

    Attributes:
        before: Called first in every call, or None.
    """

    def __init__(self, backend: SigningBackend, engine: Engine, arguments: Arguments, rank: int) -> None:
        self._backend = backend
        self._call = backend.direct
        self._engine = engine
        self._queue = engine.queue
        self._arguments = arguments
        self._rank = rank
        self.before: Callable[[], None] | None = None

    def call(
        self, operation: int, op: int, root: Any, source: Any, tensors: Sequence[Any], written: int, written_end: int
    ) -> bool:
        """Run an operation on tensors as they are; False if it must go the general way.

        Args:
            operation: A number of ``DIRECT``.
            op: The reduce op, ``NO_OP`` for none.
            root: The root, or the rank to send to; ``NO_RANK`` for none. Whatever is no rank goes the general way.
            source: The rank to receive from; ``NO_RANK`` for none.
            tensors: All tensors of the call, in the backend's order.
            written: The first of them that is written on this rank.
            written_end: The one after the last.

        Raises:
            CollectiveError: As every collective.
        """
        if self.before is not None:
            self.before()
        if not self._queue.idle:
            return False
        noted = False
        for tensor in tensors:
            if tensor.__class__ not in unnoted:
                noted = True
                if not _is_plain(tensor):
                    return False
        try:
            code = self._call(operation, op, root, source, *tensors)
        except BaseException as error:  # noqa: BLE001 - raised on there, unless it is an export's
            self.failed(_NAMES[operation], error)
            return False
        if code and not self.finish(operation, op, root, source, tensors, code):
            return False
        if noted:
            for tensor in tensors[written:written_end]:
                note = direct[tensor.__class__][1]
                if note is not None:
                    note(tensor)
        return True

    def renew(self) -> None:
        """Take the backend's function again, which has another timeout."""
        self._call = self._backend.direct

    def finish_allreduce(self, tensor: Any, op: ReduceOp, code: int) -> bool:
        """End an allreduce that was not done at once; False if it must go the general way."""
        return self.finish(DIRECT["allreduce"], op, NO_RANK, NO_RANK, (tensor,), code)

    def finish_barrier(self, code: int) -> bool:
        """End a barrier that was not done at once; False if it must go the general way."""
        return self.finish(DIRECT["barrier"], NO_OP, NO_RANK, NO_RANK, (), code)

    def finish(self, operation: int, op: int, root: int, source: int, tensors: Sequence[Any], code: int) -> bool:
        """End a call that was not done at once; False if it must go the general way."""
        name = _NAMES[operation]
        self._engine.check(name)
        try:
            code = self._backend.settle(name, code, lambda: self._call(operation, op, root, source, *tensors))
        except BaseException as error:  # noqa: BLE001 - abort() raises
            self._engine.abort(name, error)
        if code & 0xFF == DIRECT_MISMATCH:
            self._explain(name, op, root, source, tensors, code)
        return code == DIRECT_DONE

    def failed(self, name: str, error: BaseException) -> None:
        """Return if a tensor could not be exported, which the general way explains; break the group over the rest."""
        if isinstance(error, (BufferError, TypeError, ValueError)) and not self._backend.begun():
            return
        self._engine.abort(name, error)

    def _explain(
        self, name: str, op: int, root: int, source: int, tensors: Sequence[Any], code: int
    ) -> NoReturn:
        """Raise the MismatchError of a call on which the ranks disagree, in the words of the general way."""
        reduce_op = None if op == NO_OP else ReduceOp(op)
        buffers = [
            self._arguments.tensor(name, "tensor", tensor, reduce_op, False, False, None, False) for tensor in tensors
        ]
        deadline = time.monotonic() + self._engine.timeout_s
        try:
            if name == "transfer":
                pairs = []
                if code & _SENDS:
                    pairs.append(Transfer(self._rank, root, buffers[0], _moves_nothing))
                if code & _RECEIVES:
                    pairs.append(Transfer(source, self._rank, buffers[-1], _moves_nothing))
                self._backend.explain_transfer(self._engine.signed(pairs), deadline)
            argument = buffers[0] if buffers else None
            call = Call(name, argument, reduce_op, root, True, (), _moves_nothing, (), _nothing)
            sequence = self._backend.calls()
            self._backend.explain(call.signature(sequence), lambda: call.describe(sequence), deadline)
        except MismatchError:
            raise
        except BaseException as error:  # noqa: BLE001 - abort() raises
            self._engine.abort(name, error)
        raise AssertionError("explain() always raises")


def _is_plain(tensor: Any) -> bool:
    plain = direct.get(tensor.__class__, NOT_DIRECT)[0]
    return plain is None or plain(tensor)


def _moves_nothing(deadline: float) -> None:
    pass


def _nothing() -> None:
    pass
