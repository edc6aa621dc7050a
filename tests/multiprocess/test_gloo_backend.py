"""The Gloo backend on its own: real ranks, real Gloo, a control plane that only exchanges bytes."""

from __future__ import annotations

import itertools
import logging
import os
import re
import socket
import tempfile
import time
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from fake_control import FakeControl
from gloo_ranks import SUM, Ranks, check, expected, numpy_dtype, reducible, soon, values, view
from pool import RankPool, RanksFailedError

from colltensor.backends.gloo import library
from colltensor.backends.gloo.backend import PIGGYBACKED_NBYTES
from colltensor.errors import BackendUnavailableError, MismatchError, OptionError
from colltensor.types import DTYPES, DType, ReduceOp
from colltensor.view import BufferView

pytestmark = pytest.mark.gloo
needs_native = pytest.mark.skipif(
    library.reason() is not None, reason="the library was built without Gloo"
)

WORLD_SIZES = (1, 2, 3, 4)
COUNTS = (0, 1, 7, 1000)


@pytest.fixture
def path() -> str:
    """A path for the ranks' fake control planes to meet at."""
    return f"{tempfile.gettempdir()}/{uuid4().hex[:8]}"


def reduce_every_pair(rank: int, size: int, path: str, provider: str, direct: int) -> None:
    with Ranks(path, rank, size, provider) as ranks:
        ranks.shrink(direct, 1 << 20)
        for (dtype, op), count in itertools.product(reducible(), COUNTS):
            inputs = [values(source, count, dtype) for source in range(size)]
            label = f"{op.name} of {dtype}[{count}] on {size} ranks by {provider}"
            mine = inputs[rank].copy()
            ranks.backend.allreduce([view(mine, dtype)], op, soon())
            check(mine, expected(op, inputs, dtype), dtype, f"allreduce {label}")
            everywhere = ranks.control.allgather(mine.tobytes(), soon())
            assert len(set(everywhere)) == 1, f"the bits differ between ranks: {label}"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("direct", [0, 1 << 20], ids=["in parts", "direct"])
def test_allreduce_of_every_pair(
    pool: RankPool, path: str, provider: str, world_size: int, direct: int
) -> None:
    pool.run(world_size, reduce_every_pair, path, provider, direct)


def carry_every_pair(rank: int, size: int, path: str) -> None:
    with Ranks(path, rank, size, "native") as ranks:
        for (dtype, op), count in itertools.product(reducible(), (1, 7, 300)):
            inputs = [
                [values(source, count + part, dtype, part) for part in range(3)]
                for source in range(size)
            ]
            mine = [array.copy() for array in inputs[rank]]
            views = [
                view(array, dtype) for array in (mine[0], np.zeros(0, mine[0].dtype), *mine[1:])
            ]
            assert ranks.backend.piggybacks(views, op)
            contributions = ranks.control.allgather(ranks.backend.pack(views), soon())
            ranks.backend.unpack(views, op, contributions)
            for part, array in enumerate(mine):
                label = f"{op.name} of {dtype}[{len(array)}] on {size} ranks, leaf {part}"
                check(array, expected(op, [arrays[part] for arrays in inputs], dtype), dtype, label)
                everywhere = ranks.control.allgather(array.tobytes(), soon())
                assert len(set(everywhere)) == 1, f"the bits differ between ranks: {label}"


@needs_native
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_allreduce_of_every_pair_with_the_agreement(
    pool: RankPool, path: str, world_size: int
) -> None:
    pool.run(world_size, carry_every_pair, path)


def carry_some(rank: int, size: int, path: str, provider: str) -> list[bool]:
    with Ranks(path, rank, size, provider) as ranks:
        most = PIGGYBACKED_NBYTES // size
        choices = []
        for nbytes in (
            [0],
            [1],
            [most],
            [most + 1],
            [most // 2, 0, most - most // 2],
            [most // 2, most],
        ):
            views = [view(np.zeros(part, np.uint8)) for part in nbytes]
            choices.append(ranks.backend.piggybacks(views, SUM))
        return choices


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_travels_with_the_agreement(
    pool: RankPool, path: str, provider: str, world_size: int
) -> None:
    expected = [False, True, True, False, True, False] if provider == "native" else [False] * 6
    assert pool.run(world_size, carry_some, path, provider) == [expected] * world_size


def reduce_to_every_root(rank: int, size: int, path: str, provider: str, whole: int) -> None:
    with Ranks(path, rank, size, provider) as ranks:
        ranks.shrink(0, 1024, whole)
        for (dtype, op), root in zip(reducible(), itertools.cycle(range(size))):
            for count in (0, 3, 1000):
                inputs = [values(source, count, dtype) for source in range(size)]
                mine = inputs[rank].copy()
                label = (
                    f"reduce to {root}, {op.name} of {dtype}[{count}] on {size} ranks by {provider}"
                )
                ranks.backend.reduce([view(mine, dtype)], root, op, soon())
                check(
                    mine,
                    expected(op, inputs, dtype) if rank == root else inputs[rank],
                    dtype,
                    label,
                )


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("whole", [0, 1 << 20], ids=["in parts", "whole"])
def test_reduce_leaves_other_ranks_intact(
    pool: RankPool, path: str, provider: str, world_size: int, whole: int
) -> None:
    pool.run(world_size, reduce_to_every_root, path, provider, whole)


def reduce_scatter_every_pair(rank: int, size: int, path: str, provider: str) -> None:
    with Ranks(path, rank, size, provider) as ranks:
        ranks.shrink(0, 1024)
        for dtype, op in reducible():
            for count in (0, 3, 1000):
                inputs = [
                    [values(source, count, dtype, part) for part in range(size)]
                    for source in range(size)
                ]
                mine = [array.copy() for array in inputs[rank]]
                target = np.zeros(count, numpy_dtype(dtype))
                label = f"reducescatter {op.name} of {dtype}[{count}] on {size} ranks by {provider}"
                ranks.backend.reducescatter(
                    view(target, dtype), [view(array, dtype) for array in mine], op, soon()
                )
                check(
                    target,
                    expected(op, [inputs[source][rank] for source in range(size)], dtype),
                    dtype,
                    label,
                )
                for kept, given in zip(mine, inputs[rank], strict=True):
                    np.testing.assert_array_equal(
                        kept, given, err_msg=f"{label}: a source was changed"
                    )


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_reducescatter(pool: RankPool, path: str, provider: str, world_size: int) -> None:
    pool.run(world_size, reduce_scatter_every_pair, path, provider)


def reduce_large(rank: int, size: int, path: str, provider: str) -> None:
    with Ranks(path, rank, size, provider) as ranks:
        ranks.shrink(1 << 16, 1 << 18)
        for name, op in (
            ("float32", SUM),
            ("float32", ReduceOp.MAX),
            ("bfloat16", SUM),
            ("float64", ReduceOp.AVERAGE),
            ("uint16", ReduceOp.PRODUCT),
            ("bool", SUM),
            ("complex64", SUM),
            ("int64", ReduceOp.BXOR),
        ):
            dtype, count = DTYPES[name], 300_007
            inputs = [values(source, count, dtype) for source in range(size)]
            mine, rooted = inputs[rank].copy(), inputs[rank].copy()
            ranks.backend.allreduce([view(mine, dtype)], op, soon())
            check(mine, expected(op, inputs, dtype), dtype, f"allreduce {op.name} of {name}")
            assert len(set(ranks.control.allgather(mine.tobytes(), soon()))) == 1
            ranks.backend.reduce([view(rooted, dtype)], size - 1, op, soon())
            check(
                rooted,
                expected(op, inputs, dtype) if rank == size - 1 else inputs[rank],
                dtype,
                f"reduce {name}",
            )


@pytest.mark.parametrize("world_size", [2, 3])
def test_reductions_larger_than_a_block(
    pool: RankPool, path: str, provider: str, world_size: int
) -> None:
    pool.run(world_size, reduce_large, path, provider)


def propagate_nan(rank: int, size: int, path: str, provider: str) -> None:
    with Ranks(path, rank, size, provider) as ranks:
        for direct in (0, 1 << 20):
            ranks.shrink(direct, 1 << 20)
            for name, op in itertools.product(
                ("float16", "bfloat16", "float32", "float64"), (ReduceOp.MIN, ReduceOp.MAX, SUM)
            ):
                numbers = np.full(size + 1, float(rank)).astype(numpy_dtype(DTYPES[name]))
                numbers[rank] = np.nan
                ranks.backend.allreduce([view(numbers, DTYPES[name])], op, soon())
                lost = np.isnan(numbers.astype(np.float64))
                assert lost.tolist() == [True] * size + [False], f"{op.name} of {name}: {numbers}"


@pytest.mark.parametrize("world_size", [2, 3])
def test_nan_of_any_rank_reaches_every_rank(
    pool: RankPool, path: str, provider: str, world_size: int
) -> None:
    pool.run(world_size, propagate_nan, path, provider)


def accumulate_halves(rank: int, size: int, path: str, provider: str) -> None:
    with Ranks(path, rank, size, provider) as ranks:
        for direct in (0, 1 << 20):
            ranks.shrink(direct, 1 << 20)
            numbers = np.array([2048.0 if rank == 0 else 1.0], np.float16)
            ranks.backend.allreduce([view(numbers)], SUM, soon())
            assert numbers[0] == 2052.0, (
                "2048 + 1 + 1 + 1 is 2048 in float16, 2051 in float32, which rounds to 2052"
            )


def test_16_bit_floats_accumulate_in_float32(pool: RankPool, path: str, provider: str) -> None:
    pool.run(4, accumulate_halves, path, provider)


def move_everything(rank: int, size: int, path: str, provider: str) -> None:
    with Ranks(path, rank, size, provider) as ranks:
        backend = ranks.backend
        for dtype, count in itertools.product(DTYPES.values(), (0, 5, 20_000)):
            label = f"{dtype}[{count}] on {size} ranks by {provider}"

            def raw(
                source: int, salt: int = 0, dtype: DType = dtype, count: int = count
            ) -> np.ndarray[Any, Any]:
                return values(source, count * dtype.itemsize, DTYPES["uint8"], salt)

            def seen(array: np.ndarray[Any, Any], dtype: DType = dtype) -> BufferView:
                return view(array).cast(dtype)

            def empty() -> list[np.ndarray[Any, Any]]:
                return [np.zeros_like(raw(0)) for _ in range(size)]

            for root in range(size):
                shared = raw(rank)
                backend.broadcast([seen(shared)], root, soon())
                np.testing.assert_array_equal(shared, raw(root), err_msg=f"broadcast {label}")
                outputs = empty()
                targets = [seen(array) for array in outputs] if rank == root else None
                backend.gather(targets, seen(raw(rank)), root, soon())
                if rank == root:
                    for source, got in enumerate(outputs):
                        np.testing.assert_array_equal(got, raw(source), err_msg=f"gather {label}")
                target = np.zeros_like(raw(0))
                parts = [raw(rank, salt) for salt in range(size)]
                backend.scatter(
                    seen(target),
                    [seen(part) for part in parts] if rank == root else None,
                    root,
                    soon(),
                )
                np.testing.assert_array_equal(target, raw(root, rank), err_msg=f"scatter {label}")
            outputs = empty()
            backend.allgather([seen(array) for array in outputs], seen(raw(rank)), soon())
            for source, got in enumerate(outputs):
                np.testing.assert_array_equal(got, raw(source), err_msg=f"allgather {label}")
            outputs = empty()
            outputs[rank][:] = raw(rank)
            backend.allgather([seen(array) for array in outputs], seen(outputs[rank]), soon())
            for source, got in enumerate(outputs):
                np.testing.assert_array_equal(
                    got, raw(source), err_msg=f"allgather in place {label}"
                )
            outputs = empty()
            backend.alltoall(
                [seen(array) for array in outputs],
                [seen(raw(rank, to)) for to in range(size)],
                soon(),
            )
            for source, got in enumerate(outputs):
                np.testing.assert_array_equal(got, raw(source, rank), err_msg=f"alltoall {label}")


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_moves_of_every_dtype(pool: RankPool, path: str, provider: str, world_size: int) -> None:
    pool.run(world_size, move_everything, path, provider)


def pass_messages(rank: int, size: int, path: str, provider: str) -> None:
    dtype = DTYPES["int32"]
    with Ranks(path, rank, size, provider) as ranks:
        for count in (0, 1, 100_000):
            to, of = (rank + 1) % size, (rank - 1) % size
            target = np.zeros(count, np.int32)
            ranks.backend.sendrecv(view(values(rank, count, dtype)), to, view(target), of, soon())
            np.testing.assert_array_equal(target, values(of, count, dtype))
            if size > 1 and rank == 0:
                several = [values(0, count, dtype, salt) for salt in range(3)]
                ranks.backend.send(
                    [view(array, readonly=True) for array in several], size - 1, soon()
                )
            if size > 1 and rank == size - 1:
                arrived = [np.zeros(count, np.int32) for _ in range(3)]
                ranks.backend.recv([view(array) for array in arrived], 0, soon())
                for salt, array in enumerate(arrived):
                    np.testing.assert_array_equal(array, values(0, count, dtype, salt))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_messages_between_two_ranks(
    pool: RankPool, path: str, provider: str, world_size: int
) -> None:
    pool.run(world_size, pass_messages, path, provider)


def several_buffers(rank: int, size: int, path: str, provider: str) -> None:
    with Ranks(path, rank, size, provider) as ranks:
        arrays = [values(rank, count, DTYPES["float64"]) for count in (5, 0, 40_000)]
        addresses = [array.ctypes.data for array in arrays]
        ranks.backend.allreduce([view(array) for array in arrays], SUM, soon())
        for array, address in zip(arrays, addresses, strict=True):
            inputs = [values(source, len(array), DTYPES["float64"]) for source in range(size)]
            np.testing.assert_allclose(array, np.sum(inputs, axis=0))
            assert array.ctypes.data == address
        ranks.backend.broadcast([view(array) for array in arrays], 0, soon())
        ranks.backend.barrier(soon())


def test_several_buffers_in_one_call(pool: RankPool, path: str, provider: str) -> None:
    pool.run(2, several_buffers, path, provider)


def count_exchanges(rank: int, size: int, path: str, provider: str) -> int:
    with Ranks(path, rank, size, provider) as ranks:
        return ranks.control.exchanges


def test_setting_up_takes_a_fixed_number_of_exchanges(
    pool: RankPool, path: str, provider: str
) -> None:
    counts = {
        tuple(pool.run(size, count_exchanges, f"{path}{size}", provider)) for size in (2, 4, 8)
    }
    keys = {"native": 2, "torch": 1, "pygloo": 2}[provider]
    # The choice of the provider, its keys (of the native one the addresses, and that all are taken), and the news that
    # all are connected.
    assert {number for ranks in counts for number in ranks} == {1 + keys + 1}


def choose_interface(rank: int, size: int, path: str, provider: str, interface: str) -> float:
    with Ranks(path, rank, size, provider, interface=interface) as ranks:
        number = np.array([float(rank + 1)])
        ranks.backend.allreduce([view(number)], SUM, soon())
        return float(number[0])


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


IPV6 = pytest.param(
    "::1", marks=pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
)


@pytest.mark.parametrize("interface", ["lo", "127.0.0.1", IPV6])
def test_interface_by_name_and_by_address(
    pool: RankPool, path: str, provider: str, interface: str
) -> None:
    assert pool.run(2, choose_interface, path, provider, interface) == [3.0, 3.0]


@pytest.mark.parametrize("interface", ["nosuch0", "203.0.113.7"])
def test_an_interface_that_is_not_there(
    pool: RankPool, path: str, provider: str, interface: str
) -> None:
    with pytest.raises(RanksFailedError) as failure:
        pool.run(2, choose_interface, path, provider, interface)
    for error in failure.value.errors.values():
        assert isinstance(error, OptionError), failure.value
        assert interface in str(error)
        assert "interface" in str(error)


NO_NATIVE = {"native": "no-headers"}
CHOICES: dict[str, Any] = {
    "unknown": lambda rank: (BOTH, "mpi" if rank == 1 else None),
    "different": lambda rank: (BOTH, ["torch", "pygloo"][rank]),
    "none in common": lambda rank: ({"torch": "2.13.0"} if rank else {"pygloo": "0.2.1"}, None),
    "versions": lambda rank: ({"torch": f"2.{13 - rank}.0"}, None),
    "native versions": lambda rank: ({"native": f"{rank + 1}.500"}, None),
    "asked for": lambda rank: (BOTH, "native" if rank == 0 else None),
    "ibverbs": lambda rank: (BOTH, "ibverbs"),
}
BOTH = {"torch": "2.13.0", "pygloo": "0.2.1"}


def disagree_on_providers(rank: int, size: int, path: str, case: str) -> str:
    import colltensor.backends.gloo as module

    usable = module.usable_providers
    has, wanted = CHOICES[case](rank)
    module.usable_providers = lambda: (has, NO_NATIVE | {"ibverbs": "no device"})
    control = FakeControl(path, rank, size)
    try:
        module.SPEC.create(control, control, timeout_s=10.0, interface=None, provider=wanted)
    except (OptionError, MismatchError, BackendUnavailableError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        module.usable_providers = usable
        control.close()
    return "no error"


@pytest.mark.parametrize(
    ("case", "kind", "says"),
    [
        ("unknown", "OptionError", r"provider \(rank 1\)"),
        ("different", "MismatchError", "rank 0: torch, rank 1: pygloo"),
        ("none in common", "BackendUnavailableError", r"\btorch .* 0; pygloo .* 1\b"),
        ("versions", "MismatchError", "rank 0: 2.13.0, rank 1: 2.12.0"),
        ("native versions", "MismatchError", "rank 0: 1.500, rank 1: 2.500"),
        ("asked for", "BackendUnavailableError", r"\bnative .* 0, 1 \(no-headers\)"),
        ("ibverbs", "BackendUnavailableError", r"\bibverbs .* 0, 1 \("),
    ],
)
def test_ranks_that_cannot_share_a_provider(
    pool: RankPool, path: str, case: str, kind: str, says: str
) -> None:
    for report in pool.run(2, disagree_on_providers, path, case):
        assert report.startswith(f"{kind}: "), report
        assert re.search(says, report), report


def choose_a_provider(
    rank: int, size: int, path: str, without: dict[int, str], wanted: str | None
) -> list[str]:
    import colltensor.backends.gloo as module

    usable, lines = module.usable_providers, []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    module._LOG.addHandler(handler)
    module._LOG.setLevel(logging.DEBUG)
    found, why = {"native": "1.500", "torch": "2.13.0", "pygloo": "0.2.1"}, {}
    if rank in without:
        del found[without[rank]]
        why = {without[rank]: "no-headers"}
    module.usable_providers = lambda: (found, why)
    control = FakeControl(path, rank, size)
    try:
        return [module._agree(control, wanted, soon())[0], *lines]
    finally:
        module.usable_providers = usable
        module._LOG.removeHandler(handler)
        control.close()


@pytest.mark.parametrize(
    ("without", "wanted", "name", "says"),
    [
        ({}, None, "native", "native"),
        ({1: "native"}, None, "torch", r"\bnative .* 1 \(no-headers\)"),
        ({0: "native", 1: "torch"}, None, "pygloo", r"\btorch .* 1\b"),
        ({}, "pygloo", "pygloo", "provider="),
    ],
)
def test_the_first_provider_that_all_ranks_have(
    pool: RankPool, path: str, without: dict[int, str], wanted: str | None, name: str, says: str
) -> None:
    for chosen, line in pool.run(2, choose_a_provider, path, without, wanted):
        assert chosen == name
        assert f"'{name}'" in line
        assert re.search(says, line)


def use_two_groups(rank: int, size: int, path: str, provider: str) -> None:
    for _ in range(3):
        with (
            Ranks(f"{path}a", rank, size, provider) as first,
            Ranks(f"{path}b", rank, size, provider) as second,
        ):
            number = np.array([float(rank + 1)])
            first.backend.allreduce([view(number)], SUM, soon())
            second.backend.allreduce([view(number)], SUM, soon())
            assert number[0] == 6.0


def test_groups_side_by_side_and_made_again(pool: RankPool, path: str, provider: str) -> None:
    pool.run(2, use_two_groups, path, provider)


def nothing_left(rank: int, size: int, path: str, provider: str) -> tuple[int, int]:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    before = (0, 0)
    for turn in range(4):
        with Ranks(f"{path}{turn}", rank, size, provider) as ranks:
            numbers = np.zeros(100_000)
            ranks.backend.allreduce([view(numbers)], SUM, soon())
            ranks.backend.allreduce([view(numbers[:3])], SUM, soon())
        time.sleep(0.05)
        if turn == 0:
            before = held()
    after = held()
    return after[0] - before[0], after[1] - before[1]


def test_close_frees_sockets_and_threads(pool: RankPool, path: str, provider: str) -> None:
    assert pool.run(2, nothing_left, path, provider) == [(0, 0), (0, 0)]
