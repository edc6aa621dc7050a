"""Starts the worlds of one number of ranks, and lets each do something while the others sleep.

Ranks talk to the coordinator over a Unix socket in a temporary folder. They end when it is closed,
so that nothing is left however the coordinator ends; what does not end is killed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from harness.rank import Settings

HERE = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "JAX_PLATFORMS": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    **dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1"),
}
# Their own binding off, as all libraries run under one policy; more ranks than cores allowed.
MPI_OPTIONS = {"Open MPI": "--bind-to none --map-by :OVERSUBSCRIBE", "MPICH": "-bind-to none"}
START_S = 120.0
REPLY_S = 300.0


class WorldError(RuntimeError):
    """A world did not start, died, or gave no reply; has the end of what it printed."""


@dataclass(frozen=True, eq=False)
class Kind:
    """A world that can be started.

    Attributes:
        name: The world's name.
        library: The class of its ranks, as ``module:class``; see ``harness.rank``.
        python: The interpreter of its ranks.
        needs: Modules that must be installed in the coordinator's own environment.
        environment: Variables of its ranks.
        folder: Where its ranks start, and so which checkout's package they import; None where the
            coordinator did.
        launcher: What starts its ranks: an MPI, by its name, or ``ray``; by default the coordinator
            does.
        options: What the class of its ranks is told.
        prefixes: Words before the command of each rank, in turn.
    """

    name: str
    library: str
    python: str = sys.executable
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    folder: str | None = None
    launcher: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    prefixes: Sequence[Sequence[str]] = ((),)

    def lacking(self) -> str | None:
        """Return why it cannot be started here, or None."""
        missing = [module for module in self.needs if importlib.util.find_spec(module) is None]
        if missing:
            return f"{', '.join(missing)} not installed"
        if not self.python:
            return f"no --{self.name}-python given"
        if self.launcher in MPI_OPTIONS and not self.mpiexec.is_file():
            return f"no {self.mpiexec}"
        return None

    @property
    def mpiexec(self) -> Path:
        """The launcher beside the interpreter."""
        return Path(self.python).absolute().parent / "mpiexec"

    def commands(self, settings: Settings) -> list[list[str]]:
        """Return the command lines that start its ranks."""
        rank = [self.python, "-m", "harness.rank", settings.dump()]
        if self.launcher in MPI_OPTIONS:
            options = f"{MPI_OPTIONS[self.launcher]} -n {settings.ranks}"
            return [[str(self.mpiexec), *options.split(), *rank]]
        if self.launcher == "ray":
            return [[self.python, "-m", "harness.ray_world", settings.dump()]]
        return [
            [*self.prefixes[number % len(self.prefixes)], *rank, str(number)]
            for number in range(settings.ranks)
        ]


class World:
    """The running ranks of one library.

    ``versions`` and ``pid`` are what rank 0 runs on, and its process.
    """

    def __init__(self, kind: Kind, settings: Settings) -> None:
        self.name = kind.name
        self.versions: dict[str, str] = {}
        self.pid = 0
        self._links: dict[int, Connection] = {}
        self._holds: list[int] = []
        self.ranks = settings.ranks
        self._log = Path(settings.folder, f"{kind.name}.log")
        # A rank of this interpreter and checkout imports what the coordinator would.
        own = sys.path if kind.python == sys.executable and kind.folder is None else []
        path = os.pathsep.join(filter(None, (str(HERE), *own, os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path, **kind.environment}
        self._processes: list[subprocess.Popen[bytes]] = []
        with self._log.open("wb") as log:
            for command in kind.commands(settings):
                # In sessions of their own, so that Ctrl-C reaches the coordinator alone, which ends
                # them in order.
                place = {"env": environment, "cwd": kind.folder, "start_new_session": True}
                ends = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
                self._processes.append(subprocess.Popen(command, **place, **ends))

    @property
    def complete(self) -> bool:
        """True when all ranks have said hello."""
        return len(self._links) == self.ranks

    def enter(self, rank: int, link: Connection, pid: int, versions: dict[str, str]) -> None:
        """Take a rank in that said hello."""
        self._links[rank] = link
        # not the number, which may be another process's when it comes to a kill
        self._holds.append(os.pidfd_open(pid))
        if rank == 0:
            self.versions, self.pid = versions, pid

    def check(self) -> None:
        """Raise WorldError if a process has ended."""
        if any(process.poll() is not None for process in self._processes):
            raise self._error("a process ended")

    def ask(self, name: str, *arguments: Any) -> list[Any]:
        """Have all ranks do something at the same time, and return what each replies."""
        asked, replies = f"{name}{arguments}", []
        links = [self._links[rank] for rank in range(self.ranks)]
        try:
            for link in links:
                link.send((name, arguments))
            deadline = time.monotonic() + REPLY_S
            for rank, link in enumerate(links):
                if not link.poll(deadline - time.monotonic()):
                    raise self._error(f"{asked}: no reply of rank {rank} within {REPLY_S:.0f} s")
                fine, reply = link.recv()
                if not fine:
                    raise self._error(f"{asked}: rank {rank}: {reply}")
                replies.append(reply)
        except (EOFError, ConnectionError) as error:
            raise self._error(f"{asked}: a rank died") from error
        return replies

    def close(self) -> None:
        """End all processes; returns when they are gone."""
        for link in self._links.values():
            link.close()
        # one that is still starting does not know yet that it is to end
        first_s = 20 if self.complete else 1
        for patience_s, number in ((first_s, signal.SIGTERM), (10, signal.SIGKILL), (5, None)):
            deadline = time.monotonic() + patience_s
            for process in self._processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0, deadline - time.monotonic()))
            for process in self._processes:
                if process.poll() is None and number is not None:
                    os.killpg(process.pid, number)
        for hold in self._holds:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(hold, signal.SIGKILL)
            os.close(hold)

    def _error(self, what: str) -> WorldError:
        text = self._log.read_text(errors="replace")[-4000:]
        return WorldError(f"{self.name}: {what}\n{text}")


class Here:
    """A world of one rank, in the coordinator's own process."""

    ranks = 1

    def __init__(
        self, make: Callable[[Settings, int], Any], folder: str, options: dict[str, Any]
    ) -> None:
        self._rank = make(Settings("here", "", 1, folder, "", pin=False, options=options), 0)

    def ask(self, name: str, *arguments: Any) -> list[Any]:
        """Have the rank do something."""
        return [getattr(self._rank, name)(*arguments)]


@contextmanager
def started(kinds: Sequence[Kind], ranks: int, *, pin: bool = False) -> Iterator[dict[str, World]]:
    """Start a world of each kind with so many ranks, and end them all when the context is left.

    Raises:
        WorldError: One did not start.
    """
    with ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))
        folder = tempfile.mkdtemp(prefix="benchmarks-")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        address = f"{folder}/coordinator"
        listener.bind(address)
        listener.listen(64)
        worlds: dict[str, World] = {}
        try:
            for kind in kinds:
                place = (ranks, folder, address, pin, kind.options)
                worlds[kind.name] = World(kind, Settings(kind.name, kind.library, *place))
                stack.callback(worlds[kind.name].close)
            _await(worlds, listener)
            yield worlds
        finally:
            # a second Ctrl-C must not keep the worlds from being ended
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _await(worlds: dict[str, World], listener: socket.socket) -> None:
    """Take in the ranks as they say hello."""
    deadline = time.monotonic() + START_S
    listener.settimeout(0.2)
    while not all(world.complete for world in worlds.values()):
        if time.monotonic() > deadline:
            late = [name for name, world in worlds.items() if not world.complete]
            raise WorldError(f"{', '.join(late)}: not all ranks came within {START_S:.0f} s")
        for world in worlds.values():
            world.check()
        with suppress(TimeoutError):
            end, _ = listener.accept()
            end.setblocking(True)
            link = Connection(end.detach())
            name, rank, pid, versions = link.recv()
            worlds[name].enter(rank, link, pid, versions)
