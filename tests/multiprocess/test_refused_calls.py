"""Calls that one rank refuses by its role in them: the others hear of it at once, and the group goes on."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from c10d_ranks import world
from pool import RankPool
from shm_ranks import fresh
from test_nested_calls import BACKENDS, made

import colltensor as col


def read_only() -> Any:
    array = np.ones(3)
    array.flags.writeable = False
    return array


def uneven(size: int) -> list[Any]:
    return [np.ones(3 - (place == 1)) for place in range(size)]


Case = Callable[[Any, int, int], Any]
CASES: dict[str, tuple[int, type[BaseException], Case]] = {
    "scatter": (
        1,
        col.ShapeError,
        lambda group, rank, size: group.scatter(np.ones(3), uneven(size), 1),
    ),
    "scatter, one array": (
        0,
        col.ShapeError,
        lambda group, rank, size: group.scatter(np.ones(3), np.ones(7)),
    ),
    "scatter, asynchronous": (
        0,
        col.ShapeError,
        lambda group, rank, size: group.scatter(np.ones(3), uneven(size), async_op=True).wait(),
    ),
    "gather": (0, col.ShapeError, lambda group, rank, size: group.gather(uneven(size), np.ones(3))),
    "gather, large": (
        1,
        col.ShapeError,
        lambda group, rank, size: group.gather([], np.ones(1 << 19), 1),
    ),
    "reduce": (
        0,
        col.ReadOnlyError,
        lambda group, rank, size: group.reduce(np.ones(3) if rank else read_only()),
    ),
    "broadcast": (
        1,
        col.ReadOnlyError,
        lambda group, rank, size: group.broadcast(read_only() if rank == 1 else np.ones(3)),
    ),
    "broadcast_object": (
        0,
        Exception,
        lambda group, rank, size: group.broadcast_object(lambda: None),
    ),
}
"""The rank that refuses, what it raises, and the call."""


def refuse(rank: int, size: int, name: str, backend: str) -> None:
    with made(backend, rank, size, name, timeout_s=20.0) as group:
        assert group.allreduce(np.ones(3)).tolist() == [size] * 3
        for case, (refusing, error, call) in CASES.items():
            began = time.monotonic()
            with pytest.raises(error if rank == refusing else col.MismatchError) as caught:
                call(group, rank, size)
            assert time.monotonic() - began < 4.0
            if rank != refusing:
                assert caught.value.ranks == (refusing,), case
                operation = case.split(",")[0]
                assert re.search(rf"rank {refusing} .*\b{operation}: ", str(caught.value))
            assert group.allreduce(np.ones(3)).tolist() == [size] * 3, case
            assert group.allreduce(np.ones(3), async_op=True).result().tolist() == [size] * 3, case


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_others_hear_of_a_refusal(pool: RankPool, backend: str) -> None:
    pool.run(4 if backend == "hierarchical" else 3, refuse, fresh(), backend)


def refuse_under_autograd(rank: int, size: int, name: str) -> None:
    import torch

    import colltensor.torch as ct

    with made("shm", rank, size, name) as group:
        for number in (1, size):
            entries = [torch.ones(3 - place, requires_grad=True) for place in range(number)]
            with pytest.raises(col.MismatchError if rank else col.ShapeError, match=r"\bscatter: "):
                ct.scatter(torch.ones(3), None if rank else entries, 0, group)
            assert group.allreduce(np.ones(3)).tolist() == [size] * 3
        for sparse in ((0,), (0, 1)):
            model = torch.nn.Embedding(4, 2, sparse=rank in sparse)
            ct.sync_gradients(model, group)
            error = col.UnsupportedTensorError if rank in sparse else col.MismatchError
            with pytest.raises(error, match=r"\bweight .*sparse=False"):
                model(torch.arange(3)).sum().backward()
            assert group.allreduce(np.ones(3)).tolist() == [size] * 3


@pytest.mark.shm
@pytest.mark.needs("torch")
def test_the_others_hear_of_a_refusal_under_autograd(pool: RankPool) -> None:
    pool.run(2, refuse_under_autograd, fresh())


def refuse_in_torch(rank: int, size: int, path: Path) -> None:
    with world(rank, size, path, timeout_s=20.0) as (torch, dist):
        for asynchronous in (False, True):
            chunks = [torch.ones(3 - (place == 1)) for place in range(size)]
            with pytest.raises(col.MismatchError if rank else col.ShapeError) as caught:  # noqa: PT012 - either may
                work = dist.scatter(torch.ones(3), None if rank else chunks, async_op=asynchronous)
                work.wait()
            assert not rank or caught.value.ranks == (0,)
            dist.all_reduce(total := torch.ones(3))
            assert total.tolist() == [size] * 3


@pytest.mark.shm
@pytest.mark.needs("torch")
def test_the_others_hear_of_a_refusal_in_torch_distributed(pool: RankPool, tmp_path: Path) -> None:
    pool.run(2, refuse_in_torch, tmp_path / "meet")
