"""Where rank 0 says how it is reached: what every directory offers, and the one that needs none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from colltensor.rendezvous.protocol import Endpoint


class Directory(Protocol):
    """A place that all ranks can reach, and where rank 0 leaves an endpoint under a key.

    A directory may have an attribute ``scope``, a string equal for two directories exactly if they are the same
    place: with it, a process that an earlier meeting left out is kept out of the next one of the same name. It may
    have an attribute ``host_id``, which names this process's host in place of ``net.host_id()``, and an attribute
    ``elsewhere``, a directory in which ``locate`` looks as well: there rank 0 is found where it cannot leave an
    endpoint in this one, to say why. And it may have an attribute ``secret`` where strangers can read it: what the
    user gave all ranks, from which and the endpoint's the meeting's secret is derived, empty if nothing; and with it
    ``host``, where the directory is. An attribute ``address`` says at which address of this host all ranks reach it,
    where that is known; rank 0 listens on all of them else.
    """

    def publish(self, key: str, endpoint: bytes) -> None:
        """Leave the endpoint, as rank 0; one of a rank 0 that lives no more is replaced.

        Raises:
            RankError: Another rank 0 has left one and lives.
            OptionError: The place cannot be written to.
        """

    def locate(self, key: str, deadline: float) -> bytes:
        """Return the endpoint as it is now, waiting for one to come.

        Raises:
            CollectiveTimeoutError: None came by the deadline; its ranks are ``(0,)``.
            OptionError: The place cannot be read.
        """

    def withdraw(self, key: str) -> None:
        """Remove one's own endpoint, as rank 0; nothing happens where it is gone already."""


@dataclass(frozen=True)
class FixedDirectory:
    """Knows beforehand where rank 0 listens, so that nothing need be published.

    Attributes:
        host: A host name or literal address of rank 0's host.
        port: The port at which rank 0 listens.
        secret: What all ranks know; may be empty.
    """

    host: str
    port: int
    secret: bytes = field(default=b"", repr=False)

    @property
    def scope(self) -> str:
        """Say which place this is."""
        return f"tcp://{self.host}:{self.port}"

    @property
    def endpoint(self) -> Endpoint:
        """How rank 0 is reached."""
        return Endpoint("", (self.host,), self.port, self.secret)

    def publish(self, key: str, endpoint: bytes) -> None:
        """Do nothing: all ranks know the port."""

    def locate(self, key: str, deadline: float) -> bytes:
        """Return at once how rank 0 is reached, whether it is there or not."""
        return self.endpoint.encode()

    def withdraw(self, key: str) -> None:
        """Do nothing: nothing was published."""
