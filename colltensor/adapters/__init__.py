"""Adapters: one module per framework turns its tensors into BufferViews and back.

A framework is found by the package of a tensor's type. Such a type can only exist once the
framework is imported, so nothing is imported to look.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Final

from colltensor.adapters._remedies import name_of, remedy_for
from colltensor.adapters.base import Adapter, AdapterBase, HostMemory, Memory
from colltensor.errors import OptionError, ReadOnlyError, UnsupportedTensorError
from colltensor.view import LEGACY_STREAM, BufferView

__all__ = ["Adapter", "HostMemory", "Memory", "register_adapter"]

_ADAPTERS: Final = {  # by the package of a tensor's type
    "numpy": "colltensor.adapters.numpy",
    "torch": "colltensor.adapters.torch",
    "jax": "colltensor.adapters.jax",
    "jaxlib": "colltensor.adapters.jax",
    "cupy": "colltensor.adapters.cupy",
    "tensorflow": "colltensor.adapters.tensorflow",
    "mlx": "colltensor.adapters.mlx",
    "paddle": "colltensor.adapters.paddle",
}
_MEMORIES: Final = {"cpu": "colltensor.adapters.numpy", "cuda": "colltensor.adapters.cupy"}
_GUARDS: Final = 8
"""How often a guard learns other tensors, before those of the last time stay."""
_OPTIONAL: Final = ("directly_exportable", "reduced", "stream", "kinds", "addresses", "reader",
                    "allocate_results", "written_together", "restored", "alike")  # fmt: skip
"""What ``AdapterBase`` says that an adapter may have."""
_NUMBERS: Final = frozenset({bool, int, float, complex})
_registered: list[Adapter] = []
known: Final[dict[type, Adapter]] = {}
"""Adapters by tensor type, as far as they were found: a short cut for the path of every call."""

_no_tensors: Final[set[type]] = set()
"""Python's own types that no adapter takes, such as containers, as far as they were looked for."""

Exportable = Callable[[Any], bool]
exporters: Final[dict[type, tuple[Exportable, Callable[[Any], None]] | tuple[None, None]]] = {}
"""``directly_exportable`` and ``written`` by tensor type, for types found so far.

Only adapters that have both are listed.
"""


no_write_notice: Final[set[type]] = set()
"""Those of them of which every tensor is exportable and no write needs a notice."""


native_copies: Final[list[Callable[[], Callable[[int], object] | None]]] = []
"""Returns native code's copy between a strided and a contiguous view on the host.

None if there is none. Whoever may load native code puts it here. The copy takes the address of
64-bit numbers: see native/src/exports.cpp.
"""


native_readers: Final[
    list[Callable[[], tuple[Callable[[int], int], Callable[[int, int, int], bool]] | None]]
] = []
"""Returns native code's reader of numpy's arrays and its trial of a reader.

None if there is none; set as above. See native/src/python.cpp.
"""
_readers: Final[dict[type, int]] = {}


def register_adapter(adapter: Adapter) -> None:
    """Add an adapter for tensors of another framework, or for a subclass that ours refuse.

    It is asked before the built-in ones. Of several, the one registered last is asked first. It
    counts in this process only.

    Raises:
        OptionError: ``adapter`` is no ``Adapter``: it is a class, or lacks an attribute or a
            method.
    """
    if isinstance(adapter, type):
        raise OptionError(
            f"register_adapter: adapter: expected an object, got a class; pass {adapter.__name__}()"
        )
    methods = ("claims", "source", "target", "allocate_result", "written")
    missing = [name for name in methods if not callable(getattr(adapter, name, None))]
    if missing:
        raise OptionError(
            f"register_adapter: adapter {adapter!r} has no method {', '.join(missing)}"
        )

    for name, kind in (("name", str), ("immutable", bool)):
        if not isinstance(getattr(adapter, name, None), kind):
            raise OptionError(
                f"register_adapter: adapter {adapter!r}: expected an attribute {name} of type {kind.__name__}, "
                f"got {getattr(adapter, name, 'none')!r}"
            )

    default = getattr(type(adapter), "allocate_result", None) is AdapterBase.allocate_result
    if adapter.immutable and default:
        raise OptionError(
            f"register_adapter: adapter {adapter!r}: tensors that are immutable need an allocate_result of their own, "
            "which returns a new one"
        )

    for name in _OPTIONAL:
        function = getattr(adapter, name, None)
        if function is not None and not callable(function):
            raise OptionError(
                f"register_adapter: adapter {adapter!r}: {name}: expected a function, got {function!r}"
            )

    # What was found before may be the new adapter's.
    add_adapter(adapter)
    known.clear()
    exporters.clear()
    _readers.clear()
    no_write_notice.clear()
    _no_tensors.clear()


def add_adapter(adapter: Adapter) -> None:
    """Add an adapter for a type of the package's own, of which no tensor was seen before.

    What is known of other types stays, which calls in other threads may be reading.
    """
    _registered.insert(0, adapter)


def find_adapter(kind: type) -> Adapter | None:
    """Return the adapter for tensors of this type, or None for what is no tensor."""
    found = known.get(kind)
    if found is None and kind not in _no_tensors:
        found = _search(kind)
        if found is None:
            # others may be tensors of a framework that is being imported
            if kind.__module__ in ("builtins", "numpy"):
                _no_tensors.add(kind)
        else:
            known[kind] = found
            if hasattr(found, "directly_exportable"):
                exporters[kind] = (
                    (None, None)
                    if found.directly_exportable is None
                    else (found.directly_exportable, found.written)
                )
                if found.directly_exportable is None:
                    no_write_notice.add(kind)
    return found


def number_adapter(kind: type) -> Adapter | None:
    """Return the adapter for numbers of this type, no tensors to ``find_adapter``; else None."""
    if kind in _NUMBERS or any(
        base.__name__ == "generic" and base.__module__ == "numpy" for base in kind.__mro__
    ):
        adapter: Adapter = importlib.import_module("colltensor.adapters.numbers").ADAPTER
        return adapter if adapter.claims(kind) else None
    return None


def adapter_of(tensor: Any) -> Adapter:
    """Return the adapter for this tensor, or number.

    Raises:
        UnsupportedTensorError: No adapter takes it; says what to do.
    """
    kind = type(tensor)
    found = find_adapter(kind) or number_adapter(kind)
    if found is None:
        raise UnsupportedTensorError(
            f"expected a numpy, torch, JAX or CuPy array or an object with __dlpack__, got {name_of(kind)}; "
            f"{remedy_for(tensor)}"
        )
    return found


def target_of(adapter: Adapter, tensor: Any) -> BufferView:
    """View a tensor that a call writes, in place or into a new one.

    Raises:
        TensorError: This memory may not be written, by the framework or by a finding of its
            adapter.
    """
    view = adapter.target(tensor)
    if view.readonly and not adapter.immutable:
        raise ReadOnlyError(
            f"the memory of {name_of(type(tensor))} is read-only and the call would write to it; pass a copy"
        )
    return view


def reduced(obj: Any) -> tuple[Any, ...] | None:
    """Return how an object is pickled where that is not what its class says; None else."""
    kind = type(obj)
    if kind.__module__.partition(".")[0] not in _ADAPTERS:
        return None
    function: Callable[[Any], tuple[Any, ...] | None] | None = getattr(
        find_adapter(kind), "reduced", None
    )
    return None if function is None else function(obj)


def memory_of(device_type: str) -> Memory:
    """Return the memory functions of a type of device (``"cpu"`` or ``"cuda"``)."""
    memory: Memory = importlib.import_module(_MEMORIES[device_type]).MEMORY
    return memory


def host_memory() -> HostMemory:
    """Return the memory functions of the host."""
    memory: HostMemory = importlib.import_module(_MEMORIES["cpu"]).MEMORY
    return memory


def stream_of(adapter: Adapter, index: int) -> int | None:
    """Return the stream of this thread's work of now; None where the host must wait."""
    function: Callable[[int], int | None] | None = getattr(adapter, "stream", None)
    return LEGACY_STREAM if function is None else function(index)


def is_exportable(tensor: Any) -> bool:
    """Return True if a backend may take the tensor as it is."""
    exportable = exporters.get(tensor.__class__, _NOT_EXPORTABLE)[0]
    return exportable is None or exportable(tensor)


class Guard:
    """Checks in one step that tensors are exportable as others were.

    It compares the properties that a framework itself looks at. It serves the leaves of trees of
    one structure, which seldom change from call to call.
    """

    __slots__ = ("_adapter", "_alike", "_left")

    def __init__(self) -> None:
        self._alike: Callable[..., bool] | None = None
        self._adapter: Adapter | None = None
        self._left = _GUARDS

    def knows(self, tensors: Sequence[Any]) -> bool:
        """Return True if the tensors are like those that were learnt, and so are exportable."""
        return (
            self._alike is not None
            and known.get(tensors[0].__class__) is self._adapter
            and self._alike(*tensors)
        )

    def learn(self, tensors: Sequence[Any], kinds: set[type]) -> None:
        """Remember what these tensors are like, if one framework has them all and can tell."""
        adapters = {known.get(kind) for kind in kinds}
        if not self._left or len(adapters) > 1:
            return
        self._left -= 1
        (self._adapter,) = adapters
        make = getattr(self._adapter, "alike", None)
        self._alike = None if make is None else make(tensors)


def are_exportable(tensors: Sequence[Any], guard: Guard | None = None) -> bool:
    """Return True if a backend may take all as they are; ``guard`` answers first, and learns."""
    if guard is not None and guard.knows(tensors):
        return True
    kinds = set(map(type, tensors))
    if no_write_notice.issuperset(kinds):
        return True
    if len(kinds) > 1:
        exportable = all(map(is_exportable, tensors))
    else:
        ask = exporters.get(next(iter(kinds)), _NOT_EXPORTABLE)[0]
        exportable = ask is None or all(map(ask, tensors))
    if exportable and guard is not None:
        guard.learn(tensors, kinds)
    return exportable


def reader_of(kind: type) -> int:
    """Return the address of the C function that reads a type's tensors, 0 for none."""
    found = _readers.get(kind)
    if found is None:
        function: Callable[[type], int] | None = getattr(known.get(kind), "reader", None)
        found = _readers[kind] = 0 if function is None else function(kind)
    return found


def notify_written(tensor: Any) -> None:
    """Notify the framework of an exportable tensor that it was written."""
    found = exporters.get(tensor.__class__)
    if found is None:  # another thread has just registered an adapter
        adapter_of(tensor).written(tensor)
    elif found[1] is not None:
        found[1](tensor)


def notify_all_written(tensors: Sequence[Any]) -> None:
    """Notify the frameworks of exportable tensors that they were written."""
    kinds = set(map(type, tensors))
    if no_write_notice.issuperset(kinds):
        return
    if len(kinds) == 1:
        remember_alike(tensors, kinds.pop())
        return
    for tensor in tensors:
        notify_written(tensor)


def remember_alike(tensors: Sequence[Any], kind: type) -> None:
    """Do as ``notify_all_written`` with tensors that are all of one type."""
    if kind in no_write_notice:
        return
    together = getattr(known.get(kind), "written_together", None)
    if together is not None:
        together(tensors)
        return
    for tensor in tensors:
        notify_written(tensor)


def _never(tensor: Any) -> bool:
    return False


_NOT_EXPORTABLE: Final = (_never, None)
"""The entry of ``exporters`` for a type that it does not have."""


def _search(kind: type) -> Adapter | None:
    for adapter in _registered:
        if adapter.claims(kind):
            return adapter
    packages = {base.__module__.partition(".")[0] for base in kind.__mro__}
    for package in packages & _ADAPTERS.keys():
        built_in: Adapter = importlib.import_module(_ADAPTERS[package]).ADAPTER
        if built_in.claims(kind):
            return built_in
    # A subclass that its framework's adapter did not claim changes the meaning of its memory: it
    # may be masked, quantised, fake or traced. Its raw DLPack export must not be trusted.
    if hasattr(kind, "__dlpack__") and packages.isdisjoint(_ADAPTERS):
        other: Adapter = importlib.import_module("colltensor.adapters.dlpack").ADAPTER
        return other if other.claims(kind) else None
    return None
