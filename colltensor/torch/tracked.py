"""Tracked: the parameters that a module has now, and the hooks of ours on them.

Imports torch, and of the package group and the neighbours' words only.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import UninitializedParameter
from torch.utils.weak import WeakTensorKeyDictionary

from colltensor.group import Group
from colltensor.torch.agreement import Named, named_tensors

_groups_of: Final[Any] = WeakTensorKeyDictionary()
"""By parameter: the groups over which it is kept in step."""

_COMPILER: Final = "torch._dynamo"

Attach = Callable[[torch.Tensor], Sequence[Any]]


def is_kept_in_step(parameter: torch.Tensor, group: Group) -> bool:
    """Return whether the parameter has hooks for this group already."""
    return group in _groups_of.get(parameter, ())


class Tracked:
    """The parameters of a module, or those that were given: looked up whenever they are used, and known weakly.

    A loop may put others in their place (``module.head = ...``, ``load_state_dict(assign=True)``), add some or unfreeze
    some. What is put into the module gets a hook at once, so that the next backward pass calls it even where all that
    had hooks before is gone. Frozen parameters have hooks as well, which begin to be called when they are unfrozen.

    torch refuses to swap a tensor that somebody knows weakly (``swap_module_params_on_conversion``), with an error that
    names it. That is as well, because the hooks would not be called any more.
    """

    def __init__(self, module: torch.nn.Module | None, parameters: Named, group: Group, attach: Attach) -> None:
        """Remember where parameters are; nothing is attached yet.

        Args:
            module: The module that has them, or None.
            parameters: They, by name.
            group: Over which they are kept in step.
            attach: Puts hooks on one parameter, which takes gradients, and returns their handles.
        """
        self._module = None if module is None else weakref.ref(module)
        self._given = [(name, weakref.ref(parameter)) for name, parameter in parameters]
        self._group = group
        self._attach = attach
        self._parts: dict[int, tuple[weakref.ref[torch.nn.Module], str]] = {}
        self._hooks: dict[int, tuple[weakref.ref[torch.Tensor], Sequence[Any]]] = {}
        self._watching: list[Any] = []
        self._shielded = False
        if module is not None:
            self._add_parts(module, "")
            self._watch()

    def named(self) -> Named:
        """Return the parameters that there are now, each once, by name.

        Raises:
            CollectiveError: One that cannot be kept in step.
        """
        module = None if self._module is None else self._module()
        if module is not None:
            self._parts.clear()
            self._add_parts(module, "")
            return named_tensors(module)[0]
        if self._module is None:
            return [(name, found) for name, parameter in self._given if (found := parameter()) is not None]
        living: dict[int, tuple[str, torch.Tensor]] = {}  # the module is gone, and parts of it live on
        for reference, prefix in self._parts.values():
            part = reference()
            for name, parameter in [] if part is None else part.named_parameters(prefix, recurse=False):
                living.setdefault(id(parameter), (name, parameter))
        return list(living.values())

    def differs(self, known: dict[int, Callable[[], torch.Tensor | None]]) -> bool:
        """Return whether parameters need gradients that are not among those known, by ``id``.

        Called in every pass: some microseconds for a small module, a tenth of a millisecond for 150 parameters.
        """
        if self._watching and not self._shielded and _COMPILER in sys.modules:
            self._watch()
        for parameter in self._walk():
            reference = known.get(id(parameter))
            if reference is None:
                if parameter.requires_grad:
                    return True
            elif reference() is not parameter:
                return True
        return False

    def has(self, parameter: torch.Tensor) -> bool:
        """Return whether it is among the parameters now."""
        return any(found is parameter for found in self._walk())

    def attach(self, parameters: Named) -> None:
        """Have hooks on these parameters and on no others; what has them keeps them."""
        wanted = {id(parameter) for _, parameter in parameters}
        for number, (reference, _) in list(self._hooks.items()):
            if number not in wanted or reference() is None:
                self._detach(number)
        for _, parameter in parameters:
            self._hook(parameter)

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self._watching:
            handle.remove()
        self._watching.clear()
        for number in list(self._hooks):
            self._detach(number)

    def _hook(self, parameter: torch.Tensor) -> None:
        kept = self._hooks.get(id(parameter))
        if kept is not None and kept[0]() is parameter:
            return
        handles: Sequence[Any] = ()
        if _takes_gradients(parameter):
            frozen = not parameter.requires_grad
            try:
                if frozen:  # torch takes no hook for it then
                    parameter.requires_grad_(True)
                handles = self._attach(parameter)
            finally:
                if frozen:
                    parameter.requires_grad_(False)
        self._hooks[id(parameter)] = weakref.ref(parameter), handles
        _groups_of.setdefault(parameter, weakref.WeakSet()).add(self._group)

    def _detach(self, number: int) -> None:
        reference, handles = self._hooks.pop(number)
        for handle in handles:
            handle.remove()
        parameter = reference()
        if parameter is not None:
            _groups_of[parameter].discard(self._group)

    def _walk(self) -> list[torch.Tensor]:
        """Return the parameters that there are now, some more than once; cheaper than ``Module.parameters``."""
        if self._module is None:
            return [parameter for _, given in self._given if (parameter := given()) is not None]
        module = self._module()
        parts = [module]
        if module is None:
            parts = [known() for known, _ in self._parts.values()]
        seen = {id(part) for part in parts}
        found: list[torch.Tensor | None] = []
        for part in parts:  # which grows meanwhile
            if part is None:
                continue
            if part._parameters:
                found += part._parameters.values()
            if part._modules:
                for child in part._modules.values():
                    if child is not None and id(child) not in seen:
                        seen.add(id(child))
                        parts.append(child)
        return [parameter for parameter in found if parameter is not None]

    def _add_parts(self, module: torch.nn.Module, prefix: str) -> None:
        for name, part in module.named_modules(prefix=prefix):
            self._parts[id(part)] = weakref.ref(part), name

    def _watch(self) -> None:
        """Have torch tell what is put into the module or into its parts.

        torch's compiler, once it is loaded, is told to leave that alone: it would look at modules that are half made.
        """
        own = weakref.ref(self)

        def parameter_comes(part: torch.nn.Module, name: str, parameter: torch.Tensor | None) -> None:
            tracked = own()
            if tracked is not None and parameter is not None and tracked._name_of(part) is not None:
                tracked._hook(parameter)

        def module_comes(part: torch.nn.Module, name: str, new: torch.nn.Module | None) -> None:
            tracked = own()
            if tracked is None or new is None:
                return
            prefix = tracked._name_of(part)
            if prefix is not None:
                tracked._add_parts(new, f"{prefix}.{name}" if prefix else name)
                for parameter in new.parameters():
                    tracked._hook(parameter)

        self._shielded = _COMPILER in sys.modules
        shield: Callable[[Any], Any] = torch.compiler.disable if self._shielded else lambda function: function
        for handle in self._watching:
            handle.remove()
        self._watching = [
            register_module_parameter_registration_hook(shield(parameter_comes)),
            register_module_module_registration_hook(shield(module_comes)),
        ]
        for handle in self._watching:
            weakref.finalize(self, handle.remove).atexit = False

    def _name_of(self, part: torch.nn.Module) -> str | None:
        """Return the name of a part of the module; None for other modules."""
        found = self._parts.get(id(part))
        return found[1] if found is not None and found[0]() is part else None


def _takes_gradients(parameter: torch.Tensor) -> bool:
    return (
        (parameter.is_floating_point() or parameter.is_complex()) and not parameter.is_inference()
        and not isinstance(parameter, UninitializedParameter)
    )
