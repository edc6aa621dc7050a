"""The control plane of a group: ranks agree on a call before its data moves, and learn who is late or dead.

Imports net and errors of the package, and no framework.
"""

from colltensor.control.control import Control

__all__ = ["Control"]
