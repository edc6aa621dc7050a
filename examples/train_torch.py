"""A torch training loop of one's own on scikit-learn's digits, in Ray workers that keep their gradients in step.

    python examples/train_torch.py --workers 2

The loop is a plain one: forward, backward, clip, step. ``sync_gradients`` is the one line added to it. Each batch is
divided among the workers, so a step must do what one process does on the whole batch: the loss of every step, averaged
over the workers, must be that of the single process to 1e-4 relative, and the final accuracy the same to one image.

Needs colltensor[ray,torch] and scikit-learn.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field

try:
    import ray
    import torch
    from sklearn.datasets import load_digits
except ModuleNotFoundError as missing:
    sys.exit(f"this example needs Ray, torch and scikit-learn ({missing.name} is missing): "
             "pip install 'colltensor[ray,torch]' scikit-learn")

import colltensor as col
from colltensor.torch import sync_gradients

BATCH = 96
TRAINED = 1440
LOSS_TOLERANCE = 1e-4


@dataclass
class Run:
    """What a run was like: the loss of every step, and how many of the held-out images were recognised."""

    losses: list[float] = field(default_factory=list)
    recognised: int = 0


def train(rank: int, world_size: int, epochs: int) -> Run:
    """Train on every ``world_size``-th image of each batch, from ``rank`` on."""
    torch.manual_seed(rank)  # the ranks start apart; sync_gradients gives all of them rank 0's parameters
    torch.set_num_threads(1)
    digits, numbers = load_digits(return_X_y=True)
    images, labels = torch.tensor(digits / 16, dtype=torch.float32), torch.tensor(numbers)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    if world_size > 1:
        sync_gradients(model)
    run = Run()
    shuffle = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(TRAINED, generator=shuffle).split(BATCH):
            mine = batch[rank::world_size]
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images[mine]), labels[mine])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            mean = loss.detach()
            if world_size > 1:
                col.allreduce(mean, op=col.ReduceOp.AVERAGE)
            run.losses.append(float(mean))
    run.recognised = int((model(images[TRAINED:]).argmax(1) == labels[TRAINED:]).sum())
    return run


class Worker:
    """One worker: joins the group and trains on its part of every batch."""

    def train(self, rank: int, world_size: int, epochs: int) -> Run:
        """Join, train, leave."""
        if world_size > 1:
            col.init_collective_group(world_size, rank, timeout_s=60)
        try:
            return train(rank, world_size, epochs)
        finally:
            if world_size > 1:
                col.destroy_collective_group()


def main() -> int:
    """Train in one process and in many; return 0 where the loss curves and the accuracies agree."""
    parser = argparse.ArgumentParser(description="data-parallel training of a torch module in Ray workers")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    if BATCH % options.workers:
        sys.exit(f"--workers {options.workers}: expected a divisor of the batch, {BATCH}, so that all parts are equal")
    ray.init(num_cpus=options.workers, include_dashboard=False, logging_level="ERROR")
    try:
        remote = ray.remote(num_cpus=1)(Worker)
        workers = [remote.remote() for _ in range(options.workers)]
        alone = ray.get(workers[0].train.remote(0, 1, options.epochs))
        runs = ray.get([
            worker.train.remote(rank, options.workers, options.epochs) for rank, worker in enumerate(workers)
        ])
    finally:
        ray.shutdown()

    first, held_out = runs[0], len(load_digits().target) - TRAINED
    difference = max(abs(loss - twin) / twin for loss, twin in zip(first.losses, alone.losses, strict=True))
    print(f"loss {first.losses[0]:.4f} to {first.losses[-1]:.6f} in {len(first.losses)} steps of {options.workers} "
          f"workers; largest relative difference from one process {difference:.1e}; "
          f"accuracy {first.recognised / held_out:.4f}, in one process {alone.recognised / held_out:.4f}")
    same_everywhere = all(run == first for run in runs)
    if not same_everywhere or difference > LOSS_TOLERANCE or abs(first.recognised - alone.recognised) > 1:
        print(f"WRONG: expected one loss curve on all workers, within {LOSS_TOLERANCE} of the single process, and its "
              "accuracy to one image")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
