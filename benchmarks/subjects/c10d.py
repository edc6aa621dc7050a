"""Calls of torch.distributed on our backend and on torch's Gloo, both groups in the same processes, in turns.

2 processes with one torch thread each, float32; "there and back" is two sends. Tensors begin where torch puts them: 64
bytes into a page if they are large.
"""

from __future__ import annotations

import argparse
from typing import Any

from harness.rank import Loop, Settings, Timed, repeat
from harness.rounds import Contestant
from harness.run import Run, add_options

SIZES = (1 << 10, 1 << 18, 1 << 22)
BACKENDS = ("colltensor", "gloo")
CALLS = (
    "all_reduce",
    "all_reduce, async_op",
    "broadcast",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_to_all_single",
    "there and back",
)


class Ranks(Timed):
    """The ranks; an operation is a backend and a call."""

    def __init__(self, settings: Settings, rank: int) -> None:
        super().__init__(settings, rank)
        import torch

        import colltensor.torch  # noqa: F401 - registers the backend

        torch.set_num_threads(1)
        dist: Any = torch.distributed
        dist.init_process_group(
            "cpu:colltensor", f"file://{settings.folder}/store", rank=rank, world_size=2
        )
        self._groups = {"colltensor": dist.new_group(), "gloo": dist.new_group(backend="gloo")}
        self.barrier, self.versions = dist.barrier, {"torch": torch.__version__}

    def loop(self, operation: str, nbytes: int) -> Loop:
        """Return the loop of a call."""
        import torch

        dist: Any = torch.distributed
        backend, _, call = operation.partition(" ")
        group, rank = self._groups[backend], self.rank
        tensor = torch.ones(nbytes // 4)
        gathered, part = torch.empty(2 * nbytes // 4), torch.empty(nbytes // 8)

        def there_and_back() -> None:
            for sender in (0, 1):
                (dist.send if rank == sender else dist.recv)(tensor, 1 - rank, group=group)

        return repeat(
            {
                "all_reduce": lambda: dist.all_reduce(tensor, group=group),
                "all_reduce, async_op": lambda: dist.all_reduce(
                    tensor, group=group, async_op=True
                ).wait(),
                "broadcast": lambda: dist.broadcast(tensor, 0, group=group),
                "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(
                    gathered, tensor, group=group
                ),
                "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(
                    part, tensor, group=group
                ),
                "all_to_all_single": lambda: dist.all_to_all_single(
                    gathered, gathered.clone(), group=group
                ),
                "there and back": there_and_back,
            }[call]
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_options(parser, rounds=7, round_ms=20)


def measure(run: Run, options: argparse.Namespace) -> None:
    """Print the table."""
    rows = []
    with run.started(run.builds("subjects.c10d:Ranks")) as worlds:
        for nbytes in SIZES:
            for call in CALLS:
                pair = [Contestant(backend, "this", f"{backend} {call}") for backend in BACKENDS]
                ours, gloo = (
                    found.median_us
                    for found in run.measure(worlds, pair, nbytes, table=call).values()
                )
                rows.append([f"{nbytes:,}", call, ours, gloo, f"{gloo / ours:.1f}"])
    run.print(
        "Calls of torch.distributed",
        ["bytes", "call", *BACKENDS, "Gloo / colltensor"],
        rows,
        left=2,
    )
