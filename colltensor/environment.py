"""The package's environment variables: their names, what they may say, and who misspelt them."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable
from typing import Final

from colltensor.errors import OptionError

LIBRARY: Final = "COLLTENSOR_LIBRARY"
READ_PEERS: Final = "COLLTENSOR_READ_PEERS"
OBSERVE: Final = "COLLTENSOR_OBSERVE"
HOST_ID: Final = "COLLTENSOR_HOST_ID"
SECRET: Final = "COLLTENSOR_SECRET"
SECRET_FILE: Final = "COLLTENSOR_SECRET_FILE"
ALLOW_PICKLE: Final = "COLLTENSOR_ALLOW_PICKLE"

KNOWN: Final = (LIBRARY, READ_PEERS, OBSERVE, HOST_ID, SECRET, SECRET_FILE, ALLOW_PICKLE)
_SWITCHES: Final = (READ_PEERS, ALLOW_PICKLE)
_PREFIX: Final = "COLLTENSOR_"
OF_DEVELOPERS: Final = ("COLLTENSOR_TEST_", "COLLTENSOR_FUZZ_")
_SWITCH: Final = {
    **dict.fromkeys(("", "1", "on", "true", "yes"), True),
    **dict.fromkeys(("0", "off", "false", "no"), False),
}
_HOST_ID_LIMIT: Final = 256
_LIKENESS: Final = 0.6
_LIKENESS_OF_VARIABLES: Final = 0.82
"""Which begin alike."""
_log: Final = logging.getLogger(__name__)
_named: Final[set[str]] = set()
"""Unknown variables of which this process was told."""


def check() -> None:
    """Check the values of the package's variables.

    Raises:
        OptionError: A variable has a value that means nothing.
    """
    for name in _SWITCHES:
        is_on(name)
    if len(os.environ.get(HOST_ID, "").encode(errors="replace")) > _HOST_ID_LIMIT:
        raise OptionError(
            f"{HOST_ID}: expected a host's name of at most {_HOST_ID_LIMIT} bytes, got {len(os.environ[HOST_ID])}"
        )


def name_unknown(group_name: str, rank: int) -> None:
    """Warn of variables that nobody knows, in the name of the group that is made.

    Warns of each once a process.
    """
    for name in os.environ:
        if name.startswith(_PREFIX) and name not in KNOWN and name not in _named:
            _named.add(name)
            if not name.startswith(OF_DEVELOPERS):
                _log.warning(
                    "group %r (rank %d): the environment variable %s means nothing to colltensor%s; it knows %s",
                    group_name,
                    rank,
                    name,
                    meant(name),
                    ", ".join(KNOWN),
                )


def meant(name: str) -> str:
    """Return a question about a variable that nobody knows, for the middle of a message.

    Returns "" where it is like none.
    """
    return did_you_mean(name, KNOWN, _LIKENESS_OF_VARIABLES)


def is_on(variable: str) -> bool:
    """Return what a variable says that switches something off; on where it is not set.

    Raises:
        OptionError: It says something else.
    """
    said = os.environ.get(variable, "")
    try:
        return _SWITCH[said.strip().lower()]
    except KeyError:
        raise OptionError(f"{variable}: expected 0 (off) or 1 (on), got {said!r}") from None


def did_you_mean(name: str, known: Iterable[str], likeness: float = _LIKENESS) -> str:
    """Return a question about a misspelt name, for the middle of a message.

    It is "" where the name is like none of ``known``.
    """
    found = difflib.get_close_matches(name, known, 1, likeness)
    return f" (did you mean {found[0]!r}?)" if found else ""
