"""An actor's side of a group that the driver declares.

It says where the actor is, and makes three calls to take part, one to leave. It runs inside the
actors, through Ray's ``__ray_call__``, so they need no method of their own. Between the calls
nothing waits and no thread runs: the driver carries the bytes.
"""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from colltensor import net, table
from colltensor.errors import GroupError
from colltensor.group import Group
from colltensor.ray.rendezvous import address_in_ray, node_host_id
from colltensor.rendezvous import Introduction, Meeting

_lock: Final = threading.Lock()
_members: Final[dict[Token, ActorMember]] = {}
"""The declared groups of this process by the driver's token.

The lock is held for a look or a change only.
"""


@dataclass(frozen=True, slots=True)
class Token:
    """Names one creation of a declared group.

    By it a late call never touches another group of the same name.

    Attributes:
        driver: The process that declares.
        generation: The number of this creation, higher than that of every earlier one of the same
            driver.
    """

    driver: str
    generation: int

    def follows(self, other: Token) -> bool:
        """Return whether the same driver made the other one before."""
        return self.driver == other.driver and self.generation > other.generation


@dataclass(frozen=True, slots=True)
class MemberSpec:
    """The driver's words to an actor about its membership of a group.

    Attributes:
        token: Names this creation.
        rank: The actor's rank.
        world_size: The number of actors.
        options: Of ``init_collective_group``; the same on every rank.
        replaces: The creation whose place this one takes, whoever made it. It and earlier
            generations of this driver go, even one that works.
    """

    token: Token
    rank: int
    world_size: int
    options: dict[str, Any]
    replaces: Token | None = None


class ActorMember:
    """One actor's part in one declared group, from its introduction until it leaves."""

    def __init__(self, spec: MemberSpec, patience_s: float) -> None:
        self._spec = spec
        self._expires = time.monotonic() + patience_s
        self._has_left = False
        self._has_met = False
        self._settled = threading.Event()  # not set while the group is being made
        self._settled.set()
        self._group: weakref.ref[Group] | None = None
        options = spec.options
        self.introduction = Introduction(
            group_name=options["group_name"], world_size=spec.world_size, rank=spec.rank,
            interface=options["interface"], backend=options["backend"], address=address_in_ray(),
            host_id=node_host_id(),
        )  # fmt: skip

    def connect(self, listeners: Sequence[bytes], patience_s: float) -> None:
        """Make the group, unless the driver gives it up meanwhile."""
        name = self._spec.options["group_name"]
        with _lock:
            if self._has_left:
                raise _gone(name)
            self._settled.clear()
        try:
            group = self._make(listeners, patience_s)
            with _lock:
                self._group = weakref.ref(group)
                has_left = self._has_left
            if has_left:
                self._destroy(group)
                raise _gone(name)
        finally:
            self._settled.set()

    def leave(self) -> None:
        """Give up the listener, or the group; one in the making goes once it is made."""
        with _lock:
            self._has_left = True
            group = self._group() if self._group is not None else None
        if group is not None:
            self._destroy(group)
        elif not self._has_met:
            self.introduction.abandon()

    def give_way(self, patience_s: float) -> None:
        """Leave, and return when the name is free.

        That is at the latest when a group that is being made has failed.

        Args:
            patience_s: How long that may take; whoever wants the name finds it taken then.
        """
        self.leave()
        self._settled.wait(patience_s)

    def is_over(self) -> bool:
        """Return whether the group is gone, or was never made in the time that the driver gave."""
        if self._has_left:
            return self._settled.is_set()
        group = self._group
        return group() is None if group is not None else time.monotonic() > self._expires

    def is_late(self, spec: MemberSpec) -> bool:
        """Return whether a call with this spec is late: the same driver has made the group anew."""
        return self._is_of(spec) and self._spec.token.follows(spec.token)

    def is_replaced_by(self, spec: MemberSpec) -> bool:
        """Return whether a group of this spec takes over this one's name.

        It does where this one is broken, given up or named as the one to replace. It also does
        where the same driver made this one before, if this one was never finished or something is
        to be replaced.
        """
        if not self._is_of(spec):
            return False
        if self._has_left or spec.replaces == self._spec.token:
            return True
        group = self._group() if self._group is not None else None
        if group is not None and group.broken is not None:
            return True
        return spec.token.follows(self._spec.token) and (group is None or spec.replaces is not None)

    def _is_of(self, spec: MemberSpec) -> bool:
        return bool(self._spec.options["group_name"] == spec.options["group_name"])

    def _make(self, listeners: Sequence[bytes], patience_s: float) -> Group:
        spec = self._spec
        try:
            meet = functools.partial(self._meet, listeners)
            return table.make_group(spec.world_size, spec.rank, meet, patience_s, **spec.options)
        finally:
            if not self._has_met:
                self.introduction.abandon()

    def _meet(self, listeners: Sequence[bytes]) -> Meeting:
        with _lock:
            if self._has_left:
                raise _gone(self._spec.options["group_name"])
            self._has_met = True
        return self.introduction.finish(self.introduction.tabulate(listeners))

    def _destroy(self, group: Group) -> None:
        """Destroy the group, and nothing else that may have its name by now."""
        if table.is_group_initialized(group.name) and table.find_group(group.name) is group:
            table.destroy_collective_group(group.name)
        else:
            group.destroy()


def locate(actor: object) -> str:
    """Return the name of the host that this actor is on; actors with the same name share memory."""
    return node_host_id()


def introduce(actor: object, spec: MemberSpec, patience_s: float) -> bytes:
    """Check the options here and return this rank's description of itself.

    Opens nothing, but ends the group that it replaces.

    Args:
        actor: The actor.
        spec: Its membership of the group.
        patience_s: For how long the driver comes back to this, in seconds.

    Raises:
        GroupError: A group of this name exists in this process, or this call is late.
        BackendUnavailableError: The backend cannot be used here.
        OptionError: This host has no such interface.
    """
    with _lock:
        members = list(_members.values())
    if any(member.is_late(spec) for member in members):
        raise _gone(spec.options["group_name"])
    for member in members:
        if member.is_replaced_by(spec):
            member.give_way(patience_s)

    table.check_options(spec.world_size, **spec.options, member=True)
    if spec.options["interface"] is not None:
        net.interface_address(spec.options["interface"])

    member = ActorMember(spec, patience_s)
    _forget_those_that_are_over()
    with _lock:
        _members[spec.token] = member
    return member.introduction.first()


def listen(actor: object, token: Token, group_name: str, introductions: Sequence[bytes]) -> bytes:
    """Return where this rank listens, now that it knows what all ranks said."""
    part = _member(token, group_name).introduction
    return part.second(part.agree(introductions))


def connect(
    actor: object, token: Token, group_name: str, listeners: Sequence[bytes], patience_s: float
) -> None:
    """Connect to the other ranks, which all listen now, and enter the group in the table."""
    _member(token, group_name).connect(listeners, patience_s)


def leave(actor: object, token: Token) -> None:
    """Destroy the group, or what there is of it; nothing happens where it is gone."""
    with _lock:
        member = _members.get(token)
    if member is not None:
        member.leave()
        _forget_those_that_are_over()


def _forget_those_that_are_over() -> None:
    with _lock:
        for token in [token for token, member in _members.items() if member.is_over()]:
            del _members[token]


def _member(token: Token, group_name: str) -> ActorMember:
    with _lock:
        member = _members.get(token)
    if member is None:
        raise _gone(group_name)
    return member


def _gone(group_name: str) -> GroupError:
    return GroupError(
        f"create_collective_group: group '{group_name}' is not being made here any more: the driver gave it up or "
        "makes it anew, or this actor was restarted meanwhile; create it again"
    )
