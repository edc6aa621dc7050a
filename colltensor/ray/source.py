"""The source's side of direct transfers: keeps the objects that Ray stores here, and sends them.

They go to whoever may ask. It runs in threads of its own, so that a method that takes long delays
no transfer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

import ray

from colltensor import net
from colltensor.control import exit_hooks
from colltensor.errors import CollectiveError, GroupError
from colltensor.group import Group
from colltensor.listener import Listener
from colltensor.ray.arrays import views_of
from colltensor.ray.link import (
    CONTEXT,
    IDLE_S,
    TIMEOUT_S,
    SourceAddress,
    Step,
    form_group,
    group_name,
)
from colltensor.ray.rendezvous import address_in_ray
from colltensor.rendezvous.protocol import encode_error

_LOG: Final = logging.getLogger(__name__)
_PATIENCE_S: Final = 2 * IDLE_S
"""How long a source waits for the next request.

It is longer than a receiver keeps a link: the receiver is the first to go.
"""


class Source:
    """Holds objects of this process and answers requests for them until the process ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._objects: dict[str, Sequence[Any]] = {}
        self._serving: set[socket.socket] = set()
        self._listener = net.listen(address_in_ray() or net.local_addresses()[0])
        address, port = self._listener.getsockname()[:2]
        self.endpoint = SourceAddress(address, port, secrets.token_bytes(32), _who_am_i())
        self._group_name = group_name(self.endpoint.who)
        self._is_closed = False
        exit_hooks.register(self)
        self._door = Listener(self._listener, self._serve, self._note_refused, "colltensor-source")
        try:
            self._door.start()
        except RuntimeError:
            self.close()
            raise

    def keep(self, obj_id: str, arrays: Sequence[Any]) -> None:
        """Hold the arrays of an object until ``drop``."""
        with self._lock:
            self._objects[obj_id] = arrays

    def drop(self, obj_id: str) -> None:
        """Let go of an object; a transfer of it that is under way is finished."""
        with self._lock:
            self._objects.pop(obj_id, None)

    def close(self) -> None:
        """Let go of everything, and answer nobody any more. Idempotent."""
        with self._lock:
            self._is_closed = True
            self._objects.clear()
            serving = list(self._serving)
        exit_hooks.unregister(self)
        self._door.stop()
        for sock in serving:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits on it
        self._listener.close()

    def disown(self) -> None:
        """Close a forked child's copies of the sockets; it makes a source of its own."""
        global _lock
        self._door.disown()
        for sock in (self._listener, *self._serving):
            sock.close()
        _sources.clear()
        _lock = threading.Lock()  # a thread that the child does not have may hold it

    def _note_refused(self, what: str, error: Exception) -> None:
        """A receiver fails; the next may find descriptors and threads."""
        _LOG.warning("group %r (rank %d): %s: %s", self._group_name, 0, what, error)

    def _serve(self, sock: socket.socket) -> None:
        """Answer one receiver until it goes; what fails here fails there too."""
        with self._lock:
            self._serving.add(sock)

        try:
            self._door.verify(sock, self._secret_of)
            group = form_group(sock, 0, self.endpoint.who, time.monotonic() + TIMEOUT_S)
            try:
                while not self._is_closed:
                    self._answer(sock, group)
            finally:
                group.destroy()
        except CollectiveError as error:
            _LOG.warning(
                "group %r (rank %d): failed, in the receiver too: %s", self._group_name, 0, error
            )
        except OSError as error:  # the receiver went, or has not asked for long, or was no receiver
            _LOG.debug(
                "group %r (rank %d): stops answering a receiver: %s", self._group_name, 0, error
            )
        finally:
            with self._lock:
                self._serving.discard(sock)

    def _secret_of(self, context: bytes) -> bytes | None:
        return self.endpoint.secret if context == CONTEXT else None

    def _answer(self, sock: socket.socket, group: Group) -> None:
        """Wait for one request and serve it; keeps no reference to the arrays."""
        kind, payload = net.recv_frame(sock, time.monotonic() + _PATIENCE_S, net.UNPROVEN_LIMIT)
        if kind != Step.WANTED:
            raise net.FrameError(f"expected a request, got a frame of kind {kind}")
        obj_id = payload.decode()
        with self._lock:
            arrays = self._objects.get(obj_id)

        try:
            if arrays is None:
                raise GroupError(
                    "it was freed there: keep an ObjectRef as long as somebody may fetch it"
                )
            views = views_of(arrays)
        except CollectiveError as error:
            _LOG.warning(
                "group %r (rank %d): cannot send object %s: %s", self._group_name, 0, obj_id, error
            )
            net.send_frame(sock, Step.FAILED, encode_error(error), time.monotonic() + TIMEOUT_S)
            return

        net.send_frame(sock, Step.READY, b"", time.monotonic() + TIMEOUT_S)
        group.send(list(arrays), 1)
        if views[0].device.type != "cpu":
            group.synchronize()


_lock = threading.Lock()
_sources: Final[list[Source]] = []
"""This process's source, once there is one."""


def local_source() -> Source:
    """Return this process's source, made on first use."""
    with _lock:
        if not _sources:
            _sources.append(Source())
        return _sources[0]


def let_go(obj_id: str) -> None:
    """Drop an object from this process's source, if there is one."""
    if _sources:
        _sources[0].drop(obj_id)


def close() -> None:
    """Close this process's source; the next object makes a new one."""
    with _lock:
        sources, _sources[:] = list(_sources), []
    for source in sources:
        source.close()


def _who_am_i() -> str:
    actor = ray.get_runtime_context().get_actor_id()
    place = f"process {os.getpid()} on {socket.gethostname()}"
    return f"{place}, no actor" if actor is None else f"actor {actor} ({place})"
