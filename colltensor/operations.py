"""The collectives, one row each: what the ranks, native code and observers call them.

A new collective is a row here, a method of ``Group`` (or ``MultiGpu``), and a method of the
backends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

REDUCE: Final = "reduce"
MOVE: Final = "move"
POINT_TO_POINT: Final = "point to point"
CONTROL: Final = "control"


class Collective(NamedTuple):
    """One row.

    Attributes:
        code: Its number in signatures, which ranks compare; numbers are never used again.
        native: Its number in ``Operation`` of native/include/colltensor/types.h. None where native
            code has none.
        kind: Whether it combines elements, moves bytes among all or between two ranks, or uses the
            control plane alone.
        rooted: Whether one rank is its root.
        compares_last: Whether the last tensor has the count that ranks compare. Otherwise the first
            one has.
        brings: For each method that makes it, the argument that says how much this rank brings: its
            place and name; -1 for none. Observers are told of these methods.
    """

    code: int
    native: int | None
    kind: str
    rooted: bool = False
    compares_last: bool = False
    brings: Mapping[str, tuple[int, str]] = {}


_LAST: Final = True
COLLECTIVES: Final[Mapping[str, Collective]] = {
    "allreduce": Collective(1, 1, REDUCE, brings={"allreduce": (0, "tensor")}),
    "reduce": Collective(2, 2, REDUCE, rooted=True, brings={"reduce": (0, "tensor")}),
    "broadcast": Collective(3, 3, MOVE, rooted=True, brings={"broadcast": (0, "tensor")}),
    "allgather": Collective(4, 4, MOVE, False, _LAST, {"allgather": (1, "tensor")}),
    "reducescatter": Collective(5, 6, REDUCE, brings={"reducescatter": (1, "tensor_list")}),
    "gather": Collective(6, 5, MOVE, True, _LAST, {"gather": (1, "tensor")}),
    "scatter": Collective(7, 7, MOVE, rooted=True, brings={"scatter": (0, "tensor")}),
    "alltoall": Collective(8, 8, MOVE, False, _LAST, {"alltoall": (1, "input_list")}),
    "barrier": Collective(9, 0, CONTROL, brings={"barrier": (-1, "")}),
    "broadcast_object": Collective(10, None, CONTROL, rooted=True),
    "allgather_object": Collective(11, None, CONTROL),
    "split": Collective(12, None, CONTROL, brings={"split": (-1, "")}),
    "transfer": Collective(
        13,
        9,
        POINT_TO_POINT,
        brings={"send": (0, "tensor"), "recv": (0, "tensor"), "sendrecv": (0, "send_tensor")},
    ),
    "allreduce_multigpu": Collective(14, None, REDUCE, brings={"allreduce": (0, "tensor_list")}),
    "reduce_multigpu": Collective(
        15, None, REDUCE, rooted=True, brings={"reduce": (0, "tensor_list")}
    ),
    "broadcast_multigpu": Collective(
        16, None, MOVE, rooted=True, brings={"broadcast": (0, "tensor_list")}
    ),
    "allgather_multigpu": Collective(
        17, None, MOVE, brings={"allgather": (1, "input_tensor_list")}
    ),
    "reducescatter_multigpu": Collective(
        18, None, REDUCE, brings={"reducescatter": (1, "input_tensor_lists")}
    ),
    "refusal": Collective(19, None, CONTROL),
    "scan": Collective(20, None, REDUCE, brings={"scan": (0, "tensor")}),
}
"""What ranks agree on.

Objects are observed where they are pickled, and a refusal is no call of the user's.
"""

CODES: Final = {name: row.code for name, row in COLLECTIVES.items()}
NATIVE: Final = {name: row.native for name, row in COLLECTIVES.items() if row.native is not None}
"""The numbers of those that native code knows."""

NATIVE_NAMES: Final = tuple(sorted(NATIVE, key=NATIVE.__getitem__))
"""Their names, by number."""

REDUCTIONS: Final = frozenset(name for name, row in COLLECTIVES.items() if row.kind == REDUCE)
"""Those that combine elements; all others move bytes and take every data type."""

IN_ANY_ORDER: Final = frozenset({"allreduce", "reduce", "broadcast", "scan", "transfer"})
"""Those that treat each element by itself.

So elements may travel in the order in which they lie on all ranks.
"""

COMPARES_LAST: Final = frozenset(name for name, row in COLLECTIVES.items() if row.compares_last)
