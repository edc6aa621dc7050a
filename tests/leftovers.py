"""What a test session could leave on the machine: processes, shared memory, listening ports, folders.

Looks only at what belongs to this session: processes that carry its mark in their environment, this
process's own sockets, and names of ours.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

SESSION_VARIABLE = "COLLTENSOR_TEST_SESSION"
LISTENING = "0A"  # TCP_LISTEN in /proc/net/tcp
EXPECTED_FOLDERS = ("pool", "pytest-of-", "ray")
SETTLE_S = 10.0


@dataclass(frozen=True)
class Leftovers:
    """One look at the machine.

    Attributes:
        folder: The session's temporary folder.
        segments: Names in /dev/shm.
        ports: TCP ports on which this process listens.
        processes: Command lines of the session's other processes and of this one's children, by pid.
    """

    folder: Path
    segments: frozenset[str]
    ports: frozenset[int]
    processes: dict[int, str]

    @classmethod
    def now(cls, folder: Path) -> Leftovers:
        """Look at the machine."""
        shm = Path("/dev/shm")
        segments = frozenset(os.listdir(shm)) if shm.is_dir() else frozenset()
        return cls(folder, segments, _listening_ports(), _session_processes(folder.name))

    @classmethod
    def since(cls, before: Leftovers) -> list[str]:
        """Return a line for each thing that is there now and was not before; waits a little for exits."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            after = cls.now(before.folder)
            if not (set(after.processes) - set(before.processes)) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        pids = sorted(set(after.processes) - set(before.processes))
        complaints = [f"process {pid}: {after.processes[pid]}" for pid in pids]
        complaints += [
            f"/dev/shm/{name}"
            for name in sorted(after.segments - before.segments)
            if "colltensor" in name
        ]
        complaints += [f"listening TCP port {port}" for port in sorted(after.ports - before.ports)]
        inside = (
            path for path in before.folder.iterdir() if not path.name.startswith(EXPECTED_FOLDERS)
        )
        return complaints + [str(path) for path in sorted(inside)]


def _listening_ports() -> frozenset[int]:
    """The TCP ports on which this process listens, from its descriptors and the kernel's tables."""
    inodes = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
        if target.startswith("socket:["):
            inodes.add(target[len("socket:[") : -1])
    ports = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        lines = Path(table).read_text().splitlines()[1:] if Path(table).exists() else []
        for fields in map(str.split, lines):
            if fields[3] == LISTENING and fields[9] in inodes:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return frozenset(ports)


def _session_processes(session: str) -> dict[int, str]:
    """This process's children, and what carries the session's mark in its environment wherever it went."""
    mark = f"{SESSION_VARIABLE}={session}".encode()
    own = str(os.getpid())
    processes = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            if parent == own or mark in (entry / "environ").read_bytes().split(b"\0"):
                command = (
                    (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
                processes[int(entry.name)] = command.strip()
        except (PermissionError, FileNotFoundError, ProcessLookupError):
            continue
    return processes
