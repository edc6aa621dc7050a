"""Meet where the ranks can exchange bytes already: through a group that is split, or through a driver."""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from colltensor import net
from colltensor.errors import CollectiveError, OptionError, RankError, remedy_for_system
from colltensor.rendezvous.meeting import Meeting, introduction, json_object, location
from colltensor.rendezvous.protocol import (
    JoinRequest,
    Message,
    Table,
    decode_error,
    disagreement,
    encode_error,
    in_rank_order,
    pack,
    unpack,
)
from colltensor.rendezvous.secret import MISTAKE, derived, proof


class Introduction:
    """One rank's part of a meeting in two rounds, each of which hands every rank's bytes to every rank.

    ``first()`` gives the bytes of round one, ``second(payloads)`` those of round two, ``finish(payloads)`` the
    meeting. An error of one rank travels in its bytes, so that every rank raises it, and none waits. Who gives up
    in between calls ``abandon()``.

    The payloads carry the group's secret: the channel must be one that only the ranks can read, or the ranks must have
    been given a secret that is not in it.
    """

    def __init__(
        self,
        *,
        group_name: str,
        world_size: int,
        rank: int,
        interface: str | None = None,
        backend: str = "auto",
        properties: Mapping[str, Any] | None = None,
        address: str | None = None,
        host_id: str | None = None,
        refusal: CollectiveError | None = None,
        secret: bytes = b"",
    ) -> None:
        """Take this rank's part.

        Args:
            group_name: See ``meet``.
            world_size: See ``meet``.
            rank: See ``meet``.
            interface: See ``meet``.
            backend: See ``meet``.
            properties: See ``meet``.
            address: This host's address on the network that the hosts share, for ranks on several hosts and no
                ``interface``; by default the address of the default route.
            host_id: Names this process's host in place of ``net.host_id()``.
            refusal: Why this rank will not be in the group, which every rank is to raise.
            secret: What all ranks were given, where others can read the channel: the group's secret is derived from it.
        """
        self._given = secret
        self._refusal = refusal
        self._arguments = (group_name, world_size, rank, interface, backend, host_id)
        self._external = address
        self._properties = properties
        self._request: JoinRequest | None = None
        self._requests: list[JoinRequest] = []
        self._table: Table | None = None
        self._public = b""
        self._said: list[bytes] = []
        self._listener: socket.socket | None = None

    def first(self) -> bytes:
        """Return what this rank says of itself; rank 0 adds the generation, the secret and its properties."""
        try:
            self._request = introduction(*self._arguments)
            if self._refusal is not None:
                raise self._refusal
            told = json_object(self._properties if self._request.rank == 0 else None)
        except CollectiveError as error:
            return _wrapped(Message.FAILED, encode_error(error))
        fresh = Table.fresh((), (), told)
        public = secrets.token_bytes(32)
        fields = {"request": self._request.encode().decode(), "table": fresh.encode().decode(),
                  "secret": public.hex(), "proof": proof(self._given, public).hex()}  # fmt: skip
        return _wrapped(Message.JOIN, pack(fields))

    def second(self, payloads: Sequence[bytes]) -> bytes:
        """Return where this rank listens.

        Raises:
            CollectiveError: A rank's own error, or what the ranks disagree about; the same on every rank.
        """
        said = [unpack(data, request=str, table=str, secret=str, proof=str)
                for data in self._unwrapped(payloads, Message.JOIN)]  # fmt: skip
        self._requests = [JoinRequest.decode(fields["request"].encode()) for fields in said]
        problem = (
            disagreement(in_rank_order(self._requests))
            or self._wrong_number()
            or self._wrong_secret(said)
        )
        if problem is not None:
            raise self._here(problem)
        leader = said[
            next(index for index, request in enumerate(self._requests) if request.rank == 0)
        ]
        self._table = Table.decode(leader["table"].encode())
        self._public, self._said = _bytes(leader["secret"]), list(payloads)
        address = self._address()
        try:
            self._listener = net.listen(address)
        except OSError as error:
            remedy = remedy_for_system(error, "choose with interface=")
            problem = OptionError(f"cannot listen on {address}: {error}; {remedy}")
            return _wrapped(Message.FAILED, encode_error(problem))
        return _wrapped(
            Message.BOUND, pack({"host": address, "port": self._listener.getsockname()[1]})
        )

    def finish(self, payloads: Sequence[bytes]) -> Meeting:
        """Return what every rank now knows.

        Raises:
            CollectiveError: A rank's own error; the same on every rank.
        """
        if self._request is None or self._table is None or self._listener is None:
            self._unwrapped(payloads, Message.BOUND)
            raise OptionError("finish() must follow first() and second()")
        with contextlib.ExitStack() as undo:
            undo.callback(self.abandon)
            bound = [
                unpack(data, host=str, port=int)
                for data in self._unwrapped(payloads, Message.BOUND)
            ]
            by_rank = sorted(
                zip((request.rank for request in self._requests), bound, strict=True),
                key=lambda pair: pair[0],
            )
            addresses = tuple((fields["host"], fields["port"]) for _, fields in by_rank)
            host_ids = tuple(request.host_id for request in in_rank_order(self._requests))
            table = Table(
                self._table.generation,
                self._table.salt,
                addresses,
                host_ids,
                self._table.properties,
            )
            undo.pop_all()
        said = b"".join(
            len(payload).to_bytes(8, "big") + payload for payload in (*self._said, *payloads)
        )
        return Meeting.of(
            self._request, table, self._listener, derived(self._given, self._public, said)
        )

    def abandon(self) -> None:
        """Close what was opened; for one who will not call ``finish``."""
        if self._listener is not None:
            self._listener.close()

    def _unwrapped(self, payloads: Sequence[bytes], expected: Message) -> list[bytes]:
        """Return the payloads' contents, or raise the first error among them."""
        for index, payload in enumerate(payloads):
            if payload[:1] == bytes([Message.FAILED]):
                error = decode_error(payload[1:])
                error.args = (f"participant {index}: {error}",)
                raise self._here(error)
            if payload[:1] != bytes([expected]):
                raise self._here(
                    OptionError(
                        f"expected participant {index}'s {expected.name}, got {payload[:16]!r}"
                    )
                )
        return [payload[1:] for payload in payloads]

    def _here(self, error: CollectiveError) -> CollectiveError:
        if self._request is not None:
            error.args = (f"{location(self._request)}: {error}",)
        return error

    def _wrong_secret(self, said: Sequence[Mapping[str, str]]) -> CollectiveError | None:
        """Return the error where ranks were given different secrets, as far as this one can tell."""
        others = [
            request.rank
            for request, fields in zip(self._requests, said, strict=True)
            if not hmac.compare_digest(
                proof(self._given, _bytes(fields["secret"])), _bytes(fields["proof"])
            )
        ]
        if not others:
            return None
        who = (
            "this rank" if 0 in others else " and ".join(f"rank {rank}" for rank in sorted(others))
        )
        return OptionError(f"{who} came with another secret than rank 0; {MISTAKE}")

    def _wrong_number(self) -> CollectiveError | None:
        world_size = self._requests[0].world_size
        if len(self._requests) != world_size:
            return RankError(
                f"expected {world_size} participants for world_size {world_size}, got {len(self._requests)}"
            )
        return None

    def _address(self) -> str:
        """Return where to listen: on the loopback within one host, else where the other hosts reach this one."""
        assert self._request is not None
        if self._request.address:
            return self._request.address
        if len({request.host_id for request in self._requests}) == 1:
            return "127.0.0.1"
        return self._external or net.local_addresses()[0]


def meet_through(
    exchange: Callable[[bytes], Sequence[bytes]],
    *,
    group_name: str,
    world_size: int,
    rank: int,
    interface: str | None = None,
    backend: str = "auto",
    properties: Mapping[str, Any] | None = None,
    host_id: str | None = None,
    refusal: CollectiveError | None = None,
    secret: bytes = b"",
) -> Meeting:
    """Bring the ranks of a new group together through an exchange of bytes that they have already.

    Args:
        exchange: Hands over this rank's bytes and returns every rank's, in the same order on every rank. It is
            called twice, bounds its own time, and must be one that only these ranks can read, but with ``secret``.
        group_name: See ``meet``.
        world_size: See ``meet``.
        rank: See ``meet``.
        interface: See ``meet``; between hosts the default is the interface of the default route.
        backend: See ``meet``.
        properties: See ``meet``.
        host_id: Names this process's host in place of ``net.host_id()``.
        refusal: Why this rank will not be in the group, which every rank is to raise.
        secret: See ``Introduction``.

    Returns:
        What every rank knows. The caller owns its listener.

    Raises:
        CollectiveError: An argument of any rank cannot be used, or the ranks disagree; the same on every rank.
    """
    part = Introduction(group_name=group_name, world_size=world_size, rank=rank, interface=interface,
                        backend=backend, properties=properties, host_id=host_id, refusal=refusal,
                        secret=secret)  # fmt: skip
    said = exchange(part.first())
    try:
        place = part.second(said)
    except CollectiveError as error:
        # Everybody raises this; the second round is for those who only help with the exchange and count on two.
        exchange(_wrapped(Message.FAILED, encode_error(error)))
        raise
    try:
        return part.finish(exchange(place))
    except BaseException:
        part.abandon()
        raise


def _bytes(digits: str) -> bytes:
    try:
        return bytes.fromhex(digits)
    except ValueError as error:
        raise net.FrameError(f"expected hexadecimal digits, got {digits:.32}") from error


def _wrapped(kind: Message, payload: bytes) -> bytes:
    return bytes([kind]) + payload
