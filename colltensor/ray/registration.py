"""Our registrations with Ray: backends for ``ray.util.collective``, and direct tensor transports.

Imports ``ray.util.collective``, which imports torch where it is installed, only when ``register``
is called. Imports no framework that is not asked for or not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable

from colltensor import backends, table
from colltensor._compat.ray import collective_registry
from colltensor.errors import BackendUnavailableError, OptionError
from colltensor.ray.arrays import FRAMEWORKS

_NAME = "COLLTENSOR"


def register(*, timeout_s: float = 30.0, interface: str | None = None) -> None:
    """Let ``ray.util.collective`` make groups of ours in this process.

    Their ``backend`` is ``"COLLTENSOR"``. Call it in the driver, where the program declares groups
    there, and in every worker. Ray does that with
    ``ray.init(runtime_env={"worker_process_setup_hook": "colltensor.ray.register"})``. Your own
    function that calls this one with arguments may stand there as well. A name is registered for
    each backend: ``COLLTENSOR`` is ``"auto"``, ``COLLTENSOR_GLOO`` is ``"gloo"``, and so on.
    Idempotent; arguments are those of the last call.

    Args:
        timeout_s: How long the ranks of a group may take to meet, and how long every operation then
            waits, in seconds. Ray hands no timeout to a registered backend.
        interface: As for ``init_collective_group``.

    Raises:
        BackendUnavailableError: This Ray takes no backends of others.
        OptionError: An argument has a value that no group could use, or a name is taken by a
            backend of somebody else.
    """
    table.check_options(
        1, group_name="default", backend="auto", timeout_s=timeout_s, interface=interface
    )

    try:
        registry = importlib.import_module("ray.util.collective.backend_registry")
    except ImportError as error:
        raise BackendUnavailableError(
            "register: this version of Ray takes no collective backends of others; upgrade it, or replace the "
            "program's import by `import colltensor as col`"
        ) from error

    known = collective_registry(registry)
    base_group = importlib.import_module("colltensor.ray.base_group")
    base_group.options.update(timeout_s=timeout_s, interface=interface)

    names = [name for name in ("auto", *backends.backend_names()) if name != "loopback"]
    for name in names:
        ours = base_group.group_class(name)
        called = _NAME if name == "auto" else f"{_NAME}_{name.upper()}"
        if not known.is_registered(called):
            registry.register_collective_backend(called, ours)
        elif known.get(called) is not ours:
            raise OptionError(
                f"register: another class is registered with ray.util.collective as {called!r}"
            )


def register_tensor_transports(frameworks: Iterable[str] | None = None) -> tuple[str, ...]:
    """Let Ray's direct transport go through ColTensor.

    That is for ``@ray.method(tensor_transport=...)`` and ``ray.put(_tensor_transport=...)``. Call
    it in the process that creates the actors, before the classes of the actors are defined. Ray
    registers the transports in an actor before it first uses them there. A worker process may
    itself import the module of such a class, make actors, or restart. Call it there too: at the top
    of that module, or in a setup hook: ``ray.init(runtime_env=
    {"worker_process_setup_hook": "colltensor.ray.register_tensor_transports"})``. Idempotent.

    Args:
        frameworks: Of ``"torch"`` (transport ``COLLTENSOR``), ``"jax"`` (``COLLTENSOR_JAX``),
            ``"cupy"`` (``COLLTENSOR_CUPY``) and ``"numpy"`` (``COLLTENSOR_NUMPY``, for
            ``NumpyArray``). By default those that are installed. They are imported, and every actor
            that Ray registers them in must have them installed.

    Returns:
        The names of the transports, in the order of ``frameworks``.

    Raises:
        OptionError: A framework has no transport.
        BackendUnavailableError: A framework is not installed, or Ray has no tensor transports to
            register (2.60 has).
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
        devices, kind = list(framework.devices), framework.data_type()
        try:
            register_tensor_transport(framework.transport, devices, TRANSPORTS[name], kind)
        except ValueError as error:  # Ray has no way to ask
            if "already registered" not in str(error):
                raise
    return tuple(FRAMEWORKS[name].transport for name in chosen)


def _installed() -> tuple[str, ...]:
    return tuple(name for name in FRAMEWORKS if importlib.util.find_spec(name) is not None)
