"""``colltensor doctor``: what works here, why the rest does not, and whether what should work does.

Whatever may crash or hang runs in processes of its own (``selftest``).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import IO, Any, Final

from colltensor import __version__, backends, environment
from colltensor.backends import gloo
from colltensor.backends.shm import library
from colltensor.cli import launcher, machine
from colltensor.errors import BackendUnavailableError, OptionError
from colltensor.rendezvous.secret import given_secret

FRAMEWORKS: Final = {
    "numpy": ("numpy", "pip install numpy"),
    "torch": ("torch", "pip install torch"),
    "jax": ("jax", "pip install jax"),
    "cupy": ("cupy-cuda13x", "pip install 'cupy-cuda13x>=14' (for CUDA 12: cupy-cuda12x)"),
    "tensorflow": ("tensorflow", "pip install tensorflow"),
    "mlx": ("mlx", "pip install mlx"),
    "paddle": ("paddlepaddle", "pip install paddlepaddle"),
}
"""Packages that have an adapter: their distribution, and how they are installed."""

_PACKAGES: Final = (
    "apache-tvm-ffi",
    "ml_dtypes",
    "numpy",
    "optree",
    "jax-tvm-ffi",
    "ray",
    "pygloo",
)
_SECRETS: Final = (environment.SECRET,)
_RANKS: Final = {"loopback": 1, "hierarchical": 3}
_BACKEND_S: Final = 60.0
_FRAMEWORK_S: Final = 120.0
_SEGMENT_RANKS: Final = (2, 8, 64)

Facts = dict[str, Any]


def doctor(*, as_json: bool) -> int:
    """Examine this machine, show what was found, and return the exit status.

    Returns:
        0 if all that should work does, else 1.
    """
    from colltensor.cli.report import show, waiting

    with waiting("trying backends and frameworks"):
        facts = examine()
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
    else:
        show(facts)
    return 0 if facts["ok"] else 1


def examine() -> Facts:
    """Return all that is known of this machine, as JSON can carry it."""
    facts: Facts = {
        "versions": {"colltensor": __version__, **_versions()},
        "library": _library(),
        "system": machine.system(),
        "processors": machine.processors(),
        "memory": machine.memory() | {"segment_nbytes": _segments()},
        "permissions": machine.permissions(),
        "interfaces": machine.interfaces(),
        "ray": machine.ray_address(),
        "variables": _variables(),
        "backends": {name: _backend(name) for name in backends.backend_names()},
        "auto": backends.reason("auto"),
        "adapters": _adapters(),
    }
    problems, warnings = _judged(facts)
    return {"ok": not problems, "problems": problems, "warnings": warnings, **facts}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _library() -> Facts:
    """Return the native library's file, and which instructions its kernels use."""
    facts: Facts = {"path": str(library.path()), "interface": library.INTERFACE}
    try:
        facts["instructions"] = str(library.load().shm_instructions())
    except BackendUnavailableError as error:
        facts["why"] = str(error)
    return facts


def _segments() -> dict[str, int]:
    """Return how large the shared memory of groups of some sizes is."""
    try:
        native = library.load()
    except BackendUnavailableError:
        return {}
    return {
        str(size): int(native.shm_nbytes(size, native.shm_half_nbytes(size)))
        for size in _SEGMENT_RANKS
    }


def _variables() -> Facts:
    """Return what is known of the package's variables.

    The answer has those that are set, those that nobody knows, and what is wrong with a value.
    """
    given = {name: value for name, value in os.environ.items() if name.startswith("COLLTENSOR_")}
    known = {name: value for name, value in given.items() if name in environment.KNOWN}
    shown = {name: "(set)" if name in _SECRETS else value for name, value in known.items()}

    error = None
    try:
        environment.check()
        given_secret()
    except OptionError as refused:
        error = str(refused)

    unknown = {
        name: environment.meant(name)
        for name in given
        if name not in known and not name.startswith(environment.OF_DEVELOPERS)
    }
    return {"set": shown, "unknown": unknown, "error": error}


def _backend(name: str) -> Facts:
    """Return whether a backend can be used and, where it can, what its self-test found."""
    why = backends.reason(name)
    facts: Facts = {"available": why is None, "why": why}
    if name == "gloo":
        usable, lacking = gloo.usable_providers()
        facts["providers"] = {"usable": usable, "lacking": lacking}
    if why is None:
        [facts["selftest"]] = _trials([["backend", name]], _ranks(name), _BACKEND_S)
    return facts


def _ranks(name: str) -> int:
    """Return in how many ranks a backend is tried."""
    if name != "nccl":
        return _RANKS.get(name, 2)
    # Older versions of NCCL refuse two ranks on one device.
    return min(2, int(importlib.import_module("cupy.cuda.runtime").getDeviceCount()))


def _adapters() -> dict[str, Facts]:
    """Return whether each framework is installed and its arrays are understood.

    All are tried at the same time.
    """
    found: dict[str, Facts] = {}
    for name, (_, install) in FRAMEWORKS.items():
        spec = find_spec(name)
        installed = spec is not None and spec.origin is not None
        found[name] = {"installed": installed, "works": False, "why": f"not installed: {install}"}
    names = [name for name, facts in found.items() if facts["installed"]]
    trials = _trials([["arrays", name] for name in names], 1, _FRAMEWORK_S)
    for name, trial in zip(names, trials, strict=True):
        found[name] = {"installed": True, "version": _version(FRAMEWORKS[name][0]), **trial}
    return found


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _trials(programs: Sequence[Sequence[str]], ranks: int, seconds: float) -> list[Facts]:
    """Run programs of ``selftest`` at the same time, and return what each found.

    Each runs in so many ranks.
    """
    with contextlib.ExitStack() as undo:
        running = [_Trial(words, ranks, undo) for words in programs]
        return [trial.result(seconds) for trial in running]


class _Trial:
    """One program of ``selftest``, in ranks of its own."""

    def __init__(self, words: Sequence[str], ranks: int, undo: contextlib.ExitStack) -> None:
        port = undo.enter_context(launcher.free_port())
        variables = launcher.own_secret()
        self._files: list[tuple[IO[bytes], IO[bytes]]] = []
        self._processes: list[launcher.Process] = []
        undo.callback(launcher.end, self._processes)
        for rank in range(ranks):
            # Files, because nobody reads before the end, and a full pipe would hold the rank up.
            # They are closed by undo.
            said, complaint = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115
            self._files.append((undo.enter_context(said), undo.enter_context(complaint)))
            own = launcher.rank_variables(rank, ranks, launcher.LOOPBACK, port)
            command = [sys.executable, "-m", "colltensor.cli.selftest", *words]
            process = launcher.start(command, {**variables, **own}, stdout=said, stderr=complaint)
            self._processes.append(process)

    def result(self, seconds: float) -> Facts:
        """Wait for the ranks; return what rank 0 found, or why one failed."""
        in_time = launcher.wait(self._processes, seconds)
        launcher.end(self._processes)
        for rank, process in enumerate(self._processes):
            if process.returncode:
                what = (
                    launcher.described(process.returncode) if in_time else f"no end in {seconds} s"
                )
                return {"works": False, "why": f"rank {rank}: {self._error(rank) or what}"}
        return {"works": True, "why": None, **json.loads(self._text(0, 0).splitlines()[-1])}

    def _error(self, rank: int) -> str:
        """Return a rank's last line that begins at the margin: a traceback's exception."""
        lines = [line for line in self._text(rank, 1).splitlines() if re.match(r"\S", line)]
        return lines[-1] if lines else ""

    def _text(self, rank: int, stream: int) -> str:
        file = self._files[rank][stream]
        file.seek(0)
        return file.read().decode(errors="replace")


def _judged(facts: Facts) -> tuple[list[str], list[str]]:
    """Return what should work and does not, and what is worth knowing."""
    problems, warnings = [], []
    if facts["variables"]["error"]:
        problems.append(facts["variables"]["error"])
    for name, meant in facts["variables"]["unknown"].items():
        warnings.append(f"the variable {name} means nothing to colltensor{meant}")

    for name, backend in facts["backends"].items():
        trial = backend.get("selftest")
        if trial is not None and not trial["works"]:
            problems.append(f"backend {name}: its self-test failed: {trial['why']}")

    shm = facts["backends"]["shm"]
    if not shm["available"] and sys.platform == "linux":
        problems.append(f"backend shm: {shm['why']}")
    if facts["auto"] is not None and shm["available"]:
        problems.append(f"backend auto: {facts['auto']}")

    if not facts["backends"]["gloo"]["available"]:
        warnings.append("ranks on several hosts need a Gloo, and there is none")
    if "do not read each other's memory" in shm.get("selftest", {}).get("why", ""):
        warnings.append("the ranks may not read each other's memory: large messages are slower")

    for name, adapter in facts["adapters"].items():
        if adapter["installed"] and not adapter["works"]:
            problems.append(f"arrays of {name}: {adapter['why']}")

    return problems, warnings
