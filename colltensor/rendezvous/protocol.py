"""The protocol by which ranks meet, whatever carries their bytes.

It says who is there, and where each one listens. A meeting has two rounds, in each of which every
rank says something, and all get what comes of it (``Exchange``). In the first the ranks say who
they are, in the second where they listen. The carrier is TCP through rank 0 (``tcp``), a group that
is split, torch.distributed's store, or the driver of Ray's actors.

The bytes are JSON. They are checked field by field and refused as FrameError: at a port without a
secret anybody may have sent them.
"""

from __future__ import annotations

import contextlib
import enum
import hmac
import json
import math
import operator
import os
import secrets
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

from colltensor import net
from colltensor.errors import (
    CollectiveError,
    GroupError,
    MismatchError,
    OptionError,
    RankError,
    class_name,
    rebuilt,
    remedy_for_system,
)
from colltensor.net import FrameError
from colltensor.rendezvous.secret import MISTAKE, derived, proof

Combine: TypeAlias = Callable[[Sequence[bytes]], bytes]
Exchange: TypeAlias = Callable[[bytes, Combine], bytes]
"""Hands over this rank's bytes and returns what the function makes of every rank's.

The function is called on this rank or on another.
"""

_MAGIC = b"colltensor endpoint 2\n"
_ERROR = b'{"error":'
_REFUSAL_LIMIT = 1000
_NAME_LIMIT = 1024
_WORLD_LIMIT = 1 << 16
_GENERATION_NBYTES, _SECRET_NBYTES = 8, 32


class Message(enum.IntEnum):
    """The kinds of frames of a meeting over TCP."""

    JOIN = 1
    CLAIM = 2
    WELCOME = 3
    RETRY = 4
    FAILED = 5
    PLACE = 6
    EVERYBODY = 7
    NOTE = 8


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """What a rank says of itself.

    Attributes:
        rank: Its rank.
        world_size: How many ranks it expects.
        group_name: The group it wants to join.
        backend: The backend it asked for.
        host_id: ``net.host_id()`` of its process.
        address: The address that its caller chose for it, or None.
        seen_from: Its own address on the way to the others, where that is known.
        who: Its process, for messages.
        age_s: For how long it has been trying, in seconds.
        patience_s: For how long it will go on.
        refusal: Why it will not be in the group, as an encoded error; empty for a rank that means
            to be.
        nonce: Random digits; rank 0's become the group's generation and secret.
        proof: Shows that it was given the secret that the others have.
    """

    rank: int
    world_size: int
    group_name: str
    backend: str
    host_id: str
    address: str | None
    seen_from: str
    who: str
    age_s: float
    patience_s: float
    refusal: str = ""
    nonce: str = field(default="", repr=False)
    proof: str = ""

    def encode(self) -> bytes:
        """Return the message's payload."""
        return pack({name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def decode(cls, payload: bytes) -> JoinRequest:
        """Return the message of a payload.

        Raises:
            FrameError: The payload is malformed.
        """
        fields = unpack(payload, rank=int, world_size=int, group_name=str, backend=str, host_id=str,
                        address=(str, type(None)), seen_from=str, who=str, age_s=float, patience_s=float,
                        refusal=str, nonce=str, proof=str)  # fmt: skip

        # Anybody may have sent these fields, so each must be one that the later steps can use.
        try:
            if fields["seen_from"]:
                net.is_loopback(fields["seen_from"])
            if not math.isfinite(fields["age_s"] + fields["patience_s"]):
                raise ValueError("a length of time is not finite")
            if not 0 <= fields["rank"] < fields["world_size"]:
                raise ValueError(f"there is no rank {fields['rank']} of {fields['world_size']}")
            bytes.fromhex(fields["nonce"] + fields["proof"])
            request = cls(**fields)
        except (OverflowError, TypeError, ValueError) as error:
            raise FrameError(f"malformed request: {error}") from error

        if request.refusal:
            decode_error(request.refusal.encode(errors="replace"))
        return request

    @property
    def location(self) -> str:
        """The beginning of an error message: the operation, the group and the rank."""
        return f"init_collective_group(group_name={self.group_name!r}) on rank {self.rank} of {self.world_size}"

    def refusing(self, error: CollectiveError) -> JoinRequest:
        """Return what a rank says that will not be in the group, and why."""
        message = f"rank {self.rank}: {error}"[:_REFUSAL_LIMIT]
        return replace(
            self,
            refusal=pack({"error": class_name(error), "message": message, "ranks": []}).decode(),
        )

    def refuses(self) -> CollectiveError | None:
        """Return why the rank will not be in the group; None for one that means to be."""
        return decode_error(self.refusal.encode(errors="replace")) if self.refusal else None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where rank 0 listens, and the secret that proves it to be rank 0.

    Attributes:
        host_id: ``net.host_id()`` of rank 0; empty where it is not known.
        addresses: Addresses or host names to try, in this order.
        port: The port.
        secret: Shared by those who may read the endpoint; may be empty.
    """

    host_id: str
    addresses: tuple[str, ...]
    port: int
    secret: bytes = field(repr=False)

    def encode(self) -> bytes:
        """Return the endpoint as a directory keeps it."""
        return _MAGIC + pack({**asdict(self), "secret": self.secret.hex()})

    @classmethod
    def decode(cls, data: bytes) -> Endpoint:
        """Return the endpoint that a directory kept.

        Raises:
            FrameError: The data is no complete endpoint.
        """
        if not data.startswith(_MAGIC):
            raise FrameError(f"expected an endpoint, got {data[:24]!r}")
        fields = unpack(data[len(_MAGIC) :], host_id=str, addresses=list, port=int, secret=str)
        try:
            fields["secret"] = bytes.fromhex(fields["secret"])
            fields["addresses"] = tuple(str(address) for address in fields["addresses"])
            return cls(**fields)
        except (TypeError, ValueError) as error:
            raise FrameError(f"malformed endpoint: {error}") from error

    @staticmethod
    def may_be(data: bytes) -> bool:
        """Return whether the data is an endpoint or the beginning of one."""
        return data.startswith(_MAGIC) or _MAGIC.startswith(data)


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
        listener: This rank's own socket, bound and listening at its entry of ``addresses``.
    """

    rank: int
    world_size: int
    group_name: str
    generation: bytes
    secret: bytes = field(repr=False)
    addresses: tuple[tuple[str, int], ...]
    host_ids: tuple[str, ...]
    listener: socket.socket


class Introduction:
    """One rank's part of a meeting.

    ``first()`` gives its bytes of round one, ``second(agreed)`` those of round two,
    ``finish(table)`` the meeting. ``agree`` and ``tabulate`` combine what the ranks say in a round,
    on every rank or on one for all. An error of one rank travels in its bytes, so that every rank
    raises it, and none waits. Who gives up in between calls ``abandon()``.

    The payloads carry the group's secret. So only the ranks may read the channel, or the ranks must
    have been given a secret that is not in it.

    Attributes:
        request: What this rank says of itself; None where it has no rank or no name to say.
        error: Why this rank will not be in the group, or None.
    """

    def __init__(
        self,
        *,
        group_name: str,
        world_size: int,
        rank: int,
        interface: str | None = None,
        backend: str = "auto",
        address: str | None = None,
        host_id: str | None = None,
        refusal: CollectiveError | None = None,
        secret: bytes = b"",
    ) -> None:
        """Take this rank's part; raises nothing.

        Args:
            group_name: The group's name, the same on every rank.
            world_size: How many ranks there are, the same on every rank.
            rank: This process's rank.
            interface: The network interface (its name or address) on which this rank is to be
                reached. By default it is the loopback within one host, and else the one that
                reaches the others.
            backend: The backend asked for, the same on every rank. Where one rank lacks it, only
                ranks that ask for it too are told: the others may have met this rank's next
                attempt.
            address: This host's address on the network that the hosts share, for ranks on several
                hosts and no ``interface``. By default it is the address of the default route.
            host_id: Names this process's host in place of ``net.host_id()``.
            refusal: Why this rank will not be in the group, which every rank is to raise.
            secret: What all ranks were given, where others can read the channel: the group's secret
                is derived from it.
        """
        self._secret = secret
        self._external = address
        self._listener: socket.socket | None = None
        self._agreed = b""

        self.request: JoinRequest | None = None
        self.error = refusal

        # An error is kept and not raised: it travels in this rank's bytes, and all raise it.
        try:
            self._introduce(group_name, world_size, rank, interface, backend, host_id)
        except CollectiveError as error:
            self.error = refusal or error
        except OSError as error:
            remedy = remedy_for_system(error, "see that the network can be used")
            self.error = refusal or GroupError(f"the network cannot be used: {error}; {remedy}")

        if self.request is not None and self.error is not None:
            self.request = self.request.refusing(self.error)

    def _introduce(
        self,
        group_name: object,
        world_size: object,
        rank: object,
        interface: str | None,
        backend: object,
        host_id: str | None,
    ) -> None:
        """Check what this rank says of itself.

        What can be said of it all the same is in ``request``.
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

        nonce = secrets.token_bytes(_GENERATION_NBYTES + _SECRET_NBYTES)
        host = net.host_id() if host_id is None else host_id
        request = JoinRequest(rank, world_size, group_name, str(backend)[:_NAME_LIMIT], host, None, "", who_am_i(),
                              0.0, 0.0, "", nonce.hex(), proof(self._secret, nonce).hex())  # fmt: skip
        self.request = request

        # From here on the other ranks can hear of an error, because there is a request.
        if request.backend != backend:
            raise OptionError(f"backend must be the name of a backend, got {backend!r:.80}")
        if interface is not None and self.error is None:
            self.request = replace(request, address=net.interface_address(interface))

    def first(self) -> bytes:
        """Return what this rank says of itself."""
        if self.request is not None:
            return self.request.encode()
        assert self.error is not None
        return encode_error(self.error)

    def agree(self, payloads: Sequence[bytes]) -> bytes:
        """Return what the ranks agree on in the first round, or the error that all are to raise."""
        for index, payload in enumerate(payloads):
            error = error_in(payload)
            if error is not None:
                error.args = (f"participant {index}: {error}",)
                return encode_error(error)
        requests = in_rank_order(map(JoinRequest.decode, payloads))
        refusals = [request.refuses() for request in requests if request.refusal]
        problem = (
            next(iter(refusals), None)
            or disagreement(requests)
            or _wrong_number(requests)
            or self._wrong_secret(requests)
        )
        if problem is not None:
            return encode_error(problem)
        hosts = [request.host_id for request in requests]
        return pack({"hosts": hosts, "places": _places(requests), "nonce": requests[0].nonce})

    def second(self, agreed: bytes) -> bytes:
        """Return where this rank listens.

        Args:
            agreed: What ``agree`` returned.

        Raises:
            CollectiveError: A rank's own error, or what the ranks disagree about; the same on every
                rank.
        """
        error = error_in(agreed)
        if error is not None or self.request is None:
            raise self._here(error or self.error or GroupError("this rank has nothing to say"))

        self._agreed, rank = agreed, self.request.rank
        places = unpack(agreed, places=list)["places"]
        address = str(places[rank]) or self._external or net.local_addresses()[0]

        try:
            self._listener = net.listen(address)
        except OSError as reason:
            remedy = remedy_for_system(reason, "choose with interface=")
            message = f"rank {rank}: cannot listen on {address} of {who_am_i()}: {reason}; {remedy}"
            return encode_error(OptionError(message))

        return pack({"rank": rank, "host": address, "port": self._listener.getsockname()[1]})

    def tabulate(self, payloads: Sequence[bytes]) -> bytes:
        """Return the table of addresses from what the ranks said in the second round.

        Returns the error to raise instead, if there is one.
        """
        for payload in payloads:
            if error_in(payload) is not None:
                return payload
        said = [unpack(data, rank=int, host=str, port=int) for data in payloads]
        said.sort(key=lambda fields: fields["rank"])
        return pack({"addresses": [(fields["host"], fields["port"]) for fields in said]})

    def finish(self, table: bytes) -> Meeting:
        """Return what every rank now knows.

        Args:
            table: What ``tabulate`` returned.

        Raises:
            CollectiveError: A rank's own error; the same on every rank.
        """
        with contextlib.ExitStack() as undo:
            undo.callback(self.abandon)
            error = error_in(table)
            if error is not None:
                raise self._here(error)

            mine, listener = self.request, self._listener
            if mine is None or listener is None:
                raise OptionError("finish() must follow first() and second()")

            agreed = unpack(self._agreed, nonce=str, hosts=list)
            addresses = unpack(table, addresses=list)["addresses"]
            nonce = bytes.fromhex(agreed["nonce"])
            said = len(self._agreed).to_bytes(8, "big") + self._agreed + table

            meeting = Meeting(
                mine.rank,
                mine.world_size,
                mine.group_name,
                nonce[:_GENERATION_NBYTES],
                derived(self._secret, nonce[_GENERATION_NBYTES:], said),
                tuple((str(host), int(port)) for host, port in addresses),
                tuple(map(str, agreed["hosts"])),
                listener,
            )

            undo.pop_all()
        return meeting

    def abandon(self) -> None:
        """Close what was opened; for one who will not call ``finish``."""
        if self._listener is not None:
            self._listener.close()

    def _here(self, error: CollectiveError) -> CollectiveError:
        if self.request is not None:
            error.args = (f"{self.request.location}: {error}",)
        return error

    def _wrong_secret(self, requests: Iterable[JoinRequest]) -> CollectiveError | None:
        """Return the error where ranks were given different secrets, as far as this rank knows."""
        others = []
        for request in requests:
            expected = proof(self._secret, bytes.fromhex(request.nonce))
            if not hmac.compare_digest(expected, bytes.fromhex(request.proof)):
                others.append(request.rank)
        if not others:
            return None
        who = "this rank" if 0 in others else " and ".join(f"rank {rank}" for rank in others)
        return OptionError(f"{who} came with another secret than rank 0; {MISTAKE}")


def meet_through(gather: Callable[[bytes], Sequence[bytes]], part: Introduction) -> Meeting:
    """Bring the ranks of a new group together through an exchange of bytes that they have already.

    Args:
        gather: Hands over this rank's bytes and returns every rank's, in one order on every rank.
            It is called twice and bounds its own time. Only these ranks may be able to read it,
            unless they were given a secret.
        part: What this rank says of itself.

    Returns:
        What every rank knows. The caller owns its listener.

    Raises:
        CollectiveError: An argument of any rank cannot be used, or the ranks disagree. The same on
            every rank.
    """
    return perform(lambda payload, combine: combine(gather(payload)), part)


def perform(exchange: Exchange, part: Introduction) -> Meeting:
    """Meet through any exchange: see ``meet_through``."""
    agreed = exchange(part.first(), part.agree)
    try:
        place = part.second(agreed)
    except CollectiveError as error:
        # Everybody raises this. The second round is for those who only help with the exchange and
        # count on two.
        exchange(encode_error(error), part.tabulate)
        raise
    with contextlib.ExitStack() as undo:
        undo.callback(part.abandon)
        meeting = part.finish(exchange(place, part.tabulate))
        undo.pop_all()
    return meeting


def _wrong_number(requests: Sequence[JoinRequest]) -> CollectiveError | None:
    came, world_size = len(requests), requests[0].world_size
    if came == world_size:
        return None
    return RankError(f"expected {world_size} participants for world_size {world_size}, got {came}")


def _places(requests: Sequence[JoinRequest]) -> list[str]:
    """Return where each rank is to listen.

    That is on the loopback within one host, else where the other hosts reach it. It is empty for a
    rank that is to find that out by itself.
    """
    first = requests[0]
    if len({request.host_id for request in requests}) == 1:
        return [request.address or "127.0.0.1" for request in requests]
    places = []
    for request in requests:
        seen_from = request.seen_from
        if seen_from and request.host_id == first.host_id and net.is_loopback(seen_from):
            seen_from = first.seen_from
        places.append(request.address or seen_from)
    return places


def who_am_i() -> str:
    """Return this process's name in messages to other ranks."""
    return f"process {os.getpid()} on {socket.gethostname()}"


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


def pack(fields: Mapping[str, Any]) -> bytes:
    """Return a JSON object as a payload."""
    return json.dumps(fields, separators=(",", ":")).encode()


def unpack(payload: bytes, **types: type | tuple[type, ...]) -> dict[str, Any]:
    """Return the named fields of a JSON object, each of its type.

    Raises:
        FrameError: It is no JSON object, or a field is missing or of another type.
    """
    try:
        fields = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"expected JSON, got {payload[:32]!r}") from error

    if not isinstance(fields, dict):
        raise FrameError(f"expected a JSON object, got {payload[:32]!r}")

    for name, kind in types.items():
        if (
            name not in fields
            or not isinstance(fields[name], kind)
            or isinstance(fields[name], bool)
        ):
            raise FrameError(f"expected a field {name} of {kind}, got {str(fields.get(name))[:32]}")

    return {name: fields[name] for name in types}


def encode_error(error: CollectiveError) -> bytes:
    """Return an error as a payload."""
    ranks = list(getattr(error, "ranks", ()))
    return pack({"error": class_name(error), "message": str(error), "ranks": ranks})


def decode_error(payload: bytes) -> CollectiveError:
    """Return the error of a payload; one of an unknown class becomes a GroupError.

    Raises:
        FrameError: The payload is malformed.
    """
    fields = unpack(payload, error=str, message=str, ranks=list)
    ranks = [rank for rank in fields["ranks"] if isinstance(rank, int)]
    return rebuilt(fields["error"], fields["message"], ranks)


def error_in(payload: bytes) -> CollectiveError | None:
    """Return the error that a rank says in place of what was asked of it, or None."""
    return decode_error(payload) if payload.startswith(_ERROR) else None


def disagreement(requests: Sequence[JoinRequest]) -> CollectiveError | None:
    """Return what the ranks disagree about, or None.

    Args:
        requests: What the ranks said that came so far; rank 0's first.
    """
    for option in ("world_size", "backend"):
        values = {request.rank: getattr(request, option) for request in reversed(requests)}
        if len({getattr(request, option) for request in requests}) > 1:
            said = "; ".join(
                f"rank {h.rank} ({h.who}) gave {getattr(h, option)!r}"
                for h in in_rank_order(requests)
            )
            return MismatchError(
                f"the ranks disagree about {option}: {said}; pass the same {option} on every rank",
                minority(values),
            )

    for rank, count in sorted(Counter(request.rank for request in requests).items()):
        if count > 1:
            return taken(rank, [request.who for request in requests if request.rank == rank])
    return None


def taken(rank: int, who: Iterable[str]) -> RankError:
    """Return the error for a rank that several processes claim."""
    return RankError(
        f"rank {rank} is claimed by {' and by '.join(who)}; expected one process a rank: give every process "
        f"its own rank, and see that no process of an earlier run is left"
    )


def minority(values: Mapping[int, object]) -> tuple[int, ...]:
    """Return the ranks whose value is not the most frequent one; on a tie, not rank 0's."""
    (common, count), *others = Counter(values.values()).most_common()
    if others and others[0][1] == count:
        common = values[min(values)]
    return tuple(sorted(rank for rank, value in values.items() if value != common))


def in_rank_order(requests: Iterable[JoinRequest]) -> list[JoinRequest]:
    """Return the messages sorted by rank."""
    return sorted(requests, key=lambda request: request.rank)
