"""Whoever connects to a listening socket, until it has proved who it is.

Their number is bounded, and the oldest goes first. A connection has a thread once the opening of
its proof has come. So those who connect and say nothing, or little, or leave again, cost a
descriptor each and no thread. Ranks send the opening at once and prove themselves within
milliseconds. So where there are too many who have not, the oldest is closed; the ranks dial again
(``net.reach``). Linux itself keeps those who say nothing at all for the first seconds, so that no
rank queues behind them.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Final

from colltensor import net

HANDSHAKE_S: Final = 5.0
"""Longest time, in seconds, that a connection may take to prove itself."""

_STRANGERS: Final = 64
"""How many connections may be silent at a time, and how many at their proof.

Beside these there may be as many as there are ranks.
"""

_FEWEST: Final = 4
_MANY: Final = 1 << 20
_SHARE_OF_DESCRIPTORS: Final = 16
"""All listeners of a process together have this part of its descriptors for silent strangers."""
_LARGEST_SHARE: Final = 4
"""And this part at most, where many ranks may come; one listener for those at their proof."""

_RETRY_S: Final = 0.05
_NO_ROOM: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_OF_THE_LISTENER: Final = (errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP)

_lock: Final = threading.Lock()
_listening = 0


class Listener:
    """Accepts connections in a thread of its own and gives each that speaks to ``serve``.

    ``serve`` runs in a thread of its own. It gets a connected socket, and has the other side prove
    itself by ``verify``. It returns True if it keeps the socket, which is closed otherwise. What it
    raises of a connection is noted.
    """

    def __init__(
        self,
        sock: socket.socket,
        serve: Callable[[socket.socket], bool | None],
        note: Callable[[str, Exception], None],
        name: str,
        ranks: int = 0,
    ) -> None:
        """Prepare to listen; ``start`` begins.

        Args:
            sock: A listening socket, which is left open at the end.
            serve: Answers one connection.
            note: Hears of what could not be accepted or served, in words.
            name: The thread's name.
            ranks: How many ranks may come at the same time, who are no strangers.
        """
        self._sock = sock
        self._serve = serve
        self._note = note
        self._closed = False
        self._ranks = ranks

        self._silent: dict[int, tuple[socket.socket, float]] = {}  # by descriptor, the oldest first
        self._speaking: dict[socket.socket, None] = {}  # likewise; those who are at their proof
        self._lock = threading.Lock()

        self._poller = select.poll()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin.

        Raises:
            RuntimeError: No thread can be started.
        """
        self._sock.setblocking(False)
        net.defer_silent(self._sock, HANDSHAKE_S)
        self._poller.register(self._sock, select.POLLIN)
        self._thread.start()

    def verify(
        self, sock: socket.socket, secret_of: Callable[[bytes], bytes | None]
    ) -> tuple[bytes, float]:
        """Let the other side prove itself; it is no stranger from then on.

        Args:
            sock: The connection.
            secret_of: As for ``net.verify``.

        Returns:
            The context that the other side named, and when its request must have come.

        Raises:
            ConnectionError, TimeoutError: As ``net.verify``.
        """
        until = time.monotonic() + HANDSHAKE_S
        context = net.verify(sock, secret_of, until)
        self._forget(sock)
        return context, until

    def _forget(self, sock: socket.socket) -> None:
        """Count a connection among the strangers no more."""
        with self._lock:
            self._speaking.pop(sock, None)

    def stop(self) -> None:
        """Accept no more and let those go who have said nothing.

        The thread ends within a moment.
        """
        self._closed = True
        # Closing a descriptor does not wake a thread that sleeps on it; shutting it down does.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def join(self, seconds: float) -> None:
        """Wait for the thread, from another one."""
        if self._thread is not threading.current_thread() and self._thread.ident is not None:
            self._thread.join(seconds)

    def end_strangers(self) -> None:
        """Let those go as well who are at their proof; called after ``join``."""
        with self._lock:
            for sock in self._speaking:
                _end(sock)

    def disown(self) -> None:
        """Close the copies of the connections that are not proved, in a forked child.

        The child has no such thread.
        """
        self._closed = True
        for sock in [*self._speaking, *(sock for sock, _ in self._silent.values())]:
            sock.close()

    def _run(self) -> None:
        global _listening
        own = self._sock.fileno()
        with _lock:
            _listening += 1
        try:
            while not self._closed:
                found = self._poller.poll(self._expire())
                for descriptor, _ in found:  # before one that comes takes a place
                    if descriptor in self._silent:
                        self._hear(descriptor)
                if any(descriptor == own for descriptor, _ in found) and not self._accept_all():
                    return
        finally:
            with _lock:
                _listening -= 1
            for sock, _ in self._silent.values():
                sock.close()

    def _expire(self) -> float | None:
        """Close who has said nothing for too long.

        Returns the milliseconds until the next one is due.
        """
        now = time.monotonic()
        while self._silent:
            since = next(iter(self._silent.values()))[1]
            if now - since < HANDSHAKE_S:
                return (since + HANDSHAKE_S - now) * 1000 + 1
            self._drop_silent()
        return None

    def _accept_all(self) -> bool:
        """Take what has come, so many at a time; False once there is nothing to listen at."""
        places, most = _places(self._ranks)

        came: list[socket.socket] = []
        try:
            while len(came) < places:
                came.append(self._sock.accept()[0])
        except OSError as error:
            if self._closed or error.errno in _OF_THE_LISTENER:
                for sock in came:
                    sock.close()
                return False

            if error.errno in _NO_ROOM:
                self._note("cannot accept a connection", error)
                if self._silent:
                    self._drop_silent()
                else:
                    time.sleep(_RETRY_S)  # what is open now will end soon
            elif error.errno not in (errno.EAGAIN, errno.ECONNABORTED, errno.EINTR):
                self._note("cannot accept a connection", error)
                time.sleep(_RETRY_S)

        now = time.monotonic()
        for sock in came:
            # A connection is readable once the whole opening has come: less costs no thread.
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, net.OPENING_NBYTES)
            self._silent[sock.fileno()] = sock, now
            self._poller.register(sock, select.POLLIN)

        if len(self._silent) > most:
            for descriptor, _ in self._poller.poll(0):  # who speaks already needs no place
                if descriptor in self._silent:
                    self._hear(descriptor)

        while len(self._silent) > most:
            self._drop_silent()
        return True

    def _drop_silent(self) -> None:
        descriptor = next(iter(self._silent))
        self._take(descriptor).close()

    def _take(self, descriptor: int) -> socket.socket:
        self._poller.unregister(descriptor)
        return self._silent.pop(descriptor)[0]

    def _hear(self, descriptor: int) -> None:
        """Give a connection that speaks to a thread of its own."""
        sock = self._take(descriptor)
        if _has_ended(sock):
            sock.close()
            return

        with self._lock:
            if len(self._speaking) >= min(_STRANGERS + self._ranks, _share(_LARGEST_SHARE)):
                oldest = next(iter(self._speaking))
                del self._speaking[oldest]
                _end(oldest)
            self._speaking[sock] = None

        try:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
            threading.Thread(
                target=self._answer, args=(sock,), name=f"{self._thread.name}-one", daemon=True
            ).start()
        except RuntimeError as error:
            self._note("cannot serve a connection", error)
            self._forget(sock)
            sock.close()

    def _answer(self, sock: socket.socket) -> None:
        is_kept = False
        try:
            is_kept = bool(self._serve(sock))
        except (OSError, ValueError, struct.error) as error:
            self._note("turned a connection away", error)
        finally:
            self._forget(sock)
            if not is_kept:
                sock.close()


def _end(sock: socket.socket) -> None:
    """End a connection that its thread closes."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _has_ended(sock: socket.socket) -> bool:
    """Say whether a connection that woke its listener has nothing to read and never will."""
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _places(ranks: int) -> tuple[int, int]:
    """Return how many silent strangers one listener may hold.

    The second number is how many it may hold together with so many ranks that may be silent.
    """
    listening = max(1, _listening)
    places = min(_STRANGERS, max(_FEWEST, _share(_SHARE_OF_DESCRIPTORS) // listening))
    return places, min(places + ranks, max(_FEWEST, _share(_LARGEST_SHARE) // listening))


def _share(part: int) -> int:
    """Return how many descriptors such a part of all is that this process may have."""
    try:
        import resource
    except ImportError:  # not a Unix
        return _MANY
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MANY if descriptors == resource.RLIM_INFINITY else descriptors // part
