"""The fast path of trees: the leaves go to the backend as their frameworks made them, in one call.

What is true of all trees of one structure is found out once and kept. What is not plain takes the general way, as in
``direct``; the ranks of one call may come either way. Imports no framework.
"""

from __future__ import annotations

import array
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from colltensor.adapters import known, unnoted
from colltensor.backends.base import DIRECT
from colltensor.buffers import adapt
from colltensor.direct import (
    NO_OP,
    NO_RANK,
    Direct,
    DirectCall,
    are_plain,
    moves_nothing,
    note_all,
    nothing,
)
from colltensor.engine import Call
from colltensor.errors import CollectiveError
from colltensor.tree import flat_tree, matcher_of, structure_of
from colltensor.types import ReduceOp

_STRUCTURES: Final = 256
"""Structures of trees that a group keeps in mind."""


class DirectTrees:
    """The calls of one group on trees of plain tensors."""

    def __init__(self, direct: Direct) -> None:
        self._direct = direct
        self._trees: dict[Any, TreeCalls] = {}
        self._latest: TreeCalls | None = None

    def renew(self) -> None:
        """Forget the functions, whose timeout was the backend's."""
        self._trees.clear()
        self._latest = None

    def run(self, operation: str, op: int, root: int, tree: Any, written: bool) -> bool:
        """Run an operation on a tree whose leaves a backend may take as they are; False if it must go the general way.

        Args:
            operation: allreduce, reduce or broadcast.
            op: The reduce op, ``NO_OP`` for none.
            root: The root, ``NO_RANK`` for none.
            tree: The tree, or a tensor, which is refused here.
            written: Whether the call writes to it on this rank.

        Raises:
            CollectiveError: As every collective.
        """
        if self._direct.before is not None:
            self._direct.before()
        if tree.__class__ in known or not self._direct.engine.queue.idle:
            return False
        calls, leaves = self._find(tree)
        if calls is None:
            return False
        if not calls.get(operation, op, root).run(leaves, written):
            learnt = self._learn(tree, calls.structure)
            if learnt is None or learnt is calls:
                return False
            self._latest = learnt
            return learnt.get(operation, op, root).run(leaves, written)
        return True

    def _find(self, tree: Any) -> tuple[TreeCalls | None, Sequence[Any]]:
        """Return the calls of trees like this one, None if it is not plain, and its leaves."""
        latest = self._latest
        if latest is not None and latest.match is not None:
            leaves = latest.match(tree)
            if leaves is not None and are_plain(leaves):
                return latest, leaves
        leaves, structure = flat_tree(tree)
        calls = self._trees.get(structure) or self._learn(tree, structure)
        if calls is None or not are_plain(leaves):
            return None, leaves
        self._latest = calls
        return calls, leaves

    def _learn(self, tree: Any, structure: Any) -> TreeCalls | None:
        """Return the calls of all trees of this structure, with these dtypes and counts; None if it is not plain."""
        try:
            buffers = adapt(tree, False, False, True)
        except CollectiveError:  # which the general way says in its own words
            return None
        if not buffers.views or structure_of(tree) != structure:
            return None
        plan = [len(buffers.views), buffers.count(), buffers.leaves_hash()]
        for view in buffers.views:
            plan += [view.dtype.code, view.count]
        known_calls = self._trees.get(structure)
        if known_calls is None or known_calls.plan != plan:
            if len(self._trees) >= _STRUCTURES:
                self._trees.clear()
            known_calls = self._trees[structure] = TreeCalls(self._direct, structure, plan)
        return known_calls


class TreeCalls:
    """The calls on trees of one structure whose leaves have the same dtypes and counts.

    Attributes:
        plan: What the backend is told of them: see ``SigningBackend.tree``.
        structure: Builds a tree of leaves.
        match: Gives a tree's leaves at once, where the structure allows it: see ``tree.matcher_of``.
    """

    def __init__(self, group: Direct, structure: Any, plan: list[int]) -> None:
        self.plan = plan
        self.structure = structure
        self.match = matcher_of(structure)
        self._group = group
        self._calls: dict[tuple[str, int, int], TreeCall] = {}

    def get(self, operation: str, op: int, root: int) -> TreeCall:
        """Return one operation with its op and root."""
        call = self._calls.get((operation, op, root))
        if call is None:
            call = self._calls[operation, op, root] = TreeCall(self._group, operation, op, root, self)
        return call


class TreeCall(DirectCall):
    """One operation on trees of one structure."""

    __slots__ = ("_of",)

    def __init__(self, group: Direct, operation: str, op: int, root: int, of: TreeCalls) -> None:
        self._of = of
        super().__init__(group, operation, op, root, NO_RANK, False)

    def _functions(self) -> tuple[Callable[..., int], Callable[..., int]]:
        operation, (op, root, _), plan = self._operation, self._call, self._of.plan
        words = array.array("Q", [plan[0], plan[1], plan[2], *plan[3:]])
        function = self._backend.tree(DIRECT[operation], op, root, words)
        return function, function

    def run(self, tensors: Sequence[Any], written: int, written_end: int = 0) -> bool:
        """Run it on the leaves, in the order of the structure, all or none of them ``written``; False as there.

        Raises:
            CollectiveError: As every collective.
        """
        try:
            code = self.function(*tensors)
        except BaseException as error:  # noqa: BLE001 - raised on there, unless it is an export's
            self.failed(tensors, error)
            return False
        if code and not self.finish(tensors, code):
            return False
        if written and not unnoted.issuperset(map(type, tensors)):
            note_all(tensors)
        return True

    def _explain(self, tensors: Sequence[Any], code: int) -> NoReturn:
        name, (op, root, _), arguments = self._operation, self._call, self._group.arguments
        reduce_op = None if op == NO_OP else ReduceOp(op)
        tree = self._of.structure.unflatten(tensors)
        argument = arguments.tensor(name, "tensor", tree, reduce_op, False, False, None, True)
        self.explain_collective(Call(name, argument, reduce_op, root, True, (), moves_nothing, (), nothing))
