"""Rendezvous through the store that torchrun's agent serves at MASTER_ADDR:MASTER_PORT."""

from __future__ import annotations

import os
import time
from datetime import timedelta

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # torch does not mark it exported

from colltensor import net
from colltensor.errors import CollectiveTimeoutError, OptionError
from colltensor.net import time_left
from colltensor.rendezvous.joining import another_rank_0_lives, who_am_i
from colltensor.rendezvous.protocol import taken

_CONNECT_S = 10.0
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.005, 0.25


class StoreDirectory:
    """Leaves endpoints as keys of a ``torch.distributed.TCPStore`` that somebody else serves.

    Attributes:
        host: Where the store is served.
        port: Its port.
        secret: What the user gave all ranks, since whoever reaches the store reads endpoints; empty if nothing.
    """

    def __init__(self, host: str, port: int, secret: bytes) -> None:
        self.host = host
        self.port = port
        self.secret = secret
        self._client: TCPStore | None = None
        self._published: dict[str, bytes] = {}

    @property
    def scope(self) -> str:
        """Say which place this is."""
        return f"store://{self.host}:{self.port}"

    @property
    def address(self) -> str | None:
        """The loopback where the agent has started all ranks; None if there are several hosts."""
        everybody, here = os.environ.get("WORLD_SIZE"), os.environ.get("LOCAL_WORLD_SIZE")
        return "127.0.0.1" if everybody and everybody == here else None

    def publish(self, key: str, endpoint: bytes) -> None:
        """Set the key: see Directory."""
        text = endpoint.hex()
        name = _name(key)
        try:
            store = self._store(time.monotonic() + _CONNECT_S)
            found = store.compare_set(name, "", text)
            if found.decode() != text:
                if another_rank_0_lives(_decoded(found), key, self.secret):
                    raise taken(0, [who_am_i(), f"another process that wrote the key {name}"])
                store.set(name, text)
        except DistError as error:
            raise OptionError(f"rank 0 cannot use {self._spelt()}: {error}; {_REMEDY}") from error
        self._published[key] = endpoint

    def locate(self, key: str, deadline: float) -> bytes:
        """Get the key once it is there: see Directory."""
        name = _name(key)
        backoff = net.Backoff(_FIRST_PAUSE_S, _LAST_PAUSE_S, deadline)
        reason = "the key was not set"
        while True:
            try:
                store = self._store(deadline)
                if store.check([name]):
                    return _decoded(store.get(name))
            except (DistError, TimeoutError) as error:
                self._client = None
                reason = str(error).splitlines()[0]
            if not backoff.pause():
                raise CollectiveTimeoutError(
                    f"expected rank 0 to set the key {name} of {self._spelt()} within the timeout, but: {reason}; "
                    f"start rank 0, with the same group_name, or allow more time with timeout_s",
                    (0,),
                )

    def withdraw(self, key: str) -> None:
        """Delete the key if it is still the one that was set here."""
        mine = self._published.pop(key, None)
        if mine is None:
            return
        try:
            store = self._store(time.monotonic() + _CONNECT_S)
            if store.check([_name(key)]) and _decoded(store.get(_name(key))) == mine:
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
