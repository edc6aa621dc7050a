"""Backends: the table of transports by name."""

from __future__ import annotations

import importlib
from typing import Final, cast

from colltensor.backends.base import Backend, BackendSpec
from colltensor.backends.pairwise import inherits_collectives
from colltensor.environment import did_you_mean
from colltensor.errors import OptionError

_MODULES: Final = {
    "gloo": "colltensor.backends.gloo",
    "hierarchical": "colltensor.backends.hierarchical",
    "loopback": "colltensor.backends.loopback",
    "nccl": "colltensor.backends.nccl",
    "shm": "colltensor.backends.shm",
}
"""Backends of the package: the module whose ``SPEC`` is the entry."""

_registered: Final[dict[str, BackendSpec]] = {}


def register_backend(name: object, spec: BackendSpec) -> None:
    """Add a backend to the table, or replace one; groups that exist keep theirs.

    Args:
        name: What ``init_collective_group(backend=...)`` calls it.
        spec: The entry.

    Raises:
        OptionError: ``name`` is no non-empty string or is "auto", or ``spec`` is no BackendSpec.
    """
    if not isinstance(name, str) or not name or name == "auto":
        raise OptionError(
            f"register_backend: name must be a non-empty string other than 'auto', got {name!r}"
        )

    missing = [
        f"{method}()"
        for method in ("available", "create")
        if not callable(getattr(spec, method, None))
    ]
    if missing:
        raise OptionError(
            f"register_backend: spec of {name!r} must be a colltensor.backends.base.BackendSpec, "
            f"got {spec!r} without {' and '.join(missing)}"
        )

    _registered[name] = spec


def check_backend(name: str, backend: Backend) -> Backend:
    """Return what a backend's ``create`` made.

    Raises:
        OptionError: It lacks an attribute or a method of ``Backend``.
    """
    needed = [*Backend.__annotations__, *(["control"] if inherits_collectives(backend) else [])]
    attributes = [attribute for attribute in needed if not hasattr(backend, attribute)]
    methods = [
        f"{method}()"
        for method, function in vars(Backend).items()
        if not method.startswith("_")
        and callable(function)
        and not callable(getattr(backend, method, None))
    ]

    if attributes or methods:
        raise OptionError(
            f"backend {name!r}: its create() must return a colltensor.backends.base.Backend, got {backend!r} without "
            f"{', '.join(attributes + methods)}"
        )
    return backend


def backend_names() -> list[str]:
    """Return the names in the table, sorted."""
    return sorted({*_MODULES, *_registered})


def get_backend(name: object) -> BackendSpec:
    """Return the entry of the backend called ``name``.

    Raises:
        OptionError: There is none of this name.
    """
    if isinstance(name, str) and name in _registered:
        return _registered[name]
    if not isinstance(name, str) or name not in _MODULES:
        raise OptionError(
            f"backend: expected 'auto' or one of {', '.join(backend_names())}, got {name!r}"
            f"{did_you_mean(str(name), ['auto', *backend_names()])}"
        )
    return cast("BackendSpec", importlib.import_module(_MODULES[name]).SPEC)


def reason(name: object) -> str | None:
    """Return None if the backend called ``name`` can be used here, else what to do.

    For "auto", if one that it chooses can.
    """
    if name == "auto":
        missing = [reason(choice) for choice in ("shm", "gloo")]
        return "; ".join(map(str, missing)) if None not in missing else None
    try:
        spec = get_backend(name)
    except OptionError:
        return f"there is no backend {name!r}; there are {', '.join(backend_names())}"
    return spec.available()


def is_available(name: object) -> bool:
    """Return True if there is a backend called ``name`` and it can be used here."""
    return reason(name) is None
