"""Data types, devices and reduce operations, independent of any framework."""

from __future__ import annotations

import enum
from typing import Final, NoReturn

from colltensor.errors import OptionError


class DType:
    """A data type that collectives know. One instance exists per type; compare with ``is``.

    Attributes:
        name: numpy's or ml_dtypes' name of the type, ``"float32"`` or ``"bfloat16"``.
        itemsize: Bytes of one element.
        kind: ``"b"`` bool, ``"i"`` signed, ``"u"`` unsigned, ``"f"`` float, ``"c"`` complex.
        code: A small number, the same in every process, for messages between ranks.
        moves_only: True where no reduction is defined (the float8 types).
    """

    __slots__ = ("code", "itemsize", "kind", "moves_only", "name")

    def __init__(
        self, name: str, itemsize: int, kind: str, code: int, *, moves_only: bool = False
    ) -> None:
        self.name: Final = name
        self.itemsize: Final = itemsize
        self.kind: Final = kind
        self.code: Final = code
        self.moves_only: Final = moves_only

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> str | tuple[object, ...]:
        return _named, (self.name,)

    def __setstate__(self, state: object) -> NoReturn:
        raise TypeError("data types are shared by the whole process, and no pickle changes them")


def _named(name: str) -> DType:
    return DTYPES[name]


def _all_dtypes() -> dict[str, DType]:
    # In this order, because a type's place is its code, which ranks send each other.
    plain = [("bool", 1, "b")]
    plain += [(f"int{bits}", bits // 8, "i") for bits in (8, 16, 32, 64)]
    plain += [(f"uint{bits}", bits // 8, "u") for bits in (8, 16, 32, 64)]
    plain += [("float16", 2, "f"), ("bfloat16", 2, "f"), ("float32", 4, "f"), ("float64", 8, "f")]
    plain += [("complex64", 8, "c"), ("complex128", 16, "c")]
    dtypes = {name: DType(name, size, kind, code) for code, (name, size, kind) in enumerate(plain)}

    small = "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu", "e4m3", "e3m4", "e4m3b11fnuz"
    for name in (f"float8_{bits}" for bits in small):
        dtypes[name] = DType(name, 1, "f", len(dtypes), moves_only=True)
    return dtypes


DTYPES: Final = _all_dtypes()
"""Every known data type by name."""

UINT8: Final = DTYPES["uint8"]


class Device:
    """A device: its type (``"cpu"``, ``"cuda"``) and index. Compare with ``==``."""

    __slots__ = ("index", "type")

    def __init__(self, type: str, index: int) -> None:
        self.type: Final = type
        self.index: Final = index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.type == other.type and self.index == other.index

    def __hash__(self) -> int:
        return hash((self.type, self.index))

    def __repr__(self) -> str:
        return self.type if self == CPU else f"{self.type}:{self.index}"


CPU: Final = Device("cpu", 0)


class ReduceOp(enum.IntEnum):
    """How elements are combined; the first five, numbers included, as in Ray's collectives."""

    SUM = 0
    PRODUCT = 1
    MIN = 2
    MAX = 3
    AVERAGE = 4
    BAND = 5
    BOR = 6
    BXOR = 7

    __hash__ = int.__hash__  # Enum's own is a Python function, on the path of every call

    @classmethod
    def of(cls, op: object) -> ReduceOp:
        """Return ``op`` as a ReduceOp; accepts ray.util.collective's and torch's by name.

        Raises:
            OptionError: ``op`` is no reduce operation.
        """
        if isinstance(op, cls):
            return op
        name = getattr(op, "name", None) or str(op).rpartition(".")[2]
        name = {"AVG": "AVERAGE"}.get(name, name)
        if not isinstance(op, (int, str)) and name in cls.__members__:
            return cls[name]
        raise OptionError(
            f"op must be a colltensor.ReduceOp ({', '.join(cls.__members__)}), got {op!r}"
        )
