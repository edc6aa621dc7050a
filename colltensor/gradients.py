"""Gradients: keeps the gradients of all ranks in step, for numpy arrays and any pytree of tensors.

``sync_gradients`` is one allreduce of all leaves. A ``Synchronizer`` is for a loop. It knows every
leaf's shape and type, and compares the ranks' parameters once.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Final

from colltensor import replicas, tree
from colltensor.adapters import adapter_of, known, target_of
from colltensor.buffers import adapt, refuse_overlaps
from colltensor.errors import DeviceError, ShapeError, TensorError, UnsupportedDTypeError
from colltensor.group import Group
from colltensor.replicas import Leaf
from colltensor.table import find_group
from colltensor.tree_plans import Plan
from colltensor.types import CPU, Device, ReduceOp
from colltensor.view import BufferView

_look: Final = operator.attrgetter("shape", "dtype", "device")


def sync_gradients(gradients: Any, *, group: Group | str = "default", average: bool = True) -> Any:
    """Replace every gradient by the mean, or the sum, of all ranks' gradients.

    It is one fused allreduce. Every rank calls it, with trees of equal paths, data types and
    counts; other ranks wait meanwhile. It sees no parameters: replicas that start unequal stay so.
    Before the first step call ``colltensor.broadcast(parameters)``, or
    ``compare_parameters(parameters)``.

    Args:
        gradients: A pytree of tensors (dict, list, tuple ...) or one tensor, of any framework. Read
            and written.
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

    Gradients that are in step keep equal replicas equal, and unequal ones unequal. Call it once
    before training, after a checkpoint was loaded, or now and then to see whether replicas have
    drifted apart. A ``Synchronizer`` does it when it is made. It is one small exchange. Each rank
    hashes its own parameters, about a second for a GB. Ranks may bring different frameworks and
    layouts.

    Args:
        parameters: A pytree of tensors, only read; Python's numbers and strings are compared too.
        group: The group, or its name.

    Raises:
        TensorError: A leaf that cannot be used; the message has its path.
        MismatchError: On every rank. It names the ranks, the leaves and what to do.
    """
    replicas.compare_tree(parameters, _group(group), "compare_parameters", replicas.REMEDY)


class Synchronizer:
    """Keeps gradients in step, step after step, and looks at what could put them out of step.

        # rank 0's on every rank; in place, but for JAX arrays
        parameters = colltensor.broadcast(parameters)
        synchronizer = Synchronizer(parameters)      # on every rank
        for batch in batches:
            gradients = backward(parameters, batch)
            synchronizer.sync(gradients)             # in place; JAX arrays: use what it returns

    Leaves may be new tensors in each step, of another framework or in another layout. Their paths,
    shapes and data types stay. Each step is one allreduce of all leaves (``Group.allreduce``).
    Ranks may bring different frameworks.

    Attributes:
        group: The group.
        plan: What the group compares trees with by itself; None where ``check`` must.
    """

    def __init__(
        self,
        like: Any,
        *,
        group: Group | str = "default",
        average: bool = True,
        compare: bool = True,
    ) -> None:
        """Compare the leaves of all ranks, their values too. Every rank calls it.

        Args:
            like: The parameters: a pytree of tensors of the gradients' paths, shapes and data
                types. Only read.
            group: The group, or its name.
            average: ``sync`` leaves the mean; False: the sum.
            compare: Whether the values must be the same on all ranks, bit for bit, as parameters
                must. False where ``like`` has only the shapes (gradients, say), or where replicas
                are to differ.

        Raises:
            TensorError: A leaf that cannot be used; the message has its path.
            MismatchError: The ranks' leaves, values or options differ. It names rank and leaf, on
                every rank.
        """
        self.group = _group(group)
        self._op = _op(average)

        tensors, paths = self._leaves_of(like)
        self._structure = tree.structure_of(like)
        self._names = [f"leaf {path}" if path else "the tensor" for path in paths]

        views = self._views(tensors, write=False)
        values = compare and self.group.world_size > 1
        leaves = [
            Leaf.of(path, view, contents=values) for path, view in zip(paths, views, strict=True)
        ]
        self._leaves = [
            Leaf.of(path, view, contents=False) for path, view in zip(paths, views, strict=True)
        ]

        self._device = self._one_device(views)
        if average:
            self._refuse_integers()

        options = {"average": average, "compare": bool(compare)}
        replicas.compare(
            self.group,
            "Synchronizer",
            options,
            leaves,
            f"{replicas.REMEDY}, or pass compare=False where it was given no parameters but what has their shapes",
        )

        self._match = None if self._structure is None else tree.matcher_of(self._structure)
        self.plan = self._plan(like)
        self._seen: list[Any] | None = None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Copy and pickle as None.

        A copy of a model, or one that is loaded elsewhere, is kept in step by nobody.
        """
        return type(None), ()

    def sync(self, gradients: Any) -> Any:
        """Replace every gradient by the mean (or sum) of all ranks' gradients.

        Every rank calls it, in one order.

        Args:
            gradients: A pytree of tensors as the Synchronizer was made for; read and written.

        Returns:
            ``gradients`` itself, ready, with JAX arrays replaced by new ones.

        Raises:
            ShapeError, UnsupportedDTypeError, TensorError: A leaf is not what it was, or cannot be
                written. The message has its path, and nothing was moved.
            MismatchError: The ranks' calls differ.
            PeerLostError, CollectiveTimeoutError: A rank died or did not come; the gradients are
                undefined.
        """
        if self.plan is None or gradients.__class__ in known:
            self.check(gradients)
            return self.group.allreduce(gradients, self._op)
        return self.group.allreduce(gradients, self._op, _like=self)

    def check(self, gradients: Any) -> None:
        """Compare the leaves' paths, shapes and data types with those that it was made for.

        Moves nothing.

        Raises:
            ShapeError, UnsupportedDTypeError, TensorError: As ``sync``.
        """
        if self._is_as_seen(gradients):
            return
        tensors = None if self._structure is None else tree.leaves_like(gradients, self._structure)
        if tensors is None:
            tensors = self._flatten(gradients)
        self._check(self._views(tensors, write=True))
        self._seen = _looks(tensors)

    def _is_as_seen(self, gradients: Any) -> bool:
        """Return True if the leaves are like leaves that were checked before.

        They must have the same shapes and the frameworks' dtypes.
        """
        leaves = None if self._match is None else self._match(gradients)
        return leaves is not None and self._seen is not None and _looks(leaves) == self._seen

    def _leaves_of(self, tensors: Any) -> tuple[list[Any], list[str]]:
        try:
            return tree.flatten(tensors, True)[:2]
        except TensorError as error:
            raise type(error)(f"{self._where()}: {error}") from error

    def _plan(self, like: Any) -> Plan | None:
        """Return the plan of such trees, with their shapes, where a group looks at those itself."""
        if (
            self._match is None
            or not self._leaves
            or self._device is not CPU
            or like.__class__ in known
        ):
            return None
        return Plan(self._structure, adapt(like, False, False, True), shaped=True)

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
        """Compare the leaves with those that it was made for, and look for memory shared by two."""
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
                raise DeviceError(
                    f"{self._where()}: {name}: expected it on {self._device}, got {view.device}; move it"
                )

        written = [
            (view, name) for view, name in zip(views, self._names, strict=True) if not view.readonly
        ]
        try:
            refuse_overlaps(written, [])
        except TensorError as error:
            raise type(error)(f"{self._where()}: {error}") from error

    def _flatten(self, gradients: Any) -> list[Any]:
        """Return the leaves of a tree that has another form at first sight.

        It has nodes of JAX's own, or it is a mistake.
        """
        tensors, found = self._leaves_of(gradients)
        expected = [leaf.path for leaf in self._leaves]
        if found != expected:
            wrong = [f"leaf {path} is missing" for path in expected if path not in found]
            wrong += [f"leaf {path} is not among them" for path in found if path not in expected]
            wrong += [
                f"leaf {path} is where {there} was"
                for path, there in zip(found, expected, strict=False)
                if path != there
            ]

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
        return f"Synchronizer({len(self._leaves)} leaves, {self.group})"


def _looks(leaves: Sequence[Any]) -> list[Any] | None:
    """Return what leaves look like from outside.

    Returns None where there is no telling, as for a registered adapter's.
    """
    try:
        return list(map(_look, leaves))
    except AttributeError:  # numpy 1's arrays have no device
        pass
    try:
        return [(leaf.shape, leaf.dtype, getattr(leaf, "device", None)) for leaf in leaves]
    except AttributeError:
        return None


def _group(group: Group | str) -> Group:
    return group if isinstance(group, Group) else find_group(group)


def _op(average: bool) -> ReduceOp:
    return ReduceOp.AVERAGE if average else ReduceOp.SUM
