"""Every operation on device arrays: all types, ops, layouts, containers; ranks as processes and as threads."""

from __future__ import annotations

from pathlib import Path

import gpu_threads
import pytest
from gpu_cases import CASES, run
from pool import RankPool
from worlds import assert_same_bits


@pytest.mark.parametrize("name", CASES)
def test_processes(gpu_pool: RankPool, size: int, name: str, libraries: tuple[str, ...]) -> None:
    # Time enough: contexts of processes take turns on the device, a few milliseconds each.
    assert_same_bits(gpu_pool.run(size, run, name, libraries, timeout_s=500))


@pytest.mark.needs("torch", "cupy")
@pytest.mark.parametrize("name", ["reductions", "moves", "layouts", "stacks", "trees"])
def test_threads_of_one_process(gpu_pool: RankPool, size: int, name: str, tmp_path: Path) -> None:
    arguments = (size, name, ("torch", "cupy"), str(tmp_path))
    (reports,) = gpu_pool.run(1, gpu_threads.run_cases, *arguments, timeout_s=500)
    assert_same_bits(reports)
