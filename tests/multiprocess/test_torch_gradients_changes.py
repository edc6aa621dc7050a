"""colltensor.torch.sync_gradients, where a loop changes what the hooks hang on, or does what looks harmless."""

from __future__ import annotations

import gc
import importlib
import weakref
from typing import Any

import numpy as np
import pytest
from pool import RankPool, group_of
from test_torch_gradients import assert_close, gradients, mlp, part, reference, torch_of

import colltensor as col

pytestmark = [pytest.mark.needs("torch"), pytest.mark.shm]


def averages(torch: Any, step: int = 0) -> dict[str, Any]:
    return reference(
        torch, None, 2, lambda m, r: m(part(torch, r, step)).square().mean().backward()
    )


def backward(torch: Any, model: Any, rank: int, step: int = 0) -> Any:
    return model(part(torch, rank, step)).square().mean().backward()


def replaced_memory(rank: int, world_size: int, keep: bool) -> None:
    """``parameter.grad.data = ...`` leaves the object that was a view of the bucket, with other memory."""
    torch = torch_of()
    model = mlp(torch)
    with torch.col.sync_gradients(model, group_of(world_size, "shm")):
        for step in range(3):
            backward(torch, model, rank, step)
            assert_close(gradients(model), averages(torch, step))
            for parameter in model.parameters():
                parameter.grad.data = parameter.grad.data.clone()
            model.zero_grad(set_to_none=not keep)


@pytest.mark.parametrize("keep", [True, False])
def test_gradients_whose_memory_was_replaced(pool: RankPool, keep: bool) -> None:
    pool.run(2, replaced_memory, keep)


def converted(rank: int, world_size: int, keep: bool) -> None:
    torch = torch_of()
    group = group_of(world_size, "shm")
    model = mlp(torch)
    with torch.col.sync_gradients(model, group):
        backward(torch, model, rank)
        model.zero_grad(set_to_none=not keep)
        model.double()
        with pytest.raises(
            col.UnsupportedTensorError, match=r"4\.bias .*float64\[3\].* float32\[3\].*remove\(\)"
        ):
            model(part(torch, rank).double()).square().mean().backward()
        assert all(p.grad.dtype == torch.float64 for p in model.parameters())
    model.zero_grad()
    with torch.col.sync_gradients(model, group):
        model(part(torch, rank).double()).square().mean().backward()
        assert_close(gradients(model), averages(torch))


@pytest.mark.parametrize("keep", [True, False])
def test_a_module_that_was_converted(pool: RankPool, keep: bool) -> None:
    """It is refused by name, with all gradients as they were, until the hook is installed again."""
    pool.run(2, converted, keep)


def wider_gradients(rank: int, world_size: int) -> None:
    torch = torch_of()
    small, large = (
        torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((5,), (300, 300))
    )
    small.grad_dtype = large.grad_dtype = torch.float32
    with torch.col.sync_gradients([small, large], group_of(world_size, "shm")):
        total = (small.float() * (1 + rank / 128)).sum()
        (total + large.float().sum() if rank else total).backward()
    for parameter, value in ((small, 1 + 1 / 256), (large, 0.5)):  # the first is no bfloat16
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad == value).all()


def test_gradients_wider_than_their_parameters(pool: RankPool) -> None:
    torch = importlib.import_module("torch")
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("Tensor.grad_dtype came with torch 2.9")
    pool.run(2, wider_gradients)


def names(rank: int, world_size: int) -> None:
    torch = torch_of()
    group = group_of(world_size, "shm")
    torch.manual_seed(rank)
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    with pytest.raises(col.OptionError, match=r"module_or_parameters: .*'weight'"):
        torch.col.sync_gradients([*first.named_parameters(), *second.named_parameters()], group)
    with torch.col.sync_gradients([*first.parameters(), *second.parameters()], group):
        values = group.allgather_object(
            [p.tolist() for m in (first, second) for p in m.parameters()]
        )
        assert all(each == values[0] for each in values)


def test_parameters_of_one_name_are_refused(pool: RankPool) -> None:
    """Under one name only one of them was taken over from rank 0."""
    pool.run(2, names)


def twice(rank: int, world_size: int) -> None:
    torch = torch_of()
    group = group_of(world_size, "shm")
    model = mlp(torch)
    handle = torch.col.sync_gradients(model, group, average=False)
    with pytest.raises(col.OptionError, match=r"\b0\.weight .*remove\(\)"):
        torch.col.sync_gradients([("0.weight", model[0].weight)], group)
    handle.remove()
    other = group.split(0)
    with torch.col.sync_gradients(model, group), torch.col.sync_gradients(model, other):
        backward(torch, model, rank)
        assert_close(gradients(model), averages(torch))
    other.destroy()


def test_a_second_handle_on_one_group_is_refused(pool: RankPool) -> None:
    """A sum would be summed twice."""
    pool.run(2, twice)


def dropped(rank: int, world_size: int) -> None:
    torch = torch_of()
    group = group_of(world_size, "shm")
    weight = torch.zeros(3, requires_grad=True)
    torch.col.sync_gradients([weight], group, average=False)
    gc.collect()
    for step in range(1, 4):
        (weight * (rank + 1)).sum().backward()
        assert weight.grad.tolist() == [step * sum(range(1, world_size + 1))] * 3
    left = []
    for overlap in (False, "worker"):
        model = mlp(torch)
        torch.col.sync_gradients(model, group, overlap=overlap)
        backward(torch, model, rank)
        left += [weakref.ref(model), *(weakref.ref(parameter) for parameter in model.parameters())]
        del model
    gc.collect()
    assert not any(reference() is not None for reference in left)


def test_the_handle_need_not_be_kept(pool: RankPool) -> None:
    """Sums stay right without it, and hooks do not keep a module in memory."""
    pool.run(2, dropped)


def shared_memory(rank: int, world_size: int) -> None:
    torch = torch_of()
    torch.manual_seed(rank)
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    second.weight.data = first.weight.data
    model = torch.nn.Sequential(first, second)
    model.register_buffer("ones", torch.full((1,), float(rank)).expand(4))
    group = group_of(world_size, "shm")
    with torch.col.sync_gradients(model, group):
        values = group.allgather_object(
            {name: value.tolist() for name, value in model.state_dict().items()}
        )
        assert all(each == values[0] for each in values)
        assert values[0]["ones"] == [0.0] * 4


def test_expanded_buffers_and_parameters_on_one_memory(pool: RankPool) -> None:
    pool.run(2, shared_memory)


def compiled_backward(rank: int, world_size: int) -> None:
    torch = torch_of()
    model = mlp(torch)

    def step(x: Any) -> None:
        model(x).square().mean().backward()

    group = group_of(world_size, "shm")
    with torch._dynamo.config.patch(compiled_autograd=True), torch.col.sync_gradients(model, group):
        compiled = torch.compile(step, backend="eager")
        with pytest.raises(col.OptionError, match="compiled_autograd"):
            compiled(part(torch, rank))


def test_a_compiled_backward_pass_is_refused(pool: RankPool) -> None:
    """It has no end that a hook could see, and left the gradients of each rank as they were, in silence."""
    pool.run(2, compiled_backward)


def corrected(rank: int, world_size: int) -> None:
    """After a call that differed nothing was reduced, and the loop goes on."""
    torch = torch_of()
    group = group_of(world_size, "shm")
    model = mlp(torch)
    with torch.col.sync_gradients(model, group, overlap=False):
        with pytest.raises(col.MismatchError):
            _ = backward(torch, model, rank) if rank == 0 else group.allreduce(np.ones(3))
        model.zero_grad()
        backward(torch, model, rank)
        assert_close(gradients(model), averages(torch))


def test_a_mismatch_does_not_end_the_loop(pool: RankPool) -> None:
    pool.run(2, corrected)


class Listing:
    """A compression that returns a list and no generator."""

    def reduce(self, bucket: Any) -> list[Any]:
        return [bucket.flat]


def listed(rank: int, world_size: int) -> None:
    torch = torch_of()
    for overlap in (False, "worker"):
        model = mlp(torch)
        with torch.col.sync_gradients(
            model, group_of(world_size, "shm"), overlap=overlap, compression=Listing()
        ):
            backward(torch, model, rank)
            assert_close(gradients(model), averages(torch))


def test_a_compression_may_return_a_list(pool: RankPool) -> None:
    pool.run(2, listed)
