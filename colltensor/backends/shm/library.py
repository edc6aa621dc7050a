"""Loads the native library ``libcolltensor.so`` on first use, and says what to do where there is none.

Imports no framework.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Final

from colltensor import dlpack
from colltensor.errors import BackendUnavailableError

INTERFACE: Final = 3
"""What the library's ``shm_interface()`` must say: it counts the changes of its functions."""

_VARIABLE: Final = "COLLTENSOR_LIBRARY"
_BUILT: Final = Path(__file__).parents[2] / "lib" / "libcolltensor.so"

_loaded: list[Any] = []


def path() -> Path:
    """Return where the library should be; the variable ``COLLTENSOR_LIBRARY`` names another place."""
    return Path(os.environ.get(_VARIABLE) or _BUILT)


def reason() -> str | None:
    """Return None if the library can be used here, else why not and what to do. Loads nothing."""
    if _loaded:
        return None
    if sys.platform != "linux":
        return f"shared memory between ranks needs Linux, and this is {sys.platform}; use backend='gloo'"
    if not path().is_file():
        return (
            f"the native library is missing ({path()}): install a wheel for this platform (pip install "
            "--force-reinstall colltensor), or, where there is none, build it: install a C++17 compiler and CMake "
            "(apt-get install g++ cmake ninja-build) and run pip install --no-binary colltensor colltensor"
        )
    return None


def load() -> Any:
    """Return the library as a ``tvm_ffi.Module`` whose functions are the exports of native/src/exports.cpp.

    Raises:
        BackendUnavailableError: It is missing, of another version, or cannot be loaded.
    """
    if _loaded:
        return _loaded[0]
    why = reason()
    if why is not None:
        raise BackendUnavailableError(f"backend 'shm': {why}")
    try:
        module = dlpack.tvm_ffi().load_module(str(path()))
        version = module.shm_interface()
    except (RuntimeError, AttributeError, OSError) as error:
        raise BackendUnavailableError(
            f"backend 'shm': {path()} cannot be loaded: {error}; reinstall colltensor for this platform"
        ) from error
    if version != INTERFACE:
        raise BackendUnavailableError(
            f"backend 'shm': {path()} has interface {version}, and this colltensor needs {INTERFACE}: reinstall it"
        )
    _loaded.append(module)
    return module
