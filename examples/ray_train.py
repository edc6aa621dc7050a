"""Ray Train with colltensor under torch.distributed: DDP in Ray's workers, on CPUs.

    python examples/ray_train.py --workers 2

Only ``TorchConfig(backend="cpu:colltensor")`` is special. The workers need not import colltensor:
torch itself learns of the backend when it is imported (docs/torch_distributed.md). Every worker has
a part of the data, and the loss of every step must be that of one process that has all of it, to
1e-5 relative.

Needs colltensor[ray,torch] and ray[train].
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from typing import Any

try:
    import ray
    import torch
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer, prepare_model
except ModuleNotFoundError as missing:
    sys.exit(
        f"this example needs torch and Ray Train ({missing.name} is missing): "
        "pip install '.[ray,torch]' 'ray[train]'"
    )

ROWS, FEATURES, STEPS = 64, 8, 20


def train(model: torch.nn.Module, rank: int, world_size: int) -> list[float]:
    """Fit a linear model to this worker's rows; return the loss on them in every step."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(ROWS, FEATURES, generator=generator)
    targets = inputs @ torch.randn(FEATURES, 1, generator=generator)
    inputs, targets = inputs[rank::world_size], targets[rank::world_size]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def new_model(seed: int) -> torch.nn.Module:
    """Return a model whose parameters depend on the seed."""
    torch.manual_seed(seed)
    return torch.nn.Linear(FEATURES, 1)


def train_on_worker(config: dict[str, Any]) -> tuple[str, list[float]]:
    """Train in a worker of Ray Train.

    Returns what the process group is, and the workers' mean loss of every step.
    """
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    # DistributedDataParallel, which gives all workers rank 0's parameters
    model = prepare_model(new_model(rank))
    losses = torch.tensor(train(model, rank, world_size), dtype=torch.float64)
    torch.distributed.all_reduce(losses, torch.distributed.ReduceOp.AVG)
    return type(torch.distributed.group.WORLD).__name__, losses.tolist()


def main() -> int:
    """Train in workers and in this process, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    workers = parser.parse_args().workers
    if ROWS % workers:
        parser.error(f"--workers must divide {ROWS}, got {workers}")
    ray.init(
        num_cpus=max(workers + 1, os.cpu_count() or 1), include_dashboard=False, log_to_driver=False
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            train_on_worker,
            train_loop_config={},
            torch_config=TorchConfig(backend="cpu:colltensor"),
            scaling_config=ScalingConfig(num_workers=workers),
            run_config=RunConfig(storage_path=folder),
        )
        backend, losses = trainer.fit().return_value
    ray.shutdown()
    expected = train(new_model(0), 0, 1)
    apart = max(abs(loss - single) / single for loss, single in zip(losses, expected, strict=True))
    print(
        f"{workers} workers, {backend}: loss {losses[0]:.4f} before, {losses[-1]:.4f} after {STEPS} steps; "
        f"relative to one process at most {apart:.1e} apart"
    )
    if backend != "ColltensorProcessGroup" or not apart < 1e-5:
        print("wrong: expected the losses of one process", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
