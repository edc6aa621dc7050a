"""The matrix: every framework on the Pythons where it matters, and the checks of the sources.

    nox                             what CI runs: all but the sessions that are marked as no default
    nox -l                          all sessions
    nox -s "tests(jax-3.13)"        one of them
    nox -t torch                    every session of one framework
    nox -s "tests(torch-3.11)" -- -k allreduce -x    arguments for pytest

All of it takes about 28 minutes on two cores, so what no framework and no Python changes is tested
once: `SUITES` is the table. Each session has a virtual environment of its own, kept in .nox and
used again, into which the package is installed from a wheel, as a user would: the tests run against
that, never against the checkout (tools/sessions.py).
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import nox

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tools"))

import sessions  # noqa: E402 - found there only

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.download_python = "never"
nox.options.reuse_existing_virtualenvs = True

MAIN_PYTHON = "3.11"
NATIVE_TOOLS = ("cmake>=3.24", "ninja")
WAITING = "tests/multiprocess"
HOSTS = "tests/conformance/test_between_hosts.py"
ALL = ("tests/unit", "tests/conformance", WAITING)
OF_JAX = (
    "tests/unit/test_no_dependencies.py", "tests/unit/test_gpu_check.py::test_every_check_passes_on_a_fake_device",
    "tests/conformance", f"{WAITING}/nccl/test_nccl_jax.py", f"{WAITING}/nccl/test_nccl_jax_target.py",
    f"{WAITING}/test_cli.py::test_every_operation_is_checked_and_measured",
    f"{WAITING}/test_process_ends.py::test_the_end_with_a_computation_that_waits",
    f"{WAITING}/test_process_ends.py::test_a_computation_that_the_others_join_is_done",
    f"{WAITING}/test_ends_of_calls.py::test_a_changed_timeout_reaches_functions_that_were_traced",
    f"{WAITING}/test_nested_calls.py::test_a_handler_that_calls_while_a_computation_waits",
)
# Ray's registry of backends and its tensor transports, which the other tests are about, came later.
OF_RAY = tuple(
    f"tests/ray/test_ray_{name}.py"
    for name in ("arrays", "collective_group", "declared", "errors", "hosts", "observed", "rendezvous", "restarted")
)


class Suite(NamedTuple):
    """The tests over some frameworks on one Python.

    Attributes:
        name: What it is called, without the Python; `nox -t` takes it too.
        python: The Python.
        frameworks: What is installed and tested.
        tests: The folders, files and tests that run one after another.
        waiting: Those that run side by side, as many at a time as ``at_once``: they mostly wait for
            each other's processes, or for timeouts. Frameworks that take long to import are not for
            it: every worker has ranks of its own.
        at_once: See there.
        provider: The provider of Gloo: torch's, pygloo's (which has no later Python than 3.10), or
            the wheel's own.
        gloo: World sizes of the conformance suite over Gloo.
        shm: Those in shared memory.
        full: Whether it has all random sequences of calls, and every sum compared bit by bit; else
            a quarter of both.
        without: A file that is left out, because numpy's and torch's suites have run it over both
            Gloos.
        only_of: A framework: what that changes is run, and nothing else.
        marked: Which tests are run, by their marks.
        lowest: What has the lowest version that pyproject.toml allows; all else has the newest
            there is.
        default: Whether `nox` runs it unasked.
        cli: Whether it has the command's packages. Elsewhere the command's tests are skipped.
    """

    name: str
    python: str
    frameworks: tuple[str, ...]
    tests: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    at_once: int = 3
    provider: str = ""
    gloo: str = "3"
    shm: str = "3"
    full: bool = False
    without: str = ""
    only_of: str = ""
    marked: str = "not slow"
    lowest: tuple[str, ...] = ()
    default: bool = True
    cli: bool = False

    @property
    def id(self) -> str:
        """What the session is called: `tests(ID)`."""
        return f"{self.name}-{self.python}"


LOWEST = ("apache-tvm-ffi", "ml_dtypes", "numpy", "optree")
SUITES = (
    # In shared memory 3 ranks of a framework are in its own suites, and 2 and 4 of all of them in
    # `mixed`.
    Suite("numpy", "3.10", ("numpy",), waiting=ALL, provider="pygloo", cli=True),
    Suite("numpy-lowest", "3.10", ("numpy",), waiting=ALL, provider="pygloo", lowest=LOWEST, default=False),
    Suite("jax", "3.10", ("jax",), OF_JAX, provider="pygloo", without=HOSTS),
    Suite("torch", "3.11", ("torch",), ALL[:2], (WAITING,), provider="torch", gloo="2,4", full=True, only_of="torch"),
    Suite("cupy", "3.11", ("cupy",), ("tests/unit",)),
    Suite("mixed", "3.11", ("numpy", "torch", "jax"), ("tests/conformance",), provider="torch", shm="2,4", full=True,
          without=HOSTS),
    # What neither a framework nor a Python changes:
    Suite("slow", "3.11", ("torch",), waiting=ALL, at_once=4, provider="torch", gloo="1,2,3,4", marked="slow"),
    Suite("ray", "3.11", ("numpy", "torch", "jax", "ray"), ("tests/ray",), provider="torch"),
    Suite("ray-lowest", "3.11", ("numpy", "torch", "ray"), OF_RAY, provider="torch", lowest=("ray",), default=False),
    Suite("numpy", "3.12", ("numpy",), waiting=ALL, provider="native", full=True, without=HOSTS, cli=True),
    Suite("jax", "3.12", ("jax",), OF_JAX, without=HOSTS, lowest=("jax", "jax-tvm-ffi")),
    Suite("numpy", "3.13", ("numpy",), waiting=ALL),
    Suite("jax", "3.13", ("jax",), OF_JAX, full=True, without=HOSTS),
    Suite("numpy", "3.14", ("numpy",), waiting=ALL),
)
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
"""Those that must be there where `CI` is set; a session of another one is skipped, and says so."""

sessions.offer_pyenv_interpreters(sorted({suite.python for suite in SUITES}))
nox.options.error_on_missing_interpreters = "CI" in os.environ and not all(
    shutil.which(f"python{python}") for python in PYTHONS
)
nox.options.sessions = [
    "lint", "types", "docs", "native", "arm64", "wheel",
    *(f"tests({suite.id})" for suite in SUITES if suite.default), "demo",
]


@nox.session
@sessions.timed
def lint(session: nox.Session) -> None:
    """Check style and imports with ruff, and the pages' sentences."""
    session.install("--quiet", *sessions.group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", "--quiet", ".")
    session.run("python", "tools/sentences.py")


@nox.session(python=MAIN_PYTHON)
@sessions.timed
def types(session: nox.Session) -> None:
    """Check the package's types with mypy --strict, numpy's and torch's own types at hand."""
    sessions.share(session, ["torch"])
    session.install("--quiet", *sessions.DEPENDENCIES, *sessions.EXTRAS["cli"], *sessions.group("types"))
    session.run("mypy")


@nox.session(python=MAIN_PYTHON)
@sessions.timed
def docs(session: nox.Session) -> None:
    """Build the pages and the API reference as a site, build/site.

    A dead link or a page left out fails.
    """
    session.install("--quiet", *sessions.group("docs"))
    # Not --quiet, with which warnings are not counted.
    session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
@sessions.timed
def native(session: nox.Session) -> None:
    """Run the native libraries' own tests: plain, and under the sanitizers.

    These are AddressSanitizer with UBSan, and ThreadSanitizer. Arguments after ``--``: seconds for
    each, and the first seed.
    """
    session.install("--quiet", *NATIVE_TOOLS)
    definitions, environment = sessions.gloo_of_build(session)
    session.env.update(environment)  # the linker too looks there for what Gloo needs
    suppressions = ROOT / "native" / "tests" / "tsan.supp"
    environment = {
        "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": f"halt_on_error=1:suppressions={suppressions}",
    }
    for name, sanitizers in {"plain": "", "address": "address,undefined", "thread": "thread"}.items():
        programs = sessions.native_tests(session, name, [f"COLLTENSOR_SANITIZE={sanitizers}", *definitions])
        # The test over Gloo, of which there is not always one, mostly waits.
        lines = [[*sessions.without_randomisation(), program, *(session.posargs or [seconds])]
                 for program, seconds in zip(programs, ("10", "4"), strict=False)]
        sessions.side_by_side(session, lines, environment)


@nox.session
@sessions.timed
def arm64(session: nox.Session) -> None:
    """Run the native library's own tests on arm64, cross-compiled, in qemu's user mode.

    Skipped without these tools.
    """
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    missing = [tool for tool in (compiler, emulator) if shutil.which(tool) is None]
    if missing:
        session.skip(f"no {' and no '.join(missing)}: apt-get install g++-aarch64-linux-gnu qemu-user")
    session.install("--quiet", *NATIVE_TOOLS)
    target = ["CMAKE_SYSTEM_NAME=Linux", "CMAKE_SYSTEM_PROCESSOR=aarch64", f"CMAKE_CXX_COMPILER={compiler}"]
    target += ["CMAKE_DISABLE_FIND_PACKAGE_Gloo=ON"]  # it would find this machine's own
    [program] = sessions.native_tests(session, "arm64", target)
    session.run(emulator, "-L", "/usr/aarch64-linux-gnu", program, *(session.posargs or ["5"]), external=True)


@nox.session(python=PYTHONS, reuse_venv=False)
@sessions.timed
def wheel(session: nox.Session) -> None:
    """Install the wheel into a new environment without torch, and run the Gloo in it.

    The oldest and the newest Python run it. That is the conformance suite between two network
    namespaces, or on this host where they are not permitted. Skipped where there is no Gloo to
    build against. One wheel serves every Python.
    """
    built, has_gloo = sessions.wheel(session)
    if not has_gloo:
        session.skip("the wheel was built without Gloo, whose headers were neither found nor could be fetched: "
                     "apt-get install libgloo-dev")
    session.install("--quiet", str(built))
    session.log(f"installed: {sessions.size_of(session)}")
    session.install("--quiet", *sessions.group("test"))
    ends = session.python in (PYTHONS[0], PYTHONS[-1])
    tests = ("tests/unit/test_wheel.py", *(["tests/conformance"] if ends else []))
    sessions.pytest(session, tests, "-m", "gloo and not slow", without=HOSTS, frameworks="numpy", providers="native",
                    gloo_sizes="2", two_hosts="1")


@nox.session
@nox.parametrize(
    ("python", "suite"),
    [nox.param(suite.python, suite, id=suite.id, tags=[suite.name]) for suite in SUITES],
)
@sessions.timed
def tests(session: nox.Session, suite: Suite) -> None:
    """Run the tests over some frameworks on one Python; see `SUITES`."""
    groups = ["test", *(f"test-{name}" for name in ("jax", "ray") if name in suite.frameworks)]
    groups += ["test-mixed"] if suite.name == "mixed" else []
    asked = (*suite.frameworks, suite.provider, *(("cli",) if suite.cli else ()))
    extras = [name for name in sessions.EXTRAS if name in asked]
    shared = [name for name in sessions.SHARED if name not in suite.lowest]
    sessions.install(session, extras, *groups, shared=shared, pins=sessions.lowest(suite.lowest))
    has_provider = suite.provider and (suite.provider != "native" or sessions.wheel(session)[1])
    selected = {
        "frameworks": ",".join(suite.frameworks), "providers": suite.provider if has_provider else "",
        "gloo_sizes": suite.gloo, "shm_sizes": suite.shm, "sequences": "" if suite.full else "200", "of": suite.only_of,
        "cli": "1" if suite.cli else "",
    }
    marks, workers = ("-m", suite.marked), ("--numprocesses", str(suite.at_once), "--dist", "worksteal")
    if session.posargs:  # one run of what is asked for
        sessions.pytest(session, (*suite.tests, *suite.waiting), *marks, without=suite.without, **selected)
        return
    if suite.waiting:
        sessions.pytest(session, suite.waiting, *marks, *workers, without=suite.without, **selected)
    if suite.tests:
        sessions.pytest(session, suite.tests, *marks, without=suite.without, **selected)


EXAMPLES = """
    ray_allreduce.py --array numpy --workers 2
    ray_allreduce.py --array torch --workers 4
    ray_allreduce.py --array jax --workers 2
    ray_direct_transport.py --array torch
    put_get_vs_allreduce.py --workers 2 --bytes 1024,262144 --seconds 0.1 --peer
    ray_digits.py --array torch --workers 2
    ray_train.py --workers 2
    ray_util_collective.py
    train_jax.py --workers 2
    train_mixed.py --workers 2
    train_torch.py --workers 2
    mixed_frameworks.py
    parameter_server.py
    no_ray.py
    train_numpy.py --workers 2
    train_thinc.py --workers 2
    train_spacy.py --workers 2
"""


@nox.session(python=MAIN_PYTHON)
@sessions.timed
def demo(session: nox.Session) -> None:
    """Run every example, small."""
    sessions.install(session, ["ray", "torch", "jax"], "examples")
    lines = (line.split() for line in EXAMPLES.strip().splitlines())
    commands = [[f"{session.bin}/python", str(ROOT / "examples" / script), *words] for script, *words in lines]
    sessions.side_by_side(session, commands, {}, sessions.elsewhere(session))


STRANGERS = (
    "tests/unit/test_listener.py", "tests/unit/test_net.py", "tests/unit/test_objects.py", "tests/unit/test_users.py",
    *(f"{WAITING}/test_{name}.py" for name in ("strangers", "gloo_strangers", "refusals", "rendezvous")),
)


@nox.session(python=MAIN_PYTHON)
@sessions.timed
def security(session: nox.Session) -> None:
    """Run the tests of strangers, other users and secrets, and measure floods.

    The other sessions have these tests too.
    """
    sessions.install(session, [], "test")
    has_gloo = sessions.wheel(session)[1]
    sessions.pytest(session, STRANGERS, frameworks="numpy", providers="native" if has_gloo else "")
    with session.chdir(sessions.elsewhere(session)):
        session.run("python", str(ROOT / "benchmarks"), "strangers")


@nox.session(python=MAIN_PYTHON)
@sessions.timed
def gpu(session: nox.Session) -> None:
    """Run the tests that need a CUDA device, and NCCL's benchmark; see docs/gpu.md.

    With arguments for pytest the benchmark is left out. Needs a torch for CUDA, which is what the
    default index has; Ray is not needed.
    """
    # Nothing of it shared: torch loads the NCCL that lies beside it.
    session.install("--quiet", *sessions.SHARED["torch"])
    sessions.install(session, ["torch", "jax", "cupy"], "test", "gpu", shared=[])
    # Newer than what torch asks for, without which several ranks cannot share a device; torch runs
    # with it as well.
    session.install("--quiet", "--no-deps", "--upgrade", *sessions.group("gpu-nccl"))
    frameworks = "numpy,torch,jax,cupy"
    sessions.pytest(session, ["tests/gpu"], "-m", "gpu", frameworks=frameworks, providers="torch")
    if not session.posargs:
        with session.chdir(sessions.elsewhere(session)):
            session.run("python", str(ROOT / "benchmarks"), "nccl")
