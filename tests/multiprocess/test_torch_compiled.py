"""torch.compile around collectives: of torch.distributed with our backend, of the package, and of its hooks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from c10d_ranks import plain, values, world
from pool import RankPool, group_of

import colltensor as col

pytestmark = [pytest.mark.needs("torch"), pytest.mark.shm, pytest.mark.slow]


def data_parallel(torch: Any, dist: Any, group: Any, rank: int) -> Any:
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 2)
    model = torch.compile(
        torch.nn.parallel.DistributedDataParallel(net, process_group=group), backend="eager"
    )
    for _ in range(3):
        model(torch.full((3, 4), rank + 1.0)).sum().backward()
    return [parameter.grad for parameter in net.parameters()]


def calls(torch: Any, dist: Any, group: Any, rank: int) -> Any:
    def broadcast(x: Any) -> Any:
        dist.broadcast(x, 0, group=group)
        return x * 2

    def barrier(x: Any) -> Any:
        dist.barrier(group=group)
        return x + 1

    def reduce(x: Any) -> Any:
        dist.reduce(x, 0, group=group)
        return x * 3 if rank == 0 else x * 0

    def later(x: Any) -> Any:
        work = dist.all_reduce(x, group=group, async_op=True)
        y = torch.ones_like(x)
        work.wait()
        return x + y

    def pair(x: Any) -> Any:
        if rank:
            dist.send(x, 0, group=group)
        else:
            dist.recv(x, 1, group=group)
        return x + 1

    found = []
    for function in (broadcast, barrier, reduce, later, pair):
        compiled = torch.compile(function, backend="eager")
        found += [compiled(values(torch, rank, 2 + turn // 2)) for turn in range(3)]
    return found


def gathered(torch: Any, dist: Any, group: Any, rank: int) -> Any:
    operators = torch.ops._c10d_functional

    def gather(x: Any, out: Any) -> Any:
        return (
            operators.wait_tensor(
                operators.all_gather_into_tensor_out(x, 2, group.group_name, out=out)
            )
            + 1
        )

    eager = gather(values(torch, rank), torch.empty(12))
    return [eager, torch.compile(gather, backend="aot_eager")(values(torch, rank), torch.empty(12))]


def in_torch_distributed(rank: int, world_size: int, path: Path) -> list[tuple[str, Any, Any]]:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(path.parent)
    with world(rank, world_size, path) as (torch, dist):
        groups = dist.group.WORLD, dist.new_group(backend="gloo")
        found = []
        for case in (data_parallel, calls, gathered):
            both = []
            for group in groups:
                torch._dynamo.reset()
                both.append(plain(case(torch, dist, group, rank)))
            found.append((case.__name__, *both))
        return found


def test_compiled_functions_with_torch_distributed_give_what_gloo_gives(
    pool: RankPool, tmp_path: Path
) -> None:
    for rank, found in enumerate(
        pool.run(2, in_torch_distributed, tmp_path / "store", timeout_s=120)
    ):
        for name, ours, gloo in found:
            assert ours == gloo, (rank, name)


def in_the_package(rank: int, world_size: int, backend: str) -> list[Any]:
    import torch

    import colltensor.torch as coltorch

    torch.set_num_threads(1)
    torch._dynamo.reset()
    group = group_of(world_size, backend)
    found: list[Any] = []

    def doubled(x: Any) -> Any:
        col.allreduce(x, group.name)
        return x * 2

    def after(x: Any) -> Any:
        y = x + 1
        col.allreduce(y, group.name)
        work = group.allreduce(y, async_op=True)
        work.wait()
        return y

    compiled = [torch.compile(function, backend="eager") for function in (doubled, after, doubled)]
    found += [plain(function(torch.full((2,), rank + 1.0))) for function in compiled]

    def differentiable(x: Any) -> Any:
        return coltorch.allreduce(x * 3, group.name) + 1

    for _ in range(2):
        x = torch.full((2,), rank + 1.0, requires_grad=True)
        y = torch.compile(differentiable, backend="eager")(x)
        y.sum().backward()
        found.append(plain([y.detach(), x.grad]))
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    handle = coltorch.sync_gradients(model, group)

    def step(x: Any) -> Any:
        model.zero_grad()
        model(x).sum().backward()

    for function in (step, torch.compile(step, backend="eager")):
        for _ in range(2):
            function(torch.full((3, 4), rank + 1.0))
        found.append(plain(model.weight.grad))
    handle.remove()
    return found


@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_compiled_functions_with_our_collectives(pool: RankPool, backend: str) -> None:
    for found in pool.run(2, in_the_package, backend, timeout_s=120):
        sums = [entry[2] for entry in found[:3]]
        assert sums == [[6.0, 6.0], [10.0, 10.0], [6.0, 6.0]]
        for y, gradient in found[3:5]:
            assert y[2] == [10.0, 10.0]
            assert gradient[2] == [6.0, 6.0]
        assert found[5] == found[6]
        assert found[5][2] == [4.5] * 8
