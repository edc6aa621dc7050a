"""Check everything that needs a CUDA device, what tells most first, in the time that there is.

    python tools/gpu_check gather build/wheels      where there is a network: the wheels to bring
    python tools/gpu_check run --wheels build/wheels --out results --seconds 560
                                                    on the machine with the device
    python tools/gpu_check run --cpu                anywhere: the same checks on a fake device

Prints a line for each check, writes ``gpu_check.json``, and ends at the given time whatever hangs.
Exits with 1 if a check failed. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gather
from runner import Report, Runner
from stages import stages_for

_SPARE_S = 3.0
_WARNINGS = 60
_ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "NCCL_DEBUG": "WARN",
    "COLLTENSOR_TEST_GPU_LIMIT_S": "90",
}
_SHARED = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "1"}


def main() -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser(
        "gather", help="download the wheels to bring, and build this project's"
    )
    fetch.add_argument("folder", type=Path)
    fetch.add_argument("--python", default="3.12", help="of the machine with the device")
    fetch.add_argument(
        "--nccl", action="store_true", help="libnccl too, in parts to bring one at a time"
    )
    run = commands.add_parser("run", help="run the checks")
    run.add_argument("--wheels", type=Path, help="the folder that gather filled")
    run.add_argument("--out", type=Path, default=Path(), help="where gpu_check.json goes")
    run.add_argument("--seconds", type=float, default=560.0, help="when all of it ends")
    run.add_argument("--stages", help="letters of the stages to run, all by default")
    run.add_argument("--cpu", action="store_true", help="on a fake device")
    run.add_argument("--inject", action="store_true", help="also checks that fail, hang and die")
    options = parser.parse_args()
    if options.command == "gather":
        return gather.gather(options.folder, options.python, nccl=options.nccl)
    return check(options)


def check(options: argparse.Namespace) -> int:
    """Run the stages; returns 1 if a check failed."""
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out / "gpu_check.json", {"fake": options.cpu, **_facts()})
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        environment = _environment(folder, cpu=options.cpu)
        try:
            if options.wheels is not None:
                _install(report, options.wheels.resolve(), folder, environment)
            until = began + options.seconds - _SPARE_S
            for stage in stages_for(cpu=options.cpu, inject=options.inject):
                if options.stages is None or stage.name[0] in options.stages:
                    more = (
                        _shared(options.wheels, folder) if stage.shares and not options.cpu else {}
                    )
                    words = ["--cpu"] if options.cpu else []
                    Runner(report, folder, environment | more, words, until).run(stage)
            report.content["complete"] = True
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        finally:
            report.content["nccl_warnings"] = _nccl_warnings(folder)
            report.write()
    if options.cpu:
        print("a fake device: what was measured means nothing")
    count, failed = len(report.content["checks"]), report.failed()
    print(
        f"{count} lines, {failed} failed, {report.seconds():.0f} s; see {options.out / 'gpu_check.json'}"
    )
    return 1 if failed or not report.content["complete"] else 0


def _facts() -> dict[str, Any]:
    """Return what can be said before anything is imported."""
    card = "no nvidia-smi"
    if shutil.which("nvidia-smi"):
        fields = "name,driver_version,memory.total,memory.used,compute_mode,mig.mode.current"
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
            card = (done.stdout or done.stderr).strip()
        except subprocess.TimeoutExpired:
            card = "nvidia-smi does not answer"
    print(f"{time.strftime('%H:%M:%S')}  card: {card}", flush=True)
    shm = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    return {
        "when": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "python": sys.version,
        "machine": " ".join([*os.uname()[:3:2], os.uname().machine, f"{os.cpu_count()} CPUs"]),
        "shared_memory_mib": shm.free >> 20 if shm else 0,
        "card": card,
        "nccl_variables": {
            name: value for name, value in os.environ.items() if name.startswith("NCCL_")
        },
    }


def _environment(folder: Path, *, cpu: bool) -> dict[str, str]:
    environment = {**os.environ, **_ENVIRONMENT, "NCCL_DEBUG_FILE": str(folder / "nccl-%p.txt")}
    return environment | {"JAX_PLATFORMS": "cpu"} if cpu else environment


def _install(report: Report, wheels: Path, folder: Path, environment: dict[str, str]) -> None:
    began = time.monotonic()
    try:
        figure = gather.install(wheels, folder / "site")
    except (OSError, ValueError) as error:
        report.add("install", "the wheels", "FAIL", time.monotonic() - began, error=str(error))
    else:
        report.add("install", "the wheels", "ok", time.monotonic() - began, figure=figure)
    before = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder / "site"), before]))


def _shared(wheels: Path | None, folder: Path) -> dict[str, str]:
    """Return the environment of several ranks on one device.

    It names the libnccl that was brought, if all of it was.
    """
    library = gather.brought_nccl(wheels.resolve().parent, folder) if wheels is not None else None
    return _SHARED if library is None else {**_SHARED, "LD_PRELOAD": str(library)}


def _nccl_warnings(folder: Path) -> list[str]:
    """Return the last lines that NCCL wrote."""
    lines: list[str] = []
    for path in sorted(folder.glob("nccl-*.txt"), key=lambda path: path.stat().st_mtime):
        lines += path.read_text(errors="replace").splitlines()
    return lines[-_WARNINGS:]


if __name__ == "__main__":
    sys.exit(main())
