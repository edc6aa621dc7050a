"""What the package uses of JAX that has no public name. Tested with JAX 0.6 to 0.10."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any, Final

import jax

from colltensor._compat import note_version

note_version("jax", jax.__version__, "0.10")

try:
    from jax._src import core as _core

    _traces_nothing: Callable[[], bool] | None = getattr(_core, "trace_state_clean", None)
except ImportError:
    _traces_nothing = None


def _cannot_tell() -> bool:
    return True


traces_nothing: Final = _traces_nothing or _cannot_tell
"""Whether JAX traces nothing in this thread.

True where JAX cannot be asked; the copies of arrays report tracing then.
"""


def array_type() -> type:
    """Return the type of arrays without making one, because that takes hold of the GPU."""
    kind: type = importlib.import_module("jax._src.array").ArrayImpl
    return kind


def effects() -> Any:
    """Return the module of effects, which order what a program does beside its results."""
    return importlib.import_module("jax._src.effects")


def abstract_token() -> Any:
    """Return the abstract value of the tokens that ordered effects pass on."""
    return importlib.import_module("jax._src.core").abstract_token


def convert_constvars_jaxpr(jaxpr: Any) -> Any:
    """Return a jaxpr whose constants are its first arguments."""
    return importlib.import_module("jax._src.interpreters.partial_eval").convert_constvars_jaxpr(
        jaxpr
    )


def forget_tokens() -> None:
    """Let this thread's computations run again after one failed, whose token JAX keeps."""
    importlib.import_module("jax._src.dispatch").runtime_tokens.clear()


def sharding_name(array_kind: type) -> str:
    """Return the name of an array's sharding itself, of which ``sharding`` is a property."""
    return "_sharding" if hasattr(array_kind, "_sharding") else "sharding"


def ready_function() -> Callable[[list[Any]], object]:
    """Return the function that waits for arrays.

    It is JAX's own, which takes nothing else, or the public one.
    """
    with contextlib.suppress(ImportError):
        client = importlib.import_module("jax._src.lib").xla_client
        found: Callable[[list[Any]], object] | None = getattr(
            client, "batched_block_until_ready", None
        )
        if found is not None:
            return found
    public: Callable[[list[Any]], object] = jax.block_until_ready
    return public


def layout_name(array_kind: type) -> str:
    """Return JAX's name of what an array's ``format`` is made of, at a tenth of the time."""
    return "_pjrt_layout" if hasattr(array_kind, "_pjrt_layout") else "format"
