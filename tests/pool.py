"""A pool of rank processes, started once and reused by every test of a session.

def sums(rank, world_size, scale):          # top-level, so that it can be pickled
group = group_of(world_size, "gloo", "torch")
return group.allreduce(numpy.full(3, rank * scale))

def test_sums(pool):
assert pool.run(4, sums, 2)[0].tolist() == [12, 12, 12]
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from pool_rank import Call, Reply, group_of, on_host

__all__ = ["RankPool", "RanksFailedError", "group_of", "on_host"]

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "JAX_PLATFORMS": "cpu",
    "PYTHONUNBUFFERED": "1",
}
"""The environment of a rank: one thread each, JAX on the CPU."""

STACKS_WAIT_S = 1.0
EXIT_WAIT_S = 30.0
LOG_TAIL = 6000


class RanksFailedError(Exception):
    """Ranks raised, died or overran; the message holds every rank's traceback.

    Attributes:
        reports: What each failed rank has to say, by rank.
        errors: The exceptions of the ranks that raised one that can be pickled, by rank.
        results: The return values of the ranks that did return, by rank.
    """

    def __init__(
        self,
        title: str,
        reports: Mapping[int, str],
        errors: Mapping[int, BaseException],
        results: Mapping[int, Any],
    ) -> None:
        self.reports = dict(reports)
        self.errors = dict(errors)
        self.results = dict(results)
        parts = [f"rank {rank}: {report.rstrip()}" for rank, report in sorted(reports.items())]
        super().__init__("\n\n".join([title, *parts]))


class _Rank:
    """One child process: its pid, its connection, its log."""

    def __init__(
        self, index: int, folder: Path, environment: Mapping[str, str], prefix: Sequence[str]
    ) -> None:
        ours, theirs = socket.socketpair()
        self.log = folder / f"rank{index}.log"
        search_path = [entry or os.getcwd() for entry in sys.path]
        program = (
            f"import sys; sys.path[:] = {search_path!r}; import pool_rank; "
            f"pool_rank.serve({theirs.fileno()}, {str(folder)!r}, {dict(environment)!r})"
        )
        with theirs, self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, **environment},
            )
        self.connection = Connection(ours.detach())
        self.log_start = self.log.stat().st_size

    def call(self, call: Call) -> None:
        self.log_start = self.log.stat().st_size
        # A rank that died while idle is found when the answer does not come.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(call)

    def output(self) -> str:
        """What the rank printed during the call."""
        with self.log.open("rb") as log:
            log.seek(self.log_start)
            text = log.read().decode(errors="replace").strip()
        return f"its output:\n{text[-LOG_TAIL:]}" if text else "it printed nothing"

    def ask_for_stacks(self) -> None:
        """Have the stacks of all its threads written to its output, also of a stopped process."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGUSR1)

    def overran(self, seconds: float) -> str:
        """End the process, whose stacks were asked for a moment ago."""
        report = f"did not return within {seconds:.0f} s; {self.output()}"
        self.kill()
        return report

    def ended(self) -> str | None:
        """Wait for the exit of a process whose connection is closed; say what was wrong with it."""
        deadline = time.monotonic() + EXIT_WAIT_S
        # WNOWAIT leaves the process unreaped, so that its number is still its own in kill().
        while (
            status := os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        ) is None:
            if time.monotonic() > deadline:
                self.ask_for_stacks()
                time.sleep(STACKS_WAIT_S)
                return self.overran(EXIT_WAIT_S)
            time.sleep(0.01)
        how = f"exited with code {status.si_status}"
        if status.si_code != os.CLD_EXITED:
            how = f"was killed by {signal.Signals(status.si_status).name}"
        report = f"process {self.process.pid} {how}; {self.output()}"
        self.kill()
        return report if status.si_status else None

    def kill(self) -> None:
        """End the process and what it started: its own session's process group, nobody else's."""
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class RankPool:
    """Rank processes that are started when first needed and kept until `close`.

    One run at a time; rank r is the same process in every run, whatever the world size, until it
    is replaced because it died, overran or left a run unfinished.
    """

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        prefixes: Sequence[Sequence[str]] = ((),),
    ) -> None:
        """Make an empty pool.

        Args:
            folder: An existing folder for logs and rendezvous files, which the caller removes.
            environment: Variables on top of this process's own; one thread each, JAX on the CPU by default.
            prefixes: Words before the command of rank 0, 1, ..., in turns; the command replaces that process.
        """
        self.folder = folder
        self._prefixes = prefixes
        self.environment = {**ONE_THREAD, **(environment or {}), "TMPDIR": str(folder / "tmp")}
        for name in ("tmp", "rendezvous"):
            (folder / name).mkdir()
        self._ranks: dict[int, _Rank] = {}
        self._edition = 1
        self._lock = threading.Lock()

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes of ranks 0, 1, ... as far as they were needed so far."""
        return tuple(rank.process.pid for _, rank in sorted(self._ranks.items()))

    def run(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        timeout_s: float = 60.0,
        grace_s: float = 15.0,
        may_die: Collection[int] = (),
    ) -> list[Any]:
        """Run ``function(rank, world_size, *args)`` in each of ``world_size`` ranks.

        Args:
            world_size: How many ranks.
            function: A top-level function of an importable module.
            *args: The same for every rank; pickled.
            timeout_s: All ranks must have returned after this time.
            grace_s: Time that the others have once a rank failed.
            may_die: Ranks whose death (by a signal or an exit) is expected; their result is None.

        Returns:
            The results by rank.

        Raises:
            RanksFailedError: A rank raised, died or overran. The ones that died or overran are replaced.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "pool.run() belongs to the main thread: ranks die with the thread that started them"
            )
        payload = pickle.dumps((function, args))
        with self._lock:
            for rank in range(world_size):
                if rank not in self._ranks:
                    prefix = self._prefixes[rank % len(self._prefixes)]
                    self._ranks[rank] = _Rank(rank, self.folder, self.environment, prefix)
            for rank in range(world_size):
                self._ranks[rank].call(Call(rank, world_size, self._edition, payload))
            return self._outcome(world_size, function, timeout_s, grace_s, may_die)

    def _outcome(
        self,
        world_size: int,
        function: Callable[..., Any],
        timeout_s: float,
        grace_s: float,
        may_die: Collection[int],
    ) -> list[Any]:
        results: dict[int, Any] = {}
        reports: dict[int, str] = {}
        errors: dict[int, BaseException] = {}
        stale = False
        busy = set(range(world_size))
        began = time.monotonic()
        try:
            for rank, reply in self._replies(busy, began + timeout_s, reports, grace_s):
                busy.discard(rank)
                if reply is None:
                    report = self._ranks.pop(rank).ended()
                    stale = True
                    if rank in may_die:
                        results[rank] = None
                    else:
                        reports[rank] = report or "exited with code 0 in the middle of the call"
                elif reply.report is not None:
                    reports[rank] = reply.report
                    if reply.error is not None:
                        errors[rank] = pickle.loads(reply.error)
                else:
                    results[rank] = pickle.loads(reply.result)
                    stale |= reply.groups_broken
            for rank in busy:
                self._ranks[rank].ask_for_stacks()
            time.sleep(STACKS_WAIT_S if busy else 0)
            for rank in sorted(busy):
                reports[rank] = self._ranks.pop(rank).overran(time.monotonic() - began)
                busy.discard(rank)
        finally:
            for rank in busy:
                self._ranks.pop(rank).kill()
            self._edition += bool(stale or reports or busy)
        if reports:
            name = f"{function.__module__}.{function.__qualname__}"
            title = f"{len(reports)} of {world_size} ranks failed in {name}"
            raise RanksFailedError(title, reports, errors, results)
        return [results[rank] for rank in range(world_size)]

    def _replies(
        self, busy: set[int], deadline: float, reports: Mapping[int, str], grace_s: float
    ) -> Iterator[tuple[int, Reply | None]]:
        """Yield each rank's reply, None for one that died, until the deadline; a failure brings it nearer."""
        hurried = False
        while busy:
            if reports and not hurried:
                deadline, hurried = min(deadline, time.monotonic() + grace_s), True
            by_connection = {self._ranks[rank].connection: rank for rank in busy}
            ready = wait(list(by_connection), max(0.0, deadline - time.monotonic()))
            if not ready:
                return
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    reply: Reply | None = connection.recv()
                except (EOFError, ConnectionResetError):
                    reply = None
                yield by_connection[connection], reply

    def close(self) -> None:
        """Let every rank leave its groups and exit, all at once.

        Raises:
            RanksFailedError: A rank did not exit by itself or crashed on the way.
        """
        with self._lock:
            ranks, self._ranks = self._ranks, {}
            for rank in ranks.values():
                rank.connection.close()
            complaints = {
                index: complaint for index, rank in ranks.items() if (complaint := rank.ended())
            }
        if complaints:
            raise RanksFailedError(
                "ranks did not end properly when the pool was closed", complaints, {}, {}
            )
