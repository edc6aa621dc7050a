"""Which ranks share a host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hosts:
    """The hosts of a group, as one rank sees them.

    All but the last two attributes are the same on every rank.

    Attributes:
        members: The ranks of each host, ascending; the hosts by their lowest rank.
        index: The host of every rank, as an index of ``members``.
        local: The position of every rank among the ranks of its host.
        shards: The number of ranks of the smallest host: into so many shards a block is divided,
            each of which one rank of every host carries over the network.
        host: This rank's host.
        position: This rank's position in it.
    """

    members: tuple[tuple[int, ...], ...]
    index: tuple[int, ...]
    local: tuple[int, ...]
    shards: int
    host: int
    position: int

    @classmethod
    def of(cls, host_ids: Sequence[str], rank: int) -> Hosts:
        """Group the ranks by the names of their hosts."""
        names = list(dict.fromkeys(host_ids))
        index = tuple(names.index(name) for name in host_ids)
        members = tuple(
            tuple(member for member, host in enumerate(index) if host == number)
            for number in range(len(names))
        )
        local = tuple(members[host].index(member) for member, host in enumerate(index))
        return cls(members, index, local, min(map(len, members)), index[rank], local[rank])

    @property
    def neighbours(self) -> tuple[int, ...]:
        """The ranks of this rank's host, itself included."""
        return self.members[self.host]

    def leaders(self, root: int | None = None) -> tuple[int, ...]:
        """Return one rank of each host: the first, but on ``root``'s host ``root``."""
        chosen = [members[0] for members in self.members]
        if root is not None:
            chosen[self.index[root]] = root
        return tuple(chosen)

    def counterparts(self) -> tuple[int, ...]:
        """Return the ranks at this rank's position on all hosts.

        Only for positions that all hosts have.
        """
        return tuple(members[self.position] for members in self.members)
