"""The part of a meeting that rank 0 plays: listen, collect the others, decide, tell everyone."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import secrets
import selectors
import socket
import time
from typing import Any

from colltensor import net
from colltensor.errors import (
    BackendUnavailableError,
    CollectiveError,
    CollectiveTimeoutError,
    OptionError,
    PeerLostError,
    remedy_for_system,
)
from colltensor.rendezvous.directory import Directory, FixedDirectory
from colltensor.rendezvous.joining import Found, probe, secret_of, who_am_i
from colltensor.rendezvous.protocol import (
    Endpoint,
    JoinRequest,
    Message,
    Table,
    decode_error,
    disagreement,
    encode_error,
    pack,
    taken,
    unpack,
)
from colltensor.rendezvous.secret import MISTAKE, warn_of_strangers
from colltensor.rendezvous.server import (
    Joiner,
    JoinerQueue,
    RendezvousServer,
    Stranger,
    Subscription,
    leave_server,
    open_server,
    remember,
)

_LOG = logging.getLogger(__name__)
_SLICE_S = 0.5
_GRACE_S = 1.0
_NOTICE_S = 2.0
_STRANGERS = 4
_PATIENCE_WITH_A_TAKEN_PORT_S = 3.0


def host(
    directory: Directory, request: JoinRequest, deadline: float, properties: dict[str, Any]
) -> tuple[Table, socket.socket, bytes]:
    """Meet as rank 0.

    Args:
        directory: Where to say how this rank is reached.
        request: What this rank says of itself.
        deadline: When to give up; earlier if a rank that came would give up earlier.
        properties: What the other ranks are to know.

    Returns:
        The table that every rank got, this rank's own listener, and the meeting's secret.
    """
    key = request.group_name
    inbox = JoinerQueue()
    assembly = _Assembly(request, inbox, deadline)
    server: RendezvousServer | None = None
    try:
        scope = str(getattr(directory, "scope", ""))
        server, endpoint, secret = _open(directory, request, Subscription(inbox, scope), deadline)
        try:
            directory.publish(key, endpoint.encode())
        except OptionError as error:
            elsewhere = getattr(directory, "elsewhere", None)
            # what else is wrong all ranks see
            if elsewhere is not None and isinstance(error.__cause__, OSError):
                directory = elsewhere
                assembly.hurry(_NOTICE_S)
                with contextlib.suppress(CollectiveError):  # all are to see the first error
                    directory.publish(key, endpoint.encode())
                    assembly.gather()
            raise
        assembly.gather()
        with contextlib.ExitStack() as undo:
            table, listener = assembly.decide(properties)
            undo.enter_context(listener)
            remember(scope, key, request.world_size)
            assembly.conclude(table)
            undo.pop_all()
        return table, listener, secret
    except BaseException as error:
        if isinstance(error, CollectiveTimeoutError) and server is not None and server.obstacle:
            error.args = (f"{error}; rank 0 could not hear who came: {server.obstacle}",)
        assembly.give_up(error)
        raise
    finally:
        if server is not None:
            leave_server(server, key)
        assembly.dismiss()
        try:
            directory.withdraw(key)
        except OSError as error:
            _LOG.debug("group %r (rank %d): its endpoint could not be removed: %s", key, 0, error)


def _open(
    directory: Directory, request: JoinRequest, subscription: Subscription, deadline: float
) -> tuple[RendezvousServer, Endpoint, bytes]:
    """Return the server, how it is reached, and the meeting's secret."""
    if getattr(directory, "secret", None) == b"":
        warn_of_strangers(str(getattr(directory, "host", "")), request.group_name, request.rank)
    if isinstance(directory, FixedDirectory):
        return (
            _open_fixed(directory, request.group_name, subscription, deadline),
            directory.endpoint,
            directory.secret,
        )
    address = request.address or getattr(directory, "address", None)
    server = open_server(
        address or "", 0, secrets.token_bytes(32), request.group_name, subscription
    )
    addresses = (address,) if address else tuple(net.local_addresses())
    endpoint = Endpoint(request.host_id, addresses, server.port, secrets.token_bytes(32))
    # nobody knows of its port so far
    server.secret = secret_of(endpoint, getattr(directory, "secret", b""))
    return server, endpoint, server.secret


def _open_fixed(
    directory: FixedDirectory, key: str, subscription: Subscription, deadline: float
) -> RendezvousServer:
    """Listen at the given port; it may be another rank 0's, or for a moment an earlier meeting's."""
    started = time.monotonic()
    where = _listening_address(directory.host)
    while True:
        try:
            return open_server(where, directory.port, directory.secret, key, subscription)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL and where:
                _LOG.debug(
                    "group %r (rank %d): %s is no address of this host: listening on all addresses instead",
                    key,
                    0,
                    where,
                )
                where = ""
                continue
            if error.errno != errno.EADDRINUSE:
                raise OptionError(
                    f"init_method: cannot listen at {directory.host}:{directory.port}: {error.strerror}; "
                    f"choose an address of rank 0's host and a port above 1023"
                ) from error
        found = probe(directory.endpoint, key)
        now = time.monotonic()
        if found is Found.RIVAL:
            raise taken(
                0, [who_am_i(), f"another process that meets at {directory.host}:{directory.port}"]
            )
        patience_is_over = now > started + _PATIENCE_WITH_A_TAKEN_PORT_S
        if (
            found is Found.STRANGER
            or now >= deadline
            or (found is Found.NOBODY and patience_is_over)
        ):
            raise OptionError(
                f"init_method: port {directory.port} of {directory.host} is taken by another program; choose a free "
                f"port (one that torch.distributed or another job serves is not free), or init_method='file:///...'"
            )
        time.sleep(0.05)


def _listening_address(name: str) -> str:
    """Return the literal address to listen at; empty, for all, where the name may mean another one elsewhere."""
    if name == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return ""


class _Assembly:
    """The ranks that came, watched until all are told."""

    def __init__(self, request: JoinRequest, inbox: JoinerQueue, deadline: float) -> None:
        self._request = request
        self._inbox = inbox
        self._deadline = deadline
        self._joiners: list[Joiner] = []
        self._error = request.refuses()
        self._informed: set[tuple[int, str]] = set()
        self._strangers: dict[int, str] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(inbox, selectors.EVENT_READ)

    def gather(self) -> None:
        """Wait until every rank has come."""
        grace_ends: float | None = None
        while True:
            error = self._error or disagreement(
                [self._request, *(joiner.request for joiner in self._joiners)]
            )
            missing = self._missing()
            now = time.monotonic()
            if error is not None:
                # Ranks that come within a moment hear of it too; without this they would wait for rank 0.
                if grace_ends is None:
                    grace_ends = self._deadline if self._request.refusal else now + _GRACE_S
                    self._step(now)  # who is gone already disagrees with nobody
                    continue
                if not missing or now >= grace_ends or now >= self._limit():
                    raise error
            elif not missing:
                return
            else:
                grace_ends = None
                if now >= self._limit():
                    raise self._did_not_come(missing)
            self._step(self._limit() if grace_ends is None else min(grace_ends, self._limit()))

    def hurry(self, seconds: float) -> None:
        """Give up so soon."""
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def decide(self, properties: dict[str, Any]) -> tuple[Table, socket.socket]:
        """Give every rank its address, and wait until all listen."""
        hosts = self._places()
        for joiner in self._joiners:
            self._send(joiner, Message.PLACE, pack({"host": hosts[joiner.request.rank]}))
        try:
            listener = net.listen(hosts[0])
        except OSError as error:
            remedy = remedy_for_system(error, "choose with interface=")
            raise OptionError(f"rank 0 cannot listen on {hosts[0]}: {error}; {remedy}") from error
        try:
            while self._error is None and not all(joiner.port for joiner in self._joiners):
                late = tuple(
                    sorted(joiner.request.rank for joiner in self._joiners if not joiner.port)
                )
                if time.monotonic() >= self._limit():
                    raise CollectiveTimeoutError(
                        f"{_listed(late)} came but stopped answering in the meeting", late
                    )
                self._step(self._limit())
            if self._error is not None:
                raise self._error
        except BaseException:
            listener.close()
            raise
        ports = {0: listener.getsockname()[1]} | {
            joiner.request.rank: joiner.port for joiner in self._joiners
        }
        host_ids = {0: self._request.host_id} | {
            joiner.request.rank: joiner.request.host_id for joiner in self._joiners
        }
        ranks = range(self._request.world_size)
        addresses = tuple((hosts[rank], ports[rank]) for rank in ranks)
        return Table.fresh(addresses, tuple(host_ids[rank] for rank in ranks), properties), listener

    def conclude(self, table: Table) -> None:
        """Tell every rank the table; from here on the group exists, and it is the group that notices who is lost."""
        payload = table.encode()
        for joiner in self._joiners:
            self._send(joiner, Message.TABLE, payload)

    def give_up(self, error: BaseException) -> None:
        """Tell every rank that came why there will be no group."""
        if not isinstance(error, CollectiveError):
            what = (
                "was interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {error!r}"
            )
            error = PeerLostError(f"rank 0 {what} during the rendezvous", (0,))
        self._admit()
        self._error = error
        payload = encode_error(error)
        for joiner in self._joiners:
            self._informed.add((joiner.request.rank, joiner.request.who))
            with contextlib.suppress(OSError):
                net.send_frame(joiner.sock, Message.FAILED, payload, time.monotonic() + _GRACE_S)

    def dismiss(self) -> None:
        """Close every connection; who came too late to be told anything else learns that the rank is taken."""
        for item in self._inbox.close():
            if not isinstance(item, Joiner):
                continue
            if self._means_another_meeting(item.request):
                self._turn_away(item)
                continue
            error = self._error or taken(
                item.request.rank,
                [item.request.who, "another process with which the group has met"],
            )
            with contextlib.suppress(OSError):
                net.send_frame(
                    item.sock, Message.FAILED, encode_error(error), time.monotonic() + _GRACE_S
                )
            item.sock.close()
        for joiner in self._joiners:
            joiner.sock.close()
        self._selector.close()

    def _did_not_come(self, missing: tuple[int, ...]) -> CollectiveTimeoutError:
        return CollectiveTimeoutError(
            f"expected {self._request.world_size} ranks to meet within the timeout, but {_listed(missing)} did not "
            f"come; "
            f"start every rank with the same group_name, world_size and init_method, or allow more time with timeout_s"
            f"{''.join(f'; {words}' for words in self._strangers.values())}",
            missing,
        )

    def _missing(self) -> tuple[int, ...]:
        came = {0, *(joiner.request.rank for joiner in self._joiners)}
        if self._error is not None:
            came.update(self._strangers)
        return tuple(rank for rank in range(self._request.world_size) if rank not in came)

    def _limit(self) -> float:
        return min([self._deadline, *(joiner.deadline for joiner in self._joiners)])

    def _step(self, until: float) -> None:
        """Wait for the next thing to happen, a slice at most, and note it."""
        timeout = min(_SLICE_S, max(0.0, until - time.monotonic()))
        for key, _ in self._selector.select(timeout):
            if isinstance(key.data, Joiner):
                self._hear(key.data)
            else:
                self._admit()

    def _admit(self) -> None:
        for item in self._inbox.take():
            if isinstance(item, str):
                self._error = taken(0, [self._request.who, item])
                continue
            if isinstance(item, Stranger):
                self._meet_stranger(item)
                continue
            if self._means_another_meeting(item.request):
                self._turn_away(item)
                continue
            self._joiners.append(item)
            self._selector.register(item.sock, selectors.EVENT_READ, item)
            refusal = item.request.refuses()
            if refusal is not None:
                self._error = self._error or refusal
                self._informed.add((item.request.rank, item.request.who))
            self._send(item, Message.WELCOME)
            for words in self._strangers.values():
                self._note(item, words)

    def _meet_stranger(self, stranger: Stranger) -> None:
        """Give up if one of the ranks has another secret; who is somebody else's process, or far away, may be lying.

        It may also be of another job at this port: then the rank that it gives has come, or will not be missing long.
        """
        request = stranger.request
        if request.world_size != self._request.world_size or request.rank not in self._missing():
            return
        message = f"rank {request.rank} ({request.who}) has another secret than rank 0; {MISTAKE}"
        if stranger.is_own:
            self._error = self._error or request.refuses() or OptionError(message)
            self._strangers[request.rank] = message
        elif request.rank not in self._strangers and len(self._strangers) < _STRANGERS:
            words = f"a process that calls itself rank {request.rank} ({request.who!r:.100}) came with another secret"
            self._strangers[request.rank] = words
            _LOG.warning("group %r (rank %d): %s; %s", request.group_name, 0, words, MISTAKE)
            for joiner in list(self._joiners):
                self._note(joiner, words)

    def _means_another_meeting(self, request: JoinRequest) -> bool:
        """Return whether a rank comes for the next attempt, or refuses another one than this.

        Programs catch BackendUnavailableError and call again with another backend, some ranks before others.
        """
        refusals = (request.refuses(), self._request.refuses())
        if request.backend != self._request.backend and any(
            isinstance(r, BackendUnavailableError) for r in refusals
        ):
            return True
        return (request.rank, request.who) in self._informed

    def _turn_away(self, joiner: Joiner) -> None:
        with contextlib.suppress(OSError):
            net.send_frame(joiner.sock, Message.RETRY, b"", time.monotonic() + _GRACE_S)
        joiner.sock.close()

    def _hear(self, joiner: Joiner) -> None:
        """Read what a rank says; before it was given an address, it can only have gone."""
        try:
            kind, payload = net.recv_frame(
                joiner.sock, time.monotonic() + _GRACE_S, net.UNPROVEN_LIMIT
            )
            if kind == Message.FAILED:
                error = decode_error(payload)
                error.args = (f"rank {joiner.request.rank}: {error}",)
                self._error = self._error or error
            elif kind == Message.BOUND:
                joiner.port = int(unpack(payload, port=int)["port"])
            else:
                raise net.FrameError(f"unexpected frame of kind {kind}")
        except (ConnectionError, TimeoutError) as reason:
            self._lose(joiner, reason)

    def _send(self, joiner: Joiner, kind: Message, payload: bytes = b"") -> None:
        try:
            net.send_frame(
                joiner.sock, kind, payload, max(self._limit(), time.monotonic() + _GRACE_S)
            )
        except (ConnectionError, TimeoutError) as error:
            self._lose(joiner, error)

    def _note(self, joiner: Joiner, words: str) -> None:
        """Let a rank know what may concern it; whether it is gone is found out elsewhere."""
        with contextlib.suppress(OSError):
            net.send_frame(
                joiner.sock, Message.NOTE, pack({"note": words}), time.monotonic() + _GRACE_S
            )

    def _lose(self, joiner: Joiner, error: OSError) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(joiner.sock)
        rank = joiner.request.rank
        if self._error is None and self._is_left_over(joiner):
            _LOG.debug(
                "group %r (rank %d): %s, which asked for another group as rank %d, is gone and left out",
                self._request.group_name,
                0,
                joiner.request.who,
                rank,
            )
            self._joiners.remove(joiner)
            joiner.sock.close()
            return
        self._error = self._error or PeerLostError(
            f"rank {rank} ({joiner.request.who}) was lost during the rendezvous ({error}); look for its own error "
            f"message, then start the group again on every rank",
            (rank,),
        )

    def _is_left_over(self, joiner: Joiner) -> bool:
        """Return whether a rank that is gone was of an earlier run: it disagrees, or somebody else has its rank."""
        request, own = joiner.request, self._request
        return (request.world_size, request.backend) != (own.world_size, own.backend) or any(
            other is not joiner and other.request.rank == request.rank for other in self._joiners
        )

    def _places(self) -> dict[int, str]:
        """Return the address at which each rank's control plane is to listen."""
        requests = {0: self._request} | {
            joiner.request.rank: joiner.request for joiner in self._joiners
        }
        if len({request.host_id for request in requests.values()}) == 1:
            return {rank: request.address or "127.0.0.1" for rank, request in requests.items()}
        external = next(
            net.plain_address(joiner.sock.getsockname()[0])
            for joiner in self._joiners
            if joiner.request.host_id != self._request.host_id
        )
        places = {0: self._request.address or external}
        for joiner in self._joiners:
            request = joiner.request
            is_neighbour = request.host_id == self._request.host_id and net.is_loopback(
                request.seen_from
            )
            places[request.rank] = request.address or (
                external if is_neighbour else request.seen_from
            )
        return places


def _listed(ranks: tuple[int, ...]) -> str:
    if len(ranks) > 20:
        return f"{len(ranks)} ranks ({', '.join(map(str, ranks[:20]))}, ...)"
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
