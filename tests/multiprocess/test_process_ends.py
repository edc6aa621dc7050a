"""The end of a process with work under way: soon, with its own exit code, in silence, and its peers hear of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

_CODE = 3
_SOON_S = 20
"""Two seconds or three, and what a busy machine takes to unload torch; the groups' timeout is 60."""
_HERE = Path(__file__).parent

_BEGIN = """
import gc, os, sys, threading, time
sys.path[:0] = sys.argv[4].split(os.pathsep)
import numpy as np
import colltensor as col

def over(backend, rank):
    if backend == "c10d":
        import torch
        import torch.distributed as dist
        import colltensor.torch
        dist.init_process_group("cpu:colltensor", init_method=f"file://{sys.argv[3]}/meet", rank=rank, world_size=2)
        return dist
    from pool import on_host
    options = {"native": {"provider": "native", "interface": "lo"}, "torch": {"provider": "torch", "interface": "lo"}}
    name = "gloo" if backend in options else backend
    size = 4 if backend == "hierarchical" else 2
    with on_host("aabb"[rank] if size == 4 else "a"):
        return col.init_collective_group(
            size, rank, name, "g", init_method="file://" + sys.argv[3], timeout_s=60, **options.get(backend, {})
        )

def end():
    print("ending", time.time(), flush=True)
    sys.exit(3)

rank = int(sys.argv[1])
group = over(sys.argv[2], rank)
"""
_WORK = {
    "asynchronous": "work = group.allreduce(np.ones(4), async_op=True)",
    "large": "work = group.allreduce(np.ones(3_000_000), async_op=True)",
    "several": "works = [group.allreduce(np.ones(4), async_op=True) for _ in range(5)]",
    "daemon": "threading.Thread(target=lambda: group.allreduce(np.ones(4)), daemon=True).start(); time.sleep(0.3)",
    "daemon, large": """
threading.Thread(target=lambda: group.allreduce(np.ones(3_000_000)), daemon=True).start(); time.sleep(0.3)""",
    "daemon, waiting": """
threading.Thread(target=lambda: group.allreduce(np.ones(4), async_op=True).wait(), daemon=True).start(); time.sleep(0.3)
""",
    "daemon, objects": """
threading.Thread(target=lambda: group.allgather_object(1), daemon=True).start(); time.sleep(0.3)""",
    "daemon, again and again": """
def again():
    while True:
        try:
            group.allreduce(np.ones(4))
        except col.CollectiveError:
            pass
threading.Thread(target=again, daemon=True).start(); time.sleep(0.3)""",
}
"""What rank 0 has under way when it ends; rank 1, or all others, wait for it in something else."""
_OTHER = """
import logging
logging.getLogger("colltensor").setLevel(logging.ERROR)  # it warns that the two wait for each other
try:
    group.recv(np.ones(5), 0)
except col.CollectiveError as error:
    print(type(error).__name__, error.ranks, flush=True)
"""


def run(tmp_path: Path, backend: str, *programs: str) -> list[tuple[int, str, str, float]]:
    """Run a program a rank; return the exit code, the output, the errors, and the seconds from "ending" to the end."""
    path = os.pathsep.join([str(_HERE.parent), str(_HERE)])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _BEGIN + program, str(rank), backend, str(tmp_path), path],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, program in enumerate(programs)
    ]
    ended: dict[int, float] = {}
    try:
        limit = time.monotonic() + 60
        while len(ended) < len(processes) and time.monotonic() < limit:
            for rank, process in enumerate(processes):
                if rank not in ended and process.poll() is not None:
                    ended[rank] = time.time()
            time.sleep(0.02)
        assert len(ended) == len(processes), (
            f"ranks {set(range(len(processes))) - set(ended)} did not end"
        )
    finally:
        for process in processes:
            process.kill()
        outputs = [process.communicate() for process in processes]
    found = []
    for rank, (process, (output, errors)) in enumerate(zip(processes, outputs, strict=True)):
        marks = [
            float(line.split()[1]) for line in output.splitlines() if line.startswith("ending")
        ]
        took = ended[rank] - marks[0] if marks else 0.0
        found.append((process.returncode, output, errors, took))
    return found


BACKENDS = [
    pytest.param("shm", marks=pytest.mark.shm),
    pytest.param("native", marks=pytest.mark.gloo),
    pytest.param("torch", marks=[pytest.mark.gloo, pytest.mark.needs("torch")]),
    pytest.param("hierarchical", marks=[pytest.mark.shm, pytest.mark.gloo]),
]


def _slow(backend: str, work: str) -> list[pytest.MarkDecorator]:
    """Mark what ends in the same way as a case that every Python runs."""
    return (
        []
        if backend in ("shm", "native") and work in ("asynchronous", "daemon")
        else [pytest.mark.slow]
    )


@pytest.mark.parametrize(
    ("backend", "work"),
    [
        pytest.param(
            backend.values[0], work, marks=[*backend.marks, *_slow(backend.values[0], work)]
        )
        for backend in BACKENDS
        for work in _WORK
        if backend.values[0] in ("shm", "native") or work in ("asynchronous", "large", "daemon")
    ],
)
def test_the_end_with_work_under_way(tmp_path: Path, backend: str, work: str) -> None:
    others = [_OTHER] * (3 if backend == "hierarchical" else 1)
    (code, _, errors, took), *rest = run(tmp_path, backend, _WORK[work] + "\nend()", *others)
    assert (code, errors) == (_CODE, "")
    assert took < _SOON_S
    for code, output, errors, _ in rest:
        assert (code, output, errors) == (0, "PeerLostError (0,)\n", "")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_end_of_all_with_work_under_way(tmp_path: Path, backend: str) -> None:
    """What all have under way ends; what only some have does not hold them up."""
    program = (
        _WORK["asynchronous"]
        + "\nlast = rank and group.allreduce(np.ones(4 + rank), async_op=True)\nend()"
    )
    for code, _, errors, took in run(
        tmp_path, backend, *[program] * (4 if backend == "hierarchical" else 2)
    ):
        assert (code, errors) == (_CODE, "")
        assert took < _SOON_S


_ARRAYS = "x, y = np.ones(3_000_000), np.ones(3_000_000)\n"
_CROSSING = (
    "works = [group.send(x, rank ^ 1, async_op=True), group.recv(y, rank ^ 1, async_op=True)]\n"
)
"""Transfers in both directions of a pair."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "beside",
    [
        pytest.param("", id="all"),
        pytest.param("last = group.recv(np.ones(4), rank ^ 1, async_op=True)\n", id="but one"),
    ],
)
def test_the_end_of_all_with_transfers_that_cross(
    tmp_path: Path, backend: str, beside: str
) -> None:
    """They end; one that nobody sends does not hold the processes up."""
    # all issue them before the first ends
    program = _ARRAYS + "group.barrier()\n" + _CROSSING + beside + "end()"
    for code, _, errors, took in run(
        tmp_path, backend, *[program] * (4 if backend == "hierarchical" else 2)
    ):
        assert (code, errors) == (_CODE, "")
        assert took < _SOON_S


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_end_of_one_with_transfers_that_cross(tmp_path: Path, backend: str) -> None:
    others = ["time.sleep(5)" + _OTHER] * (3 if backend == "hierarchical" else 1)
    (code, _, errors, took), *rest = run(
        tmp_path, backend, _ARRAYS + _CROSSING + "time.sleep(0.3)\nend()", *others
    )
    assert (code, errors) == (_CODE, "")
    assert took < _SOON_S
    for code, output, errors, _ in rest:
        assert (code, output, errors) == (0, "PeerLostError (0,)\n", "")


_TORCH = {
    "asynchronous": "work = group.all_reduce(torch.ones(4), async_op=True)",
    "daemon": "threading.Thread(target=lambda: group.all_reduce(torch.ones(4)), daemon=True).start(); time.sleep(0.3)",
    "receive": "threading.Thread(target=lambda: group.recv(torch.ones(4), 1), daemon=True).start(); time.sleep(0.3)",
}


@pytest.mark.shm
@pytest.mark.needs("torch")
@pytest.mark.parametrize("work", _TORCH)
def test_the_end_with_an_operation_of_torch_distributed(tmp_path: Path, work: str) -> None:
    first = f"import torch\n{_TORCH[work]}\nend()"
    other = """
import torch
try:
    time.sleep(4)
    group.broadcast(torch.ones(5), 0)
    print("done")
except col.CollectiveError as error:
    print(type(error).__name__, error.ranks, flush=True)
"""
    (code, _, errors, took), (other_code, output, _, _) = run(tmp_path, "c10d", first, other)
    assert (code, errors) == (_CODE, "")
    assert took < _SOON_S
    assert (other_code, output) == (0, "PeerLostError (0,)\n")


_JITTED = """
import jax, jax.numpy as jnp
import colltensor.jax as cj

@jax.jit
def summed(x):
    for _ in range(6):
        x = x @ x / 1000.0
    return cj.allreduce(x, group)

y = summed(jnp.ones((1000, 1000)))
end()
"""


@pytest.mark.needs("jax")
@pytest.mark.skipif(sys.version_info < (3, 11), reason="jax-tvm-ffi has no wheel for Python 3.10")
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_the_end_with_a_computation_that_waits(tmp_path: Path, backend: str) -> None:
    (code, _, errors, took), (_, output, _, _) = run(
        tmp_path, backend, _JITTED, "time.sleep(6)" + _OTHER
    )
    assert code == _CODE
    assert "terminate" not in errors
    assert "(rank 0)" in errors
    assert took < _SOON_S
    assert output == "PeerLostError (0,)\n"


@pytest.mark.needs("jax")
@pytest.mark.skipif(sys.version_info < (3, 11), reason="jax-tvm-ffi has no wheel for Python 3.10")
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_a_computation_that_the_others_join_is_done(tmp_path: Path, backend: str) -> None:
    """JAX waits for its computations at the end of the process, and these only compute."""
    found = run(tmp_path, backend, _JITTED, _JITTED)
    assert [(code, errors) for code, _, errors, _ in found] == [(_CODE, "")] * 2


@pytest.mark.needs("torch")
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_the_end_with_gradients_under_way(tmp_path: Path, backend: str) -> None:
    begin = """
import torch
from colltensor.torch import sync_gradients
model = torch.nn.Sequential(*[torch.nn.Linear(300, 300) for _ in range(4)])
synced = sync_gradients(model, "g")
"""
    first = (
        begin
        + """
def work():
    model(torch.ones(2, 300)).sum().backward()
threading.Thread(target=work, daemon=True).start(); time.sleep(0.5)
end()
"""
    )
    (code, _, errors, took), (_, output, _, _) = run(tmp_path, backend, first, begin + _OTHER)
    assert (code, errors) == (_CODE, "")
    assert took < _SOON_S
    assert output == "PeerLostError (0,)\n"


_LATE = """
class Late:
    def __init__(self, call):
        self.call, self.itself = call, self

    def __del__(self, write=sys.stderr.write, ended=col.GroupError):
        try:
            self.call()
        except ended as error:
            write("refused\\n")
        except BaseException as error:
            write(f"{error!r}\\n")

x = np.ones(4)
sys.modules["late"] = [
    Late(lambda group=group, x=x: group.allreduce(x)), Late(lambda group=group, x=x: group.broadcast([x, x], 0)),
    Late(lambda group=group, x=x: group.allreduce(x[::2], async_op=True)), Late(lambda group=group: group.barrier()),
    Late(lambda group=group: group.allgather_object(1)), Late(lambda col=col, x=x: col.allreduce(x, "g")),
    Late(lambda group=group: group.split(0)), Late(lambda col=col: col.init_collective_group(1, 0, group_name="one")),
    Late(lambda col=col, rank=rank: col.init_collective_group(2, rank, group_name="two", init_method="tcp://[::1]:9")),
]
gc.disable()
end()
"""


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_calls_of_what_is_freed_last_are_refused(tmp_path: Path, backend: str) -> None:
    """Nothing can be imported any more then."""
    for code, _, errors, _ in run(tmp_path, backend, _LATE, _LATE):
        assert (code, errors) == (_CODE, "refused\n" * 9)
