"""What ranks tell each other when they meet: the messages, and whether the ranks agree.

Messages are frames of ``colltensor.net`` whose payload is JSON; whatever arrives is checked field by field and
refused as FrameError, since on a port without a secret anybody may have sent it.
"""

from __future__ import annotations

import enum
import json
import math
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from colltensor.errors import (
    BackendUnavailableError,
    CollectiveError,
    CollectiveTimeoutError,
    GroupError,
    MismatchError,
    OptionError,
    PeerLostError,
    RankError,
)
from colltensor.net import FrameError, is_loopback

_MAGIC = b"colltensor endpoint 1\n"
_REFUSAL_LIMIT = 1000
_PLAIN_ERRORS = {
    kind.__name__: kind for kind in (BackendUnavailableError, GroupError, OptionError, RankError)
}
_RANKS_ERRORS = {
    kind.__name__: kind for kind in (MismatchError, PeerLostError, CollectiveTimeoutError)
}


class Message(enum.IntEnum):
    """The kinds of frames of a meeting."""

    JOIN = 1
    CLAIM = 2
    WELCOME = 3
    RETRY = 4
    FAILED = 5
    PLACE = 6
    BOUND = 7
    TABLE = 8
    NOTE = 9


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
        seen_from: Its own address on the connection to rank 0.
        who: Its process, for messages.
        age_s: For how long it has been trying, in seconds.
        patience_s: For how long it will go on.
        refusal: Why it will not be in the group, as an encoded error; empty for a rank that means to be.
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

    def encode(self) -> bytes:
        """Return the message's payload."""
        return pack(asdict(self))

    @classmethod
    def decode(cls, payload: bytes) -> JoinRequest:
        """Return the message of a payload.

        Raises:
            FrameError: The payload is malformed.
        """
        fields = unpack(payload, rank=int, world_size=int, group_name=str, backend=str, host_id=str,
                        address=(str, type(None)), seen_from=str, who=str, age_s=float, patience_s=float,
                        refusal=str)  # fmt: skip
        try:
            is_loopback(fields["seen_from"])
            if not math.isfinite(fields["age_s"] + fields["patience_s"]):
                raise ValueError("a length of time is not finite")
            request = cls(**fields)
        except (OverflowError, TypeError, ValueError) as error:
            raise FrameError(f"malformed request: {error}") from error
        if request.refusal:
            decode_error(request.refusal.encode(errors="replace"))
        return request

    def refusing(self, error: CollectiveError) -> JoinRequest:
        """Return what a rank says that will not be in the group, and why."""
        message = f"rank {self.rank}: {error}"[:_REFUSAL_LIMIT]
        return replace(
            self,
            refusal=pack({"error": type(error).__name__, "message": message, "ranks": []}).decode(),
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
class Table:
    """What rank 0 tells every rank at the end.

    Attributes:
        generation: 8 random bytes: this incarnation of the group.
        salt: Random bytes from which, with the meeting's secret, the group's secret is derived.
        addresses: Where each rank's control plane listens.
        host_ids: The host of each rank.
        properties: Rank 0's properties.
    """

    generation: bytes
    salt: bytes = field(repr=False)
    addresses: tuple[tuple[str, int], ...]
    host_ids: tuple[str, ...]
    properties: dict[str, Any]

    @classmethod
    def fresh(
        cls,
        addresses: tuple[tuple[str, int], ...],
        host_ids: tuple[str, ...],
        properties: dict[str, Any],
    ) -> Table:
        """Return the table of a new incarnation of a group."""
        return cls(secrets.token_bytes(8), secrets.token_bytes(32), addresses, host_ids, properties)

    def encode(self) -> bytes:
        """Return the message's payload."""
        return pack({**asdict(self), "generation": self.generation.hex(), "salt": self.salt.hex()})

    @classmethod
    def decode(cls, payload: bytes) -> Table:
        """Return the message of a payload.

        Raises:
            FrameError: The payload is malformed.
        """
        fields = unpack(
            payload, generation=str, salt=str, addresses=list, host_ids=list, properties=dict
        )
        try:
            addresses = tuple((str(host), int(port)) for host, port in fields["addresses"])
            host_ids = tuple(map(str, fields["host_ids"]))
            generation, salt = bytes.fromhex(fields["generation"]), bytes.fromhex(fields["salt"])
            return cls(generation, salt, addresses, host_ids, fields["properties"])
        except (TypeError, ValueError) as error:
            raise FrameError(f"malformed table: {error}") from error


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
    return pack({"error": type(error).__name__, "message": str(error), "ranks": ranks})


def decode_error(payload: bytes) -> CollectiveError:
    """Return the error of a payload; one of an unknown class becomes a GroupError.

    Raises:
        FrameError: The payload is malformed.
    """
    fields = unpack(payload, error=str, message=str, ranks=list)
    with_ranks = _RANKS_ERRORS.get(fields["error"])
    if with_ranks is not None:
        return with_ranks(
            fields["message"], [rank for rank in fields["ranks"] if isinstance(rank, int)]
        )
    return _PLAIN_ERRORS.get(fields["error"], GroupError)(fields["message"])


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
