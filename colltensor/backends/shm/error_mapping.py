"""What a call came to, other than success: errors that name the ranks, the same on every rank."""

from __future__ import annotations

import array
import struct
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, NoReturn, Protocol

from colltensor.backends.base import ControlPlane
from colltensor.backends.shm.requests import Words
from colltensor.errors import (
    CollectiveError,
    CollectiveTimeoutError,
    GroupError,
    MismatchError,
    PeerLostError,
    UnsupportedDTypeError,
)
from colltensor.types import ReduceOp
from colltensor.view import BufferView

(
    DONE,
    PENDING,
    LARGE,
    REFUSED,
    MISMATCH,
    FAILED,
    STOPPED,
    SIGNALLED,
    CLOSED,
    BUSY,
    INTERRUPTED,
    INSIDE,
) = range(12)

Describe = Callable[[], str]

_LOST, _LATE, _BROKEN, _LEFT, _GONE, _UNREADABLE = range(2, 8)
_REMEDY: Final = "The group is broken: destroy it and create it again"
_REASON_S: Final = 2.0
"""How long a rank waits for the control plane to say why another broke the group."""
_WORDS_S: Final = 5.0
"""How long the exchange of words after a mismatch may take at least.

All ranks have arrived, the last one perhaps late.
"""
_REPORT_WORDS: Final = 6
_SET_WORDS: Final = 4


class AgreeingControl(ControlPlane, Protocol):
    """The part of a control plane that this backend needs.

    It includes the agreements, which find the words for a mismatch.
    """

    def agree(self, signature: bytes, describe: Describe, deadline: float) -> None:
        """Raise MismatchError on every rank where signatures differ."""

    def agree_beside(
        self, peer: int, signature: bytes, describe: Describe, deadline: float, lane: int
    ) -> None:
        """Compare with one rank, in one of several threads.

        Raises MismatchError on both where signatures differ.
        """

    def start_pair(
        self,
        peer: int,
        signature: bytes,
        describe: Describe,
        deadline: float,
        lane: int,
        bound: bool,
    ) -> None:
        """Begin to compare with one rank."""

    def finish_pair(
        self,
        peer: int,
        signature: bytes,
        describe: Describe,
        deadline: float,
        lane: int,
        bound: bool,
    ) -> None:
        """Raise MismatchError on both ranks where signatures differ."""


class ExpectedSignature:
    """What a call wants agreed, how it says so in words, and what it does once that is agreed."""

    __slots__ = ("allocate", "describe", "signature", "words")

    def __init__(
        self,
        signature: bytes,
        words: Words,
        describe: Describe,
        allocate: Callable[[], None] | None = None,
    ) -> None:
        self.signature = signature
        self.words = words
        self.describe = describe
        self.allocate = allocate


def _at_least(deadline: float) -> float:
    return max(deadline, time.monotonic() + _WORDS_S)


def derived_signature(
    name: str, words: Words, view: BufferView | None, op: ReduceOp | None, detail: str = ""
) -> ExpectedSignature:
    """Return the signature of a call that brought none, with what is known of it here."""

    def describe() -> str:
        parts = [name] if view is None else [name, f"{view.dtype}[{view.count}]"]
        parts += [] if op is None else [f"op {op.name}"]
        return ", ".join([*parts, detail] if detail else parts)

    return ExpectedSignature(struct.pack("<qqq", *words), words, describe)


class ErrorMapping:
    """Turns the library's codes into errors, for one group.

    Attributes:
        stopped: The error that ended a wait of the library's: the control plane's, or one that a
            signal's handler raised.
    """

    def __init__(self, control: AgreeingControl, native: Any, handle: int) -> None:
        self._control = control
        self._native = native
        self._handle = handle
        self._where = f"group '{control.group_name}' (rank {control.rank})"
        self.stopped: BaseException | None = None

    def stop(self) -> int:
        """Ask the control plane, while the library waits, whether the group is broken.

        Returns:
            0 if the wait may go on, 1 if the group is broken, 2 if something else was raised. A
            signal may be handled here, whose handler may raise.
        """
        try:
            self._control.check()
        except CollectiveError as error:
            self.stopped = error
            return 1
        except BaseException as error:  # noqa: BLE001 - the library would lose it; fail() raises it
            self.stopped = error
            return 2
        return 0

    def abandon(self) -> None:
        """Let no other rank wait for this one: it was interrupted in a call."""
        self._fail(_BROKEN, ())

    def propagate_failure(self, error: CollectiveError) -> None:
        """Give every rank that waits here the error with which the group broke elsewhere.

        It broke on the control plane. Without this a rank would see this one leave, and name it.
        """
        kind = _GONE if isinstance(error, PeerLostError) else _BROKEN
        self._fail(
            _LATE if isinstance(error, CollectiveTimeoutError) else kind,
            getattr(error, "ranks", ()),
        )

    def _fail(self, kind: int, ranks: Iterable[int]) -> None:
        words = array.array("Q", bytes(8 * _SET_WORDS))
        for rank in ranks:
            words[rank // 64] |= 1 << rank % 64
        self._native.shm_fail(self._handle, kind, words.buffer_info()[0])

    def mismatch(self, expected: ExpectedSignature, deadline: float) -> NoReturn:
        """Exchange descriptions with all ranks, which all found the mismatch.

        Raises:
            MismatchError: Always, but for what may go wrong in an exchange.
        """
        self._control.agree(expected.signature, expected.describe, _at_least(deadline))
        raise MismatchError(f"{self._where}: the ranks disagree about {expected.describe()}", ())

    def pair_mismatch(
        self, pairs: list[tuple[int, int, ExpectedSignature]], deadline: float
    ) -> NoReturn:
        """Exchange descriptions with one or two peers.

        ``pairs`` has source, destination and signature of each.

        Raises:
            MismatchError: Always, but for errors of the exchange itself.
        """
        deadline = _at_least(deadline)
        ordered = sorted(pairs, key=lambda pair: pair[:2])
        peers = [
            source if destination == self._control.rank else destination
            for source, destination, _ in ordered
        ]

        # All exchanges begin before one is waited for: the peers may wait for each other.
        for peer, (source, _, expected) in zip(peers, ordered, strict=True):
            self._control.start_pair(
                peer,
                expected.signature,
                expected.describe,
                deadline,
                source,
                peers.count(peer) == 1,
            )

        found: MismatchError | None = None
        for peer, (source, _, expected) in zip(peers, ordered, strict=True):
            bound = peers.count(peer) == 1
            try:
                self._control.finish_pair(
                    peer, expected.signature, expected.describe, deadline, source, bound
                )
            except MismatchError as error:
                found = found or error

        raise found or MismatchError(
            f"{self._where}: ranks {peers} disagree about a transfer", peers
        )

    def mismatch_beside(
        self, source: int, destination: int, expected: ExpectedSignature, deadline: float
    ) -> NoReturn:
        """Do as ``pair_mismatch`` for one transfer, in one of several threads."""
        peer = source if destination == self._control.rank else destination
        self._control.agree_beside(
            peer, expected.signature, expected.describe, _at_least(deadline), source
        )
        raise MismatchError(f"{self._where}: ranks {[peer]} disagree about a transfer", [peer])

    def fail(self, name: str, code: int) -> NoReturn:
        """Raise for a code that is neither success nor a mismatch.

        Raises:
            CollectiveError: Names the operation and the ranks to blame.
            BaseException: What a signal's handler raised.
        """
        if code == FAILED:
            raise self._failure(name)
        if code in (STOPPED, INTERRUPTED):
            # The control plane tells all ranks what it knows, or this rank is being destroyed and
            # about to leave.
            if code == INTERRUPTED:
                self.abandon()
            stopped, self.stopped = self.stopped, None
            # none: raised before stop() could keep it, by a signal's handler
            raise stopped or KeyboardInterrupt

        if code == REFUSED:
            raise UnsupportedDTypeError(f"{name}: {self._where}: the library has no such reduction")
        if code == BUSY:
            raise GroupError(
                f"{name}: {self._where}: another call is in progress; make one at a time"
            )
        raise GroupError(
            f"{name}: {self._where}: the group was destroyed, or belongs to the parent process"
        )

    def _failure(self, name: str) -> CollectiveError:
        report = array.array("q", bytes(8 * _REPORT_WORDS))
        self._native.shm_failure(self._handle, report.buffer_info()[0])
        kind, origin, *words = report
        ranks = [
            64 * index + bit
            for index, word in enumerate(words)
            for bit in range(64)
            if word >> bit & 1
        ]
        named = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"

        if kind == _LOST:
            return PeerLostError(f"{name}: {self._where}: {named} died. {_REMEDY}", ranks)
        if kind == _GONE:
            return PeerLostError(f"{name}: {self._where}: {named} died or left. {_REMEDY}", ranks)
        if kind == _LEFT:
            return PeerLostError(
                f"{name}: {self._where}: {named} destroyed the group or exited. {_REMEDY}", ranks
            )
        if kind == _LATE:
            return CollectiveTimeoutError(
                f"{name}: {self._where}: {named} did not come in time, as rank {origin} saw it. {_REMEDY}",
                ranks,
            )
        if kind == _UNREADABLE:
            return GroupError(
                f"{name}: {self._where}: rank {origin} could not read the memory of {named}; set "
                f"COLLTENSOR_READ_PEERS=0 on all ranks to do without. {_REMEDY}"
            )
        return self._reason(name, origin)

    def _reason(self, name: str, origin: int) -> CollectiveError:
        """Wait for the control plane to say what happened to the rank that broke the group."""
        limit = time.monotonic() + _REASON_S
        while time.monotonic() < limit:
            try:
                self._control.check()
            except CollectiveError as error:
                return error
            time.sleep(0.01)
        return GroupError(f"{name}: {self._where}: rank {origin} was interrupted. {_REMEDY}")
