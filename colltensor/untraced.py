"""Keeps torch.compile out of this package.

It breaks the graph at a call of ours, and runs the call as it is. A collective cannot be part of a
graph, and what Dynamo makes of the calls' own code fails. Dynamo cannot follow dicts that make
their entries, nor attributes of a process group that torch does not know. Uses torch only where it
is loaded.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any, Final

from colltensor._compat.dynamo import frame_evaluation, skip_strategy

_PACKAGE: Final = __name__.partition(".")[0]
_TRACED: Final = frozenset({f"{_PACKAGE}.torch.c10d.identity"})  # torch knows these attributes
_REASON: Final = "collectives of colltensor run outside of compiled graphs"
_seen: set[str] = set()


def keep_compilers_out() -> None:
    """Mark every function of the modules that are loaded by now; nothing where torch is not loaded.

    Modules that are loaded later are called by marked functions, unless users call them: those call
    this again. torch's own ``torch.compiler.disable`` would load its compiler, which takes seconds,
    and cost each call a microsecond.
    """
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "compile"):  # it is being imported
        return

    frames: Any = frame_evaluation(torch)
    if frames is None:
        return

    strategy = skip_strategy(frames)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == _PACKAGE and name not in _TRACED and name not in _seen:
            _seen.add(name)
            for function in _functions(module):
                function._torchdynamo_disable = True  # type: ignore[attr-defined]  # what Dynamo looks for
                function._torchdynamo_disable_msg = _REASON  # type: ignore[attr-defined]
                for code in _codes(function.__code__):
                    frames.set_code_exec_strategy(code, strategy)


def _functions(module: types.ModuleType) -> Iterator[types.FunctionType]:
    """Yield the functions that a module defines, those of its classes too."""
    for owner in (module, *(entry for entry in vars(module).values() if isinstance(entry, type))):
        if owner is not module and owner.__module__ != module.__name__:
            continue
        for entry in list(vars(owner).values()):
            parts = (
                (entry.fget, entry.fset)
                if isinstance(entry, property)
                else (getattr(entry, "__func__", entry),)
            )
            for part in parts:
                if isinstance(part, types.FunctionType) and part.__module__ == module.__name__:
                    yield part


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a function's code and that of the functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
