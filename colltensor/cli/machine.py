"""What this host is, as far as colltensor depends on it.

That is its processors, memory, permissions and interfaces. Reads the kernel's files and changes
nothing. What cannot be read is None.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import sys
from pathlib import Path
from typing import Any, Final

from colltensor import net
from colltensor.backends.shm import cgroup

_SECCOMP: Final = {"0": "off", "1": "strict", "2": "filter"}
_CACHES: Final = Path("/sys/devices/system/cpu/cpu0/cache")
_PTRACE: Final = Path("/proc/sys/kernel/yama/ptrace_scope")
_NO_LIMIT_NBYTES: Final = 1 << 50
"""More than that is how version 1 of control groups says that there is no limit."""

_CLUSTER: Final = "ray_current_cluster"


def system() -> dict[str, Any]:
    """Return which system this is."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "host_id": net.host_id(),
    }


def processors() -> dict[str, Any]:
    """Return the processors that this process may use, their quota, and the caches.

    The quota is what the process's control groups grant of them.
    """
    quota = cgroup.processors()
    return {
        "model": _field("/proc/cpuinfo", "model name"),
        "cores": cores(),
        "quota": None if quota == math.inf else quota,
        "caches": _caches(),
    }


def cores() -> list[int]:
    """Return the numbers of the processors that this process may use."""
    if sys.platform != "linux":
        return list(range(os.cpu_count() or 1))
    return sorted(os.sched_getaffinity(0))


def memory() -> dict[str, Any]:
    """Return the bytes of memory that there are for segments."""
    available = _field("/proc/meminfo", "MemAvailable")
    spare = cgroup.spare_nbytes()
    return {
        "available_nbytes": None if available is None else int(available.split()[0]) << 10,
        "control_group_nbytes": None if spare > _NO_LIMIT_NBYTES else int(spare),
    }


def permissions() -> dict[str, Any]:
    """Return what decides whether a process may read another one's memory."""
    seccomp = _field("/proc/self/status", "Seccomp")
    return {
        "seccomp": None if seccomp is None else _SECCOMP.get(seccomp, seccomp),
        "ptrace_scope": _text(_PTRACE),
    }


def interfaces() -> dict[str, Any]:
    """Return the network interfaces, and which address other hosts would be given first.

    The answer also says why.
    """
    found = [{"name": name, "address": address} for name, address in net.interfaces()]
    first = next(iter(net.local_addresses()), None)
    if first is None:
        why = "there is no interface with an address"
    elif net.is_loopback(first):
        why = "there is no other: ranks of other hosts cannot be reached"
    elif first == net.primary_address():
        why = "the default route leaves from it; interface= or, in torch, GLOO_SOCKET_IFNAME chooses another"
    else:
        why = "the first one, since there is no default route; interface= chooses another"
    return {"found": found, "chosen": first, "why": why}


def ray_address() -> dict[str, Any]:
    """Return the address of the Ray cluster that ``ray.init(address="auto")`` would take.

    The answer also says who names it.
    """
    given = os.environ.get("RAY_ADDRESS")
    if given:
        return {"address": given, "from": "RAY_ADDRESS"}
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", _CLUSTER)
    return {"address": _text(file), "from": str(file)}


def _caches() -> list[dict[str, str]]:
    found = []
    for folder in sorted(_CACHES.glob("index*")):
        texts = {
            name: _text(folder / name) or "?"
            for name in ("level", "type", "size", "shared_cpu_list", "coherency_line_size")
        }
        found.append(texts)
    return found


def _field(path: str, name: str) -> str | None:
    """Return what follows a name and a colon in one of the kernel's files."""
    for line in (_text(Path(path)) or "").splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return None


def _text(path: Path) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8").strip()
    return None
