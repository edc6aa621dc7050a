"""Ray for the tests: one cluster of two nodes on this host, one crew of actors, nothing left of either."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from crew import FIRST_NODE, SECOND_NODE, Crew, Member, left_in_ray, named_actors
from direct import TRANSPORT
from pool import ONE_THREAD
from ray.cluster_utils import Cluster

import colltensor.ray as cr
from colltensor.ray import link, source

STORE_BYTES = 100 << 20
CREW_SIZE = 4


def search_path() -> str:
    """What the workers need on PYTHONPATH: this folder, and the package where it is not installed."""
    found = importlib.util.find_spec("colltensor")
    assert found is not None
    assert found.origin is not None
    folders = [str(Path(__file__).parent)]
    if "site-packages" not in Path(found.origin).parts:
        folders.append(str(Path(found.origin).parent.parent))
    return os.pathsep.join(folders)


@pytest.fixture(scope="session")
def cluster(nothing_left: None) -> Iterator[Cluster]:
    """Two nodes, simulated on this host, and this process connected to them; at the end Ray must hold nothing more.

    The dashboard serves Ray's state API.
    """
    environment = {
        **ONE_THREAD,
        "PYTHONPATH": search_path(),
        "RAY_DEDUP_LOGS": "0",
        "RAY_metrics_report_interval_ms": "1000",  # so that tests need not wait for 10 s
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        cluster = Cluster()
        try:
            for resource in (FIRST_NODE, SECOND_NODE):
                cluster.add_node(
                    num_cpus=1, resources={resource: 1.0}, object_store_memory=STORE_BYTES,
                    include_dashboard=resource == FIRST_NODE,
                )  # fmt: skip
            ray.init(address=cluster.address, log_to_driver=False)
            yield cluster
            assert left_in_ray() == []
        finally:
            ray.shutdown()
            cluster.shutdown()
            # the dashboard's, which Ray kills
            for folder in Path(tempfile.gettempdir()).glob("pymp-*"):
                shutil.rmtree(folder)


@pytest.fixture(scope="session")
def crew(cluster: Cluster) -> Iterator[Crew]:
    """The session's actors; a test that ends one spawns its own instead."""
    crew = Crew(CREW_SIZE)
    yield crew
    for actor in crew.actors:
        ray.kill(actor)


@pytest.fixture(autouse=True)
def no_named_actor_left(cluster: Cluster) -> Iterator[None]:
    """Fail a test that leaves a named actor behind."""
    yield
    assert named_actors() == []


@pytest.fixture
def spawn(cluster: Cluster) -> Iterator[Callable[..., Any]]:
    """Start actors for one test: ``spawn(Member, num_cpus=0, ...)``; they end with it."""
    spawned = []

    def start(kind: type = Member, **options: Any) -> Any:
        actor = ray.remote(**{"num_cpus": 0, **options})(kind).remote()
        spawned.append(actor)
        return actor

    yield start
    for actor in spawned:
        ray.kill(actor)


@pytest.fixture(scope="session")
def transports(frameworks: tuple[str, ...], cluster: Any) -> Iterator[None]:
    names = [name for name in frameworks if name in TRANSPORT]
    assert cr.register_tensor_transports(names) == tuple(TRANSPORT[name] for name in names)
    yield
    link.LINKS.close()
    source.close()


@pytest.fixture(scope="session")
def actors(transports: None) -> Iterator[SimpleNamespace]:
    """For direct transport: two actors on one node, ``far`` on the other; the tests leave them as they were."""
    made = [
        _direct(Member, resources={node: 0.01}) for node in (FIRST_NODE, FIRST_NODE, SECOND_NODE)
    ]
    yield SimpleNamespace(first=made[0], second=made[1], far=made[2], all=made)
    for actor in made:
        ray.kill(actor)


@pytest.fixture
def spawn_direct(transports: None) -> Iterator[Callable[..., Any]]:
    """Start actors with direct transport for one test; they end with it."""
    spawned = []

    def start(kind: type = Member, **options: Any) -> Any:
        spawned.append(_direct(kind, **options))
        return spawned[-1]

    yield start
    for actor in spawned:
        ray.kill(actor)


def _direct(kind: type, **options: Any) -> Any:
    return ray.remote(**{"num_cpus": 0, "enable_tensor_transport": True, **options})(kind).remote()
