"""colltensor.torch.sync_gradients, where a loop replaces, adds, unfreezes or removes what a module has."""

from __future__ import annotations

import gc
import importlib
import io
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pool import RankPool, group_of
from test_torch_gradients import assert_close, mlp, part, torch_of

import colltensor as col

pytestmark = [pytest.mark.needs("torch"), pytest.mark.shm]

WAYS = pytest.mark.parametrize(
    "options", [{}, {"overlap": False}, {"overlap": "worker"}, {"overlap": False, "average": False}]
)


def check(torch: Any, group: Any, model: Any, rank: int, step: int, average: bool = True) -> None:
    """Let the hooks reduce one pass, and compare with what every rank has without them."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = model(part(torch, rank, step)).square().mean()
    own = torch.autograd.grad(loss, list(trained.values()), retain_graph=True, allow_unused=True)
    everyone = group.allgather_object(
        [
            np.zeros(p.shape) if g is None else g.numpy().copy()
            for g, p in zip(own, trained.values(), strict=True)
        ]
    )
    model.zero_grad()
    loss.backward()
    expected = {
        name: sum(parts) / (len(everyone) if average else 1)
        for name, parts in zip(trained, zip(*everyone, strict=True), strict=True)
    }
    assert_close({name: p.grad.numpy() for name, p in trained.items()}, expected)


def head(torch: Any, model: Any) -> None:
    model[4] = torch.nn.Linear(model[4].in_features, 7)


def weight(torch: Any, model: Any) -> None:
    model[2].weight = torch.nn.Parameter(torch.ones_like(model[2].weight))


def everything(torch: Any, model: Any) -> None:
    """Where the old parameters live on, and none of the new ones had a hook."""
    model.kept = [list(model.parameters())]
    model.load_state_dict(
        {name: value.clone() for name, value in model.state_dict().items()}, assign=True
    )


def every_layer(torch: Any, model: Any) -> None:
    model.kept = [list(model.parameters())]
    for number in (0, 2, 4):
        model[number] = torch.nn.Linear(model[number].in_features, model[number].out_features)


def another(torch: Any, model: Any) -> None:
    model.append(torch.nn.Linear(model[4].out_features, 2))


def removed(torch: Any, model: Any) -> None:
    model[2].bias = None


def parametrised(torch: Any, model: Any) -> None:
    importlib.import_module("torch.nn.utils.parametrizations").weight_norm(model[0])


def frozen(torch: Any, model: Any) -> None:
    model[0].requires_grad_(False)


def unfrozen(torch: Any, model: Any) -> None:
    """As it was frozen at the start, below."""
    model[0].requires_grad_(True)


def exchanged(torch: Any, model: Any) -> None:
    """What had gradients needs none any more, and the other way round."""
    model[0].requires_grad_(True)
    model[2].requires_grad_(False)
    model[4].requires_grad_(False)


CHANGES: list[Callable[[Any, Any], None]] = [
    head,
    weight,
    everything,
    every_layer,
    another,
    removed,
    parametrised,
    frozen,
    unfrozen,
    exchanged,
]


def changed(
    rank: int, world_size: int, change: Callable[[Any, Any], None], options: dict[str, Any]
) -> None:
    torch = torch_of()
    group = group_of(world_size, "shm")
    model = mlp(torch)
    if change in (unfrozen, exchanged):
        model[0].requires_grad_(False)
    average = options.get("average", True)
    with torch.col.sync_gradients(model, group, bucket_nbytes=3000, **options) as handle:
        for step in range(3):
            check(torch, group, model, rank, step, average)
        torch.manual_seed(rank)
        change(torch, model)
        handle.broadcast()
        values = group.allgather_object(
            {name: value.numpy() for name, value in model.state_dict().items()}
        )
        assert all((each[name] == values[0][name]).all() for each in values for name in values[0])
        for step in range(3):
            check(torch, group, model, rank, step, average)
    for _, parameter in model.named_parameters():
        assert not parameter._post_accumulate_grad_hooks


@WAYS
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_was_changed_is_taken_in(
    pool: RankPool, change: Callable[[Any, Any], None], options: dict[str, Any]
) -> None:
    """Each rank kept its own gradients, without a word."""
    pool.run(2, changed, change, options)


def without_broadcast(rank: int, world_size: int) -> None:
    torch = torch_of()
    group = group_of(world_size, "shm")
    model = mlp(torch)
    torch.col.sync_gradients(model, group)
    check(torch, group, model, rank, 0)
    every_layer(torch, model)
    check(torch, group, model, rank, 1)
    torch.nn.init.ones_(model[0].weight)
    model[0].weight = torch.nn.Parameter(model[0].weight.detach())
    check(torch, group, model, rank, 2)


def test_the_next_backward_pass_takes_it_in(pool: RankPool) -> None:
    pool.run(2, without_broadcast)


def unlike(rank: int, world_size: int, overlap: bool | str) -> None:
    """Ranks that unfreeze different parameters of one shape; then all the same."""
    torch = torch_of()
    group = group_of(world_size, "shm")
    model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
    model[:2].requires_grad_(False)
    inputs = torch.full((2, 8), rank + 1.0)
    with torch.col.sync_gradients(model, group, overlap=overlap):
        model(inputs).sum().backward()
        model[rank].requires_grad_(True)
        with pytest.raises(
            col.MismatchError, match=rf"rank {rank} .*\({rank}\.weight, {rank}\.bias\)"
        ) as caught:
            model(inputs).sum().backward()
        assert caught.value.ranks == (1,)
        model[1 - rank].requires_grad_(True)
        model.zero_grad()
        model(inputs).sum().backward()
        found = group.allgather_object([p.grad.numpy() for p in model.parameters()])
        assert all((mine == theirs).all() for mine, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("overlap", [False, "worker"])
def test_ranks_that_change_otherwise_are_named(pool: RankPool, overlap: bool | str) -> None:
    pool.run(2, unlike, overlap)


def one_alone(rank: int, world_size: int) -> None:
    torch = torch_of()
    group = group_of(world_size, "shm")
    model = mlp(torch)
    with torch.col.sync_gradients(model, group, overlap=False) as handle:
        check(torch, group, model, rank, 0)
        if rank == 1:
            head(torch, model)
        with pytest.raises(col.MismatchError) as caught:
            model(part(torch, rank)).sum().backward()
        if rank == 1:
            assert " rank 1 " in str(caught.value)
            assert "4.weight" in str(caught.value)
        with pytest.raises(col.MismatchError, match=r"rank 1 .*4\.weight: .*float32 7x"):
            handle.broadcast()
        if rank == 0:
            head(torch, model)
        handle.broadcast()
        check(torch, group, model, rank, 1)


def test_one_rank_that_changes_alone(pool: RankPool) -> None:
    pool.run(2, one_alone)


def reassigned(rank: int, world_size: int) -> None:
    torch = torch_of()

    class Averaging(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)
            self.register_buffer("ema", torch.zeros(3))
            self.register_buffer("later", None)

        def forward(self, x: Any) -> Any:
            self.ema = self.ema * 0.9 + x.detach().mean(0)
            self.later = x.detach().sum()
            return self.linear(x)

    group = group_of(world_size, "shm")
    model = Averaging()
    with torch.col.sync_gradients(model, group) as handle:
        for step in range(2):
            model(torch.full((2, 3), rank + step + 1.0)).sum().backward()
        assert model.ema.tolist() == pytest.approx([0.9 * (rank + 1) + rank + 2] * 3)
        handle.broadcast()
        assert model.ema.tolist() == pytest.approx([2.9] * 3)
        assert model.later.item() == 12.0
        if rank == 1:
            model.later = None
        with pytest.raises(col.MismatchError, match=r"rank 1 .*\blater \(rank 0: .*float32\b"):
            handle.broadcast()


def test_buffers_that_forward_reassigns(pool: RankPool) -> None:
    """The handle broadcast the tensors that had been buffers when it was made."""
    pool.run(2, reassigned)


def converted(rank: int, world_size: int) -> None:
    """Modules that torch converts by making new parameters, or by swapping what they are."""
    torch = torch_of()
    group = group_of(world_size, "shm")
    future = torch.__future__
    model = mlp(torch)
    kept = list(model.parameters())
    with torch.col.sync_gradients(model, group) as handle:
        check(torch, group, model, rank, 0)
        future.set_overwrite_module_params_on_conversion(True)
        try:
            model.double()
        finally:
            future.set_overwrite_module_params_on_conversion(False)
        assert not {id(p) for p in kept} & {id(p) for p in model.parameters()}
        handle.broadcast()
        model(part(torch, rank).double()).sum().backward()
        found = group.allgather_object([p.grad.numpy() for p in model.parameters()])
        assert all((mine == theirs).all() for mine, theirs in zip(*found, strict=True))
        future.set_swap_module_params_on_conversion(True)
        try:
            # without its hooks, else
            with pytest.raises(RuntimeError, match=r"Linear\.weight"):
                model.float()
        finally:
            future.set_swap_module_params_on_conversion(False)


def test_modules_that_get_other_parameters_when_converted(pool: RankPool) -> None:
    pool.run(2, converted)


def swapped(rank: int, world_size: int, options: dict[str, Any], listed: bool) -> None:
    """Parameters that stay the same objects, and get other memory, without the hooks that were on it."""
    torch = torch_of()
    group = group_of(world_size, "shm")
    average = options.get("average", True)
    future = torch.__future__
    future.set_swap_module_params_on_conversion(True)
    try:
        model = mlp(torch)
        handle = torch.col.sync_gradients(
            list(model.parameters()) if listed else model, group, **options
        )
        check(torch, group, model, rank, 0, average)
        model.zero_grad()
        values = {name: value + 1 for name, value in model.state_dict().items()}
        if average:
            model.load_state_dict(values)
        else:  # nothing would tell of it
            with pytest.raises(RuntimeError, match="weakref"):
                model.load_state_dict(values)
        for step in range(3):
            check(torch, group, model, rank, step, average)
        buffer = io.BytesIO()
        torch.save(list(model.parameters()), buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        if average:
            model.double()
            with pytest.raises(col.UnsupportedTensorError, match=r"remove\(\)"):
                model(part(torch, rank).double()).sum().backward()
            group.barrier()
        handle.remove()
        model.double()
        model.zero_grad()
        model.float()
        with torch.col.sync_gradients(model, group, **options):
            model.zero_grad()
            check(torch, group, model, rank, 4, average)
            with pytest.raises(col.OptionError, match=r"\b0\.weight .*remove\(\)"):
                torch.col.sync_gradients(model, group)
    finally:
        future.set_swap_module_params_on_conversion(False)
    model.to(torch.float64)
    torch.col.sync_gradients(model, group, **options).remove()
    future.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float32)  # when the hooks are gone nothing knows the parameters
    finally:
        future.set_swap_module_params_on_conversion(False)
    references = [weakref.ref(parameter) for parameter in model.parameters()]
    del model, handle
    gc.collect()
    assert not any(reference() is not None for reference in references)


@WAYS
@pytest.mark.parametrize("listed", [False, True])
def test_parameters_that_are_swapped_keep_their_hooks(
    pool: RankPool, options: dict[str, Any], listed: bool
) -> None:
    """Torch could not swap what our hooks knew weakly, nor after they were removed."""
    pool.run(2, swapped, options, listed)


def nothing_kept(rank: int, world_size: int, average: bool) -> None:
    torch = torch_of()
    group = group_of(world_size, "shm")
    told = importlib.import_module("torch.nn.modules.module")

    def hooks() -> tuple[int, int]:
        return len(told._global_parameter_registration_hooks), len(
            told._global_module_registration_hooks
        )

    gc.collect()
    before = hooks()
    model = mlp(torch)
    with torch.col.sync_gradients(model, group, average=average):
        check(torch, group, model, rank, 0, average)
        old = [weakref.ref(p) for p in model.parameters()]
        every_layer(torch, model)
        del model.kept
        check(torch, group, model, rank, 1, average)
        gc.collect()
        assert not any(reference() is not None for reference in old)
        assert hooks() > before
    assert hooks() == before
    torch.col.sync_gradients(model, group)
    first = model[0]
    references = [weakref.ref(model), weakref.ref(first.weight)]
    del model
    assert references[0]() is None
    del first
    gc.collect()
    assert references[1]() is None
    assert hooks() == before


@pytest.mark.parametrize("average", [True, False])
def test_what_was_replaced_is_freed(pool: RankPool, average: bool) -> None:
    pool.run(2, nothing_kept, average)


def parts(rank: int, world_size: int) -> None:
    """A container that is gone at once, whose parts are trained."""
    torch = torch_of()
    group = group_of(world_size, "shm")
    model = mlp(torch)
    torch.col.sync_gradients(torch.nn.ModuleList([model[0], model[2], model[4]]), group)
    gc.collect()
    check(torch, group, model, rank, 0)
    model[2].weight = torch.nn.Parameter(torch.ones_like(model[2].weight))
    check(torch, group, model, rank, 1)


def test_parts_of_a_module_that_is_gone(pool: RankPool) -> None:
    pool.run(2, parts)


def given(rank: int, world_size: int) -> None:
    """Parameters without a module: one that was frozen, and one that takes no gradient at all."""
    torch = torch_of()
    group = group_of(world_size, "shm")
    first, second = torch.zeros(3, requires_grad=True), torch.zeros(3)
    counts = torch.nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    with torch.col.sync_gradients([first, second, counts], group):
        (first * (rank + 1)).sum().backward()
        second.requires_grad_(True)
        first.requires_grad_(False)
        (second * (rank + 1)).sum().backward()
        assert first.grad.tolist() == second.grad.tolist() == [1.5] * 3
        assert counts.grad is None


def test_parameters_that_are_unfrozen(pool: RankPool) -> None:
    pool.run(2, given)


def low_rank(rank: int, world_size: int) -> None:
    torch = torch_of()
    group = group_of(world_size, "shm")
    model = mlp(torch)
    power = torch.col.PowerSGD(40, min_rate=0.1)
    with torch.col.sync_gradients(model, group, compression=power):
        model(part(torch, rank)).square().mean().backward()
        head(torch, model)
        model.zero_grad()
        model(part(torch, rank)).square().mean().backward()
        found = group.allgather_object([p.grad.numpy() for p in model.parameters()])
        assert all((mine == theirs).all() for mine, theirs in zip(*found, strict=True))
        assert model[4].weight.grad.shape[0] == 7


def test_a_compression_meets_another_shape(pool: RankPool) -> None:
    pool.run(2, low_rank)
