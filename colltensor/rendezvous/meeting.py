"""Meet: bring the ranks of a new group together, and leave each with what its control plane needs."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import operator
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from colltensor import net
from colltensor.errors import (
    CollectiveError,
    GroupError,
    OptionError,
    RankError,
    is_from_handler,
    remedy_for_system,
)
from colltensor.rendezvous.directory import Directory
from colltensor.rendezvous.hosting import host
from colltensor.rendezvous.joining import join, who_am_i
from colltensor.rendezvous.protocol import JoinRequest, Table

_NAME_LIMIT = 1024
_WORLD_LIMIT = 1 << 16
_REFUSAL_S = 2.0


@dataclass(frozen=True, slots=True)
class Meeting:
    """What every rank of a group knows once the ranks have met.

    Attributes:
        rank: This process's rank.
        world_size: How many ranks there are.
        group_name: The group's name.
        generation: 8 random bytes, the same on every rank: this incarnation of the group.
        secret: 32 bytes that the group's connections are authenticated with.
        addresses: Where the control plane of each rank listens.
        host_ids: The host of each rank: equal ones reach each other over 127.0.0.1.
        properties: Rank 0's properties, the same on every rank.
        listener: This rank's own socket, bound and listening at its entry of ``addresses``.
    """

    rank: int
    world_size: int
    group_name: str
    generation: bytes
    secret: bytes = field(repr=False)
    addresses: tuple[tuple[str, int], ...]
    host_ids: tuple[str, ...]
    properties: dict[str, Any]
    listener: socket.socket

    @classmethod
    def of(
        cls, request: JoinRequest, table: Table, listener: socket.socket, secret: bytes
    ) -> Meeting:
        """Return what a rank knows from rank 0's table and the secret that they met with."""
        own = hmac.new(
            secret, b"group secret" + table.generation + table.salt, hashlib.sha256
        ).digest()
        return cls(request.rank, request.world_size, request.group_name, table.generation, own, table.addresses,
                   table.host_ids, table.properties, listener)  # fmt: skip


def meet(
    directory: Directory,
    *,
    group_name: str,
    world_size: int,
    rank: int,
    deadline: float,
    interface: str | None = None,
    backend: str = "auto",
    properties: Mapping[str, Any] | None = None,
) -> Meeting:
    """Bring the ranks of a new group together; every rank must call, from any thread, at about the same time.

    Rank 0 leaves an endpoint in the directory and listens; the others find it and connect; rank 0 gives
    everyone an address and, when all listen, tells everyone the table. No lock is held while waiting, and
    Ctrl-C ends it within a second.

    Args:
        directory: How rank 0 is found.
        group_name: The group's name, the same on every rank.
        world_size: How many ranks there are, the same on every rank.
        rank: This process's rank.
        deadline: When to give up, by ``time.monotonic()``.
        interface: The network interface (its name or address) on which this rank is to be reached; by default
            the loopback within one host, and else the one that reaches rank 0.
        backend: The backend asked for, the same on every rank.
        properties: What rank 0 tells all ranks, as JSON can carry it; not used on the others.

    Returns:
        What every rank knows. The caller owns its listener.

    Raises:
        CollectiveTimeoutError: A rank did not come in time; its ``ranks`` say which.
        MismatchError: The ranks disagree about the world size or the backend.
        RankError: The rank is outside the group, or another process claims it too.
        PeerLostError: A rank died during the meeting.
        OptionError: An argument cannot be used, or the directory or its port cannot.
        GroupError: The network failed in some other way.
    """
    host_id: str | None = getattr(directory, "host_id", None)
    try:
        request = introduction(group_name, world_size, rank, interface, backend, host_id)
        told = json_object(properties)
    except CollectiveError as error:
        report_refusal(
            directory,
            error,
            group_name=group_name,
            world_size=world_size,
            rank=rank,
            backend=backend,
        )
        raise
    except OSError as error:
        raise GroupError(
            f"init_collective_group(group_name={group_name!r}) on rank {rank} of {world_size}: {error}; "
            + remedy_for_system(error, "see that the network can be used")
        ) from error
    try:
        if request.world_size == 1:
            return _alone(request, told)
        if request.rank == 0:
            return Meeting.of(request, *host(directory, request, deadline, told))
        return Meeting.of(request, *join(directory, request, time.monotonic(), deadline))
    except CollectiveError as error:
        error.args = (f"{location(request)}: {error}",)
        raise
    except (OSError, RuntimeError) as error:
        remedy = remedy_for_system(error, "see that the ranks reach each other")
        if is_from_handler(error) or (
            isinstance(error, RuntimeError) and "new thread" not in str(error)
        ):
            raise
        raise GroupError(
            f"{location(request)}: the rendezvous failed: {error}; {remedy}"
        ) from error


def report_refusal(
    directory: Directory,
    error: CollectiveError,
    *,
    group_name: str,
    world_size: int,
    rank: int,
    backend: str,
) -> None:
    """Tell the ranks that meet why this one will not come, so that they do not wait for it; for two seconds at most.

    Nothing happens where they cannot be told: nobody is there, or the group's name or the rank is what was refused.

    Args:
        directory: See ``meet``.
        error: What this rank raises next.
        group_name: See ``meet``.
        world_size: See ``meet``.
        rank: See ``meet``.
        backend: The backend asked for. Where it is unavailable here, only ranks that ask for it too are told: the
            others may have met this rank's next attempt.
    """
    started = time.monotonic()
    deadline = started + _REFUSAL_S
    # the refusal itself is what the caller is to see
    with contextlib.suppress(CollectiveError, OSError):
        request = introduction(
            group_name, world_size, rank, None, str(backend), getattr(directory, "host_id", None)
        )
        request = request.refusing(error)
        if request.world_size == 1:
            return
        if request.rank == 0:
            host(directory, request, deadline, {})
        else:
            join(directory, request, started, deadline)


def introduction(
    group_name: object,
    world_size: object,
    rank: object,
    interface: str | None,
    backend: object,
    host_id: str | None = None,
) -> JoinRequest:
    """Return what this rank says of itself, checked; ``host_id`` names its host where ``net.host_id()`` does not.

    Raises:
        OptionError: The group name, world size, interface or backend cannot be used.
        RankError: The rank is outside ``range(world_size)``.
    """
    rank, world_size = checked_rank(rank, world_size)
    if (
        not isinstance(group_name, str)
        or not 0 < len(group_name.encode(errors="replace")) <= _NAME_LIMIT
    ):
        raise OptionError(
            f"group_name must be a string of 1 to {_NAME_LIMIT} bytes, got {group_name!r:.80}"
        )
    if group_name.encode(errors="replace").decode() != group_name:
        raise OptionError(f"group_name must be valid Unicode, got {group_name!r:.80}")
    if not isinstance(backend, str) or len(backend) > _NAME_LIMIT:
        raise OptionError(f"backend must be the name of a backend, got {backend!r:.80}")
    address = None if interface is None else net.interface_address(interface)
    host = net.host_id() if host_id is None else host_id
    return JoinRequest(
        rank, world_size, group_name, backend, host, address, "127.0.0.1", who_am_i(), 0.0, 0.0
    )


def checked_rank(rank: object, world_size: object) -> tuple[int, int]:
    """Return rank and world size as integers.

    Raises:
        OptionError: The world size is no positive integer, or beyond reason.
        RankError: The rank is no integer of ``range(world_size)``.
    """
    size = _integer(world_size)
    if size is None or size < 1:
        raise OptionError(f"world_size must be an integer of at least 1, got {world_size!r}")
    if size > _WORLD_LIMIT:
        raise OptionError(
            f"world_size must be at most {_WORLD_LIMIT}, got {size}: rank 0 holds a connection to every rank while "
            f"they meet"
        )
    number = _integer(rank)
    if number is None or not 0 <= number < size:
        raise RankError(
            f"rank must be an integer from 0 to {size - 1} (world_size is {size}), got {rank!r}"
        )
    return number, size


def _integer(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]  # any object may be passed; TypeError says no
    except TypeError:
        return None


def json_object(properties: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return properties as the other ranks will see them.

    Raises:
        OptionError: JSON cannot carry them.
    """
    try:
        told: dict[str, Any] = json.loads(json.dumps(dict(properties or {})))
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"properties must be what JSON can carry, got {properties!r:.200}: {error}"
        ) from error
    return told


def location(request: JoinRequest) -> str:
    """Return the beginning of an error message: the operation, the group and the rank."""
    return f"init_collective_group(group_name={request.group_name!r}) on rank {request.rank} of {request.world_size}"


def _alone(request: JoinRequest, properties: dict[str, Any]) -> Meeting:
    listener = net.listen(request.address or "127.0.0.1")
    address: tuple[str, int] = listener.getsockname()[:2]
    return Meeting.of(
        request, Table.fresh((address,), (request.host_id,), properties), listener, b""
    )
