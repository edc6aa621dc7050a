"""ColTensor in Ray: rendezvous through Ray, and groups declared from the driver.

Imports ray, so nothing outside Ray imports this package. Only Ray's public API is used, but for events of its timeline.
"""

from colltensor.ray.declare import CollectiveGroup, create_collective_group
from colltensor.ray.observe import observe
from colltensor.ray.rendezvous import RayDirectory

__all__ = ["CollectiveGroup", "RayDirectory", "create_collective_group", "observe"]
