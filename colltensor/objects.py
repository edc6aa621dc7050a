"""Objects: how those of ``broadcast_object`` and ``allgather_object`` are pickled.

Imports no framework.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

from colltensor.adapters import reduced
from colltensor.errors import CollectiveError


class _Pickler(pickle.Pickler):
    """Pickles tensors as their frameworks' adapters do, where these do it otherwise."""

    def reducer_override(self, obj: Any) -> Any:
        found = reduced(obj)
        return NotImplemented if found is None else found


def dumps(obj: Any) -> bytes:
    """Return an object pickled."""
    stream = io.BytesIO()
    _Pickler(stream, protocol=5).dump(obj)
    return stream.getvalue()


def loads(payload: bytes, operation: str, rank: int, of: int) -> Any:
    """Return the object that rank ``of`` pickled, in rank ``rank``.

    Raises:
        CollectiveError: It cannot be made here, for want of a package or a device, say.
    """
    try:
        return pickle.loads(payload)
    except Exception as error:
        raise CollectiveError(
            f"{operation} (rank {rank}): the object of rank {of} cannot be unpickled here ({type(error).__name__}: "
            f"{error}); it takes the packages and devices of rank {of}: move its tensors to the host before the call"
        ) from error
