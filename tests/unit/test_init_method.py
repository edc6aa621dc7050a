"""Every spelling of ``init_method``, good and bad, and the environment's part in it."""

from __future__ import annotations

import errno
import os
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from colltensor.errors import OptionError, RankError
from colltensor.rendezvous import FileDirectory, FixedDirectory, open_directory, secret

VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE", "COLLTENSOR_SECRET",
             "COLLTENSOR_SECRET_FILE")  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun with four processes sets it, this one being rank 2; no Ray."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in zip(VARIABLES, ("10.0.0.1", "29500", "2", "4"), strict=False):
        monkeypatch.setenv(name, value)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setattr(secret, "_warned", threading.Event())


@pytest.mark.parametrize("init_method", ["env://", None])
def test_environment(init_method: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_directory(init_method, None, None) == (FixedDirectory("10.0.0.1", 29500), 2, 4)
    monkeypatch.setenv("COLLTENSOR_SECRET", "hush")
    directory, _, _ = open_directory(init_method, None, None)
    assert directory == FixedDirectory("10.0.0.1", 29500, b"hush")
    assert "hush" not in repr(directory)


def test_secret_of_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(b"\thush \xff\n")
    monkeypatch.setenv("COLLTENSOR_SECRET_FILE", str(file))
    assert open_directory("tcp://host:1", 0, 3)[0] == FixedDirectory("host", 1, b"hush \xff")
    monkeypatch.setenv("COLLTENSOR_SECRET", os.fsdecode(b" hush \xff"))
    assert open_directory("tcp://host:1", 0, 3)[0] == FixedDirectory("host", 1, b"hush \xff")
    monkeypatch.setenv("COLLTENSOR_SECRET", "another")
    with pytest.raises(OptionError, match=r"COLLTENSOR_SECRET\b.*COLLTENSOR_SECRET_FILE"):
        open_directory("tcp://host:1", 0, 3)
    assert open_directory("tcp://host:1", 0, 3, secret=b"x")[0] == FixedDirectory("host", 1, b"x")


@pytest.mark.parametrize(("make", "complaint"), [
    (lambda path: None, os.strerror(errno.ENOENT)),
    (lambda path: path.write_bytes(b" \n"), "secret"),
    (lambda path: path.write_bytes(b"x" * 70000), r"\b65536\b"),
    (lambda path: path.mkdir(), os.strerror(errno.EISDIR)),
    (os.mkfifo, "secret"),
])  # fmt: skip
def test_files_without_a_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make: Callable[[Path], object], complaint: str
) -> None:
    make(tmp_path / "secret")
    monkeypatch.setenv("COLLTENSOR_SECRET_FILE", str(tmp_path / "secret"))
    with pytest.raises(OptionError, match=f"COLLTENSOR_SECRET_FILE.*{complaint}"):
        open_directory("env://", None, None)


def test_rank_0_warns_once_of_a_meeting_without_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    for host, rank in (("127.0.0.1", 0), ("localhost", 0), ("::1", 0), ("10.0.0.1", 1)):
        secret.warn_of_strangers(host, "g", rank)
    assert not caplog.records
    secret.warn_of_strangers("10.0.0.1", "g", 0)
    secret.warn_of_strangers("10.0.0.1", "g", 0)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "COLLTENSOR_SECRET " in record.getMessage()


@pytest.mark.parametrize(
    ("init_method", "host", "port"),
    [
        ("tcp://10.0.0.1:29500", "10.0.0.1", 29500),
        ("tcp://head.node-0.svc:1", "head.node-0.svc", 1),
        ("tcp://localhost:65535/", "localhost", 65535),
        ("tcp://[::1]:29500", "::1", 29500),
    ],
)
def test_tcp(init_method: str, host: str, port: int) -> None:
    directory, rank, world_size = open_directory(init_method, 0, 3)
    assert directory == FixedDirectory(host, port)
    assert (rank, world_size) == (0, 3)


def test_file() -> None:
    directory, rank, world_size = open_directory("file:///tmp/a folder/x#1?", 1, 2)
    assert isinstance(directory, FileDirectory)
    assert (directory.path, rank, world_size) == ("/tmp/a folder/x#1?", 1, 2)


@pytest.mark.parametrize(
    "init_method",
    [
        "", "env", "env:", "env:/", "env://localhost:29500", "ENV://", "10.0.0.1:29500", "http://10.0.0.1:29500",
        "/tmp/x",
        "tcp:10.0.0.1:29500", "tcp:/10.0.0.1:29500", "tcp://", "tcp://10.0.0.1", "tcp://10.0.0.1:", "tcp://:29500",
        "tcp://10.0.0.1:0", "tcp://10.0.0.1:65536", "tcp://10.0.0.1:-1", "tcp://10.0.0.1:port", "tcp://10.0.0.1:29500/x",
        "tcp://10.0.0.1:29500?rank=0&world_size=2", "tcp://me@10.0.0.1:29500", "tcp://::1:29500", "tcp://a b:29500",
        "tcp://10.0.0.1:295000", "tcp://10.0.0.1:٢٩٥", "file:", "file:/tmp/x", "file://", "file:///", "file://tmp/x",
        "file://localhost/tmp/x", "file://~/x", "file:///tmp/\0x", " file:///tmp/x", 29500, b"env://", ("tcp", 1),
    ],
)  # fmt: skip
def test_bad_spellings(init_method: object) -> None:
    with pytest.raises(OptionError, match="init_method"):
        open_directory(init_method, 0, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"])
@pytest.mark.parametrize("value", [None, "", " "])
def test_missing_variable_is_named(
    name: str, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match=rf"\b{name}\b.*torchrun"):
        open_directory(None, None, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MASTER_PORT", "http"), ("MASTER_PORT", "0"), ("MASTER_PORT", "99999"),
        ("RANK", "-1"), ("RANK", "two"), ("WORLD_SIZE", "4.0"),
    ],
)  # fmt: skip
def test_bad_variable_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match=f"variable {name}.*{value}"):
        open_directory("env://", None, None)


@pytest.mark.parametrize(
    ("rank", "world_size", "named"),
    [
        (1, None, "rank=1 .*RANK=2"),
        (None, 3, "world_size=3 .*WORLD_SIZE=4"),
        (0, 5, "world_size=5 .*WORLD_SIZE=4"),
    ],
)
def test_contradicting_the_environment(
    rank: int | None, world_size: int | None, named: str
) -> None:
    with pytest.raises(OptionError, match=named):
        open_directory("env://", rank, world_size)


def test_group_of_some_of_the_processes() -> None:
    assert open_directory(None, 1, 2)[1:] == (1, 2)
    assert open_directory(None, 2, None)[1:] == (2, 4)
    assert open_directory(None, 3, 4)[1:] == (3, 4)


@pytest.mark.parametrize(
    ("rank", "world_size", "named"), [(None, 2, "rank"), (0, None, "world_size")]
)
def test_only_the_environment_fills_in(
    rank: int | None, world_size: int | None, named: str
) -> None:
    for init_method in ("tcp://10.0.0.1:29500", "file:///tmp/x"):
        with pytest.raises(OptionError, match=rf"^{named}\b"):
            open_directory(init_method, rank, world_size)


@pytest.mark.parametrize("rank", [-1, 2, 1.0, "0", True])
def test_rank_outside_the_group(rank: object) -> None:
    for init_method in ("tcp://10.0.0.1:29500", "file:///tmp/x", "env://"):
        with pytest.raises(RankError, match=rf"^rank .*\b0 to 1\b.*{rank!r}"):
            open_directory(init_method, rank, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("world_size", [0, -3, 2.0, "2", False])
def test_bad_world_size(world_size: object) -> None:
    with pytest.raises(OptionError, match="world_size"):
        open_directory("file:///tmp/x", 0, world_size)  # type: ignore[arg-type]


def test_one_rank_needs_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert open_directory(None, 0, 1)[1:] == (0, 1)


def test_ray_worker_meets_through_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    class RayDirectory:
        pass

    module = types.ModuleType("colltensor.ray.rendezvous")
    module.RayDirectory = RayDirectory  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "colltensor.ray", types.ModuleType("colltensor.ray"))
    monkeypatch.setitem(sys.modules, "colltensor.ray.rendezvous", module)
    ray = types.ModuleType("ray")
    ray.is_initialized = lambda: True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    directory, rank, world_size = open_directory(None, 1, 2)
    assert isinstance(directory, RayDirectory)
    assert (rank, world_size) == (1, 2)
    assert isinstance(open_directory("env://", None, None)[0], FixedDirectory)
    with pytest.raises(OptionError, match=r"^rank\b"):
        open_directory(None, None, 2)
    ray.is_initialized = lambda: False  # type: ignore[attr-defined]
    assert isinstance(open_directory(None, None, None)[0], FixedDirectory)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("/tmp/x", "file:///tmp/x"),
        ("file:/tmp/x", "file:///tmp/x"),
        ("localhost:1234", "tcp://localhost:1234"),
        ("tpc://host:12", "tcp://host:12"),
        ("env", "env://"),
    ],
)
def test_a_likely_spelling_is_asked_for(given: str, meant: str) -> None:
    with pytest.raises(OptionError, match=rf"'{given}' \(.*'{meant}'\?\)"):
        open_directory(given, 0, 2)


@pytest.mark.parametrize("path", ["/tmp/" + "x" * 300, "/tmp/" + "x" * 200, "/tmp/" + "x/" * 3000])
def test_a_name_that_is_too_long(path: str) -> None:
    """It was told that the ranks do not reach each other."""
    directory, _, _ = open_directory(f"file://{path}", 0, 2)
    with pytest.raises(OptionError, match=f"^init_method: .*{path[:60]}"):
        directory.put("y" * 90, b"", b"")
