"""The groups that compiled computations name, and the order of their calls with eager ones.

A computation holds a group's number, never a pointer: it may be called when the group is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Final

import jax

from colltensor import bridge, observers
from colltensor._compat.jax import forget_tokens
from colltensor.backends.shm import library
from colltensor.control import exit_hooks
from colltensor.errors import GroupError
from colltensor.group import Group

_numbers: Final[weakref.WeakKeyDictionary[Group, int]] = weakref.WeakKeyDictionary()
_groups: Final[weakref.WeakValueDictionary[int, Group]] = weakref.WeakValueDictionary()
_count: Final = itertools.count(1)
_lock: Final = threading.Lock()
_log: Final = logging.getLogger(__name__)
_here: Final = threading.local()
"""``inside`` is True in a thread that runs a collective for XLA: it must not wait for XLA."""
_END_GRACE_S: Final = 1.0
_JOIN_S: Final = 5.0
_ending: Final = threading.Event()
"""Set when the process ends, before JAX waits for its computations.

JAX's handlers are older than this module's.
"""
atexit.register(_ending.set)
_end_watchers: Final[list[threading.Thread]] = []
_ended: Final = threading.Event()


def number_of(group: Group) -> int:
    """Return the group's number: one for as long as it lives, and never another's."""
    with _lock:
        number = _numbers.get(group)
        if number is None:
            number = _numbers[group] = next(_count)
            _groups[number] = group
            defer = functools.partial(_defer, bridge.shared_memory(group))
            bridge.follow(group, _wait, defer)
            _watch_the_end(group)
    return number


def _watch_the_end(group: Group) -> None:
    """See that JAX waits for no rank that does not call, when the process ends.

    JAX waits for its computations then. This watches in a thread of its own, made here: while the
    process ends no thread can be started.
    """
    if not _end_watchers:
        thread = threading.Thread(target=_end_late_calls, name="colltensor end of jit", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads: the groups' timeouts bound the wait
            _log.debug(
                "group %r (rank %d): the end of this process will wait for jitted collectives under way: %s",
                group.name,
                group.rank,
                error,
            )
        else:
            _end_watchers.append(thread)


def _end_late_calls() -> None:
    _ending.wait()
    seen: dict[Group, tuple[object, float]] = {}
    while not _ended.wait(0.05):
        now = time.monotonic()
        for group in list(_numbers):
            progress = bridge.progress(group)
            if progress is None or seen.get(group, (None, 0.0))[0] != progress:
                seen[group] = progress, now
            elif now - seen[group][1] > _END_GRACE_S:
                group._end()


def _stop_watching() -> None:
    """End the thread while it still can come back from the native library."""
    _ending.set()
    _ended.set()
    for thread in _end_watchers:
        thread.join(_JOIN_S)


exit_hooks.before_end(_stop_watching)


def group_of(number: int) -> Group:
    """Return the group.

    Raises:
        GroupError: It is gone.
    """
    group = _groups.get(number)
    if group is None:
        raise GroupError(
            "a jitted function uses a group that is gone; make the group again and jit the function anew, so that it "
            "is traced with the new group"
        )
    return group


def _wait() -> None:
    """Wait for this thread's jitted collectives; reading a failed result raises."""
    if getattr(_here, "inside", False) or library.load().shm_jax_inside():
        return
    try:
        jax.effects_barrier()
    except jax.errors.JaxRuntimeError:
        forget_tokens()


def forget_failures() -> None:
    """Let this thread's computations run again after one failed, whose token JAX keeps."""
    forget_tokens()


def _defer(handle: int, on: bool) -> None:
    """Let jitted calls queue behind the group's asynchronous eager ones, or go straight again.

    Straight means to shared memory. While there are observers, the calls go through the group's
    methods in any case.
    """
    if handle >= 0:
        library.load().shm_jax_defer(handle, on or observers.is_observed())


def _defer_all() -> None:
    """Let the jitted calls of all groups go through their methods, where they are observed."""
    for group in list(_numbers):
        _defer(bridge.shared_memory(group), True)


def _end_deferring() -> None:
    """Let them go straight to shared memory again, but behind asynchronous calls under way."""
    for group in list(_numbers):
        group._queue.notify_watch()


observers.on_start.append(_defer_all)
observers.on_stop.append(_end_deferring)
os.register_at_fork(after_in_child=_end_watchers.clear)  # the thread is the parent's


@contextlib.contextmanager
def inside(group: Group, operation: str) -> Iterator[None]:
    """Call the group from a computation: it waits for no computation, and its errors fit there.

    Raises:
        GroupError: The call on the group raised one, or was interrupted.
    """
    outer, _here.inside = getattr(_here, "inside", False), True
    try:
        yield
    except GroupError as error:
        remedy = "and jit the function anew: this one was traced with the group that is gone"
        raise GroupError(f"{error}; {remedy}") from error
    except KeyboardInterrupt as error:  # XLA passes on words alone
        raise GroupError(
            f"{operation}: KeyboardInterrupt while rank {group.rank} waited"
        ) from error
    finally:
        _here.inside = outer
