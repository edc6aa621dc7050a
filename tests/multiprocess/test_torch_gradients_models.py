"""colltensor.torch.sync_gradients: the models that it takes, and what the others hear where one rank refuses."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pool import RankPool, group_of
from test_torch_gradients import torch_of

import colltensor as col

pytestmark = [pytest.mark.needs("torch"), pytest.mark.shm]


def model_with(torch: Any, **buffers: Any) -> Any:
    model = torch.nn.Linear(3, 2)
    for name, buffer in buffers.items():
        model.register_buffer(name, buffer)
    return model


def overlapping(torch: Any, start: float) -> Any:
    memory = torch.arange(10.0) + start
    return model_with(torch, first=memory[:6], second=memory[4:], third=memory[::2])


def flat(torch: Any, start: float) -> Any:
    memory = torch.arange(12.0) + start
    return model_with(torch, flat=memory, left=memory[:6].view(2, 3), right=memory[6:])


def masked(torch: Any, start: float) -> Any:
    mask = (torch.arange(64.0) + start).view(8, 8)
    return model_with(torch, mask=mask, slice=mask[:4, :4], columns=mask[:, 1])


def real_view(torch: Any, start: float) -> Any:
    numbers = torch.complex(torch.arange(4.0) + start, torch.arange(4.0) - start)
    return model_with(torch, numbers=numbers, parts=torch.view_as_real(numbers))


def lone_real_view(torch: Any, start: float) -> Any:
    numbers = torch.complex(torch.arange(4.0) + start, torch.arange(4.0) - start)
    return model_with(torch, imaginary=numbers.imag, real=numbers.real)


def bytes_view(torch: Any, start: float) -> Any:
    values = torch.arange(4.0) + start
    return model_with(torch, values=values, bytes=values.view(torch.uint8))


def expanded(torch: Any, start: float) -> Any:
    values = torch.arange(3.0) + start
    return model_with(
        torch, rows=values.expand(5, 3), one=torch.full((1,), start).expand(4, 4), values=values
    )


def windows(torch: Any, start: float) -> Any:
    return model_with(torch, windows=(torch.arange(8.0) + start).unfold(0, 3, 1))


def conjugated(torch: Any, start: float) -> Any:
    numbers = torch.complex(torch.arange(4.0) + start, torch.arange(4.0) - start)
    return model_with(
        torch, conjugate=numbers.conj(), numbers=torch.complex(torch.ones(2), torch.ones(2)).conj()
    )


def negated(torch: Any, start: float) -> Any:
    return model_with(
        torch, negation=torch.complex(torch.ones(3), torch.arange(3.0) + start).conj().imag
    )


def tied(torch: Any, start: float) -> Any:
    """A decoder whose weight is the encoder's, transposed."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 4))
    torch.nn.init.constant_(model[0].weight, start)
    model[1].weight = torch.nn.Parameter(model[0].weight.detach().t())
    return model


def tied_on_some(torch: Any, start: float) -> Any:
    """Memory that only rank 0 shares."""
    values = torch.arange(4.0) + start
    return model_with(torch, first=values, second=values.detach() if start == 0 else values.clone())


MODELS: list[Callable[[Any, float], Any]] = [
    overlapping,
    flat,
    masked,
    real_view,
    lone_real_view,
    bytes_view,
    expanded,
    windows,
    conjugated,
    negated,
    tied,
    tied_on_some,
]


def taken(rank: int, world_size: int, make: Callable[[Any, float], Any], backend: str) -> None:
    torch = torch_of()
    group = group_of(world_size, backend)

    def values(model: Any) -> dict[str, Any]:
        return {
            name: np.array(value.detach().resolve_conj().resolve_neg())
            for name, value in [*model.named_parameters(), *model.named_buffers()]
        }

    model = make(torch, 100.0 * rank)
    mine = group.broadcast_object(values(model), 0)
    with torch.col.sync_gradients(model, group) as handle:
        for name, value in values(model).items():
            np.testing.assert_array_equal(value, mine[name], name)
        with torch.no_grad():
            next(model.parameters()).add_(rank + 1)
        handle.broadcast()
        assert all(
            (a == b).all()
            for a, b in zip(
                *[each.values() for each in group.allgather_object(values(model))], strict=True
            )
        )


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_models_that_ddp_takes(pool: RankPool, make: Callable[[Any, float], Any]) -> None:
    """Each was refused, as memory that is shared or holds other values; lazily, by one rank alone."""
    pool.run(2, taken, make, "shm")


def sparse(torch: Any) -> Any:
    return torch.eye(3).to_sparse()


def nested(torch: Any) -> Any:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def jagged(torch: Any) -> Any:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


def int4(torch: Any) -> Any:
    return torch.empty(4, dtype=torch.int4)


def half_complex(torch: Any) -> Any:
    return torch.zeros(2, dtype=torch.complex32)


def refused(
    rank: int, world_size: int, make: Callable[[Any], Any], refusing: tuple[int, ...]
) -> None:
    torch = torch_of()
    group = group_of(world_size, "shm")
    model = model_with(torch, odd=make(torch) if rank in refusing else torch.zeros(3))
    began = time.monotonic()
    expected = col.TensorError if rank in refusing else col.MismatchError
    with pytest.raises(expected, match=r"sync_gradients: .*\bodd\b") as caught:
        torch.col.sync_gradients(model, group)
    if rank not in refusing:
        assert caught.value.ranks == refusing
        assert f"rank {refusing[0]} of group '{group.name}'" in str(caught.value)
    assert time.monotonic() - began < 5
    model.odd = None
    with torch.col.sync_gradients(model, group) as handle:  # the group lives on
        model(torch.ones(1, 3)).sum().backward()
        model.register_buffer("odd", make(torch) if rank in refusing else torch.zeros(3))
        with pytest.raises(expected):
            handle.broadcast()


@pytest.mark.parametrize("refusing", [(0, 1), (1,)])
@pytest.mark.parametrize(
    "make", [sparse, nested, jagged, int4, half_complex], ids=lambda make: make.__name__
)
def test_buffers_that_are_refused_by_name(
    pool: RankPool, make: Callable[[Any], Any], refusing: tuple[int, ...]
) -> None:
    """They ended in torch's errors, and a rank without such a buffer waited for the whole timeout."""
    pool.run(2, refused, make, refusing)


def mistaken(rank: int, world_size: int, options: dict[str, Any]) -> None:
    torch = torch_of()
    group = group_of(world_size, "shm")
    model = torch.nn.Linear(3, 2)
    with pytest.raises(
        col.OptionError if rank == 1 else col.MismatchError, match=next(iter(options))
    ) as caught:
        torch.col.sync_gradients(model, group, **(options if rank == 1 else {}))
    assert rank == 1 or caught.value.ranks == (1,)
    torch.col.sync_gradients(model, group).remove()


@pytest.mark.parametrize("options", [{"bucket_nbytes": 0}, {"overlap": 3}, {"compression": "fp8"}])
def test_a_mistake_of_one_rank_is_told(pool: RankPool, options: dict[str, Any]) -> None:
    pool.run(3, mistaken, options)
