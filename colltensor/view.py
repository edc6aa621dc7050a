"""BufferView: the canonical view of one tensor's memory.

The only thing that passes between adapters (which know frameworks) and backends (which know
transports).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, Final

from colltensor import dlpack
from colltensor.types import CPU, UINT8, Device, DType

LEGACY_STREAM: Final = 1
"""``cudaStreamLegacy``: the default stream of threads that have no default streams of their own."""


class BufferView:
    """The memory of one tensor: where it is, how many elements, of which type, in which layout.

    A view copies nothing. It keeps the memory alive through ``handle`` (a DLPack export) or
    ``owner``; whoever holds the view may use ``pointer``.

    Attributes:
        pointer: Address of the first element (of index 0 in every axis).
        count: Number of elements.
        dtype: The true data type, also where DLPack or numpy cannot name it.
        device: Where the memory is.
        shape: Extents, for messages and packing; ranks never compare shapes.
        strides: Steps in elements per axis, or None for a C-contiguous (row-major) layout.
        readonly: True where the memory must not be written.
        handle: The DLPack handle (``tvm_ffi.Tensor``), or None for memory viewed by address. Its
            dtype is an integer of the same width where the framework cannot export ``dtype``.
        owner: The object that owns the memory.
        stream: On a CUDA device, the stream on which the framework orders its work on this memory.
            It is a ``cudaStream_t`` as a number; 1 is the legacy default stream. None for host
            memory.
    """

    __slots__ = (
        "_shape",
        "count",
        "device",
        "dtype",
        "handle",
        "owner",
        "pointer",
        "readonly",
        "stream",
        "strides",
    )

    def __init__(
        self,
        pointer: int,
        count: int,
        dtype: DType,
        device: Device,
        shape: tuple[int, ...] | None,
        strides: tuple[int, ...] | None,
        readonly: bool,
        handle: object,
        owner: Any,
        stream: int | None = None,
    ) -> None:
        self.pointer = pointer
        self.count = count
        self.dtype = dtype
        self.device = device

        # None: the owner's, read when asked for, which contiguous tensors seldom are
        self._shape = shape
        self.strides = strides

        self.readonly = readonly
        self.handle = handle
        self.owner = owner
        self.stream = stream

    @classmethod
    def from_dlpack(
        cls, tensor: object, *, dtype: DType, device: Device, readonly: bool = False
    ) -> BufferView:
        """View any object that exports DLPack. ``dtype`` is its true type.

        The view is read-only where the exporter says so, whatever ``readonly`` is.
        """
        handle, flags = dlpack.export_with_flags(tensor)
        readonly = readonly or bool(flags & dlpack.READ_ONLY)
        shape = tuple(handle.shape)
        strides = None if handle.is_contiguous() else tuple(handle.strides)
        pointer, count = handle.data_ptr(), math.prod(shape)
        return cls(pointer, count, dtype, device, shape, strides, readonly, handle, tensor)

    @classmethod
    def from_address(
        cls,
        pointer: int,
        shape: tuple[int, ...],
        dtype: DType,
        *,
        device: Device = CPU,
        strides: tuple[int, ...] | None = None,
        readonly: bool = False,
        owner: Any,
        stream: int | None = None,
    ) -> BufferView:
        """View memory by its address; ``owner`` keeps it alive."""
        return cls(
            pointer, math.prod(shape), dtype, device, shape, strides, readonly, None, owner, stream
        )

    @classmethod
    def from_buffer(
        cls, buffer: bytearray | memoryview | ctypes.Array[ctypes.c_char]
    ) -> BufferView:
        """View a writable, C-contiguous host buffer as bytes."""
        raw = (ctypes.c_char * memoryview(buffer).nbytes).from_buffer(buffer)
        return cls.from_address(ctypes.addressof(raw), (len(raw),), UINT8, owner=raw)

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents of all axes."""
        return tuple(self.owner.shape) if self._shape is None else self._shape

    @property
    def nbytes(self) -> int:
        """Bytes of all elements, without gaps between them."""
        return self.count * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        """True for a row-major layout without gaps."""
        return self.strides is None

    def memory(self) -> memoryview:
        """Return the bytes of a contiguous host view as a writable memoryview that keeps it alive.

        Writable even where ``readonly`` is set: backends that only read need the address.
        """
        if self.strides is not None or self.device.type != "cpu":
            raise ValueError(f"memory() needs a contiguous view of host memory, got {self!r}")
        if self.count == 0:
            return memoryview(bytearray())
        raw = (ctypes.c_char * self.nbytes).from_address(self.pointer)
        raw._view = self  # type: ignore[attr-defined]  # the array keeps its view, and so the owner, alive
        return memoryview(raw).cast("B")

    def become(self, other: BufferView) -> None:
        """View the memory of ``other`` instead, which has the same shape and elements."""
        self.pointer, self.handle, self.owner = other.pointer, other.handle, other.owner
        self.strides, self.readonly = other.strides, other.readonly
        self.device, self.stream = other.device, other.stream

    def slice(self, start: int, stop: int) -> BufferView:
        """Return the elements ``start`` to ``stop`` in row-major order of a contiguous view."""
        if self.strides is not None:
            raise ValueError(f"slice() needs a contiguous view, got {self!r}")
        pointer, count = self.pointer + start * self.dtype.itemsize, stop - start
        return self._part(pointer, count, self.dtype, (count,), None)

    def blocks(self, number: int) -> list[BufferView]:
        """Cut the elements, in row-major order, into ``number`` views of equal counts.

        Raises:
            ValueError: They cannot be cut so: the count, or of a strided view the first extent, is
                no multiple.
        """
        if number == 1:
            return [self]

        count, rest = divmod(self.count, number)
        if self.strides is None:
            if rest:
                raise ValueError(
                    f"{self.count} elements cannot be divided into {number} equal blocks"
                )
            return [self.slice(block * count, (block + 1) * count) for block in range(number)]

        extent, rest = divmod(self.shape[0], number)
        if rest:
            raise ValueError(
                f"a strided array of shape {list(self.shape)} cannot be divided into {number} equal blocks along its "
                "first axis; pass a contiguous one"
            )

        step = extent * self.strides[0] * self.dtype.itemsize
        shape = (extent, *self.shape[1:])
        steps = None if are_row_major(shape, self.strides) else self.strides
        return [
            self._part(self.pointer + block * step, count, self.dtype, shape, steps)
            for block in range(number)
        ]

    def cast(self, dtype: DType) -> BufferView:
        """Return the same bytes of a contiguous view as flat elements of another type."""
        if self.strides is not None or self.nbytes % dtype.itemsize:
            raise ValueError(
                f"cast() to {dtype} needs a contiguous view of a multiple of its size, got {self!r}"
            )
        count = self.nbytes // dtype.itemsize
        return self._part(self.pointer, count, dtype, (count,), None)

    def _part(
        self,
        pointer: int,
        count: int,
        dtype: DType,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None,
    ) -> BufferView:
        """Return a view of some of this memory, which it keeps alive."""
        device, readonly, stream = self.device, self.readonly, self.stream
        return BufferView(
            pointer, count, dtype, device, shape, strides, readonly, None, self, stream
        )

    def span(self) -> tuple[int, int]:
        """Return the first address the elements touch and the address after the last."""
        if self.count == 0:
            return self.pointer, self.pointer
        if self.strides is None:
            return self.pointer, self.pointer + self.nbytes
        steps = [
            (extent - 1) * stride for extent, stride in zip(self.shape, self.strides, strict=True)
        ]
        low = sum(step for step in steps if step < 0)
        high = sum(step for step in steps if step > 0) + 1
        return self.pointer + low * self.dtype.itemsize, self.pointer + high * self.dtype.itemsize

    def overlaps_itself(self) -> bool:
        """Return True where elements may share memory (a broadcast axis, a sliding window)."""
        if self.strides is None or self.count == 0:
            return False
        pairs = zip(self.strides, self.shape, strict=True)
        axes = sorted((abs(stride), extent) for stride, extent in pairs if extent > 1)
        reach = 1
        for stride, extent in axes:
            if stride < reach:
                return True
            reach = stride * (extent - 1) + reach
        return False

    def order(self) -> tuple[tuple[int, int], ...] | None:
        """Return what tells the order in which the elements lie in memory.

        Returns None if they lie in row-major order, or with gaps. It is the same for two views that
        have their elements in the same places. It consists of extents and strides; axes that lie
        behind each other are one.
        """
        if self.strides is None or self.count == 0:
            return None

        axes: list[tuple[int, int]] = []
        for extent, stride in zip(self.shape, self.strides, strict=True):
            if axes and axes[-1][1] == extent * stride:
                axes[-1] = axes[-1][0] * extent, stride
            elif extent != 1:
                axes.append((extent, stride))

        reach = 1
        for extent, stride in sorted(axes, key=lambda axis: abs(axis[1])):
            if abs(stride) != reach:
                return None
            reach *= extent

        return tuple(axes)

    def straightened(self) -> BufferView:
        """Return all elements of a view without gaps in the order in which they lie."""
        return BufferView.from_address(
            self.span()[0],
            (self.count,),
            self.dtype,
            device=self.device,
            readonly=self.readonly,
            owner=self,
            stream=self.stream,
        )

    def __repr__(self) -> str:
        layout = "contiguous" if self.strides is None else f"strides={self.strides}"
        flag = ", read-only" if self.readonly else ""
        return f"BufferView({self.dtype}{list(self.shape)} on {self.device}, {layout}{flag})"


class JoinedView(BufferView):
    """Several views of one dtype as one buffer of their elements.

    The elements come one view after the other, wherever these lie. Backends with ``takes_strided``
    take it in a view's place; nothing is copied to make it.

    Attributes:
        views: The views; where they lie may change (``become``).
    """

    __slots__ = ("views",)

    def __init__(self, views: Sequence[BufferView]) -> None:
        self.views = views
        first, count = views[0], sum([view.count for view in views])
        # With strides, so that nobody takes it for contiguous.
        super().__init__(
            0, count, first.dtype, first.device, (count,), (1,), first.readonly, None, views
        )


def in_a_row(views: Sequence[BufferView]) -> bool:
    """Return True where contiguous views of one size lie one after another."""
    first, nbytes = views[0].pointer, views[0].nbytes
    return all(view.pointer == first + index * nbytes for index, view in enumerate(views))


def row_major(shape: Sequence[int]) -> list[int]:
    """Return the strides, in elements, of a row-major layout without gaps."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 1, 0, -1):
        strides[axis - 1] = strides[axis] * shape[axis]
    return strides


def are_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return True where elements of this layout lie one after another in row-major order."""
    expected = 1
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent != 1 and stride != expected:
            return False
        expected *= extent
    return True
