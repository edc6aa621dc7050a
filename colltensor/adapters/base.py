"""What an adapter must have, what it may have, and the memory functions of a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from colltensor.view import BufferView


class Adapter(Protocol):
    """The functions that the group asks of a framework.

    Adapters hold no state of a tensor or group.

    Attributes:
        name: The framework's name, for messages.
        immutable: True where tensors cannot be written; ``allocate_result`` makes results then.

    ``AdapterBase`` lists what else an adapter may have.
    """

    name: str
    immutable: bool

    def claims(self, kind: type) -> bool:
        """Return True if tensors of exactly this type are the adapter's."""

    def source(self, tensor: Any) -> BufferView:
        """View a tensor that will only be read; waits for pending work that writes to it.

        Raises:
            TensorError: The framework would not let this memory be read as it lies.
        """

    def target(self, tensor: Any) -> BufferView:
        """View a tensor that will be written in place.

        One of an immutable framework is only viewed.

        Raises:
            TensorError: The framework would not let this memory be written.
        """

    def allocate_result(self, tensor: Any, donate: bool) -> tuple[Any, BufferView]:
        """Return a new tensor with the contents of an immutable one, and its memory to write to.

        With ``donate`` the tensor given is deleted and its memory reused where nobody else holds
        it. Called once the ranks agreed; never called for mutable frameworks.
        """

    def written(self, tensor: Any) -> None:
        """Notify the framework that the memory of a target was written."""


class AdapterBase:
    """An adapter but for ``name``, ``claims`` and ``source``.

    Adapters of immutable tensors define ``allocate_result`` as well. An adapter may also have any
    of these, which make calls faster or keep more of its framework's promises:

    Attributes:
        directly_exportable: A function that returns True for a tensor that a backend may take
            itself. Such a tensor may be written, and its DLPack export says all of it. Its memory
            stays for as long as the tensor, not only the export. None if that holds for every
            tensor that can be exported. ``written`` is called after the backend took the tensor,
            unless this is None.
        written_together: A function of several tensors, called in place of ``written`` for each.
        alike: A function of exportable tensors that returns a function, or None, and keeps none of
            them. It spares the same questions about as many tensors in the next call. The returned
            function is given other tensors, of any types. It returns True only where these are
            exportable for what they have in common with the first.
        reader: A function of a type that returns the address of a C function, 0 where there is
            none. That one does the same as DLPack's ``dltensor_from_py_object_no_sync`` and is
            called with the interpreter lock. Native code reads exportable tensors of the type by
            it.
        reduced: A function that returns the right value of a tensor's ``__reduce__``, for objects
            that are pickled. None where the tensor's own is right.
        restored: A function of a result and the tensor given to the call. ``allocate_result`` made
            the result of that tensor, and it was written since. The caller gets the return value.
        stream: A function that takes a device index and returns a CUDA stream, as in
            ``BufferView.stream``. This thread's work on that device is queued on it now. None where
            the host must wait for whatever the framework may read next. Without it the stream is
            the legacy default stream, as for DLPack's consumers.
        kinds: For immutable tensors, the leaves of a tree: a function of tensors that returns a
            value for each. Two values are equal where shape, dtype, device and layout are.
        addresses: Likewise: a function of tensors that returns where they lie on the host, once
            they are computed.
        allocate_results: Likewise: a function of tensors and ``donate`` that does for each the same
            as ``allocate_result``. It returns row-major results without their views.
    """

    name: str
    immutable = False

    if TYPE_CHECKING:  # the adapter's own: register_adapter refuses one without it

        def source(self, tensor: Any) -> BufferView:
            """View a tensor that will only be read."""

    def target(self, tensor: Any) -> BufferView:
        """View a tensor that will be written in place."""
        return self.source(tensor)

    def allocate_result(self, tensor: Any, donate: bool) -> tuple[Any, BufferView]:
        """Return the tensor itself, which can be written."""
        return tensor, self.target(tensor)

    def written(self, tensor: Any) -> None:
        """Do nothing: the framework need not be notified."""


class Memory(Protocol):
    """Plain memory of one type of device: staging buffers and copies between layouts."""

    def allocate(self, nbytes: int, like: BufferView | None = None) -> BufferView:
        """Return uninitialised memory as bytes, aligned to 64 bytes.

        It lies on ``like``'s device, for use on its stream.
        """

    def copy(self, target: BufferView, source: BufferView) -> None:
        """Copy elements in row-major order between views of one count and dtype, any layouts."""

    def contents(self, view: BufferView) -> bytes | memoryview:
        """Return the elements' bytes on the host, in row-major order."""

    def overlap(self, first: BufferView, second: BufferView) -> bool:
        """Return True if the elements of two views share memory."""


class HostMemory(Memory, Protocol):
    """The host's memory, whose elements may be written at any time: no stream orders it."""

    def array(self, view: BufferView) -> Any:
        """Return a writable array of the framework that has these functions.

        It lies over a view, which it keeps alive.
        """
