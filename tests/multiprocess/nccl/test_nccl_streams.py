"""The nccl backend on a device of pretence: what goes on which stream, in which order, and what waits."""

from __future__ import annotations

import time
import weakref
from typing import Any

import device
import numpy as np
import pytest
from device import DeviceArray, FrozenArray
from nccl_world import COUNT, World, as_if_in_processes_of_their_own, on_device, values

from colltensor.group import Group

pytestmark = pytest.mark.slow


@pytest.fixture(params=["processes", "threads"])
def ranks_of_either_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "processes":
        as_if_in_processes_of_their_own(monkeypatch)


class TestStreams:
    """What comes before a call and what comes after it; the device draws any order that the streams permit."""

    @pytest.mark.usefixtures("ranks_of_either_kind")
    def test_a_synchronous_call_does_not_block_the_host(self, ranks: World) -> None:
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

    @pytest.mark.usefixtures("ranks_of_either_kind")
    def test_it_comes_after_the_current_stream_and_before_what_follows(self, ranks: World) -> None:
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

    @pytest.mark.usefixtures("ranks_of_either_kind")
    def test_calls_on_several_streams_stay_in_the_order_of_issue(self, ranks: World) -> None:
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
