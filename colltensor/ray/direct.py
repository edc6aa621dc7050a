"""Makes the direct transports known to Ray."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable

from colltensor.errors import BackendUnavailableError, OptionError
from colltensor.ray.arrays import FRAMEWORKS


def register_tensor_transports(frameworks: Iterable[str] | None = None) -> tuple[str, ...]:
    """Let ``@ray.method(tensor_transport=...)`` and ``ray.put(_tensor_transport=...)`` go through ColTensor.

    Call it in the process that creates the actors, before the classes of the actors are defined: Ray registers the
    transports in an actor before it first uses them there. Where a worker process itself imports the module of such a
    class, makes actors, or restarts, call it there too: at the top of that module, or by ``ray.init(runtime_env=
    {"worker_process_setup_hook": "colltensor.ray.register_tensor_transports"})``. Idempotent.

    Args:
        frameworks: Of ``"torch"`` (transport ``COLLTENSOR``), ``"jax"`` (``COLLTENSOR_JAX``), ``"cupy"``
            (``COLLTENSOR_CUPY``) and ``"numpy"`` (``COLLTENSOR_NUMPY``, for ``NumpyArray``); by default those that are
            installed. They are imported, and every actor that Ray registers them in must have them installed.

    Returns:
        The names of the transports, in the order of ``frameworks``.

    Raises:
        OptionError: A framework has no transport.
        BackendUnavailableError: A framework is not installed, or Ray has no tensor transports to register (2.60 has).
    """
    chosen = _installed() if frameworks is None else tuple(frameworks)
    for name in chosen:
        if name not in FRAMEWORKS:
            known = ", ".join(FRAMEWORKS)
            raise OptionError(
                f"register_tensor_transports: frameworks: expected some of {known}; got {name!r}"
            )
        if importlib.util.find_spec(name) is None:
            raise BackendUnavailableError(f"register_tensor_transports: {name} is not installed")
    try:
        from ray.experimental import register_tensor_transport

        from colltensor.ray.transport import TRANSPORTS
    except ImportError as error:
        raise BackendUnavailableError(
            f"this Ray has no tensor transports to register, 2.60 has: {error}"
        ) from error
    for name in chosen:
        framework = FRAMEWORKS[name]
        try:
            register_tensor_transport(
                framework.transport,
                list(framework.devices),
                TRANSPORTS[name],
                framework.data_type(),
            )
        except ValueError as error:  # Ray has no way to ask
            if "already registered" not in str(error):
                raise
    return tuple(FRAMEWORKS[name].transport for name in chosen)


def _installed() -> tuple[str, ...]:
    return tuple(name for name in FRAMEWORKS if importlib.util.find_spec(name) is not None)
