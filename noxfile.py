"""The matrix: every framework on every Python where the pair exists, and the checks of the sources.

    nox                             everything but `security` and `gpu`
    nox -s "tests(jax-3.12)"        one pair
    nox -t torch                    every session of one framework
    nox -s "tests(torch-3.11)" -- -k allreduce -x    arguments for pytest
    nox -s native                   the native library's own tests, under sanitizers
    nox -s wheel                    the wheel with Gloo inside, on every Python, between two network namespaces
    nox -s security                 strangers at every port: the tests, and what they cost (docs/security.md)
    nox -s gpu                      on a machine with a CUDA device

All of it takes about 35 minutes on two cores. What no framework and no Python changes is tested once:
see `MARKED`, `ONLY_OF`, `GLOO_SIZES`, `IN_FULL` and `LEFT_OUT` below.

Each session has a virtual environment of its own, kept in .nox and used again, into which the package is
installed from a wheel, as a user would: the tests run against that, never against the checkout. The frameworks that
take long to install lie beside these environments, once for each Python (`SHARED`).
"""

from __future__ import annotations

import atexit
import concurrent.futures
import functools
import os
import re
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.download_python = "never"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "native", "arm64", "wheel", "tests", "demo"]

# Most of what is installed is never imported: "0" is how pip takes --no-compile from the environment. What is imported
# is compiled by the first of a thousand processes, if those may write that down.
os.environ["PIP_NO_COMPILE"] = "0"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

ROOT = Path(__file__).parent
DIST = ROOT / ".nox" / "dist"
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
MAIN_PYTHON = "3.11"

PAIRS = [
    ("numpy", "3.10"),
    ("jax", "3.10"),
    ("torch", "3.11"),
    ("cupy", "3.11"),
    ("mixed", "3.11"),
    ("slow", "3.11"),
    ("ray", "3.11"),
    ("numpy", "3.12"),
    ("jax", "3.12"),
    ("numpy", "3.13"),
    ("jax", "3.13"),
]
"""Gloo comes with the wheel (see `_wheel`), from pygloo on 3.10 (it has no later wheels) and from torch on 3.11.

The wheel is the same one for every Python, and so is the Gloo in it: see `wheel` and `WITH_NATIVE_GLOO`.
"""

SANITIZERS = {"plain": "", "address": "address,undefined", "thread": "thread"}
"""The builds of the native tests, and what -fsanitize is given."""

NATIVE_TOOLS = ("cmake>=3.24", "ninja")

STRESS_S = 10
GLOO_STRESS_S = 4
"""How long each of them runs, about."""

SELECTED = {
    "numpy": ("numpy",),
    "torch": ("torch",),
    "jax": ("jax",),
    "cupy": ("cupy",),
    "mixed": ("numpy", "torch", "jax"),
    "slow": ("torch",),
    "ray": ("numpy", "torch", "jax", "ray"),
}
"""The frameworks that a session's tests are run over."""

GLOO_SIZES = {"numpy": "3", "torch": "2,4", "jax": "3", "mixed": "3", "wheel": "2"}
"""The conformance suite's Gloo worlds: other sizes come in other sessions."""

IN_FULL = {"numpy": "3.12", "torch": "3.11", "jax": "3.13", "mixed": "3.11"}
"""The Python on which a framework has the conformance suite in shared memory at every size, with all random sequences.

On the others, which change nothing of either, it has world size 3, 200 random sequences in the place of 800, and one in
four of the sums that are compared bit by bit.
"""

SHM_SIZES = {"mixed": "2,4", "torch": "2,4"}
"""The worlds in shared memory of a session in full that has another size over Gloo."""

MARKED = {"slow": "slow"}
"""The session of the tests marked `slow`, which no framework and no Python changes; the others leave them out."""

SIDE_BY_SIDE = {"slow": 4, "numpy": 3, "torch": 3}
"""How many tests of `WAITING` run at the same time: they mostly wait for timeouts and for processes to start."""

WAITING = "tests/multiprocess"

ONLY_OF = {"torch": "torch"}
"""Sessions that run what their framework changes; numpy's, on three Pythons, run all that no framework changes."""

WITH_NATIVE_GLOO = ("numpy", "3.12")
"""The session of tests that runs over the wheel's Gloo, at world size 3; `wheel` has the conformance suite over it."""

SHARED = {
    "torch": nox.project.dependency_groups(PYPROJECT, "test-torch"),
    "jax": PYPROJECT["project"]["optional-dependencies"]["jax"],
    "ray": PYPROJECT["project"]["optional-dependencies"]["ray"],
}
"""Frameworks that several sessions of one Python need, and that take long to install: see `_share`."""

FOLDERS = {
    "numpy": ("tests/unit", "tests/conformance", WAITING),
    "torch": ("tests/unit", "tests/conformance", WAITING),
    "slow": ("tests/unit", "tests/conformance", WAITING),
    "jax": (
        "tests/unit/test_no_dependencies.py", "tests/unit/test_gpu_check.py::test_every_check_passes_on_a_fake_device",
        "tests/conformance", "tests/multiprocess/nccl/test_nccl_jax.py",
        "tests/multiprocess/nccl/test_nccl_jax_target.py",
        "tests/multiprocess/test_process_ends.py::test_the_end_with_a_computation_that_waits",
        "tests/multiprocess/test_process_ends.py::test_a_computation_that_the_others_join_is_done",
        "tests/multiprocess/test_ends_of_calls.py::test_a_changed_timeout_reaches_functions_that_were_traced",
        "tests/multiprocess/test_nested_calls.py::test_a_handler_that_calls_while_a_computation_waits",
    ),
    "cupy": ("tests/unit",),
    "mixed": ("tests/conformance",),
    "ray": ("tests/ray",),
    "wheel": ("tests/unit/test_wheel.py", "tests/conformance"),
}
"""The folders that it runs."""

LEFT_OUT = {
    "jax": ("tests/conformance/test_between_hosts.py",),
    "mixed": ("tests/conformance/test_between_hosts.py",),
    "wheel": ("tests/conformance/test_between_hosts.py",),
}
"""Files of these folders that use numpy alone, so that numpy's and torch's sessions run them for both Gloos."""


def _offer_pyenv_interpreters() -> None:
    """Put pyenv's own interpreters on PATH where its shims do not answer.

    A shim exists for every installed version but fails unless the version is enabled, and nox believes it.
    """
    homes = [os.environ.get("PYENV_ROOT", ""), str(Path.home() / ".pyenv")]
    pyenv = shutil.which("pyenv") or next(filter(None, (shutil.which(f"{home}/bin/pyenv") for home in homes)), None)
    if pyenv is None:
        return
    root = subprocess.run([pyenv, "root"], capture_output=True, text=True, check=True).stdout.strip()
    for version in sorted({python for _, python in PAIRS} | {MAIN_PYTHON}):
        shim = shutil.which(f"python{version}")
        if shim and subprocess.run([shim, "--version"], capture_output=True, check=False).returncode == 0:
            continue
        folders = Path(root, "versions").glob(f"{version}.*/bin")
        installed = [path for path in folders if (path / f"python{version}").exists()]
        if installed:
            newest = max(installed, key=lambda path: int(path.parent.name.split(".")[2].split("-")[0].rstrip("t")))
            os.environ["PATH"] = f"{newest}{os.pathsep}{os.environ['PATH']}"


_offer_pyenv_interpreters()


PYTHONS = sorted({python for _, python in PAIRS})

GLOO = ROOT / ".nox" / "gloo"
"""Where Gloo is unpacked for the build if the system has no headers of it."""

_built: list[tuple[Path, str | None]] = []
_seconds: dict[str, float] = {}


def _timed(function: Callable[..., None]) -> Callable[..., None]:
    """Note how long a session takes, its installation included."""

    @functools.wraps(function)
    def run(session: nox.Session, *arguments: object, **options: object) -> None:
        began = time.perf_counter()
        try:
            function(session, *arguments, **options)
        finally:
            _seconds[session.name] = time.perf_counter() - began

    return run


@atexit.register
def _print_seconds() -> None:
    for name, seconds in _seconds.items():
        print(f"{name:20} {seconds:5.0f} s")


def _elsewhere(session: nox.Session) -> Path:
    """Return an empty folder to run in, so that nothing comes from the checkout by being in it.

    Not nox's own `create_tmp()`, which becomes TMPDIR: Ray refuses one inside a virtual environment.
    """
    folder = ROOT / ".nox" / "run" / Path(session.virtualenv.location).name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _gloo_of_build(session: nox.Session) -> tuple[list[str], dict[str, str]]:
    """Return pip's options and the environment for a build with Gloo, the system's or else one fetched for it.

    Where it cannot be fetched both are empty; the build's log and the session `wheel` say what to install.
    """
    given = any(name in os.environ for name in ("Gloo_DIR", "Gloo_ROOT", "CMAKE_PREFIX_PATH"))
    if given or any(Path(prefix, "include", "gloo", "config.h").exists() for prefix in ("/usr", "/usr/local")):
        return [], {}
    found = session.run(
        "python", str(ROOT / "native" / "fetch_gloo.py"), str(GLOO), silent=True, success_codes=(0, 1), stderr=None
    )
    if not (GLOO / "complete").exists():
        return [], {}
    options = [f"--config-settings=cmake.define.Gloo_DIR={GLOO / 'usr' / 'share' / 'cmake' / 'Gloo'}"]
    return options, {"LD_LIBRARY_PATH": str(found).strip()}


def _build(session: nox.Session) -> tuple[Path, str | None]:
    """Build the wheel, once for all sessions of a run; return it, and why Gloo is not in it, None where it is.

    With Gloo it is the wheel that one would publish, with the library inside.
    """
    if not _built:
        shutil.rmtree(DIST, ignore_errors=True)
        options, environment = _gloo_of_build(session)
        line = ["python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(DIST), *options, str(ROOT)]
        session.run(*line, env=environment)
        [wheel] = DIST.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            has_gloo = "colltensor/lib/libcolltensor_gloo.so" in archive.namelist()
        if has_gloo:
            wheel = _repaired(session, wheel, environment)
        why = "the wheel was built without Gloo, whose headers were neither found nor could be fetched: "
        _built.append((wheel, None if has_gloo else f"{why}apt-get install libgloo-dev"))
    return _built[0]


def _repaired(session: nox.Session, wheel: Path, environment: dict[str, str]) -> Path:
    """Return the wheel with Gloo's libraries inside. The tools stay out of the session's own environment."""
    tools = DIST / "tools"
    session.install("--quiet", "--target", str(tools), *nox.project.dependency_groups(PYPROJECT, "wheel"))
    search = {"PYTHONPATH": str(tools), "PATH": f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    repair = ["python", str(ROOT / "native" / "repair_wheel.py"), str(wheel), str(DIST / "repaired")]
    session.run(*repair, "--root", str(GLOO), env={**environment, **search})
    [repaired] = (DIST / "repaired").glob("*.whl")
    return repaired


def _site(session: nox.Session) -> Path:
    """Return the folder of the packages in a session's environment."""
    [site] = Path(session.virtualenv.location).glob("lib/python*/site-packages")
    return site


def _share(session: nox.Session, *frameworks: str) -> None:
    """Put frameworks on the session's search path; the first session of this Python that needs one installs it.

    What a later `pip install` finds there counts as installed. A package of the environment itself comes first.
    """
    site = _site(session)
    for framework in frameworks:
        requirements = SHARED[framework]
        folder = ROOT / ".nox" / "shared" / f"{framework}-{site.parent.name}"
        complete = folder / "complete"
        if not complete.exists() or complete.read_text() != str(requirements):
            shutil.rmtree(folder, ignore_errors=True)
            session.install("--quiet", "--target", str(folder), *requirements)
            complete.write_text(str(requirements))
        (site / f"shared-{framework}.pth").write_text(f"{folder}\n")


def _wheel(session: nox.Session) -> Path:
    """Return the wheel, built on first use."""
    return _build(session)[0]


def _install(session: nox.Session, *extras: str, groups: tuple[str, ...] = ("test",), shares: bool = True) -> None:
    """Install the package with extras, as a user would, and the development groups that the session needs."""
    # First of all, so that no other requirement brings another build of torch.
    if shares:
        _share(session, *(extra for extra in extras if extra in SHARED))
    elif "torch" in extras:
        session.install("--quiet", *SHARED["torch"])
    wheel = _wheel(session)
    requirement = f"colltensor[{','.join(extras)}] @ {wheel.as_uri()}"
    kept = any(_site(session).glob("colltensor-*.dist-info"))
    session.install("--quiet", requirement, *nox.project.dependency_groups(PYPROJECT, *groups))
    if kept:  # it may hold an older build of the same version
        session.install("--quiet", "--no-deps", "--force-reinstall", str(wheel))


def _pytest(
    session: nox.Session,
    folders: tuple[str, ...],
    *arguments: str,
    frameworks: tuple[str, ...],
    providers: tuple[str, ...],
    gloo_sizes: str = "",
    shm_sizes: str = "",
    sequences: str = "",
    two_hosts: bool = False,
    only_of: str = "",
) -> None:
    """Run pytest on the installed package; arguments after nox's ``--`` are passed on."""
    environment = {
        "COLLTENSOR_TEST_FRAMEWORKS": ",".join(frameworks),
        "COLLTENSOR_TEST_PROVIDERS": ",".join(providers),
        "COLLTENSOR_TEST_GLOO_SIZES": gloo_sizes,
        "COLLTENSOR_TEST_SHM_SIZES": shm_sizes,
        "COLLTENSOR_TEST_SEQUENCES": sequences,
        "COLLTENSOR_TEST_TWO_HOSTS": str(int(two_hosts)),
        "COLLTENSOR_TEST_OF": only_of,
        "COLLTENSOR_TEST_INSTALLED": "1",
    }
    given = [str(ROOT / word) if (ROOT / word.split("::")[0]).exists() else word for word in session.posargs]
    where = [] if any(word.startswith(str(ROOT)) for word in given) else [str(ROOT / folder) for folder in folders]
    # By the `pytest` script, since `python -m pytest` would put the working directory on the search path.
    with session.chdir(_elsewhere(session)):
        config = str(ROOT / "pyproject.toml")
        session.run("pytest", "--config-file", config, *where, *arguments, *given, env=environment)


@nox.session
@_timed
def lint(session: nox.Session) -> None:
    """Check style and imports with ruff."""
    session.install("--quiet", *nox.project.dependency_groups(PYPROJECT, "lint"))
    session.run("ruff", "check", ".")


@nox.session(python=MAIN_PYTHON)
@_timed
def types(session: nox.Session) -> None:
    """Check the package's types with mypy --strict, numpy's and torch's own types at hand."""
    _share(session, "torch")
    dependencies = PYPROJECT["project"]["dependencies"]
    session.install("--quiet", *dependencies, *nox.project.dependency_groups(PYPROJECT, "types"))
    session.run("mypy")


def _native_tests(session: nox.Session, name: str, definitions: list[str]) -> list[str]:
    """Build the native tests and return the programs, the second one where Gloo was found; reuses older objects."""
    folder = str(ROOT / ".nox" / "native" / name)
    options = ["-DCOLLTENSOR_PYTHON=OFF", "-DCOLLTENSOR_NATIVE_TESTS=ON", "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON"]
    configure = ["cmake", "--fresh", "-S", str(ROOT / "native"), "-B", folder, "-G", "Ninja"]
    session.run(*configure, *options, *definitions, silent=True)
    over_gloo = Path(folder, "colltensor_gloo_stress")
    over_gloo.unlink(missing_ok=True)  # of a build that found Gloo
    session.run("cmake", "--build", folder, silent=True)
    return [f"{folder}/colltensor_stress", *([str(over_gloo)] if over_gloo.exists() else [])]


def _without_randomisation() -> list[str]:
    """Return the words before a command that fix where the kernel places its memory, as far as that is permitted.

    ThreadSanitizer before g++ 14 cannot start where the kernel randomises addresses with 32 bits, as recent ones do
    (https://github.com/google/sanitizers/issues/1716); containers may forbid it.
    """
    words = ["setarch", "-R"]
    if shutil.which("setarch") is None:
        return []
    return words if subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0 else []


@nox.session
@_timed
def native(session: nox.Session) -> None:
    """Run the native libraries' own tests: plain, under AddressSanitizer and UBSan, and under ThreadSanitizer.

    Arguments after ``--``: seconds for each, and the first seed.
    """
    session.install("--quiet", *NATIVE_TOOLS)
    options, environment = _gloo_of_build(session)
    definitions = [option.removeprefix("--config-settings=cmake.define.") for option in options]
    session.env.update(environment)  # the linker too looks there for what Gloo needs
    suppressions = ROOT / "native" / "tests" / "tsan.supp"
    environment = {
        "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": f"halt_on_error=1:suppressions={suppressions}",
    }
    for name, sanitizers in SANITIZERS.items():
        sanitized = [f"-DCOLLTENSOR_SANITIZE={sanitizers}", *(f"-D{definition}" for definition in definitions)]
        for program, seconds in zip(_native_tests(session, name, sanitized), (STRESS_S, GLOO_STRESS_S), strict=False):
            arguments = session.posargs or [str(seconds)]
            session.run(*_without_randomisation(), program, *arguments, env=environment, external=True)


@nox.session
@_timed
def arm64(session: nox.Session) -> None:
    """Run the native library's own tests on arm64, cross-compiled, in qemu's user mode; skipped without these tools."""
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    missing = [tool for tool in (compiler, emulator) if shutil.which(tool) is None]
    if missing:
        session.skip(f"no {' and no '.join(missing)}: apt-get install g++-aarch64-linux-gnu qemu-user")
    session.install("--quiet", *NATIVE_TOOLS)
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={compiler}"]
    target += ["-DCMAKE_DISABLE_FIND_PACKAGE_Gloo=ON"]  # it would find this machine's own
    [program] = _native_tests(session, "arm64", target)
    arguments = session.posargs or [str(STRESS_S // 2)]
    session.run(emulator, "-L", "/usr/aarch64-linux-gnu", program, *arguments, external=True)


def _print_size(session: nox.Session) -> None:
    """Print what the packages of a new environment take on the disk, numpy and all else."""
    site = _site(session)
    sizes = {"numpy": 0, "pip": 0, "the rest": 0}
    for file in site.rglob("*"):
        package = re.split(r"[-.]", file.relative_to(site).parts[0])[0]
        sizes[package if package in sizes else "the rest"] += file.lstat().st_size if file.is_file() else 0
    session.log(f"installed: numpy {sizes['numpy'] / 1e6:.1f} MB, colltensor with Gloo and its other dependencies "
                f"{sizes['the rest'] / 1e6:.1f} MB")


@nox.session(python=PYTHONS, reuse_venv=False)
@_timed
def wheel(session: nox.Session) -> None:
    """Run the Gloo that the wheel carries, in a new environment without torch, between two network namespaces.

    On this host where namespaces are not permitted. Skipped where there is no Gloo to build against.
    """
    built, why_without_gloo = _build(session)
    if why_without_gloo is not None:
        session.skip(why_without_gloo)
    session.install("--quiet", str(built))
    _print_size(session)
    session.install("--quiet", *nox.project.dependency_groups(PYPROJECT, "test"))
    arguments = ["-m", "gloo and not slow", *(f"--ignore={ROOT / file}" for file in LEFT_OUT["wheel"])]
    selected = {"frameworks": ("numpy",), "providers": ("native",), "gloo_sizes": GLOO_SIZES["wheel"]}
    _pytest(session, FOLDERS["wheel"], *arguments, **selected, two_hosts=True)


@nox.session
@nox.parametrize(
    ("python", "framework"),
    [nox.param(python, framework, id=f"{framework}-{python}", tags=[framework]) for framework, python in PAIRS],
)
@_timed
def tests(session: nox.Session, framework: str) -> None:
    """Run the tests over one framework on one Python."""
    frameworks = SELECTED[framework]
    extras = [name for name in frameworks if name != "numpy"]
    providers = ("torch",) if "torch" in frameworks else ()
    if session.python == "3.10":
        extras, providers = [*extras, "pygloo"], ("pygloo",)
    left_out = LEFT_OUT.get(framework, ())
    if (framework, session.python) == WITH_NATIVE_GLOO and _build(session)[1] is None:
        providers, left_out = ("native",), LEFT_OUT["wheel"]
    groups = ("test", "test-mixed") if framework == "mixed" else ("test",)
    groups = (*groups, *(f"test-{name}" for name in ("jax", "ray") if name in frameworks))
    _install(session, *extras, groups=groups)
    in_full = IN_FULL.get(framework) == session.python
    conformance = {
        "gloo_sizes": "3" if "native" in providers else GLOO_SIZES.get(framework, ""),
        "shm_sizes": SHM_SIZES.get(framework, "") if in_full else "3",
        "sequences": "" if in_full else "200",
    }
    arguments = [f"--ignore={ROOT / file}" for file in left_out]
    arguments += ["-m", MARKED.get(framework, "not slow")]
    selected = {"frameworks": frameworks, "providers": providers, "only_of": ONLY_OF.get(framework, "")}
    folders = FOLDERS[framework]
    if framework in SIDE_BY_SIDE and not session.posargs:
        waiting = ["--numprocesses", str(SIDE_BY_SIDE[framework]), "--dist", "worksteal"]
        _pytest(session, (WAITING,), *arguments, *waiting, **selected, **conformance)
        folders = tuple(folder for folder in folders if folder != WAITING)
    _pytest(session, folders, *arguments, **selected, **conformance)


EXAMPLES = (
    "ray_allreduce.py --array numpy --workers 2",
    "ray_allreduce.py --array torch --workers 4",
    "ray_allreduce.py --array jax --workers 2",
    "ray_direct_transport.py --array torch",
    "put_get_vs_allreduce.py --workers 2 --bytes 1024,262144 --seconds 0.1 --peer",
    "ray_digits.py --array torch --workers 2",
    "ray_train.py --workers 2",
    "ray_util_collective.py",
    "train_jax.py --workers 2",
    "train_mixed.py --workers 2",
    "train_torch.py --workers 2",
    "mixed_frameworks.py",
    "parameter_server.py",
    "no_ray.py",
    "train_numpy.py --workers 2",
    "train_thinc.py --workers 2",
    "train_spacy.py --workers 2",
)


@nox.session(python=MAIN_PYTHON)
@_timed
def demo(session: nox.Session) -> None:
    """Run every example, small; two at a time, because they mostly wait for processes to start."""
    _install(session, "ray", "torch", "jax", groups=("examples",))
    folder = _elsewhere(session)
    environment = {name: value for name, value in {**os.environ, **session.env}.items() if value is not None}

    def run(line: str) -> subprocess.CompletedProcess[str]:
        script, *arguments = line.split()
        command = [f"{session.bin}/python", str(ROOT / "examples" / script), *arguments]
        return subprocess.run(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip

    with concurrent.futures.ThreadPoolExecutor(2) as two:
        for line, done in zip(EXAMPLES, two.map(run, EXAMPLES), strict=True):
            session.log(line)
            print(done.stdout, end="", flush=True)
            if done.returncode:
                two.shutdown(cancel_futures=True)
                session.error(f"{line} ended with exit code {done.returncode}")


STRANGERS = (
    "tests/unit/test_listener.py", "tests/unit/test_net.py", "tests/unit/test_objects.py", "tests/unit/test_users.py",
    "tests/multiprocess/test_strangers.py", "tests/multiprocess/test_gloo_strangers.py",
    "tests/multiprocess/test_refusals.py", "tests/multiprocess/test_rendezvous.py",
)


@nox.session(python=MAIN_PYTHON)
@_timed
def security(session: nox.Session) -> None:
    """Run the tests of strangers, other users and secrets, which the other sessions have too, and measure floods."""
    _install(session)
    providers = () if _build(session)[1] else ("native",)
    _pytest(session, STRANGERS, frameworks=("numpy",), providers=providers)
    with session.chdir(_elsewhere(session)):
        session.run("python", str(ROOT / "benchmarks" / "strangers.py"))


@nox.session(python=MAIN_PYTHON)
@_timed
def gpu(session: nox.Session) -> None:
    """Run the tests that need a CUDA device and, unless pytest is given arguments, NCCL's benchmark; see docs/gpu.md.

    Needs a torch for CUDA, which is what the default index has; Ray is not needed.
    """
    # Nothing of it shared: torch loads the NCCL that lies beside it.
    _install(session, "torch", "jax", "cupy", groups=("test", "gpu"), shares=False)
    # Newer than what torch asks for, without which several ranks cannot share a device; torch runs with it as well.
    session.install("--quiet", "--no-deps", "--upgrade", *nox.project.dependency_groups(PYPROJECT, "gpu-nccl"))
    frameworks = ("numpy", "torch", "jax", "cupy")
    _pytest(session, ("tests/gpu",), "-m", "gpu", frameworks=frameworks, providers=("torch",))
    if not session.posargs:
        with session.chdir(_elsewhere(session)):
            session.run("python", str(ROOT / "benchmarks"), "nccl")
