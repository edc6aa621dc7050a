"""The control plane of a group: ranks agree on a call before its data moves, and learn who is late or dead."""

from colltensor.control.plane import Control

__all__ = ["Control"]
