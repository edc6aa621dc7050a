"""A control plane without rendezvous, threads or failure detection: what a backend needs to be tested alone."""

from __future__ import annotations

import os
import pickle
import socket
import struct
import time


class FakeControl:
    """A star of stream sockets around rank 0, met at a path."""

    def __init__(self, path: str, rank: int, world_size: int, group_name: str = "tested") -> None:
        self.rank = rank
        self.world_size = world_size
        self.group_name = group_name
        self.addresses = [("127.0.0.1", 1)] * world_size
        self.secret, self.generation = b"of the test", b"1"
        self.failure: BaseException | None = None
        self.exchanges = 0
        self.checks = 0
        self._links: list[socket.socket] = []
        if rank == 0:
            self._accept(path)
        else:
            self._links.append(self._dial(path))

    def _accept(self, path: str) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(self.world_size)
            found = {}
            for _ in range(self.world_size - 1):
                link, _ = listener.accept()
                found[struct.unpack("<I", _read(link, 4))[0]] = link
        os.unlink(path)
        self._links = [found[rank] for rank in sorted(found)]

    def _dial(self, path: str) -> socket.socket:
        for _ in range(1000):
            link = socket.socket(socket.AF_UNIX)
            try:
                link.connect(path)
            except OSError:
                link.close()
                time.sleep(0.01)
                continue
            link.sendall(struct.pack("<I", self.rank))
            return link
        raise TimeoutError(f"nobody listens at {path}")

    def allgather(self, payload: bytes, deadline: float) -> list[bytes]:
        self.exchanges += 1
        for link in self._links:
            link.settimeout(max(deadline - time.monotonic(), 0.001))
        if self.rank:
            _send(self._links[0], payload)
            found: list[bytes] = pickle.loads(_receive(self._links[0]))
            return found
        found = [payload, *map(_receive, self._links)]
        for link in self._links:
            _send(link, pickle.dumps(found))
        return found

    def check(self) -> None:
        self.checks += 1
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        for link in self._links:
            link.close()


def _send(link: socket.socket, payload: bytes) -> None:
    link.sendall(struct.pack("<Q", len(payload)) + payload)


def _receive(link: socket.socket) -> bytes:
    return _read(link, struct.unpack("<Q", _read(link, 8))[0])


def _read(link: socket.socket, nbytes: int) -> bytes:
    found = b""
    while len(found) < nbytes:
        part = link.recv(nbytes - len(found))
        if not part:
            raise ConnectionError("the peer's fake control plane is gone")
        found += part
    return found
