"""The exchange of a meeting over TCP: rank 0 hears every rank, and tells all what comes of it.

Rank 0 listens and leaves in a directory how it is reached. The others find that, prove that they
know its secret, and stay connected. So rank 0 sees who is missing, who was lost, and who is no
rank. Whatever ends the meeting, rank 0 tells everyone who came.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import ipaddress
import logging
import secrets
import selectors
import socket
import time
from dataclasses import replace

from colltensor import net
from colltensor.errors import (
    BackendUnavailableError,
    CollectiveError,
    CollectiveTimeoutError,
    GroupError,
    OptionError,
    PeerLostError,
    is_from_handler,
    remedy_for_system,
)
from colltensor.rendezvous.protocol import (
    Combine,
    Endpoint,
    Introduction,
    JoinRequest,
    Meeting,
    Message,
    decode_error,
    disagreement,
    encode_error,
    error_in,
    meet_through,
    pack,
    perform,
    taken,
    unpack,
    who_am_i,
)
from colltensor.rendezvous.secret import MISTAKE, derived, warn_of_strangers
from colltensor.rendezvous.server import (
    Joiner,
    JoinerQueue,
    RendezvousServer,
    Stranger,
    leave_server,
    open_server,
    remember,
)
from colltensor.rendezvous.stores import Directory, FixedDirectory

_LOG = logging.getLogger(__name__)
_SLICE_S = 0.5
_GRACE_S = 1.0
_NOTICE_S = 2.0
_REFUSAL_S = 2.0
_STRANGERS = 4
_PATIENCE_WITH_A_TAKEN_PORT_S = 3.0
_FREE_WITHIN_S = 10.0
_CONNECT_S = 3.0
_HANDSHAKE_S = 5.0
_STRANGER_S = 3.0
_REFUSED_S = 0.3
_VERDICT_SLACK_S = 1.0
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.001, 0.1


def meet(directory: Directory, part: Introduction, deadline: float) -> Meeting:
    """Bring the ranks of a new group together.

    Every rank must call, from any thread, at about the same time. No lock is held while waiting,
    and Ctrl-C ends it within a second.

    Args:
        directory: How rank 0 is found.
        part: What this rank says of itself. Where that is an error, the others hear of it: see
            ``report_refusal``.
        deadline: When to give up, by ``time.monotonic()``.

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
    request = part.request
    if request is None or part.error is not None:
        report_refusal(directory, part)
        assert part.error is not None
        raise part.error

    if request.world_size == 1:
        return meet_through(lambda payload: [payload], part)

    try:
        with _exchange(directory, request, deadline) as exchange:
            meeting = perform(exchange, part)
        return replace(meeting, secret=derived(exchange.secret, meeting.secret, b""))
    except CollectiveError as error:
        error.args = (f"{request.location}: {error}",)
        raise
    except (OSError, RuntimeError) as error:
        remedy = remedy_for_system(error, "see that the ranks reach each other")
        # Of RuntimeErrors only the one for want of a thread is the system's.
        if is_from_handler(error) or (
            isinstance(error, RuntimeError) and "new thread" not in str(error)
        ):
            raise
        raise GroupError(f"{request.location}: the rendezvous failed: {error}; {remedy}") from error


def report_refusal(directory: Directory, part: Introduction) -> None:
    """Tell the ranks that meet why this one will not come.

    So they do not wait for it. It takes two seconds at most. Nothing happens where they cannot be
    told: nobody is there, or the group's name or the rank is what was refused.

    Args:
        directory: How rank 0 is found.
        part: What this rank says of itself, with an error.
    """
    if part.request is None or part.request.world_size == 1:
        return
    # the refusal itself is what the caller is to see
    with contextlib.suppress(CollectiveError, OSError):
        deadline = time.monotonic() + _REFUSAL_S
        with _exchange(directory, part.request, deadline) as exchange:
            exchange(part.first(), part.agree)


def _exchange(
    directory: Directory, request: JoinRequest, deadline: float
) -> ServerExchange | ClientExchange:
    side = ServerExchange if request.rank == 0 else ClientExchange
    return side(directory, request, deadline)


class ServerExchange:
    """The exchange as rank 0 has it; used as a context, whose end by an error all ranks hear of.

    Attributes:
        secret: What the ranks met with; empty before the first round.
    """

    def __init__(self, directory: Directory, request: JoinRequest, deadline: float) -> None:
        """Prepare to meet.

        Args:
            directory: Where to say how this rank is reached.
            request: What this rank says of itself.
            deadline: When to give up; earlier if a rank that came would give up earlier.
        """
        self.secret = b""
        self._directory = directory
        self._request = request
        self._deadline = deadline

        self._server: RendezvousServer | None = None
        self._published: tuple[Directory, bytes] | None = None
        self._joiners: list[Joiner] = []
        self._error = request.refuses()
        self._informed: set[tuple[int, str]] = set()
        self._strangers: dict[int, str] = {}

        self._inbox = JoinerQueue(directory.scope())
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._inbox, selectors.EVENT_READ)

    def __enter__(self) -> ServerExchange:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        key, server = self._request.group_name, self._server
        try:
            if error is not None:
                self._give_up(error)
        finally:
            if server is not None:
                leave_server(server, key)
            self._dismiss()
            if self._published is not None:
                directory, endpoint = self._published
                try:
                    directory.remove(key, endpoint)
                except OSError as reason:
                    _LOG.debug(
                        "group %r (rank %d): its endpoint could not be removed: %s", key, 0, reason
                    )

    def __call__(self, payload: bytes, combine: Combine) -> bytes:
        """Tell every rank what comes of what all say; the first time, once all ranks are there."""
        if self._server is None:
            self._open()
            self._gather()
            own = replace(self._request, seen_from=self._seen_from()).encode()
            said = combine([own, *(joiner.request.encode() for joiner in self._joiners)])
        else:
            self._await_places(payload)
            said = combine([payload, *(joiner.place for joiner in self._joiners)])
            # from here on the group exists, and it is the group that notices who is lost
            remember(self._inbox.scope, self._request.group_name, self._request.world_size)
        for joiner in self._joiners:
            self._send(joiner, Message.EVERYBODY, said)
        return said

    def _open(self) -> None:
        """Listen, and let all ranks know where."""
        directory, request = self._directory, self._request
        key = request.group_name
        if directory.secret == b"":
            warn_of_strangers(directory.host, key, request.rank)

        if isinstance(directory, FixedDirectory):
            self.secret = directory.secret
            self._server = _open_fixed(directory, key, self._inbox, self._deadline)
            return

        address = request.address or directory.address()
        self._server = open_server(address or "", 0, secrets.token_bytes(32), key, self._inbox)
        addresses = (address,) if address else tuple(net.local_addresses())
        endpoint = Endpoint(
            request.host_id, addresses, self._server.address[1], secrets.token_bytes(32)
        )
        # nobody knows of its port so far
        self._server.secret = self.secret = directory.sealed(endpoint).secret

        try:
            self._publish(directory, endpoint.encode())
        except OptionError as error:
            elsewhere = directory.elsewhere()
            # what else is wrong all ranks see
            if elsewhere is not None and isinstance(error.__cause__, OSError):
                self._deadline = min(self._deadline, time.monotonic() + _NOTICE_S)
                with contextlib.suppress(CollectiveError):  # all are to see the first error
                    self._publish(elsewhere, endpoint.encode())
                    self._gather()
            raise

    def _publish(self, directory: Directory, endpoint: bytes) -> None:
        """Leave the endpoint; one of a rank 0 that lives no more is replaced."""
        key, stale = self._request.group_name, b""
        backoff = net.Backoff(_FIRST_PAUSE_S, _LAST_PAUSE_S, time.monotonic() + _FREE_WITHIN_S)
        while (found := directory.put(key, endpoint, stale)) is not None:
            rival = directory.decoded(found)
            if rival is not None and probe(rival, key) is Found.RIVAL:
                raise taken(0, [who_am_i(), f"another process that meets at {directory.scope()}"])
            stale = found
            if not backoff.pause():
                raise OptionError(
                    f"group_name: rank 0 cannot leave its endpoint at {directory.scope()}, where another one stays; "
                    f"choose another group_name"
                )
        self._published = directory, endpoint

    def _gather(self) -> None:
        """Wait until every rank has come."""
        grace_ends: float | None = None
        while True:
            error = self._error or disagreement(
                [self._request, *(joiner.request for joiner in self._joiners)]
            )

            missing = self._missing()
            now = time.monotonic()
            if error is not None:
                # Ranks that come within a moment hear of it too. Without this they would wait for
                # rank 0.
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

    def _await_places(self, payload: bytes) -> None:
        """Wait until every rank has said where it listens; who comes now has come too late."""
        self._selector.unregister(self._inbox)
        self._error = self._error or error_in(payload)
        while self._error is None and not all(joiner.place for joiner in self._joiners):
            if time.monotonic() >= self._limit():
                late = tuple(
                    sorted(joiner.request.rank for joiner in self._joiners if not joiner.place)
                )
                raise CollectiveTimeoutError(
                    f"{_listed(late)} came but stopped answering in the meeting", late
                )
            self._step(self._limit())
        if self._error is not None:
            raise self._error

    def _give_up(self, error: BaseException) -> None:
        """Tell every rank that came why there will be no group."""
        obstacle = self._server.obstacle if self._server is not None else ""
        if obstacle and isinstance(error, CollectiveTimeoutError):
            error.args = (f"{error}; rank 0 could not hear who came: {obstacle}",)
        if not isinstance(error, CollectiveError):
            what = (
                "was interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {error!r}"
            )
            error = PeerLostError(f"rank 0 {what} during the rendezvous", (0,))
        self._admit()
        self._error = error
        for joiner in self._joiners:
            self._informed.add((joiner.request.rank, joiner.request.who))
            _try_send(joiner.sock, Message.FAILED, encode_error(error))

    def _dismiss(self) -> None:
        """Close every connection.

        Who came too late to be told anything else learns that the rank is taken.
        """
        for item in self._inbox.close():
            if not isinstance(item, Joiner):
                continue

            if self._means_another_meeting(item.request):
                _try_send(item.sock, Message.RETRY)
            else:
                error = self._error or taken(
                    item.request.rank,
                    [item.request.who, "another process with which the group has met"],
                )
                _try_send(item.sock, Message.FAILED, encode_error(error))
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
                _try_send(item.sock, Message.RETRY)
                item.sock.close()
                continue

            self._joiners.append(item)
            self._selector.register(item.sock, selectors.EVENT_READ, item)
            refusal = item.request.refuses()
            if refusal is not None:
                self._error = self._error or refusal
                self._informed.add((item.request.rank, item.request.who))

            self._send(item, Message.WELCOME)
            for words in self._strangers.values():
                _try_send(item.sock, Message.NOTE, pack({"note": words}))

    def _meet_stranger(self, stranger: Stranger) -> None:
        """Give up if one of the ranks has another secret.

        A process that is somebody else's, or far away, may be lying. It may also be of another job
        at this port. Then the rank that it gives has come, or will not be missing long.
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
            for joiner in self._joiners:  # whether one is gone is found out elsewhere
                _try_send(joiner.sock, Message.NOTE, pack({"note": words}))

    def _means_another_meeting(self, request: JoinRequest) -> bool:
        """Return whether a rank comes for the next attempt, or refuses another one than this.

        Programs catch BackendUnavailableError and call again with another backend, some ranks
        before others.
        """
        refusals = (request.refuses(), self._request.refuses())
        if request.backend != self._request.backend and any(
            isinstance(r, BackendUnavailableError) for r in refusals
        ):
            return True
        return (request.rank, request.who) in self._informed

    def _hear(self, joiner: Joiner) -> None:
        """Read what a rank says; before it was told who is there, it can only have gone."""
        try:
            kind, payload = net.recv_frame(
                joiner.sock, time.monotonic() + _GRACE_S, net.UNPROVEN_LIMIT
            )
            if kind != Message.PLACE:
                raise net.FrameError(f"unexpected frame of kind {kind}")
            joiner.place = payload
            self._error = self._error or error_in(payload)
        except (ConnectionError, TimeoutError) as reason:
            self._lose(joiner, reason)

    def _send(self, joiner: Joiner, kind: Message, payload: bytes = b"") -> None:
        try:
            net.send_frame(
                joiner.sock, kind, payload, max(self._limit(), time.monotonic() + _GRACE_S)
            )
        except (ConnectionError, TimeoutError) as error:
            self._lose(joiner, error)

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
        """Return whether a rank that is gone was of an earlier run.

        It was if it disagrees, or if somebody else has its rank.
        """
        request, own = joiner.request, self._request
        return (request.world_size, request.backend) != (own.world_size, own.backend) or any(
            other is not joiner and other.request.rank == request.rank for other in self._joiners
        )

    def _seen_from(self) -> str:
        """Return the address at which the other hosts reach this one.

        It is empty where there are no others.
        """
        for joiner in self._joiners:
            if joiner.request.host_id != self._request.host_id:
                return net.plain_address(joiner.sock.getsockname()[0])
        return ""


class ClientExchange:
    """The exchange as every rank but 0 has it; used as a context.

    Attributes:
        secret: What the ranks met with; empty before the first round.
    """

    def __init__(self, directory: Directory, request: JoinRequest, deadline: float) -> None:
        """Prepare to meet.

        Args:
            directory: Where rank 0 says how it is reached.
            request: What this rank says of itself; times and own address are filled in here.
            deadline: When to give up.
        """
        self.secret = b""
        self._directory = directory
        self._request = request
        self._deadline = deadline
        self._started = time.monotonic()
        self._sock: socket.socket | None = None
        self._reason = ""
        self._stranger_since: float | None = None
        self._refused_since: float | None = None

    def __enter__(self) -> ClientExchange:
        return self

    def __exit__(self, *_: object) -> None:
        if self._sock is not None:
            self._sock.close()

    def __call__(self, payload: bytes, combine: Combine) -> bytes:
        """Hand over this rank's bytes.

        From the moment that rank 0 takes them, losing it is an error.
        """
        sock = self._sock

        try:
            if sock is None:
                sock = self._sock = self._find_rank_0()
            else:
                net.send_frame(sock, Message.PLACE, payload, self._deadline)
            return self._heard(sock)
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

    def _find_rank_0(self) -> socket.socket:
        """Return the connection to rank 0, which has taken this rank in."""
        key = self._request.group_name
        backoff = net.Backoff(_FIRST_PAUSE_S, _LAST_PAUSE_S, self._deadline)

        while time.monotonic() < self._deadline:
            try:
                endpoint = self._directory.find(key, self._deadline)
                sock = self._enter(endpoint) if endpoint is not None else None
                if sock is not None:
                    return sock
                if endpoint is None:
                    self._reason = self._directory.absent(key)
            except CollectiveError:
                raise
            except (ConnectionError, TimeoutError) as error:
                self._reason = f"last: {error}"
            backoff.pause()

        raise CollectiveTimeoutError(
            f"expected rank 0 to meet this group within the timeout, but it did not come"
            f"{self._reason and ': '}{self._reason}; start every rank with the same group_name and init_method, or "
            f"allow more time with timeout_s (a rank 0 that did start has given up: see its own error message)",
            (0,),
        )

    def _enter(self, endpoint: Endpoint) -> socket.socket | None:
        """Ask rank 0 to take this rank in; None where the next attempt may go better."""
        request = self._request

        with contextlib.ExitStack() as undo:
            try:
                sock = _reach(
                    endpoint, request.group_name, request.host_id, self._deadline, request
                )
                undo.enter_context(sock)
                self._reason = "it answers, but this group is not meeting there"
                self._stranger_since = self._refused_since = None
                if self._is_taken_in(sock):
                    undo.pop_all()
                    self.secret = endpoint.secret
                    return sock
            except CollectiveError:
                raise
            except (ConnectionError, TimeoutError) as error:
                self._judge(endpoint, error)
        return None

    def _judge(self, endpoint: Endpoint, error: OSError) -> None:
        """Note why rank 0 did not take this rank in, and give up where that lasts."""
        now, where = time.monotonic(), _spelt(endpoint)
        self._reason = f"last, at {where}: {error}"

        if isinstance(error, net.FrameError):
            self._reason = f"something else listens at its address ({error})"
            self._stranger_since = self._stranger_since or now
            if not endpoint.host_id and now - self._stranger_since > _STRANGER_S:
                raise OptionError(
                    f"rank 0 was looked for at {where}, but {self._reason}; choose another port or file"
                ) from error
        elif isinstance(error, ConnectionRefusedError):
            self._stranger_since = None
        elif isinstance(error, net.WrongSecretError):
            self._refused_since = self._refused_since or now

        # Not at once: another job's rank 0 may meet at that port for a moment.
        since = self._refused_since if self._directory.secret is not None else None
        if since is not None and now - since > _REFUSED_S:
            raise OptionError(
                f"rank 0 meets at {where} with another secret than this rank has; {MISTAKE}"
            ) from error

    def _is_taken_in(self, sock: socket.socket) -> bool:
        """Say who one is; return whether rank 0 is meeting this group now."""
        now = time.monotonic()
        request = replace(
            self._request,
            seen_from=net.plain_address(sock.getsockname()[0]),
            age_s=now - self._started,
            patience_s=self._deadline - now,
        )
        net.send_frame(sock, Message.JOIN, request.encode(), self._deadline)
        kind, payload = net.recv_frame(sock, min(self._deadline, now + 2 * _HANDSHAKE_S))
        if kind == Message.FAILED:
            raise decode_error(payload)
        if kind not in (Message.WELCOME, Message.RETRY):
            raise net.FrameError(f"expected a welcome, got a frame of kind {kind}")
        return kind == Message.WELCOME

    def _heard(self, sock: socket.socket) -> bytes:
        """Return what rank 0 tells everybody.

        Rank 0 announces the timeout itself, so it gets a little longer.
        """
        while True:
            kind, payload = net.recv_frame(sock, self._deadline + _VERDICT_SLACK_S)

            if kind == Message.EVERYBODY:
                return payload
            if kind == Message.FAILED:
                raise decode_error(payload)
            if kind != Message.NOTE:
                raise net.FrameError(f"expected what everybody says, got a frame of kind {kind}")

            _LOG.warning(
                "group %r (rank %d): rank 0 says: %s; %s",
                self._request.group_name,
                self._request.rank,
                unpack(payload, note=str)["note"],
                MISTAKE,
            )


class Found(enum.Enum):
    """Who answers where an endpoint points to."""

    NOBODY = enum.auto()
    STRANGER = enum.auto()
    OTHER_GROUPS = enum.auto()
    RIVAL = enum.auto()


def probe(endpoint: Endpoint, group_name: str) -> Found:
    """Find out, as rank 0, whether another rank 0 of this group is meeting.

    A living one is told and gives up. Takes a few seconds at most.
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
            until = min(deadline, now + _CONNECT_S + _HANDSHAKE_S)
            net.prove(sock, endpoint.secret, group_name.encode(), until)
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


def _open_fixed(
    directory: FixedDirectory, key: str, inbox: JoinerQueue, deadline: float
) -> RendezvousServer:
    """Listen at the given port.

    It may be another rank 0's, or for a moment an earlier meeting's.
    """
    started = time.monotonic()
    where = _listening_address(directory.host)

    while True:
        try:
            return open_server(where, directory.port, directory.secret, key, inbox)
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
            raise taken(0, [who_am_i(), f"another process that meets at {directory.scope()}"])

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
    """Return the literal address to listen at.

    It is empty, for all, where the name may mean another one elsewhere.
    """
    if name == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return ""


def _try_send(sock: socket.socket, kind: Message, payload: bytes = b"") -> None:
    """Tell a process what may concern it, if it is still there."""
    with contextlib.suppress(OSError):
        net.send_frame(sock, kind, payload, time.monotonic() + _GRACE_S)


def _spelt(endpoint: Endpoint) -> str:
    return f"{', '.join(endpoint.addresses)} port {endpoint.port}"


def _listed(ranks: tuple[int, ...]) -> str:
    if len(ranks) > 20:
        return f"{len(ranks)} ranks ({', '.join(map(str, ranks[:20]))}, ...)"
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
