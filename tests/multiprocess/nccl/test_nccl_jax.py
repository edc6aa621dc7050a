"""Collectives of computations on CUDA devices, without one: what is emitted, the target, and both in a jitted function.

What JAX emits for CUDA is read as text. The target is called as XLA would, on a device of pretence; and XLA for the CPU
calls it inside of ``jax.jit``, where it waits for the stream after each call, because XLA has none of its own there.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import device
import numpy as np
import pytest
from nccl_world import World, as_if_in_processes_of_their_own

import colltensor as col
from colltensor import ReduceOp, adapters, dlpack
from colltensor.backends.base import DIRECT
from colltensor.backends.shm import library
from colltensor.group import Group
from colltensor.types import DTYPES

pytestmark = [pytest.mark.needs("jax"), pytest.mark.shm, pytest.mark.skipif(
    sys.version_info < (3, 11), reason="jax-tvm-ffi has no wheel for Python 3.10"
)]

COUNT = 12
NO_OP, NO_RANK = 255, -1
SUM = int(ReduceOp.SUM)
PRETENCE = "colltensor_on_a_device_of_pretence"


def _jax() -> tuple[Any, Any, Any]:
    jax = importlib.import_module("jax")
    return jax, jax.numpy, importlib.import_module("colltensor.jax")


def _inside(name: str) -> Any:
    return importlib.import_module(f"colltensor.jax._{name}")


@pytest.fixture(autouse=True)
def known(ranks: World) -> None:
    """Register the targets, and their adapter among the world's own."""
    _jax()
    _inside("targets").register()
    adapters._registered.append(_inside("device").ADAPTER)


def given(rank: int, shape: tuple[int, ...] = (COUNT,), dtype: str = "float32") -> Any:
    numbers = np.arange(int(np.prod(shape))).reshape(shape) % 7 + 10 * rank + 1
    return numbers.astype(np.dtype(getattr(importlib.import_module("ml_dtypes"), dtype, dtype)))


def programs(cj: Any, group: Group) -> dict[str, tuple[Callable[[Any], Any], bool, str]]:
    """Return each collective, whether its result has the operand's memory, and its name in the native library."""
    other = 1 - group.rank
    return {
        "allreduce": (lambda a: cj.allreduce(a, group), True, "allreduce"),
        "reduce": (lambda a: cj.reduce(a, 1, group), True, "reduce"),
        "broadcast": (lambda a: cj.broadcast(a, 1, group), True, "broadcast"),
        "allgather": (lambda a: cj.allgather(a, group), False, "allgather"),
        "reducescatter": (lambda a: cj.reducescatter(a, group), False, "reducescatter"),
        "send": (lambda a: cj.send(a, other, group), True, "transfer"),
        "recv": (lambda a: cj.recv(a, other, group), True, "transfer"),
        "sendrecv": (lambda a: cj.sendrecv(a, other, other, group), False, "transfer"),
    }


def emitted(function: Callable[[Any], Any], x: Any, *platforms: str) -> str:
    jax, _, _ = _jax()
    text: str = jax.jit(function).trace(x).lower(lowering_platforms=platforms).as_text()
    return text


def calls(text: str) -> list[tuple[str, str, str, str]]:
    """Return of each call the name of its results, the operand, the token, and the rest."""
    found = re.findall(r"%(\w+):2 = stablehlo\.custom_call @colltensor\(%([\w#]+), %([\w#]+)\) (\{.*)", text)
    assert len(found) == text.count("custom_call @colltensor"), text
    return found


class TestEmitted:
    """What JAX emits for CUDA, read on a machine that has none."""

    def test_every_collective_calls_the_target(self, ranks: World) -> None:
        def run(group: Group) -> None:
            _, jnp, cj = _jax()
            for name, (function, aliased, operation) in programs(cj, group).items():
                text = emitted(function, jnp.ones((2, 3), "bfloat16"), "cuda")
                ((_, _, token, rest),) = calls(text)
                assert token == "arg0", name  # the order enters and leaves the computation
                assert "has_side_effect = true" in rest
                assert ("output_operand_alias<output_tuple_indices = [0], operand_index = 0" in rest) == aliased, name
                assert f"operation = {DIRECT[operation]} : i64" in rest
                assert f"dtype = {DTYPES['bfloat16'].code} : i64" in rest
                assert f"itemsize = {DTYPES['bfloat16'].itemsize} : i64" in rest
                assert f"number = {_inside('groups').number_of(group)} : i64" in rest

        ranks.values(2, run)

    def test_it_is_what_is_emitted_for_the_cpu(self, ranks: World) -> None:
        """Under each transformation, of each collective that has it: one primitive, one form of call."""

        def run(group: Group) -> None:
            jax, jnp, cj = _jax()
            x = jnp.ones((2, 2, 3))

            def scanned(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
                return lambda a: jax.lax.scan(lambda carry, row: (carry + function(row).sum(), None), 0.0, a)[0]

            wrappers: dict[str, Callable[[Callable[[Any], Any]], Callable[[Any], Any]]] = {
                "plain": lambda f: f,
                "ordered": cj.ordered,
                "vmap": jax.vmap,
                "grad": lambda f: jax.grad(lambda a: f(a).sum()),
                "scan": scanned,
                "grad of scan, ordered": lambda f: cj.ordered(jax.grad(scanned(f))),
                "cond": lambda f: lambda a: jax.lax.cond(a.sum() > 0, lambda b: f(b).sum(), lambda b: b.sum(), a),
            }
            for name, (function, _, _) in programs(cj, group).items():
                for how, wrap in wrappers.items():
                    on_device, on_host = (emitted(wrap(function), x, platform) for platform in ("cuda", "cpu"))
                    assert calls(on_device), (name, how)
                    assert on_device == on_host, (name, how)

        ranks.values(2, run)

    def test_a_token_goes_from_call_to_call(self, ranks: World) -> None:
        def run(group: Group) -> None:
            _, jnp, cj = _jax()

            def three(a: Any) -> Any:
                return cj.allreduce(a, group), cj.broadcast(2 * a, 1, group), cj.allgather(3 * a, group)

            for function in (three, cj.ordered(three)):
                first, second, third = calls(emitted(function, jnp.ones(3), "cuda"))
                assert first[2].startswith("arg")
                assert second[2] == f"{first[0]}#1"
                assert third[2] == f"{second[0]}#1"

        ranks.values(2, run)

    def test_for_both_platforms_at_once(self, ranks: World) -> None:
        def run(group: Group) -> None:
            _, jnp, cj = _jax()
            text = emitted(lambda a: cj.allreduce(a, group), jnp.ones(3), "cpu", "cuda")
            assert len(calls(text)) == 2
            assert "stablehlo.case" in text

        ranks.values(2, run)

    def test_what_nccl_lacks_is_refused_when_it_is_compiled(self, ranks: World) -> None:
        def run(group: Group) -> None:
            _, jnp, cj = _jax()
            x = jnp.ones(3, "int16")
            assert calls(emitted(lambda a: cj.allreduce(a, group), x, "cpu"))
            assert calls(emitted(lambda a: cj.broadcast(a, 1, group), x, "cuda"))
            for function in (lambda a: cj.allreduce(a, group), lambda a: cj.reducescatter(jnp.stack([a, a]), group)):
                with pytest.raises(col.UnsupportedDTypeError, match=r"NCCL has no \w+ with op=SUM of int16"):
                    emitted(function, x, "cuda")

        ranks.values(2, run)

    def test_several_devices_are_refused(self, ranks: World) -> None:
        def run(group: Group) -> None:
            jax, jnp, cj = _jax()
            sharding = jax.sharding  # of the mesh's axes JAX 0.12 would take what it is not told for explicit ones
            mesh = sharding.AbstractMesh((2,), ("i",), axis_types=(sharding.AxisType.Auto,))
            parts = sharding.PartitionSpec("i")
            both = jax.shard_map(
                cj.ordered(lambda a: cj.allreduce(a, group)), mesh=mesh, in_specs=parts, out_specs=parts,
                check_vma=False,
            )
            with pytest.raises(col.DeviceError, match="one device of a process"):
                emitted(both, jax.ShapeDtypeStruct((4,), jnp.float32), "cuda")

        ranks.values(2, run)

    def test_a_group_of_one_rank_has_nothing_to_call(self) -> None:
        _, jnp, cj = _jax()
        group = col.init_collective_group(1, 0, group_name="alone on a device")
        try:
            for function in (
                lambda a: cj.allreduce(a, group), lambda a: cj.allgather(a, group),
                lambda a: cj.reducescatter(a, group), lambda a: cj.sendrecv(a, 0, 0, group),
            ):
                for wrap in (lambda f: f, cj.ordered):
                    x = jnp.ones((1, 3))
                    assert "custom_call" not in emitted(wrap(function), x, "cuda")
                    assert "custom_call" in emitted(wrap(function), x, "cpu")
        finally:
            group.destroy()


class Rank:
    """One rank's side of direct calls of the target: its stream, and what the memory of a call is."""

    def __init__(self, group: Group, machine: device.Machine) -> None:
        self.group = group
        self.machine = machine
        self.stream = device.new_stream(machine)
        self.number = _inside("groups").number_of(group)

    def write(self, values: Any) -> Any:
        """Return memory that gets its values only when the stream comes to them, over other ones until then."""
        memory = np.full_like(values, 77)
        self.machine.kept.append(memory)
        self.machine.queue(self.stream, lambda: memory.__setitem__(..., values))
        return memory

    def call(
        self, name: str, operand: Any, result: Any, *, op: int = NO_OP, root: int = NO_RANK, source: int = NO_RANK,
        dtype: str | None = None,
    ) -> None:
        self.machine.kept += [operand, result]
        _inside("targets").queue(
            self.number, DTYPES[dtype or str(operand.dtype)].code, DIRECT[name], op, root, source, self.stream, 0,
            operand.ctypes.data, operand.nbytes, result.ctypes.data, result.nbytes,
        )

    def later(self, memory: Any) -> list[Any]:
        """Queue reading memory."""
        found: list[Any] = []
        self.machine.queue(self.stream, lambda: found.append(memory.copy()))
        return found

    def read(self, memory: Any) -> Any:
        found = self.later(memory)
        self.machine.synchronize(self.stream)
        return found[0]


@pytest.fixture(params=["processes", "threads"])
def ranks_of_either_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "processes":
        as_if_in_processes_of_their_own(monkeypatch)


class TestTarget:
    """The target as XLA calls it, on a device of pretence."""

    @pytest.mark.usefixtures("ranks_of_either_kind")
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64", "uint8"])
    def test_every_collective(self, ranks: World, size: int, dtype: str) -> None:
        def run(group: Group) -> dict[str, Any]:
            rank, found = Rank(group, ranks.machine), {}
            mine = given(group.rank, dtype=dtype)
            empty = np.zeros((size, COUNT), mine.dtype)
            to, of = (group.rank + 1) % size, (group.rank - 1) % size
            for name, op, root in (("allreduce", SUM, NO_RANK), ("reduce", SUM, 1), ("broadcast", NO_OP, size - 1)):
                memory = rank.write(mine)
                rank.call(name, memory, memory, op=op, root=root, dtype=dtype)
                found[name] = rank.later(memory)
            gathered = empty.copy()
            rank.call("allgather", rank.write(mine), gathered, dtype=dtype)
            found["allgather"] = rank.later(gathered)
            scattered = empty[0].copy()
            rank.call("reducescatter", rank.write(given(group.rank, (size, COUNT), dtype)), scattered, op=SUM,
                      dtype=dtype)
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
            rank.call("transfer", rank.write(mine), itself, root=group.rank, source=group.rank, dtype=dtype)
            found["to itself"] = rank.later(itself)
            ranks.machine.synchronize(rank.stream)
            return {name: later[0] for name, later in found.items()}

        everyone = [given(rank, dtype=dtype) for rank in range(size)]
        lists = [given(rank, (size, COUNT), dtype) for rank in range(size)]
        for rank, found in enumerate(ranks.values(size, run)):
            np.testing.assert_array_equal(found["allreduce"], sum(everyone))
            np.testing.assert_array_equal(found["reduce"], sum(everyone) if rank == 1 else everyone[rank])
            np.testing.assert_array_equal(found["broadcast"], everyone[size - 1])
            np.testing.assert_array_equal(found["allgather"], everyone)
            np.testing.assert_array_equal(found["reducescatter"], sum(lists)[rank])
            np.testing.assert_array_equal(found["sendrecv"], everyone[rank - 1])
            np.testing.assert_array_equal(found["send and recv"], everyone[0 if rank == size - 1 else rank])
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
            rank.call("reducescatter", rank.write(everyone[group.rank]), scattered, op=int(ReduceOp.MAX), dtype=dtype)
            found = rank.later(memory)
            return rank.read(scattered), found[0]

        for rank, (scattered, reduced) in enumerate(ranks.values(2, run)):
            np.testing.assert_array_equal(reduced.astype("float64"), greatest.astype("float64"))
            np.testing.assert_array_equal(scattered.astype("float64"), greatest[rank].astype("float64"))

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
            communicator.allReduce = lambda *arguments: (used.add(arguments[-1]), reduce(*arguments))
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
            works = [group.broadcast(tensor, 1, async_op=True), group.allreduce(tensor, async_op=True)]
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
            rank.call("reducescatter", rank.write(given(group.rank, (2, COUNT))), mine.copy(), op=SUM)
            rank.call("transfer", rank.write(mine), mine.copy(), root=1 - group.rank, source=1 - group.rank)
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
            with pytest.raises(col.DeviceError, match="make the group with backend='nccl' or 'auto'"):
                rank.call("allreduce", memory, memory, op=SUM)

        ranks.values(2, run, backend="shm")

    def test_an_operand_apart_from_its_result(self, ranks: World) -> None:
        """The result would be of whatever is in its memory; the group goes on."""

        def run(group: Group) -> Any:
            rank = Rank(group, ranks.machine)
            memory = rank.write(given(group.rank))
            with pytest.raises(col.CollectiveError, match="do not fit each other"):
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
            with pytest.raises(col.GroupError, match="jit the function anew"):
                rank.call("allreduce", memory, memory, op=SUM)

        ranks.values(2, run)

    def test_ranks_that_differ_are_told_before_anything_is_queued(self, ranks: World) -> None:
        def run(group: Group) -> None:
            rank = Rank(group, ranks.machine)
            memory = rank.write(given(group.rank))
            with pytest.raises(col.MismatchError, match=r"disagree|differ"):
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
            ranks.machine.refuses = device.NcclError("invalid argument")
            with pytest.raises(col.errors.CollectiveError, match="invalid argument"):
                rank.call("allreduce", memory, memory, op=SUM)

        ranks.values(2, run)


@functools.lru_cache(maxsize=1)
def _pretend() -> None:
    """Make the target of devices one of XLA's for the CPU, under a name of its own."""
    targets = _inside("targets")
    native = library.load()
    targets._make_known(
        importlib.import_module("jax_tvm_ffi"), native, PRETENCE,
        native.shm_jax_device_target(dlpack.tvm_ffi().convert(_as_on_a_device)), "cpu", on_device=True,
    )


_ranks: dict[int, Rank] = {}
"""By the number of the group."""


def _as_on_a_device(number: int, *rest: int) -> None:
    """Call the target on the stream of the group's rank; its memory is ready for XLA afterwards."""
    rank = _ranks[number]
    device._LOCAL.machine = rank.machine
    arguments = list(rest)
    assert arguments[5:7] == [0, 0], "the stream and device of a host"
    arguments[5] = rank.stream
    _inside("targets").queue(number, *arguments)
    rank.machine.synchronize(rank.stream)


@pytest.fixture
def in_jit(monkeypatch: pytest.MonkeyPatch, ranks: World) -> Iterator[Callable[[Group], Rank]]:
    """Return what makes a rank whose jitted collectives call the target of devices."""
    _pretend()
    jax, _, _ = _jax()
    monkeypatch.setattr(_inside("targets"), "TARGET", PRETENCE)

    def enter(group: Group) -> Rank:
        rank = Rank(group, ranks.machine)
        _ranks[rank.number] = rank
        return rank

    with jax.default_device(jax.devices("cpu")[0]):
        yield enter
    _ranks.clear()


class TestInsideJit:
    """XLA itself calls the target: attributes, tokens, aliases and errors go through its call frame."""

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64", "bool"])
    def test_every_collective(self, ranks: World, in_jit: Callable[[Group], Rank], size: int, dtype: str) -> None:
        def run(group: Group) -> list[Any]:
            jax, jnp, cj = _jax()
            in_jit(group)
            to, of = (group.rank + 1) % size, (group.rank - 1) % size

            def program(a: Any, rows: Any) -> Any:
                sent = cj.send(a, size - 1, group) if group.rank == 0 else a
                received = cj.recv(a, 0, group) if group.rank == size - 1 else sent
                return (
                    cj.allreduce(a, group), cj.reduce(a, 1, group), cj.broadcast(a, size - 1, group),
                    cj.allgather(a, group), cj.reducescatter(rows, group), cj.sendrecv(a, to, of, group), received,
                )

            x, rows = jnp.asarray(given(group.rank, (3, 4), dtype)), jnp.asarray(given(group.rank, (size, 5), dtype))
            for function in (program, cj.ordered(program)):
                found = [np.asarray(y) for y in jax.jit(function)(x, rows)]
                np.testing.assert_array_equal(x, given(group.rank, (3, 4), dtype))
            return found

        everyone = [given(rank, (3, 4), dtype) for rank in range(size)]
        lists = [given(rank, (size, 5), dtype) for rank in range(size)]
        total, sums = (np.any(everyone, 0), np.any(lists, 0)) if dtype == "bool" else (sum(everyone), sum(lists))
        for rank, found in enumerate(ranks.values(size, run)):
            expected = [
                total, total if rank == 1 else everyone[rank], everyone[size - 1], np.stack(everyone), sums[rank],
                everyone[rank - 1], everyone[0 if rank == size - 1 else rank],
            ]
            for y, wanted in zip(found, expected, strict=True):
                np.testing.assert_array_equal(y, wanted)

    def test_loops_and_derivatives(self, ranks: World, in_jit: Callable[[Group], Rank]) -> None:
        def run(group: Group) -> None:
            jax, jnp, cj = _jax()
            in_jit(group)
            x = jnp.asarray(given(group.rank, (3, 4)))
            total = given(0, (3, 4)) + given(1, (3, 4))

            def summed(a: Any) -> Any:
                return jax.lax.scan(lambda carry, row: (carry + cj.allreduce(row, group) ** 2, None), a[0], a)[0].sum()

            for wrap in (lambda f: f, cj.ordered):
                assert np.allclose(jax.jit(jax.vmap(wrap(lambda a: cj.allreduce(a, group))))(x), total)
                expected = 4 * total
                expected[0] += 1
                assert np.allclose(jax.jit(jax.grad(wrap(summed)))(x), expected)

        ranks.values(2, run)

    def test_a_donated_argument_keeps_its_memory(self, ranks: World, in_jit: Callable[[Group], Rank]) -> None:
        def run(group: Group) -> None:
            jax, jnp, cj = _jax()
            in_jit(group)
            x = (jnp.zeros(1000) + group.rank + 1).block_until_ready()
            pointer = x.unsafe_buffer_pointer()
            y = jax.jit(lambda a: cj.allreduce(a, group), donate_argnums=0)(x)
            assert y.unsafe_buffer_pointer() == pointer
            np.testing.assert_array_equal(y, np.full(1000, 3.0))

        ranks.values(2, run)

    def test_in_order_with_eager_calls_of_the_thread(
        self, ranks: World, in_jit: Callable[[Group], Rank]
    ) -> None:
        """The other rank calls in the order of the program: an eager call that went first would make wrong pairs."""

        def run(group: Group) -> Any:
            jax, jnp, cj = _jax()
            rank = in_jit(group)

            def slow(a: Any, value: Any) -> Any:
                late = 0 * jax.lax.fori_loop(0, 40, lambda _, y: y @ y / 512, a)[0, 0]
                return cj.allreduce(jnp.full(COUNT, value) + late, group)

            if group.rank == 1:
                arrays = [rank.write(np.full(COUNT, value, np.float32)) for value in (5.0, 1.0, 10.0, 100.0)]
                ranks.machine.synchronize(rank.stream)
                for array in arrays:
                    with device.use(rank.stream):
                        group.allreduce(device.DeviceArray(array))
                ranks.machine.synchronize(rank.stream)
                return [array[0] for array in arrays]
            step, square = jax.jit(slow), jnp.ones((512, 512))
            connected = step(square, 5.0)
            first = step(square, 1.0)
            eager = rank.write(np.full(COUNT, 10, np.float32))
            with device.use(rank.stream):
                group.allreduce(device.DeviceArray(eager))
            second = step(square, 100.0)
            return [float(connected[0]), float(first[0]), rank.read(eager)[0], float(second[0])]

        assert ranks.values(2, run) == [[10.0, 2.0, 20.0, 200.0]] * 2

    def test_synchronize_waits_for_computations_that_xla_has_not_begun(
        self, ranks: World, in_jit: Callable[[Group], Rank]
    ) -> None:
        def run(group: Group) -> None:
            jax, jnp, cj = _jax()
            in_jit(group)

            def slow(a: Any) -> Any:
                late = jax.lax.fori_loop(0, 40, lambda _, y: y @ y / 512, a)[0, 0]
                return cj.allreduce(jnp.full(COUNT, late), group)

            step, square = jax.jit(slow), jnp.ones((512, 512))
            step(square).block_until_ready()
            before = len(ranks.machine.calls)
            step(square)
            group.synchronize()
            assert [rank for rank, _ in ranks.machine.calls[before:]].count(group.rank) == 1

        ranks.values(2, run)

    def test_errors_have_the_words_of_eager_ones(self, ranks: World, in_jit: Callable[[Group], Rank]) -> None:
        def run(group: Group) -> None:
            jax, jnp, cj = _jax()
            in_jit(group)
            op = ReduceOp.SUM if group.rank else ReduceOp.MAX
            step = jax.jit(lambda a: cj.allreduce(a, group))
            assert float(step(jnp.ones(COUNT))[0]) == 2
            with pytest.raises(jax.errors.JaxRuntimeError, match=r"disagree|differ"):
                jax.jit(lambda a: cj.allreduce(a, group, op))(jnp.ones(COUNT)).block_until_ready()
            cj.forget_failures()
            assert float(step(jnp.ones(COUNT))[0]) == 2
            group.barrier()
            ranks.machine.refuses = device.NcclError("invalid argument")
            with pytest.raises(jax.errors.JaxRuntimeError, match="invalid argument"):
                step(jnp.ones(COUNT)).block_until_ready()
            with pytest.raises(col.GroupError, match="invalid argument"):
                group.synchronize()

        ranks.values(2, run, check=True)

    def test_a_late_rank_does_not_leave_the_host_hanging(
        self, ranks: World, in_jit: Callable[[Group], Rank]
    ) -> None:
        def run(group: Group) -> Any:
            jax, jnp, cj = _jax()
            in_jit(group)
            step = jax.jit(lambda a: cj.allreduce(a, group))
            assert float(step(jnp.ones(COUNT))[0]) == 2
            if group.rank == 1:
                time.sleep(3)
                return None
            began = time.monotonic()
            step(jnp.ones(COUNT)).block_until_ready()  # undefined: the communicators were ended
            with pytest.raises(col.CollectiveError) as caught:
                group.synchronize()
            with pytest.raises(jax.errors.JaxRuntimeError, match="rank 1"):
                step(jnp.ones(COUNT)).block_until_ready()
            assert time.monotonic() - began < 5
            return caught.value.__cause__ or caught.value

        error = ranks.values(2, run, timeout_s=1.0)[0]
        assert isinstance(error, col.CollectiveTimeoutError)
        assert error.ranks == (1,)
