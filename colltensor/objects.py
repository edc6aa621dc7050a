"""Objects: how those of ``broadcast_object`` and ``allgather_object`` are pickled.

Unpickling may call any function that the sender names. A group made with ``allow_pickle=False``
unpickles what needs none: numbers, strings, bytes, None, and tuples, lists, dicts and sets of them.
So the package's own exchanges go on.
"""

from __future__ import annotations

import io
import pickle
from typing import Any, Final

from colltensor.adapters import reduced
from colltensor.environment import ALLOW_PICKLE, is_on
from colltensor.errors import CollectiveError
from colltensor.types import DTYPES

_PLAIN: Final = {
    ("builtins", "complex"),
    ("colltensor.replicas", "Leaf"),
    ("colltensor.replicas", "Plain"),
    ("colltensor.torch.agreement", "Report"),
}
"""Classes that plain data and the package's own exchanges take.

Making one does nothing else, nor does changing it.
"""

_DTYPE: Final = ("colltensor.types", "_named")
"""Likewise, but for a function, whose attributes a pickle could change."""


class _Pickler(pickle.Pickler):
    """Pickles tensors as their frameworks' adapters do, where these do it otherwise."""

    def reducer_override(self, obj: Any) -> Any:
        found = reduced(obj)
        return NotImplemented if found is None else found


class _NotPlainError(Exception):
    """A class or function that is no plain data, by its name."""


class _PlainUnpickler(pickle.Unpickler):
    """Makes plain data, and looks up no class or function but the package's own."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == _DTYPE:
            return DTYPES.__getitem__
        if (module, name) not in _PLAIN:
            raise _NotPlainError(f"{module}.{name}")
        return super().find_class(module, name)


def pickle_allowed(given: bool | None) -> bool:
    """Return whether a group unpickles objects.

    It does as asked, else as the environment says, else it does.

    Raises:
        OptionError: ``COLLTENSOR_ALLOW_PICKLE`` is neither 0 nor 1.
    """
    return is_on(ALLOW_PICKLE) if given is None else bool(given)


def dumps(obj: Any) -> bytes:
    """Return an object pickled."""
    stream = io.BytesIO()
    _Pickler(stream, protocol=5).dump(obj)
    return stream.getvalue()


def loads(payload: bytes, operation: str, rank: int, of: int, *, allow_pickle: bool) -> Any:
    """Return the object that rank ``of`` pickled, in rank ``rank``.

    Without ``allow_pickle`` it is plain data only.

    Raises:
        CollectiveError: It cannot be made here, for want of a package or a device, say, or is no
            plain data.
    """
    try:
        return (
            pickle.loads(payload) if allow_pickle else _PlainUnpickler(io.BytesIO(payload)).load()
        )
    except _NotPlainError as refused:
        raise CollectiveError(
            f"{operation} (rank {rank}): the object of rank {of} holds {refused}, which this rank does not unpickle "
            f"(allow_pickle=False, or {ALLOW_PICKLE}=0); send numbers, strings, bytes, None and tuples, lists, dicts "
            "and sets of them, and tensors by broadcast or allgather"
        ) from None
    except Exception as error:
        # Of any class: unpickling calls whatever the sender names.
        raise CollectiveError(
            f"{operation} (rank {rank}): the object of rank {of} cannot be unpickled here ({type(error).__name__}: "
            f"{error}); it takes the packages and devices of rank {of}: move its tensors to the host before the call"
        ) from error
