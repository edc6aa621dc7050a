"""Trees of tensors as one call, beside a call a leaf, one array, and another build.

    python benchmarks trees --frameworks numpy,torch,jax
    python benchmarks trees --backend gloo
    python benchmarks trees --operation send
    python benchmarks trees --baseline OTHER/CHECKOUT:OTHER/libcolltensor.so

Two ranks on one host: ``tree`` is ``group.allreduce(tree)``, ``loop`` an allreduce for each leaf,
``one`` an allreduce of one array of as many bytes, ``sync`` a ``Synchronizer`` and
``sync_gradients`` the function. Another operation takes the place of allreduce in the first three;
with ``send`` the other rank receives. Leaves begin where their frameworks put them: numpy's large
ones 16 bytes into a page. ``mixed`` is 1,000 leaves of 1 B to 1 MiB, of five dtypes, every eighth
one strided.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np
from harness.rank import InGroup, Loop, repeat
from harness.run import Run, everywhere, ratio

CASES = {
    "1 of 0-d": (1, 0),
    "100 of 1 KiB": (100, 256),
    "10000 of 1 KiB": (10_000, 256),
    "100 of 256 KiB": (100, 65_536),
    "mixed": (1000, -1),
}
"""Number of leaves and elements of each."""
OPTIONS = {
    "rounds": 7,
    "round_ms": 50.0,
    "baseline": "",
    "backend": "shm",
    "operation": "allreduce",
    "frameworks": ("numpy",),
    "cases": tuple(CASES),
}
CHOICES = {"frameworks": ("numpy", "torch", "jax"), "cases": CASES}
WAYS = ("tree", "loop", "one", "sync_gradients", "sync")
MOST_KEPT = 1000
"""Leaves of the largest tree that a ``Synchronizer`` is measured with."""


def mixed() -> list[np.ndarray]:
    """Return numpy leaves of many sizes, dtypes and layouts, the same on every rank."""
    draw, leaves = np.random.default_rng(0), []
    for number in range(1000):
        dtype = np.dtype(("float32", "float64", "int32", "uint8", "float16")[int(draw.integers(5))])
        count = max(1, int(2 ** draw.uniform(0, 20 if number % 50 == 0 else 12)) // dtype.itemsize)
        leaf = np.ones(2 * count if number % 8 == 0 else count, dtype)
        leaves.append(leaf[::2] if number % 8 == 0 else leaf)
    return leaves


def of_framework(framework: str, array: np.ndarray) -> Any:
    """Return an array of a framework with these values."""
    if framework == "torch":
        torch: Any = importlib.import_module("torch")
        torch.set_num_threads(1)
        return torch.from_numpy(array)
    if framework == "jax":
        jax: Any = importlib.import_module("jax")
        jax.config.update("jax_enable_x64", True)
        return jax.numpy.asarray(array)
    return array


# the memory of one case at a time, and the same leaves for each of its ways
@functools.lru_cache(maxsize=1)
def leaves_of(framework: str, case: str) -> list[Any]:
    """Return the leaves of a case."""
    number, count = CASES[case]
    arrays = mixed() if count < 0 else [np.ones(count or (), np.float32) for _ in range(number)]
    return [of_framework(framework, array) for array in arrays]


class Ranks(InGroup):
    def call(self, name: str, tensor: Any) -> Any:
        if name == "send":
            return self.group.recv(tensor, 0) if self.rank else self.group.send(tensor, 1)
        return getattr(self.group, name)(tensor)

    def loop(self, operation: str, name: str, framework: str, case: str) -> Loop:
        from colltensor.gradients import Synchronizer, sync_gradients

        group, leaves = self.group, leaves_of(framework, case)
        tree = {f"leaf{number}": leaf for number, leaf in enumerate(leaves)}
        if operation == "sync":
            kept = Synchronizer(tree, group=group, average=False)
            return repeat(lambda: kept.sync(tree))
        if operation == "one":
            count = max(1, sum(leaf.nbytes for leaf in leaves) // 4)
            one = of_framework(framework, self.array(count))
            return repeat(lambda: self.call(name, one))
        calls = {
            "tree": lambda: self.call(name, tree),
            "loop": lambda: [self.call(name, leaf) for leaf in leaves],
            "sync_gradients": lambda: sync_gradients(tree, group=group, average=False),
        }
        return repeat(calls[operation])


def measure(run: Run) -> None:
    rows, name, own = [], run.options.operation, {"backend": run.options.backend}
    those = WAYS if name == "allreduce" else WAYS[:3]
    with run.started(run.builds("subjects.trees:Ranks", options=own)) as worlds:
        for framework in run.options.frameworks:
            for case in run.options.cases:
                ways = [way for way in those if way != "sync" or CASES[case][0] <= MOST_KEPT]
                found = run.medians(worlds, everywhere(worlds, ways), name, framework, case)
                for world in worlds:
                    times = [found.get(f"{world} {way}") for way in those]
                    ratios = (ratio(times[0], times[1]), ratio(times[0], times[2]))
                    rows.append([world, framework, case, *times, *ratios])
    head = ["build", "arrays", "leaves", *those, "tree / loop", "tree / one"]
    run.print(f"Trees, {name}, 2 ranks, {run.options.backend}", head, rows, left=3)
