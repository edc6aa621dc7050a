"""Two hosts on one machine: network namespaces with a link between them.

Needs root, and imports nothing of ours. The namespaces have no names: they and the link are gone
with the processes in them, however those end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence

LINK = "colltensor0"
ADDRESSES = ("10.231.77.1", "10.231.77.2")


class NotPermittedError(Exception):
    """Network namespaces cannot be made here; says why."""


@contextlib.contextmanager
def two_hosts(rate: str | None = None) -> Iterator[list[int]]:
    """Two network namespaces with a link between them; yields a process in each, by its number.

    Raises:
        NotPermittedError: This machine or user does not allow it.
    """
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            raise NotPermittedError(f"{tool} is not installed (iproute2, util-linux)")
    with contextlib.ExitStack() as undo:
        holders = []
        for _ in ADDRESSES:
            pipes = {
                "stdin": subprocess.PIPE,
                "stdout": subprocess.DEVNULL,
                "stderr": subprocess.PIPE,
            }
            process = subprocess.Popen(["unshare", "--net", "cat"], text=True, **pipes)
            holder = undo.enter_context(process)  # ends with its input, and so with this process
            undo.callback(holder.kill)
            _await_namespace(holder)
            holders.append(holder.pid)
        first, second = holders
        _network(first, f"ip link add {LINK} type veth peer name {LINK} netns {second}")
        for holder, address in zip(holders, ADDRESSES, strict=True):
            _network(holder, f"ip address add {address}/30 dev {LINK}")
            for interface in ("lo", LINK):
                _network(holder, f"ip link set {interface} up")
            _network(holder, f"ip route add default dev {LINK}")
            if rate:
                limit = f"root tbf rate {rate} burst 1mb latency 50ms"
                _network(holder, f"tc qdisc add dev {LINK} {limit}")
        yield holders


def _await_namespace(holder: subprocess.Popen[str]) -> None:
    """Return once the process is in a namespace of its own."""
    own = os.readlink("/proc/self/ns/net")
    while True:
        if holder.poll() is not None:
            assert holder.stderr is not None
            raise NotPermittedError(f"unshare --net: {holder.stderr.read().strip()}")
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            if os.readlink(f"/proc/{holder.pid}/ns/net") != own:
                return
        time.sleep(0.005)


def inside(holder: int, command: Sequence[str]) -> list[str]:
    """Return the command that runs `command`, in its place, on the host of such a process.

    The process is one that `two_hosts` yields.
    """
    return ["nsenter", f"--net=/proc/{holder}/ns/net", *command]


def _network(holder: int, command: str) -> None:
    words = inside(holder, command.split())
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotPermittedError(f"{command}: {done.stderr.strip()}")
