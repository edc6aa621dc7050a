"""Observers: told of every operation with its group, rank, size, duration and error; nothing is there without them."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import colltensor as col
from colltensor.multigpu import MultiGpu
from colltensor.operations import COLLECTIVES


@pytest.fixture
def group() -> Iterator[col.Group]:
    group = col.init_collective_group(1, 0, group_name="watched")
    yield group
    group.destroy()


@contextlib.contextmanager
def observed() -> Iterator[list[col.Operation]]:
    """Collect operations when they are over."""
    seen: list[col.Operation] = []

    def observe(operation: col.Operation) -> Callable[[], None]:
        assert operation.duration_s is None
        return lambda: seen.append(operation)

    col.add_observer(observe)
    try:
        yield seen
    finally:
        col.remove_observer(observe)


def array(count: int = 4) -> np.ndarray[Any, Any]:
    return np.zeros(count, np.float32)


CALLS: dict[str, tuple[Callable[[col.Group], Any], int]] = {
    "allreduce": (lambda group: group.allreduce(array()), 16),
    "reduce": (lambda group: group.reduce(tensor=array()), 16),
    "broadcast": (lambda group: group.broadcast({"a": array(), "b": [array(2), np.zeros(3)]}), 48),
    "allgather": (lambda group: group.allgather([array()], tensor=array()), 16),
    "gather": (lambda group: group.gather([array()], array(), 0), 16),
    "scatter": (lambda group: group.scatter(array(), [array()]), 16),
    "reducescatter": (lambda group: group.reducescatter(array(), [array()]), 16),
    "alltoall": (lambda group: group.alltoall([array()], [array()]), 16),
    "sendrecv": (lambda group: group.sendrecv(array()[::2], 0, array(2), 0), 8),
    "barrier": (lambda group: group.barrier(), 0),
    "broadcast_object": (lambda group: group.broadcast_object("x" * 1000), 1019),
    "allgather_object": (lambda group: group.allgather_object("x" * 1000), 1019),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_operation_is_seen_once(group: col.Group, name: str) -> None:
    call, nbytes = CALLS[name]
    with observed() as seen:
        call(group)
    (operation,) = seen
    assert (operation.name, operation.group, operation.rank, operation.world_size) == (
        name,
        "watched",
        0,
        1,
    )
    assert operation.error is None
    assert operation.duration_s is not None
    assert 0 < operation.duration_s < 10
    # pickle's frame differs by version
    assert abs(operation.nbytes - nbytes) < (16 if "object" in name else 1)
    call(group)
    assert len(seen) == 1


def test_a_split_is_one_operation_and_its_parts_are_seen(group: col.Group) -> None:
    with observed() as seen:
        part = group.split(0, group_name="part")
        assert part is not None
        part.allreduce(array())
        part.destroy()
    assert [(operation.name, operation.group, operation.nbytes) for operation in seen] == [
        ("split", "watched", 0),
        ("allreduce", "part", 16),
    ]


def test_the_functions_by_name_are_seen_too(group: col.Group) -> None:
    with observed() as seen:
        col.allreduce(array(), "watched")
        col.allreduce_multigpu([array()], "watched")
    assert [operation.name for operation in seen] == ["allreduce", "allreduce"]


def test_every_tensor_has_its_size(group: col.Group, framework: str) -> None:
    if framework == "cupy":
        pytest.skip("CuPy makes no array without a device")
    module = pytest.importorskip(
        framework, reason=f"{framework} is selected; its absence ended the session"
    )
    tensor = (
        module.zeros(5, dtype=module.float32)
        if framework != "jax"
        else module.numpy.zeros(5, "float32")
    )
    with observed() as seen:
        group.allreduce(tensor)
        group.allreduce([tensor, (tensor + 1, None)])
    assert [operation.nbytes for operation in seen] == [20, 40]


class OnlyDLPack:
    """A tensor that has nothing but the protocol."""

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self.values = values

    def __dlpack__(self, **options: Any) -> Any:
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.values.__dlpack_device__()


def test_the_size_of_a_tensor_that_does_not_say_it(group: col.Group) -> None:
    with observed() as seen:
        group.allreduce(OnlyDLPack(array(3)))
    assert [operation.nbytes for operation in seen] == [12]


@pytest.mark.parametrize(
    "wrong",
    [None, 1 << 64, "text", object(), np.ma.masked_array([1.0])],
    ids=lambda value: type(value).__name__,
)
def test_a_refused_call_has_its_error(group: col.Group, wrong: object) -> None:
    with observed() as seen, pytest.raises(col.TensorError) as raised:
        group.allreduce(wrong)
    (operation,) = seen
    assert operation.error is raised.value
    assert operation.duration_s is not None


def test_an_asynchronous_operation_is_over_when_it_is_done(group: col.Group) -> None:
    with observed() as seen:
        gate = threading.Event()
        blocker = group._queue.put(col.Work("blocker", gate.wait))
        work = group.allreduce(array(), async_op=True)
        other = group.sendrecv(array(), 0, array(), 0, async_op=True)
        assert seen == []
        gate.set()
        blocker.wait(10)
        work.wait(10)
        other.wait(10)
        group.barrier()  # the callbacks of the last one may still run
    assert [operation.name for operation in seen][:2] == ["allreduce", "sendrecv"]


def test_what_is_destroyed_before_its_turn_has_its_error(group: col.Group) -> None:
    with observed() as seen:
        gate = threading.Event()
        group._queue.put(col.Work("blocker", gate.wait))
        group.allreduce(array(), async_op=True)
        threading.Timer(0.1, gate.set).start()
        group.destroy()
    assert [type(operation.error) for operation in seen] == [col.GroupError]


def test_an_observer_that_raises_changes_nothing_and_is_logged(
    group: col.Group, caplog: pytest.LogCaptureFixture
) -> None:
    def broken_end() -> None:
        raise RuntimeError("at the end")

    def broken(operation: col.Operation) -> Callable[[], None]:
        raise RuntimeError("at the beginning")

    def half_broken(operation: col.Operation) -> Callable[[], None]:
        return broken_end

    col.add_observer(broken)
    col.add_observer(half_broken)
    try:
        with observed() as seen:
            assert group.allreduce(array()).tolist() == [0.0] * 4
            group.allreduce(array(), async_op=True).wait(10)
            group.barrier()
    finally:
        col.remove_observer(broken)
        col.remove_observer(half_broken)
    assert [operation.name for operation in seen] == ["allreduce", "allreduce", "barrier"]
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(lines) == 6
    assert all(line.startswith("group 'watched' (rank 0): ") for line in lines)
    assert {str(record.exc_info[1]) for record in caplog.records if record.exc_info} == {
        "at the beginning",
        "at the end",
    }


def test_two_observers_and_an_end_after_the_removal(group: col.Group) -> None:
    with observed() as outer:
        with observed() as inner:
            gate = threading.Event()
            group._queue.put(col.Work("blocker", gate.wait))
            work = group.allreduce(array(), async_op=True)
        gate.set()
        work.wait(10)
        group.barrier()
    assert [operation.name for operation in inner] == ["allreduce"]
    assert [operation.name for operation in outer] == ["allreduce", "barrier"]
    assert inner[0] is outer[0]


def test_without_observers_the_methods_are_the_plain_ones(group: col.Group) -> None:
    plain = {
        (owner, name): getattr(owner, name)
        for owner in (col.Group, MultiGpu)
        for name in vars(owner)
    }
    with observed(), observed():
        assert col.Group.allreduce is not plain[col.Group, "allreduce"]
    assert {(owner, name): getattr(owner, name) for owner, name in plain} == plain
    assert vars(group).keys() == vars(col.init_collective_group(1, 0, group_name="unseen")).keys()
    col.destroy_collective_group("unseen")


def test_every_collective_of_a_group_can_be_observed() -> None:
    """A new method of Group or MultiGpu must get its line, or say here that it is none."""
    # objects are seen in _exchange; the others are no operations
    others = {"broadcast_object", "allgather_object", "destroy", "synchronize", "set_timeout"}
    methods = {
        name
        for name, value in vars(col.Group).items()
        if callable(value) and not name.startswith("_")
    }
    assert methods - others == {
        method
        for name, row in COLLECTIVES.items()
        if not name.endswith("_multigpu")
        for method in row.brings
    }
    methods = {
        name
        for name, value in vars(MultiGpu).items()
        if callable(value) and not name.startswith("_")
    }
    assert methods == {
        method
        for name, row in COLLECTIVES.items()
        if name.endswith("_multigpu")
        for method in row.brings
    }


def test_an_observer_must_be_callable() -> None:
    with pytest.raises(col.OptionError, match="add_observer"):
        col.add_observer("metrics")  # type: ignore[arg-type]
    col.remove_observer(print)  # nothing happens


def test_the_variable_says_what_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLLTENSOR_OBSERVE", "metrics, logs")
    with pytest.raises(col.OptionError, match=r"COLLTENSOR_OBSERVE: .*'metrics, logs'"):
        col.init_collective_group(1, 0, group_name="asked")
    monkeypatch.delenv("COLLTENSOR_OBSERVE")
    col.init_collective_group(1, 0, group_name="asked")  # the name was not kept
    col.destroy_collective_group("asked")


def test_a_group_that_is_made_says_so_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "colltensor"):
        col.init_collective_group(1, 0, group_name="100%")
        col.destroy_collective_group("100%")
    made = [line for line in caplog.messages if line.startswith("group '100%' (rank 0): ")]
    assert any("backend 'loopback'" in line for line in made)


def _log_calls() -> Iterator[tuple[str, ast.Call]]:
    spec = importlib.util.find_spec("colltensor")
    assert spec is not None
    assert spec.origin is not None
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        if path.parent.name == "_compat":  # about a process, not a group
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).lower().startswith("_log."):
                yield f"{path.name}:{node.lineno}", node


def test_every_log_line_says_group_and_rank() -> None:
    calls = list(_log_calls())
    assert len(calls) > 8
    for where, call in calls:
        text = call.args[0]
        assert isinstance(text, ast.Constant), where
        assert str(text.value).startswith(("group %r (rank %d): ", "group %r (driver): ")), where
