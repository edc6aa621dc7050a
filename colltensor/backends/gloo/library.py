"""Loads the native library of Gloo, ``libcolltensor_gloo.so``, on first use.

It says why where there is none. The library lies beside ``libcolltensor.so`` and was built where
Gloo's headers were found.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

from colltensor.backends.shm import library
from colltensor.errors import BackendUnavailableError

INTERFACE: Final = 4
"""The required result of the library's ``gloo_interface()``.

It counts the changes of its functions, and of the messages between ranks.
"""

_loaded: list[Any] = []


def path() -> Path:
    """Return where the library should be."""
    return library.path().with_name("libcolltensor_gloo.so")


def reason() -> str | None:
    """Return None if the library is there, else why not and what to do. Loads nothing."""
    if _loaded:
        return None
    if sys.platform != "linux":
        return f"it needs Linux, and this is {sys.platform}"
    if path().is_file():
        return None
    return (
        f"{path()} is missing: this colltensor was built where Gloo's headers were not found (install them, "
        f"apt-get install libgloo-dev, and build again: {library.REINSTALL} or, in a checkout, pip install -e .)"
    )


def load() -> Any:
    """Return the library as a ``tvm_ffi.Module``, with the exports of native/gloo/exports.cpp.

    Raises:
        BackendUnavailableError: It is missing, of another version, or cannot be loaded.
    """
    if not _loaded:
        why = reason()
        if why is not None:
            raise BackendUnavailableError(f"backend 'gloo', provider 'native': {why}")
        _loaded.append(
            library.open_library(
                path(), "backend 'gloo', provider 'native'", "gloo_interface", INTERFACE
            )
        )
    return _loaded[0]


def version() -> str:
    """Return what must be the same on ranks that meet: the interface and Gloo's own version.

    Raises:
        BackendUnavailableError: As ``load``.
    """
    return f"{INTERFACE}.{load().gloo_version()}"
