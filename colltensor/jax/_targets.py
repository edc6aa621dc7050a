"""The targets that compiled computations call for every collective, on the CPU and on CUDA devices.

On the CPU the native target has shared memory alone, and leaves to Python the calls that it does
not end. On a device Python does all of it: the call is queued on the computation's stream, and the
host goes on.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

import jax
import numpy as np

from colltensor import bridge, dlpack, observers
from colltensor.adapters import add_adapter
from colltensor.adapters._numpy_dtypes import host_dtype
from colltensor.backends.shm import library
from colltensor.errors import BackendUnavailableError, CollectiveError
from colltensor.group import Group
from colltensor.jax import _device
from colltensor.jax._device import DeviceBuffer
from colltensor.jax._groups import group_of, inside
from colltensor.operations import NATIVE_NAMES
from colltensor.types import DTYPES, ReduceOp

TARGET: Final = "colltensor"
"""The name under which XLA knows the target of every collective, on each platform."""

_REFUSED: Final = 3
_DTYPES: Final = {dtype.code: dtype for dtype in DTYPES.values()}
_log: Final = logging.getLogger(__name__)
_notified: Final[set[tuple[int, str]]] = set()
"""The groups, by number, and operations of which the log has that they go through Python."""
_lock: Final = threading.Lock()
_registered: Final = threading.Event()


def register() -> None:
    """Make the targets known to XLA, once a process, whichever threads come first.

    Raises:
        BackendUnavailableError: jax-tvm-ffi or the native library is missing; says what to install.
    """
    if not _registered.is_set():
        with _lock:
            if not _registered.is_set():
                _register()
                _registered.set()


def complete(
    number: int,
    code: int,
    dtype: int,
    operation: int,
    op: int,
    root: int,
    source: int,
    given_address: int,
    given_nbytes: int,
    result_address: int,
    result_nbytes: int,
) -> None:
    """End what the native target left: a mismatch, a failure, or a call it cannot make."""
    group, name = group_of(number), NATIVE_NAMES[operation]
    if code == _REFUSED and (number, name) not in _notified:
        _notified.add((number, name))
        _notify(group, name)

    host = host_dtype(_DTYPES[dtype])
    given = _memory(given_address, given_nbytes, host)
    result = _memory(result_address, result_nbytes, host)
    with inside(group, name):
        tensors = _tensors(operation, given, result)
        if code != _REFUSED and bridge.complete(group, operation, op, root, source, tensors, code):
            return
        _move(group, name, op, root, source, given, result)


def _notify(group: Group, name: str) -> None:
    """Log, once for each group and operation, that jitted calls go through Python, and why."""
    if group.backend != "shm":
        reason = f"backend {group.backend!r} is not reached from native code"
    elif observers.is_observed():
        reason = "its operations are observed"
    else:
        reason = "an asynchronous eager call was before it, or the call has no native way (its dtype, op or size)"
    _log.debug(
        "group %r (rank %d): a jitted %s goes through Python, which takes tens of microseconds more: %s",
        group.name,
        group.rank,
        name,
        reason,
    )


def queue(
    number: int,
    dtype: int,
    operation: int,
    op: int,
    root: int,
    source: int,
    stream: int,
    device: int,
    given_address: int,
    given_nbytes: int,
    result_address: int,
    result_nbytes: int,
) -> None:
    """Queue a call on a device, on the stream of the computation.

    The host waits at most for ranks that connect. The memory is XLA's, which gives it to others in
    the order of this stream. Where the operand and the result are one array, as the lowering says,
    they have one address.

    Raises:
        CollectiveError: The call cannot be queued, or the two do not have one address. The result
            would be of other elements then.
    """
    group, name, kind = group_of(number), NATIVE_NAMES[operation], _DTYPES[dtype]
    is_one_way = name == "transfer" and (root < 0 or source < 0)
    in_place = name in ("allreduce", "reduce", "broadcast") or is_one_way
    if in_place and given_nbytes and given_address != result_address:
        raise CollectiveError(
            f"{name}: XLA gave the operand and the result of a call in place memory of their own: colltensor and this "
            "version of JAX do not fit each other; call it outside of jax.jit"
        )

    given = DeviceBuffer(given_address, given_nbytes // kind.itemsize, kind, device, stream)
    result = DeviceBuffer(result_address, result_nbytes // kind.itemsize, kind, device, stream)
    with inside(group, name), _device.on(stream):
        _move(group, name, op, root, source, given, result)


def _memory(address: int, nbytes: int, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    if nbytes == 0:
        return np.empty(0, dtype)
    memory: Any = (ctypes.c_char * nbytes).from_address(address)
    array: np.ndarray[Any, Any] = np.frombuffer(memory, dtype)
    return array


def _tensors(
    operation: int, given: np.ndarray[Any, Any], result: np.ndarray[Any, Any]
) -> list[np.ndarray[Any, Any]]:
    """Return what the ranks compare by: for a list the tensor that has its entries' count."""
    if NATIVE_NAMES[operation] == "allgather":
        return [given]
    return [given, result] if NATIVE_NAMES[operation] == "transfer" else [result]


def _move(
    group: Group, name: str, op: int, root: int, source: int, given: Any, result: Any
) -> None:
    """Make the call on the group as an eager one."""
    if name == "allreduce":
        group.allreduce(result, ReduceOp(op))
    elif name == "reduce":
        group.reduce(result, root, ReduceOp(op))
    elif name == "broadcast":
        group.broadcast(result, root)
    elif name == "allgather":
        group.allgather(result, given)
    elif name == "reducescatter":
        group.reducescatter(result, given, ReduceOp(op))
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
            "'jax-tvm-ffi>=0.1.3' (it needs JAX 0.9.1 and Python 3.11 or newer); outside jax.jit, "
            "colltensor.allreduce(x) works without"
        ) from error


def _in_words(function: Callable[..., None]) -> Callable[..., str | None]:
    """Return a function that returns the message of an error of ``function``.

    Native code raises it. Raised here, the error would be given the trace of C++ on its way. For
    that tvm-ffi reads the symbols of the whole process: half a second of the processor, and seconds
    under load (apache-tvm-ffi 0.1.15).
    """

    def told(*numbers: int) -> str | None:
        try:
            function(*numbers)
        except BaseException as error:  # noqa: BLE001 - XLA raises its own with this message
            return str(error) or type(error).__name__
        return None

    return told


def _register() -> None:
    convert, native = dlpack.tvm_ffi().convert, library.load()
    _make_known(native.shm_jax_target(convert(_in_words(complete))), "cpu")
    add_adapter(_device.ADAPTER)
    # Kept by JAX until there is a CUDA device, if ever.
    _make_known(native.shm_jax_device_target(convert(_in_words(queue))), "gpu", on_device=True)


def _make_known(
    function: Any, platform: str, *, name: str = TARGET, on_device: bool = False
) -> None:
    """Register a target with XLA, behind the handler that takes the token out.

    It may not be part of a CUDA graph, which would call it once for all its runs.
    """
    order = [*(["ctx.stream"] if on_device else []), "args", "rets"]
    capsule = _jax_tvm_ffi().register_ffi_target(f"{name}_without_token", function, order, platform)

    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    handler = library.load().shm_jax_without_token(pointer(capsule, None), on_device)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform=platform)
