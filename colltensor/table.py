"""The process's table of groups by name: made, found and destroyed here.

Imports no framework. The lock guards the dictionary alone; meeting other ranks happens outside it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from colltensor import backends, environment, objects
from colltensor.control import exit_hooks
from colltensor.errors import (
    BackendUnavailableError,
    CollectiveError,
    GroupError,
    OptionError,
    RankError,
    saying_timed_out,
)
from colltensor.group import Group, connect, groups_named, solitary
from colltensor.options import GroupOptions, timeout_of
from colltensor.rendezvous import (
    Directory,
    Introduction,
    Meeting,
    meet,
    open_directory,
    report_refusal,
)

_lock = threading.Lock()
_groups: dict[str, Group | None] = {}
"""Groups by name; None while one is being made."""

_heeded = False
_SPELLINGS: Final = {"torch_gloo": ("gloo", "torch"), "pygloo": ("gloo", "pygloo")}


def init_collective_group(
    world_size: int | None = None,
    rank: int | None = None,
    backend: str = "auto",
    group_name: str = "default",
    gloo_timeout: float | None = None,
    *,
    timeout_s: float = 30.0,
    init_method: str | None = None,
    interface: str | None = None,
    provider: str | None = None,
    check: bool = False,
    allow_pickle: bool | None = None,
) -> Group:
    """Meet the other ranks and make a group with them; every rank calls.

    A rank whose options are refused tells the others, for which it looks for two seconds. They
    raise the same error.

    Args:
        world_size: The number of ranks. May be left out with ``env://`` (torchrun's
            ``WORLD_SIZE``).
        rank: This process's rank, 0 to ``world_size - 1``. May be left out with ``env://``
            (``RANK``).
        backend: For CPU tensors ``"shm"`` (ranks of one host), ``"gloo"``, or ``"hierarchical"``
            (shared memory within hosts, Gloo between them). For CUDA tensors ``"nccl"``.
            ``"loopback"`` (one rank), or a registered one. ``"auto"`` takes CUDA tensors to NCCL,
            and CPU tensors to what is fastest for where the ranks are (Gloo where they cannot share
            memory).
        group_name: The group's name, free in this process.
        gloo_timeout: ``ray.util.collective``'s spelling of the timeout, in milliseconds.
        timeout_s: How long to wait for the other ranks, here and in every operation, in seconds.
            What this rank imports for the backend, torch for its Gloo, does not count.
        init_method: How the ranks meet: ``file:///path`` (a file or an existing folder all can
            reach), ``tcp://host:port`` (served by rank 0), ``env://`` (MASTER_ADDR, MASTER_PORT).
            None is Ray inside a Ray worker and ``env://`` elsewhere.
        interface: A network interface or address to use. By default it is the one that reaches the
            others.
        provider: Which Gloo to use: ``"native"`` (colltensor's own), ``"torch"`` or ``"pygloo"``.
            By default it is the first of these that all ranks have. ``"ibverbs"`` is the native one
            over the host's first ibverbs device. With ``"auto"`` it also means backend ``"gloo"``.
        check: Let the ranks agree before each call on CUDA tensors too, which makes the host wait
            for the others. Calls on CPU tensors are always checked.
        allow_pickle: With False ``broadcast_object`` and ``allgather_object`` take plain data only:
            numbers, strings, bytes, None, and tuples, lists, dicts and sets of them. This rank
            refuses all else by name. None is what ``COLLTENSOR_ALLOW_PICKLE`` says (0 or 1), else
            True.

    Returns:
        The group, which is also found by its name until ``destroy_collective_group``.

    Raises:
        GroupError: A group of this name exists already.
        OptionError, RankError: An argument has a value that no group could use.
        BackendUnavailableError: The backend cannot be used here; says what to install.
        CollectiveTimeoutError, PeerLostError: Ranks did not come, or died; names them.
        MismatchError: The ranks disagree about the group.
    """
    _check_process(group_name)
    options: GroupOptions | None = None
    try:
        environment.check()
        seconds = timeout_s if gloo_timeout is None else seconds_of(gloo_timeout)
        options = _options(backend, seconds, interface, provider, check, allow_pickle)

        if world_size is None or rank is None:
            _, rank, world_size = open_directory(init_method, rank, world_size)
        world_size, rank = _check(world_size, rank, options)
    except (BackendUnavailableError, OptionError) as error:
        _report(error, world_size, rank, init_method, group_name, backend, options)
        raise

    alone = world_size == 1 and init_method is None and options.backend_for(1) == "loopback"

    def make() -> Group:
        if alone:
            return solitary(group_name, options)
        try:
            directory, found_rank, found_size = open_directory(init_method, rank, world_size)
        except OptionError as error:  # its secret cannot be read, for one
            _report(error, world_size, rank, init_method, group_name, backend, options)
            raise
        return _meet(found_size, found_rank, directory, group_name, options)

    return _enter(group_name, make)


def make_group(
    world_size: int,
    rank: int,
    meeting: Callable[[], Meeting],
    patience_s: float,
    *,
    group_name: str,
    **options: Any,
) -> Group:
    """Make a group as ``init_collective_group`` does, with ranks that met in another way.

    Args:
        world_size: The number of ranks.
        rank: This process's rank.
        meeting: Returns the meeting; not called for a group of one rank that needs none.
        patience_s: How long the ranks may take to connect, in seconds.
        group_name: The group's name, free in this process.
        options: The options of ``init_collective_group``, ``backend`` and ``timeout_s`` among them.
    """
    _check_process(group_name)
    asked = _options(**options)
    world_size, rank = _check(world_size, rank, asked)

    def make() -> Group:
        if world_size == 1 and asked.backend_for(1) == "loopback":
            return solitary(group_name, asked)
        return connect(meeting(), asked, time.monotonic() + patience_s)

    return _enter(group_name, make)


def check_options(
    world_size: int, *, group_name: str, member: bool = False, **options: Any
) -> None:
    """Check a group's options before it is made.

    Args:
        world_size: The number of ranks.
        group_name: The group's name.
        member: This process will be in the group: the name must be free here and the backend
            usable.
        options: As for ``make_group``.

    Raises:
        OptionError, RankError: An option has a value that no group could use.
        GroupError: A group of this name exists here already.
        BackendUnavailableError: The backend cannot be used here.
    """
    _check_name(group_name)
    asked = _options(**options)
    _check_numbers(world_size, 0)
    _check_loopback(asked, world_size)
    if member:
        _check(world_size, 0, asked)
        if group_name in _groups:
            raise _taken(group_name)


def find_group(group_name: str = "default") -> Group:
    """Return the group of this name.

    Raises:
        GroupError: This process has none; says what to call.
    """
    try:
        group = _groups.get(group_name)
    except TypeError:  # no name at all but something unhashable, a tensor list perhaps
        group = None
    if group is None:
        raise _no_group(group_name)
    return group


def all_groups() -> list[Group]:
    """Return all groups of this process that are made."""
    return [group for group in _groups.values() if group is not None]


def is_group_initialized(group_name: str = "default") -> bool:
    """Return True if this process has a group of this name."""
    return _groups.get(group_name) is not None


def destroy_collective_group(group_name: str = "default") -> None:
    """Destroy this process's group of this name, if there is one; waits for no other rank.

    If it is no group of ``init_collective_group``, those that ``Group.split`` has made under this
    name are destroyed.
    """
    group = _groups.get(group_name)
    for found in groups_named(group_name) if group is None else (group,):
        found.destroy()


def _check_process(group_name: str) -> None:
    """Refuse a group while the process ends, when nothing is imported and no thread started."""
    if exit_hooks.is_over():
        raise GroupError(
            f"init_collective_group: group '{group_name}': this process ends and makes no groups any more (this call "
            "came from __del__ or an exit handler)"
        )


def _heed_environment() -> None:
    """Start what ``COLLTENSOR_OBSERVE`` asks for, once a process.

    Raises:
        OptionError: It asks for something that cannot be had here.
    """
    global _heeded
    asked = os.environ.get(environment.OBSERVE, "")
    if asked and not _heeded:
        words = {word.strip() for word in asked.split(",")}
        if not words <= {"metrics", "timeline"}:
            raise OptionError(
                f"{environment.OBSERVE}: expected 'metrics', 'timeline' or 'metrics,timeline', got {asked!r}"
            )
        observe = importlib.import_module("colltensor.ray.observe").observe
        observe(metrics="metrics" in words, timeline="timeline" in words)
        _heeded = True


def _enter(group_name: str, make: Callable[[], Group]) -> Group:
    """Make a group while its name is reserved, and enter it in the table."""
    _check_name(group_name)
    environment.check()
    _heed_environment()

    with _lock:
        if group_name in _groups:
            raise _taken(group_name)
        _groups[group_name] = None

    group = None
    try:
        group = make()
    finally:
        with _lock:
            if group is None:
                del _groups[group_name]
            else:
                _groups[group_name] = group
                group._on_destroy = functools.partial(_forget, group_name, group)
    return group


def _forget(group_name: str, group: Group) -> None:
    """Free the name of a group that is being destroyed."""
    with _lock:
        if _groups.get(group_name) is group:
            del _groups[group_name]


def _check_name(group_name: Any) -> None:
    if not isinstance(group_name, str) or not group_name:
        raise OptionError(f"group_name: expected a string that is not empty, got {group_name!r}")


def _meet(
    world_size: int, rank: int, directory: Directory, group_name: str, options: GroupOptions
) -> Group:
    if world_size == 1 and options.backend_for(1) == "loopback":
        return solitary(group_name, options)
    deadline = time.monotonic() + options.timeout_s
    with saying_timed_out(options.timeout_s):
        part = Introduction(
            group_name=group_name,
            world_size=world_size,
            rank=rank,
            interface=options.interface,
            backend=options.asked_of(world_size),
            host_id=directory.host_id,
        )
        return connect(meet(directory, part, deadline), options, deadline)


def _report(
    error: CollectiveError,
    world_size: Any,
    rank: Any,
    init_method: str | None,
    group_name: str,
    backend: Any,
    options: GroupOptions | None,
) -> None:
    """Notify the other ranks, where they can be found, that this one was refused and why."""
    with contextlib.suppress(CollectiveError):  # the refusal itself is what the caller is to see
        try:
            directory, rank, world_size = open_directory(init_method, rank, world_size)
        except OptionError:
            # the secret may be what was refused, and ranks of this user listen without
            directory, rank, world_size = open_directory(init_method, rank, world_size, secret=b"")

        part = Introduction(
            group_name=group_name,
            world_size=world_size,
            rank=rank,
            backend=backend if options is None else options.asked_of(world_size),
            host_id=directory.host_id,
            refusal=error,
        )
        report_refusal(directory, part)


def seconds_of(gloo_timeout: Any) -> float:
    """Return the seconds of a timeout in milliseconds, as ``ray.util.collective`` has them.

    Raises:
        OptionError: It is no timeout.
    """
    try:
        return timeout_of(gloo_timeout) / 1000
    except OptionError:
        raise OptionError(
            f"gloo_timeout: expected milliseconds, got {gloo_timeout!r}; or use timeout_s"
        ) from None


def _options(
    backend: str,
    timeout_s: Any,
    interface: str | None = None,
    provider: str | None = None,
    check: bool = False,
    allow_pickle: bool | None = None,
) -> GroupOptions:
    if not isinstance(backend, str):
        raise OptionError(f"backend: expected a name, got {backend!r}")
    seconds = timeout_of(timeout_s)
    name, provider_of_name = _SPELLINGS.get(backend.lower(), (backend.lower(), None))
    if name != "auto":
        backends.get_backend(name)
    allowed, provider = objects.pickle_allowed(allow_pickle), provider or provider_of_name
    return GroupOptions(name, seconds, interface, provider, bool(check), allowed)


def _check(world_size: Any, rank: Any, options: GroupOptions) -> tuple[int, int]:
    world_size, rank = _check_numbers(world_size, rank)
    _check_loopback(options, world_size)
    name, spec = options.backend_for(world_size), options.spec_for(world_size)
    providers = getattr(spec, "providers", ())
    if providers and options.provider is not None and options.provider not in providers:
        raise OptionError(
            f"provider: expected one of {', '.join(providers)} or None for backend {name!r}, got {options.provider!r}"
            f"{environment.did_you_mean(str(options.provider), providers)}"
        )
    reason = spec.available()
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} cannot be used here: {reason}")
    return world_size, rank


def _check_loopback(options: GroupOptions, world_size: int) -> None:
    if options.backend == "loopback" and world_size != 1:
        raise OptionError(
            f"backend: 'loopback' is for one rank, and world_size is {world_size}; use backend='auto'"
        )


def _check_numbers(world_size: Any, rank: Any) -> tuple[int, int]:
    try:
        world_size, rank = operator.index(world_size), operator.index(rank)
    except TypeError:
        raise RankError(
            f"world_size and rank: expected whole numbers, got {world_size!r} and {rank!r}"
        ) from None
    if world_size < 1:
        raise RankError(f"world_size: expected at least 1, got {world_size}")
    if not 0 <= rank < world_size:
        raise RankError(
            f"rank: expected 0 to {world_size - 1} (world_size is {world_size}), got {rank}"
        )
    return world_size, rank


def _taken(group_name: str) -> GroupError:
    is_made = _groups.get(group_name) is not None
    state = "exists already" if is_made else "is being made by another thread"
    return GroupError(
        f"init_collective_group: group '{group_name}' {state} in this process; destroy_collective_group() it "
        "first, or choose another group_name"
    )


def _no_group(group_name: str) -> GroupError:
    if isinstance(group_name, str) and group_name in _groups:
        return GroupError(
            f"group '{group_name}' is still being made by another thread of this process"
        )
    known = ", ".join(f"'{name}'" for name in _groups) or "none"
    return GroupError(
        f"group '{group_name}' is not initialized in this process (pid {os.getpid()}, which has {known}); call "
        "init_collective_group() on every rank first"
    )
