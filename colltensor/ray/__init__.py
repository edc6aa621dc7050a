"""ColTensor in Ray: rendezvous through Ray, groups declared from the driver, and actors placed for them.

Imports ray, so nothing outside Ray imports this package. Only Ray's public API is used.
"""

from colltensor.ray.declare import CollectiveGroup, collective_group, create_collective_group
from colltensor.ray.placement import placed_actors
from colltensor.ray.rendezvous import RayDirectory

__all__ = [
    "CollectiveGroup", "RayDirectory", "collective_group", "create_collective_group", "placed_actors",
]
