"""Loopback: the backend of a group of one rank. Reductions are the identity, moves are copies."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from colltensor.backends.base import FAST_REFUSED, BackendBase
from colltensor.backends.shm import library
from colltensor.errors import BackendUnavailableError, DeviceError, OptionError, RankError
from colltensor.types import ReduceOp
from colltensor.view import BufferView

if TYPE_CHECKING:
    import numpy as np

_DEVICE_TYPES: Final = frozenset({"cpu", "cuda"})


class LoopbackBackend(BackendBase):
    """The transport of a group of one rank: none.

    Attributes:
        fast_calls: Makes calls on tensors as their frameworks made them. None where there is no
            native code, or was no array library when the group was made.
    """

    name = "loopback"
    device_types = _DEVICE_TYPES
    takes_strided = True
    needs_agreement = False

    def __init__(self) -> None:
        self.fast_calls: LoopbackCalls | None = None
        if "numpy" in sys.modules:  # else no arrays are in use yet, and native code would load it
            with contextlib.suppress(BackendUnavailableError):
                self.fast_calls = LoopbackCalls()

    def allreduce(self, buffers: Sequence[BufferView], op: ReduceOp, deadline: float) -> None:
        """Leave the buffers as they are: the combination of one rank's elements."""

    def reduce(
        self, buffers: Sequence[BufferView], root: int, op: ReduceOp, deadline: float
    ) -> None:
        """Leave the buffers as they are."""

    def broadcast(self, buffers: Sequence[BufferView], root: int, deadline: float) -> None:
        """Leave the buffers as they are."""

    def allgather(self, outputs: Sequence[BufferView], source: BufferView, deadline: float) -> None:
        """Copy ``source`` to ``outputs[0]``."""
        _copy(outputs[0], source)

    def gather(
        self, outputs: Sequence[BufferView] | None, source: BufferView, root: int, deadline: float
    ) -> None:
        """Copy ``source`` to ``outputs[0]``."""
        if outputs is not None:
            _copy(outputs[0], source)

    def scatter(
        self, target: BufferView, sources: Sequence[BufferView] | None, root: int, deadline: float
    ) -> None:
        """Copy ``sources[0]`` to ``target``."""
        if sources is not None:
            _copy(target, sources[0])

    def reducescatter(
        self, target: BufferView, sources: Sequence[BufferView], op: ReduceOp, deadline: float
    ) -> None:
        """Copy ``sources[0]`` to ``target``."""
        _copy(target, sources[0])

    def alltoall(
        self, outputs: Sequence[BufferView], sources: Sequence[BufferView], deadline: float
    ) -> None:
        """Copy ``sources[0]`` to ``outputs[0]``."""
        _copy(outputs[0], sources[0])

    def send(self, buffers: Sequence[BufferView], peer: int, deadline: float) -> None:
        """Raise RankError: there is no other rank."""
        raise RankError(
            f"send: rank {peer} is not in a group of one rank; make the group with more ranks"
        )

    def recv(self, buffers: Sequence[BufferView], peer: int, deadline: float) -> None:
        """Raise RankError: there is no other rank."""
        raise RankError(
            f"recv: rank {peer} is not in a group of one rank; make the group with more ranks"
        )

    def sendrecv(
        self, source: BufferView, dst: int, target: BufferView, src: int, deadline: float
    ) -> None:
        """Copy ``source`` to ``target``: both peers are this rank."""
        _copy(target, source)


class LoopbackCalls:
    """The fast calls of a group of one rank: the part of ``AgreeingBackend`` that it needs."""

    def __init__(self) -> None:
        self._native = library.load()

    def fast_call(
        self, operation: int, op: int, root: int, source: int, stacked: bool
    ) -> tuple[Callable[..., int], Callable[..., int]]:
        """Return two functions of the native library's: see ``AgreeingBackend``."""
        make, call = self._native.shm_loopback_function, (operation, op, root, source, stacked)
        brief, patient = make(*call, True), make(*call, False)
        brief.release_gil = False
        return brief, patient

    def complete(self, name: str, code: int) -> int:
        """Return FAST_REFUSED: a call that was not done takes the slow path."""
        return FAST_REFUSED

    def exports(self, tensors: Sequence[Any]) -> bool:
        """Return True if the library can view the tensors."""
        return library.exports(tensors)

    def abandon_pending(self) -> None:
        """Do nothing: no call is ever pending."""


class LoopbackSpec:
    """The table entry of ``LoopbackBackend``."""

    def available(self) -> str | None:
        """Return None: it can always be used."""
        return None

    def create(
        self,
        control: Any,
        meeting: Any,
        *,
        timeout_s: float,
        interface: str | None,
        provider: str | None,
    ) -> LoopbackBackend:
        """Return the backend; ``timeout_s``, ``interface`` and ``provider`` have nothing to decide.

        Raises:
            OptionError: The group has more than one rank.
        """
        if control is not None and control.world_size != 1:
            raise OptionError(
                f"backend 'loopback' serves groups of one rank, but group '{control.group_name}' has "
                f"{control.world_size}; use backend='auto'"
            )
        return LoopbackBackend()


SPEC: Final = LoopbackSpec()


def _copy(target: BufferView, source: BufferView) -> None:
    """Copy elements in row-major order; does nothing where both views are one."""
    if target.count == 0 or (target.pointer == source.pointer and target.strides == source.strides):
        return
    if target.device.type != "cpu" or source.device.type != "cpu":
        _copy_on_device(target, source)
    elif target.strides is None and source.strides is None:
        ctypes.memmove(target.pointer, source.pointer, target.nbytes)
    else:
        destination = _as_array(target)
        destination[...] = _as_array(source).reshape(destination.shape)


def _as_array(view: BufferView) -> np.ndarray[Any, Any]:
    """View host memory as a numpy array of uninterpreted elements."""
    import numpy as np

    low, high = view.span()
    memory: Any = (ctypes.c_char * (high - low)).from_address(low)
    size = view.dtype.itemsize
    steps = None if view.strides is None else [stride * size for stride in view.strides]
    array: np.ndarray[Any, Any] = np.ndarray(
        view.shape, f"V{size}", memory, view.pointer - low, steps
    )
    return array


def _copy_on_device(target: BufferView, source: BufferView) -> None:
    """Copy with the framework that is loaded; ready when it returns, as every result of a backend.

    The host waits for the device before it too, because this may be the group's worker thread. Its
    current stream says nothing about the one on which the caller's tensors are ready.
    """
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is None and cupy is None:
        raise DeviceError(
            f"backend 'loopback' cannot copy {source!r} to {target!r} by itself; import torch or cupy first, which can"
        )

    if torch is not None:
        destination, origin = _as_tensor(torch, target), _as_tensor(torch, source)
        torch.cuda.synchronize(destination.device)
        destination.copy_(origin.reshape(destination.shape))
        torch.cuda.synchronize(destination.device)
        return

    assert cupy is not None
    with cupy.cuda.Device(target.device.index) as device:
        destination, origin = cupy.from_dlpack(target.owner), cupy.from_dlpack(source.owner)
        device.synchronize()
        destination[...] = origin.reshape(destination.shape)
        device.synchronize()


def _as_tensor(torch: Any, view: BufferView) -> Any:
    return (
        view.owner.detach()
        if isinstance(view.owner, torch.Tensor)
        else torch.from_dlpack(view.owner)
    )
