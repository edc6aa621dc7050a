"""The nccl backend on a fake device: every operation, in place, and every type of element."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from device import DeviceArray, FrozenArray
from nccl_world import COUNT, World, on_device, values

import colltensor as col
from colltensor import ReduceOp
from colltensor.gradients import Synchronizer
from colltensor.group import Group

pytestmark = pytest.mark.slow

IN_A_ROW = [(True, True), (False, False), (True, False)]
"""Whether a list's tensors lie one after another, on ranks of even and odd numbers."""


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
        results = ranks.values(
            size, lambda group: group.broadcast(on_device(group.rank), size - 1).read()
        )
        for result in results:
            np.testing.assert_array_equal(result, values(size - 1))

    @pytest.mark.parametrize("rows", IN_A_ROW)
    def test_allgather(self, ranks: World, size: int, rows: tuple[bool, bool]) -> None:
        def run(group: Group) -> list[np.ndarray]:
            row, whole = rows[group.rank % 2], np.zeros((size, COUNT), np.float32)
            outputs = [
                DeviceArray(whole[r] if row else np.zeros(COUNT, np.float32)) for r in range(size)
            ]
            group.allgather(outputs, on_device(group.rank))
            return [output.read() for output in outputs]

        for result in ranks.values(size, run):
            np.testing.assert_array_equal(result, [values(rank) for rank in range(size)])
        assert {names for _, names in ranks.machine.calls} == {("allGather",)}

    @pytest.mark.parametrize("rows", IN_A_ROW)
    @pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.MAX])
    def test_reducescatter(
        self, ranks: World, size: int, rows: tuple[bool, bool], op: ReduceOp
    ) -> None:
        def run(group: Group) -> np.ndarray:
            row, whole = rows[group.rank % 2], np.zeros((size, COUNT), np.float32)
            sources = [
                DeviceArray(whole[r] if row else np.zeros(COUNT, np.float32)) for r in range(size)
            ]
            for index, source in enumerate(sources):
                source.write(values(10 * group.rank + index))
            target = DeviceArray(np.zeros(COUNT, np.float32))
            group.reducescatter(target, sources, op)
            for index, source in enumerate(sources):
                np.testing.assert_array_equal(source.read(), values(10 * group.rank + index))
            return target.read()

        for rank, result in enumerate(ranks.values(size, run)):
            given = [values(10 * r + rank) for r in range(size)]
            np.testing.assert_array_equal(
                result, np.sum(given, 0) if op is ReduceOp.SUM else np.max(given, 0)
            )
        assert {names for _, names in ranks.machine.calls} == {("reduceScatter",)}

    def test_one_array_for_a_list(self, ranks: World, size: int) -> None:
        def run(group: Group) -> list[np.ndarray]:
            rank = group.rank
            given = DeviceArray(np.stack([values(10 * rank + r) for r in range(size)]))
            whole, exchanged = (DeviceArray(np.zeros((size, COUNT), np.float32)) for _ in range(2))
            total = DeviceArray(np.zeros(COUNT, np.float32))
            assert group.allgather(whole, on_device(rank)) is whole
            assert group.alltoall(exchanged, given) is exchanged
            assert group.reducescatter(total, given) is total
            return [whole.read(), exchanged.read(), total.read()]

        for rank, (whole, exchanged, total) in enumerate(ranks.values(size, run)):
            parts = [values(10 * r + rank) for r in range(size)]
            np.testing.assert_array_equal(whole, [values(r) for r in range(size)])
            np.testing.assert_array_equal(exchanged, parts)
            np.testing.assert_array_equal(total, np.sum(parts, 0))
        names = [name for _, called in ranks.machine.calls for name in called]
        # whole, and not block by block
        assert names.count("allGather") == names.count("reduceScatter") == size
        assert not {"broadcast", "reduce"} & set(names)

    def test_gather_and_scatter(self, ranks: World, size: int) -> None:
        def run(group: Group) -> Any:
            root = group.rank == 1
            outputs = (
                [DeviceArray(np.zeros(COUNT, np.float32)) for _ in range(size)] if root else None
            )
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
                got = [
                    DeviceArray(np.zeros(COUNT, np.float32)),
                    DeviceArray(np.zeros(3, np.float32)),
                ]
                return [tensor.read() for tensor in group.recv(got, 0)]
            return None

        first, second = ranks.values(size, run)[-1]
        np.testing.assert_array_equal(first, values(5))
        np.testing.assert_array_equal(second, values(6, 3))

    def test_sendrecv_round_a_ring(self, ranks: World, size: int) -> None:
        def run(group: Group) -> np.ndarray:
            target = DeviceArray(np.zeros(COUNT, np.float32))
            for _ in range(3):
                group.sendrecv(
                    on_device(group.rank), (group.rank + 1) % size, target, (group.rank - 1) % size
                )
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
            big = 1 << 18
            tensors = {
                "a": on_device(group.rank, big),
                "b": on_device(group.rank, 5),
                "c": on_device(group.rank, 6),
            }
            return [tensor.read() for tensor in group.allreduce(tensors).values()]

        for result in ranks.values(2, run):
            for found, count in zip(result, (1 << 18, 5, 6), strict=True):
                np.testing.assert_array_equal(found, values(0, count) + values(1, count))
        assert [names for _, names in ranks.machine.calls] == [("allReduce",) * 3] * 2

    @pytest.mark.parametrize("check", [False, True])
    @pytest.mark.parametrize("operation", ["allreduce", "reduce", "broadcast", "transfer"])
    def test_a_tree_is_one_group_and_one_agreement(
        self, ranks: World, operation: str, check: bool
    ) -> None:
        """Small leaves and large ones of two dtypes: no leaf is a group, is packed or is agreed on by itself."""
        dtypes = ("float32", "int32", "float32", "float16")

        def run(group: Group) -> tuple[list[np.ndarray], list[str]]:
            tree = [on_device(group.rank, 3 + place, dtype) for place, dtype in enumerate(dtypes)]
            tree.append(on_device(group.rank, 1 << 18))
            control: Any = group._control
            agreements: list[str] = []
            for name in ("agree", "start_pair", "allgather"):
                called = getattr(control, name)
                setattr(
                    control,
                    name,
                    lambda *terms, name=name, called=called: (
                        agreements.append(name),
                        called(*terms),
                    )[1],
                )
            if operation == "transfer":
                found = group.recv(tree, 0) if group.rank else group.send(tree, 1)
            else:
                found = getattr(group, operation)(tree)
            agreed = [name for name in agreements if name != "allgather"]  # which connects
            return [tensor.read() for tensor in found], agreed

        call = {"transfer": None, "allreduce": "allReduce"}.get(operation, operation)
        for rank, (found, agreed) in enumerate(ranks.values(2, run, check=check)):
            for place, result in enumerate(found):
                dtype = dtypes[place] if place < 4 else "float32"
                given = [values(peer, len(result), dtype) for peer in range(2)]
                expected = given[0]
                if operation == "allreduce" or (operation == "reduce" and rank == 0):
                    expected = given[0] + given[1]
                elif operation == "reduce":
                    expected = given[1]
                np.testing.assert_array_equal(result, expected)
            assert len(agreed) == check
        groups = [names for _, names in ranks.machine.calls]
        expected_groups = [(call,) * 5] * 2 if call else [("recv",) * 5, ("send",) * 5]
        assert sorted(groups) == expected_groups

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
            for result in ranks.values(
                2, lambda group: group.allreduce(on_device(group.rank)).read()
            ):
                np.testing.assert_array_equal(result, values(0) + values(1))


class TestElements:
    """Data types and reduce ops."""

    @pytest.mark.parametrize(
        "dtype", ["int8", "uint8", "int32", "uint32", "int64", "uint64", "float16", "float64"]
    )
    @pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.MAX])
    def test_numbers(self, ranks: World, dtype: str, op: ReduceOp) -> None:
        results = ranks.values(
            3, lambda group: group.allreduce(on_device(group.rank, dtype=dtype), op).read()
        )
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
        [
            (ReduceOp.SUM, np.logical_or),
            (ReduceOp.MAX, np.logical_or),
            (ReduceOp.BOR, np.logical_or),
            (ReduceOp.PRODUCT, np.logical_and),
            (ReduceOp.MIN, np.logical_and),
            (ReduceOp.BAND, np.logical_and),
        ],
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
    def test_least_and_greatest_keep_nan_whichever_rank_has_it(
        self, ranks: World, dtype: str, op: ReduceOp
    ) -> None:
        special = np.array(
            [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1.5, -2.5, 65504, 6e-8], dtype
        )
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
        [
            ("int16", ReduceOp.SUM),
            ("uint16", ReduceOp.MAX),
            ("int32", ReduceOp.BAND),
            ("bool", ReduceOp.BXOR),
            ("float8_e5m2", ReduceOp.SUM),
            ("int32", ReduceOp.AVERAGE),
            ("complex64", ReduceOp.MAX),
        ],
    )
    def test_what_it_cannot_do_is_refused_by_name(
        self, ranks: World, dtype: str, op: ReduceOp
    ) -> None:
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
            np.testing.assert_array_equal(
                whole.T[1::2, ::-1].ravel(), values(0, 24) + values(1, 24)
            )
            assert (whole.T[::2] == 99).all()

    def test_copy_false_refuses_packing_and_keys(self, ranks: World) -> None:
        def run(group: Group) -> None:
            with pytest.raises(col.errors.OptionError, match="copy=False"):
                group.allreduce(DeviceArray(np.zeros((4, 4), np.float32).T[::2]), copy=False)
            with pytest.raises(col.errors.OptionError, match="copy=False"):
                group.allreduce(on_device(0), ReduceOp.MAX, copy=False)
            whole = np.zeros((3, COUNT), np.float32)
            apart, row = (
                [DeviceArray(whole[place]) for place in places] for places in ((0, 2), (1, 2))
            )
            with pytest.raises(col.errors.OptionError, match="copy=False"):
                group.allgather(apart, on_device(0), copy=False)
            with pytest.raises(col.errors.OptionError, match="copy=False"):
                group.reducescatter(on_device(0), apart, copy=False)
            group.allgather(row, on_device(0), copy=False)
            group.reducescatter(on_device(0), row, copy=False)

        ranks.values(2, run)


class TestGradients:
    """``colltensor.gradients`` on a device: packed, reduced and unpacked in the order of the frameworks' streams."""

    COUNTS = (5, COUNT, 3, 1 << 19)
    """The last one is too large to share a bucket."""

    @pytest.mark.parametrize("kind", [DeviceArray, FrozenArray])
    @pytest.mark.parametrize("average", [True, False])
    def test_a_synchronizer(self, ranks: World, size: int, average: bool, kind: type) -> None:
        def gradients(group: Group, step: int) -> list[DeviceArray]:
            made = []
            for place, count in enumerate(self.COUNTS):
                leaf = kind(np.full(count, 77, np.float32))
                if kind is DeviceArray:
                    leaf.write(values(group.rank + place + step, count))
                else:
                    leaf.memory[...] = values(group.rank + place + step, count)
                made.append(leaf)
            return made

        def run(group: Group) -> list[list[np.ndarray]]:
            kept = Synchronizer(gradients(group, 0), group=group, average=average, compare=False)
            found = []
            for step in range(2):
                given = gradients(group, step)
                result = kept.sync(given)
                assert (result is given) == (kind is DeviceArray)
                if kind is FrozenArray:  # the host has waited
                    found.append([leaf.memory.copy() for leaf in result])
                else:
                    found.append([leaf.read() for leaf in result])
            return found

        for found in ranks.values(size, run):
            for step, leaves in enumerate(found):
                for place, (count, leaf) in enumerate(zip(self.COUNTS, leaves, strict=True)):
                    total = sum(values(rank + place + step, count) for rank in range(size))
                    np.testing.assert_allclose(leaf, total / size if average else total, rtol=1e-6)
