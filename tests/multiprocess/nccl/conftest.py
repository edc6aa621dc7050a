"""The fixtures of the nccl backend's tests on a fake device.

Ranks are threads. That NCCL itself does what is asked of it needs a GPU: ``tests/gpu``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from nccl_jax import inside, jax_modules
from nccl_world import World, as_if_in_processes_of_their_own, world

from colltensor import adapters


@pytest.fixture(params=[2, 3, 4])
def size(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[World]:
    with world(tmp_path, monkeypatch, seed=len(request.node.name)) as made:
        yield made


@pytest.fixture(params=["processes", "threads"])
def ranks_of_either_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks whose synchronous calls go on the frameworks' streams, and ranks that share a process."""
    if request.param == "processes":
        as_if_in_processes_of_their_own(monkeypatch)


@pytest.fixture
def jax_targets(ranks: World) -> None:
    """Register the targets of jitted collectives, and their adapter among the world's own."""
    jax_modules()
    inside("targets").register()
    adapters._registered.append(inside("device").ADAPTER)
