"""Whose process is at the other end of a connection within one host, as the kernel has it."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import sys
from pathlib import Path
from typing import Final

_TABLES: Final = ("/proc/net/tcp", "/proc/net/tcp6")
_LOCAL, _REMOTE, _STATE, _USER, _INODE = 1, 2, 3, 7, 9
_ESTABLISHED: Final = "01"


def is_own(sock: socket.socket) -> bool:
    """Return whether a TCP connection comes from a process of this user, or of root, on this host.

    False also where that cannot be found out.
    """
    with contextlib.suppress(OSError, ValueError):
        # from another host; or by another of this one's addresses
        if sock.getpeername()[0] != sock.getsockname()[0]:
            return False
        user = _user_at(sock.getpeername(), sock.getsockname())
        return user in (os.geteuid(), 0)
    return False


def _user_at(local: tuple[object, ...], remote: tuple[object, ...]) -> int | None:
    """Return the user who owns this host's socket between two addresses.

    The layout of the tables is proc(5)'s.
    """
    ends = [_spellings(*end[:2]) for end in (local, remote)]
    for table in _TABLES:
        with contextlib.suppress(FileNotFoundError):
            for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[_LOCAL] in ends[0] and fields[_REMOTE] in ends[1]:
                    # Once its process has closed a socket, the table gives 0 as the user.
                    is_open = fields[_STATE] == _ESTABLISHED and fields[_INODE] != "0"
                    return int(fields[_USER]) if is_open else None
    return None


def _spellings(address: object, port: object) -> set[str]:
    """Return how the tables spell an address.

    They have it in words of 32 bits, as this machine has them, and mapped to IPv6 too.
    """
    parsed = ipaddress.ip_address(str(address).partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    plain = mapped or parsed
    forms = {plain.packed}
    if isinstance(plain, ipaddress.IPv4Address):
        forms.add(ipaddress.ip_address(f"::ffff:{plain}").packed)
    return {f"{_in_words(packed)}:{port:04X}" for packed in forms}


def _in_words(packed: bytes) -> str:
    words = (packed[start : start + 4] for start in range(0, len(packed), 4))
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)
