"""Recipe: what a group was asked to be made of, and with it which backend makes it.

Imports no framework.
"""

from __future__ import annotations

from dataclasses import dataclass

from colltensor import backends
from colltensor.backends import auto
from colltensor.backends.base import BackendSpec


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a group was asked to be made of; its parts are made of the same."""

    backend: str = "auto"
    timeout_s: float = 30.0
    interface: str | None = None
    provider: str | None = None
    check: bool = False

    def backend_for(self, world_size: int) -> str:
        """Return the backend's name; ``"auto"`` where the hosts of the ranks decide, once they have met."""
        if self.backend != "auto":
            return self.backend
        if world_size == 1:
            return "loopback"
        return "auto" if self.provider is None else "gloo"

    def asked_of(self, world_size: int) -> str:
        """Return what all ranks must have asked for, in words."""
        return f"{self.backend_for(world_size)}{', check=True' if self.check else ''}"

    def spec_for(self, world_size: int) -> BackendSpec:
        """Return what makes the backend."""
        name = self.backend_for(world_size)
        return auto.SPEC if name == "auto" else backends.get_backend(name)
