"""The conformance cases on a device: what one rank of a group does, whether it is a process or a thread."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import gpu_streams
import numpy as np
import pytest
from gpu_arrays import REFUSED, DeviceSample, Refused, expected_of, library_for, supports
from gpu_streams import shared_group
from oracle import DTYPES, FLOATS, REDUCIBLE, Array, numpy_dtype, ops_of, reduced
from samples import EMPTY, LAYOUTS, SCALARS, Layout, dense
from test_moves import OPERATIONS, Mover
from test_stacks import OPERATIONS as STACKED
from test_stacks import SHAPES, Stacks
from worlds import Report

import colltensor as col
from colltensor.gradients import Synchronizer

SMALL, MIDDLE, LARGE = 7, 5003, (1 << 20) + 3


def _samples(
    group: Any, libraries: tuple[str, ...], dtype: str, layout: Layout, inputs: list[Array]
) -> DeviceSample | None:
    library = library_for(libraries, group.rank, dtype, layout)
    return None if library is None else DeviceSample(library, dtype, layout, inputs[group.rank])


def _everywhere(libraries: tuple[str, ...], size: int, dtype: str, layout: Layout) -> bool:
    """Return True if every rank has a library for such tensors, so that all of them call."""
    return all(library_for(libraries, rank, dtype, layout) for rank in range(size))


def _pairs() -> Iterator[tuple[int, str, str, int]]:
    number = 0
    for dtype in REDUCIBLE:
        for op in ops_of(dtype):
            if Refused(dtype, op) not in REFUSED:
                number += 1
                yield number, dtype, op, SMALL
    yield from (
        (number + 1, dtype, "SUM", MIDDLE) for dtype in ("bool", "float16", "float64", "complex128")
    )
    yield from ((number + 2, "bfloat16", op, MIDDLE) for op in ("MIN", "AVERAGE"))
    yield from ((number + 3, "float32", op, LARGE) for op in ("SUM", "MAX"))
    yield from ((number + 4, dtype, "SUM", 0) for dtype in ("float32", "float64"))


def reductions(group: Any, report: Report, libraries: tuple[str, ...]) -> None:
    """allreduce, reduce and reducescatter of every type and op that NCCL has."""
    size = group.world_size
    for number, dtype, op, count in _pairs():
        layout, root = dense(count), number % size
        if not _everywhere(libraries, size, dtype, layout):
            continue
        inputs = [reduced(dtype, count, rank) for rank in range(size)]
        expected, tolerance = expected_of(dtype, op, inputs)
        reduce_op = col.ReduceOp[op]
        with report.case("allreduce", dtype, op, count) as name:
            sample = _samples(group, libraries, dtype, layout, inputs)
            assert sample is not None
            result = group.allreduce(sample.tensor, reduce_op)
            report.same_everywhere(name, sample.check_result(result, expected, tolerance).tobytes())
        with report.case("reduce", dtype, op, count, "to", root):
            sample = _samples(group, libraries, dtype, layout, inputs)
            assert sample is not None
            result = group.reduce(sample.tensor, root, reduce_op)
            if group.rank == root:
                sample.check_result(result, expected, tolerance)
            else:
                sample.check_untouched()
        with report.case("reducescatter", dtype, op, count):
            _reducescatter(group, libraries, dtype, op, layout)


def _reducescatter(
    group: Any, libraries: tuple[str, ...], dtype: str, op: str, layout: Layout
) -> None:
    everyone = range(group.world_size)
    given = [
        [reduced(dtype, layout.count, peer, 10 + part) for part in everyone] for peer in everyone
    ]
    library = library_for(libraries, group.rank, dtype, layout)
    assert library is not None
    sources = [DeviceSample(library, dtype, layout, values) for values in given[group.rank]]
    target = DeviceSample(library, dtype, layout, reduced(dtype, layout.count, group.rank, 99))
    result = group.reducescatter(
        target.tensor, [source.tensor for source in sources], col.ReduceOp[op]
    )
    target.check_result(result, *expected_of(dtype, op, [parts[group.rank] for parts in given]))
    for source in sources:
        source.check_untouched()


def refusals(group: Any, report: Report, libraries: tuple[str, ...]) -> None:
    """What NCCL has not is refused by name before anything moves, and the group goes on."""
    for dtype, op in sorted(REFUSED):
        library = library_for(libraries, group.rank, dtype, dense(SMALL))
        if library is None:
            continue
        with report.case("allreduce", dtype, op, "is refused"):
            sample = DeviceSample(library, dtype, dense(SMALL), reduced(dtype, SMALL, group.rank))
            with pytest.raises(col.UnsupportedDTypeError, match=dtype):
                group.allreduce(sample.tensor, col.ReduceOp[op])
            sample.check_untouched()


def not_numbers(group: Any, report: Report, libraries: tuple[str, ...]) -> None:
    """MIN and MAX give NaN whichever rank has it, which NCCL's own do not."""
    for dtype in FLOATS:
        if not _everywhere(libraries, group.world_size, dtype, dense(16)):
            continue
        inputs = [reduced(dtype, 16, rank) for rank in range(group.world_size)]
        for rank, values in enumerate(inputs):
            values[rank] = np.nan
            values[8 + rank] = np.inf if rank % 2 else -np.inf
        for op in ("MIN", "MAX"):
            with report.case("allreduce", dtype, op, "of NaN"):
                sample = _samples(group, libraries, dtype, dense(16), inputs)
                assert sample is not None
                result = group.allreduce(sample.tensor, col.ReduceOp[op])
                # numpy's propagate it too
                wanted = np.max(inputs, 0) if op == "MAX" else np.min(inputs, 0)
                sample.check_result(result, wanted.astype(numpy_dtype(dtype)), None)


class DeviceMover(Mover):
    """Makes a rank's device tensors for one case of moving."""

    def __init__(self, group: Any, library: str, dtype: str, layout: Layout) -> None:
        self.group, self.rank, self.size = group, group.rank, group.world_size
        self._library, self._dtype, self._layout = library, dtype, layout

    def given(self, salt: int = 0) -> Any:
        return DeviceSample(self._library, self._dtype, self._layout, self.values(self.rank, salt))

    def target(self) -> Any:
        blank = np.zeros(self._layout.count, numpy_dtype(self._dtype))
        return DeviceSample(self._library, self._dtype, self._layout, blank)


def moves(group: Any, report: Report, libraries: tuple[str, ...]) -> None:
    """Every operation that only moves, of every type."""
    for number, dtype in enumerate(DTYPES):
        for count in (SMALL,) if number % 3 else (SMALL, (0, 1, 2049)[number // 3 % 3]):
            _move(group, report, libraries, dtype, dense(count), number % group.world_size)
    _move(group, report, libraries, "float32", dense(LARGE), 0)


def layouts(group: Any, report: Report, libraries: tuple[str, ...]) -> None:
    """Strided tensors: the right answer, and nothing touched between the elements."""
    size = group.world_size
    for number, layout in enumerate((*LAYOUTS, *SCALARS, *EMPTY)):
        for dtype in ("float32", ("bfloat16", "float8_e4m3fn", "uint8", "complex128")[number % 4]):
            _move(group, report, libraries, dtype, layout, number % size)
        if not _everywhere(libraries, size, "float64", layout):
            continue
        inputs = [reduced("float64", layout.count, rank) for rank in range(size)]
        expected, tolerance = expected_of("float64", "SUM", inputs)
        with report.case("allreduce", layout.name):
            sample = _samples(group, libraries, "float64", layout, inputs)
            assert sample is not None
            sample.check_result(group.allreduce(sample.tensor), expected, tolerance)
        with report.case("allreduce copy=False", layout.name):
            sample = _samples(group, libraries, "float64", layout, inputs)
            assert sample is not None
            if layout.count > 1 and not layout.dense:
                with pytest.raises(col.OptionError, match="strided"):
                    group.allreduce(sample.tensor, copy=False)
                sample.check_untouched()


def _move(
    group: Any, report: Report, libraries: tuple[str, ...], dtype: str, layout: Layout, root: int
) -> None:
    if not _everywhere(libraries, group.world_size, dtype, layout):
        return
    library = library_for(libraries, group.rank, dtype, layout)
    assert library is not None
    for operation in OPERATIONS:
        with report.case(operation.__name__, dtype, layout.name, "root", root):
            operation(DeviceMover(group, library, dtype, layout), root)


class DeviceStacks(Stacks):
    """Makes a rank's arrays of all ranks' elements on the device."""

    def sample(self, layout: Layout, values: Array) -> Any:
        return DeviceSample(self._library, self.dtype, layout, values)


def stacks(group: Any, report: Report, libraries: tuple[str, ...]) -> None:
    """One array for a list, on some ranks or on all."""
    for number, operation in enumerate(STACKED):
        for shape in SHAPES:
            for dtype, count in (("float32", SMALL), ("bfloat16", 1), ("uint8", 0)):
                layout = shape(group.world_size, count)
                if not _everywhere(libraries, group.world_size, dtype, layout):
                    continue
                library = library_for(libraries, group.rank, dtype, layout)
                assert library is not None
                for mixed in (False, True):
                    with report.case(
                        operation.__name__, dtype, layout.name, "mixed" if mixed else ""
                    ):
                        made = DeviceStacks(group, library, dtype, layout, mixed)
                        operation(made, number % group.world_size)


def trees(group: Any, report: Report, libraries: tuple[str, ...]) -> None:
    """Containers whose leaves are of several libraries, small ones fused, large ones not."""
    size = group.world_size
    for operation in ("allreduce", "broadcast"):
        with report.case(operation, "of a tree"):
            counts = (5, (1 << 18) + 1, 3, 0, 17)
            names = [
                libraries[(group.rank + place) % len(libraries)] for place in range(len(counts))
            ]
            inputs = [
                [reduced("float32", count, rank, place) for place, count in enumerate(counts)]
                for rank in range(size)
            ]
            samples = [
                DeviceSample(name, "float32", dense(len(values)), values)
                for name, values in zip(names, inputs[group.rank], strict=True)
            ]
            tensors = [sample.tensor for sample in samples]
            tree = {
                "a": tensors[0],
                "b": [tensors[1], None, tensors[2]],
                "c": (tensors[3], tensors[4]),
            }
            result = getattr(group, operation)(tree)
            flat = [result["a"], result["b"][0], result["b"][2], *result["c"]]
            assert result["b"][1] is None
            for place, (sample, found) in enumerate(zip(samples, flat, strict=True)):
                given = [values[place] for values in inputs]
                expected, tolerance = (given[0], None)
                if operation == "allreduce":
                    expected, tolerance = expected_of("float32", "SUM", given)
                if operation == "broadcast" and group.rank == 0:
                    sample.check_untouched()
                else:
                    sample.check_result(found, expected, tolerance)


def gradients(group: Any, report: Report, libraries: tuple[str, ...]) -> None:
    """Leaves of several libraries kept in step by a Synchronizer, two steps."""
    counts = (5, MIDDLE, (1 << 18) + 1, 17)
    names = [libraries[(group.rank + place) % len(libraries)] for place in range(len(counts))]
    for average, op in ((True, "AVERAGE"), (False, "SUM")):
        with report.case("Synchronizer", op):
            kept = None
            for step in range(2):
                inputs = [
                    [
                        reduced("float32", count, rank, place + step)
                        for place, count in enumerate(counts)
                    ]
                    for rank in range(group.world_size)
                ]
                samples = [
                    DeviceSample(name, "float32", dense(len(values)), values)
                    for name, values in zip(names, inputs[group.rank], strict=True)
                ]
                leaves = [sample.tensor for sample in samples]
                kept = kept or Synchronizer(leaves, group=group, average=average, compare=False)
                for place, (sample, found) in enumerate(
                    zip(samples, kept.sync(leaves), strict=True)
                ):
                    sample.check_result(
                        found, *expected_of("float32", op, [values[place] for values in inputs])
                    )


def one_device_forms(group: Any, report: Report, libraries: tuple[str, ...]) -> None:
    """The ``_multigpu`` forms with the one device that each rank has here."""
    size, name = group.world_size, libraries[0]
    inputs = [reduced("float32", SMALL, rank) for rank in range(size)]
    expected, tolerance = expected_of("float32", "SUM", inputs)
    with report.case("allreduce_multigpu"):
        sample = DeviceSample(name, "float32", dense(SMALL), inputs[group.rank])
        (result,) = group.multigpu.allreduce([sample.tensor])
        sample.check_result(result, expected, tolerance)
    with report.case("broadcast_multigpu"):
        sample = DeviceSample(name, "float32", dense(SMALL), inputs[group.rank])
        (result,) = group.multigpu.broadcast([sample.tensor], size - 1)
        if group.rank != size - 1:
            sample.check_result(result, inputs[size - 1])
    with report.case("allgather_multigpu"):
        source = DeviceSample(name, "float32", dense(SMALL), inputs[group.rank])
        targets = [
            DeviceSample(name, "float32", dense(SMALL), np.zeros(SMALL, np.float32))
            for _ in range(size)
        ]
        (found,) = group.multigpu.allgather(
            [[target.tensor for target in targets]], [source.tensor]
        )
        for rank, (target, entry) in enumerate(zip(targets, found, strict=True)):
            target.check_result(entry, inputs[rank])


def objects_and_parts(group: Any, report: Report, libraries: tuple[str, ...]) -> None:
    """split, barrier and objects beside device calls."""
    with report.case("split"):
        part = group.split(group.rank % 2)
        inputs = [
            reduced("float32", SMALL, rank) for rank in range(group.rank % 2, group.world_size, 2)
        ]
        sample = DeviceSample(libraries[0], "float32", dense(SMALL), inputs[part.rank])
        sample.check_result(part.allreduce(sample.tensor), *expected_of("float32", "SUM", inputs))
        part.destroy()
    with report.case("objects"):
        group.barrier()
        assert group.allgather_object(group.rank) == list(range(group.world_size))


def donations(group: Any, report: Report, libraries: tuple[str, ...]) -> None:
    """A donated JAX array keeps its address; one that is not donated keeps its values (``DeviceSample`` checks)."""
    if "jax" not in libraries or not supports("jax", "float32", dense(LARGE)):
        return
    jax = importlib.import_module("jax")
    with report.case("donated"):
        inputs = [reduced("float32", LARGE, rank) for rank in range(group.world_size)]
        # A copy, because on the host an array that was put there may be numpy's memory, which is not given away.
        array = jax.numpy.copy(
            jax.device_put(inputs[group.rank], jax.devices(gpu_streams.PLATFORM)[0])
        )
        before = array.unsafe_buffer_pointer()
        result = group.allreduce(array, donate=True)
        assert array.is_deleted()
        assert result.unsafe_buffer_pointer() == before
        expected, tolerance = expected_of("float32", "SUM", inputs)
        assert tolerance is not None
        assert (np.abs(np.asarray(result) - expected) <= tolerance).all()


CASES: dict[str, Callable[[Any, Report, tuple[str, ...]], None]] = {
    function.__name__: function
    for function in (
        reductions,
        refusals,
        not_numbers,
        moves,
        layouts,
        stacks,
        trees,
        gradients,
        one_device_forms,
        objects_and_parts,
        donations,
    )
}


def run(rank: int, world_size: int, name: str, libraries: tuple[str, ...]) -> dict[str, str]:
    """Run one set of cases in a rank of the pool, its tensors on streams that are current there by default."""
    group = shared_group(world_size)
    report = Report(group)
    CASES[name](group, report, libraries)
    return report.done()
