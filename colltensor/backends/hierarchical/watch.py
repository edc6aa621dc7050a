"""The whole group's control plane as the transports inside a call see it, in two threads."""

from __future__ import annotations

import hashlib
import hmac
import threading
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

from colltensor.backends.base import ControlPlane
from colltensor.backends.hierarchical.topology import Hosts
from colltensor.errors import BackendUnavailableError, CollectiveError, GroupError
from colltensor.rendezvous import Meeting

_TAKES_PART: Final = b"\1"
_IS_OVER: Final = b"\0"


class HaltedError(GroupError):
    """The other half of the call has failed; what happened to it is what counts."""


class Watch:
    """A group's control plane for both halves of a call, in shared memory and over Gloo.

    A failure of one half ends the other within its next look, and so does one that another rank
    reports. May be used by two threads at once, which the control plane itself may not.

    Attributes:
        failure: What broke the group, in the ranks of the group; None while it works, as far as
            this rank knows.
    """

    def __init__(self, control: ControlPlane) -> None:
        self.rank = control.rank
        self.world_size = control.world_size
        self.group_name = control.group_name
        self.failure: CollectiveError | None = None
        self._control = control
        # only ever tried: whoever does not get it knows that the other one looks
        self._looking = threading.Lock()
        self._halted = False

    def allgather(self, payload: bytes, deadline: float) -> list[bytes]:
        """Return the payloads of all ranks."""
        return self._control.allgather(payload, deadline)

    def check(self) -> None:
        """Raise what has broken the group, or HaltedError once ``halt`` was called."""
        if self.failure is not None:
            raise self.failure
        if self._halted:
            raise HaltedError(
                f"group '{self.group_name}' (rank {self.rank}): another part of the call has failed"
            )
        if self._looking.acquire(blocking=False):
            try:
                self._control.check()
            except CollectiveError as error:
                self.failure = error
                raise
            finally:
                self._looking.release()

    def halt(self) -> None:
        """End whatever waits and looks here, now and from now on."""
        self._halted = True


class HostControl:
    """The control plane and the meeting of one host's ranks, through those of the group.

    It has no connections of its own: an exchange of a host is one of the whole group in which every
    host exchanges at the same time. Hosts that need fewer exchanges than others help with the rest
    in ``conclude``, which every rank must call.

    Attributes:
        rank: This rank's position on its host.
        world_size: The number of ranks on the host.
        group_name: The group's name, with the host.
        secret: What only the ranks of this host use.
        generation: The group's.
        host_ids: The same host for all.
    """

    def __init__(self, watch: Watch, hosts: Hosts, meeting: Meeting) -> None:
        self.rank = hosts.position
        self.world_size = len(hosts.neighbours)
        self.group_name = f"{watch.group_name}, ranks {', '.join(map(str, hosts.neighbours))}"
        self.generation = meeting.generation
        self.secret = hmac.new(
            meeting.secret, b"host" + bytes(str(hosts.neighbours), "ascii"), hashlib.sha256
        ).digest()
        self.host_ids = ("this host",) * self.world_size
        self._watch = watch
        self._members: Sequence[int] = hosts.neighbours

    def allgather(self, payload: bytes, deadline: float) -> list[bytes]:
        """Return the payloads of the ranks of this host.

        Raises:
            BackendUnavailableError: One of them has concluded already, with the trouble that it
                names.
            CollectiveError: As the whole group's.
        """
        frames = self._watch.allgather(_TAKES_PART + payload, deadline)
        own = [frames[member] for member in self._members]
        for member, frame in zip(self._members, own, strict=True):
            if frame[:1] == _IS_OVER:
                raise BackendUnavailableError(
                    f"group '{self.group_name}': rank {member}: {frame[1:].decode()}"
                )
        return [frame[1:] for frame in own]

    def conclude(self, trouble: str, deadline: float) -> list[str]:
        """Return the trouble of every rank of the group, "" for none, once all hosts are done."""
        while True:
            frames = self._watch.allgather(_IS_OVER + trouble.encode(), deadline)
            if all(frame[:1] == _IS_OVER for frame in frames):
                return [frame[1:].decode() for frame in frames]

    def check(self) -> None:
        """As the whole group's."""
        self._watch.check()

    def agree(self, signature: bytes, describe: Callable[[], str], deadline: float) -> NoReturn:
        """Report ranks of one host that differ in a call on which the whole group agreed.

        Raises:
            GroupError: Always: the ranks have not taken the same steps.
        """
        raise GroupError(
            f"group '{self.group_name}': the steps of a call differ between ranks, here {describe()}"
        )

    def agree_beside(
        self, peer: int, signature: bytes, describe: Callable[[], str], deadline: float, lane: int
    ) -> None:
        """As ``agree``."""
        self.agree(signature, describe, deadline)

    def start_pair(
        self,
        peer: int,
        signature: bytes,
        describe: Callable[[], str],
        deadline: float,
        lane: int,
        bound: bool,
    ) -> None:
        """As ``agree``."""
        self.agree(signature, describe, deadline)

    def finish_pair(
        self,
        peer: int,
        signature: bytes,
        describe: Callable[[], str],
        deadline: float,
        lane: int,
        bound: bool,
    ) -> None:
        """As ``agree``."""
        self.agree(signature, describe, deadline)
