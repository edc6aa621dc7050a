"""The exceptions of ColTensor.

CollectiveError (RuntimeError)
├── OptionError (ValueError)            an argument that is no tensor and no rank
├── GroupError                          not initialised, exists already, broken, of another process
├── BackendUnavailableError             the backend cannot be used here; the message says why
├── MismatchError                       ranks disagree about a call; nothing was changed
├── PeerLostError (ConnectionError)     a rank died or left; names the ranks
├── CollectiveTimeoutError (TimeoutError)  a rank did not arrive in time; names the ranks
├── RankError (ValueError)              a rank outside the group, or taken twice
└── TensorError                         a tensor that the call cannot take
├── UnsupportedTensorError (TypeError)
├── UnsupportedDTypeError (TypeError)
├── ReadOnlyError (ValueError)
├── DeviceError (ValueError)
├── ShapeError (ValueError)
└── AliasError (ValueError)         outputs that share memory
"""

from __future__ import annotations

import contextlib
import copy
import errno
import inspect
from collections.abc import Iterable, Iterator
from types import FrameType


class CollectiveError(RuntimeError):
    """Base of every error that ColTensor raises on purpose."""


class _RanksError(CollectiveError):
    """Base of the errors that name ranks."""

    def __init__(self, message: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)

    def __reduce__(self) -> tuple[type, tuple[str, tuple[int, ...]]]:
        return type(self), (str(self), self.ranks)


class OptionError(CollectiveError, ValueError):
    """An option has a value that no call could use."""


class GroupError(CollectiveError):
    """The group does not exist, exists already, is broken, or belongs to another process."""


class BackendUnavailableError(CollectiveError):
    """The backend cannot be used here."""


class MismatchError(_RanksError):
    """The ranks of a group disagree about a call; no data was changed and the group goes on.

    There are two exceptions. Where a ``sendrecv`` is agreed with one peer and not with the other,
    the agreed transfer is made, because that peer counts on it. Where ranks wait for each other in
    a circle, so that none can go on, the group is broken, as the message says.

    Attributes:
        ranks: The ranks that differ from the majority (from rank 0 where there is none), or all of
            the circle.
    """


class PeerLostError(_RanksError, ConnectionError):
    """A rank died, left or cannot be reached; the group is broken.

    Attributes:
        ranks: The ranks that are lost.
    """


class CollectiveTimeoutError(_RanksError, TimeoutError):
    """A rank did not arrive within the group's timeout; the group is broken.

    Attributes:
        ranks: The ranks that are late, as far as they could be told.
    """


class RankError(CollectiveError, ValueError):
    """A rank outside ``range(world_size)``, one's own rank as a peer, or a rank taken twice."""


class TensorError(CollectiveError):
    """Base of the errors about one tensor."""


class UnsupportedTensorError(TensorError, TypeError):
    """The object is no tensor that a collective can work on."""


class UnsupportedDTypeError(TensorError, TypeError):
    """The data type cannot be used in this operation."""


class ReadOnlyError(TensorError, ValueError):
    """The call would write to memory that must not be written."""


class DeviceError(TensorError, ValueError):
    """The tensor is on a device that the group's backend cannot reach."""


class ShapeError(TensorError, ValueError):
    """A tensor or a list of tensors has the wrong shape or length."""


class AliasError(TensorError, ValueError):
    """Two buffers of one call share memory, at least one of them to be written."""


def class_name(error: CollectiveError) -> str:
    """Return the name of the class in this module that an error is of, for ``rebuilt``."""
    names = (kind.__name__ for kind in type(error).__mro__ if globals().get(kind.__name__) is kind)
    return str(next(names))


def rebuilt(name: str, message: str, ranks: Iterable[int]) -> CollectiveError:
    """Return the error that another rank has told of.

    One of a class that is not known is a GroupError.
    """
    kind = globals().get(name)
    if not (isinstance(kind, type) and issubclass(kind, CollectiveError)):
        return GroupError(message)
    return kind(message, ranks) if issubclass(kind, _RanksError) else kind(message)


def without_frames(error: CollectiveError) -> CollectiveError:
    """Return a copy to keep where the error itself is raised.

    The error itself would keep the frames that it passes. With them it would keep what the caller
    drops: tensors, and the group.
    """
    return copy.copy(error)


def say_timed_out(error: CollectiveTimeoutError, timeout_s: float) -> None:
    """Say in a timeout's message that it timed out and after how long, if it does not."""
    if "timed out after" not in str(error):
        error.args = f"{error} (timed out after {timeout_s:g} s)", *error.args[1:]


@contextlib.contextmanager
def saying_timed_out(timeout_s: float) -> Iterator[None]:
    """Do as ``say_timed_out`` with the timeout of what is done inside."""
    try:
        yield
    except CollectiveTimeoutError as error:
        say_timed_out(error, timeout_s)
        raise


def remedy_for_system(error: BaseException, otherwise: str) -> str:
    """Return what to do about what the system refused this process, for the end of a message."""
    code = getattr(error, "errno", None)
    if code in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n)"
    if code in (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP):
        return "the system does not permit it: a seccomp filter, a security module or an old kernel"
    if isinstance(error, RuntimeError) and "new thread" in str(error):
        return "raise the limit of threads (ulimit -u, or the container's limit of pids)"
    return otherwise


def is_from_handler(error: BaseException) -> bool:
    """Return whether a signal's handler raised an error.

    It may be of any class, and come in the middle of any call. Python gives a handler the frame
    that it interrupts. So the handler's own frame has its caller's among its arguments.
    """
    traceback = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        code = frame.f_code
        number = (
            code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
        )

        for name in code.co_varnames[:number]:
            value = frame.f_locals.get(name)
            given = value if value.__class__ is tuple else (value,)
            if any(isinstance(entry, FrameType) and entry is frame.f_back for entry in given):
                return True

        traceback = traceback.tb_next
    return False
