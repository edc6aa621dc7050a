"""The session-end check itself: it sees what is left, and nothing that is not ours."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import leftovers
import pytest
from leftovers import SESSION_VARIABLE, Leftovers


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "SETTLE_S", 0.2)


def test_nothing_left(tmp_path: Path) -> None:
    before = Leftovers.now(tmp_path)
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    socket.create_server(("127.0.0.1", 0)).close()
    assert Leftovers.since(before) == []


def test_child_is_seen(tmp_path: Path) -> None:
    before = Leftovers.now(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"], env={})
    try:
        assert any(line.startswith(f"process {child.pid}: ") for line in Leftovers.since(before))
    finally:
        child.kill()
        child.wait()


def test_orphan_of_the_session_is_seen(tmp_path: Path) -> None:
    """A process whose parent is gone is recognised by the session's mark in its environment."""
    sleeper = f"[{sys.executable!r}, '-c', 'import time; time.sleep(30)']"
    options = "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True"
    program = f"import subprocess; print(subprocess.Popen({sleeper}, {options}).pid)"
    before = Leftovers.now(tmp_path)
    environment = {**os.environ, SESSION_VARIABLE: tmp_path.name}
    orphan = int(subprocess.check_output([sys.executable, "-c", program], env=environment))
    try:
        assert any(line.startswith(f"process {orphan}: ") for line in Leftovers.since(before))
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_stranger_is_not_seen(tmp_path: Path) -> None:
    assert os.getppid() not in Leftovers.now(tmp_path).processes


def test_listening_port_is_seen(tmp_path: Path) -> None:
    before = Leftovers.now(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert Leftovers.since(before) == [f"listening TCP port {server.getsockname()[1]}"]


def test_folder_and_file_are_seen(tmp_path: Path) -> None:
    before = Leftovers.now(tmp_path)
    (tmp_path / "left").mkdir()
    (tmp_path / "pytest-of-somebody").mkdir()
    assert Leftovers.since(before) == [str(tmp_path / "left")]


def test_the_folder_of_the_gpu_tests_is_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their pool is made on a GPU only, where a complaint about its folder would come after the last test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    found = importlib.util.spec_from_file_location(
        "gpu_conftest", Path(__file__).parents[1] / "gpu" / "conftest.py"
    )
    assert found is not None
    assert found.loader is not None
    conftest = importlib.util.module_from_spec(found)
    found.loader.exec_module(conftest)
    before = Leftovers.now(tmp_path)
    conftest.GpuPool.below(tmp_path)
    assert Leftovers.since(before) == []


def test_segment_of_ours_is_seen(tmp_path: Path) -> None:
    before = Leftovers.now(tmp_path)
    segment = Path("/dev/shm") / f"colltensor-test-{os.getpid()}"
    segment.touch()
    try:
        assert Leftovers.since(before) == [str(segment)]
    finally:
        segment.unlink()
