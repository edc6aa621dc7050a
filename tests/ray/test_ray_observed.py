"""Metrics and events of collectives, read back from where Ray shows them."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import ray
from crew import FIRST_NODE, SECOND_NODE, Crew, Member, join, new_name

import colltensor as col
from colltensor.ray import observe

PATIENCE_S = 30.0
LATE_S = 0.2

Tags = tuple[str, str, str]


def sample(line: str) -> tuple[str, dict[str, str], float] | None:
    """The name, tags and value of one line of Prometheus' text format."""
    found = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line)
    return (
        None
        if found is None
        else (found[1], dict(re.findall(r'(\w+)="([^"]*)"', found[2])), float(found[3]))
    )


def exported(group: str) -> dict[str, dict[tuple[str, str], float]]:
    """What the nodes export of a group: values by metric, then by operation and rank; of a histogram, sum and count."""
    values: dict[str, dict[tuple[str, str], float]] = {}
    for node in ray.nodes():
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(address, timeout=10) as answer:
            for line in answer.read().decode().splitlines():
                found = sample(line) if "ray_colltensor_" in line else None
                if found is not None and found[1].get("group") == group and "le" not in found[1]:
                    name, tags, value = found
                    assert {"group", "operation", "rank"} <= tags.keys()
                    values.setdefault(name.removeprefix("ray_colltensor_"), {})[
                        tags["operation"], tags["rank"]
                    ] = value
    return values


def events(group: str) -> list[dict[str, Any]]:
    """The events of a group in ``ray timeline``."""
    return [
        event
        for event in ray.timeline()
        if event["cat"] == "colltensor" and event["args"]["group"] == group
    ]


def awaited(read: Callable[[], Any], is_there: Callable[[Any], bool]) -> Any:
    """Read until what is expected is there; what was read last when patience is over."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_there(found := read()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def work(rank: int, name: str) -> None:
    """Three allreduces of 4 KiB, one of them asynchronous and late, a barrier, and a call that is refused."""
    x = np.zeros(1024, np.float32)
    col.allreduce(x, name)
    col.allreduce([x[:512], x[512:]], name)
    if rank == 1:
        time.sleep(LATE_S)
    col.allreduce(x, name, async_op=True).wait()
    col.barrier(name)
    with pytest.raises(col.UnsupportedTensorError):
        col.broadcast("no tensor", 0, name)


def switch(rank: int, metrics: bool, timeline: bool) -> None:
    observe(metrics=metrics, timeline=timeline)


@pytest.fixture
def observing(crew: Crew) -> Iterator[None]:
    """Both are asked for in the first two actors."""
    crew.run(2, switch, True, True)
    yield
    crew.run(2, switch, False, False)


def test_metrics_and_events_of_a_group(crew: Crew, observing: None) -> None:
    with crew.group(2) as name:
        crew.run(2, work, name)
    found = awaited(lambda: exported(name), lambda values: len(values.get("errors_total", {})) == 2)
    ranks = ("0", "1")
    assert found["operations_total"] == {
        **{("allreduce", rank): 3 for rank in ranks},
        **{("barrier", rank): 1 for rank in ranks},
    }
    assert found["bytes_total"] == {("allreduce", rank): 3 * 4096 for rank in ranks}
    assert found["errors_total"] == {("broadcast", rank): 1 for rank in ranks}
    assert found["duration_seconds_count"] == found["operations_total"]
    assert LATE_S / 2 < found["duration_seconds_sum"]["allreduce", "0"] < 10
    assert found["duration_seconds_sum"]["allreduce", "1"] > 0

    shown = awaited(lambda: events(name), lambda events: len(events) == 10)
    for rank in ranks:
        own = sorted(
            (event for event in shown if event["args"]["rank"] == rank),
            key=lambda event: event["ts"],
        )
        assert [event["name"] for event in own] == [
            *[f"allreduce '{name}'"] * 3,
            f"barrier '{name}'",
            f"broadcast '{name}'",
        ]
        assert [event["args"]["nbytes"] for event in own] == ["4096"] * 3 + ["0", "0"]
        assert "UnsupportedTensorError" in own[-1]["args"]["error"]
        assert len({event["tid"] for event in own}) == 1
    longest = max(event["dur"] for event in shown if event["args"]["rank"] == "0")
    assert LATE_S / 2 * 1e6 < longest < 10e6
    json.dumps(shown)  # as it is written to a file


def test_nothing_is_reported_where_it_was_not_asked_for(crew: Crew, observing: None) -> None:
    crew.run(1, switch, False, True)  # replaces what was asked for
    with crew.group(3) as name:
        crew.run(3, work, name)
    found = awaited(lambda: exported(name), lambda values: bool(values.get("duration_seconds_sum")))
    assert {rank for _, rank in found["operations_total"]} == {"1"}
    shown = awaited(lambda: events(name), lambda events: len(events) == 10)
    assert {event["args"]["rank"] for event in shown} == {"0", "1"}


def in_a_task(rank: int, name: str) -> list[float]:
    join(rank, 2, name)
    try:
        return col.allreduce(np.full(2, rank + 1.0), name).tolist()
    finally:
        col.destroy_collective_group(name)


def test_the_variable_asks_for_it_in_tasks_and_actors(
    crew: Crew, spawn: Callable[..., Any]
) -> None:
    """A runtime environment reaches every worker that it is for, and no program is changed."""
    asked = {"runtime_env": {"env_vars": {"COLLTENSOR_OBSERVE": "metrics,timeline"}}}
    name = new_name()
    actor = spawn(Member, resources={FIRST_NODE: 0.01}, **asked)
    task = ray.remote(num_cpus=0, resources={SECOND_NODE: 0.01}, **asked)(in_a_task)
    assert (
        ray.get([actor.run.remote(in_a_task, 0, name), task.remote(1, name)], timeout=60)
        == [[3.0, 3.0]] * 2
    )
    expected = {("allreduce", "0"): 1.0, ("allreduce", "1"): 1.0}
    assert (
        awaited(lambda: exported(name).get("operations_total"), lambda counts: counts == expected)
        == expected
    )
    shown = awaited(lambda: events(name), lambda events: len(events) == 2)
    assert {event["args"]["rank"] for event in shown} == {"0", "1"}


def test_a_driver_is_observed_as_well(crew: Crew) -> None:
    observe()
    try:
        col.init_collective_group(1, 0, group_name="of the driver")
        col.allreduce(np.zeros(2), "of the driver")
    finally:
        observe(metrics=False, timeline=False)
        col.destroy_collective_group("of the driver")
    expected = {("allreduce", "0"): 16.0}
    found = awaited(
        lambda: exported("of the driver").get("bytes_total"), lambda values: values == expected
    )
    assert found == expected
    assert [event["name"] for event in awaited(lambda: events("of the driver"), bool)] == [
        "allreduce 'of the driver'"
    ]
