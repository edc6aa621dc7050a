"""Zero-copy, proved: addresses before and after, no memory allocated, and nothing kept once a call is over."""

from __future__ import annotations

import gc
import importlib
import sys
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from exporters import ReadOnly
from oracle import moved, reduced
from pool import RankPool
from samples import Sample, address, as_numpy, dense
from worlds import Report, Transport, World, stop_tracing

import colltensor as col

COUNT = 1000


def _each_operation(group: Any) -> list[tuple[str, int, Callable[[list[Any]], Any]]]:
    """Every operation as (name, number of tensors, call on those tensors); the first tensor is written."""
    size, rank = group.world_size, group.rank
    calls: list[tuple[str, int, Callable[[list[Any]], Any]]] = [
        ("allreduce", 1, lambda tensors: group.allreduce(tensors[0])),
        ("reduce", 1, lambda tensors: group.reduce(tensors[0], 0)),
        ("broadcast", 1, lambda tensors: group.broadcast(tensors[0], 0)),
        ("allgather", size + 1, lambda tensors: group.allgather(tensors[1:], tensors[0])),
        (
            "gather",
            size + 1,
            lambda tensors: group.gather(tensors[1:] if rank == 0 else None, tensors[0]),
        ),
        (
            "scatter",
            size + 1,
            lambda tensors: group.scatter(tensors[0], tensors[1:] if rank == 0 else None),
        ),
        ("reducescatter", size + 1, lambda tensors: group.reducescatter(tensors[0], tensors[1:])),
        ("alltoall", 2 * size, lambda tensors: group.alltoall(tensors[:size], tensors[size:])),
        (
            "tree",
            3,
            lambda tensors: group.allreduce({"a": tensors[0], "b": [tensors[1], None, tensors[2]]}),
        ),
    ]
    if size > 1:
        calls.append(
            (
                "sendrecv",
                2,
                lambda tensors: group.sendrecv(
                    tensors[1], (rank + 1) % size, tensors[0], (rank - 1) % size
                ),
            )
        )
    return calls


def addresses_stay(rank: int, world_size: int, world: World, library: str) -> None:
    group = world.group()
    report = Report(group)
    for name, number, call in _each_operation(group):
        with report.case(name):
            values = [reduced("float32", COUNT, rank, salt) for salt in range(number)]
            samples = [Sample(library, "float32", dense(COUNT), entry) for entry in values]
            tensors = [sample.tensor for sample in samples]
            before = [address(tensor) for tensor in tensors]
            call(list(tensors))
            assert [address(tensor) for tensor in tensors] == before
    report.done()


def test_tensors_keep_their_address(
    pool: RankPool, world: World, libraries: tuple[str, ...]
) -> None:
    for library in libraries:
        pool.run(world.size, addresses_stay, world, library)


def nothing_is_kept(rank: int, world_size: int, world: World, library: str) -> None:
    """Neither a reference to a tensor nor an export of its memory outlives the call, synchronous or not."""
    group = world.group()
    report = Report(group)
    for name, number, call in _each_operation(group):
        with report.case(name):
            gc.disable()
            try:
                values = moved("float32", COUNT, rank)
                tensors = [
                    Sample(library, "float32", dense(COUNT), values).tensor for _ in range(number)
                ]
                counts = [sys.getrefcount(tensor) for tensor in tensors]
                call(tensors)
                assert [sys.getrefcount(tensor) for tensor in tensors] == counts
                gone = [weakref.ref(tensor) for tensor in tensors]
                tensors.clear()
                assert [ref() for ref in gone] == [None] * number
            finally:
                gc.enable()
    with report.case("async"):
        sample = Sample(library, "float32", dense(COUNT), moved("float32", COUNT, rank))
        work = group.allreduce(sample.tensor, async_op=True)
        work.wait()
        gone_tensor = weakref.ref(sample.tensor)
        del work, sample
        group.barrier(async_op=True).wait()
        assert gone_tensor() is None
    report.done()


def test_nothing_is_kept_after_a_call(
    pool: RankPool, world: World, libraries: tuple[str, ...]
) -> None:
    for library in libraries:
        pool.run(world.size, nothing_is_kept, world, library)


def a_work_keeps_its_tensor(rank: int, world_size: int, world: World, library: str) -> bool:
    """A pending Work is the only one that knows the tensor; its result has the sum."""
    group = world.group()
    sample = Sample(library, "float32", dense(COUNT), np.full(COUNT, rank + 1, np.float32))
    works = [group.barrier(async_op=True) for _ in range(3)]
    works.append(group.allreduce(sample.tensor, async_op=True))
    del sample
    gc.collect()
    return bool((as_numpy(works[-1].result(), "float32") == sum(range(1, world_size + 1))).all())


def test_a_work_keeps_its_tensors_alive(
    pool: RankPool, world: World, libraries: tuple[str, ...]
) -> None:
    for library in libraries:
        assert pool.run(world.size, a_work_keeps_its_tensor, world, library) == [True] * world.size


def memory_of_calls(rank: int, world_size: int, world: World) -> dict[str, int]:
    """Return the peak of Python's and numpy's allocations during each call, in bytes."""
    group = world.group()
    arrays = [np.full(2 << 20, rank + entry, np.float32) for entry in range(world_size + 1)]
    calls: dict[str, Callable[[], Any]] = {
        "allreduce": lambda: group.allreduce(arrays[0]),
        "broadcast": lambda: group.broadcast(arrays[0]),
        "allgather": lambda: group.allgather(arrays[1:], arrays[0]),
        "scatter": lambda: group.scatter(arrays[0], arrays[1:] if rank == 0 else None),
        "alltoall": lambda: group.alltoall(
            arrays[:world_size], [*arrays[world_size:], *arrays[world_size:]]
        ),
        "send": lambda: group.send(arrays[0], 1) if rank == 0 else group.recv(arrays[0], 0),
        "tree": lambda: group.allreduce({"a": arrays[0], "b": arrays[1]}),
    }
    peaks = {}
    for name, call in calls.items():
        call()
        tracemalloc.start()
        call()
        peaks[name] = tracemalloc.get_traced_memory()[1]
        stop_tracing()
    return peaks


def test_no_memory_is_allocated_for_a_payload(pool: RankPool, transport: Transport) -> None:
    for peaks in pool.run(2, memory_of_calls, World(2, *transport)):
        assert all(peak < 100_000 for peak in peaks.values()), peaks


def writes_are_seen_in_the_source(
    rank: int, world_size: int, world: World, libraries: tuple[str, ...]
) -> None:
    """The memory belongs to a bytearray: what the collective wrote is there."""
    group = world.group()
    storage = bytearray(np.full(64, rank + 1, np.float32).tobytes())
    array = np.frombuffer(storage, np.float32)
    tensors = [array]
    if "torch" in libraries:
        torch = importlib.import_module("torch")
        tensors.append(torch.frombuffer(storage, dtype=torch.float32))
    if "dlpack" in libraries:
        tensors.append(importlib.import_module("array_api_strict").asarray(array, copy=False))
    for tensor in tensors:
        array[:] = rank + 1
        group.allreduce(tensor)
        assert (
            np.frombuffer(bytes(storage), np.float32).tolist()
            == [sum(range(1, world_size + 1))] * 64
        )


def test_writes_are_seen_in_the_source(
    pool: RankPool, world: World, libraries: tuple[str, ...]
) -> None:
    pool.run(world.size, writes_are_seen_in_the_source, world, libraries)


def read_only_sources(rank: int, world_size: int, world: World) -> None:
    """What a call only reads may be read-only, and is not copied."""
    group = world.group()
    array = np.full(5, rank, np.int64)
    array.flags.writeable = False
    strided = np.arange(10, dtype=np.int64)[::2] + rank
    strided.flags.writeable = False
    marked = ReadOnly(np.full(5, rank, np.int64))
    for source in (array, strided, marked, ReadOnly(np.arange(10, dtype=np.int64)[::2] + rank)):
        values = getattr(source, "array", source)
        targets = [np.empty(5, np.int64) for _ in range(world_size)]
        group.allgather(targets, source)
        assert all((target - target[0] == values - values[0]).all() for target in targets)
        assert [int(target[0]) for target in targets] == list(range(world_size))
        group.gather(targets if rank == 0 else None, source)
        group.reduce(source if rank else values.copy(), 0)
        group.broadcast(source if rank == 0 else values.copy(), 0)
        group.scatter(np.empty(5, np.int64), [source] * world_size if rank == 0 else None)
        group.reducescatter(np.empty(5, np.int64), [source] * world_size)
        group.alltoall(targets, [source] * world_size)
        if world_size > 1:
            group.sendrecv(source, (rank + 1) % world_size, targets[0], (rank - 1) % world_size)
            assert targets[0][0] == (rank - 1) % world_size
            if rank == 0:
                group.send({"a": source}, 1)
            elif rank == 1:
                group.recv({"a": np.empty(5, np.int64)}, 0)
        assert values[0] == rank


def test_read_only_arrays_are_sent(pool: RankPool, world: World) -> None:
    pool.run(world.size, read_only_sources, world)


def refuse_copies(rank: int, world_size: int, world: World) -> list[str]:
    """Try ``copy=False`` where a staging copy would be needed; return what was raised, by case."""
    group = world.group()
    strided = np.arange(12.0)[::2]
    half = np.ones(6, np.float16)
    dense_array = np.ones(6)
    lists = [np.ones(6) for _ in range(world_size)]
    calls: dict[str, Callable[[], Any]] = {
        "strided allreduce": lambda: group.allreduce(strided, copy=False),
        "strided broadcast": lambda: group.broadcast(strided, copy=False),
        "strided leaf": lambda: group.allreduce({"a": np.ones(3), "b": strided}, copy=False),
        "strided entry": lambda: group.allgather([*lists[1:], strided], dense_array, copy=False),
        "strided source": lambda: group.reducescatter(
            dense_array, [*lists[1:], strided], copy=False
        ),
        "emulated allreduce": lambda: group.allreduce(half, copy=False),
        "emulated reduce": lambda: group.reduce(half, copy=False),
    }
    found = []
    for name, call in calls.items():
        message = ""
        try:
            call()
        except col.OptionError as error:
            message = str(error)
        assert not message or ("copy=False" in message and "copy=None" in message), message
        if message and name.startswith("strided"):
            assert "strided" in message, message
        found.append(f"{name}: {'refused' if message else 'fine'}")
    leaves = {"a": np.full(3, 1.0), "b": np.full((2, 2), 2.0), "c": np.full(5, 1, np.int32)}
    group.allreduce(leaves, copy=False)
    assert [int(leaf.flat[-1]) for leaf in leaves.values()] == [
        world_size,
        2 * world_size,
        world_size,
    ]
    group.allreduce(dense_array, copy=False)
    group.broadcast(half, copy=False)
    assert group.backend != "gloo" or strided.tolist() == np.arange(12.0)[::2].tolist()
    return found


def test_copy_false_refuses_staging_where_a_backend_needs_it(pool: RankPool, ranks: World) -> None:
    for found in pool.run(ranks.size, refuse_copies, ranks):
        # The native provider widens 16-bit floats in registers.
        staged = (
            ("strided", "emulated")[: 1 if ranks.provider == "native" else 2]
            if ranks.backend == "gloo"
            else ()
        )
        assert all(
            line.endswith("refused" if line.startswith(staged) else "fine") for line in found
        ), found
        assert len(found) == 7


@pytest.mark.parametrize("backend", ["loopback"])
def test_loopback_takes_everything_as_it_lies(pool: RankPool, backend: str) -> None:
    found = pool.run(1, refuse_copies, World(1, backend, None))[0]
    assert all(line.endswith("fine") for line in found), found
