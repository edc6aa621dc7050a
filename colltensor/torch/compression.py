"""Compression: how gradients are made smaller for the transport; protocol, and 16-bit floats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

import torch

from colltensor.errors import OptionError
from colltensor.torch.buckets import Bucket


class Compression(Protocol):
    """Reduces the gradients of a bucket by way of smaller tensors.

    Write one's own to this protocol. One object serves one ``sync_gradients``. It may keep a memory
    by ``bucket.names``. They stay the same for a parameter, but buckets may change once, after the
    first backward pass.
    """

    def reduce(self, bucket: Bucket) -> Iterator[torch.Tensor]:
        """Yield tensors to be averaged over the ranks; leave the gradients' average in the bucket.

        A generator. Each tensor that it yields is contiguous, with the same count and dtype on all
        ranks. When the generator goes on, that tensor holds the average, with the same bits on
        every rank. The buckets of a backward pass come in one order on all ranks. But with
        ``overlap`` the next one's first tensor may be asked for before this one's second. Called
        while autograd records nothing.

        Args:
            bucket: ``bucket.flat`` has all gradients in one tensor, ``bucket.gradients`` the same
                memory in the shapes of the parameters; changed in place.
        """
        ...


class CastCompression:
    """Sends 16-bit floats: half the bytes of float32, with 8 or 11 bits of the mantissa.

    Gradients that are no float32 or float64 go as they are. The library adds 16-bit floats in
    float32. So the sum of many ranks does not overflow where no rank's own gradient does.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __repr__(self) -> str:
        return f"CastCompression({self._dtype})"

    def reduce(self, bucket: Bucket) -> Iterator[torch.Tensor]:
        """Round the gradients, average, and widen them: see Compression."""
        flat = bucket.flat
        if flat.dtype not in COMPRESSED:
            yield flat
            return
        small = flat.to(self._dtype)
        yield small
        flat.copy_(small)


COMPRESSED: Final = (torch.float32, torch.float64)
"""The dtypes that the compressions here make smaller."""

_BY_NAME: Final = {"fp16": torch.float16, "bf16": torch.bfloat16}


def compression_of(choice: str | Compression | None) -> Compression | None:
    """Return the compression that the user means.

    Raises:
        OptionError: No such one.
    """
    if choice is None:
        return None
    if isinstance(choice, str):
        if choice in _BY_NAME:
            return CastCompression(_BY_NAME[choice])
    elif callable(getattr(choice, "reduce", None)):
        return choice
    raise OptionError(
        f"compression: expected None, {', '.join(map(repr, _BY_NAME))}, a PowerSGD() or an object with the method "
        f"reduce(bucket), got {choice!r}"
    )
