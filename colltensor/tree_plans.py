"""What is true of all trees of one structure, found out once.

That is names, dtypes, counts, and how leaves share transfers. A plan is for trees of exportable
tensors, which native code takes as their frameworks made them.
"""

from __future__ import annotations

import array
from collections.abc import Callable, Sequence
from typing import Any, Final

from colltensor.adapters import Guard, are_exportable, known
from colltensor.buffers import Buffers, adapt
from colltensor.errors import CollectiveError
from colltensor.tree import builder_of, flat_tree, matcher_of, structure_of
from colltensor.types import CPU
from colltensor.view import BufferView

_KEPT: Final = 256
"""How many plans a group keeps."""

_ANY: Final = 2**64 - 1
"""As many axes as it may have: -1, which the hash's type has no room for."""


class Plan:
    """What is known of trees of one structure whose leaves have the same dtypes and counts.

    If ``shaped`` they have the same shapes too.

    Attributes:
        structure: Builds a tree of leaves.
        views: One view a leaf, of the first such tree: of its dtype and count alone.
        shapes: One a leaf, None for any.
        count: The number of elements of all leaves.
        leaves_hash: What the ranks compare of the leaves.
        guard: Tells plain leaves from those of the calls before.
        match: Gives a tree's leaves at once, where the structure allows it: see
            ``tree.matcher_of``.
        made: What was made for such trees, by whatever its maker chooses.
    """

    def __init__(self, structure: Any, buffers: Buffers, shaped: bool = False) -> None:
        self.structure = structure
        self.views = [
            BufferView(0, view.count, view.dtype, view.device, None, None, False, None, None)
            for view in buffers.views
        ]
        self.shapes = [view.shape if shaped else None for view in buffers.views]
        self.count, self.leaves_hash = buffers.compared()
        self.guard = Guard()
        self.match = matcher_of(structure)
        self._build = builder_of(structure)
        self.made: dict[Any, Any] = {}

    def leaves(
        self, tree: Any, fits: Callable[[Sequence[Any], Guard], bool]
    ) -> Sequence[Any] | None:
        """Return the leaves of a tree of this structure that ``match`` knows, if they are such.

        Returns None otherwise.
        """
        found = None if self.match is None else self.match(tree)
        return found if found is not None and fits(found, self.guard) else None

    def suits(self, tensors: Sequence[Any], adapter: Any) -> bool:
        """Return True if immutable leaves are what the plan says, row-major and on the host."""
        try:
            kinds = adapter.kinds(tensors)
        except RuntimeError:  # deleted: the slow path says so
            return False

        if kinds == self.made.get("kinds"):
            return True

        try:
            views = list(map(adapter.source, tensors))
        except CollectiveError:  # which the slow path says in its own words
            return False

        for view, planned, shape in zip(views, self.views, self.shapes, strict=True):
            if (
                view.dtype is not planned.dtype
                or view.count != planned.count
                or view.strides is not None
                or view.device is not CPU
                or view.dtype.moves_only
                or shape not in (None, view.shape)
            ):
                return False

        self.made["kinds"] = kinds
        return True

    def like(self, tree: Any, leaves: Sequence[Any]) -> Any:
        """Return a tree as this one, which is of the plan's structure, with other leaves."""
        if self._build is None:
            # the plan's has dicts in another order of insertion
            return flat_tree(tree)[1].unflatten(leaves)
        return self._build(tree, iter(leaves))

    def words(self, *more: int) -> array.array[int]:
        """Return what native code is given.

        It is the numbers of leaves and elements, the hash, then each leaf.
        """
        words = [len(self.views), self.count, self.leaves_hash]
        for view, shape in zip(self.views, self.shapes, strict=True):
            words += [view.dtype.code, view.count]
            words += [_ANY] if shape is None else [len(shape), *shape]
        return array.array("Q", [*words, *more])


def fit(leaves: Sequence[Any], guard: Guard) -> bool:
    """Return True for directly exportable tensors.

    Return True also for those of one framework that makes its results together.
    """
    return are_exportable(leaves, guard) or (
        len(set(map(type, leaves))) == 1
        and hasattr(known.get(leaves[0].__class__), "allocate_results")
    )


class Plans:
    """The plans of the trees that one group is given.

    ``fits`` says whether a tree's leaves are of the kind that they are for, which the plan's guard
    may know. Where the tree is like the last one ``seem_to_fit`` is asked, which may leave more to
    who uses the plan.
    """

    def __init__(
        self,
        fits: Callable[[Sequence[Any], Guard], bool] = fit,
        seem_to_fit: Callable[[Sequence[Any], Guard], bool] | None = None,
    ) -> None:
        self._fits = fits
        self._seem_to_fit = seem_to_fit or fits
        self._plans: dict[Any, Plan] = {}
        self._arrays: dict[Any, Plan | None] = {}
        self._latest: Plan | None = None

    def forget(self) -> None:
        """Drop all plans, and with them what was made for them."""
        self._plans.clear()
        self._arrays.clear()
        self._latest = None

    def find(self, tree: Any) -> tuple[Plan | None, Sequence[Any]]:
        """Return the plan of a tree, None if its leaves do not fit, and its leaves.

        Their dtypes and counts may be others than the plan's. Who uses the plan looks at them, and
        calls ``renewed``.
        """
        latest = self._latest
        # as Plan.leaves(), without another call
        if latest is not None and latest.match is not None:
            known = latest.match(tree)
            if known is not None and self._seem_to_fit(known, latest.guard):
                return latest, known
        leaves, structure = flat_tree(tree)
        plan = self._plans.get(structure) or self._learn(tree, structure)
        if plan is None or not self._fits(leaves, plan.guard):
            return None, leaves
        self._latest = plan
        return plan, leaves

    def doubt(self) -> None:
        """Look at the next tree anew: the last one only seemed to be of the plan."""
        self._latest = None

    def renewed(self, tree: Any, plan: Plan) -> Plan | None:
        """Return the plan of a tree that ``plan`` did not fit; None if it is no other."""
        found = self._learn(tree, plan.structure)
        if found is None or found is plan:
            return None
        self._latest = found
        return found

    def of_array(self, tensor: Any, kind: Any) -> Plan | None:
        """Return the plan of a tensor by itself, which is a tree of one leaf.

        Returns None unless the tensor is row-major on the host. All of one ``kind``, as its adapter
        says, have the same plan.
        """
        try:
            return self._arrays[kind]
        except KeyError:
            pass

        try:
            buffers = adapt(tensor, False, False, False)
        except CollectiveError:  # which the slow path says in its own words
            return None

        view = buffers.views[0]
        fits = view.strides is None and view.device is CPU and not view.dtype.moves_only
        plan = Plan(flat_tree(tensor)[1], buffers) if fits else None

        if len(self._arrays) >= _KEPT:
            self._arrays.clear()
        self._arrays[kind] = plan
        return plan

    def _learn(self, tree: Any, structure: Any) -> Plan | None:
        try:
            buffers = adapt(tree, False, False, True, reduced=True)
        except CollectiveError:  # which the slow path says in its own words
            return None
        if not buffers.views or structure_of(tree) != structure:
            return None
        made = Plan(structure, buffers)
        there = self._plans.get(structure)
        if there is not None and there.words() == made.words():
            return there
        if len(self._plans) >= _KEPT:
            self._plans.clear()
        self._plans[structure] = made
        return made
