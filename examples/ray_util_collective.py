"""A program that was written for ``ray.util.collective``, on our backends.

The lines with a remark are what it takes. Run it with ``python examples/ray_util_collective.py``.
Needs colltensor[ray] and colltensor[jax].
"""

from __future__ import annotations

import numpy as np
import ray
import ray.util.collective as collective

import colltensor.ray  # ours

WORKERS = 2
STEPS = 3


@ray.remote(num_cpus=0.5)
class Worker:
    """Descends on the mean of all workers' gradients of its own ``(w - target)^2``."""

    def __init__(self, target: float) -> None:
        self.target = target
        self.weights = np.zeros(4, np.float32)

    def step(self) -> list[float]:
        """One step of descent."""
        gradients = 2 * (self.weights - self.target)
        collective.allreduce(gradients, "trainers")
        self.weights -= 0.25 * gradients / collective.get_collective_group_size("trainers")
        return self.weights.tolist()

    def jax_sum(self) -> list[float]:
        """Ray's functions refuse JAX arrays.

        The group's own methods take them and return new ones.
        """
        import jax.numpy as jnp

        (summed,) = collective.get_group_handle("trainers").allreduce([jnp.full(2, self.target)])
        return summed.tolist()

    def leave(self) -> None:
        """Leave the group; Ray ends the actor that it declared the group with."""
        collective.destroy_collective_group("trainers")


def main() -> None:
    """Train, and compare with the same descent in one process."""
    colltensor.ray.register()  # ours, in the driver
    in_workers = {"worker_process_setup_hook": "colltensor.ray.register"}  # ours, in every worker
    ray.init(num_cpus=WORKERS, runtime_env=in_workers)
    targets = [float(rank + 1) for rank in range(WORKERS)]
    workers = [Worker.remote(target) for target in targets]
    # was "GLOO"
    collective.create_collective_group(
        workers, WORKERS, list(range(WORKERS)), "COLLTENSOR", "trainers"
    )
    expected = 0.0
    for step in range(STEPS):
        found = ray.get([worker.step.remote() for worker in workers])
        expected -= 0.25 * sum(2 * (expected - target) for target in targets) / WORKERS
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        print(f"step {step}: every worker has {found[0][0]:.4f}, one process has {expected:.4f}")
    sums = ray.get([worker.jax_sum.remote() for worker in workers])
    assert sums == [[sum(targets)] * 2] * WORKERS, sums
    print(f"JAX arrays through the group's handle: {sums[0]}")
    ray.get([worker.leave.remote() for worker in workers])


if __name__ == "__main__":
    main()
