"""Numbers of Python's and numpy's: in and out as what they were, alone and in trees; and what is no number there."""

from __future__ import annotations

import enum
import functools
import importlib
from typing import Any

import numpy as np
import pytest
from pool import RankPool
from worlds import Report, Transport, World

import colltensor as col
from colltensor.gradients import Synchronizer, compare_parameters, sync_gradients

R = col.ReduceOp
SIZE = 3


class Mode(enum.Enum):
    """A constant of the user's."""

    FAST = 1


def same(result: Any, expected: Any) -> None:
    assert type(result) is type(expected), (result, expected)
    assert result == expected


def numbers(rank: int, world_size: int, world: World) -> None:
    group = world.group()
    report = Report(group)
    total, last, following = sum(range(1, world_size + 1)), world_size - 1, (rank + 1) % world_size
    mine = rank + 1
    kinds = [int, float, np.float32, np.uint64]
    for kind in kinds:
        with report.case("allreduce", kind.__name__):
            same(group.allreduce(kind(mine)), kind(total))
        with report.case("reduce", kind.__name__):
            same(group.reduce(kind(mine), last), kind(total if rank == last else mine))
        with report.case("broadcast", kind.__name__):
            same(group.broadcast(kind(mine), last), kind(world_size))
        with report.case("allgather", kind.__name__):
            gathered = [kind(0)] * world_size
            assert group.allgather(gathered, kind(mine)) is gathered
            assert gathered == [kind(r + 1) for r in range(world_size)]
            assert {type(number) for number in gathered} == {kind}
        with report.case("gather", kind.__name__):
            assert group.gather([kind(0)] * world_size, kind(mine))[-1] == (
                kind(world_size) if rank == 0 else 0
            )
        with report.case("scatter", kind.__name__):
            same(group.scatter(kind(0), [kind(r + 5) for r in range(world_size)]), kind(rank + 5))
        with report.case("reducescatter", kind.__name__):
            same(
                group.reducescatter(kind(0), [kind(r + 5) for r in range(world_size)], R.SUM),
                kind(world_size * (rank + 5)),
            )
        with report.case("alltoall", kind.__name__):
            assert group.alltoall((kind(0),) * world_size, [kind(mine)] * world_size) == tuple(
                range(1, world_size + 1)
            )
        with report.case("sendrecv", kind.__name__):
            same(
                group.sendrecv(kind(mine), following, kind(0), (rank - 1) % world_size),
                kind((rank - 1) % world_size + 1),
            )
        with report.case("async", kind.__name__):
            work = group.allreduce(kind(mine), async_op=True)
            work.wait()
            same(work.result(), kind(total))
    for kind in (complex, np.complex64, np.float16, np.int8):
        with report.case("allreduce", kind.__name__):
            same(group.allreduce(kind(mine)), kind(total))
    with report.case("bool is or"):
        same(group.allreduce(rank == last), True)
        same(group.allreduce(rank == last, R.PRODUCT), world_size == 1)
        same(group.allreduce(np.bool_(rank == last)), np.True_)
    with report.case("average"):
        same(group.allreduce(float(mine), R.AVERAGE), total / world_size)
        with pytest.raises(col.UnsupportedDTypeError, match=r"AVERAGE .*int64.* SUM"):
            group.allreduce(mine, R.AVERAGE)
    with report.case("a number and an array of none"):
        array = np.zeros((), np.float64)
        if rank == last:
            same(group.broadcast(2.5, 0), 2.5)
        else:
            assert group.broadcast(array + 2.5 if rank == 0 else array, 0) == 2.5
    with report.case("tree"):
        given = {
            "loss": mine / 4,
            "steps": mine,
            "array": np.full(3, float(mine)),
            "numpy": [np.float32(mine)],
        }
        kept = dict(given)
        result = group.allreduce(given)
        same(result["loss"], total / 4)
        same(result["steps"], total)
        same(result["numpy"][0], np.float32(total))
        assert result["array"] is given["array"]
        assert given["array"].tolist() == [total] * 3
        assert {**given, "array": 0} == {**kept, "array": 0}
        assert list(result) == list(given)
    with (
        report.case("too large"),
        pytest.raises(col.UnsupportedDTypeError, match=r"leaf \['x'\].* int64"),
    ):
        group.broadcast({"x": 1 << 63})
    with report.case("gradients"):
        synchronizer = Synchronizer({"w": 1.5, "x": np.ones(2)}, group=group)
        same(synchronizer.sync({"w": float(mine), "x": np.ones(2)})["w"], total / world_size)
        same(sync_gradients([float(mine)], group=group)[0], total / world_size)
        compare_parameters({"w": 1.5, "n": np.float32(2), "mode": "a"}, group=group)
    report.done()


def constants(rank: int, world_size: int, world: World) -> None:
    group = world.group()
    report = Report(group)

    def state(number: int) -> dict[str, Any]:
        return {
            "name": "adam",
            "mode": Mode.FAST,
            "function": len,
            "kind": np.ndarray,
            "dtype": np.dtype("f4"),
            "none": None,
            "lr": 0.1 * number,
            "step": number,
            "weights": np.full(3, float(number)),
            "raw": b"x",
            "local": state,
        }

    expected = state(world_size)
    with report.case("broadcast"):
        given = state(rank + 1)
        result = group.broadcast(given, world_size - 1)
        assert {**result, "weights": 0} == {**expected, "weights": 0}
        assert result["weights"] is given["weights"]
        assert given["weights"].tolist() == [world_size] * 3
    with report.case("only constants"):
        assert group.broadcast({"a": "b", "c": [len]}) == {"a": "b", "c": [len]}
    if world_size > 1:
        with report.case("transfer"):
            if rank == 0:
                group.send(state(1), 1)
            elif rank == 1:
                assert group.recv(state(2), 0)["step"] == 1
        with report.case("another value"):
            tree = {
                "a": [np.zeros(2), "here" if rank == 0 else "there"],
                "b": [np.zeros(1) for _ in range(20)],
            }
            with pytest.raises(
                col.MismatchError, match=r"\['a'\]\[1\] '(here|there)'.*\['a'\]\[1\] '(here|there)'"
            ):
                group.broadcast(tree)
        with (
            report.case("another function"),
            pytest.raises(col.MismatchError, match=r"\[0\] builtins\.(len|abs)"),
        ):
            group.broadcast([len if rank == 0 else abs, 1])
    for unknown in (object(), {1}, frozenset({"a"}), functools.partial(len), (x for x in [1])):
        with report.case("unknown", type(unknown).__name__):
            words = (
                rf"broadcast: tensor \(rank {rank}\): leaf \['a'\]\[1\]: .*{type(unknown).__name__}"
            )
            with pytest.raises(col.UnsupportedTensorError, match=words):
                group.broadcast({"a": [1.0, unknown]})
    with (
        report.case("a reduction"),
        pytest.raises(col.UnsupportedTensorError, match=r"leaf \['a'\]: .*\bstr\b"),
    ):
        group.allreduce({"a": "adam", "b": 1.0})
    report.done()


def optimizer_state(rank: int, world_size: int, world: World) -> None:
    """What ``torch.optim.Adam.state_dict()`` returns."""
    torch = importlib.import_module("torch")
    group = world.group()

    def state_dict(number: int) -> Any:
        moments = {name: torch.full((3,), float(number)) for name in ("exp_avg", "exp_avg_sq")}
        options = {
            "lr": 0.1 * number,
            "betas": (0.9, 0.999),
            "weight_decay": 0,
            "amsgrad": number > 1,
            "foreach": None,
            "params": [0],
            "name": "all",
            "layout": torch.strided,
        }
        return {
            "state": {0: {"step": torch.tensor(float(number)), **moments}},
            "param_groups": [options],
        }

    mine = state_dict(rank + 1)
    result = group.broadcast(mine, world_size - 1)
    assert repr(result) == repr(state_dict(world_size))
    assert result["state"][0]["exp_avg"] is mine["state"][0]["exp_avg"]


def jax_state(rank: int, world_size: int, world: World) -> None:
    jax = importlib.import_module("jax")
    group = world.group()
    node = jax.tree_util.Partial(
        max, jax.numpy.full(3, float(rank)), step=rank, name="adam", activation=jax.nn.relu
    )
    result = group.broadcast({"model": node}, world_size - 1)["model"]
    assert result.args[0].tolist() == [world_size - 1] * 3
    assert result.keywords == {"step": world_size - 1, "name": "adam", "activation": jax.nn.relu}


def test_numbers(pool: RankPool, transport: Transport) -> None:
    pool.run(SIZE, numbers, World(SIZE, *transport))


def test_constants(pool: RankPool, transport: Transport) -> None:
    pool.run(SIZE, constants, World(SIZE, *transport))


@pytest.mark.parametrize("function", [numbers, constants])
def test_one_rank(pool: RankPool, function: Any) -> None:
    pool.run(1, function, World(1, "loopback", None))


@pytest.mark.needs("torch")
def test_state_of_an_optimizer(pool: RankPool, transport: Transport) -> None:
    pool.run(SIZE, optimizer_state, World(SIZE, *transport))


@pytest.mark.needs("jax")
def test_state_in_a_node_of_jax(pool: RankPool, transport: Transport) -> None:
    pool.run(SIZE, jax_state, World(SIZE, *transport))
