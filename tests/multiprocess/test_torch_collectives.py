"""colltensor.torch's collectives and their derivatives, by torch's gradcheck on all ranks in step."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
from pool import RankPool, group_of

import colltensor as col

pytestmark = [pytest.mark.needs("torch"), pytest.mark.shm]


def operations(ct: Any, group: Any) -> dict[str, Callable[[Any], Any]]:
    """Each collective as a function of this rank's tensor of ``(world_size, 2)``, with a tensor as its result."""
    rank, last = group.rank, group.world_size - 1
    torch = importlib.import_module("torch")

    def sent_along(x: Any) -> Any:
        """From rank 0 to rank 1; the others have nothing to do with it."""
        if rank == 0:
            return x * (1 + ct.send(x[0] * x[1], 1, group))
        return x * ct.recv(x[0], 0, group) if rank == 1 else x * 1

    return {
        "allreduce SUM": lambda x: ct.allreduce(x * x, group),
        "allreduce AVERAGE": lambda x: ct.allreduce(x * x, group, col.ReduceOp.AVERAGE),
        "allreduce MIN": lambda x: ct.allreduce(x * x, group, col.ReduceOp.MIN),
        "allreduce MAX": lambda x: ct.allreduce(x, group, col.ReduceOp.MAX),
        "reduce SUM": lambda x: ct.reduce(x * x, last, group) * x,
        "reduce AVERAGE": lambda x: ct.reduce(x * x, 0, group, col.ReduceOp.AVERAGE),
        "broadcast": lambda x: ct.broadcast(x * x, last, group) * x,
        "allgather": lambda x: torch.stack(ct.allgather(x * x, group)) * x,
        "gather": lambda x: torch.stack(ct.gather(x * x, 1, group)) * x,
        "scatter": lambda x: ct.scatter(x[0], list(x * x) if rank == 1 else None, 1, group) * x,
        "reducescatter SUM": lambda x: ct.reducescatter(list(x * x), group),
        "reducescatter AVERAGE": lambda x: ct.reducescatter(
            list(x * x), group, col.ReduceOp.AVERAGE
        ),
        "alltoall": lambda x: torch.stack(ct.alltoall(list(x * x), group)),
        "send and recv": sent_along,
    }


def checks(
    rank: int, world_size: int, backend: str, provider: str | None, name: str, dtype: str
) -> None:
    """Compare with finite differences, of first and second order.

    Every rank runs the same gradcheck of ``everything``: all ranks' tensors in, all ranks' results out. The average
    in front makes of N equal losses on N ranks one.
    """
    torch = importlib.import_module("torch")
    ct = importlib.import_module("colltensor.torch")
    group = group_of(world_size, backend, provider)
    operation = operations(ct, group)[name]

    def everything(tensors: Any) -> Any:
        mine = ct.allreduce(tensors, group, col.ReduceOp.AVERAGE)[rank]
        return torch.stack(ct.allgather(operation(mine).contiguous(), group))

    generator = torch.Generator().manual_seed(world_size)
    shape = (world_size, world_size, 2)
    tensors = torch.randn(shape, generator=generator, dtype=getattr(torch, dtype)).requires_grad_()
    assert torch.autograd.gradcheck(everything, (tensors,))
    if world_size == 2:
        assert torch.autograd.gradgradcheck(everything, (tensors,))


NAMES = [
    "allreduce SUM",
    "allreduce AVERAGE",
    "allreduce MIN",
    "allreduce MAX",
    "reduce SUM",
    "reduce AVERAGE",
    "broadcast",
    "allgather",
    "gather",
    "scatter",
    "reducescatter SUM",
    "reducescatter AVERAGE",
    "alltoall",
    "send and recv",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_derivatives(pool: RankPool, world_size: int, name: str) -> None:
    pool.run(world_size, checks, "shm", None, name, "float64")


@pytest.mark.parametrize(
    "name", ["allreduce SUM", "allgather", "reducescatter AVERAGE", "send and recv"]
)
def test_derivatives_of_complex_tensors(pool: RankPool, name: str) -> None:
    pool.run(2, checks, "shm", None, name, "complex128")


@pytest.mark.parametrize("name", ["allreduce SUM", "gather", "send and recv"])
def test_derivatives_over_gloo(pool: RankPool, provider: str, name: str) -> None:
    pool.run(2, checks, "gloo", provider, name, "float64")


def values(rank: int, world_size: int) -> None:
    """The results, new tensors, of numbers that are unique per rank and index; also where nothing requires grad."""
    torch = importlib.import_module("torch")
    ct = importlib.import_module("colltensor.torch")
    group = group_of(world_size, "shm")
    all_of = [torch.arange(4.0).reshape(2, 2) + 10 * r for r in range(world_size)]
    mine = all_of[rank]
    before = mine.clone()
    entries = [
        [torch.tensor([100.0 * r + s]) for s in range(world_size)] for r in range(world_size)
    ]
    assert torch.equal(ct.allreduce(mine, group), sum(all_of))
    assert torch.equal(ct.allreduce(mine, group, col.ReduceOp.PRODUCT), torch.stack(all_of).prod(0))
    assert torch.equal(ct.reduce(mine, 1, group), sum(all_of) if rank == 1 else torch.zeros(2, 2))
    assert torch.equal(ct.broadcast(mine, 1, group), all_of[1])
    assert torch.equal(torch.stack(ct.allgather(mine.t(), group)), torch.stack(all_of).mT)
    found = torch.stack(ct.gather(mine, 0, group))
    assert torch.equal(found, torch.stack(all_of) if rank == 0 else torch.zeros(world_size, 2, 2))
    sent = ct.scatter(torch.empty(1), entries[1] if rank == 1 else None, 1, group)
    assert sent.tolist() == [100.0 + rank]
    assert ct.reducescatter(entries[rank], group).tolist() == [
        sum(100.0 * r + rank for r in range(world_size))
    ]
    assert torch.cat(ct.alltoall(entries[rank], group)).tolist() == [
        100.0 * s + rank for s in range(world_size)
    ]
    assert ct.allreduce(torch.tensor([rank, 1]), group).tolist() == [
        sum(range(world_size)),
        world_size,
    ]
    assert not ct.allreduce(mine, group).requires_grad
    assert torch.equal(mine, before)
    with pytest.raises(col.ShapeError, match=rf"alltoall: tensor_list \(rank {rank}\): .*\b3 "):
        ct.alltoall(entries[rank][:2], group)


def test_results(pool: RankPool) -> None:
    pool.run(3, values)


def one_requires_grad(rank: int, world_size: int) -> None:
    """Where only rank 1's tensor requires grad, all ranks take part in the backward pass."""
    torch = importlib.import_module("torch")
    ct = importlib.import_module("colltensor.torch")
    group = group_of(world_size, "shm")
    x = torch.full((2,), float(rank), requires_grad=rank == 1)
    y = ct.allreduce(x, group)
    assert y.requires_grad
    (y * (rank + 1)).sum().backward()
    assert x.grad is None if rank != 1 else x.grad.tolist() == [6.0, 6.0]
    ties = torch.ones(2, requires_grad=True)
    ct.allreduce(ties, group, col.ReduceOp.MAX).sum().backward()
    assert ties.grad.tolist() == [1.0, 1.0], "three losses, in three equal shares"
    with torch.no_grad():
        assert not ct.allreduce(ties, group).requires_grad
    for call, words in (
        (lambda: ct.allreduce(x, group, col.ReduceOp.PRODUCT), r"allreduce: op: .*PRODUCT"),
        (lambda: ct.reduce(x, 0, group, col.ReduceOp.MAX), r"reduce: op: .*MAX.*\ballreduce\b"),
        (lambda: ct.reducescatter([x] * 3, group, col.ReduceOp.MIN), r"reducescatter: op: .*MIN"),
    ):
        with pytest.raises(col.OptionError, match=words):
            call()
    assert ct.allreduce(x.detach(), group, col.ReduceOp.PRODUCT).tolist() == [0.0, 0.0]


def test_who_takes_part(pool: RankPool) -> None:
    pool.run(3, one_requires_grad)
