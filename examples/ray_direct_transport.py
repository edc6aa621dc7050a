"""Arrays go from actor to actor without the object store, and arrive as what they were.

    python examples/ray_direct_transport.py --array torch
    python examples/ray_direct_transport.py --array numpy --compare 64

Needs colltensor[ray] and, for --array, colltensor[torch] or [jax]. ``--compare MIB`` also measures
against the same call through Ray's object store.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from typing import Any

import numpy as np

try:
    import ray
except ModuleNotFoundError:
    sys.exit("this example needs Ray: pip install '.[ray]'")

from colltensor.ray import NumpyArray, register_tensor_transports

TRANSPORTS = {"torch": "COLLTENSOR", "jax": "COLLTENSOR_JAX", "numpy": "COLLTENSOR_NUMPY"}
TURNS = 9


def to_framework(values: np.ndarray[Any, Any], array: str) -> Any:
    """Make an array of the framework that was asked for."""
    if array == "torch":
        return importlib.import_module("torch").from_numpy(values)
    return importlib.import_module("jax.numpy").array(values) if array == "jax" else values


class Player:
    """Gives arrays away, and takes them."""

    def prepare(self, array: str, count: int) -> None:
        """Have an array at hand."""
        self.array, self.given = array, to_framework(np.arange(count, dtype=np.float32), array)

    def give(self) -> dict[str, Any]:
        """Return the array in a container; numpy's is wrapped, so that the transport carries it."""
        return {
            "weights": NumpyArray(self.given) if self.array == "numpy" else self.given,
            "step": 1,
        }

    def give_plainly(self) -> dict[str, Any]:
        """Return the array as Ray carries it otherwise."""
        return {"weights": self.given, "step": 1}

    def take(self, message: dict[str, Any]) -> tuple[str, float]:
        """Say of which type the array is, and its last element."""
        weights = message["weights"]
        weights = weights.array if isinstance(weights, NumpyArray) else weights
        return f"{type(weights).__module__}.{type(weights).__qualname__}", float(weights[-1])


def milliseconds(giver: Any, taker: Any, method: str, **options: Any) -> float:
    """Return what it takes to give and take, seen from the driver: the median of a few turns."""
    times = []
    for _ in range(TURNS):
        start = time.perf_counter()
        ray.get(taker.take.remote(getattr(giver, method).options(**options).remote()))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])


def main() -> int:
    """Run the example; return 0 where the array arrived as it was."""
    parser = argparse.ArgumentParser(description="direct transport between Ray actors")
    parser.add_argument("--array", choices=tuple(TRANSPORTS), default="numpy")
    parser.add_argument(
        "--compare", type=int, metavar="MIB", help="also measure, against the object store"
    )
    options = parser.parse_args()
    try:
        importlib.import_module(options.array)
    except ModuleNotFoundError:
        sys.exit(f"--array {options.array} needs it installed: pip install '.[{options.array}]'")

    register_tensor_transports([options.array])
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    try:
        remote = ray.remote(num_cpus=0, enable_tensor_transport=True)(Player)
        giver, taker = remote.remote(), remote.remote()
        ray.get(giver.prepare.remote(options.array, 1000))
        transport = TRANSPORTS[options.array]
        message = giver.give.options(tensor_transport=transport).remote()
        kind, last = ray.get(taker.take.remote(message))
        print(f"the array arrived as {kind} and ends with {last:g}")
        if options.compare:
            # once an actor has given directly, Ray pickles this type there by a slower way
            other = remote.remote()
            ray.get(
                [
                    player.prepare.remote(options.array, options.compare << 18)
                    for player in (giver, other)
                ]
            )
            store = milliseconds(other, taker, "give_plainly")
            direct = milliseconds(giver, taker, "give", tensor_transport=transport)
            print(
                f"{options.compare} MiB: {direct:.1f} ms directly, {store:.1f} ms through the object store"
            )
    finally:
        ray.shutdown()
    right = last == 999 and kind.split(".")[0].startswith(options.array)
    print("right" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
