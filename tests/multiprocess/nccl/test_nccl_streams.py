"""The nccl backend on a fake device: what goes on which stream, in which order, and what waits."""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Callable
from typing import Any

import device
import numpy as np
import pytest
from device import DeviceArray, FrozenArray
from nccl_world import COUNT, World, as_if_in_processes_of_their_own, on_device, values

from colltensor.backends.nccl.backend import NcclBackend
from colltensor.errors import MismatchError
from colltensor.group import Group
from colltensor.types import ReduceOp

pytestmark = pytest.mark.slow


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
            assert alive() is not None, (
                "its framework may give the memory to others before it is sent"
            )
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


class TestAtOnce:
    """Allreduces of one tensor after another on one stream, which take a fast path."""

    @pytest.fixture
    def begun(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """The ranks whose calls went the slow path, one entry a call; ranks are as in processes of their own."""
        as_if_in_processes_of_their_own(monkeypatch)
        ranks: list[int] = []
        begin = NcclBackend.begin

        def noted(backend: NcclBackend, *arguments: Any) -> Any:
            ranks.append(backend._rank)
            return begin(backend, *arguments)

        monkeypatch.setattr(NcclBackend, "begin", noted)
        return ranks

    def test_only_the_first_call_goes_the_general_way(
        self, ranks: World, begun: list[int], size: int
    ) -> None:
        def run(group: Group) -> tuple[np.ndarray, int]:
            tensor = on_device(group.rank)
            for _ in range(5):
                assert group.allreduce(tensor) is tensor
            return tensor.read(), tensor.bumps

        expected = sum(values(rank) for rank in range(size)) * size**4
        for result, bumps in ranks.values(size, run):
            np.testing.assert_array_equal(result, expected)
            assert bumps == 5
        assert sorted(begun) == list(range(size))

    def test_what_needs_more_goes_the_general_way(self, ranks: World, begun: list[int]) -> None:
        def run(group: Group) -> list[int]:
            tensor, wide = on_device(group.rank), DeviceArray(np.zeros((4, COUNT), np.float32))
            calls: list[Callable[[], object]] = [
                lambda: group.allreduce(tensor),
                lambda: group.allreduce(tensor, ReduceOp.MAX),
                lambda: group.allreduce(DeviceArray(wide.memory[:, ::2])),
                lambda: group.allreduce([tensor]),
                lambda: group.allreduce(tensor, async_op=True).result(),
                lambda: group.allreduce(tensor, copy=False),
                lambda: group.allreduce(FrozenArray(values(0))),
                lambda: group.allreduce(DeviceArray(np.zeros(0, np.float32))),
                lambda: group.allreduce(tensor, ReduceOp.PRODUCT),
            ]
            counts = []
            for call in calls:
                call()
                begun_before = begun.count(group.rank)
                call()
                counts.append(begun.count(group.rank) - begun_before)
            begun_before = begun.count(group.rank)
            with device.use(device.new_stream(ranks.machine)):
                group.allreduce(tensor)
            with device.use(device.LEGACY):  # whose framework frees memory without regard to it
                group.allreduce(tensor)
                group.allreduce(tensor)
            return [*counts, begun.count(group.rank) - begun_before]

        # Several ranks are threads here, which would wait for each other on the legacy stream.
        assert ranks.values(1, run) == [[0, 1, 1, 1, 1, 1, 1, 1, 0, 3]]

    def test_the_ranks_agree_first_where_they_check(self, ranks: World, begun: list[int]) -> None:
        def run(group: Group) -> np.ndarray:
            tensor = on_device(group.rank)
            group.allreduce(tensor)
            with pytest.raises(MismatchError):
                group.allreduce(tensor if group.rank else on_device(0, COUNT + 1))
            return group.allreduce(tensor).read()

        for result in ranks.values(2, run, check=True):
            np.testing.assert_array_equal(result, 2 * (values(0) + values(1)))

    @pytest.mark.usefixtures("begun")
    @pytest.mark.parametrize("seed", range(6))
    def test_it_keeps_the_order_among_calls_of_every_kind(self, ranks: World, seed: int) -> None:
        """Each step on a stream of its own or the one before, waited for or not; the ranks draw the same steps."""

        def run(group: Group) -> np.ndarray:
            drawn = random.Random(seed)
            streams = [device.current(), *(device.new_stream(ranks.machine) for _ in range(2))]
            tensor, other = on_device(group.rank), on_device(10 + group.rank)
            ranks.machine.synchronize(device.current())
            stream = streams[0]
            for _ in range(40):
                step = drawn.randrange(8)
                if step == 0:
                    stream = drawn.choice(streams)
                with device.use(stream):
                    if step == 1:
                        group.allreduce(tensor, ReduceOp.MAX)
                    elif step == 2:
                        group.broadcast(tensor, 1)
                    elif step == 3:
                        group.allreduce(other, async_op=True)  # nobody waits
                    elif step == 4:
                        group.allreduce(tensor, ReduceOp.MIN, async_op=True).wait()
                    else:
                        group.allreduce(tensor, ReduceOp.AVERAGE)
            with device.use(stream):
                group.barrier()
            return tensor.memory.copy()

        expected = [values(rank) for rank in range(3)]
        drawn = random.Random(seed)
        for _ in range(40):
            step = drawn.randrange(8)
            if step == 0:
                drawn.choice(range(3))
            elif step == 3:
                continue
            combined = {1: np.max(expected, 0), 2: expected[1], 4: np.min(expected, 0)}
            expected = [
                combined.get(step, np.mean(expected, 0, dtype=np.float64).astype(np.float32))
            ] * 3
        for result in ranks.values(3, run):
            np.testing.assert_allclose(result, expected[0], rtol=1e-5)
