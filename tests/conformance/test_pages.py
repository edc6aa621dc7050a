"""The pages' Python does what it says: every block is run, or is marked as one that is only compiled.

tests/pages.py says how blocks are marked. What a block counts on (a model, a step of training) stands here, and so do
the checks of what it did.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pages
import pytest

import colltensor as col
import colltensor.adapters
import colltensor.backends

FOLDER = "/shared/folder"
"""What the pages call a folder that all ranks reach."""

TIMEOUT_S = 30.0
Names = dict[str, Any]


def _parameters(names: Names) -> None:
    """A tree of arrays, and a training loop's functions."""
    rank = names["rank"]
    names["parameters"] = {"w": np.full((4, 3), float(rank)), "b": np.zeros(3)}
    names["gradients"] = {"w": np.full((4, 3), float(rank)), "b": np.zeros(3)}
    names["gradients_of"] = lambda parameters, batch: {
        "w": parameters["w"] + batch,
        "b": parameters["b"],
    }
    names["batches"] = [1.0, 2.0]


def _checkpoint(names: Names) -> None:
    from colltensor.gradients import compare_parameters

    names["compare_parameters"] = compare_parameters
    parameters = {"w": np.full(3, float(names["rank"] + 1))}
    names |= {"parameters": parameters, "state": {"m": np.zeros(3)}, "step": names["rank"]}
    names["load"] = lambda path: ({"w": np.full(3, 7.0)}, {"m": np.ones(3)}, 5)


def _torch_model(names: Names) -> None:
    import torch

    torch.manual_seed(names["rank"])
    names["torch"], names["model"] = torch, torch.nn.Linear(4, 2)
    names["optimizer"] = torch.optim.SGD(names["model"].parameters(), 0.1)
    names["loss_function"] = torch.nn.CrossEntropyLoss()
    names["batches"] = [(torch.rand(3, 4), torch.tensor([0, 1, 0])) for _ in range(2)]


def _jax_model(names: Names) -> None:
    import jax
    import optax

    names |= {"jax": jax, "optax": optax, "params": {"w": jax.numpy.full(3, float(names["rank"]))}}
    names["batch"] = jax.numpy.arange(3.0)
    names["loss_of"] = lambda params, batch: ((params["w"] - batch) ** 2).sum()


def _jax_operand(names: Names) -> None:
    import functools

    import jax

    import colltensor.jax as cj

    names |= {"functools": functools, "jax": jax, "cj": cj}


def _adapter(names: Names) -> None:
    """Forget what the block registers."""
    names["undo"].callback(
        setattr, colltensor.adapters, "_registered", list(colltensor.adapters._registered)
    )
    names["undo"].callback(colltensor.adapters.known.clear)


def _backend(names: Names) -> None:
    names["undo"].callback(
        setattr, colltensor.backends, "_registered", dict(colltensor.backends._registered)
    )


BEFORE: dict[str, Callable[[Names], None]] = {
    "parameters": _parameters,
    "a checkpoint": _checkpoint,
    "a torch model": _torch_model,
    "a JAX model": _jax_model,
    "JAX": _jax_operand,
    "adapter": _adapter,
    "backend": _backend,
}
"""What blocks count on."""


def _same_on_all_ranks(*arrays: Any) -> None:
    for array in arrays:
        everyones = col.allgather_object(np.asarray(array).tolist())
        assert all(one == everyones[0] for one in everyones), everyones


def _check_checkpoint(names: Names) -> None:
    assert names["step"] == 5
    assert names["parameters"]["w"].tolist() == [7.0] * 3


def _check_torch_model(names: Names) -> None:
    _same_on_all_ranks(*(parameter.detach() for parameter in names["model"].parameters()))


def _check_jax_model(names: Names) -> None:
    _same_on_all_ranks(names["params"]["w"], names["loss"])
    assert float(names["params"]["w"][1]) != 0.0  # the step went somewhere


def _check_jax_operand(names: Names) -> None:
    jax, world_size = names["jax"], names["world_size"]
    group = col.get_group_handle()
    value, gradient = jax.value_and_grad(lambda x: names["replicated_sum"](x, group))(
        float(names["rank"])
    )
    assert (float(value), float(gradient)) == (float(sum(range(world_size))), 1.0)


def _check_adapter(names: Names) -> None:
    array = names["array"]
    assert names["total"].tolist() == [names["world_size"] * each for each in (1.0, 2.0)]
    tree = col.broadcast({"a": array.array("q", [names["rank"]]), "b": array.array("f", [2.5])}, 1)
    assert (tree["a"].tolist(), tree["b"].tolist()) == ([1], [2.5])
    with pytest.raises(col.MismatchError):
        col.allreduce(array.array("d" if names["rank"] else "f", [1.0]))


def _check_backend(names: Names) -> None:
    """Run every collective on the backend that the page makes."""
    group, rank, size = names["group"], names["rank"], names["world_size"]
    assert (group.backend, names["SocketBackend"].allreduce) == (
        "socket",
        col.BackendBase.allreduce,
    )
    ranks = list(range(size))

    def mine(count: int = 2) -> Any:
        return np.full(count, float(rank))

    def row(array: Any) -> list[Any]:
        return [each.tolist() for each in array] if array.ndim > 1 else array.tolist()

    strided = np.full((3, 4), rank + 1.0).T[::2]
    assert (group.allreduce(strided, op=col.ReduceOp.AVERAGE) == (size + 1) / 2).all()
    for op, expected in (
        (col.ReduceOp.SUM, sum(ranks)),
        (col.ReduceOp.MAX, size - 1),
        (col.ReduceOp.PRODUCT, 0),
    ):
        assert row(group.allreduce(mine(), op=op)) == [expected] * 2
    assert row(group.allreduce(np.array([rank == 1]), op=col.ReduceOp.BXOR)) == [True]
    assert row(group.scan(mine() + 1)) == [float(sum(ranks[: rank + 1]) + rank + 1)] * 2
    assert row(group.reduce(mine(), 1)) == [float(sum(ranks) if rank == 1 else rank)] * 2
    tree = group.broadcast({"a": mine(), "b": [mine(3)]}, size - 1)
    assert row(tree["b"][0]) == [size - 1.0] * 3
    locked = mine()
    locked.flags.writeable = False
    assert row(group.broadcast(locked if rank == 0 else mine(), 0)) == [0.0, 0.0]
    stacks = np.empty((size, 2))
    group.allgather(stacks, mine())
    assert row(stacks) == [[float(each)] * 2 for each in ranks]
    group.gather(stacks if rank == 1 else None, mine() + 1, 1)
    assert row(stacks)[0] == ([1.0, 1.0] if rank == 1 else [0.0, 0.0])
    target = np.empty(2)
    group.scatter(target, np.arange(2.0 * size).reshape(size, 2) if rank == 0 else None, 0)
    assert row(target) == [2.0 * rank, 2.0 * rank + 1]
    group.reducescatter(target, np.full((size, 2), float(rank)))
    assert row(target) == [float(sum(ranks))] * 2
    outputs = np.empty((size, 1))
    group.alltoall(outputs, np.full((size, 1), float(rank)))
    assert row(outputs) == [[float(each)] for each in ranks]
    if rank < 2:
        (group.send if rank == 0 else group.recv)(target, 1 - rank)
    group.sendrecv(mine(), (rank + 1) % size, target, (rank - 1) % size)
    assert row(target) == [float((rank - 1) % size)] * 2
    group.barrier()
    assert group.allreduce(mine(), async_op=True).result().tolist() == [float(sum(ranks))] * 2
    with pytest.raises(col.MismatchError):
        group.allreduce(np.ones(1 + rank))
    group.destroy()


AFTER: dict[str, Callable[[Names], None]] = {
    "a checkpoint": _check_checkpoint,
    "a torch model": _check_torch_model,
    "a JAX model": _check_jax_model,
    "JAX": _check_jax_operand,
    "adapter": _check_adapter,
    "backend": _check_backend,
}
"""What blocks did."""


@contextlib.contextmanager
def _torchrun(rank: int, world_size: int, port: int) -> Iterator[None]:
    variables = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _run(rank: int, world_size: int, block: pages.Block, folder: str, port: int) -> None:
    """Execute a block in a rank."""
    code = block.code.replace(f"file://{FOLDER}", f"file://{folder}")
    assert "init_method=" not in code or folder in code
    makes_its_own = "init_collective_group(" in code or "init_process_group(" in code
    with contextlib.ExitStack() as undo:
        if "torchrun" in block.words:
            undo.enter_context(_torchrun(rank, world_size, port))
        if not makes_its_own:
            method = f"file://{folder}"
            col.init_collective_group(world_size, rank, init_method=method, timeout_s=TIMEOUT_S)
        undo.callback(lambda: col.is_group_initialized() and col.destroy_collective_group())
        names: Names = {"rank": rank, "world_size": world_size, "np": np, "col": col, "undo": undo}
        for name in block.names:
            BEFORE.get(name, lambda _: None)(names)
        exec(compile(code, str(block), "exec"), names)
        for name in block.names:
            AFTER.get(name, lambda _: None)(names)


RUN = [
    pytest.param(block, marks=pytest.mark.needs(*(block.needs or ("numpy",))), id=str(block))
    for block in pages.BLOCKS
    if block.ranks
]


@pytest.mark.shm
@pytest.mark.parametrize("block", RUN)
def test_a_block_runs(pool: Any, tmp_path: Path, block: pages.Block) -> None:
    if "jax" in block.needs and importlib.util.find_spec("jax_tvm_ffi") is None:
        pytest.skip("what is inside jax.jit needs jax-tvm-ffi, which needs Python 3.11")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    pool.run(block.ranks, _run, block, str(tmp_path), port)
    for path in tmp_path.iterdir():
        raise AssertionError(f"{path} was left")


@pytest.mark.shm
@pytest.mark.needs("numpy")
@pytest.mark.parametrize("block", [block for block in pages.BLOCKS if not block.words], ids=str)
def test_a_program_prints_what_the_page_shows(tmp_path: Path, block: pages.Block) -> None:
    (tmp_path / "first.py").write_text(block.code)
    # lines stay whole
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    run = subprocess.run(
        [sys.executable, "first.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**variables, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert sorted(run.stdout.splitlines()) == sorted(block.output.splitlines()) != []


def test_every_block_is_run_or_says_why_not() -> None:
    known = {*BEFORE, *AFTER, "torchrun", *pages.FRAMEWORKS}
    for block in pages.BLOCKS:
        if "compile" in block.words:
            assert len(block.words) > 1, f"{block} does not say why it is only compiled"
        else:
            assert not block.words or block.ranks, f"{block} does not say in how many ranks it runs"
            unknown = {word for word in block.words if not re.fullmatch(r"\d ranks", word)} - known
            assert not unknown, f"{block}: {unknown}"
