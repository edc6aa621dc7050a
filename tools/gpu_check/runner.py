"""Runs stages, each in a process that is killed at its limit, and writes down what it found.

Uses the standard library alone: nothing of what is checked can end this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from stages import Check, Stage

START_S: Final = 45.0
"""How long a process may take until its first check begins."""
_EXIT_S: Final = 10.0
_BETWEEN_S: Final = 15.0
"""How long it may take after a check: to destroy groups, and to end."""
_STACKS_S: Final = 0.5
_LOG_TAIL: Final = 3000
_SHOWN: Final = 200


class Report:
    """All that is known so far: lines on the terminal, and a file that is always whole.

    The file is JSON.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self._path = path
        self._began = time.monotonic()
        self.content: dict[str, Any] = {**facts, "complete": False, "checks": [], "stages": []}
        self.write()

    def seconds(self) -> float:
        """Return for how long this has been running."""
        return time.monotonic() - self._began

    def add(self, stage: str, name: str, outcome: str, seconds: float, **more: Any) -> None:
        """Note a check and print its line: ``ok``, ``FAIL`` or ``skip``."""
        more = {key: value for key, value in more.items() if value}
        check = {
            "stage": stage,
            "name": name,
            "outcome": outcome,
            "seconds": round(seconds, 3),
            **more,
        }
        self.content["checks"].append(check)
        text = str(more.get("figure") or more.get("error") or "").strip()
        # The last line of an error names it; a figure is one line.
        said = text.splitlines()[-1] if text else ""
        print(
            f"{self.seconds():6.1f} s  {outcome:4}  {stage}  {name}  ({seconds:.1f} s)  {said[:_SHOWN]}",
            flush=True,
        )
        self.write()

    def failed(self) -> int:
        """Return how many checks failed."""
        return sum(check["outcome"] == "FAIL" for check in self.content["checks"])

    def write(self) -> None:
        """Replace the file."""
        self.content["seconds"] = round(self.seconds(), 1)
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self.content, indent=1) + "\n")
        new.replace(self._path)


class Runner:
    """Runs the checks of stages until a given time."""

    def __init__(
        self,
        report: Report,
        folder: Path,
        environment: Mapping[str, str],
        options: Sequence[str],
        until: float,
    ) -> None:
        """Run nothing yet.

        Args:
            report: Where the results go.
            folder: For logs and what the stages put there.
            environment: The processes' whole environment.
            options: What every process is told.
            until: When all of it ends, by ``time.monotonic``.
        """
        self._report = report
        self._folder = folder
        self._environment = dict(environment)
        self._options = list(options)
        self._until = until

    def run(self, stage: Stage) -> None:
        """Run the checks of a stage, those after one that hangs or dies in another process."""
        began = time.monotonic()
        until = min(began + stage.limit_s, self._until)
        left = list(stage.checks)
        while left:
            if time.monotonic() >= until:
                for check in left:
                    self._report.add(
                        stage.name, check.name, "skip", 0.0, error="no time was left for it"
                    )
                break
            alone = next((place for place, check in enumerate(left) if check.alone), len(left))
            done = _Process(self, stage, left[: alone or 1], until).watch()
            left = left[done:]
        took = round(time.monotonic() - began, 1)
        self._report.content["stages"].append(
            {"name": stage.name, "seconds": took, "limit_s": stage.limit_s}
        )
        self._report.write()


class _Process:
    """One process that runs checks one after another, and says when each begins and how it ends."""

    def __init__(self, runner: Runner, stage: Stage, checks: list[Check], until: float) -> None:
        self._report, self._stage, self._checks, self._until = runner._report, stage, checks, until
        self._done = 0
        self._again = False
        self._log = runner._folder / f"{stage.name}-{time.monotonic_ns()}.log"
        self._read, write = os.pipe()
        script = str(Path(__file__).parent / "child.py")
        names = json.dumps([check.name for check in checks])
        try:
            with self._log.open("wb") as log:
                self._child = subprocess.Popen(
                    [sys.executable, script, stage.name, names, str(write), str(runner._folder), *runner._options],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[write], start_new_session=True,
                    env=runner._environment, cwd=runner._folder,
                )  # fmt: skip
        finally:
            os.close(write)

    def watch(self) -> int:
        """Return how many checks are done with, at least one."""
        began = time.monotonic()
        limit, running, rest = START_S, False, b""
        try:
            while True:
                until = min(began + limit, self._until)
                if not select.select([self._read], [], [], max(0.0, until - time.monotonic()))[0]:
                    self._overran(time.monotonic() - began, running)
                    break
                read = os.read(self._read, 1 << 16)
                if not read:
                    self._ended(time.monotonic() - began, running)
                    break
                *lines, rest = (rest + read).split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    running = self._take(event, running)
                    if event["event"] in ("begin", "end"):
                        began = time.monotonic()
                        limit = self._limit_after(running)
        finally:
            self._kill()
            os.close(self._read)
        return max(self._done, 1)

    def _limit_after(self, running: bool) -> float:
        return self._checks[self._done].limit_s if running else _BETWEEN_S

    def _take(self, event: dict[str, Any], running: bool) -> bool:
        """Note what the process says; returns whether a check is running now."""
        kind = event["event"]
        if kind == "again":
            self._again = True
            return False
        if kind == "facts":
            self._report.content.setdefault("versions", {}).update(event["facts"])
            return running
        if kind == "part":
            self._report.add(
                self._stage.name,
                event["name"],
                event["outcome"],
                event["seconds"],
                error=event["error"],
            )
            return running
        if kind == "begin":
            return True
        check = self._checks[self._done]
        self._report.add(
            self._stage.name, check.name, event["outcome"], event["seconds"], limit_s=check.limit_s,
            figure=event.get("figure"), error=event.get("error"),
        )  # fmt: skip
        self._done += 1
        return False

    def _overran(self, seconds: float, running: bool) -> None:
        """End a process whose time is over; its stacks go into the error."""
        for number in (signal.SIGUSR1, signal.SIGCONT):
            self._signal(number)
        time.sleep(_STACKS_S)
        why = "its time is over"
        if time.monotonic() >= self._until:
            why = "the time of the stage, or of all, is over"
        self._fail(seconds, running, f"killed after {seconds:.1f} s: {why}")

    def _ended(self, seconds: float, running: bool) -> None:
        """Note how a process ended that has closed its end of the pipe."""
        try:
            code = self._child.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            self._overran(seconds + _EXIT_S, running)
            return
        if code == 0 and (self._again or self._done == len(self._checks)):
            return
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        self._fail(seconds, running, f"its process ended: {how}")

    def _fail(self, seconds: float, running: bool, why: str) -> None:
        """Note what ended the process: in a check, before the first one, or after one.

        A check that was over is not blamed for it.
        """
        error = f"{self._tail()}\n{why}"
        if not running and self._done:
            self._report.add(self._stage.name, "after a check", "FAIL", seconds, error=error)
            return
        check = self._checks[self._done]
        self._report.add(
            self._stage.name, check.name, "FAIL", seconds, limit_s=check.limit_s, error=error
        )
        self._done += 1

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-_LOG_TAIL:]

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child.pid, number)

    def _kill(self) -> None:
        """End the process and what it started."""
        with contextlib.suppress(ProcessLookupError):  # an empty group is no longer there
            os.killpg(self._child.pid, signal.SIGKILL)
        # a driver may hold it; the others go on
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(_EXIT_S)
