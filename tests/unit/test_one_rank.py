"""Groups of one rank: every call does what it does among many, with nobody else."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator

import numpy as np
import pytest

import colltensor as col
from colltensor import backends
from colltensor.backends.base import FAST_LARGE
from colltensor.operations import NATIVE


@pytest.fixture
def group() -> Iterator[col.Group]:
    group = col.init_collective_group(1, 0, group_name="alone")
    yield group
    group.destroy()


def test_reductions_leave_the_tensor(group: col.Group) -> None:
    tensor = np.arange(5.0)
    for op in (col.ReduceOp.SUM, col.ReduceOp.AVERAGE, col.ReduceOp.MAX):
        assert group.allreduce(tensor, op) is tensor
    assert group.reduce(tensor) is tensor
    assert tensor.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_leaves_are_not_packed(group: col.Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that would be on a stream that the frameworks know nothing of."""
    memory = importlib.import_module("colltensor.adapters").host_memory()
    monkeypatch.setattr(
        type(memory), "allocate", lambda *arguments: pytest.fail("something was packed")
    )
    tree = {"a": np.arange(3.0), "b": [np.arange(8.0)[::2], np.ones(2)]}
    assert group.allreduce(tree) is tree
    assert group.broadcast(tree, async_op=True).result() is tree
    assert tree["b"][0].tolist() == [0.0, 2.0, 4.0, 6.0]


def test_a_ring_of_one_shifts_to_itself(group: col.Group) -> None:
    source, target = np.arange(6).reshape(2, 3).T, np.zeros(6, int)
    assert group.sendrecv(source, 0, target, 0) is target
    assert target.tolist() == source.ravel().tolist()


def test_lists_get_the_one_tensor(group: col.Group) -> None:
    source = np.arange(4)
    for call in (group.allgather, group.gather):
        target = [np.zeros(4, int)]
        assert call(target, source) is target
        assert target[0].tolist() == [0, 1, 2, 3]
    assert group.alltoall([np.zeros(4, int)], [source])[0].tolist() == [0, 1, 2, 3]
    assert group.scatter(np.zeros(4, int), [source]).tolist() == [0, 1, 2, 3]
    assert group.reducescatter(np.zeros(4, int), [source]).tolist() == [0, 1, 2, 3]


def test_objects_and_parts(group: col.Group) -> None:
    assert group.broadcast_object({"a": 1}) == {"a": 1}
    assert group.allgather_object("x") == ["x"]
    part = group.split(np.int64(3))
    assert part is not None
    assert (part.rank, part.world_size) == (0, 1)
    assert group.split(None) is None


@pytest.mark.parametrize("nothing", [None, "text", object()], ids=["None", "text", "object"])
def test_no_tensor_is_no_container_either(group: col.Group, nothing: object) -> None:
    with pytest.raises(col.UnsupportedTensorError, match=r"allreduce: tensor \(rank 0\)"):
        group.allreduce(nothing)


def test_errors_about_ops_and_numbers_name_the_call(group: col.Group) -> None:
    with pytest.raises(col.OptionError, match=r"allreduce \(rank 0\): op .*'sum'"):
        group.allreduce(np.ones(2), "sum")  # type: ignore[arg-type]
    with pytest.raises(col.OptionError, match=r"split: color \(rank 0\): .*'red'"):
        group.split("red")
    assert not col.is_backend_available(5)  # type: ignore[arg-type]


def test_timeouts_of_any_number(group: col.Group) -> None:
    for timeout in (10**400, np.float32(2), np.int64(1)):
        group.set_timeout(timeout)
        group.allreduce(np.ones(1), async_op=True).wait(timeout)
        col.init_collective_group(1, 0, group_name="timed", gloo_timeout=timeout).destroy()
    for timeout in (float("nan"), "1", True):
        with pytest.raises(col.OptionError, match=rf"wait: timeout_s: .*{timeout!r}"):
            col.Work("never", lambda: None).wait(timeout)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "meant"), [("smh", "shm"), ("gloom", "gloo"), ("autoo", "auto")])
def test_a_likely_backend_is_asked_for(name: str, meant: str) -> None:
    with pytest.raises(col.OptionError, match=rf"'{name}' \(.*'{meant}'\?\)"):
        backends.get_backend(name)


def test_calls_on_plain_tensors_are_made_by_native_code(group: col.Group) -> None:
    """What native code takes, and what is refused there, comes out as on the slow path."""
    if not backends.is_available("shm"):
        pytest.skip("there is no native code")
    source, target = np.arange(4.0), np.zeros(4)
    seen: list[str] = []
    watched = importlib.import_module("colltensor.engine").Engine
    run = watched.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watched, "run", lambda *given: seen.append(given[1].name) or run(*given))
        assert group.allreduce(source) is source
        assert group.reduce(source) is source
        assert group.broadcast(source) is source
        group.barrier()
        for call in (group.allgather, group.gather, group.alltoall):
            target[:] = 0
            call([target], [source] if call == group.alltoall else source)
            assert target.tolist() == [0.0, 1.0, 2.0, 3.0]
        for give in (group.scatter, group.reducescatter):
            target[:] = 0
            assert give(target, [source]) is target
            assert target.tolist() == [0.0, 1.0, 2.0, 3.0]
        stack = np.zeros((1, 4))
        assert group.allgather(stack, source) is stack
        assert stack.tolist() == [[0.0, 1.0, 2.0, 3.0]]
        assert group.allreduce(source, async_op=True).result() is source
        assert seen == []
        assert group.allgather([np.zeros(8)[::2]], source)[0].tolist() == source.tolist()
        assert seen == ["allgather"]


def test_what_cannot_be_is_refused_as_among_many(group: col.Group) -> None:
    fixed = np.arange(3.0)
    fixed.flags.writeable = False
    with pytest.raises(col.ReadOnlyError):
        group.allreduce(fixed)
    assert group.broadcast(fixed) is fixed
    with pytest.raises(col.UnsupportedDTypeError):
        group.allreduce(np.arange(3), col.ReduceOp.AVERAGE)
    with pytest.raises(col.ShapeError):
        group.allgather([np.zeros(3)], np.zeros(4))
    both = np.zeros(6)
    with pytest.raises(col.TensorError):
        group.allgather([both[1:5]], both[:4])
    with pytest.raises(col.RankError):
        group.broadcast(both, 1)
    group.destroy()
    for call in (group.barrier, lambda: group.allreduce(both), lambda: group.broadcast(both, 0)):
        with pytest.raises(col.GroupError):
            call()


def test_a_forked_child_may_not_use_the_group(group: col.Group) -> None:
    group.allreduce(np.zeros(1))
    child = os.fork()
    if child == 0:
        try:
            group.allreduce(np.zeros(1))
        except col.GroupError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_large_copy_lets_other_threads_run(group: col.Group) -> None:
    """Native code keeps the interpreter lock for short calls alone."""
    source, target = np.arange(3e6), np.zeros(3_000_000)
    assert group.allgather([target], source)[0] is target
    assert (target == source).all()
    target[:] = 0
    assert group.alltoall([target], [source], async_op=True).result()[0] is target
    assert (target == source).all()
    if backends.is_available("shm"):
        call = importlib.import_module("colltensor.backends.loopback").LoopbackCalls
        brief, patient = call().fast_call(NATIVE["allgather"], 255, -1, -1, False)
        assert brief(target, source) == FAST_LARGE
        assert patient(target, source) == 0
