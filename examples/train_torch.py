"""A torch training loop of one's own in Ray workers that keep their gradients in step.

    python examples/train_torch.py --workers 2

The loop is a plain one: forward, backward, clip, step. ``sync_gradients`` is the one line added to
it. Each batch is divided among the workers, so a step must do what one process does on the whole
batch: the loss of every step must be that of the single process to 1e-4 relative, and the accuracy
the same.

Needs colltensor[ray,torch] and scikit-learn.
"""

from __future__ import annotations

import sys

import digits

try:
    import torch
except ModuleNotFoundError:
    sys.exit("this example needs torch: pip install '.[ray,torch]' scikit-learn")

from colltensor.torch import sync_gradients


def train(rank: int, world_size: int, steps: int) -> digits.Outcome:
    """Train on this worker's parts of the batches."""
    # the ranks start apart; sync_gradients gives all of them rank 0's parameters
    torch.manual_seed(rank)
    torch.set_num_threads(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, digits.CLASSES)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    if world_size > 1:
        sync_gradients(model)
    losses = []
    for images, labels in digits.batches(rank, world_size, steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            model(torch.from_numpy(images)), torch.from_numpy(labels)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    images, labels = digits.load()
    right = model(torch.from_numpy(images)).argmax(1).numpy() == labels
    return digits.Outcome(digits.mean_over_workers(losses, world_size), float(right.mean()))


if __name__ == "__main__":
    sys.exit(digits.main(train))
