"""torch's own bookkeeping: versions, requires_grad, parameters, inference mode, autograd."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from pool import RankPool
from worlds import World

import colltensor as col

pytestmark = pytest.mark.needs("torch")


def _torch() -> Any:
    return importlib.import_module("torch")


def versions_are_bumped(rank: int, world_size: int, world: World) -> None:
    group = world.group()
    torch = _torch()
    written = torch.ones(4)
    for number, call in enumerate(
        (
            lambda x: group.allreduce(x),
            lambda x: group.scatter(x, [torch.ones(4)] * world_size if rank == 0 else None),
            lambda x: group.reducescatter(x, [torch.ones(4)] * world_size),
            lambda x: group.allgather(
                [x, *(torch.ones(4) for _ in range(world_size - 1))], torch.ones(4)
            ),
            lambda x: group.allreduce({"leaf": x}),
            lambda x: group.allreduce(x, async_op=True).wait(),
        )
    ):
        before = written._version
        call(written)
        assert written._version > before, f"call {number} did not bump the version"
    read = torch.ones(4)
    before = read._version
    group.reduce(read, 0)
    group.broadcast(read, 0)
    group.allgather([torch.ones(4) for _ in range(world_size)], read)
    assert read._version == before + 1, (
        "one of the two wrote on this rank, and only that one bumps the version"
    )


def test_a_write_bumps_the_version(pool: RankPool, world: World) -> None:
    pool.run(world.size, versions_are_bumped, world)


def stale_values_raise(rank: int, world_size: int, world: World) -> None:
    group = world.group()
    torch = _torch()
    weight = torch.ones(3, requires_grad=True)
    saved = torch.full((3,), 2.0)
    loss = (weight * saved).sum()  # saves `saved` for the backward pass
    group.allreduce(saved)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()
    view = torch.zeros(2, 3)
    loss = (weight * view[1]).sum()
    group.allreduce(view)  # the base of the saved view
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_a_stale_saved_value_raises_at_backward(pool: RankPool, world: World) -> None:
    pool.run(world.size, stale_values_raise, world)


def gradients_are_refused_as_torch_does(rank: int, world_size: int, world: World) -> None:
    group = world.group()
    torch = _torch()
    total = sum(range(1, world_size + 1))
    for leaf in (
        torch.full((3,), float(rank + 1), requires_grad=True),
        torch.nn.Parameter(torch.full((3,), float(rank + 1))),
    ):
        with pytest.raises(col.ReadOnlyError, match=r"allreduce: tensor .*torch\.no_grad\(\)"):
            group.allreduce(leaf)
        before = leaf._version
        with torch.no_grad():
            assert group.allreduce(leaf) is leaf
        assert leaf.tolist() == [total] * 3
        assert leaf.requires_grad
        assert leaf._version > before
        assert group.allreduce(leaf.detach()).tolist() == [total * world_size] * 3
        group.allgather([torch.empty(3) for _ in range(world_size)], leaf)  # reading is allowed
    grown = torch.ones(3, requires_grad=True) * 2
    with pytest.raises(col.ReadOnlyError, match=r"torch\.no_grad\(\)"):
        group.allreduce([grown])


def test_requires_grad(pool: RankPool, world: World) -> None:
    pool.run(world.size, gradients_are_refused_as_torch_does, world)


def gradients_of_a_model(rank: int, world_size: int, world: World) -> None:
    """Averaged gradients, straight from ``.grad`` and as a tree."""
    group = world.group()
    torch = _torch()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))
    inputs = torch.randn(world_size * 4, 5)
    model(inputs).pow(2).mean().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(inputs[rank * 4 : rank * 4 + 4]).pow(2).mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert group.allreduce(gradients, col.ReduceOp.AVERAGE) is gradients
    for parameter, reference in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, reference)
    with torch.no_grad():
        group.broadcast(dict(model.named_parameters()), 0)


def test_gradients_of_a_model(pool: RankPool, world: World) -> None:
    pool.run(world.size, gradients_of_a_model, world)


def inference_mode(rank: int, world_size: int, world: World) -> None:
    group = world.group()
    torch = _torch()
    with torch.inference_mode():
        tensor = torch.ones(3)
        assert group.allreduce(tensor).tolist() == [world_size] * 3
    with pytest.raises(col.ReadOnlyError, match=r"inference_mode.*clone\(\)"):
        group.allreduce(tensor)
    assert group.allreduce(tensor.clone()).tolist() == [world_size**2] * 3


def test_inference_mode(pool: RankPool, world: World) -> None:
    pool.run(world.size, inference_mode, world)


def async_bumps_when_done(rank: int, world_size: int, world: World) -> None:
    """The caller's grad mode counts, although another thread runs the operation."""
    group = world.group()
    torch = _torch()
    parameter = torch.nn.Parameter(torch.ones(3))
    with torch.no_grad():
        work = group.allreduce(parameter, async_op=True)
    work.wait()
    assert parameter.tolist() == [world_size] * 3
    with torch.inference_mode():
        tensor = torch.ones(3)
        group.allreduce(tensor, async_op=True).wait()
    assert tensor.tolist() == [world_size] * 3


def test_async_calls_keep_the_callers_mode(pool: RankPool, world: World) -> None:
    pool.run(world.size, async_bumps_when_done, world)
