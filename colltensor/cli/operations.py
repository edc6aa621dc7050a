"""What a benchmark measures: the collectives, their sizes, bandwidths and data, and their results.

Sizes, bandwidths and factors are those of nccl-tests: "Performance reported by NCCL tests",
https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md, and src/gather.cu, scatter.cu
and sendrecv.cu.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from colltensor.types import DTYPES

if TYPE_CHECKING:
    import numpy as np

_VALUES: Final = 7
"""How many there are in the data, 0 to 6, so that every sum is exact."""

_EXACT: Final = {"int8": 127, "uint8": 255, "bfloat16": 256, "float16": 2048}
"""Up to where types have all whole numbers; the others go further than there are ranks."""

_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective.

    Attributes:
        links: The bus bandwidth is the algorithm bandwidth times this and, if ``shared``, times
            (n-1)/n.
        shared: See there.
        blocks_in: Whether a rank's input has a block for each rank.
        blocks_out: Whether its output has.
        root_only: Whether rank 0 alone has a result.
    """

    links: int = 1
    shared: bool = True
    blocks_in: bool = False
    blocks_out: bool = False
    root_only: bool = False

    def bus_factor(self, world_size: int) -> float:
        """Return the bus bandwidth in algorithm bandwidths."""
        return self.links * ((world_size - 1) / world_size if self.shared else 1.0)

    def count(self, nbytes: int, itemsize: int, world_size: int) -> int:
        """Return the elements of a block, at least one, where the larger buffer has ``nbytes``."""
        blocks = world_size if self.blocks_in or self.blocks_out else 1
        return max(1, nbytes // (itemsize * blocks))

    def nbytes(self, count: int, itemsize: int, world_size: int) -> int:
        """Return the size of the larger buffer, by which bandwidths go."""
        blocks = world_size if self.blocks_in or self.blocks_out else 1
        return count * itemsize * blocks


OPERATIONS: Final = {
    "allreduce": Collective(links=2),
    "reduce": Collective(shared=False, root_only=True),
    "broadcast": Collective(shared=False),
    "allgather": Collective(blocks_out=True),
    "gather": Collective(blocks_out=True, root_only=True),
    "scatter": Collective(blocks_in=True),
    "reducescatter": Collective(blocks_in=True),
    "alltoall": Collective(blocks_in=True, blocks_out=True),
    "sendrecv": Collective(shared=False),
}
"""By name. The root is rank 0.

``sendrecv`` sends to the next rank and receives from the one before, in a ring.
"""


def check_dtype(name: str, world_size: int) -> None:
    """Check that sums of a type can be checked.

    Raises:
        ValueError: There is no such type, or the sum of so many ranks does not fit into it.
    """
    if name not in DTYPES or name == "bool" or DTYPES[name].moves_only:
        known = [each for each in DTYPES if each != "bool" and not DTYPES[each].moves_only]
        raise ValueError(f"--dtypes: expected some of {', '.join(known)}, got {name!r}")
    if (_VALUES - 1) * world_size > _EXACT.get(name, 1 << 15):
        raise ValueError(f"--dtypes: the sums of {world_size} ranks are not exact in {name}")


def dtype_of(name: str) -> np.dtype[Any]:
    """Return numpy's dtype of this name."""
    import ml_dtypes
    import numpy as np

    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def data(operation: str, rank: int, world_size: int, count: int, dtype: str) -> np.ndarray:
    """Return a rank's input, in which its rank and its blocks can be told by a few elements."""
    import numpy as np

    collective = OPERATIONS[operation]
    blocks = [_block(rank, number, count) for number in range(world_size)]
    array = np.stack(blocks) if collective.blocks_in else blocks[0]
    return array.astype(dtype_of(dtype))


def expected(operation: str, rank: int, world_size: int, count: int) -> np.ndarray | None:
    """Return what a rank must have afterwards; None where that is nothing."""
    import numpy as np

    if OPERATIONS[operation].root_only and rank != 0:
        return None

    of_all = [_block(other, 0, count) for other in range(world_size)]
    if operation in ("allreduce", "reduce"):
        total: np.ndarray = np.sum(of_all, axis=0)
        return total
    if operation in ("allgather", "gather"):
        return np.stack(of_all)
    if operation == "broadcast":
        return of_all[0]
    if operation == "sendrecv":
        return of_all[rank - 1]
    if operation == "scatter":
        return _block(0, rank, count)

    for_me = np.stack([_block(other, rank, count) for other in range(world_size)])
    right: np.ndarray = np.sum(for_me, axis=0) if operation == "reducescatter" else for_me
    return right


def wrong(result: np.ndarray, right: np.ndarray) -> int:
    """Return how many elements are not what they must be."""
    import numpy as np

    if result.size != right.size:
        return right.size
    wide = result.reshape(-1).astype(complex if result.dtype.kind == "c" else float)
    return int(np.count_nonzero(wide != right.reshape(-1)))


def _block(rank: int, number: int, count: int) -> np.ndarray:
    """Return a block that looks random: a hash of its rank, its number and the place in it."""
    import numpy as np

    mixed: np.ndarray = np.arange(count, dtype=np.uint64)
    mixed = mixed + np.uint64((rank * 1_000_003 + number) << 32)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)  # as splitmix64 does
    values: np.ndarray = (mixed ^ (mixed >> np.uint64(31))) % np.uint64(_VALUES)
    return values.astype(np.int64)


def sizes_of(text: str) -> tuple[int, ...]:
    """Return the sizes of a list such as "4,1K,1M", in bytes.

    Raises:
        ValueError: One is no size.
    """
    return tuple(_size(word) for word in text.split(",") if word.strip())


def sizes_between(smallest: str, largest: str, factor: int) -> tuple[int, ...]:
    """Return the sizes from one to another, each so many times the one before.

    Raises:
        ValueError: One is no size, or there are none between them.
    """
    size, last = _size(smallest), _size(largest)
    if size > last:
        raise ValueError(f"--min {smallest} is larger than --max {largest}")
    sizes = []
    while size <= last:
        sizes.append(size)
        size *= factor
    return tuple(sizes)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)(i?B)?", text.strip(), re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise ValueError(f"expected a size in bytes, as in 4, 1K or 16M, got {text!r}")
    return int(match[1]) * _UNITS[match[2].upper()]


def spelt(nbytes: float) -> str:
    """Return a size as it is written on the command line, as far as it is round."""
    for unit in ("", "K", "M"):
        if nbytes < 1024 or nbytes % 1024:
            return f"{nbytes:.0f}{unit}"
        nbytes /= 1024
    return f"{nbytes:.0f}G"
