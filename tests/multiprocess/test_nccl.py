"""The nccl backend's logic on a device of pretence: streams, spelling of types and ops, staging, grouping, failures.

Ranks are threads. That NCCL itself does what is asked of it needs a GPU: ``tests/gpu``.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import device
import numpy as np
import pytest
from device import DeviceArray, FrozenArray
from nccl_world import World, world

import colltensor as col
from colltensor import ReduceOp
from colltensor.backends.nccl.members import Members
from colltensor.control.switchboard import Switchboard
from colltensor.group import Group

pytestmark = pytest.mark.slow
COUNT = 37


@pytest.fixture(params=[2, 3, 4])
def size(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[World]:
    with world(tmp_path, monkeypatch, seed=len(request.node.name)) as made:
        yield made


def values(rank: int, count: int = COUNT, dtype: str = "float32") -> np.ndarray:
    return (np.arange(count) % 11 + rank + 1).astype(dtype)


def as_if_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let synchronous calls go on the frameworks' streams, which they do not where ranks are threads."""
    connect = Members._connect
    monkeypatch.setattr(Members, "_connect", lambda *arguments: connect(*arguments)._replace(shared=False))


def on_device(rank: int, count: int = COUNT, dtype: str = "float32") -> DeviceArray:
    """Return an array that gets its values only when the stream comes to them."""
    tensor = DeviceArray(np.full(count, 77, dtype))
    tensor.write(values(rank, count, dtype))
    return tensor


class TestOperations:
    """Every operation, in place, compared with numpy."""

    def test_allreduce(self, ranks: World, size: int) -> None:
        def run(group: Group) -> np.ndarray:
            tensor = on_device(group.rank)
            assert group.allreduce(tensor) is tensor
            return tensor.read()

        expected = sum(values(rank) for rank in range(size))
        for result in ranks.values(size, run):
            np.testing.assert_array_equal(result, expected)

    def test_reduce_leaves_the_other_ranks_as_they_were(self, ranks: World, size: int) -> None:
        def run(group: Group) -> np.ndarray:
            return group.reduce(on_device(group.rank), 1).read()

        for rank, result in enumerate(ranks.values(size, run)):
            expected = sum(values(r) for r in range(size)) if rank == 1 else values(rank)
            np.testing.assert_array_equal(result, expected)

    def test_broadcast(self, ranks: World, size: int) -> None:
        results = ranks.values(size, lambda group: group.broadcast(on_device(group.rank), size - 1).read())
        for result in results:
            np.testing.assert_array_equal(result, values(size - 1))

    @pytest.mark.parametrize("row", [False, True])
    def test_allgather(self, ranks: World, size: int, row: bool) -> None:
        def run(group: Group) -> list[np.ndarray]:
            whole = np.zeros((size, COUNT), np.float32)
            outputs = [DeviceArray(whole[r] if row else np.zeros(COUNT, np.float32)) for r in range(size)]
            group.allgather(outputs, on_device(group.rank))
            return [output.read() for output in outputs]

        for result in ranks.values(size, run):
            np.testing.assert_array_equal(result, [values(rank) for rank in range(size)])
        assert all(names == (("allGather",) if row else ("broadcast",) * size) for _, names in ranks.machine.calls)

    @pytest.mark.parametrize("row", [False, True])
    @pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.MAX])
    def test_reducescatter(self, ranks: World, size: int, row: bool, op: ReduceOp) -> None:
        def run(group: Group) -> np.ndarray:
            whole = np.zeros((size, COUNT), np.float32)
            sources = [DeviceArray(whole[r] if row else np.zeros(COUNT, np.float32)) for r in range(size)]
            for index, source in enumerate(sources):
                source.write(values(10 * group.rank + index))
            target = DeviceArray(np.zeros(COUNT, np.float32))
            group.reducescatter(target, sources, op)
            for index, source in enumerate(sources):
                np.testing.assert_array_equal(source.read(), values(10 * group.rank + index))
            return target.read()

        for rank, result in enumerate(ranks.values(size, run)):
            given = [values(10 * r + rank) for r in range(size)]
            np.testing.assert_array_equal(result, np.sum(given, 0) if op is ReduceOp.SUM else np.max(given, 0))

    def test_gather_and_scatter(self, ranks: World, size: int) -> None:
        def run(group: Group) -> Any:
            root = group.rank == 1
            outputs = [DeviceArray(np.zeros(COUNT, np.float32)) for _ in range(size)] if root else None
            group.gather(outputs, on_device(group.rank), 1)
            target = DeviceArray(np.zeros(COUNT, np.float32))
            group.scatter(target, [on_device(50 + r) for r in range(size)] if root else None, 1)
            return [output.read() for output in outputs or ()], target.read()

        for rank, (gathered, scattered) in enumerate(ranks.values(size, run)):
            np.testing.assert_array_equal(scattered, values(50 + rank))
            if rank == 1:
                np.testing.assert_array_equal(gathered, [values(r) for r in range(size)])

    def test_alltoall(self, ranks: World, size: int) -> None:
        def run(group: Group) -> list[np.ndarray]:
            outputs = [DeviceArray(np.zeros(COUNT, np.float32)) for _ in range(size)]
            group.alltoall(outputs, [on_device(10 * group.rank + r) for r in range(size)])
            return [output.read() for output in outputs]

        for rank, result in enumerate(ranks.values(size, run)):
            np.testing.assert_array_equal(result, [values(10 * r + rank) for r in range(size)])

    def test_send_and_recv_concern_two_ranks(self, ranks: World, size: int) -> None:
        def run(group: Group) -> Any:
            if group.rank == 0:
                group.send([on_device(5), on_device(6, 3)], size - 1)
            elif group.rank == size - 1:
                got = [DeviceArray(np.zeros(COUNT, np.float32)), DeviceArray(np.zeros(3, np.float32))]
                return [tensor.read() for tensor in group.recv(got, 0)]
            return None

        first, second = ranks.values(size, run)[-1]
        np.testing.assert_array_equal(first, values(5))
        np.testing.assert_array_equal(second, values(6, 3))

    def test_sendrecv_round_a_ring(self, ranks: World, size: int) -> None:
        def run(group: Group) -> np.ndarray:
            target = DeviceArray(np.zeros(COUNT, np.float32))
            for _ in range(3):
                group.sendrecv(on_device(group.rank), (group.rank + 1) % size, target, (group.rank - 1) % size)
            return target.read()

        for rank, result in enumerate(ranks.values(size, run)):
            np.testing.assert_array_equal(result, values((rank - 1) % size))

    def test_sendrecv_to_itself_asks_nobody(self, ranks: World) -> None:
        def run(group: Group) -> Any:
            if group.rank == 0:
                target = DeviceArray(np.zeros(COUNT, np.float32))
                group.sendrecv(on_device(3), 0, target, 0)
                return target.read()
            return None

        np.testing.assert_array_equal(ranks.values(2, run)[0], values(3))

    def test_empty_tensors(self, ranks: World) -> None:
        def run(group: Group) -> int:
            empty = DeviceArray(np.zeros(0, np.float32))
            group.allreduce(empty)
            group.broadcast(empty)
            group.alltoall([DeviceArray(np.zeros(0, np.float32)) for _ in range(2)], [empty, empty])
            return len(empty.read())

        assert ranks.values(2, run) == [0, 0]
        assert ranks.machine.calls == []

    def test_nothing_is_sent_to_a_rank(self, ranks: World) -> None:
        def run(group: Group) -> Any:
            if group.rank == 1:
                time.sleep(2)
            group.send([], 1) if group.rank == 0 else group.recv([], 0)
            return group.allreduce(on_device(group.rank)).read()

        for result in ranks.values(2, run):
            np.testing.assert_array_equal(result, values(0) + values(1))

    def test_a_list_is_one_group_of_calls(self, ranks: World) -> None:
        def run(group: Group) -> list[np.ndarray]:
            big = 1 << 18  # not fused
            tensors = {"a": on_device(group.rank, big), "b": on_device(group.rank, 5), "c": on_device(group.rank, 6)}
            return [tensor.read() for tensor in group.allreduce(tensors).values()]

        for result in ranks.values(2, run):
            for found, count in zip(result, (1 << 18, 5, 6), strict=True):
                np.testing.assert_array_equal(found, values(0, count) + values(1, count))
        assert [names for _, names in ranks.machine.calls] == [("allReduce", "allReduce")] * 2

    def test_objects_barrier_and_split(self, ranks: World) -> None:
        def run(group: Group) -> Any:
            part = group.split(group.rank % 2)
            assert part is not None
            total = part.allreduce(on_device(group.rank)).read()
            group.barrier()
            part.destroy()
            return total, group.allgather_object(group.rank)

        for rank, (total, everyone) in enumerate(ranks.values(4, run)):
            np.testing.assert_array_equal(total, values(rank % 2) + values(rank % 2 + 2))
            assert everyone == [0, 1, 2, 3]

    def test_the_group_can_be_made_again(self, ranks: World) -> None:
        for _ in range(3):
            for result in ranks.values(2, lambda group: group.allreduce(on_device(group.rank)).read()):
                np.testing.assert_array_equal(result, values(0) + values(1))


class TestElements:
    """Data types and reduce ops."""

    @pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "int64", "uint64", "float16", "float64"])
    @pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.MAX])
    def test_numbers(self, ranks: World, dtype: str, op: ReduceOp) -> None:
        results = ranks.values(3, lambda group: group.allreduce(on_device(group.rank, dtype=dtype), op).read())
        function = {"SUM": np.sum, "PRODUCT": np.prod, "MIN": np.min, "MAX": np.max}[op.name]
        expected = function([values(rank, dtype=dtype) for rank in range(3)], 0).astype(dtype)
        for result in results:
            np.testing.assert_array_equal(result, expected)

    @pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.AVERAGE, ReduceOp.MIN, ReduceOp.MAX])
    def test_bfloat16(self, ranks: World, op: ReduceOp) -> None:
        def run(group: Group) -> np.ndarray:
            bits = (values(2 * group.rank).view(np.uint32) >> 16).astype(np.uint16)
            tensor = DeviceArray(np.zeros(COUNT, np.uint16), "bfloat16")
            tensor.write(bits)
            return (group.allreduce(tensor, op).read().astype(np.uint32) << 16).view(np.float32)

        function = {"SUM": np.sum, "AVERAGE": np.mean, "MIN": np.min, "MAX": np.max}[op.name]
        for result in ranks.values(2, run):
            np.testing.assert_array_equal(result, function([values(0), values(2)], 0))

    @pytest.mark.parametrize("dtype", ["complex64", "complex128"])
    @pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.AVERAGE])
    def test_complex_numbers_are_pairs(self, ranks: World, dtype: str, op: ReduceOp) -> None:
        def run(group: Group) -> np.ndarray:
            tensor = DeviceArray(np.zeros(COUNT, dtype))
            tensor.write(values(2 * group.rank) + 1j * values(4 * group.rank))
            return group.allreduce(tensor, op).read()

        total = values(0) + values(2) + 1j * (values(0) + values(4))
        for result in ranks.values(2, run):
            np.testing.assert_array_equal(result, total / (2 if op is ReduceOp.AVERAGE else 1))

    @pytest.mark.parametrize(
        ("op", "function"),
        [(ReduceOp.SUM, np.logical_or), (ReduceOp.MAX, np.logical_or), (ReduceOp.BOR, np.logical_or),
         (ReduceOp.PRODUCT, np.logical_and), (ReduceOp.MIN, np.logical_and), (ReduceOp.BAND, np.logical_and)],
    )
    def test_bool(self, ranks: World, op: ReduceOp, function: Any) -> None:
        given = [np.array([0, 0, 1, 1], bool), np.array([0, 1, 0, 1], bool)]

        def run(group: Group) -> np.ndarray:
            tensor = DeviceArray(np.zeros(4, bool))
            tensor.write(given[group.rank])
            return group.allreduce(tensor, op).read()

        for result in ranks.values(2, run):
            np.testing.assert_array_equal(result.view(np.uint8), function(*given).view(np.uint8))

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    @pytest.mark.parametrize("op", [ReduceOp.MIN, ReduceOp.MAX])
    def test_least_and_greatest_keep_nan_whichever_rank_has_it(self, ranks: World, dtype: str, op: ReduceOp) -> None:
        special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1.5, -2.5, 65504, 6e-8], dtype)
        first, second = (array.ravel() for array in np.meshgrid(special, special))

        def run(group: Group) -> np.ndarray:
            tensor = DeviceArray(np.zeros(first.size, dtype))
            tensor.write(first if group.rank == 0 else second)
            return group.allreduce(tensor, op).read()

        expected = (np.minimum if op is ReduceOp.MIN else np.maximum)(first, second)
        for result in ranks.values(2, run):
            np.testing.assert_array_equal(result, expected)

    @pytest.mark.parametrize(
        ("dtype", "op"),
        [("int16", ReduceOp.SUM), ("uint16", ReduceOp.MAX), ("int32", ReduceOp.BAND), ("bool", ReduceOp.BXOR),
         ("float8_e5m2", ReduceOp.SUM), ("int32", ReduceOp.AVERAGE), ("complex64", ReduceOp.MAX)],
    )
    def test_what_it_cannot_do_is_refused_by_name(self, ranks: World, dtype: str, op: ReduceOp) -> None:
        def run(group: Group) -> str:
            raw = np.zeros(8, {"float8_e5m2": "uint8"}.get(dtype, dtype))
            with pytest.raises(col.errors.UnsupportedDTypeError) as caught:
                group.allreduce(DeviceArray(raw, dtype), op)
            return str(caught.value)

        for message in ranks.values(2, run):
            assert dtype in message
            assert op.name in message

    @pytest.mark.parametrize("dtype", ["int16", "uint16", "float8_e4m3fn"])
    def test_every_type_can_be_moved(self, ranks: World, dtype: str) -> None:
        def run(group: Group) -> np.ndarray:
            raw = DeviceArray(np.zeros(7, "uint8" if "float8" in dtype else dtype), dtype)
            raw.write(np.arange(7) + group.rank)
            return group.broadcast(raw, 1).read()

        for result in ranks.values(2, run):
            np.testing.assert_array_equal(result, np.arange(7) + 1)

    def test_strided_tensors_are_packed_on_the_device(self, ranks: World) -> None:
        def run(group: Group) -> np.ndarray:
            whole = np.full((6, 8), 99, np.float32)
            tensor = DeviceArray(whole.T[1::2, ::-1])
            tensor.write(values(group.rank, 24).reshape(4, 6))
            group.allreduce(tensor)
            tensor.read()
            return whole

        for whole in ranks.values(2, run):
            np.testing.assert_array_equal(whole.T[1::2, ::-1].ravel(), values(0, 24) + values(1, 24))
            assert (whole.T[::2] == 99).all()

    def test_copy_false_refuses_packing_and_keys(self, ranks: World) -> None:
        def run(group: Group) -> None:
            with pytest.raises(col.errors.OptionError, match="copy=False"):
                group.allreduce(DeviceArray(np.zeros((4, 4), np.float32).T[::2]), copy=False)
            with pytest.raises(col.errors.OptionError, match="copy=False"):
                group.allreduce(on_device(0), ReduceOp.MAX, copy=False)

        ranks.values(2, run)


class TestStreams:
    """What comes before a call and what comes after it; the device draws any order that the streams permit."""

    @pytest.mark.parametrize("own_process", [True, False])
    def test_a_synchronous_call_does_not_block_the_host(
        self, ranks: World, monkeypatch: pytest.MonkeyPatch, own_process: bool
    ) -> None:
        if own_process:
            as_if_in_processes_of_their_own(monkeypatch)

        def run(group: Group) -> np.ndarray:
            tensor = on_device(group.rank)
            group.allreduce(tensor)  # connects
            release = ranks.machine.hold(device.current())
            tensor.write(values(group.rank))
            began = time.monotonic()
            group.allreduce(tensor)
            assert time.monotonic() - began < 5
            found = tensor.later()
            time.sleep(0.05)
            assert found == []
            release.set()
            ranks.machine.synchronize(device.current())
            return found[0]

        for result in ranks.values(2, run):
            np.testing.assert_array_equal(result, values(0) + values(1))

    @pytest.mark.parametrize("own_process", [True, False])
    def test_it_comes_after_the_current_stream_and_before_what_follows(
        self, ranks: World, monkeypatch: pytest.MonkeyPatch, own_process: bool
    ) -> None:
        if own_process:
            as_if_in_processes_of_their_own(monkeypatch)

        def run(group: Group) -> list[np.ndarray]:
            found = []
            for turn in range(20):
                tensor = DeviceArray(np.full(COUNT, 77, np.float32))
                with device.use(device.new_stream(ranks.machine)):
                    tensor.write(values(group.rank + turn))
                    found.append(group.allreduce(tensor).later())
                    last = device.current()
                ranks.machine.synchronize(last)
            return [later[0] for later in found]

        for result in ranks.values(3, run):
            for turn, array in enumerate(result):
                np.testing.assert_array_equal(array, sum(values(rank + turn) for rank in range(3)))

    @pytest.mark.parametrize("own_process", [True, False])
    def test_calls_on_several_streams_stay_in_the_order_of_issue(
        self, ranks: World, monkeypatch: pytest.MonkeyPatch, own_process: bool
    ) -> None:
        if own_process:
            as_if_in_processes_of_their_own(monkeypatch)

        def run(group: Group) -> np.ndarray:
            tensor = on_device(group.rank)
            ranks.machine.synchronize(device.current())
            for turn in range(12):
                with device.use(device.new_stream(ranks.machine)):
                    group.broadcast(tensor, turn % 2) if turn % 3 else group.allreduce(tensor)
            with device.use(device.current()):
                group.barrier()
            return tensor.memory.copy()

        expected = [values(0), values(1)]
        for turn in range(12):
            expected = [expected[turn % 2] if turn % 3 else expected[0] + expected[1]] * 2
        for result in ranks.values(2, run):
            np.testing.assert_array_equal(result, expected[0])

    def test_an_asynchronous_call_runs_beside_the_current_stream(self, ranks: World) -> None:
        def run(group: Group) -> np.ndarray:
            tensor = on_device(group.rank)
            group.allreduce(tensor)  # connects
            tensor.write(values(group.rank))
            work = group.allreduce(tensor, async_op=True)
            release = ranks.machine.hold(device.current())  # compute that takes long
            until = time.monotonic() + 20
            while not work.done():
                assert time.monotonic() < until
                time.sleep(0.001)
            assert work.result() is tensor
            release.set()
            return tensor.read()

        for result in ranks.values(2, run):
            np.testing.assert_array_equal(result, values(0) + values(1))

    def test_wait_orders_the_stream_and_not_the_host(self, ranks: World) -> None:
        def run(group: Group) -> np.ndarray:
            tensor = on_device(group.rank)
            release = ranks.machine.hold(device.current())
            work = group.allreduce(tensor, async_op=True)
            assert not work.done()
            work.wait()  # returns although the device has not begun
            found = tensor.later()
            assert not work.done()
            release.set()
            ranks.machine.synchronize(device.current())
            return found[0]

        for result in ranks.values(2, run):
            np.testing.assert_array_equal(result, values(0) + values(1))

    def test_memory_of_an_asynchronous_call_is_kept_until_it_is_done(self, ranks: World) -> None:
        def run(group: Group) -> None:
            tensor = on_device(group.rank)
            alive = weakref.ref(tensor)
            release = ranks.machine.hold(device.current())
            group.allreduce(tensor, async_op=True)
            del tensor
            time.sleep(0.2)
            assert alive() is not None
            release.set()
            group.barrier()
            until = time.monotonic() + 10
            while alive() is not None:
                assert time.monotonic() < until, "kept after it was done"
                time.sleep(0.01)

        ranks.values(2, run)

    def test_results_of_an_immutable_framework_are_ready(self, ranks: World) -> None:
        def run(group: Group) -> list[Any]:
            given = FrozenArray(values(group.rank))
            plain = group.allreduce(given)
            assert plain is not given
            now = plain.memory.copy()
            work = group.allreduce(given, async_op=True)
            return [now, work.result().memory.copy(), given.memory]

        for rank, (now, later, given) in enumerate(ranks.values(2, run)):
            np.testing.assert_array_equal(now, values(0) + values(1))
            np.testing.assert_array_equal(later, values(0) + values(1))
            np.testing.assert_array_equal(given, values(rank))

    def test_memory_of_a_framework_without_a_stream_is_kept_while_it_is_sent(
        self, ranks: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        as_if_in_processes_of_their_own(monkeypatch)

        def run(group: Group) -> Any:
            if group.rank == 1:
                release = ranks.machine.hold(device.current())
                target = DeviceArray(np.zeros(COUNT, np.float32))
                group.recv(target, 0)
                time.sleep(0.3)
                release.set()
                return target.read()
            with device.use(device.LEGACY):  # where the views of DLPack are
                given = DeviceArray(values(3))
                alive = weakref.ref(given)
                group.send(given, 1)
            del given
            assert alive() is not None, "its framework may give the memory to others before it is sent"
            group.synchronize()
            return values(3)

        for result in ranks.values(2, run):
            np.testing.assert_array_equal(result, values(3))

    def test_the_host_waits_for_what_an_immutable_framework_only_gives(self, ranks: World) -> None:
        def run(group: Group) -> np.ndarray:
            given = FrozenArray(values(group.rank))
            if group.rank == 0:
                group.broadcast(given)
                group.send(given, 1)
                given.memory[:] = 99  # as a computation to which the array is donated
                return values(0)
            found = group.broadcast(given).memory.copy()
            np.testing.assert_array_equal(group.recv(FrozenArray(values(7)), 0).memory, found)
            return found

        for result in ranks.values(2, run):
            np.testing.assert_array_equal(result, values(0))

    def test_a_tree_of_two_frameworks(self, ranks: World) -> None:
        def run(group: Group) -> list[np.ndarray]:
            tree = {"frozen": FrozenArray(values(group.rank)), "plain": on_device(group.rank)}
            found = group.allreduce(tree)
            return [found["frozen"].memory.copy(), found["plain"].read()]

        for pair in ranks.values(2, run):
            for result in pair:
                np.testing.assert_array_equal(result, values(0) + values(1))

    def test_frameworks_are_told_of_writes(self, ranks: World) -> None:
        def run(group: Group) -> int:
            tensor = on_device(group.rank)
            group.allreduce(tensor)
            group.send(tensor, 1) if group.rank == 0 else group.recv(tensor, 0)
            return tensor.bumps

        assert ranks.values(2, run) == [1, 2]

    def test_a_barrier_waits_for_what_is_queued(self, ranks: World) -> None:
        def run(group: Group) -> np.ndarray:
            tensor = on_device(group.rank)
            ranks.machine.queue(device.current(), lambda: time.sleep(0.1))
            group.allreduce(tensor)
            group.barrier()
            return tensor.memory.copy()

        for result in ranks.values(2, run):
            np.testing.assert_array_equal(result, values(0) + values(1))


class TestFailures:
    """Nothing hangs; what failed is named; nothing goes on as if nothing had happened."""

    def test_a_rank_that_does_not_come_is_named(self, ranks: World) -> None:
        def run(group: Group) -> Any:
            tensor = on_device(group.rank)
            group.allreduce(tensor)
            if group.rank == 1:
                time.sleep(3)
                with pytest.raises(col.errors.CollectiveError):
                    group.allreduce(tensor)
                return None
            work = group.allreduce(tensor, async_op=True)
            deadline = time.monotonic() + 10
            while not work.done():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            with pytest.raises(col.errors.CollectiveTimeoutError) as caught:
                work.wait()
            with pytest.raises(col.errors.CollectiveError, match="allreduce"):
                group.allreduce(tensor)
            ranks.machine.synchronize(device.current())  # the stream runs on
            return caught.value

        error = ranks.values(2, run, timeout_s=1.0)[0]
        assert error.ranks == (1,)
        assert "rank 1" in str(error)
        assert "tested" in str(error)

    def test_a_transfer_whose_peer_does_not_come(self, ranks: World) -> None:
        def run(group: Group) -> Any:
            tensor = on_device(group.rank)
            if group.rank != 2:
                group.send(tensor, 1) if group.rank == 0 else group.recv(tensor, 0)
            if group.rank == 0:
                group.send(tensor, 1)
            time.sleep(2.5)
            with pytest.raises(col.errors.CollectiveError) as caught:
                group.barrier()
            return caught.value

        errors = ranks.values(3, run, timeout_s=1.0)
        assert "rank 1" in str(errors[0])
        assert "rank 2 has" not in str(errors[0])

    def test_connecting_is_bounded(self, ranks: World) -> None:
        def run(group: Group) -> Any:
            if group.rank == 1:
                time.sleep(2.5)
                return None
            with pytest.raises(col.errors.CollectiveTimeoutError) as caught:
                group.allreduce(on_device(0))
            return caught.value

        assert ranks.values(2, run, timeout_s=1.0)[0].ranks == (1,)

    def test_a_rank_that_leaves_is_noticed(self, ranks: World) -> None:
        def run(group: Group) -> Any:
            tensor = on_device(group.rank)
            group.allreduce(tensor)
            group.barrier()
            if group.rank == 1:
                return None
            began = time.monotonic()
            work = group.allreduce(tensor, async_op=True)
            while not work.done():
                assert time.monotonic() - began < 10
                time.sleep(0.01)
            with pytest.raises(col.errors.PeerLostError) as caught:
                work.wait()
            assert time.monotonic() - began < 5
            return caught.value

        assert ranks.values(2, run)[0].ranks == (1,)

    def test_an_error_of_nccl_ends_the_group_for_all(self, ranks: World) -> None:
        def run(group: Group) -> Any:
            tensor = on_device(group.rank)
            group.allreduce(tensor)
            group.barrier()
            release = ranks.machine.hold(device.current())
            if group.rank == 0:
                ranks.spec.drivers[0].made[0].error = device.NcclError("unhandled system error")
            work = group.allreduce(tensor, async_op=True)
            until = time.monotonic() + 10
            while not work.done():
                assert time.monotonic() < until
                time.sleep(0.01)
            with pytest.raises(col.errors.CollectiveError) as caught:
                work.wait()
            release.set()
            return caught.value

        for error in ranks.values(2, run):
            assert "unhandled system error" in str(error)

    def test_nccl_waits_for_a_late_rank_inside_the_call(self, ranks: World) -> None:
        """As where it connects the ranks of an algorithm: the abort ends the call, and the verdict is the watcher's."""

        def run(group: Group) -> Any:
            tensor = on_device(group.rank)
            group.allreduce(tensor)
            group.barrier()
            if group.rank == 1:
                time.sleep(2.5)
                return None
            communicator = ranks.spec.drivers[0].made[0]

            def blocked(*arguments: int) -> None:
                while not communicator.aborted:
                    time.sleep(0.01)
                raise device.NcclError("unhandled system error")

            def slow() -> None:
                abort()
                time.sleep(0.3)  # the call ends before the abort does

            abort, communicator.abort = communicator.abort, slow
            communicator.broadcast = blocked
            with pytest.raises(col.errors.CollectiveTimeoutError) as caught:
                group.broadcast(tensor)
            return caught.value

        assert ranks.values(2, run, timeout_s=1.0)[0].ranks == (1,)

    def test_nccl_refuses_a_call(self, ranks: World) -> None:
        def run(group: Group) -> Any:
            tensor = on_device(group.rank)
            group.allreduce(tensor)
            group.barrier()
            ranks.machine.refuses = device.NcclError("invalid argument")
            with pytest.raises(col.errors.CollectiveError, match=r"invalid argument|told"):
                group.allreduce(tensor)
            return None

        ranks.values(2, run)

    def test_nccl_refuses_to_connect(self, ranks: World) -> None:
        def run(group: Group) -> Any:
            ranks.spec.drivers[group.rank].refuses = device.NcclError("invalid usage")
            with pytest.raises(col.errors.CollectiveError) as caught:
                group.allreduce(on_device(0))
            return str(caught.value)

        assert any("NCCL_MULTI_RANK_GPU_ENABLE" in message for message in ranks.values(2, run))

    def test_a_long_kernel_before_the_call_is_no_timeout(self, ranks: World) -> None:
        def run(group: Group) -> np.ndarray:
            tensor = on_device(group.rank)
            group.allreduce(tensor)
            release = ranks.machine.hold(device.current())
            tensor.write(values(group.rank))
            group.allreduce(tensor)
            time.sleep(2.0)
            release.set()
            return tensor.read()

        for result in ranks.values(2, run, timeout_s=1.0):
            np.testing.assert_array_equal(result, values(0) + values(1))

    def test_check_names_the_rank_that_differs_and_the_group_goes_on(self, ranks: World) -> None:
        def run(group: Group) -> Any:
            tensor = on_device(group.rank, 7 if group.rank == 2 else COUNT)
            with pytest.raises(col.errors.MismatchError) as caught:
                group.allreduce(tensor)
            again = group.allreduce(on_device(group.rank)).read()
            return caught.value, again

        for error, again in ranks.values(3, run, check=True):
            assert error.ranks == (2,)
            np.testing.assert_array_equal(again, values(0) + values(1) + values(2))

    def test_check_of_transfers(self, ranks: World) -> None:
        def run(group: Group) -> Any:
            with pytest.raises(col.errors.MismatchError):
                group.send(on_device(0), 1) if group.rank == 0 else group.recv(on_device(0, 5), 0)
            tensor = on_device(group.rank)
            group.send(tensor, 1) if group.rank == 0 else group.recv(tensor, 0)
            return tensor.read()

        for result in ranks.values(2, run, check=True):
            np.testing.assert_array_equal(result, values(0))

    def test_a_failure_while_a_call_is_queued(self, ranks: World, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(group: Group) -> Any:
            tensor = on_device(group.rank)
            group.allreduce(tensor)
            group.barrier()
            if group.rank == 1:
                time.sleep(1)
                return None
            made = ranks.spec.drivers[0].made[0]
            aborting, refused = threading.Event(), threading.Event()

            def fail(*arguments: Any) -> None:
                made.error = device.NcclError("unhandled system error")
                assert aborting.wait(10)
                refused.set()
                raise device.NcclError("invalid argument")

            def abort() -> None:
                made.aborted = True
                aborting.set()
                assert refused.wait(10)
                time.sleep(0.2)

            monkeypatch.setattr(made, "allReduce", fail)
            monkeypatch.setattr(made, "abort", abort)
            with pytest.raises(col.errors.CollectiveError) as caught:
                group.allreduce(tensor)
            return caught.value

        assert "rank 1 has not called" in str(ranks.values(2, run)[0])

    def test_an_error_of_the_device_ends_the_group_for_all(
        self, ranks: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(event: int) -> bool:
            if threading.current_thread().name == "colltensor nccl watcher":
                raise RuntimeError("cudaErrorIllegalAddress")
            return False

        def run(group: Group) -> Any:
            group.allreduce(on_device(group.rank))
            group.barrier()
            ranks.machine.hold(device.current())
            if group.rank == 0:
                monkeypatch.setattr(ranks.spec.drivers[0], "done", refuse)
            work = group.allreduce(on_device(group.rank), async_op=True)
            until = time.monotonic() + 10
            while not work.done():
                assert time.monotonic() < until
                time.sleep(0.01)
            with pytest.raises(col.errors.CollectiveError, match="cudaErrorIllegalAddress"):
                work.wait()

        ranks.values(2, run)

    def test_what_connects_too_late_is_ended(self, ranks: World, monkeypatch: pytest.MonkeyPatch) -> None:
        connect, late = device.Driver.connect, threading.Event()

        def slowly(driver: device.Driver, *arguments: Any) -> device.Communicator:
            assert late.wait(20)
            return connect(driver, *arguments)

        monkeypatch.setattr(device.Driver, "connect", slowly)

        def run(group: Group) -> None:
            with pytest.raises(col.errors.CollectiveError):
                group.allreduce(on_device(group.rank))

        ranks.values(2, run, timeout_s=1.0)
        late.set()
        until = time.monotonic() + 10
        drivers = ranks.spec.drivers.values()
        while not all(driver.made and driver.made[0].aborted for driver in drivers):
            assert time.monotonic() < until, "a communicator is left behind"
            time.sleep(0.01)

    def test_the_control_plane_serves_calls_and_the_watcher(
        self, ranks: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        glance = Switchboard.glance

        def slowly(board: Switchboard) -> None:
            glance(board)
            if threading.current_thread().name == "colltensor nccl watcher":
                time.sleep(0.03)

        monkeypatch.setattr(Switchboard, "glance", slowly)

        def run(group: Group) -> Any:
            release = ranks.machine.hold(device.current())
            tensor = on_device(group.rank)
            group.allreduce(tensor)
            for turn in range(200):
                assert group.allgather_object((turn, group.rank)) == [(turn, 0), (turn, 1)]
                time.sleep(0.001)
            release.set()
            return tensor.read()

        for result in ranks.values(2, run):
            np.testing.assert_array_equal(result, values(0) + values(1))

    def test_a_rank_that_is_not_concerned_may_leave(self, ranks: World) -> None:
        def run(group: Group) -> Any:
            tensor = on_device(group.rank)
            if group.rank == 2:
                return None
            if group.rank == 0:
                group.send(tensor, 1)
                group.send(tensor, 1)
                group.synchronize()
                return None
            group.recv(tensor, 0)
            time.sleep(2.5)
            return group.recv(tensor, 0).read()

        np.testing.assert_array_equal(ranks.values(3, run)[1], values(0))

    def test_check_of_sendrecv_where_one_transfer_is_agreed(self, ranks: World) -> None:
        def run(group: Group) -> Any:
            count = 5 if group.rank == 2 else COUNT
            target = DeviceArray(np.zeros(count, np.float32))
            with pytest.raises(col.errors.MismatchError):
                group.sendrecv(on_device(group.rank, count), (group.rank + 1) % 3, target, (group.rank - 1) % 3)
            return target.read(), group.allreduce(on_device(group.rank)).read()

        results = ranks.values(3, run, check=True)
        np.testing.assert_array_equal(results[1][0], values(0))
        for rank in (0, 2):
            assert not results[rank][0].any()
        for _, total in results:
            np.testing.assert_array_equal(total, values(0) + values(1) + values(2))

    def test_what_is_under_way_when_the_group_is_destroyed_fails(
        self, ranks: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("colltensor.backends.nccl.backend._CLOSE_TIMEOUT_S", 0.2)

        def run(group: Group) -> str:
            tensor = on_device(group.rank)
            release = ranks.machine.hold(device.current())
            work = group.allreduce(tensor, async_op=True)
            group.destroy()
            assert work.done()
            with pytest.raises(col.errors.GroupError) as caught:
                work.wait()
            release.set()
            return str(caught.value)

        for message in ranks.values(2, run):
            assert "destroyed" in message

    def test_a_rank_keeps_its_device(self, ranks: World) -> None:
        def run(group: Group) -> None:
            group.allreduce(on_device(group.rank))
            other = DeviceArray(np.zeros(3, np.float32), device=1)
            with pytest.raises(col.errors.CollectiveError, match=r"cuda:1.*cuda:0"):
                group.allreduce(other)

        ranks.values(2, run)

    def test_leaves_on_two_devices(self, ranks: World) -> None:
        def run(group: Group) -> None:
            with pytest.raises(col.errors.DeviceError, match="cuda:0 and cuda:1"):
                group.allreduce([on_device(0), DeviceArray(np.zeros(3, np.float32), device=1)])
            with pytest.raises(col.errors.DeviceError, match="on cpu"):
                group.allreduce([on_device(0), np.zeros(3, np.float32)])

        ranks.values(2, run)

    def test_synchronize(self, ranks: World) -> None:
        def run(group: Group) -> None:
            tensor = on_device(group.rank)
            release = ranks.machine.hold(device.current())
            group.allreduce(tensor)
            group.timeout_s = 0.2
            with pytest.raises(col.errors.CollectiveTimeoutError, match="synchronize"):
                group.synchronize(0)
            group.synchronize(1)
            release.set()
            group.timeout_s = 10.0
            group.synchronize(0)
            np.testing.assert_array_equal(tensor.memory, values(0) + values(1))

        ranks.values(2, run)

    def test_destroying_waits_for_what_is_queued(self, ranks: World) -> None:
        kept: dict[int, DeviceArray] = {}

        def run(group: Group) -> None:
            kept[group.rank] = on_device(group.rank)
            ranks.machine.queue(device.current(), lambda: time.sleep(0.05))
            group.allreduce(kept[group.rank])

        ranks.values(2, run)
        for tensor in kept.values():
            np.testing.assert_array_equal(tensor.memory, values(0) + values(1))


class TestSeveralDevices:
    """Two devices in each process: the ``_multigpu`` forms."""

    DEVICES = 2

    def tensors(self, rank: int, dtype: str = "float32") -> list[DeviceArray]:
        found = [DeviceArray(np.full(COUNT, 77, dtype), device=index) for index in range(self.DEVICES)]
        for index, tensor in enumerate(found):
            tensor.write(values(10 * rank + index, dtype=dtype))
        return found

    def given(self, size: int) -> list[np.ndarray]:
        return [values(10 * rank + index) for rank in range(size) for index in range(self.DEVICES)]

    @pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.MIN])
    def test_allreduce(self, ranks: World, size: int, op: ReduceOp) -> None:
        def run(group: Group) -> list[np.ndarray]:
            tensors = self.tensors(group.rank)
            assert group.multigpu.allreduce(tensors, op)[1] is tensors[1]
            return [tensor.read() for tensor in tensors]

        expected = (np.sum if op is ReduceOp.SUM else np.min)(self.given(size), 0)
        for results in ranks.values(size, run):
            for result in results:
                np.testing.assert_array_equal(result, expected)
        assert all(names == ("allReduce",) * self.DEVICES for _, names in ranks.machine.calls)

    @pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.MAX])
    def test_reduce(self, ranks: World, op: ReduceOp) -> None:
        def run(group: Group) -> list[np.ndarray]:
            return [tensor.read() for tensor in group.multigpu.reduce(self.tensors(group.rank), 1, 1, op)]

        results = ranks.values(2, run)
        expected = (np.sum if op is ReduceOp.SUM else np.max)(self.given(2), 0)
        np.testing.assert_array_equal(results[1][1], expected)
        np.testing.assert_array_equal([*results[0], results[1][0]], self.given(2)[:3])

    def test_broadcast(self, ranks: World, size: int) -> None:
        def run(group: Group) -> list[np.ndarray]:
            return [tensor.read() for tensor in group.multigpu.broadcast(self.tensors(group.rank), 1, 1)]

        for results in ranks.values(size, run):
            np.testing.assert_array_equal(results, [values(11)] * self.DEVICES)

    def test_allgather(self, ranks: World, size: int) -> None:
        def run(group: Group) -> list[list[np.ndarray]]:
            total = size * self.DEVICES
            outputs = [
                [DeviceArray(np.zeros(COUNT, np.float32), device=index) for _ in range(total)]
                for index in range(self.DEVICES)
            ]
            group.multigpu.allgather(outputs, self.tensors(group.rank))
            return [[tensor.read() for tensor in entries] for entries in outputs]

        for results in ranks.values(size, run):
            for entries in results:
                np.testing.assert_array_equal(entries, self.given(size))

    @pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.MAX])
    def test_reducescatter(self, ranks: World, size: int, op: ReduceOp) -> None:
        total = size * self.DEVICES

        def inputs(rank: int, index: int) -> list[np.ndarray]:
            return [values(100 * rank + 10 * index + place) for place in range(total)]

        def run(group: Group) -> list[np.ndarray]:
            lists = []
            for index in range(self.DEVICES):
                lists.append([DeviceArray(np.zeros(COUNT, np.float32), device=index) for _ in range(total)])
                for tensor, array in zip(lists[-1], inputs(group.rank, index), strict=True):
                    tensor.write(array)
            targets = [DeviceArray(np.zeros(COUNT, np.float32), device=index) for index in range(self.DEVICES)]
            return [tensor.read() for tensor in group.multigpu.reducescatter(targets, lists, op)]

        everything = [inputs(rank, index) for rank in range(size) for index in range(self.DEVICES)]
        expected = (np.sum if op is ReduceOp.SUM else np.max)(everything, 0)
        for rank, results in enumerate(ranks.values(size, run)):
            for index, result in enumerate(results):
                np.testing.assert_array_equal(result, expected[rank * self.DEVICES + index])

    def test_ranks_with_different_numbers_of_devices(self, ranks: World) -> None:
        def run(group: Group) -> Any:
            tensors = self.tensors(group.rank)
            with pytest.raises(col.errors.MismatchError) as caught:
                group.multigpu.allreduce(tensors) if group.rank == 0 else group.allreduce(tensors[0])
            return caught.value

        for error in ranks.values(2, run):
            assert error.ranks == (1,)
            assert "[2, 1]" in str(error)

    def test_what_is_wrong_with_a_list_is_said(self, ranks: World) -> None:
        def run(group: Group) -> None:
            same = [DeviceArray(np.zeros(3, np.float32)) for _ in range(2)]
            with pytest.raises(col.errors.DeviceError, match="different CUDA devices"):
                group.multigpu.allreduce(same)
            longer = [same[0], DeviceArray(np.zeros(4, np.float32), device=1)]
            with pytest.raises(col.errors.ShapeError, match=r"tensor_list\[1\]"):
                group.multigpu.allreduce(longer)
            with pytest.raises(col.errors.RankError, match="dst_tensor"):
                group.multigpu.reduce(longer, 0, 2)
            strided = [DeviceArray(np.zeros((3, 3), np.float32).T[::2], device=index) for index in range(2)]
            with pytest.raises(col.errors.OptionError, match="contiguous"):
                group.multigpu.broadcast(strided)

        ranks.values(2, run)


@pytest.mark.shm
class TestAuto:
    """Tensors of both kinds in one group."""

    def test_each_goes_its_way(self, ranks: World, size: int) -> None:
        def run(group: Group) -> Any:
            host = values(group.rank)
            work = group.allreduce(host, async_op=True)
            tensor = group.allreduce(on_device(group.rank))
            group.allreduce(host2 := values(group.rank + 1))
            group.barrier()
            return work.result(), tensor.read(), host2, group.backend

        total = sum(values(rank) for rank in range(size))
        for one, two, three, name in ranks.values(size, run, backend="auto"):
            np.testing.assert_array_equal(one, total)
            np.testing.assert_array_equal(two, total)
            np.testing.assert_array_equal(three, total + size)
            assert name == "shm"

    def test_a_failure_on_the_device_breaks_the_group(self, ranks: World) -> None:
        def run(group: Group) -> Any:
            group.allreduce(on_device(group.rank))
            if group.rank == 0:
                group.allreduce(on_device(group.rank))
            time.sleep(2.5)
            with pytest.raises(col.errors.CollectiveError) as caught:
                group.allreduce(np.zeros(3, np.float32))
            return str(caught.value)

        for message in ranks.values(2, run, backend="auto", timeout_s=1.0):
            assert "rank 1" in message

    def test_first_calls_of_two_threads(self, ranks: World, monkeypatch: pytest.MonkeyPatch) -> None:
        create, made = ranks.spec.create, []

        def slowly(*arguments: Any, **options: Any) -> Any:
            made.append(arguments)
            time.sleep(0.1)
            return create(*arguments, **options)

        monkeypatch.setattr(ranks.spec, "create", slowly)

        def run(group: Group) -> list[np.ndarray]:
            results: list[np.ndarray] = []

            def call() -> None:
                device.enter(ranks.machine)
                with device.use(device.new_stream(ranks.machine)):
                    results.append(group.allreduce(on_device(group.rank)).read())

            threads = [threading.Thread(target=call) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return results

        for results in ranks.values(2, run, backend="auto"):
            np.testing.assert_array_equal(results, [values(0) + values(1)] * 2)
        assert len(made) == 2

    @pytest.mark.parametrize("async_op", [False, True])
    def test_a_barrier_waits_for_calls_that_wait_for_their_turn(self, ranks: World, async_op: bool) -> None:
        def run(group: Group) -> np.ndarray:
            group.allreduce(on_device(group.rank))  # connects
            if group.rank == 1:
                time.sleep(0.3)
            first = group.allreduce(values(group.rank), async_op=True)
            tensor = on_device(group.rank)
            ranks.machine.queue(device.current(), lambda: time.sleep(0.2))
            second = group.allreduce(tensor, async_op=True)
            if async_op:
                group.barrier(async_op=True).wait()
            else:
                group.barrier()
            assert first.done()
            assert second.done()
            return tensor.memory.copy()

        for result in ranks.values(2, run, backend="auto"):
            np.testing.assert_array_equal(result, values(0) + values(1))

    def test_synchronize_waits_for_calls_that_wait_for_their_turn(self, ranks: World) -> None:
        def run(group: Group) -> np.ndarray:
            group.allreduce(on_device(group.rank))  # connects
            if group.rank == 1:
                time.sleep(0.3)
            group.allreduce(values(group.rank), async_op=True)
            tensor = on_device(group.rank)
            group.allreduce(tensor, async_op=True)
            group.synchronize()
            return tensor.memory.copy()

        for result in ranks.values(2, run, backend="auto"):
            np.testing.assert_array_equal(result, values(0) + values(1))

    def test_shm_alone_says_which_backend_can(self, ranks: World) -> None:
        def run(group: Group) -> None:
            with pytest.raises(col.errors.DeviceError, match="'nccl' or 'auto'"):
                group.allreduce(on_device(0))

        ranks.values(2, run, backend="shm")
