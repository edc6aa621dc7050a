"""Reducer: what happens to the gradients during a backward pass, and at its end."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from colltensor.errors import GroupError, MismatchError, OptionError, TensorError
from colltensor.group import Group
from colltensor.torch.agreement import Named, compare, described, telling
from colltensor.torch.backward_end import BackwardEndHook, is_running
from colltensor.torch.buckets import Bucket, Member, plan
from colltensor.torch.compression import Compression
from colltensor.torch.tracked import Tracked, reference_to
from colltensor.types import ReduceOp

_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class Options:
    """How gradients are reduced; the same on every rank.

    Attributes:
        bucket_nbytes: The most that a flat bucket holds.
        lone_nbytes: From how many bytes on a gradient is reduced where it lies.
        average: Whether the result is the average, else the sum.
        early: Whether a bucket is reduced in the group's worker thread as soon as its gradients are
            there.
        compression: Makes buckets smaller, or None.
    """

    bucket_nbytes: int
    lone_nbytes: int
    average: bool
    early: bool
    compression: Compression | None


class Reducer:
    """Launches buckets in one order on all ranks.

    ``early`` ones are launched as the last gradient of each is accumulated, others last. The last
    ones are one call, a tree, where the gradients are on the host and nothing compresses them.

    An early one launches nothing before the end of the first backward pass. That pass shows in
    which order gradients become ready (rank 0's decides) and how often each is accumulated. That is
    more than once where reentrant checkpoints share a parameter.

    Each pass agrees on the parameters that have a gradient on some rank. This takes an element each
    behind the last flat bucket, else a transfer of its own.

    At the first gradient of a pass the parameters are compared with those that the buckets were
    made for. The module may have others now, or more of them may need gradients. The ranks then
    compare theirs at the end of the pass, before anything is reduced, and make the buckets anew.

    Attributes:
        paused: True while gradients are only accumulated.
        tracked: The parameters and their hooks.
        removed: True once the hooks were taken away.
    """

    def __init__(
        self, group: Group, module: torch.nn.Module | None, parameters: Named, options: Options
    ) -> None:
        self.paused = False
        self.tracked = Tracked(module, parameters, group, self._attach)
        self._group = group
        self._members: Sequence[Member] = ()
        self._known: dict[int, Callable[[], torch.Tensor | None]] = {}
        self._options = options
        self._op = ReduceOp.AVERAGE if options.average else ReduceOp.SUM
        self._ending: Callable[[], BackwardEndHook | None] = _none
        self._stale = False
        self.removed = False
        self._learned: list[int] | None = None
        self._sums: dict[int, Callable[[], torch.Tensor | None]] = {}

        self._under_way = False
        self._next = 0
        self._running: list[tuple[Bucket, Iterator[torch.Tensor] | None, Any]] = []
        self._missing: list[tuple[Bucket, Member]] = []
        self._joins = False
        self._bucket_of: dict[int, Bucket] = {}
        self._buckets: list[Bucket] = []

        self._accumulated = self._hook()
        self._take(parameters)

    def _take(self, parameters: Named) -> None:
        """Keep these parameters in step, those that are frozen as soon as they need gradients."""
        trained = [
            (name, parameter)
            for name, parameter in parameters
            if parameter.requires_grad or id(parameter) in self._known
        ]
        self._members = [
            Member.of(number, name, parameter) for number, (name, parameter) in enumerate(trained)
        ]
        self._known = {
            id(parameter): member.parameter
            for (_, parameter), member in zip(trained, self._members, strict=True)
        }
        self._learned = [] if self._options.early else None
        self._arrange(self._members[::-1])
        if self._group.world_size > 1:
            self.tracked.attach(parameters)

    def _attach(self, parameter: torch.Tensor) -> list[Any]:
        """Put the hooks on a parameter; returns what takes them away again."""
        register: Any = parameter.register_post_accumulate_grad_hook
        handles = [register(self._accumulated)]
        if not self._options.average:
            node = torch.autograd.graph.get_gradient_edge(parameter).node
            # The node is kept with its hook, because the parameter holds it weakly. The node would
            # keep the memory of a parameter that is swapped, and nothing would tell of that. So the
            # parameter is known weakly, and torch refuses to swap it.
            known = weakref.ref(parameter)
            handles.append(
                _Kept(node, node.register_prehook(lambda gradients: self._share(known())))
            )
        return handles

    def _hook(self) -> Callable[[torch.Tensor], None]:
        """Return what autograd calls after it accumulated a parameter's gradient."""
        bucket_of = self._bucket_of
        early = self._options.early

        def accumulated(parameter: torch.Tensor) -> None:
            if self.paused:
                return

            ending = self._ending()
            if ending is None:
                if id(parameter) not in bucket_of and not self.tracked.has(parameter):
                    return  # it was put into the module, and taken out again
                self._begin()
            elif ending.climbing:
                self._ending = weakref.ref(BackwardEndHook(self._finish))

            if self._learned is not None:
                self._learned.append(id(parameter))
            elif early and id(parameter) in bucket_of:
                bucket = bucket_of[id(parameter)]
                bucket.waiting -= 1
                if bucket.waiting <= 0:
                    try:
                        self._advance(bucket, parameter)
                    except BaseException:
                        self._ending = _none
                        raise

        accumulated.group = self._group  # type: ignore[attr-defined]  # see is_kept_in_step
        # torch.compiler.disable sets this too, but imports the compiler.
        accumulated._torchdynamo_disable = True  # type: ignore[attr-defined]
        return accumulated

    def _share(self, parameter: torch.Tensor | None) -> None:
        """Scale a sum to this rank's share of it, so that the next sum counts it once.

        Every rank has that sum. Called before autograd accumulates on top of it.
        """
        reference = self._sums.pop(id(parameter), None)
        gradient = None if parameter is None else parameter.grad
        if reference is not None and gradient is not None and reference() is gradient:
            gradient.detach().div_(self._group.world_size)

    def _begin(self) -> None:
        """Start a backward pass: its end is to call ``_finish``."""
        if not is_running():
            raise OptionError(
                f"sync_gradients: the backward pass of rank {self._group.rank} is compiled "
                "(torch._dynamo.config.compiled_autograd), and its end cannot be seen; compile the forward pass only"
            )

        if self._next or self._running:
            raise GroupError(
                f"sync_gradients: the last backward pass of rank {self._group.rank} ended with an exception after "
                f"{self._next} of {len(self._buckets)} buckets had been reduced, so the ranks of group "
                f"'{self._group.name}' are out of step; remove() the handle, destroy the group, make it again, and "
                "call sync_gradients again"
            )

        for bucket in self._buckets:
            bucket.waiting = bucket.expected
        self._missing.clear()
        self._stale = self.tracked.differs(self._known)
        if self._stale and self._options.early:
            self._learned = []  # launches nothing before the end
        if self._learned is not None:
            self._learned.clear()
        self._under_way = True
        self._ending = weakref.ref(BackwardEndHook(self._finish))

    def _advance(self, bucket: Bucket, parameter: torch.Tensor) -> None:
        """Launch what can be launched now that all gradients of a bucket are there."""
        if bucket.place < self._next:
            name = next(member.name for member in bucket.members if member.parameter() is parameter)
            raise GroupError(
                f"sync_gradients: the gradient of {name} was accumulated once more after it had "
                "been reduced in this backward pass, which in the first pass it was not; where a parameter's number of "
                "reentrant checkpoints changes from step to step, pass overlap=False on all ranks"
            )
        while self._next < len(self._buckets) and self._buckets[self._next].waiting <= 0:
            self._launch(self._buckets[self._next])

    def _launch_all(self) -> None:
        """Reduce all buckets by one call."""
        payloads = [self._collect(bucket) for bucket in self._buckets]
        self._group.allreduce(payloads, self._op)
        self._next = len(self._buckets)

    def _collect(self, bucket: Bucket) -> torch.Tensor:
        """Return the tensor of a bucket that is to be reduced; note which gradients are missing."""
        if self._sums:
            for member in bucket.members:
                self._share(member.parameter())
        try:
            payload = bucket.collect()
        except TensorError as error:
            # of this rank, perhaps: the others are about to reduce the bucket, or wait there
            if bucket.members[0].device.type != "cpu":
                raise
            with self._group._refusing("sync_gradients", -1, None):
                raise error
        if bucket.missing:
            self._missing += [(bucket, member) for member in bucket.missing]
        if bucket.tail is not None:
            self._write_presence(bucket.tail)
        return payload

    def _launch(self, bucket: Bucket) -> None:
        """Reduce a bucket, or start to."""
        payload = self._collect(bucket)
        compression, early = self._options.compression, self._options.early

        if compression is None:
            work = self._group.allreduce(payload, self._op, async_op=early)
            self._next += 1  # where the ranks' calls differed, nothing has happened
            if early:
                self._running.append((bucket, None, work))
            return

        self._next += 1
        rounds = iter(compression.reduce(bucket))
        if early:
            first = next(rounds, None)
            work = (
                None
                if first is None
                else self._group.allreduce(first, ReduceOp.AVERAGE, async_op=True)
            )
            self._running.append((bucket, rounds, work))
        else:
            self._complete(bucket, rounds)

    def _complete(self, bucket: Bucket, rounds: Iterator[torch.Tensor]) -> None:
        """Take a compressed bucket through the rest of its rounds."""
        for tensor in rounds:
            self._group.allreduce(tensor, ReduceOp.AVERAGE)
        if not self._options.average:
            bucket.flat.mul_(self._group.world_size)

    def _finish(self) -> None:
        """Launch what is left, wait for everything; then all gradients are in step."""
        if not self._under_way:
            return
        self._under_way = False
        # also where this fails: the traceback that the caller gets keeps the BackwardEndHook alive
        self._ending = _none

        with torch.no_grad():
            if self._stale:
                self._renew()

            if self._joins and not self._next:
                self._launch_all()
            while self._next < len(self._buckets):
                self._launch(self._buckets[self._next])
            for bucket, rounds, work in self._running:
                if work is not None:
                    work.wait()
                if rounds is not None:
                    self._complete(bucket, rounds)

            self._settle_missing()
            if not self._options.average:
                self._note_sums()
            for bucket in self._buckets:
                bucket.release()

            self._running.clear()
            self._missing.clear()
            self._next = 0
            if self._learned is not None:
                self._learn(self._learned)

        if self.removed:
            self._forget()

    def remove(self) -> None:
        """Take the hooks away; a backward pass under way is brought to its end."""
        self.removed = True
        self.tracked.remove()
        if not self._under_way:
            self._forget()

    def _forget(self) -> None:
        """Know no tensor any more, so that torch can swap them."""
        self._members = ()
        self._known.clear()
        self._sums.clear()
        self._bucket_of.clear()
        self._buckets.clear()

    def _renew(self) -> None:
        """Take in what the module has now, on all ranks alike.

        Raises:
            MismatchError: The ranks have not changed the same; nothing was reduced.
        """
        before = {member.name for member in self._members}
        with telling(self._group):
            parameters = self.tracked.named()
        trained = [
            (name, parameter)
            for name, parameter in parameters
            if parameter.requires_grad or id(parameter) in self._known
        ]

        try:
            compare(self._group, described(trained, []), {})
        except MismatchError as error:
            changed = [name for name, parameter in trained if id(parameter) not in self._known]
            changed += sorted(before - {name for name, _ in trained})
            raise MismatchError(
                f"sync_gradients: since they were last compared, parameters of rank {self._group.rank} were replaced, "
                f"added, unfrozen or removed ({', '.join(changed[:_SHOWN])}), and on other ranks they were not, or "
                f"others were: {error}; change the module on all ranks before the same backward pass",
                error.ranks,
            ) from error

        self._take(parameters)
        self._stale = False

    def _write_presence(self, presence: torch.Tensor) -> None:
        """Note which parameters have a gradient on this rank.

        Called once every bucket was collected.
        """
        presence.fill_(1)
        if self._missing:
            presence[torch.tensor([member.number for _, member in self._missing])] = 0

    def _settle_missing(self) -> None:
        """Give parameters without a gradient here the other ranks' one, where there is one."""
        presence = self._buckets[-1].tail
        if presence is None:
            # Beside the gradients, because a group may reach no other device.
            presence = torch.empty(
                len(self._members), dtype=torch.uint8, device=self._members[0].device
            )
            self._write_presence(presence)
            self._group.allreduce(presence, ReduceOp.MAX)
        # one copy from a device, not one for each parameter
        found = presence.tolist() if self._missing else []
        for bucket, member in self._missing:
            if found[member.number] != 0:
                bucket.adopt(member)

    def _note_sums(self) -> None:
        for member in self._members:
            gradient = member.gradient
            if gradient is not None:
                self._sums[id(member.parameter())] = reference_to(gradient)

    def _learn(self, learned: list[int]) -> None:
        """Arrange the buckets anew, in the order that rank 0 saw."""
        number_of = {
            number: member.number for number, member in zip(self._known, self._members, strict=True)
        }
        learned = [number_of[number] for number in learned if number in number_of]
        order = [*dict.fromkeys([*learned, *range(len(self._members) - 1, -1, -1)])]
        # As an object, because a group may reach no host memory.
        self._arrange([self._members[number] for number in self._group.broadcast_object(order, 0)])
        for bucket in self._buckets:
            counts = [learned.count(member.number) for member in bucket.members]
            bucket.expected = bucket.waiting = sum(max(1, count) for count in counts)
        self._learned = None

    def _arrange(self, order: Sequence[Member]) -> None:
        """Make the buckets.

        Gradients in former ones stay where they are until they are collected.
        """
        options = self._options
        self._buckets = plan(
            order, options.bucket_nbytes, options.lone_nbytes, options.compression is None
        )
        bucket_of = {member.number: bucket for bucket in self._buckets for member in bucket.members}
        self._joins = (
            not options.early
            and options.compression is None
            and len(self._buckets) > 1
            and all(member.device.type == "cpu" for member in order)
        )

        self._bucket_of.clear()  # the hook looks into this one
        self._bucket_of.update(
            (number, bucket_of[member.number])
            for number, member in zip(self._known, self._members, strict=True)
        )


class _Kept:
    """The handle of a hook on a node of autograd's, which keeps the node."""

    def __init__(self, node: Any, handle: Any) -> None:
        self._node = node
        self._handle = handle

    def remove(self) -> None:
        """Take the hook away, and let go of the node."""
        self._handle.remove()
        self._node = None


def _none() -> None:
    return None
