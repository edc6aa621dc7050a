"""What the doctor tries, each in processes of its own, which print one JSON object.

python -m colltensor.cli.selftest backend NAME       a rank: right values, latency between cores
python -m colltensor.cli.selftest arrays FRAMEWORK   one rank with a framework's arrays
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
import time
from typing import Any, Final

from colltensor import Group, destroy_collective_group, init_collective_group

_TIMEOUT_S: Final = 20.0
_CALLS: Final = 200
_ROUNDS: Final = 3
_MOST_CORES: Final = 8
_HOSTS: Final = ("first", "first", "second")
"""Of the ranks of ``hierarchical``, which needs two hosts and on one of them two ranks."""


def _check(found: Any, right: list[float], what: str) -> None:
    if found.reshape(-1).tolist() != right:
        raise AssertionError(f"{what}: expected {right}, got {found.reshape(-1).tolist()}")


def _try_backend(name: str) -> dict[str, Any]:
    """Run an allreduce, a broadcast and a transfer, small and large ones; all ranks call."""
    np = importlib.import_module("cupy" if name == "nccl" else "numpy")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if name == "hierarchical":
        os.environ["COLLTENSOR_HOST_ID"] = _HOSTS[rank]
    if name == "nccl":
        np.cuda.Device(rank).use()
    group = init_collective_group(size, rank, name, "doctor", timeout_s=_TIMEOUT_S)
    for count in (3, 100_000):
        _try_calls(group, np, count)
    report: dict[str, Any] = {"why": group.why, "ranks": group.world_size}
    if name == "shm":
        report["latency_us"] = _latencies(group, np)
    destroy_collective_group("doctor")
    return report


def _try_calls(group: Group, np: Any, count: int) -> None:
    rank, size = group.rank, group.world_size
    x = np.arange(count, dtype="float64") + rank
    group.allreduce(x)
    right = [float(size * index + size * (size - 1) // 2) for index in range(count)]
    _check(x, right, "allreduce")
    x = np.arange(count, dtype="float64") * (rank + 1)
    group.broadcast(x, size - 1)
    _check(x, [float(index * size) for index in range(count)], "broadcast")
    x = np.arange(count, dtype="float64") + 7 * (rank + 1)
    if size > 1 and rank == 0:
        group.send(x, 1)
    elif rank == 1:
        group.recv(x, 0)
        _check(x, [float(index + 7) for index in range(count)], "recv")
    group.barrier()


def _latencies(group: Group, np: Any) -> list[dict[str, Any]]:
    """Measure an allreduce of 8 bytes with the ranks on two cores.

    These are the first core and, in turn, each of some others.
    """
    allowed = os.sched_getaffinity(0)
    cores = sorted(allowed)
    step = max(1, (len(cores) - 1) // (_MOST_CORES - 1))

    found = []
    x = np.zeros(1)
    for other in cores[1::step][: _MOST_CORES - 1]:
        os.sched_setaffinity(0, {(cores[0], other)[group.rank]})

        rounds = []
        for _ in range(_ROUNDS):
            group.barrier()
            began = time.perf_counter()
            for _ in range(_CALLS):
                group.allreduce(x)
            rounds.append((time.perf_counter() - began) / _CALLS * 1e6)
        found.append({"cores": [cores[0], other], "us": round(statistics.median(rounds), 3)})

    os.sched_setaffinity(0, allowed)
    return found


def _try_arrays(framework: str) -> dict[str, Any]:
    """Let a group of one rank work on a framework's array."""
    module = importlib.import_module(framework)
    if framework == "jax":
        x = module.numpy.arange(3, dtype="float32")
    elif framework == "mlx":
        x = importlib.import_module("mlx.core").array([0.0, 1.0, 2.0])
    elif framework == "tensorflow":
        x = module.constant([0.0, 1.0, 2.0])
    elif framework == "paddle":
        x = module.to_tensor([0.0, 1.0, 2.0])
    else:
        x = module.arange(3, dtype=module.float32)

    group = init_collective_group(1, 0, group_name="doctor")
    result = group.allreduce(x)
    if [float(each) for each in result] != [0.0, 1.0, 2.0]:
        raise AssertionError(f"allreduce: expected [0, 1, 2], got {result}")

    # An allreduce of one rank may do nothing; a copy from one array to another reads and writes.
    result = group.sendrecv(x, 0, x * 0, 0)
    if [float(each) for each in result] != [0.0, 1.0, 2.0]:
        raise AssertionError(f"sendrecv: expected [0, 1, 2], got {result}")

    return {}


def main() -> None:
    """Try what the arguments say."""
    kind, name = sys.argv[1:3]
    report = _try_backend(name) if kind == "backend" else _try_arrays(name)
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
