"""broadcast and allgather between hosts: over Gloo to one rank of each, and on in shared memory."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

from colltensor.backends.gloo.backend import GlooBackend
from colltensor.backends.gloo.composed import copy
from colltensor.backends.hierarchical.shards import blocks
from colltensor.backends.hierarchical.topology import Hosts
from colltensor.backends.hierarchical.worker import Worker
from colltensor.backends.shm.backend import ShmBackend
from colltensor.view import BufferView


class DataMovement:
    """broadcast and allgather of one rank. Views are contiguous host memory, none empty."""

    def __init__(
        self, hosts: Hosts, local: ShmBackend | None, gloo: GlooBackend, worker: Worker
    ) -> None:
        self._hosts = hosts
        self._local = local
        self._gloo = gloo
        self._worker = worker
        self._rank = hosts.neighbours[hosts.position]

    def broadcast(self, view: BufferView, root: int, deadline: float) -> None:
        """Send each block from ``root`` to a rank of every other host, and to its neighbours."""
        hosts, local = self._hosts, self._local
        leaders = hosts.leaders(root)
        leader = leaders[hosts.host]
        pieces = list(blocks(view, 1))

        tasks = []
        if leader == self._rank:
            between = self._gloo.part(leaders)
            if len(pieces) == 1:
                between.broadcast(pieces[0], hosts.index[root], deadline)
            else:
                from_host = hosts.index[root]
                tasks = [
                    self._worker.send(
                        functools.partial(between.broadcast, piece, from_host, deadline)
                    )
                    for piece in pieces
                ]

        # Each piece is passed on in this host while the next one crosses.
        for piece, task in itertools.zip_longest(pieces, tasks):
            if task is not None and (self._rank != root or local is None):
                task.wait()
            if local is not None:
                local.broadcast([piece], hosts.local[leader], deadline)

        # A root with neighbours has waited for none of its sends.
        for task in tasks:
            task.wait()

    def allgather(self, outputs: Sequence[BufferView], source: BufferView, deadline: float) -> None:
        """Send ``source`` to one rank of every other host.

        Each copies to its neighbours what it has received.
        """
        hosts, local = self._hosts, self._local
        own = len(hosts.neighbours)

        receives = [
            rank
            for rank, host in enumerate(hosts.index)
            if host != hosts.host and hosts.local[rank] % own == hosts.position
        ]
        sends = [
            members[hosts.position % len(members)]
            for host, members in enumerate(hosts.members)
            if host != hosts.host
        ]

        starts = itertools.accumulate((block.count for block in blocks(source, 1)), initial=0)
        bounds = list(itertools.pairwise(starts))
        tasks = []
        for start, stop in bounds:
            piece = source.slice(start, stop)
            targets = [(rank, outputs[rank].slice(start, stop)) for rank in receives]
            crossing = functools.partial(
                self._gloo.exchange, targets, [(rank, piece) for rank in sends], deadline
            )
            tasks.append(self._worker.send(crossing))

        # The ranks of this host exchange theirs while the others' cross.
        if local is not None:
            local.allgather([outputs[rank] for rank in hosts.neighbours], source, deadline)
        else:
            copy(outputs[self._rank].pointer, source.pointer, source.nbytes)

        for (start, stop), task in zip(bounds, tasks, strict=True):
            task.wait()
            if local is not None:
                self._copy_to_neighbours(
                    [output.slice(start, stop) for output in outputs], local, deadline
                )

    def _copy_to_neighbours(
        self, pieces: Sequence[BufferView], local: ShmBackend, deadline: float
    ) -> None:
        """Copy what the ranks of this host have received from the others.

        As many ranks at a time as there are here.
        """
        own = len(self._hosts.neighbours)
        for host, members in enumerate(self._hosts.members):
            if host == self._hosts.host:
                continue
            for first in range(0, len(members), own):
                some = [pieces[rank] for rank in members[first : first + own]]
                if len(some) == own:
                    local.allgather(some, some[self._hosts.position], deadline)
                else:
                    for position, piece in enumerate(some):
                        local.broadcast([piece], position, deadline)
