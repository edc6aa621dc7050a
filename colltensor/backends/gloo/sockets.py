"""Shuts Gloo's connections from outside, because no call of Gloo's does that properly.

``ProcessGroupGloo.abort()`` and ``shutdown()`` leave an operation in flight until its own timeout,
and the destructor waits for it (torch 2.13). Shutting the sockets ends it at once: Gloo's loop
reads the end of the stream and fails what waits.
"""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Iterable
from typing import Final

_MOST_DESCRIPTORS: Final = 1 << 16

Endpoint = tuple[str, int]
"""An address, as text, and a port."""

_LENGTH: Final = rb"[\x80-\xff]\x00{7}"
_SOCKADDR_IN: Final = re.compile(_LENGTH + rb"\x02\x00(..)(.{4})", re.DOTALL)
_SOCKADDR_IN6: Final = re.compile(_LENGTH + rb"\x0a\x00(..).{4}(.{16})", re.DOTALL)
"""How Gloo publishes an address: its length in 8 bytes, then the address and a number.

The address is Linux's ``struct sockaddr_storage`` of 128 bytes. The rest of the structure is not
set to zero. (Little-endian, as Gloo is used.)
"""


def listeners(published: Iterable[bytes]) -> frozenset[Endpoint]:
    """Return where Gloo's ranks listen, read from what they published in the store."""
    found: set[Endpoint] = set()
    for value in published:
        for family, pattern in ((socket.AF_INET, _SOCKADDR_IN), (socket.AF_INET6, _SOCKADDR_IN6)):
            for port, address in pattern.findall(value):
                found.add((socket.inet_ntop(family, address), int.from_bytes(port, "big")))
    return frozenset(found)


def _descriptors() -> Iterable[int]:
    """Return the numbers of this process's descriptors.

    Return all possible ones where there is no /proc.
    """
    try:
        return map(int, os.listdir("/proc/self/fd"))
    except OSError:
        return range(min(os.sysconf("SC_OPEN_MAX"), _MOST_DESCRIPTORS))


def shut_connections(endpoints: frozenset[Endpoint]) -> int:
    """Shut this process's connections that have one of ``endpoints`` at either end.

    Return how many. Every connection of Gloo was dialled to a rank's listener, and no other has one
    at an end. The listeners themselves stay: Gloo ends the process when accepting fails.
    """
    shut = 0

    for descriptor in _descriptors():
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            # A copy, because the object closes its descriptor in the end, and Gloo needs its own.
            connection = socket.socket(fileno=os.dup(descriptor))
        except OSError:
            continue  # closed meanwhile

        with connection:
            try:
                ends = {connection.getsockname()[:2], connection.getpeername()[:2]}
                if connection.family in (socket.AF_INET, socket.AF_INET6) and ends & endpoints:
                    connection.shutdown(socket.SHUT_RDWR)
                    shut += 1
            except OSError:
                continue  # a listener, or the peer has gone
    return shut
