"""Standoffs: ranks that wait in sends to each other, or in receives, are told at once.

Two such ranks can never end. A send is done when a receive takes it, and torch's ``send`` and
``recv`` do nothing else meanwhile. A rank whose only thread waits like that asks the other one,
whose listener answers. If both wait, the lower one has the other end its operation, and then ends
its own. Nothing can end that in between: it is held. The messages that both had sent are discarded
by their numbers. Where other threads run, one may make the call that helps, so only the log is
told.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from colltensor.engine.deadlock import is_only_caller
from colltensor.errors import CollectiveError, GroupError, MismatchError
from colltensor.torch.c10d.work import QueuedCall

_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.05, 5.0
"""Whoever comes later has the lower one look at once.

So they look again only in case a message was lost.
"""
_ANSWER_S: Final = 30.0
"""How long an end that was agreed on is asked for."""
_REMEMBERED: Final = round(_ANSWER_S / _FIRST_PAUSE_S)
"""How many waits can be refused meanwhile."""
_INTERRUPTED_S: Final = 2.0
_log: Final = logging.getLogger(__name__)


class Progress(NamedTuple):
    """How far two ranks have come with each other.

    Attributes:
        sent: How many messages this rank has begun to send.
        taken: How many of the other's it has begun to take.
    """

    sent: int
    taken: int


@dataclass(eq=False, slots=True)
class Wait:
    """The wait of this rank's thread.

    Attributes:
        number: Its number among the waits of this rank.
        sends: Whether for a send, or a receive.
        peer: To or from which rank.
        operation: The operation.
        progress: Returns how far the two are, if the operation waits for a call of the other rank.
            No other operation of this rank may let that go on. Else it returns None.
        hold: Keeps the operation from ending while the other rank is asked to end its own.
        release: Lets it go on.
        refuse: Ends it with an error, given how far the other rank is.
        nudged: Set when it is time to look.
        agreed: Set but while the operation is held.
    """

    number: int
    sends: bool
    peer: int
    operation: QueuedCall
    progress: Callable[[], Progress | None]
    hold: Callable[[], None]
    release: Callable[[], None]
    refuse: Callable[[CollectiveError, Progress], None]
    nudged: threading.Event = field(default_factory=threading.Event)
    agreed: threading.Event = field(default_factory=threading.Event)


class Standoffs:
    """Finds the standoffs of one rank of a process group."""

    def __init__(
        self,
        name: str,
        rank: int,
        ask: Callable[[int, bytes], bytes | None],
        lost: Callable[[int], CollectiveError | None],
        fail: Callable[[CollectiveError], None],
    ) -> None:
        """Begin with none.

        Args:
            name: The process group's name.
            rank: This rank.
            ask: Returns another rank's answer (see ``answer``) to a question, None if no answer
                comes.
            lost: Returns an error if another rank is gone.
            fail: Ends all transfers.
        """
        self._name = name
        self._rank = rank
        self._ask = ask
        self._lost = lost
        self._fail = fail
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._wait: Wait | None = None
        # the last ones: whoever was not answered asks again, but not for ever
        self._refused: collections.deque[int] = collections.deque(maxlen=_REMEMBERED)
        self._warned = False

    def wait_for(
        self,
        operation: QueuedCall,
        sends: bool,
        peer: int,
        progress: Callable[[], Progress | None],
        hold: Callable[[], None],
        release: Callable[[], None],
        refuse: Callable[[CollectiveError, Progress], None],
    ) -> None:
        """Return when the operation is done; the arguments are ``Wait``'s attributes."""
        if operation.is_done_within(_FIRST_PAUSE_S):
            return

        wait = Wait(next(self._numbers), sends, peer, operation, progress, hold, release, refuse)
        wait.agreed.set()
        outer, self._wait = self._wait, wait
        try:
            with contextlib.suppress(RuntimeError):  # no thread can be started: the timeout remains
                threading.Thread(
                    target=self._watch, args=(wait,), name="colltensor standoffs", daemon=True
                ).start()
            operation.is_done_within(None)
        finally:
            self._wait = outer
            wait.nudged.set()
            # a signal's handler raised: what is being agreed on must not be half done
            wait.agreed.wait(_INTERRUPTED_S)

    def answer(self, asker: int, question: bytes) -> bytes:
        """Say for what this rank waits, or end it as the other rank will; never waits."""
        end, sent, taken = json.loads(question)
        with self._lock:
            wait = self._wait
            progress = None if wait is None or wait.peer != asker else wait.progress()
            if end:
                if wait is not None and progress is not None and wait.number == end:
                    self._refused.append(end)
                    wait.refuse(self._error(wait), Progress(sent, taken))
                return json.dumps(end in self._refused).encode()
            if wait is None or progress is None:
                return b"null"
            if self._rank < asker:  # it decides; a question back would only be asked back again
                wait.nudged.set()
            return json.dumps([wait.number, wait.sends, is_only_caller(), *progress]).encode()

    def _watch(self, wait: Wait) -> None:
        """Look, in a thread of its own, until the wait is over."""
        pause = _FIRST_PAUSE_S
        while self._wait is wait and not wait.operation.done():
            wait.nudged.clear()
            self._look(wait)
            wait.nudged.wait(pause)
            pause = min(pause * 2, _LAST_PAUSE_S)

    def _look(self, wait: Wait) -> None:
        """Ask the other rank whether it waits for this one, and end both waits if so."""
        mine = wait.progress()
        said = None if mine is None else self._question(wait.peer, 0, mine)
        if mine is None or said is None:
            return
        if self._rank > wait.peer:  # that one looks too, now that it was asked
            return

        number, sends, is_alone, *progress = said
        theirs = Progress(*progress)
        if sends != wait.sends or not _blocks(sends, mine, theirs):
            return
        if not (is_alone and is_only_caller()):
            self._warn(wait)
            return

        # Held from here on, so that it ends as the other rank's does, or goes on.
        with self._lock:
            mine = wait.progress()
            if self._wait is not wait or mine is None:
                return
            wait.agreed.clear()
            wait.hold()

        ended = False
        try:
            ended = self._has_ended(wait, number, mine)
            if ended:
                wait.refuse(self._error(wait), theirs)
        finally:
            if not ended:
                wait.release()
            wait.agreed.set()

    def _has_ended(self, wait: Wait, number: int, mine: Progress) -> bool:
        """Have the other rank end its wait, and return whether it has."""
        until = time.monotonic() + _ANSWER_S
        # it expires, and with it all transfers
        while time.monotonic() < until and not wait.operation.done():
            ended = self._question(wait.peer, number, mine)
            if ended is not None:
                return bool(ended)
            if self._lost(wait.peer) is not None:
                return False  # so the operation goes on, and ends over that
            time.sleep(_FIRST_PAUSE_S)
        if not wait.operation.done():
            self._fail(
                GroupError(f"{self._error(wait)}; rank {wait.peer} does not answer any more")
            )
        return False

    def _question(self, peer: int, end: int, progress: Progress) -> Any:
        said = self._ask(peer, json.dumps([end, *progress]).encode())
        return None if said is None else json.loads(said)

    def _error(self, wait: Wait) -> MismatchError:
        what = "a send to" if wait.sends else "a recv from"
        return MismatchError(
            f"{wait.operation.name}: group '{self._name}' (rank {self._rank}): ranks {self._rank} and {wait.peer} both "
            f"wait in {what} each other, which neither can end: use dist.batch_isend_irecv (or a group's sendrecv), "
            "or let one of them begin with the other call; nothing was moved",
            sorted((self._rank, wait.peer)),
        )

    def _warn(self, wait: Wait) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(
                "group %r (rank %d): %s; another thread may still make the call that ends it",
                self._name,
                self._rank,
                self._error(wait),
            )


def _blocks(sends: bool, mine: Progress, theirs: Progress) -> bool:
    """Return whether nothing is on its way between two ranks that both send, or both receive."""
    if sends:
        return mine.sent > theirs.taken and theirs.sent > mine.taken
    return mine.sent == theirs.taken and theirs.sent == mine.taken
