"""The fast path of trees: the leaves go to the backend as they are, in one call.

What is not directly exportable takes the slow path, as in ``fastpath``. The ranks of one call may
come either way.
"""

from __future__ import annotations

import array
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from colltensor.adapters import (
    Guard,
    are_exportable,
    known,
    no_write_notice,
    notify_all_written,
    reader_of,
    remember_alike,
)
from colltensor.backends.base import FAST_UNREAD
from colltensor.engine import Call
from colltensor.fastpath import NO_OP, NO_RANK, FastCall, FastPath, moves_nothing, nothing
from colltensor.operations import NATIVE
from colltensor.tree_plans import Plan, Plans, fit
from colltensor.types import ReduceOp


class TreeFastPath:
    """The calls of one group on trees of exportable tensors.

    They are also for trees of the tensors of one framework that never changes them.
    """

    def __init__(self, fastpath: FastPath) -> None:
        self._fastpath = fastpath
        self._plans = Plans(seem_to_fit=_seem_to_fit)
        self._epoch = 0

    def renew(self) -> None:
        """Forget the functions, whose timeout was the backend's."""
        self._plans.forget()
        self._epoch += 1

    def run(
        self,
        operation: str,
        op: int,
        root: int,
        tree: Any,
        written: bool,
        donate: bool = False,
        fixed: Plan | None = None,
        source: int = NO_RANK,
    ) -> Any:
        """Run an operation on a tree; return its result, None if it must go the slow path.

        Args:
            operation: allreduce, reduce, broadcast or transfer.
            op: The reduce op, ``NO_OP`` for none.
            root: The root, or the rank to send to; ``NO_RANK`` for none.
            tree: The tree, or a tensor, which is refused here but for one that its framework never
                changes.
            written: Whether the call writes to it on this rank.
            donate: Use the memory of immutable tensors again.
            fixed: The plan that the tree must be of to go the fast path.
            source: The rank to receive from.

        Raises:
            CollectiveError: As every collective.
        """
        if self._fastpath.before is not None:
            self._fastpath.before()

        queue = self._fastpath.engine.queue
        if not (queue.idle or queue.rests()):
            return None

        adapter = known.get(tree.__class__)
        if adapter is not None:
            if not adapter.immutable or (donate and operation == "transfer"):
                return None
            return self._array(operation, op, root, source, tree, adapter, written, donate)

        plan, leaves = (
            self._plans.find(tree) if fixed is None else (fixed, fixed.leaves(tree, _seem_to_fit))
        )
        if leaves is None:
            return None

        while plan is not None:
            call = self._call(operation, op, root, source, plan)
            adapter = known.get(leaves[0].__class__)
            if adapter is None:  # another thread has just registered one
                return None

            if not adapter.immutable:
                if call.run(leaves, written):
                    return tree
            elif donate and operation == "transfer":
                return None
            elif plan.suits(leaves, adapter):
                results = call.allocate_leaves(leaves, adapter, written, donate)
                return results if results is None or not written else plan.like(tree, results)

            # The leaves may have other dtypes or counts than the plan's: then another is needed.
            plan = self._plans.renewed(tree, plan) if fixed is None else None

        if fixed is None:
            self._plans.doubt()
        return None

    def _call(self, operation: str, op: int, root: int, source: int, plan: Plan) -> TreeCall:
        key = operation, op, root, source, self._epoch
        call: TreeCall | None = plan.made.get(key)
        if call is None:
            call = plan.made[key] = TreeCall(self._fastpath, operation, op, root, source, plan)
        return call

    def _array(
        self,
        operation: str,
        op: int,
        root: int,
        source: int,
        tensor: Any,
        adapter: Any,
        written: bool,
        donate: bool,
    ) -> Any:
        """Run an operation on an immutable tensor, which is a tree of one leaf.

        Returns as ``run``.
        """
        if not hasattr(adapter, "allocate_results"):
            return None
        try:
            (kind,) = adapter.kinds((tensor,))
        except RuntimeError:  # deleted: the slow path says so
            return None

        plan = self._plans.of_array(tensor, kind)
        if plan is None:
            return None

        call = self._call(operation, op, root, source, plan)
        results = call.allocate_leaves((tensor,), adapter, written, donate)
        return None if results is None else results[0]


def _seem_to_fit(leaves: Sequence[Any], guard: Guard) -> bool:
    """Do as ``fit``, but leave it to native code whether all are of the first one's type.

    That is only where native code reads the type.
    """
    kind = leaves[0].__class__
    return (kind in no_write_notice and reader_of(kind) != 0) or fit(leaves, guard)


class TreeCall(FastCall):
    """One operation on trees of one plan."""

    __slots__ = ("_allocating", "_plan", "_reading")

    def __init__(
        self, group: FastPath, operation: str, op: int, root: int, source: int, plan: Plan
    ) -> None:
        self._plan = plan
        self._allocating: Callable[..., int] | None = None
        super().__init__(group, operation, op, root, source, False)

    def _functions(self) -> tuple[Callable[..., int], Callable[..., int]]:
        call = NATIVE[self._operation], *self._call, self._plan.words()
        self._reading = self._backend.reading_tree(*call)
        function = self._backend.tree(*call)
        return function, function

    def run(self, tensors: Sequence[Any], written: int, written_end: int = 0) -> bool:
        """Run it on the leaves, in the order of the structure.

        All or none of them are ``written``. Returns False as ``FastCall.run``.

        Raises:
            CollectiveError: As every collective.
        """
        kind = tensors[0].__class__
        reading, reader = self._reading, reader_of(kind)

        code = FAST_UNREAD
        if reading is not None and reader:
            try:
                code = reading(id(tensors), id(kind), reader)
            except BaseException as error:  # noqa: BLE001 - nothing is exported there: a handler's
                self._engine.abort(self._operation, error)

        try:
            if code == FAST_UNREAD:
                # which _seem_to_fit() leaves to the reader
                if kind in no_write_notice and not are_exportable(tensors):
                    return False
                code, reader = self.function(*tensors), 0
        except BaseException as error:  # noqa: BLE001 - raised on there, unless it is an export's
            self.failed(tensors, error)
            return False

        if code and not self.finish(tensors, code):
            return False

        if written:
            if reader:
                remember_alike(tensors, kind)
            else:
                notify_all_written(tensors)
        return True

    def allocate_leaves(
        self, tensors: Sequence[Any], adapter: Any, written: bool, donate: bool
    ) -> Sequence[Any] | None:
        """Run it on immutable leaves, which fit.

        Returns new leaves if they are ``written``, else the leaves; None as ``run``. The results
        are copies made before the ranks meet, unless they take the leaves' own memory.

        Raises:
            CollectiveError: As every collective.
        """
        results: Sequence[Any] = []
        kept: list[array.array[int]] = []

        def allocate() -> int:
            nonlocal results
            results = adapter.allocate_results(tensors, donate)
            kept.append(array.array("q", adapter.addresses(results)))
            return kept[-1].buffer_info()[0]

        donate = donate and written
        try:
            if donate or not written:
                adapter.source(tensors[0])  # raises what must not come up once the ranks have met
                results = tensors
            else:
                results = adapter.allocate_results(tensors, False)
            given = adapter.addresses(results)
        except RuntimeError:  # deleted, or its computation failed: the slow path says so
            return None

        if donate and len(set(given)) < len(given):  # one memory twice: likewise
            return None

        if self._allocating is None:
            self._allocating = self._backend.allocating_tree(
                NATIVE[self._operation], *self._call, self._plan.words()
            )

        try:
            code = self._allocating(allocate if donate else None, *given)
        except BaseException as error:  # noqa: BLE001 - abort() raises
            self._engine.abort(self._operation, error)

        if code and not self.finish(tensors, code):
            return None
        return results

    def _explain(self, tensors: Sequence[Any], code: int) -> NoReturn:
        name, (op, root, _), arguments = self._operation, self._call, self._group.arguments
        reduce_op = None if op == NO_OP else ReduceOp(op)
        tree = self._plan.structure.unflatten(tensors)
        argument = arguments.tensor(name, "tensor", tree, reduce_op, False, False, None, True)
        if name == "transfer":
            self.explain_transfers(argument, argument, code)
        self.explain_collective(
            Call(name, argument, reduce_op, root, True, (), moves_nothing, (), nothing)
        )
