"""What one rank is refused when a group is made, its peers hear at once; and programs may then ask for another backend.

A rank 0 that stops meanwhile is told of in time. Ranks ask for groups as programs do, over every way to meet that needs
no framework.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from pool import RankPool

from colltensor import backends, init_collective_group, net, table
from colltensor.backends.loopback import LoopbackSpec
from colltensor.errors import (
    BackendUnavailableError,
    CollectiveError,
    CollectiveTimeoutError,
    OptionError,
)
from colltensor.options import GroupOptions
from colltensor.rendezvous import Introduction
from colltensor.rendezvous.tcp import ServerExchange

pytestmark = pytest.mark.slow

TIMEOUT_S = 20.0


class Elsewhere(LoopbackSpec):
    """A backend that this rank lacks."""

    def available(self) -> str | None:
        return "no-such-device"


def ask(
    rank: int, world_size: int, init_method: str, attempts: Sequence[Sequence[Mapping[str, Any]]]
) -> list[Any]:
    """Ask for a group with each of this rank's options in turn; return the backends and errors, and the seconds."""
    numbers: dict[str, Any] = {"world_size": world_size, "rank": rank, "init_method": init_method}
    came: list[Any] = []
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends._registered, "device", LoopbackSpec())
        patch.setitem(backends._registered, "elsewhere", Elsewhere())
        if init_method.startswith("env://"):
            numbers = {}
            port = init_method.rpartition(":")[2]
            variables = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "RANK": rank,
                "WORLD_SIZE": world_size,
            }
            for name, value in variables.items():
                patch.setenv(name, str(value))
        for options in attempts[rank]:
            try:
                group = init_collective_group(**{"timeout_s": TIMEOUT_S, **numbers, **options})
                came.append((group.backend, float(group.allgather_object(rank)[-1])))
                group.destroy()
            except CollectiveError as error:
                came.append(error)
    return [*came, time.monotonic() - began]


@pytest.fixture(params=["file", "tcp", "env"])
def init_method(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}"
    with net.listen("127.0.0.1") as listener:
        port = listener.getsockname()[1]
    return f"{request.param}://127.0.0.1:{port}"


WRONG: list[tuple[Mapping[str, Any], type[CollectiveError], str]] = [
    ({"interface": "eth99"}, OptionError, "eth99"),
    ({"backend": "gloop"}, OptionError, "gloop"),
    ({"provider": "mpi", "backend": "gloo"}, OptionError, "'mpi'"),
    ({"timeout_s": "soon"}, OptionError, "'soon'"),
    ({"gloo_timeout": "soon"}, OptionError, "'soon'"),
    ({"backend": "loopback"}, OptionError, "loopback"),
]


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize(
    ("options", "kind", "words"), WRONG, ids=[words.strip("'") for _, _, words in WRONG]
)
def test_a_refused_option_is_heard_by_the_others(
    pool: RankPool,
    init_method: str,
    options: Mapping[str, Any],
    kind: type[CollectiveError],
    words: str,
    culprit: int,
) -> None:
    attempts: list[list[Mapping[str, Any]]] = [[{}], [{}], [{}]]
    attempts[culprit] = [options]
    results = pool.run(3, ask, init_method, attempts, timeout_s=40)
    own = results[culprit][0]
    for rank, (error, took_s) in enumerate(results):
        assert type(error) is kind
        assert words in str(error)
        assert took_s < 5
        if rank != culprit:
            assert f"on rank {rank} of 3: rank {culprit}: {own}" in str(error)


def test_a_file_that_rank_0_cannot_write_is_heard_of_by_the_others(pool: RankPool) -> None:
    """Nobody may make files in /proc, and all ranks can look there."""
    results = pool.run(3, ask, "file:///proc/colltensor-meeting", [[{}]] * 3, timeout_s=40)
    own = results[0][0]
    assert "/proc/colltensor-meeting" in str(own)
    for error, took_s in results:
        assert type(error) is OptionError
        assert str(error).endswith(str(own).partition(": ")[2])
        assert took_s < 5


def ask_with_secrets(
    rank: int, world_size: int, init_method: str, files: Sequence[str]
) -> list[Any]:
    """Ask for a group; each rank has its secret in a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLLTENSOR_SECRET_FILE", files[rank])
        return ask(rank, world_size, init_method, [[{}]] * 3)


@pytest.mark.parametrize("culprit", [0, 2])
def test_a_secret_that_a_rank_cannot_read_is_heard_of_by_the_others(
    pool: RankPool, tmp_path: Path, culprit: int
) -> None:
    with net.listen("127.0.0.1") as listener:
        init_method = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    (tmp_path / "secret").write_text("hush")
    files = [str(tmp_path / ("missing" if rank == culprit else "secret")) for rank in range(3)]
    results = pool.run(3, ask_with_secrets, init_method, files, timeout_s=40)
    for rank, (error, took_s) in enumerate(results):
        assert type(error) is OptionError
        assert (
            "missing" in str(error)
            if culprit or rank == culprit
            else "COLLTENSOR_SECRET" in str(error)
        )
        assert took_s < 5


@pytest.mark.parametrize("culprit", [0, 1])
def test_all_may_ask_for_another_backend_where_one_rank_lacks_the_first(
    pool: RankPool, init_method: str, culprit: int
) -> None:
    """The one that lacks it calls again before, or after, the others have heard; it is its next attempt that counts."""
    attempts = [[{"backend": "device"}, {"backend": "gloo"}] for _ in range(3)]
    results = pool.run(3, ask_for_device, init_method, attempts, culprit, timeout_s=60)
    for error, made, took_s in results:
        assert type(error) is BackendUnavailableError
        assert "no-such-device" in str(error)
        assert made == ("gloo", 2.0)
        assert took_s < 8


def ask_for_device(
    rank: int, world_size: int, init_method: str, attempts: Any, culprit: int
) -> list[Any]:
    """Ask for a backend of one name, which the culprit lacks."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == culprit:
            patch.setattr(LoopbackSpec, "available", Elsewhere.available)
        return ask(rank, world_size, init_method, attempts)


@pytest.mark.parametrize("culprit", [0, 1])
def test_ranks_that_knew_better_do_not_hear_of_a_backend_that_they_did_not_ask_for(
    pool: RankPool, init_method: str, culprit: int
) -> None:
    attempts: list[list[Mapping[str, Any]]] = [[{"backend": "gloo"}] for _ in range(3)]
    attempts[culprit] = [{"backend": "elsewhere"}, {"backend": "gloo"}]
    results = pool.run(3, ask, init_method, attempts, timeout_s=60)
    assert isinstance(results[culprit].pop(0), BackendUnavailableError)
    for made, took_s in results:
        assert made == ("gloo", 2.0)
        assert took_s < 8


STOPS = {
    "before it welcomes anybody": (ServerExchange, "_admit"),
    "before it says who is there": (Introduction, "agree"),
    "before it says where all are": (Introduction, "tabulate"),
    "before it connects": (table, "connect"),
    "before it makes the backend": (GroupOptions, "make"),
}


def ask_and_stop(
    rank: int, world_size: int, init_method: str, attempts: Any, where: str
) -> list[Any]:
    """Ask for a group; rank 0 stops in the middle of it."""

    def stop(*arguments: Any, **options: Any) -> Any:
        patch.setattr(place, name, going_on)
        os.kill(os.getpid(), signal.SIGSTOP)
        return going_on(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            place, name = STOPS[where]
            going_on = getattr(place, name)
            patch.setattr(place, name, stop)
        return ask(rank, world_size, init_method, attempts)


@pytest.mark.parametrize("where", STOPS)
def test_rank_0_that_stops_is_named_by_all_within_two_seconds_of_the_timeout(
    pool: RankPool, tmp_path: Path, where: str
) -> None:
    with net.listen("127.0.0.1") as listener:
        init_method = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    pool.run(3, ask, f"file://{tmp_path}", [[{}]] * 3)  # what is imported now takes no time later
    resumed = threading.Timer(6.0, lambda: os.kill(pool.pids[0], signal.SIGCONT))
    resumed.start()
    try:
        attempts = [[{"timeout_s": 2.0, "backend": "gloo"}]] * 3
        results = pool.run(3, ask_and_stop, init_method, attempts, where, timeout_s=40)
    finally:
        resumed.join()
    for error, took_s in results[1:]:
        assert isinstance(error, CollectiveTimeoutError)
        assert "timed out after" in str(error)
        assert error.ranks == (0,)
        assert took_s < 4
