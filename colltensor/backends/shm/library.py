"""Loads the native library ``libcolltensor.so`` on first use.

Where there is none it says what to do.
"""

from __future__ import annotations

import array
import ctypes
import functools
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from colltensor import dlpack
from colltensor.errors import BackendUnavailableError

INTERFACE: Final = 18
"""What the library's ``shm_interface()`` must say: it counts the changes of its functions."""

TVM_FFI_SERIES: Final = "0.1"
"""The versions of apache-tvm-ffi that the library works with, whichever it was built against.

It uses their C ABI alone, and "bumps in X [of 0.X.Y] indicate C ABI-breaking changes"
(apache-tvm-ffi's README, "Status and Release Versioning"). pyproject.toml asks for the same; a new
series means to build and test again.
"""

_VARIABLE: Final = "COLLTENSOR_LIBRARY"
_NAME: Final = Path("lib", "libcolltensor.so")

REINSTALL: Final = "pip install --force-reinstall --no-deps . in the folder of colltensor's sources"
"""Nothing of the package's name is published."""
_loaded: list[Any] = []

_PYTHON_API: Final = (
    "PyList_Size",
    "PyList_GetItem",
    "PyErr_Clear",
    "PyEval_SaveThread",
    "PyEval_RestoreThread",
)
"""Of the stable ABI, in the order of ``PythonApi`` in native/src/python.h."""


def path() -> Path:
    """Return where the library should be; the variable ``COLLTENSOR_LIBRARY`` names another place.

    An editable install has two folders: the sources' and, for what was built, one in site-packages.
    """
    named = os.environ.get(_VARIABLE)
    if named:
        return Path(named)
    folders = sys.modules[__name__.partition(".")[0]].__path__
    places = [Path(folder) / _NAME for folder in folders]
    return next((place for place in places if place.is_file()), places[0])


def reason() -> str | None:
    """Return None if the library can be used here, else why not and what to do. Loads nothing."""
    if _loaded:
        return None
    if sys.platform != "linux":
        return f"shared memory between ranks needs Linux, and this is {sys.platform}; use backend='gloo'"
    place = path()
    if not place.is_file():
        if os.environ.get(_VARIABLE):
            return f"there is no file {place}, which the variable {_VARIABLE} names: build it, or unset the variable"
        return (
            f"the native library is missing ({place}): {REINSTALL}, which builds it and needs a C++17 compiler "
            "(apt-get install g++), or install a wheel made for this platform; in a checkout, pip install -e ."
        )
    return None


def load() -> Any:
    """Return the library as a ``tvm_ffi.Module``, with the exports of native/src/exports.cpp.

    Raises:
        BackendUnavailableError: It is missing, of another version, or cannot be loaded, or
            apache-tvm-ffi is of another series.
    """
    if _loaded:
        return _loaded[0]
    why = reason()
    if why is not None:
        raise BackendUnavailableError(f"backend 'shm': {why}")
    module = open_library(path(), "backend 'shm'", "shm_interface", INTERFACE)
    _loaded.append(module)
    return module


def exports(tensors: Sequence[Any]) -> bool:
    """Return True if the library can view the tensors."""
    try:
        load().shm_export_function()(*tensors)
    except (BufferError, TypeError, ValueError):
        return False
    return True


@functools.lru_cache
def reads_python() -> bool:
    """Let native code read Python's own objects; return False where it may not. Loads the library.

    It may in CPython with an interpreter lock. There an object's identity is its address, and the
    second word at it is the address of its type.
    """
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return False
    sample: list[object] = []
    if ctypes.c_void_p.from_address(id(sample) + ctypes.sizeof(ctypes.c_void_p)).value != id(list):
        return False
    functions = (getattr(ctypes.pythonapi, name) for name in _PYTHON_API)
    addresses = array.array(
        "q", (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
    )
    load().shm_set_python_api(addresses.buffer_info()[0])
    return True


def open_library(place: Path, where: str, function: str, interface: int) -> Any:
    """Load one of colltensor's native libraries.

    Args:
        place: The file.
        where: What needs it, for messages.
        function: Its function that returns its interface.
        interface: What that must be.

    Raises:
        BackendUnavailableError: The library cannot be loaded or is of another version, or
            apache-tvm-ffi is of another series.
    """
    tvm_ffi = dlpack.tvm_ffi()
    if not f"{tvm_ffi.__version__}.".startswith(f"{TVM_FFI_SERIES}."):
        raise BackendUnavailableError(
            f"{where}: {place} is built for apache-tvm-ffi {TVM_FFI_SERIES}, and {tvm_ffi.__version__} is "
            f"installed: pip install 'apache-tvm-ffi=={TVM_FFI_SERIES}.*'"
        )

    remedy = f"build {place} again" if os.environ.get(_VARIABLE) else REINSTALL
    try:
        module = tvm_ffi.load_module(str(place))
        version = getattr(module, function)()
    except (RuntimeError, AttributeError, OSError) as error:
        raise BackendUnavailableError(
            f"{where}: {place} cannot be loaded: {error}; {remedy}"
        ) from error

    if version != interface:
        raise BackendUnavailableError(
            f"{where}: {place} has interface {version}, and this colltensor needs {interface}; {remedy}"
        )
    return module
