"""Loads DLPack's Python package (tvm_ffi) on first use, without the frameworks it would load.

Imports no framework: ``import tvm_ffi`` imports torch where torch is installed, which takes more
than a second and several hundred megabytes in a process that has no use for torch.
"""

from __future__ import annotations

import importlib
import sys
import threading
from typing import Any


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
