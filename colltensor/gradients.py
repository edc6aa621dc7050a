"""Gradients: keeps the gradients of all ranks in step, for numpy arrays and any pytree of tensors.

``sync_gradients`` is one fused allreduce. A ``Synchronizer`` is for a loop: it keeps the flat buckets into which it
fuses small leaves from step to step, and knows every leaf's shape and type. Imports no framework; for torch's modules
and for JAX's transformations there are ``colltensor.torch`` and ``colltensor.jax``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Final

from colltensor import replicas, tree
from colltensor.adapters import adapter_of, host_memory, target_of
from colltensor.buffers import FUSE_BELOW_NBYTES, plan, refuse_overlaps
from colltensor.errors import (
    DeviceError,
    OptionError,
    ShapeError,
    TensorError,
    UnsupportedDTypeError,
)
from colltensor.group import Group
from colltensor.replicas import Leaf
from colltensor.table import find_group
from colltensor.types import CPU, Device, ReduceOp
from colltensor.view import BufferView

BUCKET_NBYTES: Final = 25 << 20
"""A bucket is closed when the next leaf would take it past this size, as in torch's DistributedDataParallel."""

_GATHERING: Final = frozenset({"shm", "loopback"})
"""Backends that gather the leaves of a tree in host memory themselves."""

_look_at: Final = operator.attrgetter("shape", "dtype")


def sync_gradients(gradients: Any, *, group: Group | str = "default", average: bool = True) -> Any:
    """Replace every gradient by the mean, or the sum, of all ranks' gradients, as one fused allreduce.

    Every rank calls it, with trees of equal paths, data types and counts; other ranks wait meanwhile. It sees no
    parameters: replicas that start unequal stay so. Before the first step call ``colltensor.broadcast(parameters)``, or
    ``compare_parameters(parameters)``.

    Args:
        gradients: A pytree of tensors (dict, list, tuple ...) or one tensor, of any framework; read and written.
        group: The group, or its name.
        average: The mean; False: the sum.

    Returns:
        ``gradients`` itself, ready, with JAX arrays replaced by new ones.

    Raises:
        TensorError: A leaf that cannot be used; the message has its path and nothing was moved.
        MismatchError: The ranks' trees differ; on every rank, and nothing was changed.
        PeerLostError, CollectiveTimeoutError: A rank died or did not come.
    """
    return _group(group).allreduce(gradients, _op(average))


def compare_parameters(parameters: Any, *, group: Group | str = "default") -> None:
    """Check that all ranks have the same parameters, bit for bit; every rank calls.

    Gradients that are in step keep equal replicas equal, and unequal ones unequal. Call it once before training, after
    a checkpoint was loaded, or now and then to see whether replicas have drifted apart. A ``Synchronizer`` does it when
    it is made. It is one small exchange; each rank hashes its own parameters, about a second for a GB. Ranks may bring
    different frameworks and layouts.

    Args:
        parameters: A pytree of tensors, only read; Python's numbers and strings are compared too.
        group: The group, or its name.

    Raises:
        TensorError: A leaf that cannot be used; the message has its path.
        MismatchError: On every rank. It names the ranks, the leaves and what to do.
    """
    replicas.compare_tree(parameters, _group(group), "compare_parameters", replicas.REMEDY)


class Synchronizer:
    """Keeps gradients in step, step after step, through flat buckets that it keeps.

        parameters = colltensor.broadcast(parameters)       # rank 0's on every rank; in place, but for JAX arrays
        synchronizer = Synchronizer(parameters)             # on every rank
        for batch in batches:
            gradients = backward(parameters, batch)
            synchronizer.sync(gradients)             # in place; JAX arrays: use what it returns

    Leaves may be new tensors in each step, of another framework or in another layout; their paths, shapes and data
    types stay. Small leaves of one type share a bucket, which is copied into and out of and is the same memory in
    every step; large ones, and in shared memory all of them, are reduced where they are. Ranks may bring different
    frameworks. One thread at a time syncs: the buckets are shared. On a GPU nothing is kept: a bucket's leaves are
    packed by the call, on their own streams.

    Attributes:
        group: The group.
        buckets: The views of the flat buckets.
    """

    def __init__(
        self, like: Any, *, group: Group | str = "default", average: bool = True, bucket_nbytes: int = BUCKET_NBYTES,
        compare: bool = True,
    ) -> None:
        """Compare the leaves of all ranks, their values too, and make the buckets. Every rank calls it.

        Args:
            like: The parameters: a pytree of tensors of the gradients' paths, shapes and data types. Only read.
            group: The group, or its name.
            average: ``sync`` leaves the mean; False: the sum.
            bucket_nbytes: The size of a bucket, in bytes.
            compare: Whether the values must be the same on all ranks, bit for bit, as parameters must. False where
                ``like`` has only the shapes (gradients, say), or where replicas are to differ.

        Raises:
            TensorError: A leaf that cannot be used; the message has its path.
            MismatchError: The ranks' leaves, values or options differ. It names rank and leaf, on every rank.
        """
        self.group = _group(group)
        self._op = _op(average)
        if not isinstance(bucket_nbytes, int) or bucket_nbytes < 1:
            raise OptionError(f"Synchronizer: bucket_nbytes: expected a number of bytes >= 1, got {bucket_nbytes!r}")
        tensors, paths, _ = tree.flatten(like, True)
        self._structure = tree.structure_of(like)
        self._names = [f"leaf {path}" if path else "the tensor" for path in paths]
        views = self._views(tensors, write=False)
        values = compare and self.group.world_size > 1
        leaves = [Leaf.of(path, view, contents=values) for path, view in zip(paths, views, strict=True)]
        self._leaves = [Leaf.of(path, view, contents=False) for path, view in zip(paths, views, strict=True)]
        self._device = self._one_device(views)
        if average:
            self._refuse_integers()
        options = {"average": average, "bucket_nbytes": bucket_nbytes, "compare": bool(compare)}
        replicas.compare(
            self.group, "Synchronizer", options, leaves,
            f"{replicas.REMEDY}, or pass compare=False where it was given no parameters but what has their shapes",
        )
        self._match = None if self._structure is None else tree.matcher_of(self._structure)
        self._seen: list[Any] = []
        self._straight = self._device == CPU and self.group.backend in _GATHERING
        members = [] if self._straight else plan(
            views, fuse_below=min(FUSE_BELOW_NBYTES, bucket_nbytes), bucket_nbytes=bucket_nbytes
        )
        self._buckets = [
            _Bucket([(index, self._leaves[index]) for index in indices], self._device) for indices in members
        ]

    @property
    def buckets(self) -> tuple[BufferView, ...]:
        """The views of the flat buckets; leaves that travel by themselves have none, unless they are strided.

        None for leaves on a device, where each call packs them into memory of CuPy's pool, and none in shared memory,
        where native code gathers the leaves.
        """
        return tuple(bucket.flat for bucket in self._buckets if bucket.flat is not None)

    def sync(self, gradients: Any) -> Any:
        """Replace every gradient by the mean (or sum) of all ranks' gradients. Every rank calls it, in one order.

        Args:
            gradients: A pytree of tensors as the Synchronizer was made for; read and written.

        Returns:
            ``gradients`` itself, ready, with JAX arrays replaced by new ones.

        Raises:
            ShapeError, UnsupportedDTypeError, TensorError: A leaf is not what it was, or cannot be written; the
                message has its path, and nothing was moved.
            MismatchError: The ranks' calls differ.
            PeerLostError, CollectiveTimeoutError: A rank died or did not come; the gradients are undefined.
        """
        if self._straight and self._is_as_seen(gradients):
            return self.group.allreduce(gradients, self._op)
        tensors = None if self._structure is None else tree.leaves_like(gradients, self._structure)
        if tensors is None:
            tensors = self._flatten(gradients)
        views = self._views(tensors, write=True)
        self._check(views)
        if self._straight:
            self._seen = list(map(_look_at, tensors))
            return self.group.allreduce(gradients, self._op)
        replaced = False
        for bucket in self._buckets:
            replaced |= bucket.reduce(self.group, self._op, tensors, views)
        return tree.flatten(gradients)[2](tensors) if replaced else gradients

    def _is_as_seen(self, gradients: Any) -> bool:
        """Return True if the leaves have the shapes and the frameworks' dtypes of leaves that were checked before."""
        leaves = None if self._match is None else self._match(gradients)
        try:
            return leaves is not None and list(map(_look_at, leaves)) == self._seen
        except AttributeError:  # no tensor
            return False

    def _views(self, tensors: Sequence[Any], write: bool) -> list[BufferView]:
        views = []
        for tensor, name in zip(tensors, self._names, strict=True):
            try:
                adapter = adapter_of(tensor)
                views.append(target_of(adapter, tensor) if write else adapter.source(tensor))
            except TensorError as error:
                raise type(error)(f"{self._where()}: {name}: {error}") from error
        return views

    def _check(self, views: Sequence[BufferView]) -> None:
        """Compare the leaves with those that the buckets were made for, and look for memory shared by two."""
        for view, leaf, name in zip(views, self._leaves, self._names, strict=True):
            if view.shape != leaf.shape:
                raise ShapeError(
                    f"{self._where()}: {name}: expected {leaf}, as the Synchronizer was made for, got "
                    f"{Leaf.of(leaf.path, view, contents=False)}; make another one for other shapes"
                )
            if view.dtype is not leaf.dtype:
                raise UnsupportedDTypeError(
                    f"{self._where()}: {name}: expected {leaf}, as the Synchronizer was made for, got {view.dtype}; "
                    "convert the gradient or make another Synchronizer"
                )
            if view.device is not self._device and view.device != self._device:
                raise DeviceError(f"{self._where()}: {name}: expected it on {self._device}, got {view.device}; move it")
        written = [(view, name) for view, name in zip(views, self._names, strict=True) if not view.readonly]
        try:
            refuse_overlaps(written, [])
        except TensorError as error:
            raise type(error)(f"{self._where()}: {error}") from error

    def _flatten(self, gradients: Any) -> list[Any]:
        """Return the leaves of a tree that has another form at first sight: nodes of JAX's own, or a mistake."""
        tensors, found, _ = tree.flatten(gradients, True)
        expected = [leaf.path for leaf in self._leaves]
        if found != expected:
            wrong = [f"leaf {path} is missing" for path in expected if path not in found]
            wrong += [f"leaf {path} is not among them" for path in found if path not in expected]
            wrong += [f"leaf {path} is where {there} was" for path, there in zip(found, expected, strict=False)
                      if path != there]
            raise ShapeError(
                f"{self._where()}: expected the {len(expected)} leaves that the Synchronizer was made for, got "
                f"{len(found)}: {wrong[0]}; pass zeros for what has no gradient, or make another Synchronizer"
            )
        return tensors

    def _one_device(self, views: Sequence[BufferView]) -> Device | None:
        for view, name in zip(views, self._names, strict=True):
            if view.device != views[0].device:
                raise DeviceError(
                    f"{self._where()}: {name} is on {view.device}, {self._names[0]} on {views[0].device}; make a "
                    "Synchronizer for each device"
                )
        return views[0].device if views else None

    def _refuse_integers(self) -> None:
        for leaf, name in zip(self._leaves, self._names, strict=True):
            if leaf.dtype.kind not in "fc" or leaf.dtype.moves_only:
                raise UnsupportedDTypeError(
                    f"{self._where()}: {name}: there is no mean of {leaf.dtype}; leave it out or use average=False"
                )

    def _where(self) -> str:
        return f"Synchronizer of group '{self.group.name}' (rank {self.group.rank})"

    def __repr__(self) -> str:
        nbytes = sum(view.nbytes for view in self.buckets)
        return f"Synchronizer({len(self._leaves)} leaves, {len(self.buckets)} buckets of {nbytes} bytes, {self.group})"


class _Bucket:
    """One transfer: flat memory for several leaves, or a leaf by itself.

    Attributes:
        flat: The memory, None where there is none.
    """

    def __init__(self, members: Sequence[tuple[int, Leaf]], device: Device | None) -> None:
        self._members = members
        self._memory = host_memory()
        self._on_host = device is None or device == CPU
        self.flat: BufferView | None = None
        if len(members) > 1 and self._on_host:
            self._allocate()

    def _allocate(self) -> None:
        dtype = self._members[0][1].dtype
        counts = [math.prod(leaf.shape) for _, leaf in self._members]
        flat = self._memory.allocate(sum(counts) * dtype.itemsize).cast(dtype)
        self.flat = flat
        self._tensor = self._memory.array(flat)
        self._slots: list[tuple[int, BufferView, Any]] = []
        start = 0
        for (index, leaf), count in zip(self._members, counts, strict=True):
            part = flat.slice(start, start + count)
            view = BufferView.from_address(part.pointer, leaf.shape, dtype, device=flat.device, owner=flat)
            self._slots.append((index, view, self._memory.array(view)))
            start += count

    def reduce(self, group: Group, op: ReduceOp, tensors: list[Any], views: Sequence[BufferView]) -> bool:
        """Reduce the members among ``tensors``; returns True where a new tensor took the place of one."""
        if not self._on_host:
            return self._reduce_on_device(group, op, tensors)
        if len(self._members) == 1:
            index = self._members[0][0]
            if views[index].strides is None:
                given, tensors[index] = tensors[index], group.allreduce(tensors[index], op)
                return tensors[index] is not given
            if self.flat is None:
                self._allocate()
        for index, slot, array in self._slots:
            if tensors[index].__class__ is array.__class__:
                array[...] = tensors[index]
            else:
                self._memory.copy(slot, views[index])
        group.allreduce(self._tensor, op)
        return self._store(tensors, views)

    def _reduce_on_device(self, group: Group, op: ReduceOp, tensors: list[Any]) -> bool:
        """Leave it to the group, which packs the members on the streams on which their frameworks order their work."""
        given = [tensors[index] for index, _ in self._members]
        results = group.allreduce(given, op)
        for (index, _), result in zip(self._members, results, strict=True):
            tensors[index] = result
        return any(result is not tensor for result, tensor in zip(results, given, strict=True))

    def _store(self, tensors: list[Any], views: Sequence[BufferView]) -> bool:
        replaced = False
        for index, slot, array in self._slots:
            tensor = tensors[index]
            if tensor.__class__ is array.__class__:
                tensor[...] = array
                continue
            adapter = adapter_of(tensor)
            view = views[index]
            if adapter.immutable:
                tensors[index], view = adapter.claim(tensor, False)
                replaced = True
            self._memory.copy(view, slot)
            adapter.written(tensors[index])
        return replaced


def _group(group: Group | str) -> Group:
    return group if isinstance(group, Group) else find_group(group)


def _op(average: bool) -> ReduceOp:
    return ReduceOp.AVERAGE if average else ReduceOp.SUM
