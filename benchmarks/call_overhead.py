"""What view, checks and API add to a call: one rank on loopback, where the wire costs nothing.

    python benchmarks/call_overhead.py

1 KiB of float32. A sample is the mean of 300 calls; the table has the lowest and the median of 400 samples, in
microseconds, less the cost of the loop. JAX arrays are donated, and their shape was seen before (compiling takes tens
of milliseconds a shape).
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
from worlds.places import place_of

import colltensor as col

COUNT = 256
TARGETS_US = {"numpy": 3.0, "torch": 3.0, "jax": 40.0}


def calls(group: col.Group) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield a name and a call for each framework that is installed."""
    array = np.ones(COUNT, np.float32)
    yield "numpy", lambda: col.allreduce(array)
    yield "numpy, Group method", lambda: group.allreduce(array)
    if importlib.util.find_spec("torch"):
        import torch

        tensor = torch.ones(COUNT)
        yield "torch", lambda: col.allreduce(tensor)
        yield "torch, Group method", lambda: group.allreduce(tensor)
    if importlib.util.find_spec("jax"):
        import jax.numpy as jnp

        held = [jnp.ones(COUNT)]

        def donate() -> None:
            held[0] = col.allreduce(held[0], donate=True)

        yield "jax, donated", donate
        kept = jnp.ones(COUNT)
        yield "jax, copied", lambda: col.allreduce(kept)


def measure_us(call: Callable[[], object], samples: int, repeats: int = 300) -> tuple[float, float]:
    """Return the lowest and the median time of a call."""
    call()
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        times.append((time.perf_counter() - start) / repeats * 1e6)
    return min(times), statistics.median(times)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=400)
    samples = parser.parse_args().samples
    group = col.init_collective_group(1, 0)
    print(f"numpy's array begins {place_of(np.ones(COUNT, np.float32))}")
    loop_us = measure_us(lambda: None, samples)[1]
    print(f"{'allreduce, 1 KiB, 1 rank':<26} {'lowest':>8} {'median':>8} {'target':>8}   us")
    for name, call in calls(group):
        lowest, median = measure_us(call, samples)
        target = TARGETS_US.get(name.partition(",")[0])
        print(f"{name:<26} {lowest - loop_us:8.2f} {median - loop_us:8.2f} {target:8.1f}")


if __name__ == "__main__":
    main()
