"""The target of jitted collectives on CUDA devices, without one: called as XLA would, on a fake device."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import device
import numpy as np
import pytest
from nccl_jax import COUNT, NO_OP, NO_RANK, SUM, Rank, given
from nccl_world import World, as_if_in_processes_of_their_own

import colltensor as col
from colltensor import ReduceOp
from colltensor.group import Group

pytestmark = [
    pytest.mark.needs("jax"),
    pytest.mark.shm,
    pytest.mark.usefixtures("jax_targets"),
    pytest.mark.skipif(
        sys.version_info < (3, 11), reason="jax-tvm-ffi has no wheel for Python 3.10"
    ),
]


@pytest.fixture(params=["processes", "threads"])
def ranks_of_either_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "processes":
        as_if_in_processes_of_their_own(monkeypatch)


class TestTarget:
    """The target as XLA calls it, on a fake device."""

    @pytest.mark.usefixtures("ranks_of_either_kind")
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64", "uint8"])
    def test_every_collective(self, ranks: World, size: int, dtype: str) -> None:
        def run(group: Group) -> dict[str, Any]:
            rank, found = Rank(group, ranks.machine), {}
            mine = given(group.rank, dtype=dtype)
            empty = np.zeros((size, COUNT), mine.dtype)
            to, of = (group.rank + 1) % size, (group.rank - 1) % size
            for name, op, root in (
                ("allreduce", SUM, NO_RANK),
                ("reduce", SUM, 1),
                ("broadcast", NO_OP, size - 1),
            ):
                memory = rank.write(mine)
                rank.call(name, memory, memory, op=op, root=root, dtype=dtype)
                found[name] = rank.later(memory)
            gathered = empty.copy()
            rank.call("allgather", rank.write(mine), gathered, dtype=dtype)
            found["allgather"] = rank.later(gathered)
            scattered = empty[0].copy()
            rank.call(
                "reducescatter",
                rank.write(given(group.rank, (size, COUNT), dtype)),
                scattered,
                op=SUM,
                dtype=dtype,
            )
            found["reducescatter"] = rank.later(scattered)
            shifted = empty[0].copy()
            rank.call("transfer", rank.write(mine), shifted, root=to, source=of, dtype=dtype)
            found["sendrecv"] = rank.later(shifted)
            memory = rank.write(mine)
            if group.rank == 0:
                rank.call("transfer", memory, memory, root=size - 1, dtype=dtype)
            if group.rank == size - 1:
                rank.call("transfer", memory, memory, source=0, dtype=dtype)
            found["send and recv"] = rank.later(memory)
            itself = empty[0].copy()
            rank.call(
                "transfer",
                rank.write(mine),
                itself,
                root=group.rank,
                source=group.rank,
                dtype=dtype,
            )
            found["to itself"] = rank.later(itself)
            ranks.machine.synchronize(rank.stream)
            return {name: later[0] for name, later in found.items()}

        everyone = [given(rank, dtype=dtype) for rank in range(size)]
        lists = [given(rank, (size, COUNT), dtype) for rank in range(size)]
        for rank, found in enumerate(ranks.values(size, run)):
            np.testing.assert_array_equal(found["allreduce"], sum(everyone))
            np.testing.assert_array_equal(
                found["reduce"], sum(everyone) if rank == 1 else everyone[rank]
            )
            np.testing.assert_array_equal(found["broadcast"], everyone[size - 1])
            np.testing.assert_array_equal(found["allgather"], everyone)
            np.testing.assert_array_equal(found["reducescatter"], sum(lists)[rank])
            np.testing.assert_array_equal(found["sendrecv"], everyone[rank - 1])
            np.testing.assert_array_equal(
                found["send and recv"], everyone[0 if rank == size - 1 else rank]
            )
            np.testing.assert_array_equal(found["to itself"], everyone[rank])

    @pytest.mark.usefixtures("ranks_of_either_kind")
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
    def test_the_greatest_with_what_stands_in_for_floats(self, ranks: World, dtype: str) -> None:
        """Keys are made of the values, and values of the keys, on the stream of the computation."""
        everyone = [given(rank, (2, COUNT), dtype) for rank in range(2)]
        for rank, values in enumerate(everyone):
            values[:, rank] = np.nan
            values[:, 2 + rank] *= -1
        with np.errstate(invalid="ignore"):
            greatest = np.max(everyone, axis=0)

        def run(group: Group) -> tuple[Any, Any]:
            rank = Rank(group, ranks.machine)
            memory, scattered = rank.write(everyone[group.rank]), np.zeros(COUNT, everyone[0].dtype)
            rank.call("allreduce", memory, memory, op=int(ReduceOp.MAX), dtype=dtype)
            rank.call(
                "reducescatter",
                rank.write(everyone[group.rank]),
                scattered,
                op=int(ReduceOp.MAX),
                dtype=dtype,
            )
            found = rank.later(memory)
            return rank.read(scattered), found[0]

        for rank, (scattered, reduced) in enumerate(ranks.values(2, run)):
            np.testing.assert_array_equal(reduced.astype("float64"), greatest.astype("float64"))
            np.testing.assert_array_equal(
                scattered.astype("float64"), greatest[rank].astype("float64")
            )

    @pytest.mark.usefixtures("ranks_of_either_kind")
    def test_of_nothing(self, ranks: World) -> None:
        def run(group: Group) -> None:
            rank, nothing = Rank(group, ranks.machine), np.empty(0, np.float32)
            rank.call("allreduce", nothing, nothing, op=SUM)
            rank.call("allgather", nothing, nothing)
            memory = rank.write(given(group.rank))
            rank.call("allreduce", memory, memory, op=SUM)
            np.testing.assert_array_equal(rank.read(memory), given(0) + given(1))

        ranks.values(2, run)

    @pytest.mark.usefixtures("ranks_of_either_kind")
    def test_it_is_queued_and_the_host_goes_on(self, ranks: World) -> None:
        """Nothing of the group's, and no other stream, is behind a kernel of the computation that takes long."""

        def run(group: Group) -> Any:
            rank = Rank(group, ranks.machine)
            memory = rank.write(given(group.rank))
            rank.call("allreduce", memory, memory, op=SUM)  # connects
            release = ranks.machine.hold(rank.stream)
            memory = rank.write(given(group.rank))
            began = time.monotonic()
            rank.call("allreduce", memory, memory, op=SUM)
            found = rank.later(memory)
            assert time.monotonic() - began < 5
            time.sleep(0.05)
            assert found == []
            release.set()
            ranks.machine.synchronize(rank.stream)
            return found[0]

        for result in ranks.values(2, run):
            np.testing.assert_array_equal(result, given(0) + given(1))

    def test_it_is_on_the_stream_of_the_computation_alone(
        self, ranks: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        as_if_in_processes_of_their_own(monkeypatch)

        def run(group: Group) -> None:
            rank, used = Rank(group, ranks.machine), set()
            memory = rank.write(given(group.rank))
            rank.call("allreduce", memory, memory, op=SUM)  # connects
            communicator = ranks.spec.drivers[group.rank].made[0]
            reduce = communicator.allReduce
            communicator.allReduce = lambda *arguments: (
                used.add(arguments[-1]),
                reduce(*arguments),
            )
            rank.call("allreduce", memory, memory, op=SUM)
            assert used == {rank.stream}
            ranks.machine.synchronize(rank.stream)

        ranks.values(2, run)

    @pytest.mark.usefixtures("ranks_of_either_kind")
    def test_in_order_with_eager_calls_on_other_streams(self, ranks: World) -> None:
        """Calls of computations and eager ones alternate on memory that each call doubles, in the order of issue."""

        def run(group: Group) -> Any:
            rank = Rank(group, ranks.machine)
            memory = rank.write(given(group.rank))
            ranks.machine.synchronize(rank.stream)
            tensor = device.DeviceArray(memory)
            for turn in range(6):
                if turn % 2:
                    with device.use(device.new_stream(ranks.machine)):
                        group.allreduce(tensor, async_op=bool(turn % 4 == 3))
                else:
                    rank.call("allreduce", memory, memory, op=SUM)
            group.synchronize()
            return memory.copy()

        for result in ranks.values(2, run):
            np.testing.assert_array_equal(result, (given(0) + given(1)) * 2**5)

    def test_behind_asynchronous_calls_that_wait_for_their_turn(self, ranks: World) -> None:
        """The call of a computation comes while the group's worker has calls to make: it waits for its turn."""

        def run(group: Group) -> Any:
            rank = Rank(group, ranks.machine)
            memory = rank.write(given(group.rank))
            ranks.machine.synchronize(rank.stream)
            tensor, held = device.DeviceArray(memory), threading.Event()
            group._engine.queue.put(col.work.Work("busy", lambda: held.wait(20)))
            works = [
                group.broadcast(tensor, 1, async_op=True),
                group.allreduce(tensor, async_op=True),
            ]
            threading.Timer(0.2, held.set).start()
            rank.call("allreduce", memory, memory, op=SUM)
            assert held.is_set()
            found = rank.read(memory)
            assert all(work.done() for work in works)
            return found

        for result in ranks.values(2, run):
            np.testing.assert_array_equal(result, 4 * given(1))

    def test_groups_made_with_auto(self, ranks: World) -> None:
        """Host tensors keep their way; the device's backend is made by the first computation."""

        def run(group: Group) -> Any:
            rank = Rank(group, ranks.machine)
            memory = rank.write(given(group.rank))
            rank.call("allreduce", memory, memory, op=SUM)
            host = given(group.rank)
            group.allreduce(host)
            np.testing.assert_array_equal(host, given(0) + given(1))
            return rank.read(memory)

        for result in ranks.values(2, run, backend="auto"):
            np.testing.assert_array_equal(result, given(0) + given(1))

    def test_observers_see_the_calls(self, ranks: World) -> None:
        def run(group: Group) -> None:
            rank, mine = Rank(group, ranks.machine), given(group.rank)
            rank.call("allgather", rank.write(mine), np.zeros((2, COUNT), np.float32))
            rank.call(
                "reducescatter", rank.write(given(group.rank, (2, COUNT))), mine.copy(), op=SUM
            )
            rank.call(
                "transfer",
                rank.write(mine),
                mine.copy(),
                root=1 - group.rank,
                source=1 - group.rank,
            )
            ranks.machine.synchronize(rank.stream)

        seen: list[tuple[int, str, int]] = []

        def observe(operation: col.Operation) -> None:
            seen.append((operation.rank, operation.name, operation.nbytes))

        col.add_observer(observe)
        try:
            ranks.values(2, run)
        finally:
            col.remove_observer(observe)
        expected = [("allgather", 4 * COUNT), ("reducescatter", 8 * COUNT), ("sendrecv", 4 * COUNT)]
        assert [call for rank, *call in seen if rank == 0] == [list(call) for call in expected]
        assert len(seen) == 2 * len(expected)


class TestTargetFailures:
    """What XLA is told, and that nothing hangs."""

    def test_a_group_without_a_way_to_devices_says_so(self, ranks: World) -> None:
        def run(group: Group) -> None:
            rank = Rank(group, ranks.machine)
            memory = rank.write(given(group.rank))
            with pytest.raises(col.DeviceError, match=r"backend='nccl' .*'auto'"):
                rank.call("allreduce", memory, memory, op=SUM)

        ranks.values(2, run, backend="shm")

    def test_an_operand_apart_from_its_result(self, ranks: World) -> None:
        """The result would be of whatever is in its memory; the group goes on."""

        def run(group: Group) -> Any:
            rank = Rank(group, ranks.machine)
            memory = rank.write(given(group.rank))
            with pytest.raises(col.CollectiveError, match=r"\bJAX\b.*\bjax\.jit\b"):
                rank.call("allreduce", memory, np.zeros_like(memory), op=SUM)
            rank.call("allreduce", memory, memory, op=SUM)
            return rank.read(memory)

        for result in ranks.values(2, run):
            np.testing.assert_array_equal(result, given(0) + given(1))

    def test_a_group_that_is_gone(self, ranks: World) -> None:
        def run(group: Group) -> None:
            rank = Rank(group, ranks.machine)
            memory = rank.write(given(group.rank))
            group.barrier()
            group.destroy()
            with pytest.raises(col.GroupError, match=r"\bjit\b"):
                rank.call("allreduce", memory, memory, op=SUM)

        ranks.values(2, run)

    def test_ranks_that_differ_are_told_before_anything_is_queued(self, ranks: World) -> None:
        def run(group: Group) -> None:
            rank = Rank(group, ranks.machine)
            memory = rank.write(given(group.rank))
            with pytest.raises(col.MismatchError, match=r"\bMAX\b"):
                rank.call("allreduce", memory, memory, op=SUM if group.rank else int(ReduceOp.MAX))
            np.testing.assert_array_equal(rank.read(memory), given(group.rank))
            rank.call("allreduce", memory, memory, op=SUM)
            np.testing.assert_array_equal(rank.read(memory), given(0) + given(1))

        ranks.values(2, run, check=True)

    @pytest.mark.usefixtures("ranks_of_either_kind")
    def test_a_late_rank_is_named_by_what_comes_next(self, ranks: World) -> None:
        """The call had returned, so its stream runs on with what the memory holds; the host waits for nobody."""

        def run(group: Group) -> Any:
            rank = Rank(group, ranks.machine)
            memory = rank.write(given(group.rank))
            rank.call("allreduce", memory, memory, op=SUM)
            if group.rank == 1:
                time.sleep(3)
                return None
            began = time.monotonic()
            rank.call("allreduce", memory, memory, op=SUM)
            ranks.machine.synchronize(rank.stream)  # ended by the abort
            with pytest.raises(col.CollectiveError) as caught:
                group.synchronize()
            with pytest.raises(col.GroupError, match="rank 1"):
                rank.call("allreduce", memory, memory, op=SUM)
            assert time.monotonic() - began < 5
            return caught.value.__cause__ or caught.value

        error = ranks.values(2, run, timeout_s=1.0)[0]
        assert isinstance(error, col.CollectiveTimeoutError)
        assert error.ranks == (1,)

    def test_an_error_of_nccl_is_the_calls_own(self, ranks: World) -> None:
        def run(group: Group) -> None:
            rank = Rank(group, ranks.machine)
            memory = rank.write(given(group.rank))
            rank.call("allreduce", memory, memory, op=SUM)
            group.barrier()
            ranks.machine.refuses = device.NcclError("ncclInvalidArgument")
            with pytest.raises(col.errors.CollectiveError, match="ncclInvalidArgument"):
                rank.call("allreduce", memory, memory, op=SUM)

        ranks.values(2, run)
