"""Collectives of computations on CUDA devices, without one: what is emitted, and the target in a jitted function.

What JAX emits for CUDA is read as text. XLA for the CPU calls the target inside of ``jax.jit``, where it waits for the
stream after each call, because XLA has none of its own there.
"""

from __future__ import annotations

import functools
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import device
import numpy as np
import pytest
from nccl_jax import COUNT, Rank, given, inside, jax_modules
from nccl_world import World

import colltensor as col
from colltensor import ReduceOp, dlpack
from colltensor.backends.shm import library
from colltensor.group import Group
from colltensor.operations import NATIVE
from colltensor.types import DTYPES

pytestmark = [
    pytest.mark.needs("jax"),
    pytest.mark.shm,
    pytest.mark.usefixtures("jax_targets"),
    pytest.mark.skipif(
        sys.version_info < (3, 11), reason="jax-tvm-ffi has no wheel for Python 3.10"
    ),
]

FAKE = "colltensor_on_a_fake_device"


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
    jax, _, _ = jax_modules()
    text: str = jax.jit(function).trace(x).lower(lowering_platforms=platforms).as_text()
    return text


def calls(text: str) -> list[tuple[str, str, str, str]]:
    """Return of each call the name of its results, the operand, the token, and the rest."""
    found = re.findall(
        r"%(\w+):2 = stablehlo\.custom_call @colltensor\(%([\w#]+), %([\w#]+)\) (\{.*)", text
    )
    assert len(found) == text.count("custom_call @colltensor"), text
    return found


class TestEmitted:
    """What JAX emits for CUDA, read on a machine that has none."""

    def test_every_collective_calls_the_target(self, ranks: World) -> None:
        def run(group: Group) -> None:
            _, jnp, cj = jax_modules()
            for name, (function, aliased, operation) in programs(cj, group).items():
                text = emitted(function, jnp.ones((2, 3), "bfloat16"), "cuda")
                ((_, _, token, rest),) = calls(text)
                assert token == "arg0", name  # the order enters and leaves the computation
                assert "has_side_effect = true" in rest
                assert (
                    "output_operand_alias<output_tuple_indices = [0], operand_index = 0" in rest
                ) == aliased, name
                assert f"operation = {NATIVE[operation]} : i64" in rest
                assert f"dtype = {DTYPES['bfloat16'].code} : i64" in rest
                assert f"itemsize = {DTYPES['bfloat16'].itemsize} : i64" in rest
                assert f"number = {inside('groups').number_of(group)} : i64" in rest

        ranks.values(2, run)

    def test_it_is_what_is_emitted_for_the_cpu(self, ranks: World) -> None:
        """Under each transformation, of each collective that has it: one primitive, one form of call."""

        def run(group: Group) -> None:
            jax, jnp, cj = jax_modules()
            x = jnp.ones((2, 2, 3))

            def scanned(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
                return lambda a: jax.lax.scan(
                    lambda carry, row: (carry + function(row).sum(), None), 0.0, a
                )[0]

            wrappers: dict[str, Callable[[Callable[[Any], Any]], Callable[[Any], Any]]] = {
                "plain": lambda f: f,
                "ordered": cj.ordered,
                "vmap": jax.vmap,
                "grad": lambda f: jax.grad(lambda a: f(a).sum()),
                "scan": scanned,
                "grad of scan, ordered": lambda f: cj.ordered(jax.grad(scanned(f))),
                "cond": lambda f: (
                    lambda a: jax.lax.cond(a.sum() > 0, lambda b: f(b).sum(), lambda b: b.sum(), a)
                ),
            }
            for name, (function, _, _) in programs(cj, group).items():
                for how, wrap in wrappers.items():
                    on_device, on_host = (
                        emitted(wrap(function), x, platform) for platform in ("cuda", "cpu")
                    )
                    assert calls(on_device), (name, how)
                    assert on_device == on_host, (name, how)

        ranks.values(2, run)

    def test_a_token_goes_from_call_to_call(self, ranks: World) -> None:
        def run(group: Group) -> None:
            _, jnp, cj = jax_modules()

            def three(a: Any) -> Any:
                return (
                    cj.allreduce(a, group),
                    cj.broadcast(2 * a, 1, group),
                    cj.allgather(3 * a, group),
                )

            for function in (three, cj.ordered(three)):
                first, second, third = calls(emitted(function, jnp.ones(3), "cuda"))
                assert first[2].startswith("arg")
                assert second[2] == f"{first[0]}#1"
                assert third[2] == f"{second[0]}#1"

        ranks.values(2, run)

    def test_for_both_platforms_at_once(self, ranks: World) -> None:
        def run(group: Group) -> None:
            _, jnp, cj = jax_modules()
            text = emitted(lambda a: cj.allreduce(a, group), jnp.ones(3), "cpu", "cuda")
            assert len(calls(text)) == 2
            assert "stablehlo.case" in text

        ranks.values(2, run)

    def test_what_nccl_lacks_is_refused_when_it_is_compiled(self, ranks: World) -> None:
        def run(group: Group) -> None:
            _, jnp, cj = jax_modules()
            x = jnp.ones(3, "int16")
            assert calls(emitted(lambda a: cj.allreduce(a, group), x, "cpu"))
            assert calls(emitted(lambda a: cj.broadcast(a, 1, group), x, "cuda"))
            for function in (
                lambda a: cj.allreduce(a, group),
                lambda a: cj.reducescatter(jnp.stack([a, a]), group),
            ):
                with pytest.raises(col.UnsupportedDTypeError, match=r"NCCL .*op=SUM .*\bint16\b"):
                    emitted(function, x, "cuda")

        ranks.values(2, run)

    def test_several_devices_are_refused(self, ranks: World) -> None:
        def run(group: Group) -> None:
            jax, jnp, cj = jax_modules()
            # of the mesh's axes JAX 0.12 would take what it is not told for explicit ones
            sharding = jax.sharding
            mesh = sharding.AbstractMesh((2,), ("i",), axis_types=(sharding.AxisType.Auto,))
            parts = sharding.PartitionSpec("i")
            both = jax.shard_map(
                cj.ordered(lambda a: cj.allreduce(a, group)),
                mesh=mesh,
                in_specs=parts,
                out_specs=parts,
                check_vma=False,
            )
            with pytest.raises(col.DeviceError, match=r"\bshard_map\b"):
                emitted(both, jax.ShapeDtypeStruct((4,), jnp.float32), "cuda")

        ranks.values(2, run)

    def test_a_group_of_one_rank_has_nothing_to_call(self) -> None:
        _, jnp, cj = jax_modules()
        group = col.init_collective_group(1, 0, group_name="alone on a device")
        try:
            for function in (
                lambda a: cj.allreduce(a, group),
                lambda a: cj.allgather(a, group),
                lambda a: cj.reducescatter(a, group),
                lambda a: cj.sendrecv(a, 0, 0, group),
            ):
                for wrap in (lambda f: f, cj.ordered):
                    x = jnp.ones((1, 3))
                    assert "custom_call" not in emitted(wrap(function), x, "cuda")
                    assert "custom_call" in emitted(wrap(function), x, "cpu")
        finally:
            group.destroy()


@functools.lru_cache(maxsize=1)
def _pretend() -> None:
    """Make the target of devices one of XLA's for the CPU, under a name of its own."""
    targets = inside("targets")
    native = library.load()
    targets._make_known(
        native.shm_jax_device_target(dlpack.tvm_ffi().convert(_as_on_a_device)),
        "cpu",
        name=FAKE,
        on_device=True,
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
    inside("targets").queue(number, *arguments)
    rank.machine.synchronize(rank.stream)


@pytest.fixture
def in_jit(monkeypatch: pytest.MonkeyPatch, ranks: World) -> Iterator[Callable[[Group], Rank]]:
    """Return what makes a rank whose jitted collectives call the target of devices."""
    _pretend()
    jax, _, _ = jax_modules()
    monkeypatch.setattr(inside("targets"), "TARGET", FAKE)

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
    def test_every_collective(
        self, ranks: World, in_jit: Callable[[Group], Rank], size: int, dtype: str
    ) -> None:
        def run(group: Group) -> list[Any]:
            jax, jnp, cj = jax_modules()
            in_jit(group)
            to, of = (group.rank + 1) % size, (group.rank - 1) % size

            def program(a: Any, rows: Any) -> Any:
                sent = cj.send(a, size - 1, group) if group.rank == 0 else a
                received = cj.recv(a, 0, group) if group.rank == size - 1 else sent
                return (
                    cj.allreduce(a, group),
                    cj.reduce(a, 1, group),
                    cj.broadcast(a, size - 1, group),
                    cj.allgather(a, group),
                    cj.reducescatter(rows, group),
                    cj.sendrecv(a, to, of, group),
                    received,
                )

            x, rows = (
                jnp.asarray(given(group.rank, (3, 4), dtype)),
                jnp.asarray(given(group.rank, (size, 5), dtype)),
            )
            for function in (program, cj.ordered(program)):
                found = [np.asarray(y) for y in jax.jit(function)(x, rows)]
                np.testing.assert_array_equal(x, given(group.rank, (3, 4), dtype))
            return found

        everyone = [given(rank, (3, 4), dtype) for rank in range(size)]
        lists = [given(rank, (size, 5), dtype) for rank in range(size)]
        total, sums = (
            (np.any(everyone, 0), np.any(lists, 0))
            if dtype == "bool"
            else (sum(everyone), sum(lists))
        )
        for rank, found in enumerate(ranks.values(size, run)):
            expected = [
                total,
                total if rank == 1 else everyone[rank],
                everyone[size - 1],
                np.stack(everyone),
                sums[rank],
                everyone[rank - 1],
                everyone[0 if rank == size - 1 else rank],
            ]
            for y, wanted in zip(found, expected, strict=True):
                np.testing.assert_array_equal(y, wanted)

    def test_loops_and_derivatives(self, ranks: World, in_jit: Callable[[Group], Rank]) -> None:
        def run(group: Group) -> None:
            jax, jnp, cj = jax_modules()
            in_jit(group)
            x = jnp.asarray(given(group.rank, (3, 4)))
            total = given(0, (3, 4)) + given(1, (3, 4))

            def summed(a: Any) -> Any:
                return jax.lax.scan(
                    lambda carry, row: (carry + cj.allreduce(row, group) ** 2, None), a[0], a
                )[0].sum()

            for wrap in (lambda f: f, cj.ordered):
                assert np.allclose(
                    jax.jit(jax.vmap(wrap(lambda a: cj.allreduce(a, group))))(x), total
                )
                expected = 4 * total
                expected[0] += 1
                assert np.allclose(jax.jit(jax.grad(wrap(summed)))(x), expected)

        ranks.values(2, run)

    def test_a_donated_argument_keeps_its_memory(
        self, ranks: World, in_jit: Callable[[Group], Rank]
    ) -> None:
        def run(group: Group) -> None:
            jax, jnp, cj = jax_modules()
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
            jax, jnp, cj = jax_modules()
            rank = in_jit(group)

            def slow(a: Any, value: Any) -> Any:
                late = 0 * jax.lax.fori_loop(0, 40, lambda _, y: y @ y / 512, a)[0, 0]
                return cj.allreduce(jnp.full(COUNT, value) + late, group)

            if group.rank == 1:
                arrays = [
                    rank.write(np.full(COUNT, value, np.float32))
                    for value in (5.0, 1.0, 10.0, 100.0)
                ]
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
            jax, jnp, cj = jax_modules()
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

    def test_errors_have_the_words_of_eager_ones(
        self, ranks: World, in_jit: Callable[[Group], Rank]
    ) -> None:
        def run(group: Group) -> None:
            jax, jnp, cj = jax_modules()
            in_jit(group)
            op = ReduceOp.SUM if group.rank else ReduceOp.MAX
            step = jax.jit(lambda a: cj.allreduce(a, group))
            assert float(step(jnp.ones(COUNT))[0]) == 2
            with pytest.raises(jax.errors.JaxRuntimeError, match=r"allreduce .*\bMAX\b"):
                jax.jit(lambda a: cj.allreduce(a, group, op))(jnp.ones(COUNT)).block_until_ready()
            cj.forget_failures()
            assert float(step(jnp.ones(COUNT))[0]) == 2
            group.barrier()
            ranks.machine.refuses = device.NcclError("ncclInvalidArgument")
            with pytest.raises(jax.errors.JaxRuntimeError, match="ncclInvalidArgument"):
                step(jnp.ones(COUNT)).block_until_ready()
            with pytest.raises(col.GroupError, match="ncclInvalidArgument"):
                group.synchronize()

        ranks.values(2, run, check=True)

    def test_a_late_rank_does_not_leave_the_host_hanging(
        self, ranks: World, in_jit: Callable[[Group], Rank]
    ) -> None:
        def run(group: Group) -> Any:
            jax, jnp, cj = jax_modules()
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
