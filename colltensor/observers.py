"""Observers: notified of every operation of this process's groups, for metrics, traces and logs.

Without an observer nothing of this is in the way of a call. The methods of ``Group`` and
``MultiGpu`` are replaced by observed ones when the first observer comes. They are put back when the
last one goes.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from colltensor.adapters import adapter_of
from colltensor.errors import OptionError, TensorError
from colltensor.group import Group
from colltensor.multigpu import MultiGpu
from colltensor.operations import COLLECTIVES
from colltensor.tree import flatten, is_container
from colltensor.work import Work


class Operation:
    """One operation of one rank, as observers see it.

    Attributes:
        name: The method of ``Group`` that was called; those of ``Group.multigpu`` end in
            ``_multigpu``.
        group: The group's name.
        rank: This process's rank in it.
        world_size: Its number of ranks.
        nbytes: The size in bytes of what this rank brings. That is ``tensor``, which every rank
            brings to an allreduce, and all entries of a list that is only read. In ``recv`` and
            ``scatter``, of what it takes; in ``sendrecv``, of what it sends; of objects, pickled. 0
            for ``barrier`` and ``split``.
        duration_s: Seconds from the call until it returned, or for an asynchronous call until it
            was done; on a GPU until it was queued. None while it lasts.
        error: What it raised, or None.
    """

    __slots__ = ("duration_s", "error", "group", "name", "nbytes", "rank", "world_size")

    def __init__(self, name: str, group: str, rank: int, world_size: int, nbytes: int) -> None:
        self.name = name
        self.group = group
        self.rank = rank
        self.world_size = world_size
        self.nbytes = nbytes
        self.duration_s: float | None = None
        self.error: BaseException | None = None

    def __repr__(self) -> str:
        return f"Operation({self.name!r}, {self.group!r}, rank {self.rank} of {self.world_size}, {self.nbytes} bytes)"


Observer = Callable[[Operation], "Callable[[], None] | None"]


_log: Final = logging.getLogger(__name__)
_lock: Final = threading.Lock()
_observers: tuple[Observer, ...] = ()
_plain: Final[list[tuple[type, str, Any]]] = []
"""The methods that observed ones stand for at the moment."""
on_start: Final[list[Callable[[], None]]] = []
"""Called when the first observer comes.

Whoever reaches a group's transport without its methods must use them now.
"""
on_stop: Final[list[Callable[[], None]]] = []
"""Called when the last one has gone."""


def add_observer(observer: Observer) -> None:
    """Have every operation of this process's groups reported to ``observer``.

    That is of the groups there are, and of those to come.

    Args:
        observer: Called with the ``Operation`` in the caller's thread before it begins. What it
            returns, unless None, is called when the operation is over, with ``duration_s`` and
            ``error`` set. The thread that ends an asynchronous one calls it. Neither may call
            collectives or wait. What they raise is logged and changes nothing.
    """
    global _observers
    if not callable(observer):
        raise OptionError(f"add_observer: expected a function of an Operation, got {observer!r}")

    with _lock:
        _observers = (*_observers, observer)
        if not _plain:
            _replace_methods()
            for start in on_start:
                start()


def remove_observer(observer: Observer) -> None:
    """Report no more to ``observer`` than the ends of what it has seen begin.

    Nothing happens if it is not there.
    """
    global _observers
    with _lock:
        _observers = tuple(other for other in _observers if other != observer)
        if not _observers:
            while _plain:
                setattr(*_plain.pop())
            for stop in on_stop:
                stop()


def is_observed() -> bool:
    """Return whether there is an observer."""
    return bool(_observers)


def _replace_methods() -> None:
    for name, row in COLLECTIVES.items():
        of_devices = name.endswith("_multigpu")
        for method, (index, argument) in row.brings.items():
            seen_as = name if of_devices else method
            _replace_method(
                MultiGpu if of_devices else Group,
                method,
                functools.partial(_observed, seen_as, index, argument),
            )
    _replace_method(Group, "_exchange", _observed_exchange)


def _replace_method(owner: type, name: str, observed: Callable[[Any], Any]) -> None:
    method = getattr(owner, name)
    _plain.append((owner, name, method))
    setattr(owner, name, observed(method))


def _observed(
    name: str, index: int, argument: str, method: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a method that does what ``method`` does, and is observed."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        brought = None if index < 0 else args[index] if index < len(args) else options.get(argument)
        end = _begin(Operation(name, self.name, self.rank, self.world_size, _nbytes(brought)))
        try:
            result = method(self, *args, **options)
        except BaseException as error:
            end(error)
            raise

        if options.get("async_op") and isinstance(result, Work):
            result.add_done_callback(lambda work: end(work._error))
        else:
            end(None)
        return result

    return call


def _observed_exchange(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``Group._exchange``, observed.

    The collectives of objects know there what they bring.
    """

    @functools.wraps(method)
    def call(self: Any, name: str, payload: bytes, root: int) -> Any:
        if name == "split":  # observed as a whole
            return method(self, name, payload, root)
        end = _begin(Operation(name, self.name, self.rank, self.world_size, len(payload)))
        try:
            found = method(self, name, payload, root)
        except BaseException as error:
            end(error)
            raise
        end(None)
        return found

    return call


def _begin(operation: Operation) -> Callable[[BaseException | None], None]:
    """Notify all observers that an operation begins, and return what tells them that it is over."""
    ends = [
        end
        for observer in _observers
        if (end := _notified(operation, observer, operation)) is not None
    ]
    began = time.perf_counter()

    def over(error: BaseException | None) -> None:
        operation.duration_s = time.perf_counter() - began
        operation.error = error
        for end in ends:
            _notified(operation, end)

    return over


def _notified(operation: Operation, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception:  # noqa: BLE001 - whoever watches a collective must not break it
        _log.exception(
            "group %r (rank %d): %s: observer %r raised",
            operation.group,
            operation.rank,
            operation.name,
            function,
        )
        return None


def _nbytes(brought: Any) -> int:
    """Return the size of a tensor or a tree of tensors.

    It is 0 for what is none, which the operation itself refuses.
    """
    nbytes = getattr(brought, "nbytes", None)
    if nbytes.__class__ is int:
        return int(nbytes)
    if is_container(brought):
        return sum(_nbytes(leaf) for leaf in flatten(brought)[0])
    try:
        return 0 if brought is None else adapter_of(brought).source(brought).nbytes
    except TensorError:
        return 0
