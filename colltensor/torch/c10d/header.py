"""Header: what goes before a message between two ranks, and a short message itself."""

from __future__ import annotations

import ctypes
import struct
import zlib
from typing import Final

import torch

_DTYPES: Final = {
    zlib.crc32(str(dtype).encode()): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}
_CODES: Final = {dtype: code for code, dtype in _DTYPES.items()}
_WORDS: Final = struct.Struct("=qqqq")
_INLINE_NBYTES: Final = 2048
"""How long a message may be that travels in its header: a second transfer would take longer than its copy."""


class Header:
    """Memory for the header of one message after another: number, tag, bytes, dtype, and a short message's bytes.

    It has one length always, because whoever receives it does not know the message's yet.

    Attributes:
        tensor: What is sent and received.
    """

    def __init__(self) -> None:
        self._memory = bytearray(_WORDS.size + _INLINE_NBYTES)
        self.tensor = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._message = self.tensor.data_ptr() + _WORDS.size

    def write(self, tensor: torch.Tensor, number: int, tag: int) -> bool:
        """Fill in what goes before a contiguous tensor; True if it is in there itself."""
        nbytes = tensor.nbytes
        _WORDS.pack_into(self._memory, 0, number, tag, nbytes, _CODES[tensor.dtype])
        if nbytes > _INLINE_NBYTES:
            return False
        ctypes.memmove(self._message, tensor.data_ptr(), nbytes)
        return True

    def read(self) -> tuple[int, int, int, torch.dtype, bool]:
        """Return the message's number, tag, number of bytes and dtype, and whether it is in here."""
        number, tag, nbytes, code = _WORDS.unpack_from(self._memory)
        return number, tag, nbytes, _DTYPES[code], nbytes <= _INLINE_NBYTES

    def copy_to(self, tensor: torch.Tensor) -> None:
        """Copy the message that is in here into a contiguous tensor of its length."""
        ctypes.memmove(tensor.data_ptr(), self._message, tensor.nbytes)
