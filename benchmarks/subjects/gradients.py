"""What keeping gradients in step costs a training loop: ours, DDP on Gloo, and nothing.

    python benchmarks gradients
    python benchmarks gradients --widths 512 --variants alone ddp ours ours-worker

An MLP 64-w-w-10, batch 64, SGD, in 2 processes of one machine, one torch thread each. "ddp" is DDP
on Gloo, "ddp-colltensor" DDP on our backend of torch.distributed; with "kept" the loop zeroes its
gradients in place, where the others set them to None. The table has the time of a step and, of what
it takes longer than without synchronisation, ours as a part of DDP's; the exit status is 1 where a
target is missed. Gradients begin at a multiple of 64 bytes.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

from harness.rank import InGroup, Loop, Settings, on_one_thread, repeat
from harness.run import Run, everywhere

TARGETS = {64: 1 / 6, 512: 1 / 6, 2048: 1 / 4}
VARIANTS = ("alone", "ddp", "ddp-colltensor", "ours", "alone-kept", "ours-kept")
OPTIONS = {
    "rounds": 40,
    "round_ms": 30.0,
    "baseline": "",
    "widths": tuple(TARGETS),
    "variants": VARIANTS,
}
CHOICES = {"variants": (*VARIANTS, "ours-worker", "ours-fp16")}
GROUPS = {"ddp": "gloo", "ddp-colltensor": "colltensor"}


class Ranks(InGroup):
    def __init__(self, settings: Settings, rank: int) -> None:
        super().__init__(settings, rank)
        self.dist = on_one_thread(settings, rank)
        self.versions["torch"] = metadata.version("torch")

    def loop(self, operation: str, width: int) -> Loop:
        import torch

        from colltensor.torch import sync_gradients

        nn: Any = torch.nn
        torch.manual_seed(0)
        first, middle, last = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, 10)
        model = nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), last)
        if operation in GROUPS:
            group = self.dist.new_group(backend=GROUPS[operation])
            model = nn.parallel.DistributedDataParallel(model, process_group=group)
        elif operation.startswith("ours"):
            overlap: Any = "worker" if operation == "ours-worker" else True
            compression: Any = "fp16" if operation == "ours-fp16" else None
            sync_gradients(model, overlap=overlap, compression=compression)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        images, labels = torch.randn(64, 64), torch.randint(10, (64,))
        set_to_none = not operation.endswith("-kept")

        def step() -> None:
            optimizer.zero_grad(set_to_none=set_to_none)
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

        return repeat(step)


def measure(run: Run) -> int:
    rows, missed = [], False
    with run.started(run.builds("subjects.gradients:Ranks", options={"backend": "auto"})) as worlds:
        for width in run.options.widths:
            found = run.medians(worlds, everywhere(worlds, run.options.variants), width)
            medians = {label.removeprefix("this "): median for label, median in found.items()}
            target = TARGETS.get(width, 1 / 6)
            if "ddp" not in medians:
                rows += [[str(width), variant, median] for variant, median in medians.items()]
                continue
            for variant, median in medians.items():
                above = median - medians["alone-kept" if variant.endswith("-kept") else "alone"]
                part, verdict = above / (medians["ddp"] - medians["alone"]), ""
                if variant.startswith("ours"):
                    verdict = f"at most {target:.3f}: {'holds' if part <= target else 'MISSED'}"
                    missed |= variant == "ours" and part > target
                of_ddp = "" if variant in ("alone", "ddp", "alone-kept") else f"{part:.3f}"
                rows.append([str(width), variant, median, above, of_ddp, verdict])
    head = ["w", "variant", "us a step", "above alone", "part of DDP's", "target"]
    run.print("A step of training", head, rows, left=2)
    return int(missed)
