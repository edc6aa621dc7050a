"""The part of a meeting that every rank but 0 plays: find rank 0, introduce oneself, wait for the table."""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import socket
import time
from dataclasses import replace

from colltensor import net
from colltensor.errors import (
    CollectiveError,
    CollectiveTimeoutError,
    OptionError,
    PeerLostError,
    remedy_for_system,
)
from colltensor.rendezvous.directory import Directory, FixedDirectory
from colltensor.rendezvous.protocol import (
    Endpoint,
    JoinRequest,
    Message,
    Table,
    decode_error,
    encode_error,
    pack,
    unpack,
)
from colltensor.rendezvous.secret import MISTAKE, derived

_LOG = logging.getLogger(__name__)
_CONNECT_S = 3.0
_HANDSHAKE_S = 5.0
_STRANGER_S = 3.0
_REFUSED_S = 0.3
_VERDICT_SLACK_S = 1.0
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.01, 0.25


class Found(enum.Enum):
    """Who answers where an endpoint points to."""

    NOBODY = enum.auto()
    STRANGER = enum.auto()
    OTHER_GROUPS = enum.auto()
    RIVAL = enum.auto()


def who_am_i() -> str:
    """Return this process's name in messages to other ranks."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def probe(endpoint: Endpoint, group_name: str) -> Found:
    """Find out, as rank 0, whether another rank 0 of this group is meeting; a living one is told and gives up.

    Takes a few seconds at most.
    """
    deadline = time.monotonic() + _CONNECT_S
    try:
        with _reach(endpoint, group_name, net.host_id(), deadline) as sock:
            net.send_frame(sock, Message.CLAIM, pack({"who": who_am_i()}), deadline)
            kind, _ = net.recv_frame(sock, deadline, net.UNPROVEN_LIMIT)
    except (net.FrameError, net.AuthenticationError, TimeoutError):
        return Found.STRANGER
    except ConnectionError:
        return Found.NOBODY
    return Found.RIVAL if kind == Message.FAILED else Found.OTHER_GROUPS


def another_rank_0_lives(endpoint: bytes, group_name: str, secret: bytes = b"") -> bool:
    """Return whether an endpoint, found where one's own was to go, is that of a rank 0 that is meeting now.

    Args:
        endpoint: As it was found.
        group_name: The group's name.
        secret: The directory's.
    """
    try:
        found = Endpoint.decode(endpoint)
        return probe(replace(found, secret=secret_of(found, secret)), group_name) is Found.RIVAL
    except net.FrameError:
        return False


def secret_of(endpoint: Endpoint, given: bytes) -> bytes:
    """Return the secret of the meeting that an endpoint leads to, of which the directory may be read by anybody."""
    return derived(given, endpoint.secret, endpoint.encode())


def join(
    directory: Directory, request: JoinRequest, started: float, deadline: float
) -> tuple[Table, socket.socket, bytes]:
    """Meet as a rank other than 0.

    Args:
        directory: Where rank 0 says how it is reached.
        request: What this rank says of itself; times and own address are filled in here.
        started: When this rank began to ask.
        deadline: When to give up.

    Returns:
        Rank 0's table, this rank's own listener, and the meeting's secret.
    """
    backoff = net.Backoff(_FIRST_PAUSE_S, _LAST_PAUSE_S, deadline)
    reason = ""
    stranger_since: float | None = None
    refused_since: float | None = None
    while True:
        endpoint = _located(directory, request.group_name, deadline, reason)
        try:
            with _reach(endpoint, request.group_name, request.host_id, deadline, request) as sock:
                reason, stranger_since, refused_since = (
                    "it answers, but this group is not meeting there",
                    None,
                    None,
                )
                if _introduce(sock, request, started, deadline):
                    table, listener = _attend(sock, deadline, request)
                    return table, listener, endpoint.secret
        except CollectiveError:
            raise
        except net.FrameError as error:
            reason = f"something else listens at its address ({error})"
            stranger_since = stranger_since or time.monotonic()
            if not endpoint.host_id and time.monotonic() - stranger_since > _STRANGER_S:
                raise OptionError(
                    f"rank 0 was looked for at {_spelt(endpoint)}, but {reason}; choose another port or file"
                ) from error
        except (ConnectionError, TimeoutError) as error:
            reason = f"last, at {_spelt(endpoint)}: {error}"
            if isinstance(error, ConnectionRefusedError):
                stranger_since = None
            if isinstance(error, net.WrongSecretError):
                refused_since = refused_since or time.monotonic()
        # Not at once: another job's rank 0 may meet at that port for a moment.
        if (
            refused_since
            and hasattr(directory, "secret")
            and time.monotonic() - refused_since > _REFUSED_S
        ):
            raise OptionError(
                f"rank 0 meets at {_spelt(endpoint)} with another secret than this rank has; {MISTAKE}"
            )
        if not backoff.pause():
            raise _nobody_came(reason)


def _located(directory: Directory, key: str, deadline: float, reason: str) -> Endpoint:
    if time.monotonic() >= deadline:
        raise _nobody_came(reason)
    try:
        found = Endpoint.decode(directory.locate(key, deadline))
        if isinstance(directory, FixedDirectory):
            return found
        return replace(found, secret=secret_of(found, getattr(directory, "secret", b"")))
    except CollectiveTimeoutError as error:
        if reason:
            error.args = (f"{error}; {reason}",)
        raise


def _nobody_came(reason: str) -> CollectiveTimeoutError:
    return CollectiveTimeoutError(
        f"expected rank 0 to meet this group within the timeout, but it did not come{reason and ': '}{reason}; start "
        f"every rank with the same group_name and init_method, or allow more time with timeout_s (a rank 0 that did "
        f"start has given up: see its own error message)",
        (0,),
    )


def _spelt(endpoint: Endpoint) -> str:
    return f"{', '.join(endpoint.addresses)} port {endpoint.port}"


def _reach(
    endpoint: Endpoint,
    group_name: str,
    host_id: str,
    deadline: float,
    request: JoinRequest | None = None,
) -> socket.socket:
    """Return an authenticated connection to whoever can prove to have issued the endpoint.

    Whoever says that the secret is wrong is told by ``request`` who tried.
    """
    addresses = list(endpoint.addresses)
    # Where rank 0 listens at one address alone, another user may have the port on the loopback.
    if endpoint.host_id == host_id and "127.0.0.1" in addresses:
        addresses.insert(0, "127.0.0.1")
    failure: OSError = ConnectionError("the endpoint names no address")
    for address in dict.fromkeys(addresses):
        now = time.monotonic()
        try:
            sock = net.dial((address, endpoint.port), min(deadline, now + _CONNECT_S))
        except (ConnectionError, TimeoutError) as error:
            failure = error
            continue
        try:
            net.prove(
                sock,
                endpoint.secret,
                group_name.encode(),
                min(deadline, now + _CONNECT_S + _HANDSHAKE_S),
            )
            return sock
        except (ConnectionError, TimeoutError) as error:
            if request is not None and isinstance(error, net.WrongSecretError):
                _own_up(sock, request, deadline)
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
    raise failure


def _own_up(sock: socket.socket, request: JoinRequest, deadline: float) -> None:
    """Say who has another secret, and stay until rank 0 has seen whose process that is."""
    with contextlib.suppress(OSError):
        net.send_frame(sock, Message.JOIN, request.encode(), deadline)
        sock.settimeout(_REFUSED_S)
        sock.recv(1)


def _introduce(sock: socket.socket, request: JoinRequest, started: float, deadline: float) -> bool:
    """Say who one is; return whether rank 0 is meeting this group now."""
    now = time.monotonic()
    seen_from = net.plain_address(sock.getsockname()[0])
    request = replace(request, seen_from=seen_from, age_s=now - started, patience_s=deadline - now)
    net.send_frame(sock, Message.JOIN, request.encode(), deadline)
    kind, payload = net.recv_frame(sock, min(deadline, now + 2 * _HANDSHAKE_S))
    if kind == Message.FAILED:
        raise decode_error(payload)
    if kind not in (Message.WELCOME, Message.RETRY):
        raise net.FrameError(f"expected a welcome, got a frame of kind {kind}")
    return kind == Message.WELCOME


def _attend(
    sock: socket.socket, deadline: float, request: JoinRequest
) -> tuple[Table, socket.socket]:
    """Wait for rank 0's decisions; from here on, losing it is an error."""
    with contextlib.ExitStack() as undo:
        try:
            place = unpack(_next(sock, Message.PLACE, deadline, request), host=str)
            try:
                listener = undo.enter_context(net.listen(place["host"]))
            except OSError as error:
                remedy = remedy_for_system(error, "choose with interface=")
                message = f"cannot listen on {place['host']} of {who_am_i()}: {error}; {remedy}"
                net.send_frame(sock, Message.FAILED, encode_error(OptionError(message)), deadline)
                _next(sock, Message.TABLE, deadline, request)
                raise OptionError(message) from error
            net.send_frame(sock, Message.BOUND, pack({"port": listener.getsockname()[1]}), deadline)
            table = Table.decode(_next(sock, Message.TABLE, deadline, request))
        except CollectiveError:
            raise
        except TimeoutError as error:
            raise CollectiveTimeoutError(
                "rank 0 came, but neither finished the rendezvous nor gave it up by the deadline; it is stopped or "
                "its host cannot be reached any more",
                (0,),
            ) from error
        except ConnectionError as error:
            raise PeerLostError(
                f"rank 0 was lost during the rendezvous ({error}); look for its own error message",
                (0,),
            ) from error
        undo.pop_all()
        return table, listener


def _next(sock: socket.socket, expected: Message, deadline: float, request: JoinRequest) -> bytes:
    """Return the payload of the next frame; rank 0 announces the timeout itself, so it gets a little longer."""
    kind, payload = net.recv_frame(sock, deadline + _VERDICT_SLACK_S)
    while kind == Message.NOTE:
        note = str(unpack(payload, note=str)["note"])
        _LOG.warning(
            "group %r (rank %d): rank 0 says: %s; %s",
            request.group_name,
            request.rank,
            note,
            MISTAKE,
        )
        kind, payload = net.recv_frame(sock, deadline + _VERDICT_SLACK_S)
    if kind == Message.FAILED:
        raise decode_error(payload)
    if kind != expected:
        raise net.FrameError(f"expected a {expected.name.lower()}, got a frame of kind {kind}")
    return payload
