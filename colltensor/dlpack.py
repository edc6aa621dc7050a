"""Loads DLPack's Python package (tvm_ffi) on first use, without the frameworks it would load."""

from __future__ import annotations

import ctypes
import importlib
import sys
import threading
from typing import Any, Final

READ_ONLY: Final = 1
IS_COPIED: Final = 2
"""Flags of an export: its memory must not be written; it is no longer the exporter's own."""
_VERSIONED: Final = b"dltensor_versioned"
_EXCHANGE: Final = b"dlpack_exchange_api"
_READER_WORD: Final = 5
"""Where DLPackExchangeAPI has ``dltensor_from_py_object_no_sync``, in words.

It is behind its version, the address of an older one, an allocator and two conversions.
"""
_FLAGS_OFFSET: Final = 24
"""Where DLManagedTensorVersioned has its flags.

They are after the version, the manager's context and the deleter.
"""
_capsule_is_valid: Final = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is_valid.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule_pointer: Final = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


class _TorchNotHere:
    """A finder that hides torch from one thread for as long as it is on ``sys.meta_path``.

    tvm_ffi's ``__init__`` tries ``import torch`` only to fix a symbol conflict on Windows and works
    with a torch that is imported later. To go when tvm_ffi imports torch lazily (seen in 0.1.15).
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torch" and threading.get_ident() == self._thread:
            raise ModuleNotFoundError("torch is hidden while tvm_ffi is imported", name="torch")


def tvm_ffi() -> Any:
    """Return the package tvm_ffi, imported without the torch that it would import."""
    finder = _TorchNotHere()
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module("tvm_ffi")
    finally:
        sys.meta_path.remove(finder)


def export(tensor: Any) -> Any:
    """Return the DLPack handle (``tvm_ffi.Tensor``) of any object that exports DLPack.

    Raises:
        BufferError: The object cannot be exported (read-only numpy memory, for instance).
    """
    function = tvm_ffi().from_dlpack
    globals()["export"] = function  # from now on callers reach tvm_ffi's function at once
    return function(tensor)


def export_with_flags(tensor: Any) -> tuple[Any, int]:
    """Do as ``export`` and return the flags too.

    Only an export of DLPack 1.x has them; they are 0 for an older one. ``export`` never sees them:
    tvm_ffi 0.1.15 asks for an unversioned export. To go when it passes ``max_version``.
    """
    try:
        capsule = tensor.__dlpack__(max_version=(1, 0))
    except TypeError:
        # An exporter from before DLPack 1.0, or one that cannot export this tensor and says so
        # again.
        return export(tensor), 0
    flags = 0
    if _capsule_is_valid(capsule, _VERSIONED):
        flags = ctypes.c_uint64.from_address(
            _capsule_pointer(capsule, _VERSIONED) + _FLAGS_OFFSET
        ).value
    return export(capsule), flags


def capsule_pointer(capsule: Any) -> int:
    """Return the address that a capsule without a name has."""
    return _capsule_pointer(capsule, None) or 0


def exchange_reader(kind: type) -> int:
    """Return the address of the C function that says where tensors of a type lie.

    The function is ``dltensor_from_py_object_no_sync`` of DLPack's exchange API for C, which a type
    has as ``__dlpack_c_exchange_api__``. The address is 0 if the type has none.
    """
    capsule = getattr(kind, "__dlpack_c_exchange_api__", None)
    if capsule is None or not _capsule_is_valid(capsule, _EXCHANGE):
        return 0
    place = _capsule_pointer(capsule, _EXCHANGE)
    while place:
        words = (ctypes.c_uint64 * (_READER_WORD + 1)).from_address(place)
        if words[0] & 0xFFFFFFFF == 1:  # the major version, of two numbers of 32 bits
            return words[_READER_WORD]
        place = words[1]
    return 0
