"""Devices: the backend for tensors that are on no CPU, and waiting for what is queued there."""

from __future__ import annotations

import threading
import time

from colltensor import backends
from colltensor.backends.base import Backend, QueueingBackend
from colltensor.control import Control, exit_hooks
from colltensor.engine import Engine
from colltensor.errors import CollectiveError, CollectiveTimeoutError, DeviceError
from colltensor.options import GroupOptions
from colltensor.rendezvous import Meeting
from colltensor.view import BufferView
from colltensor.work import Work


class Devices:
    """One group's way to its devices.

    That is its own backend or, with ``"auto"``, NCCL beside it, made on first use.
    """

    def __init__(
        self,
        name: str,
        rank: int,
        backend: Backend,
        control: Control | None,
        engine: Engine,
        options: GroupOptions,
        meeting: Meeting | None,
    ) -> None:
        self._name = name
        self._rank = rank
        self._backend = backend
        self._control = control
        self._engine = engine
        self._options = options
        self._meeting = meeting

        self._attaching = threading.Lock()  # several threads may come with the first CUDA tensors

        engine.check_device = options.check
        if isinstance(backend, QueueingBackend):
            self._attach(backend)

    def backend_for(self, view: BufferView) -> Backend:
        """Return the backend for a tensor that the group's own one cannot reach.

        With ``"auto"`` that is NCCL for CUDA.

        Raises:
            DeviceError: There is none.
        """
        device = self._engine.device
        if device is not None and view.device.type in device.device_types:
            return device

        own = f"backend {self._backend.name!r} works on {', '.join(sorted(self._backend.device_types))}"
        if view.device.type != "cuda":
            there = ", ".join(sorted(self._backend.device_types))
            advice = f"move it to {there}, or make the group with backend='auto'"
            raise DeviceError(f"the tensor is on {view.device}, but {own}; {advice}")

        reason = backends.reason("nccl")
        if self._options.backend != "auto" or self._meeting is None:
            advice = "make the group with backend='nccl' or 'auto', or move the tensor"
            raise DeviceError(f"the tensor is on {view.device}, but {own}; {advice}")
        if reason is not None:
            raise DeviceError(
                f"the tensor is on {view.device}, but {own}, and NCCL cannot be used here: {reason}"
            )

        with self._attaching:
            if self._engine.device is None:
                made = backends.get_backend("nccl").create(
                    self._control,
                    self._meeting,
                    timeout_s=self._engine.timeout_s,
                    interface=self._options.interface,
                    provider=None,
                )
                assert isinstance(made, QueueingBackend)
                self._attach(made)

        assert self._engine.device is not None
        return self._engine.device

    def synchronize(self, gpu_id: int | None = None) -> None:
        """Return, on the host, when all that this rank has queued on a GPU, or any, is done.

        Raises if it failed. Calls that reach the device another way (JAX's computations) are waited
        for first.

        Raises:
            CollectiveTimeoutError: It is not done after ``timeout_s``; it goes on.
            CollectiveError: It failed.
        """
        if self._engine.before is not None:
            self._engine.before()

        device = self._engine.device
        if device is None:
            return
        self._engine.check("synchronize")

        timeout_s = self._engine.timeout_s
        deadline = time.monotonic() + timeout_s

        if not self._engine.queue.idle:  # calls on the device may wait there for their turn
            self._engine.queue.put(Work("synchronize", lambda: None)).wait(timeout_s)

        try:
            device.drain(deadline, gpu_id)
        except CollectiveError:
            raise
        except TimeoutError:
            raise CollectiveTimeoutError(
                f"synchronize: group '{self._name}' (rank {self._rank}): timed out after {timeout_s:g} s; it goes on"
            ) from None

    def close(self) -> None:
        """Free what the backend holds, when its work is done or some seconds have passed.

        Idempotent. Called also where the process ends, because a communicator that is left to the
        interpreter's end may wait there for ranks that do not come.
        """
        exit_hooks.unregister(self)
        if self._engine.device is not None:
            self._engine.device.close()

    def disown(self) -> None:
        """Let a forked child, which cannot use CUDA, leave the parent's communicators alone."""
        if self._engine.device is not None:
            self._engine.device.disown()

    def _attach(self, device: QueueingBackend) -> None:
        device.on_failure = self._engine.device_failed
        self._engine.device = device
        exit_hooks.register(self, first=True)  # before the control plane says goodbye
