"""Trees of plain tensors for backends that want contiguous memory.

Native code packs the leaves into buckets. What ``TreeBuffers`` does leaf by leaf in Python is one
native call here. Also for leaves of a framework that never changes them, which are known by their
addresses.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

from colltensor.adapters import (
    adapter_of,
    host_memory,
    known,
    native_copies,
    native_readers,
    notify_all_written,
    reader_of,
)
from colltensor.backends.shm import library
from colltensor.buffers import adapt, compared_number
from colltensor.buffers import plan as transfers_of
from colltensor.errors import BackendUnavailableError
from colltensor.tree_plans import Plan, Plans
from colltensor.types import UINT8
from colltensor.view import BufferView

_SPARE_NBYTES = 64 << 20
"""How much memory for buckets a group keeps."""


class Gatherer:
    """Makes the buffers of one group's trees.

    Keeps the buckets of calls that are done for the next ones.
    """

    def __init__(self) -> None:
        self._plans = Plans()
        self._spare: dict[int, list[BufferView]] = {}
        self._spare_nbytes = 0
        self._lock = threading.Lock()  # calls are begun and ended in any threads

    def buffers(
        self, tree: Any, write: bool, bytewise: bool, donate: bool
    ) -> GatheredBuffers | None:
        """Return the buffers of a tree that ``tree_plans`` plans for.

        Returns None if the tree takes ``TreeBuffers``.

        Args:
            tree: The tree, or a tensor, which is refused.
            write: Whether its leaves are written.
            bytewise: See ``Buffers.stage``.
            donate: Use the memory of immutable leaves again.
        """
        if tree.__class__ in known or not _is_loaded():
            return None

        plan, leaves = self._plans.find(tree)
        while plan is not None:
            layout = plan.made.get(bytewise)
            if layout is None:
                layout = plan.made[bytewise] = Layout(plan, bytewise)

            kind = leaves[0].__class__
            adapter: Any = known.get(kind)
            if adapter is None:  # another thread has just registered one
                return None

            if adapter.immutable:
                if plan.suits(leaves, adapter):
                    return _allocating(self, tree, leaves, plan, layout, adapter, write, donate)
                plan = self._plans.renewed(tree, plan)
                continue

            reader = 0 if layout.read is None else reader_of(kind)
            move = (
                layout.read(write, id(leaves), id(kind), reader)
                if layout.read is not None and reader
                else None
            )

            try:
                if move is None:
                    move = layout.take(write, *leaves)
            except (BufferError, TypeError, ValueError):  # what the slow path says in its own words
                return None

            if move is not None:
                return GatheredBuffers(self, tree, leaves, plan, layout, move, write)
            plan = self._plans.renewed(tree, plan)

        return None

    def take(self, nbytes: int) -> BufferView:
        """Return memory for a bucket."""
        with self._lock:
            spare = self._spare.get(nbytes)
            if spare:
                self._spare_nbytes -= nbytes
                return spare.pop()
        return host_memory().allocate(nbytes)

    def give_back(self, bucket: BufferView) -> None:
        """Keep a bucket that nobody uses any more, if there is room."""
        with self._lock:
            if self._spare_nbytes + bucket.nbytes <= _SPARE_NBYTES:
                self._spare_nbytes += bucket.nbytes
                self._spare.setdefault(bucket.nbytes, []).append(bucket)


def _native_copy() -> Callable[[int], object] | None:
    """Return native code's copy between layouts."""
    return library.load().shm_copy if _is_loaded() else None


def _native_reader() -> tuple[Callable[[int], int], Callable[[int, int, int], bool]] | None:
    """Return native code's reader of numpy's arrays, and its trial of one."""
    if not _is_loaded() or not library.reads_python():
        return None
    native = library.load()
    trial = native.get_function("shm_read_one")
    trial.release_gil = False
    return native.shm_numpy_reader, trial


native_copies.append(_native_copy)
native_readers.append(_native_reader)


@functools.lru_cache
def _is_loaded() -> bool:
    """Return whether there is native code; without it all trees take ``TreeBuffers``."""
    try:
        library.load()
    except BackendUnavailableError:
        return False
    return True


class Layout:
    """How the leaves of trees of one plan share transfers, the same way as in ``TreeBuffers``.

    Attributes:
        bytewise: Whether leaves of different dtypes share a transfer, which is one of bytes then.
        transfers: The leaves of each. Those of one leaf, not smaller than a bucket's, travel by
            themselves.
        nbytes: The bytes of each.
        take: Given whether they are written, and the leaves, returns what copies them, or None.
        place: The same, given the addresses of contiguous leaves.
        read: The same, given a list of leaves of one type as ``AgreeingBackend.reading_tree`` is;
            None without that.
    """

    def __init__(self, plan: Plan, bytewise: bool) -> None:
        self.bytewise = bytewise
        self.transfers = transfers_of(plan.views, bytewise)
        self.nbytes = [
            sum(plan.views[member].nbytes for member in members) for members in self.transfers
        ]
        words = [len(self.transfers)]
        for members in self.transfers:
            words += [len(members), *members]
        packed = plan.words(*words)
        make = library.load().shm_gather_function
        self.take: Callable[..., Any] = make(packed.buffer_info()[0], 0)
        self.place: Callable[..., Any] = make(packed.buffer_info()[0], 2)
        self.read: Callable[[bool, int, int, int], Any] | None = None
        if library.reads_python():
            read: Any = make(packed.buffer_info()[0], 1)
            read.release_gil = False
            self.read = read


class GatheredBuffers:
    """The leaves of a tree of exportable tensors: see ``Buffers``."""

    __slots__ = (
        "_buckets",
        "_gatherer",
        "_leaves",
        "_lone",
        "_move",
        "_ordered",
        "_plan",
        "_tree",
        "_write",
        "staged",
        "transfers",
        "views",
    )

    allocates = False

    def __init__(
        self,
        gatherer: Gatherer,
        tree: Any,
        leaves: Sequence[Any],
        plan: Plan,
        layout: Layout,
        move: Any,
        write: bool,
    ) -> None:
        self._gatherer = gatherer
        self._tree = tree
        self._leaves = leaves
        self._plan = plan
        self._move = move
        self._write = write

        self._buckets: list[tuple[int, BufferView]] = []
        self._lone: list[tuple[int, int]] = []  # transfers of one leaf, and which
        self._ordered: list[tuple[int, int]] = []

        self.transfers: list[BufferView] = []
        self.views = self.transfers

        for number, members in enumerate(layout.transfers):
            first = plan.views[members[0]]
            if len(members) == 1:
                self._lone.append((number, members[0]))

            pointer = move(2, members[0], 0) if len(members) == 1 else 0
            if pointer or (len(members) == 1 and not first.count):
                leaf = leaves[members[0]]
                self.transfers.append(
                    BufferView.from_address(pointer, (first.count,), first.dtype, owner=leaf)
                )
                continue

            bucket = gatherer.take(layout.nbytes[number])
            self._buckets.append((number, bucket))
            self.transfers.append(
                bucket.cast(UINT8 if layout.bytewise and len(members) > 1 else first.dtype)
            )

        self.staged = bool(self._buckets)

    def stage(self, strided: bool, bytewise: bool, copy: bool | None, fuse: bool = True) -> None:
        """Do nothing: the transfers are decided."""

    def order(self) -> int:
        """Return a number for how lone leaves lie, that have buckets: that of ``TreeBuffers``."""
        if not self.staged or not self._lone:
            return 0
        self._ordered = [
            (number, member) for number, member in self._lone if self._move(3, member, 0)
        ]
        # In Python's words, since another rank's leaves may have come by the slow path.
        leaves = ((number, self._leaves[member]) for number, member in self._ordered)
        orders = [(number, adapter_of(leaf).source(leaf).order()) for number, leaf in leaves]
        return compared_number(str(orders)) if orders else 0

    def straighten(self) -> None:
        """Let those leaves travel as they lie."""
        for number, member in self._ordered:
            view = self._plan.views[member]
            self.transfers[number] = BufferView.from_address(
                self._move(4, member, 0), (view.count,), view.dtype, owner=self._leaves[member]
            )
        ordered = {number for number, _ in self._ordered}
        for number, bucket in self._buckets:
            if number in ordered:
                self._gatherer.give_back(bucket)
        self._buckets = [kept for kept in self._buckets if kept[0] not in ordered]
        self.staged = bool(self._buckets)

    def allocate_result(self) -> None:
        """Do nothing: all leaves can be written."""

    def check(self) -> None:
        """Do nothing: no leaf is immutable."""

    def load(self) -> None:
        """Copy the leaves into their buckets."""
        for number, bucket in self._buckets:
            self._move(0, number, bucket.pointer)

    def store(self) -> None:
        """Copy results back, notify the frameworks of it, and let go of the buckets."""
        if self._write:
            for number, bucket in self._buckets:
                self._move(1, number, bucket.pointer)
            notify_all_written(self._leaves)
        for _, bucket in self._buckets:
            self._gatherer.give_back(bucket)

    def result(self) -> Any:
        """Return the tree, whose leaves were written in place."""
        return self._tree

    def streams(self) -> set[int | None]:
        """Return no stream: all memory is the host's."""
        return {None}

    def compared(self) -> tuple[int, int]:
        """Return the number of elements of all leaves, and what the ranks compare of the leaves.

        That is their paths, dtypes and counts.
        """
        return self._plan.count, self._plan.leaves_hash

    def describe(self) -> str:
        """Return the leaves' dtypes and counts for an error message."""
        return adapt(self._tree, False, False, True).describe()


class AllocatingBuffers(GatheredBuffers):
    """The leaves of a tree whose framework never changes them.

    What is written are new leaves, made by ``adapter``.
    """

    __slots__ = ("_adapter", "_donate", "_layout")

    def __init__(
        self,
        gatherer: Gatherer,
        tree: Any,
        leaves: Sequence[Any],
        plan: Plan,
        layout: Layout,
        move: Any,
        write: bool,
        adapter: Any,
        donate: bool,
    ) -> None:
        super().__init__(gatherer, tree, leaves, plan, layout, move, write)
        self._layout = layout
        self._adapter = adapter
        self._donate = donate

    @property
    def allocates(self) -> bool:  # type: ignore[override]
        """True where leaves are written."""
        return self._write

    def check(self) -> None:
        """Raise where a leaf was deleted."""
        try:
            self._adapter.kinds(self._leaves)
        except RuntimeError:
            for leaf in self._leaves:
                self._adapter.source(leaf)  # which says so

    def allocate_result(self) -> None:
        """Make the results, whose memory is worked on from now on."""
        if not self._write:
            return
        self._leaves = self._adapter.allocate_results(self._leaves, self._donate)
        self._move = self._layout.place(True, *self._adapter.addresses(self._leaves))
        for number, member in self._lone:
            self.transfers[number].pointer = self._move(2, member, 0)
            self.transfers[number].owner = self._leaves[member]

    def store(self) -> None:
        """Copy results back, and let go of the buckets."""
        for number, bucket in self._buckets:
            if self._write:
                self._move(1, number, bucket.pointer)
            self._gatherer.give_back(bucket)

    def result(self) -> Any:
        """Return a tree of the results, or the tree where nothing was written."""
        return self._plan.like(self._tree, self._leaves) if self._write else self._tree


def _allocating(
    gatherer: Gatherer,
    tree: Any,
    leaves: Sequence[Any],
    plan: Plan,
    layout: Layout,
    adapter: Any,
    write: bool,
    donate: bool,
) -> AllocatingBuffers | None:
    """Return the buffers of immutable leaves that suit the plan.

    Returns None where the slow path says why it cannot be.
    """
    try:
        adapter.source(leaves[0])  # raises while a function is traced
        addresses = adapter.addresses(leaves)
    except RuntimeError:  # or its computation failed
        return None

    if write and donate and len(set(addresses)) < len(addresses):  # one memory twice
        return None

    move = layout.place(write, *addresses)
    return AllocatingBuffers(gatherer, tree, leaves, plan, layout, move, write, adapter, donate)
