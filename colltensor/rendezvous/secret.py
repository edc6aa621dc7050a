"""The secret that a user gives all ranks where the way to meet can carry none of its own."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import stat
import threading
from typing import Final

from colltensor.errors import OptionError

VARIABLE: Final = "COLLTENSOR_SECRET"
FILE_VARIABLE: Final = "COLLTENSOR_SECRET_FILE"
MISTAKE: Final = f"give every rank the same {VARIABLE}, or {FILE_VARIABLE} with the same contents"
"""What to do where the ranks have different secrets."""

_LIMIT: Final = 1 << 16
_LOG: Final = logging.getLogger(__name__)
_warned: Final = threading.Event()


def given_secret() -> bytes:
    """Return the secret of the environment, without white space around it; empty if there is none.

    It is the variable's own bytes, or the contents of the file that the other variable names.

    Raises:
        OptionError: The file cannot be read, has no secret, or the variables contradict each other.
    """
    secret = os.fsencode(os.environ.get(VARIABLE, "")).strip()
    path = os.environ.get(FILE_VARIABLE, "")
    if not path:
        return secret

    in_file = _contents(path).strip()
    if not in_file:
        raise OptionError(f"{FILE_VARIABLE}: the file {path!r} is empty; write the secret into it")
    if secret and secret != in_file:
        raise OptionError(
            f"{VARIABLE} and {FILE_VARIABLE} give different secrets; unset one of them"
        )

    return in_file


def derived(secret: bytes, public: bytes, said: bytes) -> bytes:
    """Return the secret of one meeting.

    It is derived from what its ranks were given and what anybody may have read.

    Args:
        secret: What the ranks were given; without it the second is all there is.
        public: Random bytes that one of them has written.
        said: All else that was written. Ranks who read something else there get another secret. So
            nobody can lead them elsewhere and pass their proofs on.
    """
    if not secret:
        return public
    whole = len(public).to_bytes(8, "big") + public + said
    return hmac.new(secret, b"colltensor meeting" + whole, hashlib.sha256).digest()


def proof(secret: bytes, public: bytes) -> bytes:
    """Return what shows to others with the same secret that one has it.

    It leads nobody else to the secret. It is empty without one.
    """
    return (
        hmac.new(secret, b"colltensor proof" + public, hashlib.sha256).digest() if secret else b""
    )


def warn_of_strangers(host: str, group_name: str, rank: int) -> None:
    """Warn, as rank 0, that ranks meet without a secret where other hosts may come.

    Warns once a process.

    Args:
        host: Where they meet, a name or an address.
        group_name: The group's name, for the log.
        rank: This process's rank.
    """
    if rank != 0 or _is_loopback(host) or _warned.is_set():
        return

    _warned.set()
    _LOG.warning(
        "group %r (rank %d): the ranks meet at %s without a secret: whoever reaches that port can take a rank's place "
        "and have programs run in the others. Set the variable %s to the same long random text on all ranks, or %s to "
        "a file that holds it",
        group_name,
        rank,
        host,
        VARIABLE,
        FILE_VARIABLE,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def _contents(path: str) -> bytes:
    try:
        # A named pipe would block whoever opens it.
        with open(
            path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
        ) as file:
            is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            contents = file.read(_LIMIT + 1) if is_file else b""
    except OSError as error:
        raise OptionError(
            f"{FILE_VARIABLE}: the file {path!r} cannot be read: {error.strerror}"
        ) from error

    if not is_file:
        raise OptionError(
            f"{FILE_VARIABLE}: expected the name of a file, got {path!r}, which is something else"
        )

    if len(contents) > _LIMIT:
        raise OptionError(
            f"{FILE_VARIABLE}: expected a secret of at most {_LIMIT} bytes in {path!r}"
        )
    return contents
