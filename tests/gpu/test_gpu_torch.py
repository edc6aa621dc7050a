"""colltensor.torch on a device: gradients kept in step, collectives that autograd sees; on streams of their own."""

from __future__ import annotations

import copy
import importlib
import time
from typing import Any

import pytest
from gpu_streams import Queue, shared_group
from pool import RankPool

import colltensor as col

pytestmark = pytest.mark.needs("torch")

DEVICE = "cuda:0"
WIDTH = 1100
"""A layer of this width has a gradient that travels by itself, beside those that share a bucket."""


def _torch() -> tuple[Any, Any]:
    return importlib.import_module("torch"), importlib.import_module("colltensor.torch")


def _model(torch: Any) -> Any:
    torch.manual_seed(5)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, WIDTH),
        torch.nn.Tanh(),
        torch.nn.Linear(WIDTH, WIDTH),
        torch.nn.Tanh(),
        torch.nn.Linear(WIDTH, 3),
    )
    return model.double().to(DEVICE)


def _loss(torch: Any, model: Any, rank: int, step: int) -> Any:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return (
        model(torch.randn(8, 6, generator=generator, dtype=torch.float64).to(DEVICE))
        .square()
        .mean()
    )


def in_step(rank: int, world_size: int, overlap: bool | str) -> None:
    """The first pass shows the order of the gradients, which later ones are reduced in while autograd goes on."""
    torch, ct = _torch()
    group = shared_group(world_size)
    with Queue("torch"):
        model = _model(torch)
        with ct.sync_gradients(model, group, overlap=overlap):
            for step in range(4):
                expected = [torch.zeros_like(parameter) for parameter in model.parameters()]
                for peer in range(world_size):
                    alone = copy.deepcopy(model)
                    alone.zero_grad()
                    _loss(torch, alone, peer, step).backward()
                    for total, parameter in zip(expected, alone.parameters(), strict=True):
                        total += parameter.grad / world_size
                model.zero_grad()
                _loss(torch, model, rank, step).backward()
                for wanted, (name, parameter) in zip(
                    expected, model.named_parameters(), strict=True
                ):
                    assert torch.allclose(parameter.grad, wanted, rtol=1e-9, atol=1e-12), (
                        step,
                        name,
                    )
        group.synchronize()


@pytest.mark.parametrize("overlap", [False, "worker"])
def test_gradients_are_kept_in_step(pair: RankPool, overlap: bool | str) -> None:
    pair.run(2, in_step, overlap)


def missing(rank: int, world_size: int, bucket_nbytes: int) -> None:
    """Rank 1's loss does not depend on one parameter; nobody's does on another."""
    torch, ct = _torch()
    group = shared_group(world_size)
    with Queue("torch"):
        a, b, c = (torch.ones(5, device=DEVICE, requires_grad=True) for _ in range(3))
        with ct.sync_gradients([a, b, c], group, bucket_nbytes=bucket_nbytes, overlap=False):
            for _ in range(2):
                a.grad = b.grad = c.grad = None
                (3 * a + (2 * b if rank == 0 else 0)).sum().backward()
                assert a.grad.tolist() == [3.0] * 5
                assert b.grad.tolist() == [1.0] * 5
                assert c.grad is None or not c.grad.any()


@pytest.mark.parametrize("bucket_nbytes", [1, 1 << 20])
def test_a_gradient_that_one_rank_lacks(pair: RankPool, bucket_nbytes: int) -> None:
    pair.run(2, missing, bucket_nbytes)


def beside_a_capture(rank: int, world_size: int) -> None:
    """A call under way does not disturb the capture of another stream, and a call inside one is refused."""
    torch, _ = _torch()
    group = shared_group(world_size)
    with Queue("torch") as queue, Queue("torch") as other:
        x = other.full(1.0)
        with queue.current():
            tensor = queue.full(1.0)
            group.allreduce(tensor, async_op=True).wait()
            queue.synchronize()
        other.synchronize()
        group.barrier()
        if rank == 1:
            with queue.current():
                queue.sleep(2.0)
        with queue.current():
            work = group.allreduce(tensor, async_op=True)
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        y = x * 2
        with pytest.raises(col.DeviceError, match="CUDA graph"):
            group.allreduce(y)
        time.sleep(0.5)  # the watchdog asks ten times
        graph.capture_end()
        if rank == 0:
            assert not work.done()
        graph.replay()
        assert other.read(y) == {2.0}
        with queue.current():
            work.wait()
            assert queue.read(tensor) == {4.0}


def test_a_capture_goes_on_beside_a_call(pair: RankPool) -> None:
    pair.run(2, beside_a_capture)


def differentiated(rank: int, world_size: int) -> None:
    """The loss is the sum of all ranks' losses."""
    torch, ct = _torch()
    group = shared_group(world_size)
    with Queue("torch"):
        x = torch.full((1000,), rank + 2.0, device=DEVICE, requires_grad=True)
        ct.allreduce(x * x, group).sum().backward()
        assert x.grad.tolist() == [2 * (rank + 2.0) * world_size] * 1000
        x.grad = None
        sum((peer + 1) * y.sum() for peer, y in enumerate(ct.allgather(x * x, group))).backward()
        assert x.grad.tolist() == [2 * (rank + 2.0) * (rank + 1) * world_size] * 1000
        x.grad = None
        if rank == 0:
            ct.send(x * x, 1, group).backward()
            assert x.grad.tolist() == [3 * 2 * 2.0] * 1000
        else:
            y = ct.recv(x, 0, group)
            assert y.device == x.device
            assert y.tolist() == [4.0] * 1000
            (3 * y).sum().backward()
        group.synchronize()


def test_collectives_are_differentiated(pair: RankPool) -> None:
    pair.run(2, differentiated)
