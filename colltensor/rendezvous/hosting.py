"""The part of a meeting that rank 0 plays: listen, collect the others, decide, tell everyone.

Imports errors, net and the meeting's own modules only, and no framework.
"""

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
from colltensor.rendezvous.hub import Arrival, Hub, Inbox, Stranger, Subscription, leave_hub, open_hub, remember
from colltensor.rendezvous.joining import Found, probe, secret_of, who_am_i
from colltensor.rendezvous.messages import (
    Hello,
    Invitation,
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

_LOG = logging.getLogger(__name__)
_SLICE_S = 0.5
_GRACE_S = 1.0
_NOTICE_S = 2.0
_STRANGERS = 4
_PATIENCE_WITH_A_TAKEN_PORT_S = 3.0


def host(directory: Directory, hello: Hello, deadline: float,
         properties: dict[str, Any]) -> tuple[Table, socket.socket, bytes]:
    """Meet as rank 0.

    Args:
        directory: Where to say how this rank is reached.
        hello: What this rank says of itself.
        deadline: When to give up; earlier if a rank that came would give up earlier.
        properties: What the other ranks are to be told.

    Returns:
        The table that every rank got, this rank's own listener, and the meeting's secret.
    """
    key = hello.group_name
    inbox = Inbox()
    assembly = _Assembly(hello, inbox, deadline)
    hub: Hub | None = None
    try:
        scope = str(getattr(directory, "scope", ""))
        hub, invitation, secret = _open(directory, hello, Subscription(inbox, scope), deadline)
        try:
            directory.publish(key, invitation.encode())
        except OptionError as error:
            elsewhere = getattr(directory, "elsewhere", None)
            if elsewhere is not None and isinstance(error.__cause__, OSError):  # what else is wrong all ranks see
                directory = elsewhere
                assembly.hurry(_NOTICE_S)
                with contextlib.suppress(CollectiveError):  # all are to see the first error
                    directory.publish(key, invitation.encode())
                    assembly.gather()
            raise
        assembly.gather()
        with contextlib.ExitStack() as undo:
            table, listener = assembly.decide(properties)
            undo.enter_context(listener)
            remember(scope, key, hello.world_size)
            assembly.conclude(table)
            undo.pop_all()
        return table, listener, secret
    except BaseException as error:
        if isinstance(error, CollectiveTimeoutError) and hub is not None and hub.obstacle:
            error.args = (f"{error}; rank 0 could not hear who came: {hub.obstacle}",)
        assembly.give_up(error)
        raise
    finally:
        if hub is not None:
            leave_hub(hub, key)
        assembly.dismiss()
        try:
            directory.withdraw(key)
        except OSError as error:
            _LOG.debug("group %r (rank %d): its invitation could not be removed: %s", key, 0, error)


def _open(directory: Directory, hello: Hello, subscription: Subscription,
          deadline: float) -> tuple[Hub, Invitation, bytes]:
    """Return the hub, how it is reached, and the meeting's secret."""
    if getattr(directory, "secret", None) == b"":
        warn_of_strangers(str(getattr(directory, "host", "")), hello.group_name, hello.rank)
    if isinstance(directory, FixedDirectory):
        return _open_fixed(directory, hello.group_name, subscription, deadline), directory.invitation, directory.secret
    address = hello.address or getattr(directory, "address", None)
    hub = open_hub(address or "", 0, secrets.token_bytes(32), hello.group_name, subscription)
    addresses = (address,) if address else tuple(net.local_addresses())
    invitation = Invitation(hello.host_id, addresses, hub.port, secrets.token_bytes(32))
    hub.secret = secret_of(invitation, getattr(directory, "secret", b""))  # nobody knows of its port so far
    return hub, invitation, hub.secret


def _open_fixed(directory: FixedDirectory, key: str, subscription: Subscription, deadline: float) -> Hub:
    """Listen at the given port; it may be another rank 0's, or for a moment an earlier meeting's."""
    started = time.monotonic()
    where = _listening_address(directory.host)
    while True:
        try:
            return open_hub(where, directory.port, directory.secret, key, subscription)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL and where:
                _LOG.debug(
                    "group %r (rank %d): %s is no address of this host: listening on all addresses instead",
                    key, 0, where,
                )
                where = ""
                continue
            if error.errno != errno.EADDRINUSE:
                raise OptionError(
                    f"init_method: cannot listen at {directory.host}:{directory.port}: {error.strerror}; "
                    f"choose an address of rank 0's host and a port above 1023"
                ) from error
        found = probe(directory.invitation, key)
        now = time.monotonic()
        if found is Found.RIVAL:
            raise taken(0, [who_am_i(), f"another process that meets at {directory.host}:{directory.port}"])
        patience_is_over = now > started + _PATIENCE_WITH_A_TAKEN_PORT_S
        if found is Found.STRANGER or now >= deadline or (found is Found.NOBODY and patience_is_over):
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

    def __init__(self, hello: Hello, inbox: Inbox, deadline: float) -> None:
        self._hello = hello
        self._inbox = inbox
        self._deadline = deadline
        self._arrivals: list[Arrival] = []
        self._error = hello.refuses()
        self._informed: set[tuple[int, str]] = set()
        self._strangers: dict[int, str] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(inbox, selectors.EVENT_READ)

    def gather(self) -> None:
        """Wait until every rank has come."""
        grace_ends: float | None = None
        while True:
            error = self._error or disagreement([self._hello, *(arrival.hello for arrival in self._arrivals)])
            missing = self._missing()
            now = time.monotonic()
            if error is not None:
                # Ranks that come within a moment hear of it too; without this they would wait for rank 0.
                if grace_ends is None:
                    grace_ends = self._deadline if self._hello.refusal else now + _GRACE_S
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
        for arrival in self._arrivals:
            self._send(arrival, Message.PLACE, pack({"host": hosts[arrival.hello.rank]}))
        try:
            listener = net.listen(hosts[0])
        except OSError as error:
            remedy = remedy_for_system(error, "choose with interface=")
            raise OptionError(f"rank 0 cannot listen on {hosts[0]}: {error}; {remedy}") from error
        try:
            while self._error is None and not all(arrival.port for arrival in self._arrivals):
                late = tuple(sorted(arrival.hello.rank for arrival in self._arrivals if not arrival.port))
                if time.monotonic() >= self._limit():
                    raise CollectiveTimeoutError(f"{_listed(late)} came but stopped answering in the meeting", late)
                self._step(self._limit())
            if self._error is not None:
                raise self._error
        except BaseException:
            listener.close()
            raise
        ports = {0: listener.getsockname()[1]} | {arrival.hello.rank: arrival.port for arrival in self._arrivals}
        host_ids = {0: self._hello.host_id} | {arrival.hello.rank: arrival.hello.host_id for arrival in self._arrivals}
        ranks = range(self._hello.world_size)
        addresses = tuple((hosts[rank], ports[rank]) for rank in ranks)
        return Table.fresh(addresses, tuple(host_ids[rank] for rank in ranks), properties), listener

    def conclude(self, table: Table) -> None:
        """Tell every rank the table; from here on the group exists, and it is the group that notices who is lost."""
        payload = table.encode()
        for arrival in self._arrivals:
            self._send(arrival, Message.TABLE, payload)

    def give_up(self, error: BaseException) -> None:
        """Tell every rank that came why there will be no group."""
        if not isinstance(error, CollectiveError):
            what = "was interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {error!r}"
            error = PeerLostError(f"rank 0 {what} during the rendezvous", (0,))
        self._admit()
        self._error = error
        payload = encode_error(error)
        for arrival in self._arrivals:
            self._informed.add((arrival.hello.rank, arrival.hello.who))
            with contextlib.suppress(OSError):
                net.send_frame(arrival.sock, Message.FAILED, payload, time.monotonic() + _GRACE_S)

    def dismiss(self) -> None:
        """Close every connection; who came too late to be told anything else learns that the rank is taken."""
        for item in self._inbox.close():
            if not isinstance(item, Arrival):
                continue
            if self._means_another_meeting(item.hello):
                self._turn_away(item)
                continue
            error = self._error or taken(
                item.hello.rank, [item.hello.who, "another process with which the group has met"]
            )
            with contextlib.suppress(OSError):
                net.send_frame(item.sock, Message.FAILED, encode_error(error), time.monotonic() + _GRACE_S)
            item.sock.close()
        for arrival in self._arrivals:
            arrival.sock.close()
        self._selector.close()

    def _did_not_come(self, missing: tuple[int, ...]) -> CollectiveTimeoutError:
        return CollectiveTimeoutError(
            f"expected {self._hello.world_size} ranks to meet within the timeout, but {_listed(missing)} did not come; "
            f"start every rank with the same group_name, world_size and init_method, or allow more time with timeout_s"
            f"{''.join(f'; {words}' for words in self._strangers.values())}",
            missing,
        )

    def _missing(self) -> tuple[int, ...]:
        came = {0, *(arrival.hello.rank for arrival in self._arrivals)}
        if self._error is not None:
            came.update(self._strangers)
        return tuple(rank for rank in range(self._hello.world_size) if rank not in came)

    def _limit(self) -> float:
        return min([self._deadline, *(arrival.deadline for arrival in self._arrivals)])

    def _step(self, until: float) -> None:
        """Wait for the next thing to happen, a slice at most, and note it."""
        timeout = min(_SLICE_S, max(0.0, until - time.monotonic()))
        for key, _ in self._selector.select(timeout):
            if isinstance(key.data, Arrival):
                self._hear(key.data)
            else:
                self._admit()

    def _admit(self) -> None:
        for item in self._inbox.take():
            if isinstance(item, str):
                self._error = taken(0, [self._hello.who, item])
                continue
            if isinstance(item, Stranger):
                self._meet_stranger(item)
                continue
            if self._means_another_meeting(item.hello):
                self._turn_away(item)
                continue
            self._arrivals.append(item)
            self._selector.register(item.sock, selectors.EVENT_READ, item)
            refusal = item.hello.refuses()
            if refusal is not None:
                self._error = self._error or refusal
                self._informed.add((item.hello.rank, item.hello.who))
            self._send(item, Message.WELCOME)
            for words in self._strangers.values():
                self._note(item, words)

    def _meet_stranger(self, stranger: Stranger) -> None:
        """Give up if one of the ranks has another secret; who is somebody else's process, or far away, may be lying.

        It may also be of another job at this port: then the rank that it gives has come, or will not be missing long.
        """
        hello = stranger.hello
        if hello.world_size != self._hello.world_size or hello.rank not in self._missing():
            return
        message = f"rank {hello.rank} ({hello.who}) has another secret than rank 0; {MISTAKE}"
        if stranger.is_own:
            self._error = self._error or hello.refuses() or OptionError(message)
            self._strangers[hello.rank] = message
        elif hello.rank not in self._strangers and len(self._strangers) < _STRANGERS:
            words = f"a process that calls itself rank {hello.rank} ({hello.who!r:.100}) came with another secret"
            self._strangers[hello.rank] = words
            _LOG.warning("group %r (rank %d): %s; %s", hello.group_name, 0, words, MISTAKE)
            for arrival in list(self._arrivals):
                self._note(arrival, words)

    def _means_another_meeting(self, hello: Hello) -> bool:
        """Return whether a rank comes for the next attempt, or refuses another one than this.

        Programs catch BackendUnavailableError and call again with another backend, some ranks before others.
        """
        refusals = (hello.refuses(), self._hello.refuses())
        if hello.backend != self._hello.backend and any(isinstance(r, BackendUnavailableError) for r in refusals):
            return True
        return (hello.rank, hello.who) in self._informed

    def _turn_away(self, arrival: Arrival) -> None:
        with contextlib.suppress(OSError):
            net.send_frame(arrival.sock, Message.RETRY, b"", time.monotonic() + _GRACE_S)
        arrival.sock.close()

    def _hear(self, arrival: Arrival) -> None:
        """Read what a rank says; before it was given an address, it can only have gone."""
        try:
            kind, payload = net.recv_frame(arrival.sock, time.monotonic() + _GRACE_S, net.UNPROVEN_LIMIT)
            if kind == Message.FAILED:
                error = decode_error(payload)
                error.args = (f"rank {arrival.hello.rank}: {error}",)
                self._error = self._error or error
            elif kind == Message.BOUND:
                arrival.port = int(unpack(payload, port=int)["port"])
            else:
                raise net.FrameError(f"unexpected frame of kind {kind}")
        except (ConnectionError, TimeoutError) as reason:
            self._lose(arrival, reason)

    def _send(self, arrival: Arrival, kind: Message, payload: bytes = b"") -> None:
        try:
            net.send_frame(arrival.sock, kind, payload, max(self._limit(), time.monotonic() + _GRACE_S))
        except (ConnectionError, TimeoutError) as error:
            self._lose(arrival, error)

    def _note(self, arrival: Arrival, words: str) -> None:
        """Let a rank know what may concern it; whether it is gone is found out elsewhere."""
        with contextlib.suppress(OSError):
            net.send_frame(arrival.sock, Message.NOTE, pack({"note": words}), time.monotonic() + _GRACE_S)

    def _lose(self, arrival: Arrival, error: OSError) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(arrival.sock)
        rank = arrival.hello.rank
        if self._error is None and self._is_left_over(arrival):
            _LOG.debug(
                "group %r (rank %d): %s, which asked for another group as rank %d, is gone and left out",
                self._hello.group_name, 0, arrival.hello.who, rank,
            )
            self._arrivals.remove(arrival)
            arrival.sock.close()
            return
        self._error = self._error or PeerLostError(
            f"rank {rank} ({arrival.hello.who}) was lost during the rendezvous ({error}); look for its own error "
            f"message, then start the group again on every rank",
            (rank,),
        )

    def _is_left_over(self, arrival: Arrival) -> bool:
        """Return whether a rank that is gone was of an earlier run: it disagrees, or somebody else has its rank."""
        hello, own = arrival.hello, self._hello
        return (hello.world_size, hello.backend) != (own.world_size, own.backend) or any(
            other is not arrival and other.hello.rank == hello.rank for other in self._arrivals
        )

    def _places(self) -> dict[int, str]:
        """Return the address at which each rank's control plane is to listen."""
        hellos = {0: self._hello} | {arrival.hello.rank: arrival.hello for arrival in self._arrivals}
        if len({hello.host_id for hello in hellos.values()}) == 1:
            return {rank: hello.address or "127.0.0.1" for rank, hello in hellos.items()}
        external = next(
            net.plain_address(arrival.sock.getsockname()[0])
            for arrival in self._arrivals
            if arrival.hello.host_id != self._hello.host_id
        )
        places = {0: self._hello.address or external}
        for arrival in self._arrivals:
            hello = arrival.hello
            is_neighbour = hello.host_id == self._hello.host_id and net.is_loopback(hello.seen_from)
            places[hello.rank] = hello.address or (external if is_neighbour else hello.seen_from)
        return places


def _listed(ranks: tuple[int, ...]) -> str:
    if len(ranks) > 20:
        return f"{len(ranks)} ranks ({', '.join(map(str, ranks[:20]))}, ...)"
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
