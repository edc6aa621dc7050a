"""The command ``colltensor``, run as its users run it, over short scripts."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pool import group_of

import colltensor as col
from colltensor import adapters, backends
from colltensor.cli import doctor, libraries, operations, worker
from colltensor.cli import run as runner

_MISSING = [name for name in ("typer", "rich") if find_spec(name) is None]
if _MISSING and os.environ.get("COLLTENSOR_TEST_CLI") == "1":
    raise pytest.UsageError(f"the command is under test, but {_MISSING} is not installed")
command = pytest.mark.skipif(bool(_MISSING), reason=f"the extra cli is absent: no {_MISSING}")

TIMEOUT_S = 60
SOON_S = 20
"""A few tenths of a second, and what a busy machine takes; what is waited for sleeps for 60."""


def environment(**variables: str) -> dict[str, str]:
    own = {name: text for name, text in os.environ.items() if name != "NO_COLOR"}
    return {**own, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}


def colltensor(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "colltensor", *words],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@contextlib.contextmanager
def launched(*words: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Start the command, and kill it at the end if it still runs."""
    line = [sys.executable, "-m", "colltensor", *words]
    with subprocess.Popen(
        line,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(
        f"import os, signal, subprocess, sys, time\nrank = int(os.environ['RANK'])\n{text}"
    )
    return str(path)


def pids(folder: Path, count: int) -> list[int]:
    """Wait until so many processes have left their number in a folder."""
    deadline = time.monotonic() + SOON_S
    while len(found := sorted(folder.glob("pid-*"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [int(path.name.removeprefix("pid-")) for path in found]


def gone(numbers: Sequence[int]) -> bool:
    """Wait until none of these processes runs."""
    deadline = time.monotonic() + SOON_S
    while any(map(runs, numbers)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return not re.search(r"^State:\s+Z", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return False


SLEEP = "open(f'{sys.argv[1]}/pid-{os.getpid()}', 'w').close(); time.sleep(60)"


@command
@pytest.mark.shm
def test_ranks_meet_and_have_their_arguments(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        "import numpy as np, colltensor as col\n"
        "group = col.init_collective_group(init_method='env://')\n"
        "print(group.backend, group.allreduce(np.ones(2)), sys.argv[1:])",
    )
    done = colltensor("run", "-n", "2", path, "-n", "7", "--lr=3", "--", "x y")
    assert done.returncode == 0, done.stderr
    words = "['-n', '7', '--lr=3', '--', 'x y']"
    assert sorted(done.stdout.splitlines()) == [f"[{rank}] shm [2. 2.] {words}" for rank in (0, 1)]


@command
def test_variables_and_a_secret_of_their_own(tmp_path: Path) -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    path = script(
        tmp_path,
        "import json\n"
        f"told = {{name: os.environ.get(name) for name in {[*names, 'COLLTENSOR_SECRET', 'COLLTENSOR_SECRET_FILE']}}}\n"
        "print(json.dumps([told, open(f'/proc/{os.getpid()}/cmdline').read()]))",
    )
    given = {"COLLTENSOR_SECRET": "old", "COLLTENSOR_SECRET_FILE": "/nowhere"}
    done = colltensor("run", "-n", "2", "--no-prefix", path, **given)
    assert done.returncode == 0, done.stderr
    said = sorted(
        (json.loads(line) for line in done.stdout.splitlines()), key=lambda x: x[0]["RANK"]
    )
    for rank, (told, line) in enumerate(said):
        assert [told[name] for name in names[:5]] == [str(rank), "2", str(rank), "2", "127.0.0.1"]
        assert int(told["MASTER_PORT"]) > 0
        assert len(told["COLLTENSOR_SECRET"]) == 64
        assert told["COLLTENSOR_SECRET"] not in line
        assert told["COLLTENSOR_SECRET_FILE"] is None
    assert said[0][0]["COLLTENSOR_SECRET"] == said[1][0]["COLLTENSOR_SECRET"]


@command
def test_the_first_failure_ends_all_and_is_named(tmp_path: Path) -> None:
    child = f"import os, sys, time; {SLEEP}"
    path = script(
        tmp_path,
        "if rank < 2:\n"
        f"    subprocess.Popen([sys.executable, '-c', {child!r}, sys.argv[1]])\n"
        "if rank != 1:\n"
        f"    {SLEEP}\n"
        "while len(os.listdir(sys.argv[1])) < 5: time.sleep(0.01)\n"  # the script and four numbers
        "print('the reason', file=sys.stderr); sys.exit(7)",
    )
    began = time.monotonic()
    done = colltensor("run", "-n", "3", path, str(tmp_path))
    assert time.monotonic() - began < 50
    assert done.returncode == 7
    assert "colltensor run: rank 1 failed: exit code 7\n    the reason\n" in done.stderr
    assert gone(pids(tmp_path, 4))  # also what ranks have started, the one that failed among them


@command
def test_a_rank_that_is_killed_is_named_with_the_signal(tmp_path: Path) -> None:
    path = script(tmp_path, "if rank: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)")
    done = colltensor("run", "-n", "2", path)
    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 1 failed: signal SIGKILL" in done.stderr


@command
def test_who_lost_a_peer_is_not_the_one_that_failed(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        "if rank == 0: sys.exit('colltensor.errors.PeerLostError: rank 1 is lost')\n"
        "time.sleep(0.2); sys.exit(3)",
    )
    done = colltensor("run", "-n", "2", path)
    assert done.returncode == 3
    assert "rank 1 failed: exit code 3" in done.stderr


@command
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on(tmp_path: Path, number: signal.Signals) -> None:
    path = script(
        tmp_path,
        f"signal.signal({int(number)}, lambda *_: sys.exit(print('saved') or 5 * rank))\n{SLEEP}",
    )
    with launched("run", "-n", "2", path, str(tmp_path)) as process:
        pids(tmp_path, 2)
        process.send_signal(number)
        said, complaint = process.communicate(timeout=SOON_S)
    assert process.returncode == 5
    assert sorted(said.splitlines()) == ["[0] saved", "[1] saved"]
    assert f"ended by {number.name}" in complaint


@command
def test_a_second_signal_kills(tmp_path: Path) -> None:
    path = script(
        tmp_path, f"signal.signal(signal.SIGINT, lambda *_: print('no', flush=True))\n{SLEEP}"
    )
    with launched("run", "-n", "1", path, str(tmp_path)) as process:
        [pid] = pids(tmp_path, 1)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "[0] no\n"
        assert runs(pid)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SOON_S)
    assert process.returncode == 128 + signal.SIGKILL
    assert gone([pid])


@command
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's PR_SET_PDEATHSIG is Linux's")
def test_no_rank_outlives_the_command(tmp_path: Path) -> None:
    with launched("run", "-n", "2", script(tmp_path, SLEEP), str(tmp_path)) as process:
        ranks = pids(tmp_path, 2)
        assert all(map(runs, ranks))
        process.kill()
        process.wait()
        assert gone(ranks)


@command
def test_a_module(tmp_path: Path) -> None:
    (tmp_path / "some_module.py").write_text(
        "import os, sys; print(__name__, sys.argv[1:], os.environ['RANK'])"
    )
    search = f"{environment()['PYTHONPATH']}{os.pathsep}{tmp_path}"
    done = colltensor("run", "-n", "1", "-m", "some_module", "-m", PYTHONPATH=search)
    assert (done.returncode, done.stdout) == (0, "[0] __main__ ['-m'] 0\n"), done.stderr


@command
def test_a_terminal_has_colours(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    line = [sys.executable, "-m", "colltensor", "run", "-n", "1", script(tmp_path, "print(1)")]
    done = subprocess.run(line, env=environment(), stdout=theirs, timeout=TIMEOUT_S, check=False)
    os.close(theirs)
    assert done.returncode == 0
    assert os.read(ours, 100) == b"\033[36m[0] \033[0m1\r\n"
    os.close(ours)


def test_lines_of_a_progress_bar_and_without_an_end() -> None:
    rank: Any = runner.Rank(0, SimpleNamespace())  # type: ignore[arg-type]
    assert rank.lines("stderr", b"a\r\nb\rc\r") == [b"a", b"b"]
    assert rank.lines("stderr", b"\nd") == [b"c"]
    assert rank.lines("stdout", b"other") == []
    assert rank.lines("stderr", b"") == [b"d"]
    assert list(rank.tail) == [b"a", b"b", b"c", b"d"]


@command
def test_the_lines_for_hosts() -> None:
    given = {"COLLTENSOR_SECRET": "hush"}
    done = colltensor("run", "-n", "4", "--hosts", "h1,h2", "-m", "train", "--lr", "3", **given)
    assert done.returncode == 0, done.stderr
    start = "colltensor run -n 4 --nnodes 2 --node-rank"
    lines = done.stdout.splitlines()
    assert lines[-3] == f"{start} 0 --master h1:29500 -m train --lr 3"
    assert lines[-1] == f"{start} 1 --master h1:29500 -m train --lr 3"
    assert "hush" not in done.stdout


@command
def test_several_hosts(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        "print([os.environ[v] for v in ('RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')])",
    )
    words = ("run", "-n", "1", "--nnodes", "2", "--node-rank", "1", "--master", "[::1]:77", path)
    refused = colltensor(*words, COLLTENSOR_SECRET="")
    assert refused.returncode == 2
    assert "COLLTENSOR_SECRET" in refused.stderr
    done = colltensor(*words, COLLTENSOR_SECRET="hush")
    assert done.stdout == "[1] ['1', '0', '::1', '77']\n", done.stderr


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_the_extra_the_command_names_it() -> None:
    program = "import sys; sys.modules |= {'rich': None, 'typer': None}\n"
    program += "from colltensor.cli import main; sys.exit(main())"
    done = run_python(program)
    assert done.returncode == 2
    assert "typer" in done.stderr
    assert "pip install '.[cli]'" in done.stderr


@command
@pytest.mark.skipif(
    os.environ.get("COLLTENSOR_TEST_INSTALLED") != "1",
    reason="a checkout has no script `colltensor`",
)
def test_the_installed_script() -> None:
    line = [str(Path(sys.executable).with_name("colltensor")), "--version"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.stdout == f"colltensor {col.__version__}\n", done.stderr


def test_the_command_imports_no_framework() -> None:
    names = [
        path.stem
        for path in Path(runner.__file__).parent.glob("*.py")
        if path.stem not in ("app", "report")
    ]
    assert "bench_rank" in names
    program = "".join(f"import colltensor.cli.{name}\n" for name in names)
    program += "import sys; print({'numpy', 'torch', 'jax', 'ray', 'typer', 'rich', 'mpi4py'} & sys.modules.keys())"
    done = run_python(program)
    assert done.stdout == "set()\n", done.stderr


@command
@pytest.mark.shm
def test_doctor() -> None:
    done = colltensor("doctor", "--json", COLLTENSOR_READ_PEER="1", COLLTENSOR_SECRET="hush")
    found = json.loads(done.stdout)
    assert done.returncode == 0, found["problems"]
    assert (found["ok"], found["problems"]) == (True, [])
    assert "hush" not in done.stdout
    assert found["variables"]["unknown"] == {
        "COLLTENSOR_READ_PEER": " (did you mean 'COLLTENSOR_READ_PEERS'?)"
    }
    assert found["adapters"]["numpy"]["works"]
    for name, backend in found["backends"].items():
        assert backend["why"] == backends.reason(name)
        assert backend["available"] == ("selftest" in backend)
    nccl = found["backends"]["nccl"]
    assert nccl["available"] or "CuPy" in nccl["why"] or "CUDA" in nccl["why"]
    assert found["backends"]["shm"]["selftest"]["works"]
    assert found["memory"]["segment_nbytes"]["2"] > 0
    assert found["interfaces"]["chosen"] in [
        each["address"] for each in found["interfaces"]["found"]
    ]


def test_what_the_doctor_says_of_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    works, fails = {"works": True, "why": "fine"}, {"works": False, "why": "rank 1: it crashed"}
    good = {"available": True, "why": None, "selftest": works}
    facts: dict[str, Any] = {
        "variables": {"error": None, "unknown": {}},
        "auto": None,
        "backends": {"shm": good, "gloo": good, "nccl": {"available": False, "why": "no card"}},
        "adapters": {
            "torch": {"installed": False, "works": False},
            "numpy": {"installed": True, **works},
        },
    }
    assert doctor._judged(facts) == ([], [])
    facts["backends"]["gloo"] = {**good, "selftest": fails}
    facts["adapters"]["torch"] = {"installed": True, **fails}
    facts["variables"]["error"] = "a wrong value"
    problems, _ = doctor._judged(facts)
    assert problems == [
        "a wrong value",
        "backend gloo: its self-test failed: rank 1: it crashed",
        "arrays of torch: rank 1: it crashed",
    ]


def test_a_self_test_that_fails_says_why() -> None:
    [trial] = doctor._trials([["backend", "nothing"]], 1, SOON_S)
    assert not trial["works"]
    assert "nothing" in trial["why"]


def test_the_doctor_knows_all_frameworks() -> None:
    assert set(doctor.FRAMEWORKS) == set(adapters._ADAPTERS) - {"jaxlib"}


@command
@pytest.mark.shm
def test_bench_has_rows_and_columns() -> None:
    words = (
        "bench",
        "allgather",
        "--sizes",
        "8,4K",
        "--dtypes",
        "int32",
        "--rounds",
        "1",
        "--backends",
        "shm",
    )
    done = colltensor(*words, "--compare", "mpi")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    assert lines[0].split() == [
        "size",
        "count",
        "dtype",
        "backend",
        "arrays",
        "time",
        "algbw",
        "busbw",
        "wrong",
    ]
    rows = [line.split() for line in lines[2:] if "mpi" not in line]
    assert [row[:5] for row in rows] == [
        ["8", "1", "int32", "shm", "numpy"],
        ["4K", "512", "int32", "shm", "numpy"],
    ]
    assert all(float(row[5]) > 0 and row[-1] == "0" for row in rows)
    assert max(map(len, lines)) <= 80


WRONG = """
from colltensor import BackendBase, register_backend

class Wrong(BackendBase):
    name = "wrong"
    def allreduce(self, buffers, op, deadline):
        pass
    reduce = broadcast = allgather = gather = scatter = reducescatter = alltoall = send = recv = sendrecv = allreduce

class Spec:
    def available(self):
        return None
    def create(self, control, meeting, **options):
        return Wrong()

register_backend("wrong", Spec())
"""


@command
def test_bench_finds_a_wrong_result(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WRONG)
    search = f"{tmp_path}{os.pathsep}{environment()['PYTHONPATH']}"
    words = (
        "bench",
        "allreduce",
        "--sizes",
        "64",
        "--rounds",
        "1",
        "--backends",
        "wrong",
        "--json",
    )
    done = colltensor(*words, PYTHONPATH=search)
    assert done.returncode == 1, done.stderr
    [row] = json.loads(done.stdout)["rows"]
    assert (row["size"], row["count"], row["error"]) == (64, 16, None)
    assert row["wrong"] > 0
    assert row["busbw_gbps"] == pytest.approx(row["algbw_gbps"])  # 2(n-1)/n of two ranks


@command
@pytest.mark.shm
def test_bench_that_is_ended_leaves_nothing() -> None:
    words = ("bench", "allreduce", "--sizes", "8", "--backends", "shm", "--rounds", "1000000")
    with tempfile.TemporaryDirectory() as folder:
        with launched(*words, TMPDIR=folder) as process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("# colltensor")  # the ranks are there
            assert os.listdir(folder)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=SOON_S)
        assert process.returncode == 128 + signal.SIGTERM
        assert os.listdir(folder) == []


@command
@pytest.mark.shm
def test_bench_with_a_long_name_of_the_temporary_folder(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    words = ("bench", "broadcast", "--sizes", "8", "--backends", "shm", "--rounds", "1")
    done = colltensor(*words, TMPDIR=str(folder))
    assert done.returncode == 0, done.stderr


@command
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("alreduce",), "'allreduce'"),
        (("allreduce", "--sizes", "4x"), "4x"),
        (("allreduce", "--dtypes", "bool"), "bool"),
        (("allreduce", "--backends", "smh"), "'shm'"),
    ],
)
def test_bench_refuses(words: tuple[str, ...], says: str) -> None:
    done = colltensor("bench", *words)
    assert done.returncode == 2
    assert says in re.sub(r"[\s│]+", " ", done.stderr)


class OfThePool(libraries.ColTensor):
    """Measures with a group of the pool."""

    def _group(self, backend: str) -> Any:
        return group_of(self.world_size, backend)


def answers(rank: int, world_size: int, orders: list[dict[str, Any]]) -> list[dict[str, Any]]:
    carry_out = worker.Worker(OfThePool(rank, world_size))
    return [carry_out(order) for order in orders]


@pytest.mark.shm
def test_every_operation_is_checked_and_measured(pool: Any, frameworks: Sequence[str]) -> None:
    what = [
        {"operation": operation, "backend": "shm", "arrays": arrays, "count": 5, "dtype": dtype}
        for operation in operations.OPERATIONS
        for arrays in frameworks
        if arrays in ("numpy", "torch", "jax")
        for dtype in ("float32", "bfloat16", "int8")
    ]
    orders = [{**order, "do": do, "calls": 2} for order in what for do in ("check", "time")]
    for of_rank in pool.run(3, answers, orders):
        for order, answer in zip(orders, of_rank, strict=True):
            assert answer.get("wrong", 0) == 0, (order, answer)
            assert ("wrong" if order["do"] == "check" else "seconds") in answer, (order, answer)


def test_bandwidths_are_those_of_nccl_tests() -> None:
    factors = {name: each.bus_factor(4) for name, each in operations.OPERATIONS.items()}
    assert factors == {
        "allreduce": 1.5, "reduce": 1, "broadcast": 1, "allgather": 0.75, "gather": 0.75, "scatter": 0.75,
        "reducescatter": 0.75, "alltoall": 0.75, "sendrecv": 1,
    }  # fmt: skip
    assert operations.OPERATIONS["allreduce"].count(1024, 4, 4) == 256
    assert operations.OPERATIONS["alltoall"].count(1024, 4, 4) == 64
    assert operations.OPERATIONS["alltoall"].nbytes(64, 4, 4) == 1024


def test_sizes() -> None:
    assert operations.sizes_of("4, 1K,2MiB") == (4, 1024, 2 << 20)
    assert operations.sizes_between("8", "1K", 8) == (8, 64, 512)
    assert [operations.spelt(size) for size in (4, 1024, 1536, 3 << 20, 5 << 30)] == [
        "4",
        "1K",
        "1536",
        "3M",
        "5G",
    ]
    for text in ("0", "1T", "-4", "K"):
        with pytest.raises(ValueError, match="size"):
            operations.sizes_of(text)
    with pytest.raises(ValueError, match="larger"):
        operations.sizes_between("1M", "1K", 2)
