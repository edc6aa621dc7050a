"""What breaks a group, and what its calls raise then."""

from __future__ import annotations

import logging
from typing import Final, NoReturn

from colltensor.control import Control
from colltensor.engine.agreement import Agreement, verdict
from colltensor.errors import (
    CollectiveError,
    CollectiveTimeoutError,
    GroupError,
    is_from_handler,
    say_timed_out,
    without_frames,
)
from colltensor.work import consequence

_log: Final = logging.getLogger(__name__)


class Breakable:
    """The part of the engine that knows whether the group is broken.

    Attributes:
        broken: The error that broke the group, or None.
        timeout_s: How long a call waits for other ranks.
    """

    def __init__(
        self, name: str, rank: int, control: Control | None, agreement: Agreement, timeout_s: float
    ) -> None:
        self._name = name
        self._rank = rank
        self._control = control
        self._agreement = agreement
        self.timeout_s = timeout_s
        self.broken: CollectiveError | None = None
        self._unraised: CollectiveError | None = None
        self._kept: list[object] = []

    def check(self, name: str) -> None:
        """Raise GroupError if the group is broken or destroyed."""
        if self.broken is not None:
            raise self._refusal(name)

    def check_issued(self, name: str) -> None:
        """Raise what a call fails with that was issued before the group broke or was destroyed.

        Returns if the group is whole.
        """
        if self.broken is not None:
            raise self._consequence(name)

    def abort(self, name: str, error: BaseException) -> NoReturn:
        """Break the group over what a fast call raised, and raise what the caller gets."""
        found = self._verdict(name, error)
        self._agreement.abandon_pending()
        if found is error:
            raise error
        raise found from error

    def device_failed(self, error: CollectiveError) -> None:
        """Break the group over what went wrong on a device after a call had returned.

        The next call raises it.
        """
        if self.broken is None:
            self.broken, self._unraised = without_frames(error), error
            _log.info("group %r (rank %d): broken: %s", self._name, self._rank, error)
        self._agreement.propagate_failure(error)

    def _refusal(self, name: str) -> CollectiveError:
        """Return what a call on a broken group raises.

        The first time it is the error that has broken the group, if no call has raised that.
        """
        unraised, self._unraised = self._unraised, None
        if unraised is not None:
            return unraised
        error = GroupError(
            f"{name}: group '{self._name}' (rank {self._rank}) cannot be used any more: {self.broken}; destroy it "
            "and make it again on all ranks"
        )
        error.__cause__ = self.broken
        return error

    def _consequence(self, name: str) -> CollectiveError:
        """Return what a call fails with that was issued before the group broke.

        It has the same class, with the same ranks.
        """
        lost = None
        if self._unraised is None:
            lost = consequence(name, self._name, self._rank, self.broken)
        return lost or self._refusal(name)

    def _break(self, name: str, error: BaseException, kept: object) -> None:
        """Break the group over ``error``; raises what the caller gets unless it is that.

        ``kept`` stays until the group is destroyed: a provider may still write to the memory of a
        call that failed.
        """
        self._kept.append(kept)
        found = self._verdict(name, error)
        if found is not error:
            raise found from error

    def _verdict(self, name: str, error: BaseException) -> BaseException:
        """Break the group over ``error``, notify the peers, and return what the caller gets."""
        control = self._control
        if control is None:
            return error
        if self.broken is not None:
            return without_frames(self.broken)
        found = verdict(control, name, error)
        if type(found) is GroupError and isinstance(found.__cause__, CollectiveError):
            found = found.__cause__  # another thread of this rank has raised it already
        if isinstance(found, CollectiveTimeoutError):
            say_timed_out(found, self.timeout_s)
        self.broken = without_frames(found)
        _log.info("group %r (rank %d): broken: %s", self._name, self._rank, self.broken)
        self._agreement.propagate_failure(found)
        interrupted = not isinstance(error, (RuntimeError, OSError)) or is_from_handler(error)
        return error if interrupted else found
