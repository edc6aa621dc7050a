"""What a rank of a benchmark does with an order: check one call's result, or time some calls."""

from __future__ import annotations

import time
import traceback
from typing import Any

from colltensor.cli import operations
from colltensor.cli.libraries import Call, Library, as_numpy

Order = dict[str, Any]


class Worker:
    """Carries out orders with one library."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._prepared: tuple[Order, Call] | None = None

    def __call__(self, order: Order) -> Order:
        """Return the answer to an order: a "check" or a "time"; what is raised is part of it."""
        try:
            what = {
                name: order[name] for name in ("backend", "arrays", "operation", "count", "dtype")
            }
            if order["do"] == "check":
                return {"wrong": self._wrong(what)}
            return {"seconds": self._seconds(what, order["calls"])}
        except Exception as error:  # noqa: BLE001 - the command shows it
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}

    def _prepare(self, what: Order, *, zeros: bool) -> Call:
        import numpy as np

        rank, size = self._library.rank, self._library.world_size
        operation, count = what["operation"], what["count"]
        source = operations.data(operation, rank, size, count, what["dtype"])
        if zeros:  # which no sum makes larger from call to call
            source[...] = 0
        shape = (size, count) if operations.OPERATIONS[operation].blocks_out else (count,)
        output = np.full(shape, 0 if zeros else 99, source.dtype)
        return self._library.prepare(what["backend"], what["arrays"], operation, source, output)

    def _wrong(self, what: Order) -> int:
        """Return how many elements of one call's result are wrong.

        The data is unique to each rank.
        """
        call = self._prepare(what, zeros=False)
        self._library.barrier(what["backend"])
        result = call()
        rank, size = self._library.rank, self._library.world_size
        right = operations.expected(what["operation"], rank, size, what["count"])
        return 0 if right is None else operations.wrong(as_numpy(result), right)

    def _seconds(self, what: Order, calls: int) -> float:
        """Return the seconds of a call, as the mean of ``calls``.

        These follow one another, and all ranks begin them together.
        """
        if self._prepared is None or self._prepared[0] != what:
            self._prepared = what, self._prepare(what, zeros=True)
        call, result = self._prepared[1], None
        self._library.barrier(what["backend"])
        began = time.perf_counter()
        for _ in range(calls):
            result = call()
        ready = getattr(result, "block_until_ready", None)
        if ready is not None:
            ready()
        return (time.perf_counter() - began) / calls
