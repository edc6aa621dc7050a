"""Whoever connects to a listening socket, until it has proved who it is: bounded in number, the oldest goes first.

A connection has a thread once it has said something, so that those who connect and say nothing cost a descriptor each
and no thread. Ranks speak at once and prove themselves within milliseconds. So where there are too many who have not,
the oldest silent one is closed, and else the oldest that speaks, once it had time for its proof.

Imports no framework.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

HANDSHAKE_S: Final = 5.0
"""Longest time, in seconds, that a connection may take to prove itself."""

_STRANGERS: Final = 64
"""How many connections may say nothing at a time, and how many may be at their proof; fewer where a process may have
few descriptors."""

_FEWEST: Final = 4
_SHARE_OF_DESCRIPTORS: Final = 16
_PROOF_S: Final = 0.25
"""How long a connection has for its proof where others wait for its place."""

_RETRY_S: Final = 0.05
_NO_ROOM: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_OF_ONE_CONNECTION: Final = (errno.ECONNABORTED, errno.EPROTO, errno.EINTR, errno.EAGAIN)


class Listener:
    """Accepts connections in a thread of its own and gives each that speaks to ``serve``, in a thread of its own.

    ``serve`` gets a connected socket, which it closes or hands on, and calls ``proven`` once the other side has proved
    itself.
    """

    def __init__(
        self, sock: socket.socket, serve: Callable[[socket.socket], None], note: Callable[[str, Exception], None],
        name: str, ranks: int = 0,
    ) -> None:
        """Prepare to listen; ``start`` begins.

        Args:
            sock: A listening socket, which is left open at the end.
            serve: Answers one connection; raises nothing.
            note: Hears of what could not be accepted or served, in words.
            name: The thread's name.
            ranks: How many ranks may come at the same time, who are no strangers.
        """
        self._sock = sock
        self._serve = serve
        self._note = note
        self._closed = False
        self._limit = max(_FEWEST, min(_STRANGERS, _descriptors() // _SHARE_OF_DESCRIPTORS))
        self._most_speaking = self._limit + ranks
        self._silent: dict[int, tuple[socket.socket, float]] = {}  # by descriptor, the oldest first
        self._speaking: dict[socket.socket, float] = {}  # likewise; those who are at their proof
        self._place = threading.Condition()
        self._poller = select.poll()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin.

        Raises:
            RuntimeError: No thread can be started.
        """
        self._sock.setblocking(False)
        self._poller.register(self._sock, select.POLLIN)
        self._thread.start()

    def proven(self, sock: socket.socket) -> None:
        """Count a connection among the strangers no more."""
        with self._place:
            self._speaking.pop(sock, None)
            self._place.notify()

    def stop(self) -> None:
        """Accept no more and let those go who have said nothing; the thread ends within a moment."""
        self._closed = True
        # Closing a descriptor does not wake a thread that sleeps on it; shutting it down does.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def join(self, seconds: float) -> None:
        """Wait for the thread, from another one."""
        if self._thread is not threading.current_thread() and self._thread.ident is not None:
            self._thread.join(seconds)

    def end_strangers(self) -> None:
        """After ``join``: let those go as well who are at their proof."""
        with self._place:
            for sock in self._speaking:
                _end(sock)

    def disown(self) -> None:
        """In a forked child, which has no such thread: close its copies of the connections that say nothing."""
        self._closed = True
        for sock, _ in list(self._silent.values()):
            sock.close()

    def _run(self) -> None:
        own = self._sock.fileno()
        try:
            while not self._closed:
                left = self._expire()
                for descriptor, _ in self._poller.poll(left):
                    if descriptor in self._silent:
                        self._hear(descriptor)
                    elif descriptor == own and not self._accept():
                        return
        finally:
            for sock, _ in self._silent.values():
                sock.close()

    def _expire(self) -> float | None:
        """Close who has said nothing for too long; return the milliseconds until the next one is due."""
        now = time.monotonic()
        while self._silent:
            since = next(iter(self._silent.values()))[1]
            if now - since < HANDSHAKE_S:
                return (since + HANDSHAKE_S - now) * 1000 + 1
            self._drop_silent()
        return None

    def _accept(self) -> bool:
        """Take one connection; False once there is nothing to listen at."""
        try:
            sock, _ = self._sock.accept()
        except OSError as error:
            if self._closed or error.errno not in (*_NO_ROOM, *_OF_ONE_CONNECTION):
                return False
            if error.errno in _NO_ROOM:
                self._note("cannot accept a connection", error)
                if self._silent:
                    self._drop_silent()
                else:
                    time.sleep(_RETRY_S)  # what is open now will end soon
            return True
        if len(self._silent) >= self._limit:
            self._drop_silent()
        self._silent[sock.fileno()] = sock, time.monotonic()
        self._poller.register(sock, select.POLLIN)
        return True

    def _drop_silent(self) -> None:
        descriptor = next(iter(self._silent))
        self._take(descriptor).close()

    def _take(self, descriptor: int) -> socket.socket:
        self._poller.unregister(descriptor)
        return self._silent.pop(descriptor)[0]

    def _hear(self, descriptor: int) -> None:
        """Give a connection that speaks, or has ended, to a thread of its own."""
        sock = self._take(descriptor)
        with self._place:
            while len(self._speaking) >= self._most_speaking:
                oldest, since = next(iter(self._speaking.items()))
                left = since + _PROOF_S - time.monotonic()
                if left > 0:
                    self._place.wait(left)
                    continue
                del self._speaking[oldest]
                _end(oldest)
            self._speaking[sock] = time.monotonic()
        try:
            threading.Thread(target=self._answer, args=(sock,), name=f"{self._thread.name}-one", daemon=True).start()
        except RuntimeError as error:
            self._note("cannot serve a connection", error)
            self.proven(sock)
            sock.close()

    def _answer(self, sock: socket.socket) -> None:
        try:
            self._serve(sock)
        finally:
            self.proven(sock)


def _end(sock: socket.socket) -> None:
    """End a connection that its thread closes, or has closed."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _descriptors() -> int:
    """Return how many descriptors this process may have."""
    try:
        import resource
    except ImportError:  # not a Unix
        return 512
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _STRANGERS * _SHARE_OF_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
