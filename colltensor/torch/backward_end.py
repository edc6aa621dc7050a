"""The end of a backward pass: one call, when the outermost of those that are nested is over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from colltensor._compat import torch as _compat

_queue_callback: Final = _compat.queue_callback()
_current_node: Final = _compat.current_autograd_node()


def is_running() -> bool:
    """Return whether autograd's engine runs in this thread; compiled backward passes go without."""
    return _current_node() is not None


class BackwardEndHook:
    """Calls a function at the end of the outermost backward pass in which it was made.

    The engine runs a callback at the end of the graph task that is current when it is queued.
    Inside a reentrant checkpoint that is the inner task, and there is no way to queue at the outer
    one. But while the inner task's callbacks run, the node of the outer graph that runs it is still
    the current one. At the end of the outermost task there is none. So from an inner end a hook is
    put before the nodes that follow that node in the outer graph. The first of them to run queues
    the callback again, one level up.

    The engine's task holds the only strong reference, or a hook of the graph while it climbs. So a
    weak one is dead after a backward pass that ended with an exception. Where somebody keeps the
    graph, it climbs for ever. In both cases the next pass needs a BackwardEndHook of its own, and a
    second one in one pass does no harm.
    """

    __slots__ = ("__weakref__", "_finish", "_hooks")

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish
        self._hooks: list[Any] = []
        _queue_callback(self)

    def __call__(self) -> None:
        """Finish, or climb one level; called by the engine."""
        node = _current_node()
        following = (
            [] if node is None else [child for child, _ in node.next_functions if child is not None]
        )
        if not following:
            self._finish()
            return
        self._hooks = [child.register_prehook(self._queue_again) for child in following]

    @property
    def climbing(self) -> bool:
        """Whether it waits for the outer graph to go on, which after an exception never happens."""
        return bool(self._hooks)

    def _queue_again(self, gradients: object) -> None:
        hooks, self._hooks = self._hooks, []
        for hook in hooks:
            hook.remove()
        _queue_callback(self)
