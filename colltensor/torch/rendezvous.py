"""Rendezvous through the store that torchrun's agent serves at MASTER_ADDR:MASTER_PORT."""

from __future__ import annotations

import os
import time
from datetime import timedelta

# torch does not mark it exported.
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from colltensor.errors import OptionError
from colltensor.net import time_left
from colltensor.rendezvous import Directory

_CONNECT_S = 10.0


class StoreDirectory(Directory):
    """Leaves endpoints as keys of a ``torch.distributed.TCPStore`` that somebody else serves.

    Attributes:
        host: Where the store is served.
        port: Its port.
        secret: The secret that the user gave all ranks, since whoever reaches the store reads
            endpoints; empty if none.
    """

    def __init__(self, host: str, port: int, secret: bytes) -> None:
        self.host = host
        self.port = port
        self.secret = secret
        self._client: TCPStore | None = None

    def scope(self) -> str:
        """Say which place this is."""
        return f"store://{self.host}:{self.port}"

    def address(self) -> str | None:
        """Return the loopback where the agent has started all ranks; None with several hosts."""
        everybody, here = os.environ.get("WORLD_SIZE"), os.environ.get("LOCAL_WORLD_SIZE")
        return "127.0.0.1" if everybody and everybody == here else None

    def put(self, key: str, endpoint: bytes, stale: bytes) -> bytes | None:
        """Set the key: see Directory."""
        try:
            store = self._store(time.monotonic() + _CONNECT_S)
            found = _decoded(store.compare_set(_name(key), "", endpoint.hex()))
            if found == stale:
                store.set(_name(key), endpoint.hex())
        except DistError as error:
            raise OptionError(f"rank 0 cannot use {self._spelt()}: {error}; {_REMEDY}") from error
        return None if found in (endpoint, stale) else found

    def read(self, key: str, deadline: float) -> bytes | None:
        """Get the key if it is there: see Directory."""
        try:
            store = self._store(deadline)
            return _decoded(store.get(_name(key))) if store.check([_name(key)]) else None
        except DistError as error:
            self._client = None
            raise ConnectionError(f"{self._spelt()}: {str(error).splitlines()[0]}") from error

    def absent(self, key: str) -> str:
        """Say which key is not set: see Directory."""
        return f"it has not set the key {_name(key)} of {self._spelt()}"

    def remove(self, key: str, endpoint: bytes) -> None:
        """Delete the key: see Directory."""
        try:
            store = self._store(time.monotonic() + _CONNECT_S)
            if store.check([_name(key)]) and _decoded(store.get(_name(key))) == endpoint:
                store.delete_key(_name(key))
        except DistError as error:
            raise OSError(f"{self._spelt()}: {error}") from error

    def _store(self, deadline: float) -> TCPStore:
        """Return this directory's own connection: torch's waits for one call at a time."""
        if self._client is None:
            wait = timedelta(seconds=min(_CONNECT_S, time_left(deadline)))
            self._client = TCPStore(
                self.host, self.port, is_master=False, timeout=wait, wait_for_workers=False
            )
            self._client.set_timeout(timedelta(seconds=_CONNECT_S))
        return self._client

    def _spelt(self) -> str:
        return f"torchrun's store at {self.host}:{self.port}"


_REMEDY = "start the processes with torchrun, or unset TORCHELASTIC_USE_AGENT_STORE"


def _name(key: str) -> str:
    """Return the store's key; each restart of the job has keys of its own."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"colltensor/{run}/{attempt}/{key}"


def _decoded(value: bytes) -> bytes:
    try:
        return bytes.fromhex(value.decode())
    except ValueError:
        return b""
