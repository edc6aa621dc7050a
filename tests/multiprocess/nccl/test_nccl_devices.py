"""The nccl backend on a fake device: several devices in a process; `auto`, where each tensor goes its way."""

from __future__ import annotations

import threading
import time
from typing import Any

import device
import numpy as np
import pytest
from device import DeviceArray
from nccl_world import COUNT, World, on_device, values

import colltensor as col
from colltensor import ReduceOp
from colltensor.group import Group

pytestmark = pytest.mark.slow


class TestSeveralDevices:
    """Two devices in each process: the ``_multigpu`` forms."""

    DEVICES = 2

    def tensors(self, rank: int, dtype: str = "float32") -> list[DeviceArray]:
        found = [
            DeviceArray(np.full(COUNT, 77, dtype), device=index) for index in range(self.DEVICES)
        ]
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
            return [
                tensor.read()
                for tensor in group.multigpu.reduce(self.tensors(group.rank), 1, 1, op)
            ]

        results = ranks.values(2, run)
        expected = (np.sum if op is ReduceOp.SUM else np.max)(self.given(2), 0)
        np.testing.assert_array_equal(results[1][1], expected)
        np.testing.assert_array_equal([*results[0], results[1][0]], self.given(2)[:3])

    def test_broadcast(self, ranks: World, size: int) -> None:
        def run(group: Group) -> list[np.ndarray]:
            return [
                tensor.read() for tensor in group.multigpu.broadcast(self.tensors(group.rank), 1, 1)
            ]

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
                lists.append(
                    [DeviceArray(np.zeros(COUNT, np.float32), device=index) for _ in range(total)]
                )
                for tensor, array in zip(lists[-1], inputs(group.rank, index), strict=True):
                    tensor.write(array)
            targets = [
                DeviceArray(np.zeros(COUNT, np.float32), device=index)
                for index in range(self.DEVICES)
            ]
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
                group.multigpu.allreduce(tensors) if group.rank == 0 else group.allreduce(
                    tensors[0]
                )
            return caught.value

        for error in ranks.values(2, run):
            assert error.ranks == (1,)
            assert "[2, 1]" in str(error)

    def test_what_is_wrong_with_a_list_is_said(self, ranks: World) -> None:
        def run(group: Group) -> None:
            same = [DeviceArray(np.zeros(3, np.float32)) for _ in range(2)]
            with pytest.raises(col.errors.DeviceError, match=r"tensor_list .*\bcuda:0, cuda:0\b"):
                group.multigpu.allreduce(same)
            longer = [same[0], DeviceArray(np.zeros(4, np.float32), device=1)]
            with pytest.raises(col.errors.ShapeError, match=r"tensor_list\[1\]"):
                group.multigpu.allreduce(longer)
            with pytest.raises(col.errors.RankError, match="dst_tensor"):
                group.multigpu.reduce(longer, 0, 2)
            strided = [
                DeviceArray(np.zeros((3, 3), np.float32).T[::2], device=index) for index in range(2)
            ]
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

    def test_first_calls_of_two_threads(
        self, ranks: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
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
    def test_a_barrier_waits_for_calls_that_wait_for_their_turn(
        self, ranks: World, async_op: bool
    ) -> None:
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
            with pytest.raises(col.errors.DeviceError, match=r"'nccl' .*'auto'"):
                group.allreduce(on_device(0))

        ranks.values(2, run, backend="shm")
