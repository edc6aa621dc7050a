"""An actor's side of a group that the driver declares: three calls to take part, one to leave.

Runs inside the actors, through Ray's ``__ray_call__``, so they need no method of their own. Between the calls
nothing waits and no thread runs: the driver carries the bytes. Imports ray.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import ray

from colltensor import net, table
from colltensor.errors import GroupError
from colltensor.group import Group
from colltensor.ray.rendezvous import node_host_id
from colltensor.rendezvous import Introduction, Meeting

_lock: Final = threading.Lock()
_seats: Final[dict[str, Seat]] = {}
"""The declared groups of this process by the driver's token; the lock is held for a look or a change only."""


@dataclass(frozen=True, slots=True)
class Place:
    """What the driver tells an actor of its place in a group.

    Attributes:
        token: Names this very creation, so that a late call never touches another group of the same name.
        rank: The actor's rank.
        world_size: The number of actors.
        options: Of ``init_collective_group``; the same on every rank.
    """

    token: str
    rank: int
    world_size: int
    options: dict[str, Any]


class Seat:
    """One actor's part in one declared group, from its introduction until it leaves."""

    def __init__(self, place: Place, patience_s: float) -> None:
        self._place = place
        self._expires = time.monotonic() + patience_s
        self._has_left = False
        self._has_met = False
        self._group: weakref.ref[Group] | None = None
        options = place.options
        self.introduction = Introduction(
            group_name=options["group_name"], world_size=place.world_size, rank=place.rank,
            interface=options["interface"], backend=options["backend"], address=_address_in_ray(),
            host_id=node_host_id(),
        )  # fmt: skip

    def connect(self, listeners: Sequence[bytes], patience_s: float) -> None:
        """Make the group, unless the driver gives it up meanwhile."""
        place = self._place
        try:
            group = table.make_group(
                place.world_size, place.rank, lambda: self._meet(listeners), patience_s, **place.options
            )
        finally:
            if not self._has_met:
                self.introduction.abandon()
        with _lock:
            self._group = weakref.ref(group)
            has_left = self._has_left
        if has_left:
            self._destroy(group)
            raise _gone(place.options["group_name"])

    def leave(self) -> None:
        """Give up what there is so far: the listener, or the group; one that is being made goes when it is made."""
        with _lock:
            self._has_left = True
            group = self._group() if self._group is not None else None
        if group is not None:
            self._destroy(group)
        elif not self._has_met:
            self.introduction.abandon()

    def is_over(self) -> bool:
        """Return whether the group is gone, or was never made in the time that the driver gave."""
        group = self._group
        return group() is None if group is not None else time.monotonic() > self._expires

    def _meet(self, listeners: Sequence[bytes]) -> Meeting:
        with _lock:
            if self._has_left:
                raise _gone(self._place.options["group_name"])
            self._has_met = True
        return self.introduction.finish(listeners)

    def _destroy(self, group: Group) -> None:
        """Destroy the group, and nothing else that may have its name by now."""
        if table.is_group_initialized(group.name) and table.find_group(group.name) is group:
            table.destroy_collective_group(group.name)
        else:
            group.destroy()


def introduce(actor: object, place: Place, patience_s: float) -> bytes:
    """Check the options here and return what this rank says of itself; opens nothing.

    Raises:
        GroupError: A group of this name exists in this process.
        BackendUnavailableError: The backend cannot be used here.
        OptionError: This host has no such interface.
    """
    table.check_options(place.world_size, **place.options, member=True)
    if place.options["interface"] is not None:
        net.interface_address(place.options["interface"])
    seat = Seat(place, patience_s)
    with _lock:
        for token in [token for token, other in _seats.items() if other.is_over()]:
            del _seats[token]
        _seats[place.token] = seat
    return seat.introduction.first()


def listen(actor: object, token: str, group_name: str, introductions: Sequence[bytes]) -> bytes:
    """Return where this rank listens, now that it knows what all ranks said."""
    return _seat(token, group_name).introduction.second(introductions)


def connect(actor: object, token: str, group_name: str, listeners: Sequence[bytes], patience_s: float) -> None:
    """Connect to the other ranks, which all listen now, and enter the group in this process's table."""
    _seat(token, group_name).connect(listeners, patience_s)


def leave(actor: object, token: str) -> None:
    """Destroy the group, or what there is of it; nothing happens where it is gone."""
    with _lock:
        seat = _seats.pop(token, None)
    if seat is not None:
        seat.leave()


def _seat(token: str, group_name: str) -> Seat:
    with _lock:
        seat = _seats.get(token)
    if seat is None:
        raise _gone(group_name)
    return seat


def _gone(group_name: str) -> GroupError:
    return GroupError(f"create_collective_group: the driver has given up making group '{group_name}'; create it again")


def _address_in_ray() -> str | None:
    """Return the address by which Ray's nodes reach this one, where it is an address of this host."""
    find = cast("Callable[[], str]", ray.util.get_node_ip_address)  # Ray gives it no type
    address = find()
    is_usable = address in net.local_addresses() and not net.is_loopback(address)
    return address if is_usable else None
