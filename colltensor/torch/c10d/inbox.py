"""Inbox: the receives of one rank, and the messages that came before a receive that takes them.

A message has a header before it, in which a short one travels as a whole.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch

from colltensor.errors import (
    CollectiveError,
    CollectiveTimeoutError,
    MismatchError,
    PeerLostError,
    without_frames,
)
from colltensor.group import Group
from colltensor.torch.c10d.work import QueuedCall

CLOSED: Final = "Connection closed by peer"
"""The words in which torch's Gloo says that a rank is lost, which programs look for."""
SENDER: Final = 0
"""The rank of the one that sends, in the group of one direction; the other is 1."""


def translated(error: CollectiveError, name: str, source: int, destination: int) -> CollectiveError:
    """Return an error of one direction's group as one of the process group.

    It names the process group's ranks.

    Args:
        error: The error, which names ranks of the two.
        name: The process group and this rank, for the message.
        source: The rank of the process group that sends.
        destination: The one that receives.
    """
    kind = type(error)
    if kind is not PeerLostError and kind is not CollectiveTimeoutError:
        return error
    ranks = [(source, destination)[rank] for rank in getattr(error, "ranks", ())]
    named = " and ".join(f"rank {rank}" for rank in ranks) or "a rank"
    what = "died or left" if kind is PeerLostError else "did not come in time"
    closed = f" ({CLOSED})" if kind is PeerLostError else ""

    found: CollectiveError = kind(
        f"the transfers from rank {source} to rank {destination}: {name}: {named} {what}{closed}; make the process "
        "group again on all ranks",
        ranks,
    )
    found.__cause__ = error
    return found


@contextlib.contextmanager
def translating(name: str, source: int, destination: int) -> Iterator[None]:
    """Raise errors of one direction's group as the process group's; see ``translated``."""
    try:
        yield
    except CollectiveError as error:
        # The error has its cause, or is the original error itself.
        raise translated(error, name, source, destination)  # noqa: B904


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8)


@dataclass(eq=False, slots=True)
class Receive:
    """A receive that was issued.

    Attributes:
        source: The rank that it takes a message of, None for any.
        tag: The message's tag.
        tensor: Where the message goes.
        operation: Ends with it.
        sender: The rank that sent, in the end.
        held: Whether no message may be taken for it at the moment.
    """

    source: int | None
    tag: int
    tensor: torch.Tensor
    operation: QueuedCall
    sender: int = -1
    held: bool = False

    def takes(self, source: int, tag: int) -> bool:
        """Return True if the receive is for such a message."""
        return tag == self.tag and self.source in (None, source)

    def may_come_from(self, source: int) -> bool:
        """Return True if the message may be one of ``source``'s."""
        return self.source in (None, source)


@dataclass(eq=False, slots=True)
class Message:
    """A message that no receive took when it came."""

    source: int
    tag: int
    dtype: torch.dtype
    data: torch.Tensor


class Inbox:
    """The receives of one rank; a thread a source reads headers while a receive may want them."""

    def __init__(self, name: str, rank: int, size: int, group: Callable[[int, int], Group]) -> None:
        self._where = f"group '{name}' (rank {rank})"
        self._rank = rank
        self._others = [source for source in range(size) if source != rank]
        self._group = group
        self._changed = threading.Condition(threading.Lock())
        self._receives: list[Receive] = []
        self._messages: list[Message] = []
        self._readers: set[int] = set()
        self._reading: set[int] = set()  # sources whose next message is being read
        # the number of the last that was, by source
        self._taken: collections.Counter[int] = collections.Counter()
        # by source, the numbers of messages that count for nothing and may still come
        self._withdrawn: dict[int, list[range]] = {}
        self._lost: dict[int, BaseException] = {}
        self._closed: CollectiveError | None = None

    def add(self, receive: Receive) -> None:
        """Issue a receive.

        Raises:
            RuntimeError: No thread can be started; nothing is left behind.
        """
        with self._changed:
            # A message that an earlier receive is held for is that one's.
            found = next(
                (
                    message
                    for message in self._messages
                    if receive.takes(message.source, message.tag)
                    and not any(r.takes(message.source, message.tag) for r in self._receives)
                ),
                None,
            )
            error: BaseException | None = self._closed
            if found is not None:
                self._messages.remove(found)
            elif error is None:
                error = self._hopeless(receive)

            if found is None and error is None:
                self._read_from(self._others if receive.source is None else [receive.source])
                self._receives.append(receive)
                self._changed.notify_all()
                return

        if found is not None:
            error = _store(receive, found.source, found.dtype, found.data)
        _end(receive, error)

    def taken(self, source: int) -> int | None:
        """Return the number of ``source``'s last message; None while more may come unasked."""
        with self._changed:
            may_come = source in self._reading or self._any_from(source)
            return None if may_come else self._taken[source]

    def taken_before(self, receive: Receive) -> int | None:
        """Return the number of its source's last message; None if ``receive`` took one."""
        with self._changed:
            return (
                self._taken[receive.source]
                if receive.source is not None and receive in self._receives and not receive.held
                else None
            )

    def tags_beside(self, operation: QueuedCall) -> list[int]:
        """Return the tags of messages of the receive's source that it does not take."""
        with self._changed:
            issued = [receive for receive in self._receives if receive.operation is operation]
            beside = (m for m in self._messages for r in issued if r.may_come_from(m.source))
            return sorted({message.tag for message in beside})

    def withdraw(self, source: int, number: int) -> None:
        """Discard a message that is still to come, by its number."""
        with self._changed:
            runs = self._withdrawn.setdefault(source, [])
            if (
                runs and runs[-1].stop == number
            ):  # who tries in vain again and again fills no memory
                runs[-1] = range(runs[-1].start, number + 1)
            else:
                runs.append(range(number, number + 1))

    def hold(self, receive: Receive) -> None:
        """Take no message for a receive until ``release``; later ones do not pass it."""
        with self._changed:
            receive.held = True

    def release(self, receive: Receive) -> None:
        """Let messages be taken for it again, first those that came meanwhile."""
        with self._changed:
            receive.held = False
            if receive not in self._receives:  # all were ended
                return
            found = next((m for m in self._messages if receive.takes(m.source, m.tag)), None)
            if found is None:
                self._changed.notify_all()
                return
            self._messages.remove(found)
            self._receives.remove(receive)
        _end(receive, _store(receive, found.source, found.dtype, found.data))

    def refuse(self, receive: Receive, error: CollectiveError) -> None:
        """End a receive for which no message was taken."""
        with self._changed:
            if receive not in self._receives:  # all were ended
                return
            self._receives.remove(receive)
        _end(receive, error)

    def close(self, error: CollectiveError) -> None:
        """End all receives with ``error``, and the threads when they see it."""
        with self._changed:
            self._closed = error
            receives, self._receives = self._receives, []
            self._messages.clear()
            self._changed.notify_all()
        for receive in receives:
            _end(receive, error)

    def _hopeless(self, receive: Receive) -> BaseException | None:
        """Return why nothing can come: its source is lost, or all are."""
        if receive.source is not None:
            return self._lost.get(receive.source)
        return next(iter(self._lost.values())) if len(self._lost) == len(self._others) else None

    def _read_from(self, sources: list[int]) -> None:
        for source in sources:
            if source not in self._readers:
                threading.Thread(
                    target=self._read, args=(source,), name=f"colltensor from {source}", daemon=True
                ).start()
                self._readers.add(source)

    def _read(self, source: int) -> None:
        try:
            group = self._group(source, self._rank)
            header = Header()
            while self._wanted(source):
                self._take(group, source, header)
        except BaseException as error:  # noqa: BLE001 - goes to the receives, whatever it is
            self._lose(source, error)

    def _wanted(self, source: int) -> bool:
        """Wait until a receive may take a message of ``source``'s; False at the end."""
        with self._changed:
            self._reading.discard(source)
            self._changed.wait_for(lambda: self._closed is not None or self._any_from(source))
            self._reading.add(source)
            return self._closed is None

    def _any_from(self, source: int) -> bool:
        return any(receive.may_come_from(source) and not receive.held for receive in self._receives)

    def _take(self, group: Group, source: int, header: Header) -> None:
        """Read one message, into its receive or beside it, so that the next can come."""
        with translating(self._where, source, self._rank):
            group.recv(header.tensor, SENDER)
        number, tag, nbytes, dtype, is_inline = header.read()

        with self._changed:
            self._taken[source] = number
            if self._is_withdrawn(source, number):
                return
            receive: Receive | None = None

            def is_complete() -> bool:
                nonlocal receive
                receive = self._match(source, tag)
                return receive is not None or self._closed is not None or self._any_from(source)

            self._changed.wait_for(is_complete)
            if self._closed is not None:
                return

        try:
            if receive is not None and _fits(receive.tensor, dtype, nbytes):
                fits, target = True, receive.tensor
            else:
                fits, target = False, torch.empty(nbytes, dtype=torch.uint8)

            if is_inline:
                header.copy_to(target)
                if not target.is_inference():
                    # autograd may have kept what was there
                    torch.autograd.graph.increment_version(target)
            else:
                with (
                    translating(self._where, source, self._rank),
                    torch.inference_mode(target.is_inference()),  # else they may not be written
                ):
                    group.recv(bytes_of(target), SENDER)

            if receive is not None and fits:
                receive.sender = source
                _end(receive, None)
                return
        except BaseException as error:
            if receive is not None:
                _end(receive, error)
            raise

        # A receive that takes it may have been issued meanwhile.
        with self._changed:
            if receive is None:
                receive = self._match(source, tag)
            if receive is None:
                self._messages.append(Message(source, tag, dtype, target))
                return
        _end(receive, _store(receive, source, dtype, target))

    def _is_withdrawn(self, source: int, number: int) -> bool:
        """Return whether a message that came counts for nothing; forget those before it."""
        runs = self._withdrawn.pop(source, [])
        later = [run for run in runs if run.stop > number + 1]
        if later:
            self._withdrawn[source] = later
        return any(number in run for run in runs)

    def _match(self, source: int, tag: int) -> Receive | None:
        """Take the first receive for such a message from the list; None while that is held."""
        found = next((receive for receive in self._receives if receive.takes(source, tag)), None)
        if found is None or found.held:
            return None
        self._receives.remove(found)
        return found

    def _lose(self, source: int, error: BaseException) -> None:
        """End the receives for which nothing can come, now that a source is gone."""
        with self._changed:
            if self._closed is not None:
                return
            self._lost[source] = (
                without_frames(error) if isinstance(error, CollectiveError) else error
            )
            hopeless = [
                receive for receive in self._receives if self._hopeless(receive) is not None
            ]
            self._receives = [receive for receive in self._receives if receive not in hopeless]
        for receive in hopeless:
            _end(receive, error)


def _fits(tensor: torch.Tensor, dtype: torch.dtype, nbytes: int) -> bool:
    plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    return plain and tensor.dtype is dtype and tensor.nbytes == nbytes


def _store(
    receive: Receive, source: int, dtype: torch.dtype, data: torch.Tensor
) -> BaseException | None:
    """Copy a message into a receive's tensor, strided or not; return an error if it misfits."""
    tensor = receive.tensor
    if tensor.dtype is not dtype or tensor.nbytes != len(data):
        return MismatchError(
            f"{receive.operation.name}: expected {tensor.nbytes} bytes of {tensor.dtype}, got {len(data)} bytes "
            f"of {dtype} from rank {source}; nothing was written",
            (source,),
        )
    with torch.inference_mode(tensor.is_inference()):
        tensor.copy_(data.view(dtype).view(tensor.shape))
    receive.sender = source
    return None


def _end(receive: Receive, error: BaseException | None) -> None:
    """End a receive, and tell who waits in a thread of its own: it may wait for another one."""
    if receive.operation.end(error) and receive.operation.awaited:
        try:
            threading.Thread(target=receive.operation.notify, daemon=True).start()
        except RuntimeError:  # no thread can be started: it is told here, late rather than never
            receive.operation.notify()


_DTYPES: Final = {
    zlib.crc32(str(dtype).encode()): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}
_CODES: Final = {dtype: code for code, dtype in _DTYPES.items()}
_WORDS: Final = struct.Struct("=qqqq")
_INLINE_NBYTES: Final = 2048
"""How long a message may be that travels in its header.

A second transfer would take longer than its copy.
"""


class Header:
    """Memory for the header of one message after another.

    It holds number, tag, bytes, dtype, and a short message's bytes. It has one length always,
    because whoever receives it does not know the message's yet.

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
        """Return the message's number, tag, bytes and dtype, and whether it is in here."""
        number, tag, nbytes, code = _WORDS.unpack_from(self._memory)
        return number, tag, nbytes, _DTYPES[code], nbytes <= _INLINE_NBYTES

    def copy_to(self, tensor: torch.Tensor) -> None:
        """Copy the message that is in here into a contiguous tensor of its length."""
        ctypes.memmove(tensor.data_ptr(), self._message, tensor.nbytes)
