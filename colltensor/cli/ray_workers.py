"""Ranks of a benchmark that are Ray's actors, and the one process that tells them what to do.

With ``putget`` there is no collective: the actors put and get arrays, and the driver carries the
references.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Iterator
from typing import Any

from colltensor.cli import operations
from colltensor.cli.libraries import LIBRARIES
from colltensor.cli.worker import Order, Worker


class _Rank:
    """An actor: one rank of a library."""

    def __init__(self, library: str, rank: int, world_size: int) -> None:
        self._worker = Worker(LIBRARIES[library](rank, world_size))

    def do(self, order: Order) -> Order:
        """Carry out an order."""
        return self._worker(order)


class _Store:
    """An actor that has an array, and reaches the others through the object store alone."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._size = rank, world_size
        self._ray = importlib.import_module("ray")
        self._array: Any = None
        self._result: Any = None

    def fill(self, operation: str, count: int, dtype: str) -> None:
        """Take this rank's data."""
        self._array = operations.data(operation, self._rank, self._size, count, dtype)

    def put(self) -> list[Any]:
        """Put the array; the list keeps Ray from resolving the reference on the way."""
        return [self._ray.put(self._array)]

    def add(self, *puts: list[Any]) -> list[Any]:
        """Get and add up everybody's, and put the sum."""
        total = self._array * 0
        for (reference,) in puts:
            total += self._ray.get(reference)
        return [self._ray.put(total)]

    def take(self, *puts: list[Any]) -> None:
        """Get what was put: views of the object store."""
        found = [self._ray.get(reference) for (reference,) in puts]
        self._result = found[0] if len(found) == 1 else found

    def wrong(self, operation: str, count: int) -> int:
        """Count the wrong elements of the last result."""
        from colltensor.cli.libraries import as_numpy

        right = operations.expected(operation, self._rank, self._size, count)
        return 0 if right is None else operations.wrong(as_numpy(self._result), right)


class _Collectives:
    """Passes each order on to all actors at once, and makes one answer of theirs."""

    def __init__(self, ray: Any, name: str, world_size: int) -> None:
        self._ray = ray
        library = "colltensor" if name == "colltensor-in-ray" else name
        make = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_Rank)
        self._actors = [make.remote(library, rank, world_size) for rank in range(world_size)]

    def __call__(self, order: Order) -> Order:
        answers: list[Order] = self._ray.get([actor.do.remote(order) for actor in self._actors])
        failed = [answer for answer in answers if "error" in answer]
        if failed:
            return failed[0]
        if order["do"] == "check":
            return {"wrong": sum(answer["wrong"] for answer in answers)}
        return {"seconds": max(answer["seconds"] for answer in answers)}


class _PutGet:
    """Combines arrays with ``ray.put`` and ``ray.get``.

    Times are the driver's, until all actors have the result.
    """

    def __init__(self, ray: Any, world_size: int) -> None:
        self._ray = ray
        make = ray.remote(num_cpus=1)(_Store)
        self._actors = [make.remote(rank, world_size) for rank in range(world_size)]

    def __call__(self, order: Order) -> Order:
        operation, count = order["operation"], order["count"]
        if operation not in ("allreduce", "broadcast", "allgather"):
            return {
                "error": f"UnsupportedError: {operation} is not written with ray.put and ray.get"
            }
        self._all("fill", operation, count, order["dtype"])
        if order["do"] == "check":
            self._once(operation)
            return {"wrong": sum(self._all("wrong", operation, count))}
        began = time.perf_counter()
        for _ in range(order["calls"]):
            self._once(operation)
        return {"seconds": (time.perf_counter() - began) / order["calls"]}

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        calls = [getattr(actor, method).remote(*arguments) for actor in self._actors]
        found: list[Any] = self._ray.get(calls)
        return found

    def _once(self, operation: str) -> None:
        putting = self._actors[:1] if operation == "broadcast" else self._actors
        puts = [actor.put.remote() for actor in putting]
        if operation == "allreduce":
            puts = [self._actors[0].add.remote(*puts)]
        self._all("take", *puts)


@contextlib.contextmanager
def driver(name: str, world_size: int) -> Iterator[Any]:
    """Start the actors, and yield what carries out orders.

    Those of ``colltensor-in-ray`` run in the cluster that RAY_ADDRESS names, or in this host's. The
    others have a cluster of their own.
    """
    ray = importlib.import_module("ray")
    local = {"num_cpus": world_size, "include_dashboard": False}
    in_cluster = name == "colltensor-in-ray"
    options = {"address": "auto"} if in_cluster else {"address": "local", **local}
    ray.init(log_to_driver=False, **options)
    try:
        yield _PutGet(ray, world_size) if name == "putget" else _Collectives(ray, name, world_size)
    finally:
        ray.shutdown()
