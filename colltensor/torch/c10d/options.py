"""torch's options of a call, also from its short spelling, which gives them one by one."""

from __future__ import annotations

from datetime import timedelta
from typing import Any


def options(kind: Any, given: Any, timeout: timedelta | None = None, **short: Any) -> Any:
    """Return options of a kind.

    Args:
        kind: The class of the options.
        given: They themselves, or the value of the first of ``short``, or None.
        timeout: How long the call may wait for other ranks; None for as long as the process group's calls do.
        **short: Values of attributes; None where it is not given.
    """
    if isinstance(given, kind):
        return given
    made = kind()
    if given is not None:
        short[next(iter(short))] = given
    for name, value in short.items():
        if value is not None:
            setattr(made, name, value)
    if timeout is not None:
        made.timeout = timeout
    return made
