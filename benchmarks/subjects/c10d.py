"""Calls of torch.distributed on our backend and on torch's Gloo, in turns.

Both groups are in the same 2 processes, with one torch thread each. Tensors are float32, and begin
where torch puts them: 64 bytes into a page if they are large. "there and back" is two sends.
"""

from __future__ import annotations

from collections.abc import Callable

from harness.rank import Loop, Settings, Timed, on_one_thread, repeat
from harness.run import Run, everywhere, ratio

OPTIONS = {"rounds": 7, "round_ms": 20.0, "sizes": (1 << 10, 1 << 18, 1 << 22)}
CALLS = ("all_reduce", "all_reduce, async_op", "broadcast", "all_gather_into_tensor")
CALLS += ("reduce_scatter_tensor", "all_to_all_single", "there and back")


class Ranks(Timed):
    def __init__(self, settings: Settings, rank: int) -> None:
        super().__init__(settings, rank)
        import torch

        import colltensor.torch  # noqa: F401 - registers the backend

        self.torch, self.dist = torch, on_one_thread(settings, rank, "cpu:colltensor")
        self._groups = {
            "colltensor": self.dist.new_group(),
            "gloo": self.dist.new_group(backend="gloo"),
        }
        self.barrier, self.versions = self.dist.barrier, {"torch": torch.__version__}

    def loop(self, operation: str, nbytes: int) -> Loop:
        backend, _, call = operation.partition(" ")
        dist, rank, on = self.dist, self.rank, {"group": self._groups[backend]}
        tensor, both = self.torch.ones(nbytes // 4), self.torch.empty(nbytes // 2)
        part = self.torch.empty(nbytes // 8)

        def there_and_back() -> None:
            for sender in (0, 1):
                (dist.send if rank == sender else dist.recv)(tensor, 1 - rank, **on)

        calls: tuple[Callable[[], object], ...] = (
            lambda: dist.all_reduce(tensor, **on),
            lambda: dist.all_reduce(tensor, async_op=True, **on).wait(),
            lambda: dist.broadcast(tensor, 0, **on),
            lambda: dist.all_gather_into_tensor(both, tensor, **on),
            lambda: dist.reduce_scatter_tensor(part, tensor, **on),
            lambda: dist.all_to_all_single(both, both.clone(), **on),
            there_and_back,
        )
        return repeat(dict(zip(CALLS, calls, strict=True))[call])


def measure(run: Run) -> None:
    rows = []
    with run.started(run.builds("subjects.c10d:Ranks")) as worlds:
        for nbytes in run.options.sizes:
            for call in CALLS:
                pair = everywhere(
                    worlds, (f"{backend} {call}" for backend in ("colltensor", "gloo"))
                )
                ours, gloo = run.medians(worlds, pair, nbytes, table=call).values()
                rows.append([f"{nbytes:,}", call, ours, gloo, ratio(gloo, ours)])
    head = ["bytes", "call", "colltensor", "gloo", "Gloo / colltensor"]
    run.print("Calls of torch.distributed", head, rows, left=2)
