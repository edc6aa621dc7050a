"""Registers our backends with ``ray.util.collective``, for programs that were written for it.

Does not import ``ray.util.collective``, which imports torch where it is installed, until ``register`` is called.
"""

from __future__ import annotations

import importlib

from colltensor import backends, table
from colltensor.errors import BackendUnavailableError, OptionError

_NAME = "COLLTENSOR"


def register(*, timeout_s: float = 30.0, interface: str | None = None) -> None:
    """Let ``ray.util.collective`` make groups of ours in this process, with ``backend="COLLTENSOR"``.

    Call it in the driver, where the program declares groups there, and in every worker: Ray does that with
    ``ray.init(runtime_env={"worker_process_setup_hook": "colltensor.ray.register"})``, or with a function of your own
    that calls this one with arguments. A name is registered for each backend: ``COLLTENSOR`` is ``"auto"``,
    ``COLLTENSOR_GLOO`` is ``"gloo"``, and so on. Idempotent; arguments are those of the last call.

    Args:
        timeout_s: How long the ranks of a group may take to meet, and how long every operation then waits, in seconds;
            Ray hands no timeout to a registered backend.
        interface: As for ``init_collective_group``.

    Raises:
        BackendUnavailableError: This Ray takes no backends of others.
        OptionError: An argument has a value that no group could use, or a name is taken by a backend of somebody else.
    """
    table.check_options(
        1,
        backend="auto",
        group_name="default",
        timeout_s=timeout_s,
        interface=interface,
        provider=None,
    )
    try:
        registry = importlib.import_module("ray.util.collective.backend_registry")
    except ImportError as error:
        raise BackendUnavailableError(
            "register: this version of Ray takes no collective backends of others; upgrade it, or replace the "
            "program's import by `import colltensor as col`"
        ) from error
    base_group = importlib.import_module("colltensor.ray.base_group")
    base_group.options.update(timeout_s=timeout_s, interface=interface)
    names = [name for name in ("auto", *backends.backend_names()) if name != "loopback"]
    for name in names:
        ours = base_group.group_class(name)
        called = _NAME if name == "auto" else f"{_NAME}_{name.upper()}"
        if not registry._global_registry.is_registered(called):
            registry.register_collective_backend(called, ours)
        elif registry._global_registry.get(called) is not ours:
            raise OptionError(
                f"register: another class is registered with ray.util.collective as {called!r}"
            )
