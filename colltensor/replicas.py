"""Replicas: what the leaves of all ranks have in common, down to the bits of parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

from colltensor.adapters import adapter_of, memory_of, number_adapter
from colltensor.errors import MismatchError, TensorError
from colltensor.group import Group
from colltensor.tree import flatten
from colltensor.types import DType
from colltensor.view import BufferView

REMEDY: Final = (
    "call parameters = colltensor.broadcast(parameters) on every rank before, which makes them rank 0's (in place, "
    "but for JAX arrays)"
)
"""What to do where parameters have other values on some ranks."""

_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class Leaf:
    """What all ranks' leaves must have in common.

    Attributes:
        path: Where it is in its tree, "" for a tensor that is no tree.
        shape: Its shape.
        dtype: Its data type.
        contents: A fingerprint of its bits, "" where they may differ.
    """

    path: str
    shape: tuple[int, ...]
    dtype: DType
    contents: str = ""

    @classmethod
    def of(cls, path: str, view: BufferView, *, contents: bool) -> Leaf:
        """Describe a tensor; with ``contents`` by its bits as well, which are read."""
        return cls(path, view.shape, view.dtype, fingerprint(view) if contents else "")

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Plain:
    """A number or string of Python's among the leaves, as a checkpoint may have them.

    Attributes:
        path: As a leaf's.
        contents: Its repr.
    """

    path: str
    contents: str
    shape = None
    dtype = None

    def __str__(self) -> str:
        return self.contents


def fingerprint(view: BufferView) -> str:
    """Return a hash of the elements in row-major order, for any framework, layout and device."""
    return blake2b(memory_of(view.device.type).contents(view), digest_size=16).hexdigest()


def compare_tree(parameters: Any, group: Group, where: str, remedy: str) -> None:
    """Compare a pytree of parameters on all ranks, bit for bit; every rank calls.

    Args:
        parameters: Tensors, and Python's numbers and strings.
        group: The group.
        where: Who compares, for messages.
        remedy: What to do where values differ.

    Raises:
        TensorError: A leaf that cannot be used; the message has its path.
        MismatchError: They differ.
    """
    here = f"{where} of group '{group.name}' (rank {group.rank})"
    leaves: list[Leaf | Plain] = []
    try:
        tensors, paths, _ = flatten(parameters)
    except TensorError as error:
        raise type(error)(f"{here}: {error}") from error

    for leaf, path in zip(tensors, paths, strict=True):
        adapter = number_adapter(type(leaf))
        if isinstance(leaf, (str, bytes)):
            leaves.append(Plain(path, repr(leaf)))
            continue

        try:
            source = (adapter or adapter_of(leaf)).source(leaf)
            leaves.append(Leaf.of(path, source, contents=group.world_size > 1))
        except TensorError as error:
            if adapter is not None:  # an int that no data type holds
                leaves.append(Plain(path, repr(leaf)))
                continue
            place = f"leaf {path}" if path else "the tensor"
            raise type(error)(f"{here}: {place}: {error}") from error

    compare(group, where, {}, leaves, remedy)


def compare(
    group: Group,
    where: str,
    options: Mapping[str, Any],
    leaves: Sequence[Leaf | Plain],
    remedy: str,
) -> None:
    """Compare every rank's options and leaves, in one exchange; every rank calls.

    Args:
        group: The group.
        where: Who compares, for messages.
        options: By name; the same names on all ranks.
        leaves: This rank's.
        remedy: What to do where only values differ.

    Raises:
        MismatchError: They differ; names the ranks that differ from most, and the first leaf.
    """
    everyone = group.allgather_object((tuple(options.items()), *leaves))
    usual, times = Counter(everyone).most_common(1)[0]
    reference = usual if times > 1 else everyone[0]
    ranks = [rank for rank, theirs in enumerate(everyone) if theirs != reference]
    if not ranks:
        return

    of = everyone.index(reference)
    difference, only_values = _difference(ranks[0], everyone[ranks[0]], of, reference)
    if not only_values:
        remedy = "make it of the same leaves, with the same options, on every rank"
    raise MismatchError(
        f"{where} of group '{group.name}' (rank {group.rank}): rank{'s' * (len(ranks) > 1)} "
        f"{', '.join(map(str, ranks))} differ{'s' * (len(ranks) == 1)}: {difference}; {remedy}",
        ranks,
    )


def _difference(
    rank: int, theirs: tuple[Any, ...], of: int, usual: tuple[Any, ...]
) -> tuple[str, bool]:
    """Return in words the first difference between two ranks, and whether only values differ."""
    for (option, here), (_, there) in zip(theirs[0], usual[0], strict=True):
        if here != there:
            return f"{option} is {here!r} on rank {rank}, {there!r} on rank {of}", False

    pairs = list(zip(theirs[1:], usual[1:], strict=False))
    for here, there in pairs:
        if here.path != there.path:
            words = f"leaf {here.path} of rank {rank} is where rank {of} has leaf {there.path}"
            return words, False
        if (here.shape, here.dtype) != (there.shape, there.dtype):
            return f"leaf {here.path} is {here} on rank {rank}, {there} on rank {of}", False
    if len(theirs) != len(usual):
        words = f"it has {len(theirs) - 1} leaves on rank {rank}, {len(usual) - 1} on rank {of}"
        return words, False

    return values_differ(rank, of, [here.path for here, there in pairs if here != there]), True


def values_differ(rank: int, of: int, paths: Sequence[str]) -> str:
    """Say which leaves have other values on one rank than on another."""
    if paths == [""]:
        return f"the tensor has other values on rank {rank} than on rank {of}"
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    words = ("leaf", "has") if len(paths) == 1 else ("leaves", "have")
    return f"{words[0]} {', '.join(paths[:_SHOWN])}{more} {words[1]} other values on rank {rank} than on rank {of}"
