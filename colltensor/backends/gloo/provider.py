"""Provider: the few things the Gloo backend needs of a library that binds Gloo."""

from __future__ import annotations

import atexit
import ctypes
import os
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, Protocol
from weakref import WeakSet

from colltensor.backends.base import ControlPlane
from colltensor.types import DTYPES, DType, ReduceOp

Pair = tuple[DType, ReduceOp]
"""A data type and how its elements are combined."""


class Transfer(NamedTuple):
    """One message to or from another rank. The memory is contiguous and on the host."""

    peer: int
    pointer: int
    nbytes: int


class Reductions(Protocol):
    """Reductions of some ranks, in their order; roots are positions among them.

    Addresses are of contiguous memory.
    """

    def allreduce(
        self, pointer: int, count: int, dtype: DType, op: ReduceOp, deadline: float
    ) -> None:
        """Combine in place."""

    def combine(
        self, pointer: int, contributions: Sequence[bytes], dtype: DType, op: ReduceOp
    ) -> None:
        """Combine contributions, in their order, into memory of the size of one; sends nothing."""

    def reduce(
        self, pointer: int, count: int, dtype: DType, root: int, op: ReduceOp, deadline: float
    ) -> None:
        """Combine in place on ``root``; on other ranks the memory is only read."""

    def reducescatter(
        self,
        target: int,
        sources: Sequence[int],
        count: int,
        dtype: DType,
        op: ReduceOp,
        deadline: float,
    ) -> None:
        """Combine all ranks' ``sources[rank]`` into ``target``; each of ``count`` elements."""


class Provider(Protocol):
    """Gloo, connected between all ranks of a group. All ranks call in the same order.

    Every method returns when this rank's part is done. It raises TimeoutError at the deadline,
    RuntimeError when Gloo failed, and the errors of ``ControlPlane.check``.

    Attributes:
        name: ``"native"``, ``"ibverbs"``, ``"torch"`` or ``"pygloo"``.
        crosses: Whether threads may each ``exchange`` one transfer at the same time, with other
            peers or directions.
        natives: The pairs that its allreduce does correctly, and as which pair of Gloo's. A type of
            another width stands for as many elements as fill the same bytes.
    """

    name: str
    crosses: bool
    natives: Mapping[Pair, Pair]

    def allreduce(self, pointer: int, nbytes: int, pair: Pair, deadline: float) -> None:
        """Combine in place; ``pair`` is a value of ``natives``."""

    def broadcast(self, pointer: int, nbytes: int, root: int, deadline: float) -> None:
        """Overwrite with the root's bytes."""

    def exchange(
        self, receives: Sequence[Transfer], sends: Sequence[Transfer], deadline: float
    ) -> None:
        """Do all transfers at once: at most one to and one from each peer.

        None has zero bytes, and none goes to this rank itself.
        """

    def reductions(self, members: Sequence[int]) -> Reductions | None:
        """Return the provider's own reductions of some ranks, which do every pair.

        None where there are none.
        """

    def close(self) -> bool:
        """Free everything without waiting for other ranks; return whether Gloo now writes nowhere.

        It is idempotent.
        """

    def disown(self) -> None:
        """Let go of everything without freeing it, in a forked child.

        Gloo's threads are the parent's.
        """


def native_pairs(own: Sequence[str], *, bitwise: bool) -> dict[Pair, Pair]:
    """Return what can go through Gloo's own reduction, given the types that the provider has.

    Gloo's MIN and MAX lose NaN and are used for integers and bool only. By two's complement, SUM
    and PRODUCT of unsigned integers are the same as of signed ones. Bitwise operations go byte by
    byte. A bool is a byte of 0 or 1, a complex number two floats.

    Args:
        own: The names of the types that the provider reduces.
        bitwise: Whether it has BAND, BOR and BXOR of uint8.
    """
    pairs: dict[Pair, Pair] = {}
    for name, dtype in DTYPES.items():
        for op in (ReduceOp.SUM, ReduceOp.PRODUCT):
            carried = name if name in own else name.removeprefix("u")
            if dtype.kind in "iuf" and carried in own:
                pairs[dtype, op] = (DTYPES[carried], op)
        if dtype.kind in "iu" and name in own:
            pairs |= {(dtype, op): (dtype, op) for op in (ReduceOp.MIN, ReduceOp.MAX)}
        if dtype.kind in "iu" and bitwise:
            pairs |= {
                (dtype, op): (DTYPES["uint8"], op)
                for op in (ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR)
            }

    # Of bytes of 0 or 1, MAX is the logical or, and MIN the logical and.
    either, both, byte = (
        (DTYPES["bool"], ReduceOp.MAX),
        (DTYPES["bool"], ReduceOp.MIN),
        DTYPES["uint8"],
    )
    pairs |= {
        (either[0], op): (byte, either[1]) for op in (ReduceOp.SUM, ReduceOp.MAX, ReduceOp.BOR)
    }
    pairs |= {
        (both[0], op): (byte, both[1]) for op in (ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.BAND)
    }
    if bitwise:
        pairs[DTYPES["bool"], ReduceOp.BXOR] = (byte, ReduceOp.BXOR)

    # A complex number is two floats, which add up apart.
    for name, part in (("complex64", "float32"), ("complex128", "float64")):
        pairs[DTYPES[name], ReduceOp.SUM] = (DTYPES[part], ReduceOp.SUM)

    # An average is a sum that the caller divides.
    for name in ("float32", "float64", "complex64", "complex128"):
        pairs[DTYPES[name], ReduceOp.AVERAGE] = pairs[DTYPES[name], ReduceOp.SUM]

    return pairs


class KeyExchange:
    """The store that Gloo meets through, on the group's control plane.

    Gloo's rendezvous sets keys and waits for those of the other ranks. Every rank sets the same
    number of keys in the same order (torch 2.13 one, pygloo 0.2.1 two, whatever the world size), so
    each ``set`` is one allgather: O(world size) messages in all.
    """

    def __init__(self, control: ControlPlane, deadline: float) -> None:
        self._control = control
        self._deadline = deadline
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        """Publish ``value`` and learn what the other ranks publish; all ranks call."""
        name = key.encode()
        frames = self._control.allgather(
            struct.pack("<I", len(name)) + name + value, self._deadline
        )
        for frame in frames:
            start = 4 + struct.unpack_from("<I", frame)[0]
            self._values[frame[4:start].decode()] = frame[start:]

    def get(self, key: str) -> bytes:
        """Return what a rank has published."""
        if key not in self._values:
            raise RuntimeError(
                f"gloo: no rank has published {key!r}, only {sorted(self._values)}; install one version on all ranks"
            )
        return self._values[key]

    def values(self) -> list[bytes]:
        """Return all that was published."""
        return list(self._values.values())


def turn(source: int, destination: int, world_size: int) -> tuple[int, bool]:
    """Return the place of a transfer in the order of transfers.

    For providers that do one transfer at a time and whose send waits for its receiver. Pairs of
    ranks meet in the rounds of a tournament, in which every rank meets one other at a time (the
    circle method). Within a pair the lower rank sends first. All ranks have the same order. So the
    first transfer that is not done always has both its ranks ready.
    """
    low, high = sorted((source, destination))
    rounds = world_size - 1 + world_size % 2
    return (2 * low if high == rounds else low + high) % rounds, source > destination


def remaining_s(deadline: float) -> float:
    """Return the time Gloo is given: a second more than ours, so that our deadline comes first."""
    return max(deadline - time.monotonic(), 0.0) + 1.0


def expired(operation: str, control: ControlPlane) -> TimeoutError:
    """Return the error of an operation that all ranks began and that missed its deadline."""
    return TimeoutError(
        f"gloo: {operation} of group '{control.group_name}' (rank {control.rank} of {control.world_size}) did not end "
        "in time; raise timeout_s, or look at the network and the other ranks"
    )


_open: Final[WeakSet[Provider]] = WeakSet()


def track(provider: Provider) -> None:
    """Close ``provider`` when the interpreter exits, and disown it in forked children."""
    _open.add(provider)


def never_free(*objects: object) -> None:
    """Keep objects for ever, beyond the interpreter's end.

    Their destructors would wait for threads that do not end.
    """
    for item in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(item))


def _close_all() -> None:
    for provider in list(_open):
        provider.close()


def _disown_all() -> None:
    for provider in list(_open):
        provider.disown()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_disown_all)
