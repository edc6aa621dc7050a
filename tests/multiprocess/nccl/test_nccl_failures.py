"""The nccl backend on a fake device: ranks that are late, dead or disagree; errors of NCCL and the device."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import device
import numpy as np
import pytest
from device import DeviceArray
from nccl_world import COUNT, World, on_device, values

import colltensor as col
from colltensor.control.connections import Connections
from colltensor.group import Group

pytestmark = pytest.mark.slow


def is_away(group: Group, tensor: DeviceArray, seconds: float) -> bool:
    """Connect the ranks; return True on rank 1, after seconds in which it calls nothing, False at once elsewhere."""
    group.allreduce(tensor)
    group.barrier()
    if group.rank == 1:
        time.sleep(seconds)
    return group.rank == 1


class TestFailures:
    """Nothing hangs; what failed is named; nothing goes on as if nothing had happened."""

    @pytest.mark.usefixtures("ranks_of_either_kind")
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
        assert (errors[0].__cause__ or errors[0]).ranks == (1,)

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

    @pytest.mark.usefixtures("ranks_of_either_kind")
    def test_an_error_of_nccl_ends_the_group_for_all(self, ranks: World) -> None:
        def run(group: Group) -> Any:
            tensor = on_device(group.rank)
            group.allreduce(tensor)
            group.barrier()
            release = ranks.machine.hold(device.current())
            if group.rank == 0:
                ranks.spec.drivers[0].made[0].error = device.NcclError("ncclSystemError")
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
            assert "ncclSystemError" in str(error)

    def test_nccl_waits_for_a_late_rank_inside_the_call(self, ranks: World) -> None:
        """As where it connects an algorithm's ranks: the abort ends the call, and the verdict is the watchdog's."""

        def run(group: Group) -> Any:
            tensor = on_device(group.rank)
            if is_away(group, tensor, 2.5):
                return None
            communicator = ranks.spec.drivers[0].made[0]

            def blocked(*arguments: int) -> None:
                while not communicator.aborted:
                    time.sleep(0.01)
                raise device.NcclError("ncclSystemError")

            def slow() -> None:
                abort()
                time.sleep(0.3)  # the call ends before the abort does

            abort, communicator.abort = communicator.abort, slow
            communicator.broadcast = blocked
            with pytest.raises(col.errors.CollectiveTimeoutError) as caught:
                group.broadcast(tensor)
            return caught.value

        assert ranks.values(2, run, timeout_s=1.0)[0].ranks == (1,)

    @pytest.mark.usefixtures("ranks_of_either_kind")
    def test_nccl_refuses_a_call(self, ranks: World) -> None:
        def run(group: Group) -> Any:
            tensor = on_device(group.rank)
            group.allreduce(tensor)
            group.barrier()
            ranks.machine.refuses = device.NcclError("ncclInvalidArgument")
            with pytest.raises(col.errors.CollectiveError, match="ncclInvalidArgument"):
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

    @pytest.mark.usefixtures("ranks_of_either_kind")
    def test_a_failure_while_a_call_is_queued(
        self, ranks: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
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
                made.error = device.NcclError("ncclSystemError")
                assert aborting.wait(10)
                refused.set()
                raise device.NcclError("ncclInvalidArgument")

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

        assert ranks.values(2, run)[0].ranks == (1,)

    @pytest.mark.usefixtures("ranks_of_either_kind")
    def test_an_error_of_the_device_ends_the_group_for_all(self, ranks: World) -> None:
        """Its events are never done; what it says of them names the cause long before the timeout."""

        def run(group: Group) -> Any:
            group.allreduce(on_device(group.rank))
            group.barrier()
            ranks.machine.hold(device.current())
            if group.rank == 0:
                ranks.machine.broken = RuntimeError("cudaErrorIllegalAddress")
            work = group.allreduce(on_device(group.rank), async_op=True)
            until = time.monotonic() + 10
            while not work.done():
                assert time.monotonic() < until
                time.sleep(0.01)
            with pytest.raises(col.errors.CollectiveError, match="cudaErrorIllegalAddress"):
                work.wait()

        ranks.values(2, run)

    def test_what_connects_too_late_is_ended(
        self, ranks: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
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
        glance = Connections.glance

        def slowly(connections: Connections) -> None:
            glance(connections)
            if threading.current_thread().name == "colltensor nccl watchdog":
                time.sleep(0.03)

        monkeypatch.setattr(Connections, "glance", slowly)

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
                group.sendrecv(
                    on_device(group.rank, count), (group.rank + 1) % 3, target, (group.rank - 1) % 3
                )
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
            with pytest.raises(col.errors.DeviceError, match=r"\bcuda:0 .*\bcuda:1\b"):
                group.allreduce([on_device(0), DeviceArray(np.zeros(3, np.float32), device=1)])
            with pytest.raises(col.errors.DeviceError, match=r"\bcpu\b"):
                group.allreduce([on_device(0), np.zeros(3, np.float32)])

        ranks.values(2, run)

    def test_synchronize(self, ranks: World) -> None:
        def run(group: Group) -> None:
            tensor = on_device(group.rank)
            release = ranks.machine.hold(device.current())
            group.allreduce(tensor)
            group.set_timeout(0.2)
            with pytest.raises(col.errors.CollectiveTimeoutError, match=r"synchronize.* 0\.2 s"):
                group.synchronize(0)
            group.synchronize(1)
            release.set()
            group.set_timeout(10.0)
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

    def test_memory_is_kept_until_the_communicators_are_ended(
        self, ranks: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """NCCL's kernel writes to it until the abort, also where nobody holds the tensor or the work any more."""
        monkeypatch.setattr("colltensor.backends.nccl.backend._CLOSE_TIMEOUT_S", 0.2)
        monkeypatch.setattr("colltensor.backends.nccl.watchdog._JOIN_S", 0.2)

        def run(group: Group) -> bool:
            group.allreduce(on_device(group.rank))
            group.barrier()
            if group.rank == 1:
                time.sleep(2)
                return True
            tensor = on_device(group.rank)
            alive = weakref.ref(tensor)
            made = ranks.spec.drivers[0].made[0]
            begun, may_end, found = threading.Event(), threading.Event(), []

            def abort() -> None:
                begun.set()
                assert may_end.wait(10)
                made.aborted = True
                found.append(alive() is not None)

            monkeypatch.setattr(made, "abort", abort)
            group.allreduce(tensor, async_op=True)
            del tensor
            group.destroy()
            gc.collect()
            assert begun.is_set()
            may_end.set()
            until = time.monotonic() + 10
            while alive() is not None or not found:
                assert time.monotonic() < until, "it is kept for ever"
                gc.collect()
                time.sleep(0.01)
            return found[0]

        assert all(ranks.values(2, run))

    def test_the_watcher_minds_no_other_threads_captures(self, ranks: World) -> None:
        def run(group: Group) -> list[str]:
            group.allreduce(on_device(group.rank))
            group.barrier()
            until = time.monotonic() + 10
            driver = ranks.spec.drivers[group.rank]
            while not driver.apart:
                assert time.monotonic() < until
                time.sleep(0.01)
            return driver.apart

        assert ranks.values(2, run) == [["colltensor nccl watchdog"]] * 2

    @pytest.mark.usefixtures("ranks_of_either_kind")
    def test_a_captured_stream_is_refused_and_the_group_goes_on(self, ranks: World) -> None:
        def run(group: Group) -> np.ndarray:
            tensor = on_device(group.rank)
            for _ in range(2):  # before the ranks are connected, and after
                ranks.machine.captured.add(device.current())
                with pytest.raises(col.errors.DeviceError, match="CUDA graph"):
                    group.allreduce(tensor)
                ranks.machine.captured.discard(device.current())
                group.allreduce(tensor)
            return tensor.read()

        for result in ranks.values(2, run):
            np.testing.assert_array_equal(result, 2 * (values(0) + values(1)))

    def test_a_timeout_that_was_set_holds_for_the_calls_that_follow(self, ranks: World) -> None:
        def run(group: Group) -> Any:
            tensor = on_device(group.rank)
            if is_away(group, tensor, 4):
                return None
            group.set_timeout(0.5)
            began = time.monotonic()
            group.allreduce(tensor)
            while group.broken is None:
                assert time.monotonic() - began < 4
                time.sleep(0.01)
            return type(group.broken)

        assert ranks.values(2, run)[0] is col.CollectiveTimeoutError

    def test_the_first_call_after_a_failure_raises_what_happened(self, ranks: World) -> None:
        def run(group: Group) -> Any:
            tensor = on_device(group.rank)
            if is_away(group, tensor, 3):
                return None
            group.allreduce(tensor)
            while group.broken is None:
                time.sleep(0.01)
            found = []
            for call in (lambda: group.allreduce(tensor), group.synchronize):
                with pytest.raises(col.CollectiveError) as caught:
                    call()
                found.append(type(caught.value))
            return found

        assert ranks.values(2, run, timeout_s=1.0)[0] == [
            col.CollectiveTimeoutError,
            col.GroupError,
        ]

    def test_a_transfer_between_devices_is_refused_by_name(self, ranks: World) -> None:
        def run(group: Group) -> None:
            there = DeviceArray(np.zeros(COUNT, np.float32), device=1)
            peer = 1 - group.rank
            with pytest.raises(col.DeviceError, match="sendrecv: recv_tensor"):
                group.sendrecv(on_device(0), peer, there, peer)
            with pytest.raises(col.DeviceError, match="sendrecv: recv_tensor"):
                group.sendrecv(on_device(0), peer, np.zeros(COUNT, np.float32), peer)

        ranks.values(2, run)

    def test_what_this_rank_alone_refuses_is_refused_before_the_ranks_agree(
        self, ranks: World
    ) -> None:
        def run(group: Group) -> np.ndarray:
            tensor = on_device(group.rank)
            group.allreduce(tensor)
            if group.rank == 0:
                ranks.machine.captured.add(device.current())
                with pytest.raises(col.DeviceError, match="CUDA graph"):
                    group.allreduce(tensor)
                ranks.machine.captured.discard(device.current())
                with pytest.raises(col.DeviceError, match=r"\bcuda:1\b.*\bcuda:0\b"):
                    group.allreduce(DeviceArray(values(0), device=1))
            return group.allreduce(tensor).read()

        for result in ranks.values(2, run, check=True, timeout_s=5.0):
            np.testing.assert_array_equal(result, 2 * (values(0) + values(1)))

    @pytest.mark.parametrize("async_op", [False, True])
    def test_an_interrupt_reaches_the_caller(
        self, ranks: World, monkeypatch: pytest.MonkeyPatch, async_op: bool
    ) -> None:
        def interrupted(*arguments: Any) -> None:
            raise KeyboardInterrupt

        def run(group: Group) -> Any:
            tensor = on_device(group.rank)
            group.allreduce([tensor, on_device(0)])
            monkeypatch.setattr(ranks.spec.drivers[0].made[0], "allReduce", interrupted)
            with pytest.raises(KeyboardInterrupt):
                group.allreduce([tensor, on_device(0)], async_op=async_op)
            assert group.broken is not None
            backend: Any = group._engine.device
            return backend._left, backend._pending

        assert ranks.values(1, run) == [([], [])]

    def test_a_forked_childs_destroy_leaves_the_communicators_alone(self, ranks: World) -> None:
        def run(group: Group) -> np.ndarray:
            tensor = on_device(group.rank)
            group.allreduce(tensor)
            group._devices.disown()  # as in the child
            group.destroy()
            assert not ranks.spec.drivers[group.rank].made[0].aborted
            return tensor.read()

        for result in ranks.values(2, run):
            np.testing.assert_array_equal(result, values(0) + values(1))


LEFT = """
import sys, time
sys.path[:0] = {path!r}
import device
import colltensor as col
from colltensor import adapters, backends
from colltensor.backends.nccl import backend
from nccl_world import Spec, on_device

machine = device.Machine(1)
device.enter(machine)
spec = Spec(machine)
backends._registered = {{"nccl": spec}}
adapters._registered[:] = [device.DeviceAdapter()]
backend._CLOSE_TIMEOUT_S = 2.0
group = col.init_collective_group(1, 0, "nccl", "left")
tensor = on_device(0)
group.allreduce(tensor)
made, stream = spec.drivers[0].made[0], device.current()
made.abort = lambda: print("ended", tensor.bumps, flush=True)
machine.queue(stream, lambda: time.sleep(0.3)) if {how!r} == "ends" else machine.hold(stream)
machine.queue(stream, lambda: print("done", flush=True))
group.allreduce(tensor)
made.error = device.NcclError("a peer is gone") if {how!r} == "fails" else None
"""


class TestExit:
    """A process that ends without ``destroy()``: its communicators are ended, not left to the interpreter's end."""

    @pytest.mark.parametrize("how", ["ends", "hangs", "fails"])
    def test_what_is_queued_is_waited_for_and_the_communicators_are_ended(self, how: str) -> None:
        here = Path(__file__).resolve().parent
        script = LEFT.format(path=[str(here), str(here.parent.parent)], how=how)
        ended = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
        )
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout.split() == (["done", "ended", "2"] if how == "ends" else ["ended", "2"])
