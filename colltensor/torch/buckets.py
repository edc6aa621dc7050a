"""Buckets: gradients that are reduced together.

They are views of one flat tensor, or one large gradient where it lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from colltensor._compat.torch import foreach_copy
from colltensor.errors import UnsupportedTensorError
from colltensor.torch.tracked import reference_to

_FOREACH_FROM: Final = 2


@dataclass(frozen=True, slots=True)
class Member:
    """One parameter whose gradient is kept in step.

    Attributes:
        number: Its place among all parameters, the same on every rank.
        name: Its name in the module, for messages and for a compression's memory.
        parameter: Returns it, or None when it is gone: its own hooks must not keep it alive.
        shape: Its shape.
        strides: The layout that autograd gives its gradients, in elements.
        dtype: Of its gradients.
        device: Where it is.
    """

    number: int
    name: str
    parameter: Callable[[], torch.Tensor | None]
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, number: int, name: str, parameter: torch.Tensor) -> Member:
        """Describe a parameter."""
        strides = torch.empty_like(parameter, device="meta", requires_grad=False).stride()
        # grad_dtype came with torch 2.9
        dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype
        return cls(
            number, name, reference_to(parameter), parameter.shape, strides, dtype, parameter.device
        )

    @property
    def gradient(self) -> torch.Tensor | None:
        """Its gradient, if it has one."""
        parameter = self.parameter()
        return None if parameter is None else parameter.grad

    @property
    def numel(self) -> int:
        """The elements of its gradient."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of its gradient."""
        return self.numel * self.dtype.itemsize

    def assign(self, gradient: torch.Tensor) -> None:
        """Make it the parameter's gradient."""
        parameter = self.parameter()
        if parameter is not None:
            parameter.grad = gradient

    def zeros(self) -> torch.Tensor:
        """Return a gradient of zeros."""
        return torch.empty_strided(
            self.shape, self.strides, dtype=self.dtype, device=self.device
        ).zero_()

    def check(self, gradient: torch.Tensor) -> None:
        """Refuse a gradient that cannot be reduced in place.

        Raises:
            UnsupportedTensorError: A sparse gradient, one with a history, or of another kind than
                agreed.
        """
        if (
            gradient.dtype != self.dtype
            or gradient.shape != self.shape
            or gradient.device != self.device
        ):
            raise UnsupportedTensorError(
                f"sync_gradients: the gradient of {self.name} is {_in_words(gradient)}, and "
                f"{_in_words(self)} was to be expected when sync_gradients was called; after model.to() or another "
                "change of the parameters remove() the handle and call sync_gradients again, on all ranks"
            )

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


def _in_words(tensor: torch.Tensor | Member) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype}{list(tensor.shape)} on {tensor.device}"


class Bucket:
    """Gradients of one dtype that are reduced together. A ``Compression`` gets to see them.

    A flat bucket owns one contiguous tensor, and each gradient is a view of it. One that autograd
    made anew is copied in and replaced by the view. A bucket of one large parameter (``lone``) owns
    nothing: the gradient is reduced where it lies. So nothing is copied, whether the loop keeps its
    gradients or sets them to None.

    Attributes:
        members: The parameters, in the order of their views.
        tail: Room behind a flat bucket's gradients for one element a parameter of the whole model,
            or None.
        expected: How many gradients autograd accumulates for these parameters in a backward pass.
        waiting: How many of them are still to come in this one.
        missing: The members without a gradient on this rank, once ``collect`` was called.
        place: Its place in the launching order.
    """

    __slots__ = (
        "_flat",
        "_pairs",
        "_payload",
        "expected",
        "lone",
        "members",
        "missing",
        "place",
        "tail",
        "waiting",
    )

    def __init__(self, members: Sequence[Member], lone: bool, place: int, tail: int) -> None:
        self.members = tuple(members)
        self.lone = lone
        self.place = place
        self.expected = self.waiting = len(members)
        self.missing: list[Member] = []
        self.tail: torch.Tensor | None = None
        self._pairs: list[tuple[Member, torch.Tensor, int]] = []
        if not lone:
            first = members[0]
            count = sum(member.numel for member in members)
            self._payload = torch.zeros(count + tail, dtype=first.dtype, device=first.device)
            self._flat = self._payload[:count] if tail else self._payload
            self.tail = self._payload[count:] if tail else None
            self._make_views()

    def _make_views(self) -> None:
        self._pairs.clear()
        start = 0
        for member in self.members:
            view = self._payload.as_strided(member.shape, member.strides, start)
            self._pairs.append((member, view, view.data_ptr()))
            start += member.numel

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names."""
        return tuple(member.name for member in self.members)

    @property
    def flat(self) -> torch.Tensor:
        """All gradients of the bucket as one contiguous flat tensor, to be changed in place."""
        return self._flat

    @property
    def gradients(self) -> list[torch.Tensor]:
        """The gradients, with the parameters' shapes, in the memory of ``flat``."""
        if not self.lone:
            return [view for _, view, _ in self._pairs]
        member = self.members[0]
        return [self._flat.as_strided(member.shape, member.strides)]

    def collect(self) -> torch.Tensor:
        """Bring this rank's gradients together, and return the tensor to be reduced.

        It has zeros where there is no gradient.

        Raises:
            UnsupportedTensorError: A gradient that cannot be reduced; names the parameter.
        """
        self.missing = []
        return self._collect_lone() if self.lone else self._collect_flat()

    def _collect_flat(self) -> torch.Tensor:
        owners, views, fresh = [], [], []
        for _, view, address in self._pairs:
            if view.data_ptr() != address:  # somebody set ``parameter.grad.data``
                self._make_views()
                break

        for member, view, _ in self._pairs:
            gradient = member.gradient
            if gradient is view:
                continue
            if gradient is None:
                view.zero_()
                self.missing.append(member)
                continue
            member.check(gradient)
            owners.append(member)
            views.append(view)
            fresh.append(gradient)

        if len(fresh) >= _FOREACH_FROM:
            foreach_copy(views, fresh)
        elif fresh:
            views[0].copy_(fresh[0])
        for member, view in zip(owners, views, strict=True):
            member.assign(view)
        return self._payload

    def _collect_lone(self) -> torch.Tensor:
        member = self.members[0]
        gradient = member.gradient
        if gradient is None:
            self.missing.append(member)
            gradient = member.zeros()
        else:
            member.check(gradient)
            if gradient.stride() != member.strides:  # not autograd's doing: somebody assigned it
                gradient = member.zeros().copy_(gradient)
                member.assign(gradient)
        self._flat = gradient.as_strided((gradient.numel(),), (1,))
        return self._flat

    def adopt(self, member: Member) -> None:
        """Give a missing member the reduced gradient, because another rank had one."""
        member.assign(self.gradients[self.members.index(member)])

    def release(self) -> None:
        """Let go of a gradient that is the loop's own."""
        self.waiting = self.expected
        if self.lone:
            self._flat = _NOTHING


_NOTHING: Final = torch.empty(0)


def plan(
    order: Sequence[Member], bucket_nbytes: int, lone_nbytes: int, carry: bool
) -> list[Bucket]:
    """Divide parameters into buckets in launching order.

    They are given in the order in which their gradients become ready. A gradient of ``lone_nbytes``
    or more is a bucket by itself. The others of one dtype and device share flat buckets of at most
    ``bucket_nbytes``. A bucket's place is where its last gradient becomes ready. A flat one comes
    last, where there is one, and with ``carry`` has a tail for the presence of all parameters.
    """
    groups: list[tuple[int, list[Member], bool]] = []
    filling: dict[tuple[torch.dtype, torch.device], tuple[list[Member], int, int]] = {}

    for place, member in enumerate(order):
        if member.nbytes >= min(lone_nbytes, bucket_nbytes):
            groups.append((place, [member], True))
            continue
        kind = member.dtype, member.device
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
