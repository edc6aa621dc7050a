"""How the ranks of a group meet inside Ray: rank 0 leaves its endpoint with a small named actor.

Imports ray. The actor is owned by rank 0's process and not detached, so Ray ends it with that
process, however that ends. Rank 0 ends it as soon as the meeting is over.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any, Final, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from colltensor import net
from colltensor.errors import GroupError, OptionError
from colltensor.rendezvous import Directory

_PREFIX: Final = "colltensor:"
_READ_WITHIN_S: Final = 3.0


class EndpointBoard:
    """Holds one endpoint for as long as a meeting lasts."""

    def __init__(self, endpoint: bytes) -> None:
        self._endpoint = endpoint

    def read(self) -> bytes:
        """Return the endpoint."""
        return self._endpoint


_Board: Final = ray.remote(num_cpus=0)(EndpointBoard)
"""Made once: Ray keeps a copy of each class that ``ray.remote`` makes until the job ends."""


class RayDirectory(Directory):
    """Leaves endpoints in this process's Ray namespace, for whoever runs in it."""

    def __init__(self) -> None:
        refuse_client("init_collective_group")
        self.host_id = node_host_id()
        self._boards: dict[str, Any] = {}

    def scope(self) -> str:
        """Say which place this is."""
        context = ray.get_runtime_context()
        return f"ray:{context.get_job_id()}:{context.namespace}"

    def address(self) -> str | None:
        """Return the address by which Ray's nodes reach this one."""
        return address_in_ray()

    def put(self, key: str, endpoint: bytes, stale: bytes) -> bytes | None:
        """Start the named actor that holds the endpoint: see Directory.

        The actor of a rank 0 that died, or of the last meeting of this name, may take a moment to
        end.
        """
        try:
            self._boards[key] = _Board.options(name=_PREFIX + key).remote(endpoint)
            return None
        except ValueError:
            with contextlib.suppress(RayActorError, GetTimeoutError):
                board = _find(key)
                return b"" if board is None else _read(key, board, _READ_WITHIN_S)
        return b""

    def read(self, key: str, deadline: float) -> bytes | None:
        """Return the endpoint once rank 0 left it: see Directory."""
        board = _find(key)
        try:
            return None if board is None else _read(key, board, net.time_left(deadline))
        except (RayActorError, GetTimeoutError) as error:
            raise ConnectionError(f"in Ray's actor '{_PREFIX + key}': {error}") from error

    def absent(self, key: str) -> str:
        """Say which actor there is not: see Directory."""
        return f"it has left no endpoint in Ray's actor '{_PREFIX + key}'; start rank 0 in the same Ray namespace"

    def remove(self, key: str, endpoint: bytes) -> None:
        """End the actor: see Directory."""
        board = self._boards.pop(key, None)
        if board is not None and ray.is_initialized():
            ray.kill(board)


def refuse_client(operation: str) -> None:
    """Raise where this process is a Ray Client, which Ray's workers cannot connect to.

    Raises:
        GroupError: It is one; says where to run instead.
    """
    client = sys.modules.get("ray.util.client")
    if client is not None and client.ray.is_connected():
        raise GroupError(
            f"{operation}: this process is connected to Ray through Ray Client ('ray://'), so it is no process of the "
            "cluster: it has no address there and its actor handles are the server's. Run the driver on a node of the "
            "cluster, with ray.init(address='auto') or as a job (`ray job submit`), or make the group inside the actors"
        )


def address_in_ray() -> str | None:
    """Return the address by which Ray's nodes reach this one, if it is this host's."""
    find = cast("Callable[[], str]", ray.util.get_node_ip_address)  # Ray gives it no type
    address = find()
    is_usable = address in net.local_addresses() and not net.is_loopback(address)
    return address if is_usable else None


def node_host_id() -> str:
    """Return a name that processes share if they are on one node of Ray's and on one host.

    Two nodes count as two hosts, also where one machine simulates them; COLLTENSOR_HOST_ID says
    otherwise.
    """
    given = os.environ.get("COLLTENSOR_HOST_ID")
    return given or f"{ray.get_runtime_context().get_node_id()}/{net.host_id()}"


def _find(key: str) -> ActorHandle[EndpointBoard] | None:
    """Return the board, dead or alive, or None where there is none."""
    try:
        return ray.get_actor(_PREFIX + key)
    except ValueError:
        return None


def _read(key: str, board: ActorHandle[EndpointBoard], timeout_s: float) -> bytes:
    """Return the endpoint on the board.

    Raises:
        RayActorError: The board is gone.
        GetTimeoutError: It does not answer.
        OptionError: It is an actor of another kind.
    """
    try:
        endpoint = ray.get(board.read.remote(), timeout=timeout_s)
    except (AttributeError, RayTaskError):
        endpoint = None
    if not isinstance(endpoint, bytes):
        raise OptionError(
            f"group_name: the actor '{_PREFIX + key}' exists in this Ray namespace and is not ColTensor's; choose "
            "another group_name, or name that actor differently"
        )
    return endpoint
