"""ColTensor in Ray: rendezvous through Ray, groups declared from the driver, and Ray's own collective API on top of us.

Imports ray, so nothing outside Ray imports this package. Only Ray's public API is used, but for events of its timeline.
"""

from colltensor.ray.declare import CollectiveGroup, collective_group, create_collective_group
from colltensor.ray.observe import observe
from colltensor.ray.placement import placed_actors
from colltensor.ray.registration import register
from colltensor.ray.rendezvous import RayDirectory

__all__ = [
    "CollectiveGroup", "RayDirectory", "collective_group", "create_collective_group", "observe", "placed_actors",
    "register",
]
