"""Processes of this host, one a rank: how they start, and that none of them is left behind.

Each rank leads a session of its own, so that one signal reaches all that it has started. The kernel
kills the rank when the launcher dies, however that happens. Imports nothing but Python's own
modules and ``environment``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Final

from colltensor import environment

LOOPBACK: Final = "127.0.0.1"

_PR_SET_PDEATHSIG: Final = 1
_POLL_S: Final = 0.02

Process = subprocess.Popen[bytes]


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """Keep a port of the loopback for rank 0.

    Nobody who asks the kernel for a free port is given this one. The socket does not listen, and
    Linux lets rank 0 bind the same port (SO_REUSEADDR, socket(7)).
    """
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((LOOPBACK, 0))
        yield sock.getsockname()[1]


def rank_variables(
    rank: int, world_size: int, address: str, port: int, *, local: tuple[int, int] | None = None
) -> dict[str, str]:
    """Return torchrun's variables for one rank.

    Args:
        rank: The rank.
        world_size: The number of ranks.
        address: Where rank 0 listens.
        port: Its port there.
        local: The number among this host's ranks, and how many these are; all ranks by default.
    """
    local_rank, local_world_size = local or (rank, world_size)
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def own_secret() -> dict[str, str]:
    """Return this process's environment with a fresh secret in it, and no other."""
    variables = {
        name: value for name, value in os.environ.items() if name != environment.SECRET_FILE
    }
    # Inside torchrun, say: rank 0 is to listen itself.
    variables.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    return variables | {environment.SECRET: secrets.token_hex(32)}


def start(
    command: Sequence[str],
    variables: Mapping[str, str],
    *,
    stdout: int | IO[bytes] = subprocess.PIPE,
    stderr: int | IO[bytes] = subprocess.PIPE,
    pass_fds: Sequence[int] = (),
) -> Process:
    """Start one rank.

    It has no standard input: a session of its own could not read the terminal.
    """
    return subprocess.Popen(
        command,
        env=dict(variables),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
        start_new_session=True,
        preexec_fn=_dies_with(os.getpid()),
    )


def _dies_with(launcher: int) -> Callable[[], None] | None:
    """Return what lets the kernel kill a child when its parent dies (prctl(2)).

    On systems other than Linux that is None.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: after the fork nothing is loaded any more

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:  # it died before this
            os._exit(1)

    return prepare


def has_ended(process: Process) -> bool:
    """Return True once a rank has ended; then all else that runs in its session is killed."""
    if process.returncode is not None:
        return True
    if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return False
    # Until it is waited for, its number names its session and nothing else.
    _signal(process, signal.SIGKILL)
    process.wait()
    return True


def send(processes: Sequence[Process], number: int) -> None:
    """Send a signal to the ranks that have not ended, and to all that they have started."""
    for process in processes:
        if not has_ended(process):
            _signal(process, number)


def _signal(process: Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def end(processes: Sequence[Process], grace_s: float = 0.0) -> None:
    """End the ranks: ask them to, and after ``grace_s`` seconds kill them."""
    if grace_s:
        send(processes, signal.SIGTERM)
        wait(processes, grace_s)
    send(processes, signal.SIGKILL)
    wait(processes, None)


def wait(processes: Sequence[Process], seconds: float | None) -> bool:
    """Wait for the ranks to end; return whether all have."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while not all(has_ended(process) for process in processes):
        if deadline is not None and time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def exit_on_sigterm() -> None:
    """Let SIGTERM end this process as ``sys.exit`` does.

    Thus its ranks and files are not left behind.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def described(code: int) -> str:
    """Return how a process ended, in words, from its return code."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def exit_status(code: int) -> int:
    """Return the status with which a shell would report a return code."""
    return code if code >= 0 else 128 - code
