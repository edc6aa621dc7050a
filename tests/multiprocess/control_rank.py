"""One rank of the control plane's tests: a process that does what it is told over a pipe, and the handle on it.

Run as a script with the descriptor of its pipe. A command is the name of a function below and its arguments; the
answer is an ``Outcome``. Bare sockets, made by hand, take the place of a rendezvous. No framework is imported.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECRET = b"the secret of the tests, 32 bytes"
LIMIT_S = 20.0


@dataclass
class Outcome:
    """What a command came to; ``at`` and the seconds are those of CLOCK_MONOTONIC, one clock for all processes."""

    value: Any
    error: str
    message: str
    ranks: tuple[int, ...]
    seconds: float
    at: float


class Rank:
    """A rank's process, seen from the test."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        self.pipe = Connection(ours.detach())
        self.stopped = False

    def start(self, command: str, *args: Any) -> None:
        self.pipe.send((command, args))

    def result(self, limit_s: float = LIMIT_S) -> Outcome:
        if not self.pipe.poll(limit_s):
            raise AssertionError(
                f"the rank with pid {self.process.pid} gave no answer within {limit_s} s"
            )
        outcome = self.pipe.recv()
        assert isinstance(outcome, Outcome)
        return outcome

    def do(self, command: str, *args: Any) -> Any:
        self.start(command, *args)
        outcome = self.result()
        assert not outcome.error, f"{outcome.error}: {outcome.message}"
        return outcome.value

    def signal(self, number: int) -> None:
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


class State:
    """What the rank's commands work on."""

    control: Any = None
    listener: socket.socket


def listen() -> tuple[str, int]:
    from colltensor import net

    State.listener = net.listen("127.0.0.1")
    host, port = State.listener.getsockname()[:2]
    return host, port


def join(
    rank: int, addresses: tuple[tuple[str, int], ...], generation: bytes, timeout_s: float
) -> None:
    from colltensor.control import Control
    from colltensor.rendezvous import Meeting

    hosts = ("here",) * len(addresses)
    meeting = Meeting(
        rank, len(addresses), "tested", generation, SECRET, addresses, hosts, State.listener
    )
    State.control = Control(meeting, time.monotonic() + timeout_s)


def agree(
    signature: bytes, text: str, timeout_s: float, times: int = 1, nap_s: float = 0.0
) -> None:
    for _ in range(times):
        time.sleep(nap_s)
        State.control.agree(signature, lambda: text, time.monotonic() + timeout_s)


def agree_and_gather(signature: bytes, text: str, payload: bytes, timeout_s: float) -> list[bytes]:
    deadline = time.monotonic() + timeout_s
    gathered: list[bytes] = State.control.agree_and_gather(
        signature, payload, lambda: text, deadline
    )
    return gathered


def allgather(payload: bytes, timeout_s: float) -> list[bytes]:
    gathered: list[bytes] = State.control.allgather(payload, time.monotonic() + timeout_s)
    return gathered


def allgather_sizes(nbytes: int, timeout_s: float) -> list[tuple[int, int]]:
    payload = bytes([State.control.rank]) * nbytes
    return [
        (len(part), part[0])
        for part in State.control.allgather(payload, time.monotonic() + timeout_s)
    ]


def skewed(times: int, seed: int, timeout_s: float) -> int:
    """Do exchanges of every sort with random naps, so that ranks run ahead of each other."""
    import random

    own, common = random.Random(seed * 1000 + State.control.rank), random.Random(seed)
    control, done = State.control, 0
    for number in range(times):
        deadline = time.monotonic() + timeout_s
        if own.random() < 0.3:
            time.sleep(own.random() * 0.03)
        kind = common.randrange(4)
        if kind == 0:
            control.agree(number.to_bytes(4, "big"), lambda: "skewed", deadline)
        elif kind == 1:
            parts = control.allgather(bytes([number % 251]) * own.randrange(5000), deadline)
            assert all(set(part) <= {number % 251} for part in parts)
        elif kind == 2:
            payload = bytes([number % 251, control.rank]) * common.randrange(1, 3000)
            parts = control.agree_and_gather(
                number.to_bytes(4, "big"), payload, lambda: "skewed", deadline
            )
            assert all(
                part == bytes([number % 251, rank]) * (len(payload) // 2)
                for rank, part in enumerate(parts)
            )
        else:
            ring(1, timeout_s)
        done += 1
    return done


def pair(peer: int, signature: bytes, text: str, timeout_s: float, times: int = 1) -> None:
    for _ in range(times):
        terms = (peer, signature, lambda: text, time.monotonic() + timeout_s)
        State.control.start_pair(*terms)
        State.control.finish_pair(*terms)


def ring(times: int, timeout_s: float) -> None:
    """Do what sendrecv does around a ring: both halves are started before either is waited for."""
    control = State.control
    peers = [(control.rank + step) % control.world_size for step in (1, -1)]
    for _ in range(times):
        deadline = time.monotonic() + timeout_s
        for peer in peers:
            control.start_pair(peer, b"ring", lambda: "ring", deadline)
        for peer in peers:
            control.finish_pair(peer, b"ring", lambda: "ring", deadline)


def position(sequence: int, operation: str | None) -> None:
    State.control.position(sequence, operation, None)


def watch(seconds: float) -> None:
    """Do what a backend does during a payload."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        State.control.check()
        time.sleep(0.1)


def diagnose(operation: str, cause: str | None) -> tuple[str, tuple[int, ...], str]:
    error = State.control.diagnose(operation, RuntimeError(cause) if cause else None)
    return type(error).__name__, getattr(error, "ranks", ()), str(error)


def fail(kind: str, message: str, ranks: tuple[int, ...]) -> None:
    from colltensor import errors

    State.control.fail(getattr(errors, kind)(message, ranks))


def broken() -> tuple[str, tuple[int, ...]] | None:
    error = State.control.broken
    return error and (type(error).__name__, getattr(error, "ranks", ()))


def close() -> None:
    State.control.close()


def close_while_waiting(timeout_s: float) -> tuple[str, float]:
    """Close the group while another thread waits in it; return what that thread got and how soon."""
    found: list[Any] = []

    def wait() -> None:
        try:
            agree(b"wait", "wait", timeout_s)
        except Exception as error:
            found.extend([type(error).__name__, time.monotonic()])

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)
    start = time.monotonic()
    State.control.close()
    thread.join(5)
    return found[0], found[1] - start


def two_threads(timeout_s: float) -> str:
    """Call while another thread waits; return what the second call got."""
    thread = threading.Thread(target=agree, args=(b"first", "first", timeout_s))
    thread.start()
    time.sleep(0.2)
    try:
        agree(b"second", "second", timeout_s)
    except Exception as error:
        return type(error).__name__
    finally:
        thread.join()
    return "no error"


def in_child(stay_s: float) -> str:
    """Use and close the group in a forked child, which then lives on; return what it got."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        State.control.close()
        try:
            State.control.agree(b"child", lambda: "child", time.monotonic() + 1)
        except Exception as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        State.control.close()
        os.close(writing)
        time.sleep(stay_s)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    if not stay_s:
        os.wait()
    return said


def exit_at_once(status: int) -> None:
    os._exit(status)


def leave_process() -> None:
    sys.exit(0)


def census(threads: int | None = None) -> tuple[int, int]:
    """Return how many descriptors and threads this process has, once no more than ``threads`` are left, or after 5 s.

    A thread that hears that its connection has ended takes a moment to end itself.
    """
    limit = time.monotonic() + 5
    while threads is not None and threading.active_count() > threads and time.monotonic() < limit:
        time.sleep(0.01)
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def main() -> None:
    pipe = Connection(int(sys.argv[1]))
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            return
        command: Callable[..., Any] = globals()[name]
        start = time.monotonic()
        value, caught = None, None
        try:
            value = command(*args)
        except (Exception, KeyboardInterrupt) as error:
            caught = error
        now = time.monotonic()
        error_name = type(caught).__name__ if caught is not None else ""
        pipe.send(
            Outcome(value, error_name, str(caught), getattr(caught, "ranks", ()), now - start, now)
        )


if __name__ == "__main__":
    # The test unpickles what this module names, so it must be named alike on both sides.
    sys.modules["control_rank"] = sys.modules["__main__"]
    Outcome.__module__ = "control_rank"
    main()
