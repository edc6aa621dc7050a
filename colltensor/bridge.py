"""What the bridges to JAX and torch.distributed need of a group, and its users never do.

These functions are part of ``Group`` but for their place: its public class has the methods for
users alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from colltensor.errors import PeerLostError
from colltensor.group import Group

_BRIDGE = b"b"
"""The kind of the questions that bridges ask."""


def follow(group: Group, wait: Callable[[], None], defer: Callable[[bool], None]) -> None:
    """Keep the order with calls that reach the group's backend another way (``complete``).

    Args:
        group: The group.
        wait: Called first in every collective from now on, in the caller's thread. It waits for
            such calls.
        defer: Called with True when asynchronous calls wait for their turn, and with False when
            none does any more. On registration it is called at once, with the present state.
    """
    group._engine.before = wait
    group._queue.watch = defer
    if group._fastpath is not None:
        group._fastpath.before = wait
    group._allreduce = group._barrier = None  # by way of the engine, which waits
    group._queue.notify_watch()


def complete(
    group: Group, operation: int, op: int, root: int, source: int, tensors: Sequence[Any], code: int
) -> bool:
    """End a call that was begun on the group's backend itself.

    Returns False if it must be made as a call of the group.

    Args:
        group: The group.
        operation: A number of ``colltensor.operations.NATIVE``.
        op: The reduce op, 255 for none.
        root: The root, or the rank to send to; -1 for none.
        source: The rank to receive from; -1 for none.
        tensors: Tensors with the dtype and count that the ranks compare.
        code: What the call returned.

    Raises:
        CollectiveError: As every collective.
    """
    return group._fastpath is not None and bool(
        group._fastpath.complete(operation, op, root, source, tensors, code)
    )


def shared_memory(group: Group) -> int:
    """Return the group's number in the native library, or -1 if it is not in shared memory."""
    return -1 if group._agreeing is None else group._agreeing.number


def progress(group: Group) -> tuple[int, ...] | None:
    """Return None while no call of host tensors runs or waits.

    Otherwise return what changes from call to call.
    """
    return group._engine.progress()


def lost(group: Group, rank: int) -> PeerLostError | None:
    """Ask whether ``rank`` is still there, and return the error if it is not.

    May be called in any thread and whatever the rank does.
    """
    return None if group._control is None else group._control.gone("asking", [rank])


def ask(group: Group, rank: int, question: bytes) -> bytes | None:
    """Ask what ``answer_with`` has there, in any thread.

    Returns None if no answer comes within a second.
    """
    return None if group._control is None else group._control.inquire(rank, _BRIDGE + question)


def answer_with(group: Group, answer: Callable[[int, bytes], bytes]) -> None:
    """Have ``answer`` called, in another thread, with the rank that asks and its question.

    It must not wait.
    """
    if group._control is not None:
        group._control.answer_with(_BRIDGE, answer)
