"""ColTensor in Ray: rendezvous, groups declared from the driver, and Ray's own plug-ins.

The rendezvous goes through Ray. The plug-ins are Ray's collective API on top of us, and tensor
transports. Imports ray, so nothing outside Ray imports this package. Only Ray's public API is used,
with two exceptions: events of its timeline, and the parts of its experimental API that the
transports implement.
"""

from colltensor.ray.arrays import NumpyArray
from colltensor.ray.declare import CollectiveGroup, collective_group, create_collective_group
from colltensor.ray.observe import observe
from colltensor.ray.placement import placed_actors
from colltensor.ray.registration import register, register_tensor_transports
from colltensor.ray.rendezvous import RayDirectory

__all__ = [
    "CollectiveGroup", "NumpyArray", "RayDirectory", "collective_group", "create_collective_group", "observe",
    "placed_actors", "register", "register_tensor_transports",
]  # fmt: skip
