"""Backend: what a transport must offer to the group, and the rules that all transports share."""

from __future__ import annotations

import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Protocol, runtime_checkable

from colltensor.backends.pairwise import PairwiseCollectives
from colltensor.backends.rules import require
from colltensor.errors import CollectiveError
from colltensor.types import DType, ReduceOp
from colltensor.view import BufferView


class ControlPlane(Protocol):
    """What a backend needs of a group's control plane (``colltensor.control.Control``)."""

    @property
    def rank(self) -> int:
        """This process's rank in the group."""

    @property
    def world_size(self) -> int:
        """The number of ranks."""

    @property
    def group_name(self) -> str:
        """The group's name, for messages."""

    def allgather(self, payload: bytes, deadline: float) -> list[bytes]:
        """Return the payloads of all ranks in rank order; all ranks call."""

    def check(self) -> None:
        """Raise the error with which another rank, or this one, has broken the group."""

    def swap(self, peer: int, payload: bytes, deadline: float) -> bytes:
        """Return the payload of rank ``peer``, which calls this with this rank."""

    def queue(self, peers: Sequence[int] | None) -> int:
        """Note that this rank has queued a call with ``peers``, None for all.

        Returns how many such calls there were.
        """

    def gone(self, operation: str, peers: Sequence[int] | None) -> CollectiveError | None:
        """Ask ``peers``, None for all, whether they are there.

        Return the error that names those that are not.
        """

    def diagnose_queued(
        self, operation: str, peers: Sequence[int] | None, number: int, cause: BaseException | None
    ) -> CollectiveError:
        """Find out why queued call ``number`` with ``peers`` did not end.

        See ``Control.diagnose``.
        """


class Backend(Protocol):
    """One transport, connected: the payload half of a group's collectives.

    When a method is called, all ranks of the call have arrived. They agree on operation, count,
    dtype, op and root, ``require`` has passed, and no two buffers alias but where said. Buffers are
    contiguous unless ``takes_strided``. One call runs at a time. Results are in the buffers on
    return.

    ``deadline`` is a ``time.monotonic()`` value. At the deadline a method raises TimeoutError. When
    another rank breaks the group, it raises the error of ``ControlPlane.check``. A provider's own
    RuntimeError may escape; the group explains it. After an error the transport is unusable, and
    the buffers are kept alive until ``close``.

    Attributes:
        name: The backend's name in the table.
        device_types: The device types whose memory it reaches.
        takes_strided: Whether it takes strided views; else the group stages them.
        packs_small_leaves: Whether small leaves are to be packed into one transfer, because a
            transfer costs more.
        copies_lists: The operations for which it copies a list of all ranks' tensors that do not
            lie one after another.
        needs_agreement: Whether the ranks must agree on the control plane before each payload.
        crosses: Whether ``send`` and ``recv`` may run in several threads at once, each with another
            peer or direction.
    """

    name: str
    device_types: frozenset[str]
    takes_strided: bool
    packs_small_leaves: bool
    copies_lists: frozenset[str]
    needs_agreement: bool
    crosses: bool

    def require(self, operation: str, dtype: DType, op: ReduceOp | None) -> None:
        """Raise UnsupportedDTypeError or OptionError if the call cannot be done here."""

    def stages_dtype(self, operation: str, dtype: DType, op: ReduceOp | None) -> bool:
        """Return True where elements pass through a converted copy.

        ``copy=False`` refuses that.
        """

    def allreduce(self, buffers: Sequence[BufferView], op: ReduceOp, deadline: float) -> None:
        """Combine in place on every rank; several buffers are several transfers of one call."""

    def reduce(
        self, buffers: Sequence[BufferView], root: int, op: ReduceOp, deadline: float
    ) -> None:
        """Combine in place on ``root``; the other ranks' buffers keep their contents."""

    def broadcast(self, buffers: Sequence[BufferView], root: int, deadline: float) -> None:
        """Overwrite with ``root``'s contents on the other ranks."""

    def allgather(self, outputs: Sequence[BufferView], source: BufferView, deadline: float) -> None:
        """Write rank r's ``source`` to ``outputs[r]``.

        ``outputs[rank]`` may be ``source`` itself.
        """

    def gather(
        self, outputs: Sequence[BufferView] | None, source: BufferView, root: int, deadline: float
    ) -> None:
        """Write rank r's ``source`` to ``outputs[r]`` of ``root``.

        ``outputs`` is None elsewhere.
        """

    def scatter(
        self, target: BufferView, sources: Sequence[BufferView] | None, root: int, deadline: float
    ) -> None:
        """Write ``root``'s ``sources[r]`` to rank r's ``target``; ``sources`` is None elsewhere."""

    def reducescatter(
        self, target: BufferView, sources: Sequence[BufferView], op: ReduceOp, deadline: float
    ) -> None:
        """Write the combination of all ranks' ``sources[rank]`` to ``target``.

        Other sources stay intact.
        """

    def alltoall(
        self, outputs: Sequence[BufferView], sources: Sequence[BufferView], deadline: float
    ) -> None:
        """Write rank r's ``sources[rank]`` to ``outputs[r]``."""

    def send(self, buffers: Sequence[BufferView], peer: int, deadline: float) -> None:
        """Send to ``peer``, which calls ``recv``."""

    def recv(self, buffers: Sequence[BufferView], peer: int, deadline: float) -> None:
        """Receive from ``peer``, which calls ``send``."""

    def sendrecv(
        self, source: BufferView, dst: int, target: BufferView, src: int, deadline: float
    ) -> None:
        """Send ``source`` to ``dst`` and receive ``target`` from ``src`` at the same time."""

    def barrier(self, deadline: float) -> None:
        """Return when all ranks have called."""

    def close(self) -> None:
        """Free the transport without waiting for other ranks; idempotent."""


class BackendBase(PairwiseCollectives):
    """The parts of a ``Backend`` beside ``name``, ``control``, ``send`` and ``recv``, as defaults.

    Override where another way is faster. It takes contiguous host memory, and every data type and
    op that is defined. Its collectives are made of sends and receives. The group packs small leaves
    and agrees before each payload, so ``barrier`` has nothing left to do.
    """

    name: str
    device_types: frozenset[str] = frozenset({"cpu"})
    takes_strided: bool = False
    packs_small_leaves: bool = True
    copies_lists: frozenset[str] = frozenset()
    needs_agreement: bool = True
    crosses: bool = False

    require = staticmethod(require)

    def stages_dtype(self, operation: str, dtype: DType, op: ReduceOp | None) -> bool:
        """Return False: elements travel as they are."""
        return False

    def barrier(self, deadline: float) -> None:
        """Return: all ranks have called, since they have agreed."""

    def close(self) -> None:
        """Do nothing."""


class PendingOperation(Protocol):
    """One call that was queued on a device."""

    def order(self, streams: Iterable[int | None], timeout_s: float | None = None) -> None:
        """Let streams, and for None the host, go on only when the call is done.

        Args:
            streams: As in ``BufferView.stream``.
            timeout_s: How long the host waits at most, beside the call's own timeout.

        Raises:
            TimeoutError: It is not done after ``timeout_s``; it goes on.
            CollectiveError: The call failed.
        """

    def done(self) -> bool:
        """Return True once the call is done or failed; never waits."""


@runtime_checkable
class QueueingBackend(Backend, Protocol):
    """A backend whose methods return once their work is queued on a device; only ``barrier`` waits.

    Each call is made between ``begin`` and ``end``. Something may go wrong later: a peer does not
    come, say. The backend itself finds that out, ends all work that it has queued, and calls
    ``on_failure``.

    Attributes:
        on_failure: Called, in a thread of the backend's own, with the error that breaks the group.
    """

    on_failure: Callable[[CollectiveError], None] | None

    def begin(
        self,
        name: str,
        views: Sequence[BufferView],
        peers: Sequence[int] | None,
        apart: bool,
        keep: object,
        stages: bool,
        deadline: float,
    ) -> PendingOperation:
        """Let payload methods that are called until ``end`` or ``cancel`` be one device call.

        It is queued on a stream that comes after those of the views.

        Args:
            name: The operation, for messages.
            views: All views of the call, on one device, or for the ``_multigpu`` methods on
                several.
            peers: The ranks of a point-to-point call; None for one of all ranks.
            apart: Whether to use the backend's own stream, beside the frameworks'; else it is a
                view's.
            keep: Kept until the call is done; its memory must not be given to others before that.
            stages: Whether elements are copied to or from staging buffers meanwhile, on that same
                stream.
            deadline: When the ranks that connect for this call must have met.

        Raises:
            CollectiveError: It cannot be queued.
        """

    def end(self) -> None:
        """End the call that was begun: all of it is queued."""

    def allreduce_at_once(self, view: BufferView, op: ReduceOp) -> PendingOperation | None:
        """Queue an allreduce of one contiguous tensor, all in one.

        Return None, with nothing done, where that takes more than the payload's call. That is so
        for connecting the ranks, ordering streams, converting elements, keeping memory and
        refusing.
        """

    def cancel(self, error: BaseException) -> None:
        """End a call because of an error, also one of ``begin`` or ``end``.

        The caller raises the error next.

        Raises:
            CollectiveError: The cause of the error.
        """

    def allreduce_multigpu(
        self, buffers: Sequence[BufferView], op: ReduceOp, deadline: float
    ) -> None:
        """Combine in place all ranks' buffers, one for each device that this process works on."""

    def reduce_multigpu(
        self, buffers: Sequence[BufferView], root: int, index: int, op: ReduceOp, deadline: float
    ) -> None:
        """Combine all ranks' buffers into buffer ``index`` of rank ``root``.

        The others stay as they are.
        """

    def broadcast_multigpu(
        self, buffers: Sequence[BufferView], root: int, index: int, deadline: float
    ) -> None:
        """Overwrite all ranks' buffers with buffer ``index`` of rank ``root``."""

    def allgather_multigpu(
        self,
        outputs: Sequence[Sequence[BufferView]],
        sources: Sequence[BufferView],
        deadline: float,
    ) -> None:
        """Write all ranks' sources, by rank and device, to each of ``outputs``."""

    def reducescatter_multigpu(
        self,
        targets: Sequence[BufferView],
        sources: Sequence[Sequence[BufferView]],
        op: ReduceOp,
        deadline: float,
    ) -> None:
        """Write to each target the combination of all sources of its place, by rank and device."""

    def set_timeout(self, timeout_s: float) -> None:
        """Give the calls that begin from now on so long, once their turn on the device has come."""

    def refuse(self, name: str, views: Sequence[BufferView], peers: Sequence[int] | None) -> None:
        """Raise the DeviceError that ``begin`` would raise, before the ranks agree.

        It does nothing else.
        """

    def disown(self) -> None:
        """Forget everything without a word to CUDA, in a forked child, which cannot use it."""

    def drain(self, deadline: float, index: int | None = None) -> None:
        """Return, on the host, when all that this rank has queued is done.

        That is on the device ``index``, or on all.
        """


@runtime_checkable
class PiggybackingBackend(Backend, Protocol):
    """A backend whose small allreduces travel with the ranks' agreement.

    Both take one exchange on the control plane.
    """

    def piggybacks(self, buffers: Sequence[BufferView], op: ReduceOp) -> bool:
        """Return whether an allreduce travels with the agreement.

        Op, counts and dtypes alone decide, because they are equal on all ranks.
        """

    def pack(self, buffers: Sequence[BufferView]) -> bytes:
        """Return what this rank contributes."""

    def unpack(
        self, buffers: Sequence[BufferView], op: ReduceOp, contributions: Sequence[bytes]
    ) -> None:
        """Combine all ranks' contributions into the buffers, as ``allreduce`` does.

        It sends nothing.
        """


class IssueQueue(Protocol):
    """A queue of calls that one thread makes without the interpreter lock; numbers count from 1."""

    def issued(self) -> int:
        """Return how many calls were put into it."""

    def ended(self) -> int:
        """Return how many of them have ended."""

    def serve(self, patient: bool) -> int:
        """Make calls until one ends with something other than success.

        It runs in one thread at a time, which it blocks.

        Returns:
            The code for ``AgreeingBackend.complete`` of call ``ended() + 1``, which ends with the
            next ``serve``. Or 0 when ``notify`` was told of the last call. Or 0 when no call is
            left: unless ``patient`` at once, else after ``kick`` or ``close``.
        """

    def kick(self) -> None:
        """Have ``serve`` return when no call is left."""

    def wait(self, number: int, timeout_s: float | None) -> bool:
        """Return True when the call has ended, False after ``timeout_s`` or in a forked child."""

    def notify(self, number: int) -> bool:
        """Have ``serve`` return when the call has ended; return False if it has."""

    def close(self) -> int:
        """Take no more calls, drop those not begun, and return the number of the first of them."""

    def cancel(self) -> None:
        """Let the calls that were dropped have ended, once the one that is made has."""


@runtime_checkable
class AgreeingBackend(Backend, Protocol):
    """A backend that compares the call's signature itself, on arrival.

    ``needs_agreement`` is False. For each call the group takes the turn with ``hold`` and gives it
    back with ``release``. In between, ``set_signature`` or ``set_transfer_signature`` says what the
    payload method that follows must agree on. A tensor as it comes from its framework may go to
    ``fast_call`` instead.

    Attributes:
        number: The group's number in the native library.
        queue: Of the asynchronous calls of ``issuing``.
    """

    number: int
    queue: IssueQueue

    def set_timeout(self, timeout_s: float) -> None:
        """Let fast calls wait so long for other ranks.

        ``fast_call`` returns other functions afterwards.
        """

    def hold(self, deadline: float) -> bool:
        """Take the turn for one call, waiting for another thread's fast call.

        Returns False if this thread has begun one.
        """

    def is_inside(self) -> bool:
        """Return whether this thread is in a fast call, whose wait runs Python code now."""

    def is_pending(self) -> bool:
        """Return whether this thread is between the two steps of a fast call.

        That also holds for a thread that was interrupted there.
        """

    def release(self) -> None:
        """Give the turn back."""

    def join(self, deadline: float) -> None:
        """Take the turn for one send or recv, together with other threads.

        Each of them must ``part``.
        """

    def part(self, source: int, destination: int) -> None:
        """Give it back after the transfer from ``source`` to ``destination``."""

    def progress(self) -> int:
        """Return -1 while no call runs, else a number that grows from call to call."""

    def calls(self) -> int:
        """Return how many collectives this rank has taken part in."""

    def transfers(self, source: int, destination: int) -> int:
        """Return the number of transfers from ``source`` to ``destination``; one is this rank."""

    def peers(self) -> tuple[int, int]:
        """Return the ranks that a waiting fast call sends to and receives from; -1 for none."""

    def set_signature(
        self, signature: bytes, describe: Callable[[], str], allocate: Callable[[], None] | None
    ) -> None:
        """Set what all ranks must agree on in the next collective.

        That is an 8-byte sequence number, and the rest. ``allocate`` is called once they agree and
        before anything is written; it may move the buffers to be written.
        """

    def set_transfer_signature(
        self,
        source: int,
        destination: int,
        signature: bytes,
        describe: Callable[[], str],
        allocate: Callable[[], None] | None,
    ) -> None:
        """Set what two ranks must agree on in the next transfer between them.

        It goes from ``source`` to ``destination``.
        """

    def agree(self, deadline: float) -> None:
        """Agree on the expected signature, without a payload."""

    def abandon(self) -> None:
        """Let no rank wait for this one any longer; idempotent."""

    def propagate_failure(self, error: CollectiveError) -> None:
        """Let ranks that wait in this backend know why the group broke.

        It is idempotent, and does nothing after ``close``.
        """

    def fast_call(
        self, operation: int, op: int, root: int, source: int, stacked: bool
    ) -> tuple[Callable[..., int], Callable[..., int]]:
        """Return two functions that run an operation on host tensors of one count and dtype.

        Several tensors are contiguous. Both functions return 0, or a code for ``complete``. The
        first may return ``FAST_LARGE``: nothing was begun, and the second is to be called with the
        same tensors.

        They are given the written tensors first, but for reduce, broadcast and a send all of them.
        For a tensor that cannot be exported they raise BufferError, TypeError or ValueError.
        Nothing has begun then unless ``exports`` says that they can be exported.

        Args:
            operation: A number of ``operations.NATIVE``.
            op: The reduce op, 255 for none.
            root: The root, or the rank to send to; -1 for none. A number that is no rank is refused
                when called.
            source: The rank to receive from; -1 for none.
            stacked: Whether one tensor with all their elements is given instead of those of all
                ranks.
        """

    def issuing(
        self, operation: int, op: int, root: int, source: int, stacked: bool
    ) -> Callable[..., int]:
        """Return a function that puts the call of a function of ``fast_call`` into ``queue``.

        It is given the exports of the tensors (``colltensor.dlpack.export``), which must stay until
        the call has ended. It returns the call's number, or no positive one if the call must go the
        slow path.
        """

    def hand_over(self) -> int:
        """Put a pending fast call of this thread into ``queue`` and return its number.

        The call came to ``FAST_PENDING``.
        """

    def tree(
        self, operation: int, op: int, root: int, source: int, plan: array.array[int]
    ) -> Callable[..., int]:
        """Return a function that runs an operation on a tree's leaves, given one after the other.

        It returns and raises the same as the second function of ``fast_call``. It refuses leaves
        that are not as planned, or share memory that is written.

        Args:
            operation: A number of ``operations.NATIVE``: allreduce, reduce, broadcast or a
                transfer.
            op: The reduce op, 255 for none.
            root: The root, or the rank to send to; -1 for none.
            source: The rank to receive from, -1 for none.
            plan: The number of leaves, of all elements, and the hash of the leaves
                (``Buffers.compared``). Then for each leaf the number of its dtype, its count and
                its shape. A shape is the number of axes, -1 for any, and their extents. Copied.
        """

    def reading_tree(
        self, operation: int, op: int, root: int, source: int, plan: array.array[int]
    ) -> Callable[[int, int, int], int] | None:
        """Return a function that does as ``tree``'s on a list of leaves of one type.

        Return None where there is none. The function gets the identities of the list and of the
        type. Its third argument is the address of a C function that reads tensors of that type
        (``adapters.reader_of``). It returns ``FAST_UNREAD`` where a leaf is of another type or
        cannot be read so.
        """

    def allocating_tree(
        self, operation: int, op: int, root: int, source: int, plan: array.array[int]
    ) -> Callable[..., int]:
        """Return a function that runs an operation on the leaves of a tree of immutable tensors.

        Arguments are those of ``tree``. All leaves are contiguous host memory. The function returns
        a code for ``complete``, or 0.

        It is given None and the leaves' addresses where they are only read. Else it is given None
        and the addresses of copies, which become the results. Or, outside of transfers, it is given
        a function and the leaves' own addresses. It calls that function once the ranks agree, and
        raises what that one raises. That function makes the results' memory, with the same
        contents, and returns the address of its addresses.
        """

    def exports(self, tensors: Sequence[Any]) -> bool:
        """Return True if a fast call's tensors can be exported.

        An error of the call had another cause then.
        """

    def abandon_pending(self) -> None:
        """Forget a fast call that was interrupted between its steps, after ``abandon``."""

    def complete(self, name: str, code: int) -> int:
        """End a fast call that was begun.

        Args:
            name: The operation, for messages.
            code: The call's return value.

        Returns:
            ``FAST_DONE``; ``FAST_REFUSED`` if nothing was begun and the call must go the slow path;
            ``FAST_MISMATCH`` if the ranks disagree. After a mismatch ``explain`` or
            ``explain_transfer`` must follow. To the mismatch of a transfer 256 is added if the send
            differs, 512 if the receive does.

        Raises:
            CollectiveError: As every collective.
        """

    def explain(self, signature: bytes, describe: Callable[[], str], deadline: float) -> None:
        """Raise the MismatchError of a fast call, as all ranks do."""

    def explain_transfer(
        self, pairs: Sequence[tuple[int, int, bytes, Callable[[], str]]], deadline: float
    ) -> None:
        """Raise the MismatchError of transfers.

        Each that differs is given by source, destination, signature and words.
        """


FAST_DONE: Final = 0
FAST_REFUSED: Final = 1
FAST_MISMATCH: Final = 2
FAST_PENDING: Final = 1
FAST_LARGE: Final = 2
FAST_BUSY: Final = 9
"""The last three are codes of a function of ``AgreeingBackend.fast_call``.

The others are codes of ``complete``. Pending: the call has begun and waits for others. Large:
nothing was begun, because it would take long. Busy: nothing was begun, because another thread has
the turn.
"""
FAST_UNREAD: Final = -1
"""A code of a function of ``AgreeingBackend.reading_tree``.

Nothing was begun, because the function could not read the leaves.
"""


class BackendSpec(Protocol):
    """A backend's entry in the table: whether it can be used here, and how it is made."""

    def available(self) -> str | None:
        """Return None if the backend can be used here, else why not and what to install.

        Imports no framework.
        """

    def create(
        self,
        control: Any,
        meeting: Any,
        *,
        timeout_s: float,
        interface: str | None,
        provider: str | None,
    ) -> Backend:
        """Connect this rank's backend. All ranks call, having met.

        Args:
            control: The group's ControlPlane; None for a group of one rank without one.
            meeting: Where the ranks are, a ``colltensor.rendezvous.Meeting``: ``addresses`` and
                ``host_ids`` by rank; None as above.
            timeout_s: How long connecting may take, and the default of an operation.
            interface: Name or address of the network interface to use.
            provider: The library to use, where the backend has several.

        Raises:
            BackendUnavailableError: It cannot be used here.
            OptionError: An option that it does not have.
            MismatchError: The ranks cannot use one transport together.
        """
