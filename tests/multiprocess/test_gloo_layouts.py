"""Tensors in any memory layout over Gloo, alike on all ranks or not: the values, and what is copied for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pool import RankPool, group_of
from test_shm_layouts import ORDERS, Array, laid_out

import colltensor as col
from colltensor.adapters.numpy import MEMORY, HostMemory
from colltensor.backends import is_available, reason
from colltensor.gathered import GatheredBuffers, Gatherer

pytestmark = pytest.mark.gloo
SHAPE = (30, 26, 34)
"""Of float32 more than travels with the agreement."""
EVERY_AXIS = (2, 1, 0)


class Copies:
    """Counts the copies between layouts of this process."""

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> Copies:
        copy = HostMemory.copy

        def counted(target: Any, source: Any) -> None:
            self.number += 1
            copy(MEMORY, target, source)

        MEMORY.copy = counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        del MEMORY.copy  # type: ignore[method-assign]


def calls(group: Any, tensor: Any) -> dict[str, Callable[[], Any]]:
    """Return the operations that work on elements in any order, by name, on a tensor; each rank has its part."""
    rank, size = group.rank, group.world_size

    def pass_on() -> Any:
        if rank == 0:
            return group.send(tensor, 1)
        return group.recv(tensor, 0) if rank == 1 else tensor

    def in_the_background() -> Any:
        if rank == 0:
            return group.send(tensor, 1, async_op=True).result()
        return group.recv(tensor, 0, async_op=True).result() if rank == 1 else tensor

    return {
        "allreduce": lambda: group.allreduce(tensor),
        "reduce": lambda: group.reduce(tensor, size - 1),
        "broadcast": lambda: group.broadcast(tensor, 0),
        "scan": lambda: group.scan(tensor),
        "transfer": pass_on,
        "asynchronous transfer": in_the_background,
    }


def result(name: str, rank: int, values: list[Array]) -> Array:
    """Return what a rank's tensor has after an operation."""
    size = len(values)
    if name == "allreduce" or (name == "reduce" and rank == size - 1):
        return sum(values[1:], values[0])
    if name == "scan":
        return sum(values[1 : rank + 1], values[0])
    if name == "broadcast" or (name.endswith("transfer") and rank == 1):
        return values[0]
    return values[rank]


def meet(rank: int, size: int, provider: str, seed: int, hosts: str = "") -> None:
    group = group_of(size, "hierarchical" if hosts else "gloo", provider, hosts=hosts)
    random = np.random.default_rng(seed)
    for step in range(2 + size):
        values = [random.integers(0, 20, SHAPE).astype(np.float32) for _ in range(size)]
        layouts = random.integers(0, 4 * len(ORDERS), size)
        if step:
            layouts[:] = layouts[0]
        if step > 1:
            layouts[step - 2] = 0  # a row-major one among the others
        array, room = laid_out(values[rank], int(layouts[rank]))
        untouched = room.copy()
        for name, call in calls(group, array).items():
            call()
            where = f"{name} {step} {layouts}"
            np.testing.assert_array_equal(array, result(name, rank, values), where)
            array[...] = values[rank]
            np.testing.assert_array_equal(room, untouched, where)
        with pytest.raises(col.MismatchError):
            group.allreduce(array if rank else array.reshape(-1)[1:].copy())
        np.testing.assert_array_equal(room, untouched)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_layouts_alike_and_not(pool: RankPool, provider: str, size: int) -> None:
    pool.run(size, meet, provider, size)


@pytest.mark.skipif(not is_available("shm"), reason=str(reason("shm")))
def test_layouts_between_hosts(pool: RankPool, provider: str) -> None:
    pool.run(3, meet, provider, 1, "aab")


def count_copies(rank: int, size: int, provider: str) -> None:
    group = group_of(size, "gloo", provider)
    values = [np.arange(30 * 40 * 20, dtype=np.float32) % 101 + peer for peer in range(size)]
    mine = values[rank].reshape(30, 40, 20)
    dense = {
        "transposed": np.ascontiguousarray(mine.transpose(EVERY_AXIS)).transpose(EVERY_AXIS),
        "reversed": mine[::-1, :, ::-1].copy()[::-1, :, ::-1],
        # the same places by another shape: axes that lie behind each other are one
        "shapes": np.asfortranarray(mine.reshape(600, 40)).reshape(
            (600, 40) if rank else (30, 20, 40)
        ),
    }
    assert dense["shapes"].base is not None or rank
    for layout, array in dense.items():
        for name, call in calls(group, array).items():
            array[...] = values[rank].reshape(array.shape)
            address = array.ctypes.data
            with Copies() as copies:
                returned = call()
            assert returned is array
            assert array.ctypes.data == address
            assert copies.number == 0, (layout, name)
            expected = result(name, rank, values).reshape(array.shape)
            np.testing.assert_array_equal(array, expected, f"{layout} {name}")
    # one rank has another layout: all that are strided copy in and out
    array = mine.copy() if rank == 0 else dense["transposed"]
    array[...] = mine
    with Copies() as copies:
        group.allreduce(array)
    assert copies.number == (0 if rank == 0 else 2)
    np.testing.assert_array_equal(array.reshape(-1), sum(values[1:], values[0]))


@pytest.mark.parametrize("size", [2, 3])
def test_what_lies_alike_on_all_ranks_is_not_copied(
    pool: RankPool, provider: str, size: int
) -> None:
    pool.run(size, count_copies, provider)


def shift_along_a_ring(rank: int, size: int, provider: str) -> None:
    group = group_of(size, "gloo", provider)
    values = np.arange(1200, dtype=np.float32).reshape(30, 40)
    to, of = (rank + 1) % size, (rank - 1) % size
    sent, received = np.asfortranarray(values + rank), np.zeros((40, 30), np.float32).T
    with Copies() as copies:
        group.sendrecv(sent, to, received, of)
    assert copies.number == 0
    np.testing.assert_array_equal(received, values + of)
    # one array for both, which a staging buffer receives for
    with Copies() as copies:
        group.sendrecv(received, to, received, of)
    assert copies.number > 0
    np.testing.assert_array_equal(received, values + (of - 1) % size)
    # what one rank sends lies otherwise
    sent = values + rank if rank == 0 else np.asfortranarray(values + rank)
    group.sendrecv(sent, to, received, of)
    np.testing.assert_array_equal(received, values + of)


def test_a_shift_goes_in_the_order_of_memory_too(pool: RankPool, provider: str) -> None:
    pool.run(3, shift_along_a_ring, provider)


def reduce_trees(rank: int, size: int, provider: str, framework: str) -> None:
    """A leaf by itself, large or the only one of its dtype, goes in the order of memory."""
    group = group_of(size, "gloo", provider)
    for alike in (True, False):
        large = np.arange(1 << 19, dtype=np.float32).reshape(512, 1024) % 509 + rank
        if alike or rank:
            large = np.asfortranarray(large)
        small = np.asfortranarray(np.arange(12.0).reshape(3, 4) + rank)
        tree: dict[str, Any] = {"large": large, "small": small}
        if framework == "torch":
            torch = importlib.import_module("torch")
            tree = {name: torch.from_numpy(leaf) for name, leaf in tree.items()}
        elif framework == "number":
            tree["number"] = 2  # which takes the slow path
        packed: list[int] = []
        with Copies() as copies, pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                GatheredBuffers,
                "load",
                lambda self, packed=packed, load=GatheredBuffers.load: (
                    packed.append(len(self._buckets)),
                    load(self),
                )[1],
            )
            results = group.allreduce(tree)
        if framework != "number" and is_available("shm"):
            assert packed == ([] if alike else [1 + rank])
        elif framework == "number":
            assert results["number"] == 2 * size
            assert copies.number == (0 if alike else 2 + 2 * rank)
        peers = range(size)
        expected = sum(np.arange(1 << 19, dtype=np.float32) % 509 + peer for peer in peers)
        np.testing.assert_array_equal(large, np.reshape(expected, (512, 1024)))
        np.testing.assert_array_equal(small, sum(np.arange(12.0) + p for p in peers).reshape(3, 4))


def come_by_different_ways(rank: int, size: int, provider: str) -> None:
    """Rank 1's leaves take the slow path, as those of a type that is new to a process do."""
    group = group_of(size, "gloo", provider)
    large = np.asfortranarray(np.arange(1 << 19, dtype=np.float32).reshape(512, 1024) + rank)
    with Copies() as copies, pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(Gatherer, "buffers", lambda *arguments: None)
        packed: list[int] = []
        patch.setattr(GatheredBuffers, "load", lambda self: packed.append(len(self._buckets)))
        group.allreduce({"large": large, "small": np.ones(3)})
    assert (packed, copies.number) == ([], 0)
    np.testing.assert_array_equal(
        large, (2 * np.arange(1 << 19, dtype=np.float32) + 1).reshape(512, 1024)
    )


def test_ranks_that_come_by_different_ways(pool: RankPool, provider: str) -> None:
    pool.run(2, come_by_different_ways, provider)


@pytest.mark.parametrize(
    "kind", ["numpy", "number", pytest.param("torch", marks=pytest.mark.needs("torch"))]
)
def test_large_leaves(pool: RankPool, provider: str, kind: str) -> None:
    pool.run(2, reduce_trees, provider, kind)


def mix_frameworks(rank: int, size: int, provider: str) -> Any:
    """Rank 0 has a torch tensor, rank 1 a numpy array, rank 2 a JAX array: each transposed."""
    group = group_of(size, "gloo", provider)
    values = np.arange(160 * 120, dtype=np.float32).reshape(160, 120) + rank
    if rank == 0:
        torch = importlib.import_module("torch")
        tensor = torch.from_numpy(values.T.copy()).T
    elif rank == 1:
        tensor = np.asfortranarray(values)
    else:
        jax = importlib.import_module("jax")
        tensor = jax.dlpack.from_dlpack(np.asfortranarray(values), copy=True)
    result = np.asarray(group.allreduce(tensor))
    np.testing.assert_array_equal(result, 3 * (values - rank) + 3)
    # JAX's array is only read here, and may go as it lies
    tensor = group.broadcast(tensor, 2)
    return np.asarray(tensor)[7, :3].tolist()


@pytest.mark.needs("torch", "jax")
def test_frameworks_meet(pool: RankPool, provider: str) -> None:
    expected = pool.run(3, mix_frameworks, provider)
    assert expected[0] == expected[1] == expected[2]


def refuse_expanded(rank: int, size: int, provider: str) -> None:
    group = group_of(size, "gloo", provider)
    expanded = np.broadcast_to(np.arange(40, dtype=np.float32), (600, 40))
    expanded.flags.writeable = True
    with pytest.raises(col.AliasError):
        group.allreduce(expanded)
    # it may be read, and meets a transposed one
    tensor = expanded if rank == 0 else np.zeros((40, 600), np.float32).T
    group.broadcast(tensor, 0)
    np.testing.assert_array_equal(tensor, expanded)


def test_an_expanded_array_is_refused_where_it_is_written(pool: RankPool, provider: str) -> None:
    pool.run(2, refuse_expanded, provider)
