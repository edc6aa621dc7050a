"""The child's side of the pool of ranks: takes calls from its parent, keeps groups between them.

Runs in a process that `pool.RankPool` started.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import os
import pickle
import reprlib
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>
HOST_VARIABLE = "COLLTENSOR_HOST_ID"
NO_RESULT = pickle.dumps(None)


@dataclass(frozen=True)
class Call:
    """One call of a test's function, as the parent sends it to a rank.

    Attributes:
        rank: The rank that this process is during the call.
        world_size: How many ranks run the function.
        edition: Counts up when a rank was replaced or a run failed: groups of older editions are stale.
        function: The pickled pair of function and arguments; unpickled under the rank's own error handling.
    """

    rank: int
    world_size: int
    edition: int
    function: bytes


@dataclass(frozen=True)
class Reply:
    """What a rank sends back.

    Attributes:
        result: The pickled return value.
        report: The traceback as text where the function raised, else None.
        error: The pickled exception, or None where there was none or it cannot be pickled.
        groups_broken: True where a kept group cannot be used any more.
    """

    result: bytes
    report: str | None = None
    error: bytes | None = None
    groups_broken: bool = False


@dataclass
class _State:
    """What the process remembers between calls."""

    folder: Path
    rank: int = -1
    edition: int = 0


_state: _State | None = None
_groups: dict[tuple[Any, ...], Any] = {}


def alone(folder: Path) -> None:
    """Make this process the only rank of a run, for a program that calls tests' functions without a pool."""
    global _state
    _state = _State(folder, rank=0)


def leave() -> None:
    """Destroy the groups that are kept, where there is no pool to ask for it."""
    _discard_groups()


@contextlib.contextmanager
def on_host(name: str | None) -> Iterator[None]:
    """Simulate a host for the groups that are made meanwhile; nothing is simulated where there is no name."""
    before = os.environ.get(HOST_VARIABLE)
    try:
        if name is not None:
            os.environ[HOST_VARIABLE] = f"simulated-{name}"
        yield
    finally:
        os.environ.pop(HOST_VARIABLE, None)
        if before is not None:
            os.environ[HOST_VARIABLE] = before


def group_of(
    world_size: int,
    backend: str = "gloo",
    provider: str | None = None,
    *,
    timeout_s: float = 30.0,
    hosts: str = "",
) -> Any:
    """Return this rank's initialised group, made by the first call and kept for later ones.

    Ranks 0 to ``world_size - 1`` must all call, with the same arguments. A test that breaks or
    destroys its group on purpose makes one of its own; where it forgot, the pool discards the group.

    Args:
        world_size: Ranks in the group; at most the world size of the run.
        backend: The backend's name.
        provider: The Gloo provider (``"pygloo"``, ``"torch"``), or None for the backend's own choice.
        timeout_s: The group's timeout.
        hosts: A letter for every rank, equal where two ranks are to be on one simulated host; "" simulates none.

    Raises:
        RuntimeError: Not called in a rank of the pool.
    """
    if _state is None or _state.rank < 0:
        raise RuntimeError(
            "group_of() works only inside a function that pool.run() calls in a rank"
        )
    key = (world_size, backend, provider, timeout_s, hosts)
    if key not in _groups:
        colltensor = importlib.import_module("colltensor")
        with on_host(hosts[_state.rank] if hosts else None):
            _groups[key] = colltensor.init_collective_group(
                world_size,
                _state.rank,
                backend,
                f"pool-{world_size}-{backend}-{provider}-{timeout_s:g}-{hosts}-{_state.edition}",
                timeout_s=timeout_s,
                init_method=f"file://{_state.folder / 'rendezvous'}",
                provider=provider,
            )
    return _groups[key]


def _discard_groups() -> None:
    for group in _groups.values():
        importlib.import_module("colltensor").destroy_collective_group(group.name)
    _groups.clear()


def _is_broken(group: Any) -> bool:
    # The package has no public way to ask; a group that raised only a mismatch is as good as before.
    return group._engine.broken is not None


def _variables_of(error: BaseException) -> str:
    """Where a bare assert failed, return its variables: pytest does not rewrite asserts in this process."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if not isinstance(error, AssertionError) or error.args or not frames:
        return ""
    lines = (
        f"    {name} = {reprlib.repr(value)}" for name, value in frames[-1][0].f_locals.items()
    )
    return "\n".join(["  with:", *lines])


def _answer(call: Call) -> Reply:
    """Run one call; whatever it raises, SystemExit and KeyboardInterrupt too, becomes the reply."""
    assert _state is not None
    try:
        if call.edition != _state.edition:
            _discard_groups()
        _state.rank, _state.edition = call.rank, call.edition
        function: Callable[..., Any]
        function, arguments = pickle.loads(call.function)
        result = function(call.rank, call.world_size, *arguments)
        return Reply(pickle.dumps(result), groups_broken=any(map(_is_broken, _groups.values())))
    except BaseException as error:
        report = traceback.format_exc() + _variables_of(error)
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)
        except Exception:
            # an exception class may refuse to be pickled in any way it likes; its text is sent
            pickled = None
        return Reply(NO_RESULT, report, pickled)


def serve(descriptor: int, folder: str, environment: Mapping[str, str]) -> None:
    """Answer calls until the parent closes its end, then leave the groups and return."""
    global _state
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.environ.update(environment)
    _state = _State(Path(folder))
    connection = Connection(descriptor)
    while True:
        try:
            call = connection.recv()
        except EOFError:
            break
        reply = _answer(call)
        sys.stdout.flush()
        connection.send(reply)
    _discard_groups()
