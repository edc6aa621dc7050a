"""One checked call: what the ranks must agree on, what it moves, what it returns."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from colltensor.buffers import Buffers
from colltensor.control.messages import REFUSED
from colltensor.operations import CODES
from colltensor.types import ReduceOp

_SIGNATURE: Final = struct.Struct("<QBBhBQQ")
"""Sequence number, operation, reduce op, root, whether leaves are fused, count, leaves."""
_NO_OP: Final = 255


class Transfer(NamedTuple):
    """One point-to-point transfer of a call.

    Attributes:
        source: The rank that sends.
        destination: The rank that receives.
        buffers: What this rank sends or receives into.
        move: Moves this transfer alone, given the deadline.
    """

    source: int
    destination: int
    buffers: Buffers
    move: Callable[[float], None]

    def signature(self, number: int, fused: bool) -> bytes:
        """Return what must be equal on both ranks, packed.

        It is their transfer ``number`` in this direction.
        """
        return _SIGNATURE.pack(
            number, CODES["transfer"], _NO_OP, self.source, fused, *self.buffers.compared()
        )

    def describer(self, number: int, fused: bool) -> Callable[[], str]:
        """Return what says so in words."""
        source, destination, buffers, _ = self
        how = "" if fused else ", copy=False"
        return lambda: (
            f"transfer #{number} from rank {source} to rank {destination}, {buffers.describe()}{how}"
        )

    def make_alone(self, deadline: float) -> None:
        """Make it apart from the rest of its call, once both ranks have agreed."""
        self.buffers.allocate_result()
        self.buffers.load()
        self.move(deadline)
        self.buffers.store()


class Call:
    """One checked call: what the ranks must agree on, what it moves, what it returns.

    Attributes:
        name: The operation.
        argument: The argument whose dtypes, counts and paths must be equal on all ranks, or None.
        op: The reduce op, or None.
        root: The root's rank, or -1.
        fused: Whether small leaves share transfers.
        buffers: The arguments to allocate_result and load before the payload and to store after it.
        move: Moves the payload: called with ``arguments`` and the deadline.
        arguments: What ``move`` gets.
        result: Returns what the call returns.
        transfers: For point-to-point calls, what travels between which two ranks.
    """

    __slots__ = (
        "argument",
        "arguments",
        "buffers",
        "fused",
        "move",
        "name",
        "op",
        "result",
        "root",
        "transfers",
    )

    def __init__(
        self,
        name: str,
        argument: Buffers | None,
        op: ReduceOp | None,
        root: int,
        fused: bool,
        buffers: Sequence[Buffers],
        move: Callable[..., Any],
        arguments: tuple[Any, ...],
        result: Callable[[], Any],
        transfers: Sequence[Transfer] | None = None,
    ) -> None:
        self.name = name
        self.argument = argument
        self.op = op
        self.root = root
        self.fused = fused

        self.buffers = buffers
        self.move = move
        self.arguments = arguments
        self.result = result
        self.transfers = transfers

    def allocate_result(self) -> None:
        """Make the results of immutable tensors."""
        for buffers in self.buffers:
            buffers.allocate_result()

    def streams(self) -> set[int | None]:
        """Return the streams that must come after the call, on a device.

        None is among them for the host.
        """
        return set().union(*(buffers.streams() for buffers in self.buffers))

    def signature(self, sequence: int) -> bytes:
        """Return what must be equal on all ranks, packed."""
        argument = self.argument
        count, leaves = (0, 0) if argument is None else argument.compared()
        op = _NO_OP if self.op is None else self.op
        return _SIGNATURE.pack(sequence, CODES[self.name], op, self.root, self.fused, count, leaves)

    def describe(self, sequence: int) -> str:
        """Return what ``signature`` packs, in words."""
        parts = [f"{self.name} #{sequence}"]
        parts += [] if self.argument is None else [self.argument.describe()]
        parts += [] if self.op is None else [f"op {self.op.name}"]
        parts += [] if self.root < 0 else [f"root {self.root}"]
        parts += [] if self.fused else ["copy=False"]
        return ", ".join(parts)


class Refusal(Call):
    """What a rank calls in the place of a call that it has refused: no other call agrees with it.

    Attributes:
        words: Which call it refused, and why.
    """

    __slots__ = ("words",)

    def __init__(self, name: str, root: int, error: BaseException) -> None:
        super().__init__(
            "refusal", None, None, root, True, (), lambda deadline: None, (), lambda: None
        )
        self.words = f"{REFUSED}{name}: {type(error).__name__}: {error}"

    def describe(self, sequence: int) -> str:
        """Return why, in words."""
        return self.words
