"""How the ranks of a group meet through the store that torch.distributed gives to its backends."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

# torch marks none of them exported.
from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]

from colltensor import net
from colltensor.errors import CollectiveError, CollectiveTimeoutError, OptionError, say_timed_out
from colltensor.group import Group, connect, solitary
from colltensor.options import GroupOptions
from colltensor.rendezvous import Introduction, meet_through
from colltensor.rendezvous.secret import given_secret, warn_of_strangers

_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.0005, 0.05
_INTERFACE: Final = "GLOO_SOCKET_IFNAME"


def meet(
    store: Any,
    prefix: str,
    rank: int,
    world_size: int,
    *,
    name: str,
    timeout_s: float,
    check: Callable[[], None] | None = None,
    refusal: CollectiveError | None = None,
) -> Group:
    """Make the group of ``world_size`` ranks that call this with one store and one prefix.

    The network interface is the one that the variable GLOO_SOCKET_IFNAME names, if it is set, as
    for torch's Gloo.

    Args:
        store: A c10d store; its keys are deleted again, so that the next group can meet under the
            same prefix. Whoever reaches it reads them. That does not let him into the group where
            all ranks were given a secret.
        prefix: Of the keys.
        rank: This rank in the group.
        world_size: The number of ranks.
        name: The group's name in messages.
        timeout_s: How long the others may take to come, and a call of the group then waits for
            them, in seconds.
        check: Called now and then while others are waited for; its error ends the wait.
        refusal: Why this rank will not be in the group, which every rank is to raise.

    Raises:
        CollectiveTimeoutError: Ranks did not come in time, named by their rank in the group.
        CollectiveError: They cannot be connected.
    """
    interface = os.environ.get(_INTERFACE, "").split(",")[0] or None
    options = GroupOptions(timeout_s=timeout_s, interface=interface)
    if world_size == 1:
        if refusal is not None:
            raise refusal
        return solitary(name, options)

    deadline = time.monotonic() + timeout_s
    secret = b""
    try:
        secret = given_secret()
    except OptionError as error:
        refusal = refusal or error
    if not secret and (host := _host_of(store)) is not None:
        warn_of_strangers(host, name, rank)

    part = Introduction(
        group_name=name,
        world_size=world_size,
        rank=rank,
        interface=interface,
        backend=options.asked_of(world_size),
        refusal=refusal,
        secret=secret,
    )
    exchange = _Exchange(store, prefix, rank, world_size, name, deadline, check)
    everybody_hears = False
    try:
        try:
            meeting = meet_through(exchange, part)
        except CollectiveError as error:
            # What this rank alone met with (a lost peer, say) is told to nobody through the keys.
            everybody_hears = exchange.is_whole and not isinstance(error, CollectiveTimeoutError)
            raise

        group = connect(meeting, options, deadline)
        try:
            group.barrier()  # now all have read all keys
            exchange.withdraw()
            group.barrier()  # now none is left for the next group under this prefix to find
        except BaseException:
            group.destroy()
            raise
    except BaseException as error:
        if isinstance(error, CollectiveTimeoutError):
            say_timed_out(error, timeout_s)
        with contextlib.suppress(DistError):  # the store may be what failed
            exchange.leave() if everybody_hears else exchange.withdraw()
        raise
    return group


def _host_of(store: Any) -> str | None:
    """Return where a store is served, None for one that is not served to other hosts."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return str(store.host) if isinstance(store, TCPStore) else None


@dataclass(slots=True)
class _Exchange:
    """Hands this rank's bytes to all ranks through the store, and returns all ranks'.

    It works round by round.

    Attributes:
        store: The c10d store; keys in it begin with ``prefix``.
        rank: This rank, of ``world_size`` in the group of that name.
        deadline: When all must have come; ``check`` is called meanwhile.
        round: The number of the last round.
        is_whole: Whether that was read to its end.
    """

    store: Any
    prefix: str
    rank: int
    world_size: int
    name: str
    deadline: float
    check: Callable[[], None] | None
    round: int = 0
    is_whole: bool = False

    def __call__(self, payload: bytes) -> list[bytes]:
        self.round += 1
        self.is_whole = False
        self.store.set(self._key(self.round, self.rank), payload.hex())
        payloads = [
            payload
            if rank == self.rank
            else bytes.fromhex(self._get(self._key(self.round, rank), rank).decode())
            for rank in range(self.world_size)
        ]
        self.is_whole = True
        return payloads

    def withdraw(self) -> None:
        """Delete this rank's keys."""
        for number in range(1, self.round + 1):
            self.store.delete_key(self._key(number, self.rank))

    def leave(self) -> None:
        """Delete all keys if this rank read them last, so that all read an error."""
        count = f"{self.prefix}/left"
        if self.store.add(count, 1) == self.world_size:
            for number in range(1, self.round + 1):
                for rank in range(self.world_size):
                    self.store.delete_key(self._key(number, rank))
            self.store.delete_key(count)

    def _key(self, number: int, rank: int) -> str:
        return f"{self.prefix}/{number}/{rank}"

    def _get(self, key: str, rank: int) -> bytes:
        """Poll: a store's own wait holds it, and knows neither Ctrl-C nor lost peers."""
        backoff = net.Backoff(_FIRST_PAUSE_S, _LAST_PAUSE_S)
        while not self.store.check([key]):
            if time.monotonic() > self.deadline:
                raise CollectiveTimeoutError(
                    f"group '{self.name}' (rank {self.rank} of {self.world_size}): rank {rank} did not come to make "
                    "the group within the timeout; start it, or make the group with a longer timeout",
                    (rank,),
                )
            if self.check is not None:
                self.check()
            backoff.pause()
        found: bytes = self.store.get(key)
        return found
