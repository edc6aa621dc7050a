"""How many functions of Python one steady call enters: each costs some 50 ns, and a reader has to know it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import RankPool
from shm_ranks import fresh, own_group

import colltensor

PACKAGE = str(Path(colltensor.__file__).parent)
CALLS = 10
"""The least of so many is taken: a collection may run in one, or a late rank be waited for."""


def entered(function: Callable[[], Any]) -> tuple[int, int]:
    """Return how many Python functions a call enters, and how many of them are the package's."""
    every = ours = 0

    def hook(frame: Any, event: str, argument: Any) -> None:
        nonlocal every, ours
        if event == "call":
            every += 1
            ours += frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(hook)
    try:
        function()
    finally:
        sys.setprofile(None)
    return every - 1, ours  # without the lambda itself


def call_of(kind: str, group: Any) -> Callable[[], Any]:
    """Return a call on a tensor of so many bytes that it is short."""
    if kind == "torch":
        import torch

        tensor = torch.ones(256)
    elif kind == "jax":
        import jax

        tensor = jax.numpy.ones(256)
    elif kind == "jitted":
        import jax

        import colltensor.jax as cj

        array = jax.numpy.ones(256)
        jitted = jax.jit(lambda x: cj.allreduce(x, group))
        return lambda: jitted(array).block_until_ready()
    else:
        tensor = {
            "numpy": np.ones(256, np.float32),
            "strided": np.ones((16, 32), np.float32)[:, ::2],
            "dict of two": {"a": np.ones(64, np.float32), "b": np.ones(64, np.float32)},
        }[kind]
    return lambda: group.allreduce(tensor)


def count(rank: int, size: int, name: str, backend: str, kind: str) -> tuple[int, int]:
    # a group of its own, since a jitted call sends the eager ones another way
    with own_group(rank, size, name, backend=backend) as group:
        return least(group, call_of(kind, group))


def least(group: Any, call: Callable[[], Any]) -> tuple[int, int]:
    for _ in range(3):  # compiled, and by way of XLA's own fast path
        call()
    found = []
    for turn in range(2 * CALLS):
        group.barrier()
        if turn % 2 == group.rank:
            time.sleep(0.01)  # the other rank is there: a call that has to wait enters more
            found.append(entered(call))
        else:
            call()
    return min(found)


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("numpy", 3),
        pytest.param("torch", 9, marks=pytest.mark.needs("torch")),
        pytest.param("jax", 19, marks=pytest.mark.needs("jax")),
        ("strided", 3),
        ("dict of two", 60),
    ],
)
@pytest.mark.shm
def test_frames_in_shared_memory(pool: RankPool, kind: str, most: int) -> None:
    assert max(every for every, _ in pool.run(2, count, fresh(), "shm", kind)) <= most


@pytest.mark.shm
@pytest.mark.needs("jax")
def test_a_jitted_call_enters_no_function_of_the_package(pool: RankPool) -> None:
    assert [ours for _, ours in pool.run(2, count, fresh(), "shm", "jitted")] == [0, 0]


@pytest.mark.gloo
def test_frames_over_gloo(pool: RankPool, providers: tuple[str, ...]) -> None:
    if "native" not in providers:
        pytest.skip("the figure is of the Gloo built in")
    assert max(every for every, _ in pool.run(2, count, fresh(), "gloo", "numpy")) <= 40
