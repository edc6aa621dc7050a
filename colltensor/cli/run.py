"""``colltensor run``: a program in several ranks of this host, as torchrun starts them.

One loop reads what the ranks write, passes signals on, and sees the ranks end. It has no threads,
because a process that is forked beside one must not touch Python any more.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO, Final

from colltensor import environment
from colltensor.cli import launcher

PORT: Final = 29500
"""Where ranks of several hosts meet by default: torchrun's port."""

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_GRACE_S: Final = 5.0
_SETTLE_S: Final = 1.0
_POLL_S: Final = 0.05
_TAIL_LINES: Final = 12
_CHUNK_NBYTES: Final = 1 << 16
_COLORS: Final = (36, 33, 35, 32, 34, 31)
_LINE_END: Final = re.compile(rb"\r?\n|\r(?=.)", re.DOTALL)
_CONSEQUENCES: Final = (b"PeerLostError", b"CollectiveTimeoutError")


@dataclass(frozen=True)
class Place:
    """Which ranks run on this host, and where they meet.

    Attributes:
        per_host: The number of ranks of each host.
        hosts: The number of hosts.
        host: The number of this one.
        address: Where rank 0 listens.
        port: Its port.
    """

    per_host: int
    hosts: int
    host: int
    address: str
    port: int


class Rank:
    """One rank's process, and what it wrote."""

    def __init__(self, number: int, process: launcher.Process) -> None:
        self.number = number
        self.process = process
        self.tail: deque[bytes] = deque(maxlen=_TAIL_LINES)
        self._rest: dict[str, bytes] = {"stdout": b"", "stderr": b""}

    def lines(self, stream: str, data: bytes) -> list[bytes]:
        """Return the lines that ``data`` completes.

        With no data, at the stream's end, that is what is left. A progress bar ends its lines with
        a carriage return.
        """
        *whole, rest = _LINE_END.split(self._rest[stream] + data)
        if not data and rest:
            whole.append(rest.rstrip(b"\r"))
            rest = b""
        self._rest[stream] = rest
        if stream == "stderr":
            self.tail.extend(line for line in whole if line.strip())
        return whole


def run(command: Sequence[str], place: Place, *, prefix: bool) -> int:
    """Run a program in the ranks of this host.

    Args:
        command: The program and its arguments.
        place: Which ranks, and where they meet.
        prefix: Whether each line of output begins with its rank.

    Returns:
        0, or the exit status of the rank that failed first.
    """
    variables = launcher.own_secret() if place.hosts == 1 else dict(os.environ)
    world_size = place.per_host * place.hosts
    ranks: list[Rank] = []

    with _Signals(ranks) as signals:
        try:
            for local in range(place.per_host):
                number = place.host * place.per_host + local
                own = launcher.rank_variables(
                    number, world_size, place.address, place.port, local=(local, place.per_host)
                )

                # Else a rank's lines would wait in its buffer for kilobytes more.
                own["PYTHONUNBUFFERED"] = os.environ.get("PYTHONUNBUFFERED", "1")
                ranks.append(Rank(number, launcher.start(command, {**variables, **own})))
                if signals.passed is not None:  # while this one was started
                    launcher.send([ranks[-1].process], signals.passed)

            return _follow(ranks, signals, _Output(prefix, world_size))
        except BrokenPipeError:  # nobody reads the output any more
            with contextlib.suppress(OSError):  # nor does Python try again at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        finally:
            launcher.end([rank.process for rank in ranks])


def lines_for_hosts(hosts: Sequence[str], per_host: int, port: int, words: Sequence[str]) -> str:
    """Return what to run on each host, as text.

    ``words`` are the program's, as ``run`` takes them.
    """
    made = 'python3 -c "import secrets; print(secrets.token_hex(32))"'
    text = [
        f"# on every host first, with the same value, made once by: {made}",
        f"read -rs {environment.SECRET} && export {environment.SECRET}",
    ]
    for number, host in enumerate(hosts):
        line = ["colltensor", "run", "-n", str(per_host), "--nnodes", str(len(hosts))]
        line += ["--node-rank", str(number), "--master", f"{hosts[0]}:{port}", *words]
        text += [f"# on {host}", shlex.join(line)]
    return "\n".join(text)


class _Signals:
    """Passes signals on to the ranks: the first as it is, and in place of a second one SIGKILL."""

    def __init__(self, ranks: list[Rank]) -> None:
        self._ranks = ranks
        self.passed: int | None = None

    def __enter__(self) -> _Signals:
        self._before = [(number, signal.signal(number, self._pass)) for number in _SIGNALS]
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)

    def _pass(self, number: int, frame: FrameType | None) -> None:
        first, self.passed = self.passed is None, number
        for rank in self._ranks:
            # Not reaped in here, where the loop may be in the middle of it.
            if rank.process.returncode is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(rank.process.pid, number if first else signal.SIGKILL)


class _Output:
    """Writes lines of ranks, each with its rank before it, coloured where it goes to a terminal."""

    def __init__(self, prefix: bool, world_size: int) -> None:
        self._prefix = prefix
        self._width = len(str(world_size - 1))

    def write(self, rank: Rank, stream: str, lines: Sequence[bytes]) -> None:
        to = sys.stdout if stream == "stdout" else sys.stderr
        before = self._before(rank.number, to).encode() if self._prefix else b""
        to.buffer.write(b"".join(before + line + b"\n" for line in lines))
        to.flush()

    def _before(self, number: int, to: IO[str]) -> str:
        text = f"[{number:>{self._width}}] "
        if not to.isatty() or os.environ.get("NO_COLOR"):
            return text
        return f"\033[{_COLORS[number % len(_COLORS)]}m{text}\033[0m"


def _follow(ranks: list[Rank], signals: _Signals, output: _Output) -> int:
    """Show what the ranks write until all have ended, and return the exit status.

    When one has failed, the others are ended for that.
    """
    failed: list[Rank] = []
    kill_at = settle_at = float("inf")
    with selectors.DefaultSelector() as selector:
        for rank in ranks:
            for stream in ("stdout", "stderr"):
                selector.register(
                    getattr(rank.process, stream), selectors.EVENT_READ, (rank, stream)
                )

        running = list(ranks)
        while running:
            _read(selector, output, _POLL_S)
            ended = [rank for rank in running if launcher.has_ended(rank.process)]
            running = [rank for rank in running if rank not in ended]

            if kill_at == float("inf"):
                failed += [rank for rank in ended if rank.process.returncode]

            now = time.monotonic()
            if failed and settle_at == float("inf"):
                settle_at = now + _SETTLE_S

            if kill_at == float("inf") and signals.passed is None and failed:
                _read_all(selector, output)  # what they said last
                # One that lost a peer may end before the one that it lost.
                if not all(map(_is_consequence, failed)) or now > settle_at:
                    launcher.send([rank.process for rank in running], signal.SIGTERM)
                    kill_at = now + _GRACE_S

            if now > kill_at:
                launcher.send([rank.process for rank in running], signal.SIGKILL)
        _read_all(selector, output)

    return _verdict(failed, signals)


def _read_all(selector: selectors.BaseSelector, output: _Output) -> None:
    while _read(selector, output, 0):
        pass


def _read(selector: selectors.BaseSelector, output: _Output, seconds: float) -> bool:
    """Show what the ranks have written, and return whether there was something.

    Waits for something at most ``seconds``.
    """
    if not selector.get_map():
        time.sleep(seconds)
        return False
    found = selector.select(seconds)
    for key, _ in found:
        rank, stream = key.data
        data = os.read(key.fd, _CHUNK_NBYTES)
        if not data:
            selector.unregister(key.fileobj)
        output.write(rank, stream, rank.lines(stream, data))
    return bool(found)


def _is_consequence(rank: Rank) -> bool:
    """Return whether a rank ended because it lost another one, as far as its last line says."""
    last = rank.tail[-1] if rank.tail else b""
    return rank.process.returncode > 0 and any(name in last for name in _CONSEQUENCES)


def _verdict(failed: list[Rank], signals: _Signals) -> int:
    """Name the rank that failed first; return its status."""
    if not failed:
        return 0
    first = min(failed, key=_is_consequence)
    code = first.process.returncode
    if signals.passed is not None:
        name = signal.Signals(signals.passed).name
        sys.stderr.write(f"colltensor run: ended by {name}, which the ranks were given\n")
        return launcher.exit_status(code)
    sys.stderr.write(f"colltensor run: rank {first.number} failed: {launcher.described(code)}\n")
    for line in first.tail:
        sys.stderr.write(f"    {line.decode(errors='replace')}\n")
    sys.stderr.flush()
    return launcher.exit_status(code)


@contextlib.contextmanager
def local_place(ranks: int) -> Iterator[Place]:
    """Return where the ranks of this host alone meet."""
    with launcher.free_port() as port:
        yield Place(ranks, 1, 0, launcher.LOOPBACK, port)
