"""What keeping gradients in step costs a training loop: colltensor.torch, DDP on Gloo, and no synchronisation.

    python benchmarks/gradient_sync.py
    python benchmarks/gradient_sync.py --widths 512 --variants alone ddp ours ours-worker

An MLP 64-w-w-10, batch 64, SGD, in 2 processes of one machine, one torch thread each. In every round each variant runs
some steps, after a barrier, all variants in turns ("ddp" is DDP on Gloo, "ddp-colltensor" DDP on our backend of
torch.distributed); a sample is a round's mean time of a step, averaged over the ranks.
The table has medians and, of what a step takes longer than without synchronisation, ours as a part of DDP's; the
exit status is 1 where a target is missed. Gradients begin where torch puts them: at a multiple of 64 bytes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Literal

BATCH = 64
STEPS = {64: 60, 512: 15, 2048: 12}
TARGETS = {64: 1 / 6, 512: 1 / 6, 2048: 1 / 4}
DEFAULTS = ("alone", "ddp", "ddp-colltensor", "ours", "alone-kept", "ours-kept")
GROUPS = {"ddp": "gloo", "ddp-colltensor": "colltensor"}
VARIANTS = (*DEFAULTS, "ours-worker", "ours-fp16")
"""``kept``: the loop zeroes its gradients in place, where the others set them to None."""


def make_step(variant: str, width: int) -> Callable[[], None]:
    """Return one step of training in a variant; collective."""
    import torch

    from colltensor.torch import sync_gradients

    torch.manual_seed(0)
    model: torch.nn.Module = torch.nn.Sequential(
        torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, width), torch.nn.ReLU(),
        torch.nn.Linear(width, 10),
    )
    if variant in GROUPS:
        group = torch.distributed.new_group(backend=GROUPS[variant])
        model = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    elif variant.startswith("ours"):
        overlap: Literal["worker", True] = "worker" if variant == "ours-worker" else True
        sync_gradients(model, overlap=overlap, compression="fp16" if variant == "ours-fp16" else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    images, labels = torch.randn(BATCH, 64), torch.randint(10, (BATCH,))
    set_to_none = not variant.endswith("-kept")

    def step() -> None:
        optimizer.zero_grad(set_to_none=set_to_none)
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def rank_main(rank: int, folder: str, options: argparse.Namespace, link: Connection) -> None:
    """Run one rank; send each width's samples by variant, in microseconds a step."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch

    import colltensor as col

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/ddp", rank=rank, world_size=2)
    group = col.init_collective_group(2, rank, init_method=f"file://{folder}")
    for width in options.widths:
        steps = {variant: make_step(variant, width) for variant in options.variants}
        samples: dict[str, list[float]] = {variant: [] for variant in options.variants}
        count = STEPS.get(width, 5)
        for number in range(options.rounds + 2):
            for variant, step in steps.items():
                group.barrier()
                begin = time.perf_counter()
                for _ in range(count):
                    step()
                if number >= 2:
                    samples[variant].append((time.perf_counter() - begin) / count * 1e6)
        link.send(samples)
    link.close()
    group.destroy()
    torch.distributed.destroy_process_group()


def report(width: int, samples: list[dict[str, list[float]]]) -> bool:
    """Print one width's rows; return whether our default holds its target."""
    fine = True
    medians = {
        variant: statistics.median(map(statistics.mean, zip(*(rank[variant] for rank in samples), strict=True)))
        for variant in samples[0]
    }
    above_ddp = medians["ddp"] - medians["alone"]
    for variant, median in medians.items():
        alone = medians["alone-kept" if variant.endswith("-kept") else "alone"]
        row = f"| {width} | {variant} | {median:,.0f} | {median - alone:,.0f} |"
        part, target = (median - alone) / above_ddp, TARGETS.get(width, 1 / 6)
        if not variant.startswith("ours"):
            print(f"{row} {part:.3f} | |" if variant == "ddp-colltensor" else f"{row} | |")
            continue
        fine &= variant != "ours" or part <= target
        verdict = "holds" if part <= target else "MISSED"
        print(f"{row} {part:.3f} | at most {target:.3f}: {verdict} |", flush=True)
    return fine


def main() -> int:
    """Start the ranks and print the table; return 0 where the targets hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(DEFAULTS))
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        links, processes = [], []
        for rank in range(2):
            ours, theirs = context.Pipe(duplex=False)
            processes.append(context.Process(target=rank_main, args=(rank, folder, options, theirs), daemon=True))
            processes[-1].start()
            theirs.close()
            links.append(ours)
        print("| w | variant | us a step | above alone | part of DDP's | target |\n"
              "| ---: | --- | ---: | ---: | ---: | --- |", flush=True)
        fine = [report(width, [link.recv() for link in links]) for width in options.widths]
        for process in processes:
            process.join(30)
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
