"""Buckets: gradients that are reduced together, as views of one flat tensor or as one large gradient where it lies.

Imports torch, and of the package errors only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from colltensor.errors import UnsupportedTensorError

_FOREACH_FROM: Final = 2


@dataclass(frozen=True, slots=True)
class Member:
    """One parameter whose gradient is kept in step.

    Attributes:
        number: Its place among all parameters, the same on every rank.
        name: Its name in the module, for messages and for a compression's memory.
        parameter: The parameter.
        strides: The layout that autograd gives its gradients, in elements.
    """

    number: int
    name: str
    parameter: torch.Tensor
    strides: tuple[int, ...]

    @classmethod
    def of(cls, number: int, name: str, parameter: torch.Tensor) -> Member:
        """Describe a parameter."""
        strides = torch.empty_like(parameter, device="meta", requires_grad=False).stride()
        return cls(number, name, parameter, strides)

    @property
    def nbytes(self) -> int:
        """The bytes of its gradient."""
        return self.parameter.numel() * self.parameter.element_size()

    def check(self, gradient: torch.Tensor) -> None:
        """Refuse what cannot be reduced in place.

        Raises:
            UnsupportedTensorError: A sparse gradient, or one with a history.
        """
        if gradient.layout is not torch.strided:
            raise UnsupportedTensorError(
                f"sync_gradients: the gradient of {self.name} is sparse ({gradient.layout}), and only dense ones are "
                "reduced; make the layer with sparse=False, or leave the parameter out and reduce it yourself"
            )
        if gradient.requires_grad:
            raise UnsupportedTensorError(
                f"sync_gradients: the gradient of {self.name} has a history (backward(create_graph=True)), which a "
                "reduction in place would falsify; use torch.autograd.grad(), or reduce with colltensor.torch.allreduce"
            )


class Bucket:
    """Gradients of one dtype that are reduced together; what a ``Compression`` gets to see.

    A flat bucket owns one contiguous tensor. Each gradient is a view of it; one that autograd made anew is copied in
    and replaced by the view. A bucket of one large parameter (``lone``) owns nothing: the gradient is reduced where it
    lies, so that nothing is copied whether the loop keeps its gradients or sets them to None.

    Attributes:
        members: The parameters, in the order of their views.
        tail: Room behind a flat bucket's gradients for one element a parameter of the whole model, or None.
        expected: How many gradients autograd accumulates for these parameters in a backward pass.
        waiting: How many of them are still to come in this one.
        missing: The members without a gradient on this rank, once ``collect`` was called.
        place: Its place in the launching order.
    """

    __slots__ = ("_flat", "_pairs", "_wire", "expected", "lone", "members", "missing", "place", "tail", "waiting")

    def __init__(self, members: Sequence[Member], lone: bool, place: int, tail: int) -> None:
        self.members = tuple(members)
        self.lone = lone
        self.place = place
        self.expected = self.waiting = len(members)
        self.missing: list[Member] = []
        self.tail: torch.Tensor | None = None
        self._pairs: list[tuple[Member, torch.Tensor, torch.Tensor]] = []
        if not lone:
            first = members[0].parameter
            count = sum(member.parameter.numel() for member in members)
            self._wire = torch.zeros(count + tail, dtype=first.dtype, device=first.device)
            self._flat = self._wire[:count] if tail else self._wire
            self.tail = self._wire[count:] if tail else None
            start = 0
            for member in members:
                view = self._wire.as_strided(member.parameter.shape, member.strides, start)
                self._pairs.append((member, member.parameter, view))
                start += view.numel()

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names."""
        return tuple(member.name for member in self.members)

    @property
    def flat(self) -> torch.Tensor:
        """All gradients of the bucket as one contiguous tensor of one dimension, to be changed in place."""
        return self._flat

    @property
    def gradients(self) -> list[torch.Tensor]:
        """The gradients, with the parameters' shapes, in the memory of ``flat``."""
        if not self.lone:
            return [view for _, _, view in self._pairs]
        member = self.members[0]
        return [self._flat.as_strided(member.parameter.shape, member.strides)]

    def collect(self) -> torch.Tensor:
        """Bring this rank's gradients together, zeros where there is none, and return the tensor to be reduced.

        Raises:
            UnsupportedTensorError: A gradient that cannot be reduced; names the parameter.
        """
        self.missing = []
        return self._collect_lone() if self.lone else self._collect_flat()

    def _collect_flat(self) -> torch.Tensor:
        views, fresh = [], []
        for member, parameter, view in self._pairs:
            gradient = parameter.grad
            if gradient is view:
                continue
            if gradient is None:
                view.zero_()
                self.missing.append(member)
                continue
            member.check(gradient)
            views.append(view)
            fresh.append(gradient)
            parameter.grad = view
        if len(fresh) >= _FOREACH_FROM:
            torch._foreach_copy_(views, fresh)
        elif fresh:
            views[0].copy_(fresh[0])
        return self._wire

    def _collect_lone(self) -> torch.Tensor:
        member = self.members[0]
        parameter = member.parameter
        gradient = parameter.grad
        if gradient is None:
            self.missing.append(member)
            gradient = torch.zeros_like(parameter, requires_grad=False)
        else:
            member.check(gradient)
            if gradient.stride() != member.strides:  # not autograd's doing: somebody assigned it
                gradient = parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(gradient)
        self._flat = gradient.as_strided((gradient.numel(),), (1,))
        return self._flat

    def adopt(self, member: Member) -> None:
        """Give a missing member the reduced gradient, because another rank had one."""
        number = self.members.index(member)
        member.parameter.grad = self.gradients[number]

    def release(self) -> None:
        """Let go of a gradient that is the loop's own."""
        self.waiting = self.expected
        if self.lone:
            self._flat = _NOTHING


_NOTHING: Final = torch.empty(0)


def plan(order: Sequence[Member], bucket_nbytes: int, lone_nbytes: int, carry: bool) -> list[Bucket]:
    """Divide parameters, given in the order in which their gradients become ready, into buckets in launching order.

    A gradient of ``lone_nbytes`` or more is a bucket by itself. The others of one dtype and device share flat buckets
    of at most ``bucket_nbytes``. A bucket's place is where its last gradient becomes ready; a flat one comes last,
    where there is one, and with ``carry`` has a tail for the presence of all parameters.
    """
    groups: list[tuple[int, list[Member], bool]] = []
    filling: dict[tuple[torch.dtype, torch.device], tuple[list[Member], int, int]] = {}
    for place, member in enumerate(order):
        if member.nbytes >= min(lone_nbytes, bucket_nbytes):
            groups.append((place, [member], True))
            continue
        kind = member.parameter.dtype, member.parameter.device
        members, nbytes, last = filling.pop(kind, ([], 0, 0))
        if members and nbytes + member.nbytes > bucket_nbytes:
            groups.append((last, members, False))
            members, nbytes = [], 0
        filling[kind] = [*members, member], nbytes + member.nbytes, place
    groups += [(last, members, False) for members, _, last in filling.values()]
    groups.sort(key=lambda group: group[0])
    flat = [group for group in groups if not group[2]]
    if flat:
        groups.remove(flat[-1])
        groups.append(flat[-1])
    tails = [0] * len(groups)
    if flat and carry:
        tails[-1] = len(order)
    return [
        Bucket(members, lone, place, tail)
        for place, ((_, members, lone), tail) in enumerate(zip(groups, tails, strict=True))
    ]
