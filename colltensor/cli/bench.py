"""``colltensor bench``: a collective's time and bandwidth, checked, in turns with other libraries.

Each library has ranks of its own, which wait for orders without using a processor. For each size
every library is warmed up and checked. Then the rounds follow, in each of which every library has
its turn. A round's time is that of the slowest rank, and the median of the rounds counts.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from colltensor import __version__, backends, environment
from colltensor.cli import launcher, machine
from colltensor.cli.operations import OPERATIONS, check_dtype, spelt
from colltensor.types import DTYPES

COMPARED: Final = {"mpi": "mpi4py", "torch": "torch", "ray": "ray", "putget": "ray"}
"""What ``--compare`` takes, and the package that each needs."""

ARRAYS: Final = ("numpy", "torch", "jax")

_START_S: Final = 120.0
_ORDER_S: Final = 300.0
_WARM_UP_CALLS: Final = 10
_ROUND_S: Final = 0.02
_MOST_CALLS: Final = 2000
_POLL_S: Final = 0.05
_TAIL_LINES: Final = 8
_LONG_FOLDER: Final = 60
_LINE: Final = "{:>6} {:>10} {:<10} {:<9} {:<6} {:>10} {:>7} {:>7} {:>5}"
_HEAD: Final = (
    ("size", "count", "dtype", "backend", "arrays", "time", "algbw", "busbw", "wrong"),
    ("", "", "", "", "", "us", "GB/s", "GB/s", ""),
)


class BenchError(Exception):
    """The benchmark cannot go on; says what to do."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure; see the options of the command."""

    operation: str
    ranks: int
    sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    arrays: tuple[str, ...]
    backends: tuple[str, ...]
    compare: tuple[str, ...]
    rounds: int
    in_ray: bool = False


@dataclass(frozen=True, slots=True)
class Contender:
    """One of those that take turns.

    Attributes:
        library: Whose ranks they are.
        backend: The backend, for colltensor; else the library's name.
        arrays: Whose arrays the ranks bring.
    """

    library: str
    backend: str
    arrays: str


@dataclass(slots=True)
class Row:
    """One line of the table.

    Attributes:
        size: The size of the larger buffer, in bytes.
        count: The elements of a block.
        dtype: Their type.
        backend: Of colltensor's; else the library.
        arrays: Whose arrays.
        time_us: Of a call, the median of the rounds; None where nothing could be measured.
        algbw_gbps: The algorithm bandwidth, in 10^9 bytes a second.
        busbw_gbps: The bus bandwidth.
        wrong: How many elements were wrong, of all ranks, before and after the rounds.
        error: Why nothing could be measured.
        rounds_us: The rounds' times.
    """

    size: int
    count: int
    dtype: str
    backend: str
    arrays: str
    time_us: float | None = None
    algbw_gbps: float = 0.0
    busbw_gbps: float = 0.0
    wrong: int = 0
    error: str | None = None
    rounds_us: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        start = spelt(self.size), self.count, self.dtype, self.backend, self.arrays
        if self.time_us is None:
            return _LINE.format(*start, "", "", "", "").rstrip() + f" not measured: {self.error}"
        times = (f"{each:.2f}" for each in (self.time_us, self.algbw_gbps, self.busbw_gbps))
        return _LINE.format(*start, *times, self.wrong)


class Team:
    """The ranks of one library, and the sockets over which they get their orders."""

    def __init__(self, library: str, plan: Plan, folder: Path) -> None:
        self.library = library
        self._log = folder / f"{library}.log"
        name = "colltensor-in-ray" if library == "colltensor" and plan.in_ray else library
        path = str(folder / library)
        program = [sys.executable, "-m", "colltensor.cli.bench_rank", name, path]

        # Of Ray's actors there is a driver, and MPI starts its ranks itself.
        drivers = 1 if name in ("ray", "putget", "colltensor-in-ray") else plan.ranks
        connections = drivers
        if name == "mpi":
            program, drivers = [*_mpiexec(plan.ranks), *program], 1

        self._processes: list[launcher.Process] = []
        self._sockets: list[Any] = []
        self._undo = contextlib.ExitStack()

        # Where the start fails, what has been started is ended again.
        with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as undo:
            undo.callback(self.close)
            listener.bind(path)
            listener.listen(connections)
            listener.settimeout(_POLL_S)
            port = self._undo.enter_context(launcher.free_port())
            self._start(program, drivers, plan, port)
            self._welcome(listener, connections)
            undo.pop_all()

    def ask(self, order: dict[str, Any]) -> list[dict[str, Any]]:
        """Give all ranks an order, and return their answers in the order of the ranks.

        Raises:
            BenchError: A rank ended, or did not answer.
        """
        try:
            for lines in self._sockets:
                lines.write(json.dumps(order) + "\n")
                lines.flush()
            answers = [lines.readline() for lines in self._sockets]
        except OSError as error:
            raise self._failed(str(error)) from error
        if not all(answers):
            raise self._failed("a rank ended")
        return [json.loads(answer) for answer in answers]

    def close(self) -> None:
        """End the ranks."""
        for lines in self._sockets:
            with contextlib.suppress(OSError):
                lines.close()
        # They end by themselves when nobody gives orders any more; Ray's driver ends its cluster.
        if self._sockets:
            launcher.wait(self._processes, 10.0)
        launcher.end(self._processes, grace_s=2.0)
        self._undo.close()

    def _start(self, program: Sequence[str], drivers: int, plan: Plan, port: int) -> None:
        variables = launcher.own_secret()
        if not plan.in_ray or self.library != "colltensor":
            variables.pop("RAY_ADDRESS", None)
        if self.library == "mpi":
            variables |= _OF_MPI
        with self._log.open("wb") as log:
            for rank in range(drivers):
                own = launcher.rank_variables(rank, plan.ranks, launcher.LOOPBACK, port)
                self._processes.append(
                    launcher.start(program, {**variables, **own}, stdout=log, stderr=log)
                )

    def _welcome(self, listener: socket.socket, count: int) -> None:
        """Wait for all ranks to connect."""
        deadline = time.monotonic() + _START_S
        found: dict[int, Any] = {}
        while len(found) < count:
            if any(launcher.has_ended(process) for process in self._processes):
                raise self._failed("a rank ended before it began")
            if time.monotonic() > deadline:
                raise self._failed(f"the ranks did not begin within {_START_S:.0f} s")
            with contextlib.suppress(TimeoutError):
                sock, _ = listener.accept()
                with sock:
                    sock.settimeout(_ORDER_S)
                    lines = sock.makefile("rw", encoding="utf-8")
                    self._sockets.append(lines)
                    found[json.loads(lines.readline())["rank"]] = lines
        self._sockets = [found[rank] for rank in sorted(found)]

    def _failed(self, why: str) -> BenchError:
        tail = self._log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        return BenchError("\n    ".join([f"{self.library}: {why}", *tail]))


def bench(plan: Plan, *, as_json: bool, plot: str) -> int:
    """Measure, and show the table or the JSON object; return the exit status.

    Raises:
        ValueError: The plan asks for something that there is not.
        BenchError: The benchmark ended early.
    """
    _check(plan)
    if plot and find_spec("matplotlib") is None:
        raise BenchError("--plot needs matplotlib: pip install matplotlib")

    contenders, left_out = _contenders(plan)
    # Read before the ranks start, whose own load is not meant.
    load, cores = os.getloadavg()[0], len(machine.cores())

    rows: list[Row] = []
    with _teams(plan, contenders, left_out) as teams, _progress(plan, contenders) as advance:
        contenders = [each for each in contenders if each.library in teams]
        if not as_json:
            notes = [f"# {name} is left out: {why}" for name, why in left_out.items()]
            if load > cores:
                notes.append(
                    f"# busy: a load of {load:.1f} on {cores} cores; small times mean little"
                )
            _write(_title(plan), *notes, *(_LINE.format(*head).rstrip() for head in _HEAD))
        for row in _rows(plan, contenders, teams):
            rows.append(row)
            if not as_json:
                _write(str(row))
            advance()

    # A library that is compared with may lack an operation; its values must be right.
    failed = [row for row in rows if row.wrong or (row.error and row.backend not in COMPARED)]
    if as_json:
        found = {
            "colltensor": __version__,
            "plan": asdict(plan),
            "left_out": left_out,
            "load": load,
        }
        _write(json.dumps({**found, "rows": [asdict(row) for row in rows]}, indent=2))

    if plot:
        _draw(plan, rows, plot)
    if failed and not as_json:
        _write(f"# {len(failed)} of {len(rows)} rows are wrong or were not measured")
    return 1 if failed else 0


def _check(plan: Plan) -> None:
    for dtype in plan.dtypes:
        check_dtype(dtype, plan.ranks)
    for option, given, known in (
        ("--arrays", plan.arrays, ARRAYS),
        ("--compare", plan.compare, COMPARED),
        ("--backends", plan.backends, ("auto", *backends.backend_names())),
    ):
        for name in given:
            if name not in known:
                raise ValueError(
                    f"{option}: expected some of {', '.join(known)}, got {name!r}"
                    f"{environment.did_you_mean(name, known)}"
                )

    for name in plan.backends:
        why = backends.reason(name)
        if why is not None:
            raise BenchError(f"backend {name!r} is unavailable: {why}")

    if plan.in_ray and find_spec("ray") is None:
        raise BenchError("--ray needs Ray: pip install ray")
    for name in plan.arrays:
        if find_spec(name) is None:
            raise BenchError(f"--arrays {name}: it is not installed: pip install {name}")


def _contenders(plan: Plan) -> tuple[list[Contender], dict[str, str]]:
    """Return who takes turns, and who is left out and why."""
    found = [
        Contender("colltensor", backend, arrays)
        for backend in plan.backends
        for arrays in plan.arrays
    ]
    left_out = {}
    for name in plan.compare:
        if find_spec(COMPARED[name]) is None:
            left_out[name] = f"{COMPARED[name]} is not installed: pip install {COMPARED[name]}"
        elif name == "mpi" and shutil.which("mpiexec") is None:
            left_out[name] = "there is no mpiexec: install an MPI, as in apt-get install mpich"
        else:
            found.append(Contender(name, name, "torch" if name == "torch" else "numpy"))
    return found, left_out


@contextlib.contextmanager
def _teams(
    plan: Plan, contenders: Sequence[Contender], left_out: dict[str, str]
) -> Iterator[dict[str, Team]]:
    """Start the ranks of each library, and end them afterwards.

    Where one that is compared with does not start, ``left_out`` says why.
    """
    teams: dict[str, Team] = {}

    # The path of a socket has at most 107 bytes, unix(7).
    place = "/tmp" if len(os.fsencode(tempfile.gettempdir())) > _LONG_FOLDER else None
    with tempfile.TemporaryDirectory(prefix="colltensor-bench-", dir=place) as folder:
        try:
            for library in dict.fromkeys(contender.library for contender in contenders):
                try:
                    teams[library] = Team(library, plan, Path(folder))
                except BenchError as error:
                    if library == "colltensor":
                        raise
                    left_out[library] = str(error).replace("\n", "\n# ")
            yield teams
        finally:
            for team in teams.values():
                team.close()


def _rows(plan: Plan, contenders: Sequence[Contender], teams: dict[str, Team]) -> Iterator[Row]:
    """Measure row by row: for each type and size all contenders, round by round in turns."""
    collective = OPERATIONS[plan.operation]
    for dtype in plan.dtypes:
        itemsize = DTYPES[dtype].itemsize
        for size in plan.sizes:
            count = collective.count(size, itemsize, plan.ranks)
            nbytes = collective.nbytes(count, itemsize, plan.ranks)

            rows = [Row(nbytes, count, dtype, each.backend, each.arrays) for each in contenders]
            turns = [
                _Turn(plan.operation, each, row, teams[each.library])
                for each, row in zip(contenders, rows, strict=True)
            ]

            for turn in turns:
                turn.warm_up()
            for _ in range(plan.rounds):
                for turn in turns:
                    turn.measure()

            for turn in turns:
                turn.check()
                _finish(plan, turn.row)
                yield turn.row


class _Turn:
    """One contender's turns at one size."""

    def __init__(self, operation: str, contender: Contender, row: Row, team: Team) -> None:
        self.row = row
        self._team = team
        self._calls = 1
        self._what: dict[str, Any] = {"operation": operation, "backend": contender.backend}
        self._what |= {"arrays": contender.arrays, "count": row.count, "dtype": row.dtype}

    def warm_up(self) -> None:
        """Check the result, warm up, and find out how many calls a round has."""
        self.check()
        self._time(_WARM_UP_CALLS)
        seconds = self._time(_WARM_UP_CALLS)
        if seconds is not None:
            self._calls = max(1, min(_MOST_CALLS, int(_ROUND_S / max(seconds, 1e-9))))

    def measure(self) -> None:
        """Measure one round."""
        seconds = self._time(self._calls)
        if seconds is not None:
            self.row.rounds_us.append(seconds * 1e6)

    def check(self) -> None:
        """Count the wrong elements of one call."""
        for answer in self._ask(do="check"):
            self.row.wrong += answer.get("wrong", 0)

    def _time(self, calls: int) -> float | None:
        answers = self._ask(do="time", calls=calls)
        return max((answer["seconds"] for answer in answers if not self.row.error), default=None)

    def _ask(self, **order: Any) -> list[dict[str, Any]]:
        if self.row.error is not None:
            return []
        answers = self._team.ask({**self._what, **order})
        errors = [answer["error"] for answer in answers if "error" in answer]
        if errors:
            self.row.error = errors[0].removeprefix("UnsupportedError: ")
        return answers


def _finish(plan: Plan, row: Row) -> None:
    if row.error is None:
        row.time_us = statistics.median(row.rounds_us)
        row.algbw_gbps = row.size / row.time_us / 1e3
        row.busbw_gbps = row.algbw_gbps * OPERATIONS[plan.operation].bus_factor(plan.ranks)


def _title(plan: Plan) -> str:
    where = "in Ray's workers" if plan.in_ray else "on this host"
    return (
        f"# colltensor {__version__}: {plan.operation}, {plan.ranks} ranks {where}, "
        f"{len(machine.cores())} cores, medians of {plan.rounds}"
    )


def _write(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


@contextlib.contextmanager
def _progress(plan: Plan, contenders: Sequence[Contender]) -> Iterator[Any]:
    """Show a bar below the rows while standard error is a terminal; yields what moves it on."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    bar = Progress(
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),
    )
    with bar:
        total = len(plan.sizes) * len(plan.dtypes) * len(contenders)
        task = bar.add_task(plan.operation, total=total)
        yield lambda: bar.advance(task)


def _draw(plan: Plan, rows: Sequence[Row], path: str) -> None:
    """Draw time and bus bandwidth over the size, a line for each contender and type."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    figure, axes = importlib.import_module("matplotlib.pyplot").subplots(1, 2, figsize=(11, 4.5))

    lines: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.time_us is not None:
            lines.setdefault((row.backend, row.arrays, row.dtype), []).append(row)

    for (backend, arrays, dtype), points in lines.items():
        label = f"{backend}, {arrays}, {dtype}"
        sizes = [row.size for row in points]
        axes[0].plot(sizes, [row.time_us for row in points], marker=".", label=label)
        axes[1].plot(sizes, [row.busbw_gbps for row in points], marker=".", label=label)

    for axis, name in zip(axes, ("time, us", "bus bandwidth, GB/s"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("size, bytes")
        axis.set_ylabel(name)
        axis.grid(visible=True, alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend()

    figure.suptitle(_title(plan).removeprefix("# "))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _mpiexec(ranks: int) -> list[str]:
    return ["mpiexec", "-n", str(ranks)]


_OF_MPI: Final = {
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
"""Open MPI 4 and 5 may start more ranks than there are cores, as the others do."""
