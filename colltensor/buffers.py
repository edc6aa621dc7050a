"""Buffers: one tensor argument of a call, from the user's object to what travels, and back.

Adapts tensors, decides which are staged or fused, and moves staged elements.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any, Final, Protocol

from colltensor import tree
from colltensor.adapters import (
    Adapter,
    adapter_of,
    find_adapter,
    memory_of,
    no_write_notice,
    number_adapter,
    stream_of,
    target_of,
)
from colltensor.errors import AliasError, OptionError, TensorError
from colltensor.types import UINT8, DType
from colltensor.view import BufferView, JoinedView

FUSE_BELOW_NBYTES: Final = 1 << 20
"""Leaves smaller than this are fused. Measured on 2 ranks: a transfer costs Gloo about 400 us
whatever its size, for which both staging copies of 1 MiB can be made."""
BUCKET_NBYTES: Final = 16 << 20
"""A bucket of fused leaves is closed when the next leaf would take it past this size."""
_LEAVES_SHOWN: Final = 6
_CONSTANTS_SHOWN: Final = 30
_CONSTANT_WIDTH: Final = 100


class Buffers(Protocol):
    """The leaves of one argument: what the user gave, its views, and the contiguous transfers.

    Attributes:
        views: One view a leaf, in the user's layout.
        transfers: What the backend works on: the views themselves, staging copies of strided ones,
            or buckets of several. Lists and views stay the same objects once staged.
            ``allocate_result`` gives views of immutable tensors another address.
        allocates: Whether ``allocate_result`` does anything.
    """

    views: list[BufferView]
    transfers: list[BufferView]

    @property
    def allocates(self) -> bool:
        """True where a tensor is written whose framework never changes one."""

    @property
    def staged(self) -> bool:
        """True where ``load`` or ``store`` copies elements."""

    def stage(self, strided: bool, bytewise: bool, copy: bool | None, fuse: bool = True) -> None:
        """Decide the transfers, from counts and dtypes alone, which are equal on all ranks.

        Args:
            strided: The backend takes strided views itself.
            bytewise: The operation moves bytes, so leaves of different dtypes may share a transfer.
            copy: False refuses every staging copy.
            fuse: Small leaves share transfers.

        Raises:
            OptionError: ``copy`` is False and a staging copy is needed.
        """

    def order(self) -> int:
        """Return a number that is equal on ranks whose staged leaves lie in the same order.

        Leaves count if they lie without gaps, share no transfer with others, and stay where they
        are. It is 0 if none do.
        """

    def straighten(self) -> None:
        """Stage these leaves no more.

        All ranks have the same order, in which the elements can travel as they lie.
        """

    def allocate_result(self) -> None:
        """Make immutable tensors' results, with the same contents.

        Their views are the results' from now on. Called once the ranks agreed, because a donated
        tensor is gone then.
        """

    def check(self) -> None:
        """Raise where an immutable tensor no longer has its memory.

        Its owner may have given the memory away since.
        """

    def load(self) -> None:
        """Copy staged leaves into their staging buffers; before or after ``allocate_result``."""

    def store(self) -> None:
        """Copy staged results back and notify the frameworks of what was written."""

    def result(self) -> Any:
        """Return the tensor or container to hand back.

        It is the very object given where nothing was replaced.
        """

    def streams(self) -> set[int | None]:
        """Return the streams on which frameworks queue this thread's work now.

        They are those of the frameworks of tensors on a device. None is among them where the host
        must wait first. That is before a framework may have a result, or may give memory that is
        read to another computation (JAX's donation).
        """

    def compared(self) -> tuple[int, int]:
        """Return the number of elements, and a number that stands for the leaves.

        The latter is equal where paths, dtypes and counts are.
        """

    def describe(self) -> str:
        """Return the leaves' dtypes and counts for an error message."""


def adapt(
    tensor: Any, write: bool, donate: bool, containers: bool, reduced: bool = False
) -> Buffers:
    """View ``tensor``, whose elements may be ``reduced``.

    It is a tensor or (with ``containers``) a pytree of tensors.

    Raises:
        TensorError: A leaf that cannot be used so; the message has its path.
    """
    adapter = find_adapter(type(tensor))
    if adapter is None:
        if containers and tree.is_container(tensor):
            return TreeBuffers(tensor, write, donate, reduced)
        adapter = adapter_of(tensor)
    kind = NumberBuffers if hasattr(adapter, "restored") else TensorBuffers
    return kind(tensor, adapter, write, donate)


class _Alike:
    """What the ranks compare of one tensor, or of several that are alike.

    It is the count and dtype of the first.
    """

    __slots__ = ()
    views: list[BufferView]

    def compared(self) -> tuple[int, int]:
        view = self.views[0]
        return view.count, view.dtype.code

    def describe(self) -> str:
        return f"{self.views[0].dtype}[{self.views[0].count}]"

    def order(self) -> int:
        return 0

    def straighten(self) -> None:
        pass


class TensorBuffers(_Alike):
    """One tensor. The common case, so it is kept lean."""

    __slots__ = (
        "_adapter",
        "_aside",
        "_donate",
        "_tensor",
        "_write",
        "allocates",
        "staged",
        "transfers",
        "views",
    )

    def __init__(self, tensor: Any, adapter: Adapter, write: bool, donate: bool) -> None:
        self._tensor = tensor
        self._adapter = adapter
        self._write = write
        self._donate = donate
        self.allocates = write and adapter.immutable
        self.staged = False
        view = target_of(adapter, tensor) if write else adapter.source(tensor)
        self.views = self.transfers = [view]
        if write and view.strides is not None:
            _refuse_shared([(view, "the tensor")])

    def stage(self, strided: bool, bytewise: bool, copy: bool | None, fuse: bool = True) -> None:
        view = self.views[0]
        if strided or view.strides is None:
            return
        if copy is False:
            raise _copy_refused(view)
        self.transfers = [memory_of(view.device.type).allocate(view.nbytes, view).cast(view.dtype)]
        self.staged = True

    def order(self) -> int:
        # the slot of an aside is set there alone, because every call comes by the constructor
        if not self.staged or self.allocates or hasattr(self, "_aside"):
            return 0
        layout = self.views[0].order()
        return 0 if layout is None else compared_number(str(layout))

    def straighten(self) -> None:
        self.transfers[0] = self.views[0].straightened()
        self.staged = False

    def receive_aside(self, copy: bool | None) -> None:
        """Have results go to a staging buffer until all is done.

        The reason is that the call reads this memory too.

        Raises:
            OptionError: ``copy`` is False.
        """
        view = self.views[0]
        if copy is False:
            raise OptionError(
                f"copy=False, but {view!r} is sent and received into, and needs a staging copy; pass another tensor or "
                "leave copy=None"
            )

        self._aside = True
        if not self.staged:
            self.transfers = [
                memory_of(view.device.type).allocate(view.nbytes, view).cast(view.dtype)
            ]
            self.staged = True

    def allocate_result(self) -> None:
        if self.allocates:
            self._tensor, view = self._adapter.allocate_result(self._tensor, self._donate)
            self.views[0].become(view)

    def check(self) -> None:
        if self.allocates:
            self._adapter.source(self._tensor)

    def load(self) -> None:
        if self.staged:
            memory_of(self.views[0].device.type).copy(self.transfers[0], self.views[0])

    def store(self) -> None:
        if self._write:
            if self.staged:
                memory_of(self.views[0].device.type).copy(self.views[0], self.transfers[0])
            if self._tensor.__class__ not in no_write_notice:
                self._adapter.written(self._tensor)

    def result(self) -> Any:
        return self._tensor

    def streams(self) -> set[int | None]:
        return {stream_of(self._adapter, self.views[0].device.index)}


class NumberBuffers(TensorBuffers):
    """One number, of which the result is another."""

    __slots__ = ("_given",)

    def __init__(self, tensor: Any, adapter: Adapter, write: bool, donate: bool) -> None:
        super().__init__(tensor, adapter, write, donate)
        self._given = tensor

    def result(self) -> Any:
        return _restored(self._adapter, self._tensor, self._given) if self._write else self._given


class TreeBuffers:
    """A pytree of tensors and numbers; small leaves are fused.

    Where nothing is ``reduced`` it may have other leaves too. These constants stay as they are and
    have to be the same on all ranks.
    """

    __slots__ = (
        "_adapters",
        "_chosen",
        "_constants",
        "_donate",
        "_given",
        "_ordered",
        "_original",
        "_paths",
        "_rebuild",
        "_results",
        "_staged",
        "_write",
        "transfers",
        "views",
    )

    def __init__(
        self, tree_of_tensors: Any, write: bool, donate: bool, reduced: bool = False
    ) -> None:
        self._original = tree_of_tensors
        self._write = write
        self._donate = donate

        self._chosen: list[list[int]] = []
        self._ordered: dict[int, int] = {}
        self._staged: list[tuple[int, BufferView]] = []

        self._given, self._paths, self._rebuild = tree.flatten(tree_of_tensors, reduced)
        self._constants: list[str] = []
        if not reduced:
            self._set_constants_aside()

        self._results = list(self._given)
        self._adapters: list[Adapter] = []
        self.views: list[BufferView] = []

        for leaf, path in zip(self._results, self._paths, strict=True):
            try:
                adapter = adapter_of(leaf)
                self.views.append(target_of(adapter, leaf) if write else adapter.source(leaf))
            except TensorError as error:
                raise type(error)(f"leaf {path}: {error}") from error
            self._adapters.append(adapter)

        self.transfers = self.views
        if write:
            named = zip(self.views, self._paths, strict=True)
            _refuse_shared(
                [(view, f"leaf {path}") for view, path in named if donate or not view.readonly]
            )

    def _set_constants_aside(self) -> None:
        """Leave what is no tensor and no number out of the leaves, and put it back into results."""
        leaves, paths, rebuild = self._given, self._paths, self._rebuild
        found = {
            index: text
            for index, leaf in enumerate(leaves)
            if find_adapter(type(leaf)) is None
            and number_adapter(type(leaf)) is None
            and (text := tree.constant(leaf)) is not None
        }
        if not found:
            return

        moved = [index for index in range(len(leaves)) if index not in found]
        self._constants = [f"{paths[index]} {text}" for index, text in found.items()]
        self._given, self._paths = (
            [leaves[index] for index in moved],
            [paths[index] for index in moved],
        )

        def rebuild_with_constants(results: Iterable[Any]) -> Any:
            all_of_them = list(leaves)
            for index, result in zip(moved, results, strict=True):
                all_of_them[index] = result
            return rebuild(all_of_them)

        self._rebuild = rebuild_with_constants

    def stage(self, strided: bool, bytewise: bool, copy: bool | None, fuse: bool = True) -> None:
        views = self.views
        if strided and fuse and copy is not False:
            self.transfers = joined(views)
            return
        alone = copy is False or not fuse
        chosen = [[index] for index in range(len(views))] if alone else plan(views, bytewise)
        self._chosen = chosen
        self.transfers = []
        for members in chosen:
            view = views[members[0]]
            if len(members) == 1 and (strided or view.strides is None):
                self.transfers.append(view)
            elif copy is False:
                raise _copy_refused(view, f"leaf {self._paths[members[0]]}: ")
            else:
                self.transfers.append(self._bucket(members, bytewise))

    def _bucket(self, members: list[int], bytewise: bool) -> BufferView:
        views = [self.views[index] for index in members]
        bucket = memory_of(views[0].device.type).allocate(
            sum(view.nbytes for view in views), views[0]
        )
        start = 0
        for index, view in zip(members, views, strict=True):
            end = start + view.nbytes
            self._staged.append((index, bucket.slice(start, end).cast(view.dtype)))
            start = end
        return bucket if bytewise and len(members) > 1 else bucket.cast(views[0].dtype)

    @property
    def staged(self) -> bool:
        return bool(self._staged)

    def order(self) -> int:
        if not self._staged:
            return 0
        layouts = {
            place: self.views[members[0]].order()
            for place, members in enumerate(self._chosen)
            if len(members) == 1 and not (self._write and self._adapters[members[0]].immutable)
        }
        known = [(place, layout) for place, layout in layouts.items() if layout]
        self._ordered = {place: self._chosen[place][0] for place, _ in known}
        return compared_number(str(known)) if known else 0

    def straighten(self) -> None:
        for place, index in self._ordered.items():
            self.transfers[place] = self.views[index].straightened()
        ordered = self._ordered.values()
        self._staged = [staged for staged in self._staged if staged[0] not in ordered]

    @property
    def allocates(self) -> bool:
        return self._write and any(adapter.immutable for adapter in self._adapters)

    def allocate_result(self) -> None:
        if not self._write:
            return
        for index, adapter in enumerate(self._adapters):
            if adapter.immutable:
                self._results[index], view = adapter.allocate_result(
                    self._results[index], self._donate
                )
                self.views[index].become(view)

    def check(self) -> None:
        if self._write:
            for adapter, tensor in zip(self._adapters, self._results, strict=True):
                if adapter.immutable:
                    adapter.source(tensor)

    def load(self) -> None:
        for index, staging in self._staged:
            memory_of(staging.device.type).copy(staging, self.views[index])

    def store(self) -> None:
        if self._write:
            for index, staging in self._staged:
                memory_of(staging.device.type).copy(self.views[index], staging)
            for adapter, result in zip(self._adapters, self._results, strict=True):
                adapter.written(result)

    def result(self) -> Any:
        if not self.allocates:
            return self._original
        return self._rebuild(map(_restored, self._adapters, self._results, self._given))

    def streams(self) -> set[int | None]:
        pairs = zip(self._adapters, self.views, strict=True)
        return {stream_of(adapter, view.device.index) for adapter, view in pairs}

    def compared(self) -> tuple[int, int]:
        text = ";".join(
            f"{path}:{view.dtype.code}:{view.count}"
            for path, view in zip(self._paths, self.views, strict=True)
        )
        if self._constants:
            text = ";".join([text, *self._constants])
        return sum(view.count for view in self.views), compared_number(text)

    def describe(self) -> str:
        leaves = [
            f"{path} {view.dtype}[{view.count}]"
            for path, view in zip(self._paths, self.views, strict=True)
        ]
        more = (
            f", and {len(leaves) - _LEAVES_SHOWN} more leaves"
            if len(leaves) > _LEAVES_SHOWN
            else ""
        )
        constants = [
            textwrap.shorten(constant, _CONSTANT_WIDTH)
            for constant in self._constants[:_CONSTANTS_SHOWN]
        ]
        return "{" + ", ".join([*constants, *leaves[:_LEAVES_SHOWN]]) + more + "}"


class Blocks(_Alike):
    """An argument that has a block of elements for every rank.

    It is a list of tensors, or one array of all of them. Views and transfers are one a block, and
    the ranks compare the count and dtype of one.

    Attributes:
        whole: Whether it is one array, whose blocks share no memory.
    """

    __slots__ = ("_given", "_members", "transfers", "views", "whole")

    def __init__(self, given: Any, members: Sequence[Buffers], number: int) -> None:
        """Hold ``number`` blocks of ``given``.

        ``members`` are what is known of a list's tensors, or of the array, once staged.

        Raises:
            ValueError: The array cannot be cut so.
        """
        self._given = given
        self._members = members
        self.whole = not isinstance(given, (list, tuple))
        if self.whole:
            view, moved = members[0].views[0], members[0].transfers[0]
            self.views = view.blocks(number)
            self.transfers = self.views if moved is view else moved.blocks(number)
        else:
            self.views = [buffers.views[0] for buffers in members]
            self.transfers = [buffers.transfers[0] for buffers in members]

    def stage(self, strided: bool, bytewise: bool, copy: bool | None, fuse: bool = True) -> None:
        """Do nothing: the members are staged."""

    def named(self, argument: str) -> list[tuple[BufferView, str]]:
        """Return the views with their names in messages."""
        return [(view, f"{argument}[{index}]") for index, view in enumerate(self.views)]

    @property
    def staged(self) -> bool:
        return any(buffers.staged for buffers in self._members)

    @property
    def allocates(self) -> bool:
        return any(buffers.allocates for buffers in self._members)

    def allocate_result(self) -> None:
        for buffers in self._members:
            buffers.allocate_result()
        if self.whole and self.allocates:
            for view, block in zip(
                self.views, self._members[0].views[0].blocks(len(self.views)), strict=True
            ):
                view.become(block)

    def check(self) -> None:
        for buffers in self._members:
            buffers.check()

    def load(self) -> None:
        for buffers in self._members:
            buffers.load()

    def store(self) -> None:
        for buffers in self._members:
            buffers.store()

    def result(self) -> Any:
        """Return what was given, or what takes its place.

        A list has new tensors in the places of immutable ones. A tuple is new, and so is an
        immutable array.
        """
        results = [buffers.result() for buffers in self._members]
        if self.whole:
            return results[0]
        if isinstance(self._given, tuple):
            return tuple(results)
        self._given[:] = results
        return self._given

    def streams(self) -> set[int | None]:
        return set().union(*(buffers.streams() for buffers in self._members))


def compared_number(text: str) -> int:
    """Return what stands for a text where ranks compare it."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _restored(adapter: Adapter, result: Any, given: Any) -> Any:
    """Return what the caller gets in the place of a leaf."""
    restored = getattr(adapter, "restored", None)
    return result if restored is None else restored(result, given)


def _copy_refused(view: BufferView, leaf: str = "") -> OptionError:
    return OptionError(
        f"{leaf}copy=False, but {view!r} is strided and needs a staging copy; pass a contiguous tensor or leave "
        "copy=None"
    )


def refuse_overlaps(
    written: list[tuple[BufferView, str]], read: list[tuple[BufferView, str]]
) -> None:
    """Check that nothing written shares memory with itself, with another, or with what is read.

    Raises:
        AliasError: Names the two arguments.
    """
    _refuse_shared(written)
    for view, name in written:
        for other, other_name in read:
            if _share(view, other):
                raise AliasError(
                    f"{name} and {other_name} share memory, and the call writes to {name}; pass a copy"
                )


def _refuse_shared(named: list[tuple[BufferView, str]]) -> None:
    for view, name in named:
        if view.overlaps_itself():
            raise AliasError(
                f"{name}: {view!r} has several indices on one address (an expanded or sliding view) and cannot be "
                "written; pass a copy"
            )
    if len(named) < 2:
        return
    ordered = sorted(named, key=lambda pair: pair[0].span())
    for position, (view, name) in enumerate(ordered):
        end = view.span()[1]
        for other, other_name in ordered[position + 1 :]:
            if other.span()[0] >= end:
                break
            if _share(view, other):
                raise AliasError(
                    f"{name} and {other_name} share memory, and the call writes to both; pass copies"
                )


def _share(first: BufferView, second: BufferView) -> bool:
    if first.device != second.device or not first.count or not second.count:
        return False
    return memory_of(first.device.type).overlap(first, second)


def joined(views: Sequence[BufferView]) -> list[BufferView]:
    """Return views of one dtype as one transfer, in the order in which the dtypes first come."""
    by_dtype: dict[DType, list[BufferView]] = {}
    for view in views:
        by_dtype.setdefault(view.dtype, []).append(view)
    return [parts[0] if len(parts) == 1 else JoinedView(parts) for parts in by_dtype.values()]


def plan(
    views: Sequence[BufferView],
    bytewise: bool = False,
    *,
    fuse_below: int = FUSE_BELOW_NBYTES,
    bucket_nbytes: int = BUCKET_NBYTES,
) -> list[list[int]]:
    """Return which leaves share a transfer.

    They are small ones of one dtype (or all, bytewise), in order.
    """
    transfers: list[list[int]] = []
    filling: dict[DType, tuple[list[int], int]] = {}

    for index, view in enumerate(views):
        if view.nbytes >= fuse_below:
            transfers.append([index])
            continue

        kind = UINT8 if bytewise else view.dtype
        members, nbytes = filling.get(kind, ([], bucket_nbytes + 1))
        if nbytes + view.nbytes > bucket_nbytes:
            members, nbytes = [], 0
            transfers.append(members)
        members.append(index)
        filling[kind] = (members, nbytes + view.nbytes)
    return transfers
