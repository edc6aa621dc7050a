"""The groups that compiled computations name, and what ends a call that the native target did not.

A computation holds a group's number, never a pointer: it may be called when the group is gone. Imports jax, numpy and
jax-tvm-ffi.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
import threading
import weakref
from types import ModuleType
from typing import Any, Final

import jax
import numpy as np

from colltensor import dlpack, observers
from colltensor.adapters._numpy_dtypes import host_dtype
from colltensor.backends.base import DIRECT
from colltensor.backends.shm import library
from colltensor.errors import BackendUnavailableError, GroupError
from colltensor.group import Group
from colltensor.types import DTYPES, ReduceOp

TARGET: Final = "colltensor"
"""The name under which XLA knows the target of every collective."""

_REFUSED: Final = 3
_NAMES: Final = tuple(DIRECT)
_DTYPES: Final = {dtype.code: dtype for dtype in DTYPES.values()}
_numbers: Final[weakref.WeakKeyDictionary[Group, int]] = weakref.WeakKeyDictionary()
_groups: Final[weakref.WeakValueDictionary[int, Group]] = weakref.WeakValueDictionary()
_count: Final = itertools.count(1)
_lock: Final = threading.Lock()
_registered: Final = threading.Event()
_here: Final = threading.local()
"""``inside`` is True in a thread that runs a collective for XLA: it must not wait for XLA."""


def number_of(group: Group) -> int:
    """Return the group's number, the same for as long as the group lives and never another group's."""
    with _lock:
        number = _numbers.get(group)
        if number is None:
            number = _numbers[group] = next(_count)
            _groups[number] = group
            defer = functools.partial(_defer, group.shared_memory())
            group.follow(_wait, defer)
            defer(False)
    return number


def group_of(number: int) -> Group:
    """Return the group.

    Raises:
        GroupError: It is gone.
    """
    group = _groups.get(number)
    if group is None:
        raise GroupError(
            "a jitted function uses a group that is gone; make the group again and jit the function anew, so that it "
            "is traced with the new group"
        )
    return group


def _wait() -> None:
    """Wait for the jitted collectives that this thread has started. A failed one raises where its result is read."""
    if getattr(_here, "inside", False):
        return
    try:
        jax.effects_barrier()
    except jax.errors.JaxRuntimeError:
        forget_failures()


def forget_failures() -> None:
    """Let later computations of this thread run, after an asynchronous one failed: JAX keeps its token otherwise."""
    from jax._src import dispatch  # the tokens have no public name

    dispatch.runtime_tokens.clear()


def _defer(handle: int, on: bool) -> None:
    """Let jitted calls queue behind the group's asynchronous eager ones, or go straight to shared memory again.

    While there are observers, they go through the group's methods in any case.
    """
    if handle >= 0:
        library.load().shm_jax_defer(handle, on or observers.is_observed())


def _defer_all() -> None:
    """Let the jitted calls of all groups go through their methods, where they are observed.

    When nobody observes any more, they do so until the group's next asynchronous eager calls are done.
    """
    for group in list(_numbers):
        _defer(group.shared_memory(), True)


observers.on_start.append(_defer_all)


def _memory(address: int, nbytes: int, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    if nbytes == 0:
        return np.empty(0, dtype)
    memory: Any = (ctypes.c_char * nbytes).from_address(address)
    array: np.ndarray[Any, Any] = np.frombuffer(memory, dtype)
    return array


def _settle(
    number: int, code: int, dtype: int, operation: int, op: int, root: int, source: int, given_address: int,
    given_nbytes: int, result_address: int, result_nbytes: int,
) -> None:
    """End a call that the native target left: a mismatch, a failure, or all of it where that has no way to do it."""
    group = group_of(number)
    host = host_dtype(_DTYPES[dtype])
    given = _memory(given_address, given_nbytes, host)
    result = _memory(result_address, result_nbytes, host)
    outer, _here.inside = getattr(_here, "inside", False), True
    try:
        tensors = _tensors(operation, given, result)
        if code != _REFUSED and group.settle(operation, op, root, source, tensors, code):
            return
        _move(group, _NAMES[operation], op, root, source, given, result)
    except GroupError as error:
        remedy = "and jit the function anew: this one was traced with the group that is gone"
        raise GroupError(f"{error}; {remedy}") from error
    except KeyboardInterrupt as error:  # XLA passes on words alone
        raise GroupError(f"{_NAMES[operation]}: KeyboardInterrupt while rank {group.rank} waited") from error
    finally:
        _here.inside = outer


def _tensors(
    operation: int, given: np.ndarray[Any, Any], result: np.ndarray[Any, Any]
) -> list[np.ndarray[Any, Any]]:
    """Return what the ranks compare by: for a list the tensor that has its entries' count."""
    if _NAMES[operation] == "allgather":
        return [given]
    return [given, result] if _NAMES[operation] == "transfer" else [result]


def _move(
    group: Group, name: str, op: int, root: int, source: int, given: np.ndarray[Any, Any],
    result: np.ndarray[Any, Any],
) -> None:
    """Make the call on the group as an eager one."""
    if name == "allreduce":
        group.allreduce(result, ReduceOp(op))
    elif name == "reduce":
        group.reduce(result, root, ReduceOp(op))
    elif name == "broadcast":
        group.broadcast(result, root)
    elif name == "allgather":
        group.allgather(list(result.reshape(group.world_size, -1)), given)
    elif name == "reducescatter":
        group.reducescatter(result, list(given.reshape(group.world_size, -1)), ReduceOp(op))
    elif source < 0:
        group.send(result, root)
    elif root < 0:
        group.recv(result, source)
    else:
        group.sendrecv(given, root, result, source)


def _jax_tvm_ffi() -> ModuleType:
    dlpack.tvm_ffi()
    try:
        return importlib.import_module("jax_tvm_ffi")
    except ImportError as error:
        raise BackendUnavailableError(
            f"colltensor.jax: collectives inside jax.jit need the package jax-tvm-ffi ({error}): pip install "
            "'colltensor[jax]' (it needs Python 3.11 or newer); outside jax.jit, colltensor.allreduce(x) works without"
        ) from error


def register() -> None:
    """Make the target known to XLA, once a process, whichever threads come first.

    Raises:
        BackendUnavailableError: jax-tvm-ffi or the native library is missing; says what to install.
    """
    if not _registered.is_set():
        with _lock:
            if not _registered.is_set():
                _register()
                _registered.set()


def _register() -> None:
    bridge = _jax_tvm_ffi()
    native = library.load()
    function = native.shm_jax_target(dlpack.tvm_ffi().convert(_settle))
    capsule = bridge.register_ffi_target(f"{TARGET}_without_token", function, ["args", "rets"])
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    handler = native.shm_jax_without_token(pointer(capsule, None))
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(handler), platform="cpu")
