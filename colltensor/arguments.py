"""Arguments: checks what a call was given, against group and backend, before a byte moves."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

from colltensor.adapters import adapter_of, find_adapter, known, number_adapter
from colltensor.backends.base import Backend
from colltensor.buffers import Blocks, Buffers, TensorBuffers, adapt, refuse_overlaps
from colltensor.errors import DeviceError, OptionError, RankError, ShapeError, TensorError
from colltensor.gathered import Gatherer
from colltensor.types import DType, ReduceOp
from colltensor.view import BufferView, in_a_row

_BYTEWISE: Final = frozenset({"broadcast", "send", "recv"})


class Arguments:
    """Turns arguments into Buffers and ranks; errors name operation, argument and rank."""

    def __init__(
        self,
        name: str,
        rank: int,
        world_size: int,
        backend: Backend,
        other: Callable[[BufferView], Backend],
    ) -> None:
        """Check for ``backend``; for tensors it does not reach, for what ``other`` returns."""
        self._name = name
        self._rank = rank
        self._world_size = world_size
        self._backend = backend
        self._other = other

        self._gatherer = Gatherer()
        packs = backend.packs_small_leaves and not backend.takes_strided
        self._gathers = packs and "cpu" in backend.device_types
        self._accepted: set[tuple[str, ReduceOp | None, DType, str, bool | None]] = set()

    def tensor(
        self,
        operation: str,
        argument: str,
        tensor: Any,
        op: ReduceOp | None,
        write: bool,
        donate: bool,
        copy: bool | None,
        containers: bool,
    ) -> Buffers:
        """Adapt a tensor (or, with ``containers``, a pytree) and choose what is staged.

        Raises:
            TensorError: The tensor cannot be used so.
            OptionError: ``copy`` is False and a copy is needed.
        """
        try:
            adapter = known.get(type(tensor))
            gathered = None
            if adapter is None and containers and copy is None and self._gathers:
                gathered = self._gatherer.buffers(tensor, write, operation in _BYTEWISE, donate)
            buffers: Buffers = gathered or (
                adapt(tensor, write, donate, containers, op is not None)
                if adapter is None
                else TensorBuffers(tensor, adapter, write, donate)
            )

            views = buffers.views
            for view in views:
                if (operation, op, view.dtype, view.device.type, copy) not in self._accepted:
                    self._accept(operation, view, op, copy)

            if len(views) > 1:
                _refuse_devices(views)
            if len(views) > 1 or (views and views[0].strides is not None):
                backend = self.backend_for(buffers)
                strided = backend.takes_strided
                # To one rank alone nothing travels, so that nothing is packed either.
                copy = False if strided and self._world_size == 1 else copy
                buffers.stage(strided, operation in _BYTEWISE, copy, backend.packs_small_leaves)
        except (TensorError, OptionError) as error:
            raise type(error)(f"{operation}: {argument} (rank {self._rank}): {error}") from error
        return buffers

    def backend_for(self, buffers: Buffers) -> Backend:
        """Return the backend that reaches the tensors of an argument."""
        backend, views = self._backend, buffers.views
        if not views or views[0].device.type in backend.device_types:
            return backend
        return self._other(views[0])

    def _accept(
        self, operation: str, view: BufferView, op: ReduceOp | None, copy: bool | None
    ) -> None:
        """Check what depends on dtype, op and device alone, and remember that it passed."""
        is_reached = view.device.type in self._backend.device_types
        backend = self._backend if is_reached else self._other(view)
        backend.require(operation, view.dtype, op)
        if copy is False and backend.stages_dtype(operation, view.dtype, op):
            raise OptionError(
                f"copy=False, but {backend.name} has no {op.name if op else operation} of {view.dtype} of its own and "
                "needs a staging copy; leave copy=None"
            )
        self._accepted.add((operation, op, view.dtype, view.device.type, copy))

    def blocks(
        self,
        operation: str,
        argument: str,
        given: Any,
        like: BufferView | None,
        op: ReduceOp | None,
        write: bool,
        copy: bool | None,
    ) -> Blocks:
        """Adapt a list of ``world_size`` tensors, or one array of as many blocks.

        The tensors or blocks are of the count and dtype of ``like``, or with ``like=None`` of the
        first.

        Raises:
            ShapeError: The list or an entry has the wrong length, count or dtype; or the array
                cannot be cut so.
        """
        size = self._world_size
        if not isinstance(given, (list, tuple)) and find_adapter(type(given)) is not None:
            whole = self.tensor(operation, argument, given, op, write, False, copy, False)
            try:
                blocks = Blocks(given, [whole], size)
            except ValueError as error:
                raise ShapeError(
                    f"{operation}: {argument} (rank {self._rank}): expected an array that has a block for each of the "
                    f"{size} ranks of group '{self._name}', but {error}"
                ) from None

            first = blocks.views[0]
            name = f"{argument}, divided by {size} ranks,"
            self.alike(operation, name, first, first if like is None else like)
            return blocks

        self.length(operation, argument, given)
        adapted: list[Buffers] = []
        for index, tensor in enumerate(given):
            name = f"{argument}[{index}]"
            buffers = self.tensor(operation, name, tensor, op, write, False, copy, False)
            like = buffers.views[0] if like is None else like
            self.alike(operation, name, buffers.views[0], like)
            adapted.append(buffers)

        blocks = Blocks(given, adapted, size)
        backend = self.backend_for(blocks)
        if copy is False and operation in backend.copies_lists and not in_a_row(blocks.transfers):
            raise OptionError(
                f"{operation}: {argument} (rank {self._rank}): copy=False, but {backend.name} takes the tensors of all "
                "ranks as one array, and these do not lie one after another; pass one array, or leave copy=None"
            )
        return blocks

    def alike(self, operation: str, argument: str, view: BufferView, expected: BufferView) -> None:
        """Check that a tensor has the count and dtype of another one of the call.

        Raises:
            ShapeError: It has not.
        """
        if view.count != expected.count or view.dtype is not expected.dtype:
            raise ShapeError(
                f"{operation}: {argument} (rank {self._rank}): expected {expected.count} elements of "
                f"{expected.dtype}, as the other tensors of the call have, got {view.count} of {view.dtype}"
            )
        self.same_device(operation, argument, view, expected)

    def same_device(
        self, operation: str, argument: str, view: BufferView, expected: BufferView
    ) -> None:
        """Check that a tensor is on the device of another one of the call.

        Raises:
            DeviceError: It is not.
        """
        if view.device != expected.device:
            raise DeviceError(
                f"{operation}: {argument} (rank {self._rank}): expected a tensor on {expected.device}, as the others "
                f"of the call, got one on {view.device}"
            )

    def length(self, operation: str, argument: str, tensor_list: Any) -> None:
        """Check that ``tensor_list`` is a list or tuple with an entry for every rank."""
        is_list = isinstance(tensor_list, (list, tuple))
        if not is_list or len(tensor_list) != self._world_size:
            got = f"{len(tensor_list)}" if is_list else f"a {type(tensor_list).__name__}"
            raise ShapeError(
                f"{operation}: {argument} (rank {self._rank}): expected a list of {self._world_size} tensors, one for "
                f"each rank of group '{self._name}', or one array of them all, got {got}"
            )

    def separate(
        self,
        operation: str,
        written: Sequence[tuple[BufferView, str]],
        read: Sequence[tuple[BufferView, str]],
        same: int = -1,
        apart: bool = False,
    ) -> None:
        """Check that what is written shares memory with nothing else.

        Entry ``same`` may be what is read. With ``apart`` what is written is known to share none
        among itself.

        Raises:
            AliasError: Two arguments share memory.
        """
        spans = [view.span() for view, _ in read]
        low, high = min(start for start, _ in spans), max(end for _, end in spans)

        try:
            if not apart:
                refuse_overlaps([(view, name) for view, name in written if not view.readonly], [])

            for index, (view, name) in enumerate(written):
                start, end = view.span()
                # Spans that do not meet need no closer look, which costs more.
                if view.readonly or start >= high or end <= low:
                    continue
                if index != same or not _identical(view, read[0][0]):
                    refuse_overlaps([(view, name)], list(read))
        except TensorError as error:
            raise type(error)(f"{operation} (rank {self._rank}): {error}") from error

    def in_place(
        self, operation: str, target: Buffers, source: BufferView, copy: bool | None
    ) -> bool:
        """Return whether a tensor is received into the very memory that is sent.

        If so, this makes it safe first.

        Raises:
            OptionError: It is, and ``copy`` is False.
        """
        view = target.views[0]
        if view.readonly or not isinstance(target, TensorBuffers) or not _identical(view, source):
            return False
        try:
            target.receive_aside(copy)
        except OptionError as error:
            raise OptionError(f"{operation} (rank {self._rank}): {error}") from error
        return True

    def op(self, operation: str, op: Any) -> ReduceOp:
        """Return ``op`` as a ReduceOp.

        Raises:
            OptionError: It is none.
        """
        try:
            return ReduceOp.of(op)
        except OptionError as error:
            raise OptionError(f"{operation} (rank {self._rank}): {error}") from None

    def rank(self, operation: str, argument: str, rank: Any) -> int:
        """Return ``rank`` as an int in this group's range.

        Raises:
            RankError: It is none.
        """
        try:
            number = operator.index(rank)
        except TypeError:
            number = -1
        if not 0 <= number < self._world_size:
            raise RankError(
                f"{operation}: {argument} (rank {self._rank}): expected a rank of group '{self._name}', 0 to "
                f"{self._world_size - 1}, got {rank!r}; ranks are this group's own, whatever other groups call them"
            )
        return number

    def peer(self, operation: str, argument: str, rank: Any) -> int:
        """Return ``rank`` as another rank of this group.

        Raises:
            RankError: It is none, or this very rank.
        """
        number = self.rank(operation, argument, rank)
        if number == self._rank:
            raise RankError(
                f"{operation}: {argument} (rank {self._rank}): expected another rank of group '{self._name}', got this "
                "rank itself; copy the tensor instead"
            )
        return number

    def shift(self, dst_rank: Any, src_rank: Any) -> tuple[int, int]:
        """Return the two ranks of a ``sendrecv``: two peers, or twice this very rank.

        Raises:
            RankError: One is no rank of the group, or only one is this rank.
        """
        to = self.rank("sendrecv", "dst_rank", dst_rank)
        of = self.rank("sendrecv", "src_rank", src_rank)
        if to == of == self._rank:
            return to, of
        return self.peer("sendrecv", "dst_rank", to), self.peer("sendrecv", "src_rank", of)

    def number(self, operation: str, argument: str, value: Any) -> int | None:
        """Return a whole number as an int, and None as it is.

        Raises:
            OptionError: It is neither.
        """
        try:
            return None if value is None else operator.index(value)
        except TypeError:
            raise OptionError(
                f"{operation}: {argument} (rank {self._rank}): expected a whole number or None, got {value!r}"
            ) from None


def _refuse_devices(views: Sequence[BufferView]) -> None:
    """Check that all leaves of one argument are on one device.

    Raises:
        DeviceError: They are not.
    """
    for view in views:
        if view.device != views[0].device:
            raise DeviceError(
                f"the leaves are on {views[0].device} and {view.device}; make one call for those of each device"
            )


def _identical(first: BufferView, second: BufferView) -> bool:
    is_same = first.pointer == second.pointer and first.count == second.count
    return is_same and _layout(first) == _layout(second)


def _layout(view: BufferView) -> list[tuple[int, int]] | None:
    if view.strides is None:
        return None
    return [axis for axis in zip(view.shape, view.strides, strict=True) if axis[0] != 1]


def first_elements(operation: str, tensor: Any, count: Any) -> Any:
    """Return the first elements of a tensor, in its own memory; 0 means all.

    Raises:
        OptionError: ``count`` is no number of elements of this tensor, or these do not lie one
            after another.
    """
    if not isinstance(count, int) or count < 0:
        raise OptionError(
            f"{operation}: n_elements: expected a number of elements, or 0 for all, got {count!r}"
        )
    if count == 0:
        return tensor

    adapter = adapter_of(tensor)
    view = adapter.source(tensor)
    if count > view.count or view.strides is not None:
        raise OptionError(
            f"{operation}: n_elements={count}: expected a contiguous tensor of at least as many, got {view!r}"
        )

    # A number is its only element, and has no ``reshape``.
    return tensor if number_adapter(type(tensor)) is adapter else tensor.reshape(-1)[:count]
