"""The fast path of trees: the leaves go to the backend as their frameworks made them, in one call.

What is not plain takes the general way, as in ``direct``; the ranks of one call may come either way. Imports no
framework.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from colltensor.adapters import known, note_all
from colltensor.backends.base import DIRECT
from colltensor.direct import NO_OP, NO_RANK, Direct, DirectCall, moves_nothing, nothing
from colltensor.engine import Call
from colltensor.tree_plans import Plan, Plans
from colltensor.types import ReduceOp


class DirectTrees:
    """The calls of one group on trees of plain tensors."""

    def __init__(self, direct: Direct) -> None:
        self._direct = direct
        self._plans = Plans()

    def renew(self) -> None:
        """Forget the functions, whose timeout was the backend's."""
        self._plans.forget()

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
        plan, leaves = self._plans.find(tree)
        while plan is not None:
            call = plan.made.get((operation, op, root))
            if call is None:
                call = plan.made[operation, op, root] = TreeCall(self._direct, operation, op, root, plan)
            if call.run(leaves, written):
                return True
            plan = self._plans.renewed(tree, plan)
        return False


class TreeCall(DirectCall):
    """One operation on trees of one plan."""

    __slots__ = ("_plan",)

    def __init__(self, group: Direct, operation: str, op: int, root: int, plan: Plan) -> None:
        self._plan = plan
        super().__init__(group, operation, op, root, NO_RANK, False)

    def _functions(self) -> tuple[Callable[..., int], Callable[..., int]]:
        op, root, _ = self._call
        function = self._backend.tree(DIRECT[self._operation], op, root, self._plan.words())
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
        if written:
            note_all(tensors)
        return True

    def _explain(self, tensors: Sequence[Any], code: int) -> NoReturn:
        name, (op, root, _), arguments = self._operation, self._call, self._group.arguments
        reduce_op = None if op == NO_OP else ReduceOp(op)
        tree = self._plan.structure.unflatten(tensors)
        argument = arguments.tensor(name, "tensor", tree, reduce_op, False, False, None, True)
        self.explain_collective(Call(name, argument, reduce_op, root, True, (), moves_nothing, (), nothing))
