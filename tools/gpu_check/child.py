"""The process of one stage: runs checks one after another, and tells the parent of each.

``child.py STAGE NAMES DESCRIPTOR FOLDER [--cpu] [--inject]``; started by ``runner``.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from stages import Check, stages_for

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDERS = ("tests", "tests/gpu", "tests/conformance", "tests/multiprocess/nccl")


NO_DEVICE = (35, 100)
"""cudaErrorInsufficientDriver and cudaErrorNoDevice."""
spoilt: list[str] = []
"""Why no other check can be made in this process; for those that know."""


class SkippedError(Exception):
    """The check cannot be made here; says why."""


class Channel:
    """What the checks may tell the parent while they run."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._descriptor = descriptor

    def tell(self, event: str, **content: Any) -> None:
        """Send one line."""
        line = json.dumps({"event": event, **content}, default=str).encode() + b"\n"
        while line:
            line = line[os.write(self._descriptor, line) :]

    def facts(self, **facts: Any) -> None:
        """Send what the report's head should have: versions, the card."""
        self.tell("facts", facts=facts)

    def part(self, name: str, outcome: str, seconds: float, error: str = "") -> None:
        """Send the outcome of a part of the check."""
        self.tell("part", name=name, outcome=outcome, seconds=seconds, error=error)


def run(check: Check, channel: Channel, folder: Path, *, cpu: bool) -> bool:
    """Run one check; whatever it raises is its result. Returns whether it did not fail."""
    channel.tell("begin", name=check.name)
    began = time.monotonic()
    found: dict[str, Any] = {"outcome": "ok"}
    try:
        missing = [name for name in check.needs if importlib.util.find_spec(name) is None]
        if missing and cpu:
            raise SkippedError(f"{', '.join(missing)} is not installed")
        module, _, name = check.function.partition(":")
        function = getattr(importlib.import_module(module), name)
        given = {"channel": channel, "folder": folder, "cpu": cpu} if check.informed else {}
        figure = function(*check.arguments, **given)
        found["figure"] = figure if isinstance(figure, str | int) else None
    except SkippedError as error:
        found = {"outcome": "skip", "error": str(error)}
    except BaseException:  # noqa: BLE001 - pytest's failures and exits too
        found = {"outcome": "FAIL", "error": traceback.format_exc()}
    channel.tell("end", name=check.name, seconds=time.monotonic() - began, **found)
    return found["outcome"] != "FAIL"


def device_is_lost() -> bool:
    """Return whether CUDA answers with an error that stays, though there is a device."""
    runtime = sys.modules.get("cupy.cuda.runtime")
    if runtime is None:
        return False
    try:
        runtime.deviceSynchronize()
    except runtime.CUDARuntimeError as error:
        return error.status not in NO_DEVICE
    return False


def main() -> None:
    """Run the checks that are named."""
    stage_name, names, descriptor, folder, *options = sys.argv[1:]
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    sys.modules["child"] = sys.modules["__main__"]  # for checks, which raise SkippedError
    # Behind everything: an installed package comes before the checkout's.
    sys.path += [str(ROOT / name) for name in FOLDERS] + [str(ROOT)]
    cpu = "--cpu" in options
    channel = Channel(int(descriptor))
    (stage,) = [stage for stage in stages_for(cpu=cpu, inject=True) if stage.name == stage_name]
    checks = {check.name: check for check in stage.checks}
    own = Path(folder) / f"{stage_name}-{os.getpid()}"
    own.mkdir()
    if stage.prepared:
        if cpu:
            importlib.import_module("stand_in").install()
        importlib.import_module("pool_rank").alone(own)
    for name in json.loads(names):
        if stage.prepared and cpu:  # JAX's arrays are on the host there
            backend = "auto" if "jax" in checks[name].needs else "nccl"
            importlib.import_module("gpu_streams").BACKEND = backend
        if run(checks[name], channel, own, cpu=cpu):
            continue
        if stage.prepared:  # the groups may be broken: the next check makes new ones
            importlib.import_module("pool_rank").leave()
            for group in importlib.import_module("colltensor.table").all_groups():
                group.destroy()
        if spoilt or device_is_lost():
            channel.tell("again")
            break
    if stage.prepared:
        importlib.import_module("pool_rank").leave()


if __name__ == "__main__":
    main()
