"""Where in their pages arrays begin.

On some processors it decides how fast they are copied (native/include/colltensor/copy.h).
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

PAGE = 4096
NUMPY_PLACE = 16
"""Where numpy's arrays of 128 KiB and more begin, as long as glibc maps memory for each of them."""


def array_at(place: int, count: int, *, small_pages: bool = False) -> np.ndarray:
    """Return memory for so many float32 numbers that begins ``place`` bytes into a page of 4 KiB.

    Args:
        place: The bytes, a multiple of 4.
        count: The numbers.
        small_pages: Whether the kernel must take pages of 4 KiB, and not the huge ones that numpy asks for.
    """
    nbytes = 4 * count + 2 * PAGE
    if small_pages:
        memory = mmap.mmap(-1, nbytes)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        raw = np.frombuffer(memory, np.uint8)
    else:
        raw = np.empty(nbytes, np.uint8)
    start = (place - raw.ctypes.data) % PAGE
    return raw[start : start + 4 * count].view(np.float32)


def place_of(array: Any) -> str:
    """Say where a numpy array or a torch tensor begins."""
    address = array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()
    return f"{address % PAGE} bytes into a page"
