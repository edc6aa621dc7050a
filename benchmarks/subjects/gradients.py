"""What keeping gradients in step costs a training loop: colltensor.torch, DDP on Gloo, and no synchronisation.

    python benchmarks gradients
    python benchmarks gradients --widths 512 --variants alone ddp ours ours-worker

An MLP 64-w-w-10, batch 64, SGD, in 2 processes of one machine, one torch thread each. "ddp" is DDP on Gloo,
"ddp-colltensor" DDP on our backend of torch.distributed; with "kept" the loop zeroes its gradients in place, where the
others set them to None. The table has the time of a step and, of what it takes longer than without synchronisation,
ours as a part of DDP's; the exit status is 1 where a target is missed. Gradients begin at a multiple of 64 bytes.
"""

from __future__ import annotations

import argparse
from typing import Literal

from harness.rank import InGroup, Loop, Settings, repeat
from harness.run import Run, add_options, everywhere

BATCH = 64
TARGETS = {64: 1 / 6, 512: 1 / 6, 2048: 1 / 4}
DEFAULTS = ("alone", "ddp", "ddp-colltensor", "ours", "alone-kept", "ours-kept")
GROUPS = {"ddp": "gloo", "ddp-colltensor": "colltensor"}
VARIANTS = (*DEFAULTS, "ours-worker", "ours-fp16")


class Ranks(InGroup):
    """The ranks; an operation is a variant."""

    def __init__(self, settings: Settings, rank: int) -> None:
        super().__init__(settings, rank)
        import torch

        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", f"file://{settings.folder}/{settings.world}-ddp", rank=rank, world_size=2
        )
        self.versions["torch"] = torch.__version__

    def loop(self, operation: str, width: int) -> Loop:
        """Return the loop of a step of training."""
        import torch

        from colltensor.torch import sync_gradients

        torch.manual_seed(0)
        model: torch.nn.Module = torch.nn.Sequential(
            torch.nn.Linear(64, width),
            torch.nn.ReLU(),
            torch.nn.Linear(width, width),
            torch.nn.ReLU(),
            torch.nn.Linear(width, 10),
        )
        if operation in GROUPS:
            group = torch.distributed.new_group(backend=GROUPS[operation])
            model = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
        elif operation.startswith("ours"):
            overlap: Literal["worker", True] = "worker" if operation == "ours-worker" else True
            sync_gradients(
                model, overlap=overlap, compression="fp16" if operation == "ours-fp16" else None
            )
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        images, labels = torch.randn(BATCH, 64), torch.randint(10, (BATCH,))
        set_to_none = not operation.endswith("-kept")

        def step() -> None:
            optimizer.zero_grad(set_to_none=set_to_none)
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

        return repeat(step)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_options(parser, rounds=40, round_ms=30, baseline=True)
    parser.add_argument("--widths", type=int, nargs="+", default=list(TARGETS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(DEFAULTS))


def measure(run: Run, options: argparse.Namespace) -> int:
    """Print the table; return 0 where our default holds its targets."""
    rows, missed = [], False
    with run.started(run.builds("subjects.gradients:Ranks", options={"backend": "auto"})) as worlds:
        for width in options.widths:
            found = run.measure(worlds, everywhere(worlds, options.variants), width)
            medians = {variant: samples.median_us for variant, samples in found.items()}
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
                compared = variant not in ("alone", "ddp", "alone-kept")
                rows.append(
                    [str(width), variant, median, above, f"{part:.3f}" if compared else "", verdict]
                )
    run.print(
        "A step of training",
        ["w", "variant", "us a step", "above alone", "part of DDP's", "target"],
        rows,
        left=2,
    )
    return int(missed)
