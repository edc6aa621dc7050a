"""How the ranks of a call agree before its payload moves: a class a mode.

All ranks of a group are in one mode. ``Agreement`` itself is the mode of a group of one rank, which
agrees with nobody.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Final

from colltensor.backends.base import AgreeingBackend, Backend, PiggybackingBackend
from colltensor.control import Control
from colltensor.engine.call import Call, Transfer
from colltensor.errors import CollectiveError, GroupError, MismatchError, is_from_handler
from colltensor.operations import IN_ANY_ORDER

NESTED: Final[Callable[[], None]] = lambda: None  # noqa: E731
"""What ``begin`` returns where this thread is inside another call of the group, which goes on."""


class Agreement:
    """The agreement of a group of one rank: none. The others override what differs.

    Attributes:
        sequence: The number of the last collective of host tensors.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self.sequence = 0

    def begin(self, call: Call, deadline: float) -> Callable[[], None] | None:
        """Let the ranks concerned agree on a call.

        Returns once they have all arrived, with its results allocated. A backend that agrees by
        itself does both later, when the payload is moved. ``end`` must follow, whatever happens,
        unless it returns NESTED.

        Returns:
            None where the payload is to be moved; else what combines a payload that has come with
            the agreement, or NESTED.

        Raises:
            MismatchError: On every rank; no data was changed.
            PeerLostError: A rank died or left.
            CollectiveTimeoutError: A rank did not come before the deadline.
            GroupError: This thread's last call was interrupted before it ended.
        """
        call.allocate_result()
        return None

    def end(self) -> None:
        """Note that the call is over."""

    def begin_beside(self, call: Call, transfer: Transfer, deadline: float) -> None:
        """Let two ranks agree on a transfer beside other threads' transfers.

        ``end_beside`` must follow, whatever happens.
        """
        transfer.buffers.allocate_result()

    def end_beside(self, transfer: Transfer) -> None:
        """Note that the transfer is over."""

    def agree_on_transfers(
        self,
        call: Call,
        transfers: Sequence[Transfer],
        deadline: float,
        make_alone: Callable[[Transfer], None],
    ) -> None:
        """Agree on transfers on the control plane; see ``ExchangedAgreement``."""

    def transfers(self, source: int, destination: int) -> int:
        """Return how many transfers this rank has begun from one rank to another.

        This rank is one of the two.
        """
        return 0

    def collectives(self, in_native: bool) -> int:
        """Return how many collectives this rank has begun.

        Args:
            in_native: Whether it is in a fast call, of which the engine knows nothing.
        """
        return self.sequence

    def native_peers(self) -> tuple[int, int]:
        """Return to which rank the backend's call sends and from which it receives; -1 for none."""
        return -1, -1

    def peer(self, transfer: Transfer) -> int:
        """Return the other rank of a transfer."""
        return transfer.destination if transfer.source == self._rank else transfer.source

    def terms(self, transfer: Transfer, fused: bool) -> tuple[int, bytes, Callable[[], str]]:
        """Return the peer of a transfer, its signature, and the signature in words."""
        fused = fused or len(transfer.buffers.views) == 1  # one tensor travels alone either way
        number = self.transfers(transfer.source, transfer.destination) + 1
        signature = transfer.signature(number, fused)
        return self.peer(transfer), signature, transfer.describer(number, fused)

    def is_inside(self) -> bool:
        """Return whether this thread is in a fast call, whose wait runs Python code now."""
        return False

    def is_pending(self) -> bool:
        """Return whether this thread is between the two steps of a fast call.

        True also if it was interrupted there.
        """
        return False

    def is_in_call(self) -> bool:
        """Return whether a call of host tensors has begun and not ended, in whichever thread."""
        return False

    def progress(self) -> int:
        """Return -1 while no fast call runs, else a number that grows from call to call."""
        return -1

    def abandon_pending(self) -> None:
        """Forget a fast call that was interrupted between its steps."""

    def propagate_failure(self, error: CollectiveError, raises: bool = True) -> None:
        """Let the call of every rank that waits end with an error.

        The group is broken for that rank.

        Args:
            error: The error.
            raises: Whether the caller raises it; else the calls of this rank that wait do.
        """


class ExchangedAgreement(Agreement):
    """The ranks exchange what they call on the control plane, before a payload moves."""

    def __init__(self, rank: int, control: Control, before_payloads: bool) -> None:
        """Agree with the other ranks.

        Args:
            rank: This rank.
            control: Their control plane.
            before_payloads: Whether they agree on calls with a payload too, not only on those
                without.
        """
        super().__init__(rank)
        self._control = control
        self._before_payloads = before_payloads

    def begin(self, call: Call, deadline: float) -> Callable[[], None] | None:
        """Exchange signatures; see ``Agreement``."""
        if self._before_payloads or not call.buffers:
            if call.transfers is None:
                self._agree(call, deadline)
            else:
                make_alone = functools.partial(Transfer.make_alone, deadline=deadline)
                self.agree_on_transfers(call, call.transfers, deadline, make_alone)
        call.allocate_result()
        return None

    def _agree(self, call: Call, deadline: float) -> None:
        self.sequence = sequence = self.sequence + 1
        control = self._control
        control.position(sequence, call.name, control.others)
        argument = call.argument
        order = argument.order() if argument is not None and call.name in IN_ANY_ORDER else 0
        alike = control.agree(
            call.signature(sequence), lambda: call.describe(sequence), deadline, order
        )
        if argument is not None and order and alike:
            argument.straighten()

    def end(self) -> None:
        """Let ranks that ask hear that this one is in no call."""
        self._control.position(self.sequence, None, None)

    def begin_beside(self, call: Call, transfer: Transfer, deadline: float) -> None:
        """Exchange signatures with the other rank; see ``Agreement``."""
        control = self._control
        peer, signature, describe = self.terms(transfer, call.fused)
        control.cross(transfer.source, transfer.destination, f"{call.name} with rank {peer}")
        order = transfer.buffers.order()
        alike = control.agree_beside(peer, signature, describe, deadline, transfer.source, order)
        if order and alike:
            transfer.buffers.straighten()
        transfer.buffers.allocate_result()

    def end_beside(self, transfer: Transfer) -> None:
        """Let ranks that ask hear that this one is not in it any more."""
        self._control.cross(transfer.source, transfer.destination, None)

    def agree_on_transfers(
        self,
        call: Call,
        transfers: Sequence[Transfer],
        deadline: float,
        make_alone: Callable[[Transfer], None],
    ) -> None:
        """Start all agreements before waiting for one; both ends of a pair take them in one order.

        Where one of two transfers is agreed and the other is not, the agreed one is made, because
        its other end goes on with it. Then the mismatch is raised.
        """
        control = self._control
        peers = [self.peer(transfer) for transfer in transfers]

        started = []
        for transfer in sorted(transfers, key=lambda transfer: transfer[:2]):
            peer, signature, describe = self.terms(transfer, call.fused)
            control.position(self.sequence, f"{call.name} with rank {peer}", peers)
            # else this rank both sends and receives: no peer waits for what it lacks
            bound, order = peers.count(peer) == 1, transfer.buffers.order()
            terms = peer, signature, describe, deadline, transfer.source, bound, order
            control.start_pair(*terms)
            started.append((transfer, terms))

        mismatch: MismatchError | None = None
        agreed = []
        for transfer, terms in started:
            try:
                if control.finish_pair(*terms) and terms[-1]:
                    transfer.buffers.straighten()
                agreed.append(transfer)
            except MismatchError as error:
                if control.broken is not None:
                    raise  # the ranks wait for each other: no end of a pair goes on
                mismatch = error

        if mismatch is not None:
            for transfer in agreed:
                make_alone(transfer)
            raise mismatch

    def transfers(self, source: int, destination: int) -> int:
        """Return what the control plane has counted."""
        peer = destination if source == self._rank else source
        return self._control.transfers(peer, source)

    def is_in_call(self) -> bool:
        """Return what the control plane knows."""
        return self._control.is_in_call()

    def propagate_failure(self, error: CollectiveError, raises: bool = True) -> None:
        """Break the group on the control plane."""
        self._control.fail(error, raises)


class PiggybackedAgreement(ExchangedAgreement):
    """Likewise, but the payload of a small allreduce travels in the same exchange."""

    def __init__(
        self, rank: int, control: Control, before_payloads: bool, backend: PiggybackingBackend
    ) -> None:
        super().__init__(rank, control, before_payloads)
        self._backend = backend

    def begin(self, call: Call, deadline: float) -> Callable[[], None] | None:
        """Exchange signatures and small payloads; see ``Agreement``."""
        backend, control = self._backend, self._control
        if call.name != "allreduce" or not backend.piggybacks(*call.arguments):
            return super().begin(call, deadline)
        self.sequence = sequence = self.sequence + 1
        control.position(sequence, call.name, control.others)

        # Nothing is written to but staging memory: results are allocated once the ranks agree.
        allocates = False
        for buffers in call.buffers:
            if buffers.allocates:
                buffers.check()
                allocates = True
            if buffers.staged:
                buffers.load()

        views, op = call.arguments
        contributions = control.agree_and_gather(
            call.signature(sequence), backend.pack(views), lambda: call.describe(sequence), deadline
        )

        if allocates:
            call.allocate_result()
        return functools.partial(backend.unpack, views, op, contributions)


class BackendAgreement(ExchangedAgreement):
    """The backend compares signatures itself, while the ranks arrive with their payload.

    What moves on the control plane is agreed through the backend as well, so that it meets every
    other call. Fast calls are counted by the backend alone.
    """

    def __init__(
        self,
        rank: int,
        control: Control,
        backend: AgreeingBackend,
        where: str,
        is_nested: Callable[[], bool],
    ) -> None:
        """Agree through a backend.

        Args:
            rank: This rank.
            control: The control plane, for what other ranks ask.
            backend: The backend.
            where: The group and rank, for messages.
            is_nested: Returns whether this thread is in a call of the group that will go on.
        """
        super().__init__(rank, control, False)
        self._backend = backend
        self._where = where
        self._is_nested = is_nested
        self._joined: set[tuple[int, int]] = set()

    def begin(self, call: Call, deadline: float) -> Callable[[], None] | None:
        """Take the backend's turn and set the signature that it will compare; see ``Agreement``."""
        backend = self._backend
        if not backend.hold(deadline):
            if self._is_nested():
                return NESTED
            raise GroupError(
                f"{call.name}: {self._where}: a call was interrupted before it ended; make one at a time"
            )

        # lists, not generators, on paths that every call takes: a frame each
        allocates = any([buffers.allocates for buffers in call.buffers])  # noqa: C419
        allocate_result = call.allocate_result if allocates else None
        if call.transfers is None:
            self._set_signature(call, allocate_result, deadline)
            return None

        for transfer in call.transfers:
            peer, signature, describe = self.terms(transfer, call.fused)
            self._control.position(self.sequence, f"{call.name} with rank {peer}", None)
            backend.set_transfer_signature(
                transfer.source, transfer.destination, signature, describe, allocate_result
            )
        return None

    def _set_signature(
        self, call: Call, allocate_result: Callable[[], None] | None, deadline: float
    ) -> None:
        sequence = self.sequence = self._backend.calls() + 1
        self._control.position(sequence, call.name, None)
        self._backend.set_signature(
            call.signature(sequence), lambda: call.describe(sequence), allocate_result
        )
        if not call.buffers and call.name != "barrier":
            self._backend.agree(deadline)

    def end(self) -> None:
        """Give the backend's turn back."""
        self._backend.release()
        self._control.position(self.sequence, None, None)

    def begin_beside(self, call: Call, transfer: Transfer, deadline: float) -> None:
        """Join the transfers of other threads and set the signature; see ``Agreement``."""
        source, destination, buffers, _ = transfer
        peer, signature, describe = self.terms(transfer, call.fused)
        self._control.cross(source, destination, f"{call.name} with rank {peer}")
        self._backend.join(deadline)
        self._joined.add((source, destination))
        allocate_result = buffers.allocate_result if buffers.allocates else None
        self._backend.set_transfer_signature(
            source, destination, signature, describe, allocate_result
        )

    def end_beside(self, transfer: Transfer) -> None:
        """Leave those of the other threads, if it has joined them."""
        ends = transfer.source, transfer.destination
        if ends in self._joined:
            self._joined.discard(ends)
            self._backend.part(*ends)
        super().end_beside(transfer)

    def transfers(self, source: int, destination: int) -> int:
        """Return what the backend has counted."""
        return self._backend.transfers(source, destination)

    def collectives(self, in_native: bool) -> int:
        """Return what the backend has counted at the end of each, and the one that runs."""
        calls = self._backend.calls()
        return calls + 1 if in_native else max(calls, self.sequence)

    def native_peers(self) -> tuple[int, int]:
        """Return what the backend knows."""
        return self._backend.peers()

    def is_inside(self) -> bool:
        """Return what the backend knows."""
        return self._backend.is_inside()

    def is_pending(self) -> bool:
        """Return what the backend knows."""
        return self._backend.is_pending()

    def is_in_call(self) -> bool:
        """Return what the control plane and the backend know."""
        return super().is_in_call() or self._backend.progress() >= 0

    def progress(self) -> int:
        """Return what the backend says."""
        return self._backend.progress()

    def abandon_pending(self) -> None:
        """Have the backend forget it."""
        self._backend.abandon_pending()

    def propagate_failure(self, error: CollectiveError, raises: bool = True) -> None:
        """Break the group on the control plane and in the backend."""
        super().propagate_failure(error, raises)
        self._backend.propagate_failure(error)


def agreement_of(
    rank: int, control: Control | None, backend: Backend, where: str, is_nested: Callable[[], bool]
) -> Agreement:
    """Return how the ranks of a group with this backend agree."""
    if control is None:
        return Agreement(rank)
    if isinstance(backend, AgreeingBackend):
        return BackendAgreement(rank, control, backend, where, is_nested)
    if isinstance(backend, PiggybackingBackend):
        return PiggybackedAgreement(rank, control, backend.needs_agreement, backend)
    return ExchangedAgreement(rank, control, backend.needs_agreement)


def verdict(control: Control, operation: str, error: BaseException) -> CollectiveError:
    """Return what a failure of a backend means for the group.

    Asks the other ranks where the failure does not say.
    """
    if not is_from_handler(error):
        if isinstance(error, CollectiveError):
            return error
        if isinstance(error, (RuntimeError, OSError)):
            return control.diagnose(operation, None if isinstance(error, TimeoutError) else error)
    return GroupError(
        f"{operation}: rank {control.rank} was interrupted by {type(error).__name__} {error}".rstrip()
    )
