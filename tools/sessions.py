"""What nox's sessions stand on: interpreters, the wheel, installing, and their times.

pip installs, and not uv: uv does not read pip's configuration, which is where a machine says which
build of torch it has, and would not count the frameworks that sessions share (`share`) as
installed.
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
from collections.abc import Callable, Iterable
from pathlib import Path

import nox

ROOT = Path(__file__).parent.parent
KEPT = ROOT / ".nox"
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
DEPENDENCIES: list[str] = PROJECT["project"]["dependencies"]
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]

# Most of what is installed is never imported: "0" is how pip takes --no-compile from the
# environment. What is imported is compiled by the first of a thousand processes, if those may write
# that down.
os.environ["PIP_NO_COMPILE"] = "0"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def group(*names: str) -> tuple[str, ...]:
    """Return what dependency groups name."""
    return tuple(nox.project.dependency_groups(PROJECT, *names))


SHARED = {"torch": list(group("test-torch")), "jax": EXTRAS["jax"], "ray": EXTRAS["ray"]}
"""Frameworks that several sessions of one Python need, and that take long to install.

See `share`.
"""


def offer_pyenv_interpreters(versions: Iterable[str]) -> None:
    """Put pyenv's own interpreters on PATH where its shims do not answer.

    A shim exists for every installed version but fails unless the version is enabled, and nox
    believes it.
    """
    homes = [os.environ.get("PYENV_ROOT", ""), str(Path.home() / ".pyenv")]
    pyenv = shutil.which("pyenv") or next(
        filter(None, (shutil.which(f"{home}/bin/pyenv") for home in homes)), None
    )
    if pyenv is None:
        return
    root = subprocess.run(
        [pyenv, "root"], capture_output=True, text=True, check=True
    ).stdout.strip()
    for version in versions:
        shim = shutil.which(f"python{version}")
        if (
            shim
            and subprocess.run([shim, "--version"], capture_output=True, check=False).returncode
            == 0
        ):
            continue
        folders = Path(root, "versions").glob(f"{version}.*/bin")
        installed = [path for path in folders if (path / f"python{version}").exists()]
        if installed:
            newest = max(
                installed,
                key=lambda path: int(path.parent.name.split(".")[2].split("-")[0].rstrip("t")),
            )
            os.environ["PATH"] = f"{newest}{os.pathsep}{os.environ['PATH']}"


_seconds: dict[str, float] = {}


def timed(function: Callable[..., None]) -> Callable[..., None]:
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


def gloo_of_build(session: nox.Session) -> tuple[list[str], dict[str, str]]:
    """Return CMake's definitions and the environment for a build with Gloo.

    Gloo is the system's, or else one fetched for it. Where it cannot be fetched both are empty; the
    build's log and the session `wheel` say what to install.
    """
    given = any(name in os.environ for name in ("Gloo_DIR", "Gloo_ROOT", "CMAKE_PREFIX_PATH"))
    if given or any(
        Path(prefix, "include", "gloo", "config.h").exists() for prefix in ("/usr", "/usr/local")
    ):
        return [], {}
    folder = KEPT / "gloo"
    fetch = ["python", str(ROOT / "native" / "fetch_gloo.py"), str(folder)]
    found = session.run(*fetch, silent=True, success_codes=(0, 1), stderr=None)
    if not (folder / "complete").exists():
        return [], {}
    return [f"Gloo_DIR={folder / 'usr' / 'share' / 'cmake' / 'Gloo'}"], {
        "LD_LIBRARY_PATH": str(found).strip()
    }


_built: list[tuple[Path, bool]] = []


def wheel(session: nox.Session) -> tuple[Path, bool]:
    """Return the wheel, built once for all sessions of a run, and whether Gloo is in it.

    With Gloo it could be published.
    """
    if not _built:
        folder = KEPT / "dist"
        shutil.rmtree(folder, ignore_errors=True)
        definitions, environment = gloo_of_build(session)
        options = [f"--config-settings=cmake.define.{definition}" for definition in definitions]
        line = [
            "python",
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--wheel-dir",
            str(folder),
            *options,
            str(ROOT),
        ]
        session.run(*line, env=environment)
        [path] = folder.glob("*.whl")
        with zipfile.ZipFile(path) as archive:
            has_gloo = "colltensor/lib/libcolltensor_gloo.so" in archive.namelist()
        # its libraries go inside; the tools for that stay out of the session's own environment
        if has_gloo:
            tools = folder / "tools"
            session.install("--quiet", "--target", str(tools), *group("wheel"))
            environment |= {
                "PYTHONPATH": str(tools),
                "PATH": f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}",
            }
            repair = [
                "python",
                str(ROOT / "native" / "repair_wheel.py"),
                str(path),
                str(folder / "repaired"),
            ]
            session.run(*repair, "--root", str(KEPT / "gloo"), env=environment)
            [path] = (folder / "repaired").glob("*.whl")
        _built.append((path, has_gloo))
    return _built[0]


def site(session: nox.Session) -> Path:
    """Return the folder of the packages in a session's environment."""
    [packages] = Path(session.virtualenv.location).glob("lib/python*/site-packages")
    return packages


def share(session: nox.Session, frameworks: Iterable[str]) -> None:
    """Put frameworks on the session's search path.

    The first session of this Python that needs one installs it. What a later `pip install` finds
    there counts as installed. A package of the environment itself comes first.
    """
    packages = site(session)
    for framework in frameworks:
        folder = KEPT / "shared" / f"{framework}-{packages.parent.name}"
        complete = folder / "complete"
        if not complete.exists() or complete.read_text() != str(SHARED[framework]):
            shutil.rmtree(folder, ignore_errors=True)
            session.install("--quiet", "--target", str(folder), *SHARED[framework])
            complete.write_text(str(SHARED[framework]))
        (packages / f"shared-{framework}.pth").write_text(f"{folder}\n")


def lowest(names: Iterable[str]) -> list[str]:
    """Return requirements of distributions at the lowest versions that are allowed.

    pyproject.toml says which.
    """
    asked = [*DEPENDENCIES, *(line for lines in EXTRAS.values() for line in lines)]
    of_names = [line for line in asked if re.split(r"[>=;]", line)[0] in set(names)]
    return [re.sub(r">=([^,;]+)(,[^;]*)?", r"==\1", line, count=1) for line in of_names]


def size_of(session: nox.Session) -> str:
    """Return what a new environment's packages take on the disk, in words.

    numpy and all else but pip count.
    """
    sizes = {"numpy": 0, "pip": 0, "all else": 0}
    for file in site(session).rglob("*"):
        package = re.split(r"[-.]", file.relative_to(site(session)).parts[0])[0]
        sizes[package if package in sizes else "all else"] += (
            file.lstat().st_size if file.is_file() else 0
        )
    return f"numpy {sizes['numpy'] / 1e6:.1f} MB, colltensor and all else {sizes['all else'] / 1e6:.1f} MB"


def install(
    session: nox.Session,
    extras: Iterable[str],
    *groups: str,
    shared: Iterable[str] = SHARED,
    pins: Iterable[str] = (),
) -> None:
    """Install the package with extras, as a user would, and the groups a session needs.

    The groups are of pyproject.toml. What is shared comes first of all, so that no other
    requirement brings another build of torch.
    """
    share(session, (extra for extra in extras if extra in shared))
    path, _ = wheel(session)
    kept = any(site(session).glob("colltensor-*.dist-info"))
    session.install(
        "--quiet", f"colltensor[{','.join(extras)}] @ {path.as_uri()}", *pins, *group(*groups)
    )
    if kept:  # it may hold an older build of the same version
        session.install("--quiet", "--no-deps", "--force-reinstall", str(path))


def elsewhere(session: nox.Session) -> Path:
    """Return an empty folder to run in, so that nothing comes from the checkout by being in it.

    Not nox's own `create_tmp()`, which becomes TMPDIR: Ray refuses one inside a virtual
    environment.
    """
    folder = KEPT / "run" / Path(session.virtualenv.location).name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def pytest(
    session: nox.Session, tests: Iterable[str], *arguments: str, without: str = "", **selected: str
) -> None:
    """Run pytest on the installed package; arguments after nox's ``--`` are passed on.

    What is selected are the variables that tests/conftest.py describes.
    """
    environment = {
        f"COLLTENSOR_TEST_{name.upper()}": value
        for name, value in {"installed": "1", **selected}.items()
    }
    given = [
        str(ROOT / word) if (ROOT / word.split("::")[0]).exists() else word
        for word in session.posargs
    ]
    where = (
        []
        if any(word.startswith(str(ROOT)) for word in given)
        else [str(ROOT / test) for test in tests]
    )
    left_out = [f"--ignore={ROOT / without}"] if without else []
    # By the `pytest` script, since `python -m pytest` would put the working directory on the search
    # path.
    with session.chdir(elsewhere(session)):
        config = str(ROOT / "pyproject.toml")
        session.run(
            "pytest",
            "--config-file",
            config,
            *where,
            *left_out,
            *arguments,
            *given,
            env=environment,
        )


def side_by_side(
    session: nox.Session,
    commands: Iterable[list[str]],
    environment: dict[str, str],
    folder: Path = ROOT,
) -> None:
    """Run commands, two at a time, because they mostly wait.

    Prints what each said, and fails where one fails.
    """
    own = {name: value for name, value in session.env.items() if value is not None}
    variables = {**os.environ, **own, **environment}

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=folder, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip

    with concurrent.futures.ThreadPoolExecutor(2) as two:
        for done in two.map(run, commands):
            session.log(" ".join(done.args))
            print(done.stdout, end="", flush=True)
            if done.returncode:
                two.shutdown(cancel_futures=True)
                session.error(f"{' '.join(done.args)} ended with exit code {done.returncode}")


def native_tests(session: nox.Session, name: str, definitions: Iterable[str]) -> list[str]:
    """Build the native tests and return the programs; reuses older objects.

    There is a second one where Gloo was found.
    """
    folder = KEPT / "native" / name
    options = [
        "COLLTENSOR_PYTHON=OFF",
        "COLLTENSOR_NATIVE_TESTS=ON",
        "CMAKE_COMPILE_WARNING_AS_ERROR=ON",
        *definitions,
    ]
    configure = ["cmake", "--fresh", "-S", str(ROOT / "native"), "-B", str(folder), "-G", "Ninja"]
    session.run(*configure, *(f"-D{option}" for option in options), silent=True)
    over_gloo = folder / "colltensor_gloo_stress"
    over_gloo.unlink(missing_ok=True)  # of a build that found Gloo
    session.run("cmake", "--build", str(folder), silent=True)
    return [str(folder / "colltensor_stress"), *([str(over_gloo)] if over_gloo.exists() else [])]


def without_randomisation() -> list[str]:
    """Return words before a command that fix where the kernel places its memory.

    They do so as far as that is permitted. ThreadSanitizer before g++ 14 cannot start where the
    kernel randomises addresses with 32 bits, as recent ones do
    (https://github.com/google/sanitizers/issues/1716); containers may forbid it.
    """
    words = ["setarch", "-R"]
    if shutil.which("setarch") is None:
        return []
    return (
        words
        if subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0
        else []
    )
