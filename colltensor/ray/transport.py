"""Ray's tensor transports: a thin cover over sources and links.

They are in the words of ``ray.experimental``. They are one-sided: the receiver asks the source,
whose own threads answer. So Ray sends no task to the source actor and kills no actor over a failed
transfer. A driver or an actor may ``ray.get`` and ``ray.put``.
"""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any, ClassVar

from ray.experimental import CommunicatorMetadata, TensorTransportManager, TensorTransportMetadata
from ray.experimental.rdt.tensor_transport_manager import FetchRequest

from colltensor.errors import CollectiveError, DeviceError, OptionError
from colltensor.ray import source
from colltensor.ray.arrays import FRAMEWORKS, Framework, views_of
from colltensor.ray.link import LINKS, SourceAddress
from colltensor.types import CPU


@dataclass
class Description(TensorTransportMetadata):  # type: ignore[misc]  # mypy does not look into Ray
    """What the holder of an ObjectRef knows of the arrays, beside shapes, dtypes and device.

    Attributes:
        endpoint: Where they are; None where the object has no arrays.
    """

    endpoint: SourceAddress | None = None


@dataclass
class Fetch(FetchRequest):  # type: ignore[misc]  # mypy does not look into Ray
    """A transfer in a thread of its own.

    Attributes:
        future: The arrays to be.
    """

    future: Future[list[Any]] | None = None


class Transport(TensorTransportManager):  # type: ignore[misc]  # mypy does not look into Ray
    """What all transports have in common. Ray makes one of each in every process."""

    framework: ClassVar[Framework]

    def tensor_transport_backend(self) -> str:
        """Return the transport's name."""
        return self.framework.transport

    @staticmethod
    def is_one_sided() -> bool:
        """Say that the receiver alone initiates."""
        return True

    @staticmethod
    def can_abort_transport() -> bool:
        """Say that a transfer can be ended, so that Ray kills no actor."""
        return True

    def actor_has_tensor_transport(self, actor: Any) -> bool:
        """Say yes: Ray registers the transport in the actor before its first use."""
        return True

    def extract_tensor_transport_metadata(self, obj_id: str, rdt_object: list[Any]) -> Description:
        """Keep an object's arrays for receivers, once they are computed; called in the source.

        Raises:
            TensorError: An array cannot be sent as it is; the task that returned it fails.
        """
        try:
            return self._describe(obj_id, rdt_object)
        except CollectiveError as error:
            # Ray has the object in store already and would never free it: the task has failed, so
            # nobody owns it.
            rdt_object.clear()
            error.args = (f"tensor_transport={self.framework.transport!r}: {error}",)
            raise

    def get_communicator_metadata(
        self, src_actor: Any, dst_actor: Any, backend: str | None = None
    ) -> Any:
        """Return nothing of interest: any two processes find each other."""
        return CommunicatorMetadata()

    def recv_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: Any,
        communicator_metadata: Any,
        target_buffers: list[Any] | None = None,
    ) -> list[Any]:
        """Receive an object's arrays; called in the receiver.

        Raises:
            PeerLostError: The source is dead.
            CollectiveError: See ``Links.fetch``.
        """
        buffers = self._buffers(tensor_transport_metadata, target_buffers)
        return self._fetch(obj_id, tensor_transport_metadata, buffers)

    def fetch_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: Any,
        communicator_metadata: Any,
        target_buffers: list[Any] | None = None,
    ) -> Fetch:
        """Begin to receive; ``ray.get`` may fetch several objects, and has a timeout."""
        # here, where the caller's device is current
        buffers = self._buffers(tensor_transport_metadata, target_buffers)
        future: Future[list[Any]] = Future()

        def work() -> None:
            try:
                future.set_result(self._fetch(obj_id, tensor_transport_metadata, buffers))
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                future.set_exception(error)

        threading.Thread(target=work, name="colltensor-fetch", daemon=True).start()
        return Fetch(obj_id, [], future)

    def wait_fetch_complete(self, fetch_request: Any, timeout: float = -1) -> list[Any]:
        """Return what ``fetch_multiple_tensors`` began to receive.

        Raises:
            TimeoutError: It is not there after ``timeout`` seconds; it goes on, and its result is
                dropped.
            CollectiveError: See ``Links.fetch``.
        """
        future: Future[list[Any]] = fetch_request.future
        try:
            return future.result(None if timeout < 0 else timeout)
        except FutureTimeoutError:
            if future.done():
                raise  # the transfer's own
            raise TimeoutError(
                f"object {fetch_request.obj_id} did not arrive in {timeout:g} s"
            ) from None

    def send_multiple_tensors(
        self, tensors: Any, tensor_transport_metadata: Any, communicator_metadata: Any
    ) -> None:
        """Refuse: Ray does not call this of a one-sided transport."""
        raise NotImplementedError(f"{self.framework.transport} is one-sided: the receiver fetches")

    def garbage_collect(self, obj_id: str, tensor_transport_meta: Any, tensors: list[Any]) -> None:
        """Let go of an object that nobody refers to any more; called in the source."""
        source.let_go(obj_id)

    def abort_transport(self, obj_id: str, communicator_metadata: Any) -> None:
        """End the transfers of an object that are under way in this receiver."""
        LINKS.abort(obj_id)

    def _describe(self, obj_id: str, tensors: list[Any]) -> Description:
        arrays = [self.framework.inside(tensor) for tensor in tensors]
        devices = {view.device for view in views_of(arrays)}
        if not arrays:
            return Description([])
        if len(devices) > 1:
            names = " and ".join(sorted(map(repr, devices)))
            raise DeviceError(f"the arrays of one object are on {names}; return them one by one")

        (device,) = devices
        if device.type not in self.framework.devices:
            raise DeviceError(
                f"it carries arrays on {' and '.join(self.framework.devices)}, not on {device}"
            )

        home = source.local_source()
        endpoint = home.endpoint
        if device != CPU:
            # another thread sends them, whose stream knows nothing of this one's
            self.framework.synchronize(device.index)
            endpoint = dataclasses.replace(endpoint, lane=f"{device.index}")
        home.keep(obj_id, arrays)
        return Description([(array.shape, array.dtype) for array in arrays], device.type, endpoint)

    def _buffers(self, description: Description, given: list[Any] | None) -> list[Any]:
        """Return what to receive into: the arrays that the user set for the object, or new ones."""
        framework, device = self.framework, description.tensor_device
        if given is None:
            kinds = description.tensor_meta
            made = [framework.buffer(shape, dtype, str(device)) for shape, dtype in kinds]
        elif framework is not FRAMEWORKS["torch"]:
            raise OptionError(
                f"{framework.transport} receives into new arrays only; set no target for the ObjectRef"
            )
        else:
            made = given
            for index, view in enumerate(views_of(made)):
                if view.device.type != device:
                    raise DeviceError(
                        f"target {index} is on {view.device} and the array sent is on {device}; receive there, and "
                        "then move it"
                    )

        if made and device != CPU.type:
            # what the memory was used for before may not be done
            framework.synchronize(views_of(made)[0].device.index)
        return made

    def _fetch(self, obj_id: str, description: Description, buffers: list[Any]) -> list[Any]:
        if description.endpoint is None:
            return []
        endpoint, on_device = description.endpoint, description.tensor_device != CPU.type
        if on_device:
            endpoint = dataclasses.replace(
                endpoint, lane=f"{endpoint.lane} to {views_of(buffers)[0].device.index}"
            )
        received = LINKS.fetch(obj_id, endpoint, buffers, on_device)
        return [self.framework.result(buffer) for buffer in received]


class TorchTransport(Transport):
    """``COLLTENSOR``."""

    framework = FRAMEWORKS["torch"]


class JaxTransport(Transport):
    """``COLLTENSOR_JAX``."""

    framework = FRAMEWORKS["jax"]


class CupyTransport(Transport):
    """``COLLTENSOR_CUPY``."""

    framework = FRAMEWORKS["cupy"]


class NumpyTransport(Transport):
    """``COLLTENSOR_NUMPY``."""

    framework = FRAMEWORKS["numpy"]


TRANSPORTS: dict[str, type[Transport]] = {
    "torch": TorchTransport,
    "jax": JaxTransport,
    "cupy": CupyTransport,
    "numpy": NumpyTransport,
}
"""The classes that Ray is given, by framework name; Ray pickles them by their names here."""
