"""Agree on a call before its data moves, and learn which ranks are late or dead.

This is the control plane of a group.
"""

from colltensor.control.plane import Control

__all__ = ["Control"]
