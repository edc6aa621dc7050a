"""The session: which frameworks are under test, the pool of ranks, and the check that nothing is left.

Options (each also by an environment variable, which is how nox's sessions pass them):
    --frameworks, COLLTENSOR_TEST_FRAMEWORKS  Of numpy, torch, jax, cupy, ray; what is installed, by default.
        One that is selected but missing ends the session.
    --providers, COLLTENSOR_TEST_PROVIDERS  Gloo's providers, native, pygloo and torch, likewise; may be empty.
    --gloo-sizes, COLLTENSOR_TEST_GLOO_SIZES  World sizes of the conformance suite's Gloo worlds; 1,2,3,4 by default.
    --shm-sizes, COLLTENSOR_TEST_SHM_SIZES  Those of its worlds in shared memory; 2,3,4 by default.
    --two-hosts, COLLTENSOR_TEST_TWO_HOSTS=1  The pool's ranks are in two network namespaces in turns, with a link
        between them; on this host, where namespaces are not permitted. Select `-m gloo` with it.
    COLLTENSOR_TEST_OF  A framework: what it changes is run, and nothing else.
    COLLTENSOR_TEST_SEQUENCES  How many random sequences of calls the conformance suite has; 800 by default.
    COLLTENSOR_TEST_INSTALLED=1  The package must be the installed one, not the checkout, and have its native library.

A test that takes ``framework`` or ``provider`` runs once for each selected one. Marks: ``needs("torch", "jax")``
and the folder ``tests/ray`` deselect a test where one of them is not selected; ``gloo`` where there is no provider;
``shm`` in a checkout whose native library was not built; ``gpu`` where pytest was not asked for it by ``-m gpu``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from leftovers import SESSION_VARIABLE, Leftovers
from pool import RankPool

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORKS = ("numpy", "torch", "jax", "cupy", "ray")
PROVIDERS = ("native", "pygloo", "torch")
SIZES = {"gloo": "1,2,3,4", "shm": "2,3,4"}

hypothesis.settings.register_profile(
    "colltensor", deadline=None, derandomize=True, database=None, print_blob=True
)
hypothesis.settings.load_profile("colltensor")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the session's options."""
    for name, choices in (("frameworks", FRAMEWORKS), ("providers", PROVIDERS)):
        parser.addoption(f"--{name}", help=f"comma-separated, of: {', '.join(choices)}")
    for backend in SIZES:
        parser.addoption(f"--{backend}-sizes", help="comma-separated world sizes")
    parser.addoption(
        "--two-hosts", action="store_true", help="ranks in two network namespaces, where permitted"
    )


def _is_installed(name: str) -> bool:
    if name == "native":
        return _missing_native_gloo() is None
    found = importlib.util.find_spec(name)
    # Without an origin it is a folder of that name on the search path, as tests/ray is, and no package.
    return found is not None and found.origin is not None


collect_ignore = [] if _is_installed("ray") else ["ray"]
"""The tests in Ray cannot be imported without it; where it is selected, its absence ends the session anyway."""


def _selected(config: pytest.Config, option: str, choices: tuple[str, ...]) -> tuple[str, ...]:
    """Return what an option, or its variable, selects; what is installed where neither is given."""
    text = config.getoption(option)
    if text is None:
        text = os.environ.get(f"COLLTENSOR_TEST_{option.upper()}")
    if text is None:
        return tuple(name for name in choices if _is_installed(name))
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in choices:
            raise pytest.UsageError(f"{option}: {name!r} is none of {', '.join(choices)}")
        if not _is_installed(name):
            why = (
                _missing_native_gloo() if name == "native" else "not installed in this environment"
            )
            raise pytest.UsageError(f"{option}: {name} is selected, but {why}")
    return names


def _sizes(config: pytest.Config, backend: str) -> tuple[int, ...]:
    variable = f"COLLTENSOR_TEST_{backend.upper()}_SIZES"
    text = config.getoption(f"{backend}_sizes") or os.environ.get(variable) or SIZES[backend]
    return tuple(int(word) for word in text.split(","))


def _load(path: Path) -> Any:
    """Import a file that is no test and lies in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _enter_two_hosts(config: pytest.Config) -> None:
    """Note what comes before the ranks' commands, and where they are then, in words."""
    config.stash[HOSTS_KEY] = undo = contextlib.ExitStack()
    config.stash[PREFIXES_KEY], config.stash[PLACE_KEY] = ((),), "on this host"
    if not (config.getoption("two_hosts") or os.environ.get("COLLTENSOR_TEST_TWO_HOSTS") == "1"):
        return
    namespaces = _load(ROOT / "benchmarks" / "harness" / "namespaces.py")
    try:
        holders = undo.enter_context(namespaces.two_hosts())
    except namespaces.NotPermittedError as error:
        config.stash[PLACE_KEY] = f"on this host, since network namespaces cannot be made: {error}"
        return
    prefixes: tuple[Sequence[str], ...] = tuple(namespaces.inside(holder, ()) for holder in holders)
    config.stash[PREFIXES_KEY] = prefixes
    config.stash[PLACE_KEY] = "in two network namespaces in turns"


def _missing_native_gloo() -> str | None:
    """Return None if the native Gloo can be used, else why not."""
    try:
        library = importlib.import_module("colltensor.backends.gloo.library")
    except ImportError as error:
        return f"colltensor cannot be imported: {error}"
    return library.reason()


def _missing_library() -> str | None:
    """Return None if shared memory can be used, else why not; a package that cannot be imported is for its tests."""
    try:
        return importlib.import_module("colltensor.backends").reason("shm")
    except ImportError as error:
        return f"colltensor cannot be imported: {error}"


def pytest_configure(config: pytest.Config) -> None:
    """Read the options; give the session a temporary folder of its own."""
    # A shell ignores SIGINT in what it runs in the background, and children inherit that: tests of Ctrl-C need it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Whoever ends the session from outside gets the same orderly end as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config.stash[FRAMEWORKS_KEY] = _selected(config, "frameworks", FRAMEWORKS)
    config.stash[PROVIDERS_KEY] = _selected(config, "providers", PROVIDERS)
    if os.environ.get("COLLTENSOR_TEST_INSTALLED") == "1":
        found = importlib.util.find_spec("colltensor")
        origin = found.origin if found else None
        if origin is None or "site-packages" not in Path(origin).parts:
            raise pytest.UsageError(
                f"COLLTENSOR_TEST_INSTALLED=1, but colltensor would come from {origin}"
            )
    config.stash[SIZES_KEY] = {backend: _sizes(config, backend) for backend in SIZES}
    config.stash[NO_SHM_KEY] = why = _missing_library()
    if why is not None and (
        os.environ.get("COLLTENSOR_TEST_INSTALLED") == "1" or "COLLTENSOR_LIBRARY" in os.environ
    ):
        raise pytest.UsageError(f"shared memory is under test, but {why}")
    _enter_two_hosts(config)
    # Short, because Ray puts unix sockets below it, whose paths may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="ct-", dir=tempfile.gettempdir()))
    config.stash[FOLDER_KEY] = folder
    config.stash[TMPDIR_KEY] = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(folder)
    os.environ[SESSION_VARIABLE] = folder.name
    tempfile.tempdir = None


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the session's temporary folder and its namespaces."""
    if HOSTS_KEY in config.stash:
        config.stash[HOSTS_KEY].close()
    folder = config.stash.get(FOLDER_KEY, None)
    if folder is None:
        return
    previous = config.stash[TMPDIR_KEY]
    if previous is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = previous
    tempfile.tempdir = None
    shutil.rmtree(folder, ignore_errors=True)


FRAMEWORKS_KEY = pytest.StashKey[tuple[str, ...]]()
PROVIDERS_KEY = pytest.StashKey[tuple[str, ...]]()
SIZES_KEY = pytest.StashKey[dict[str, tuple[int, ...]]]()
NO_SHM_KEY = pytest.StashKey["str | None"]()
HOSTS_KEY = pytest.StashKey[contextlib.ExitStack]()
PREFIXES_KEY = pytest.StashKey["tuple[Sequence[str], ...]"]()
PLACE_KEY = pytest.StashKey[str]()
FOLDER_KEY = pytest.StashKey[Path]()
TMPDIR_KEY = pytest.StashKey["str | None"]()


def pytest_report_header(config: pytest.Config) -> str:
    """Say what is under test."""
    found = importlib.util.find_spec("colltensor")
    frameworks, providers = config.stash[FRAMEWORKS_KEY], config.stash[PROVIDERS_KEY]
    return (
        f"colltensor: {found.origin if found else 'missing'}; frameworks: {', '.join(frameworks)}; "
        f"Gloo providers: {', '.join(providers) or 'none'}; shared memory: {config.stash[NO_SHM_KEY] or 'yes'}; "
        f"ranks: {config.stash[PLACE_KEY]}"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes ``framework`` or ``provider`` once for each selected one."""
    config = metafunc.config
    marked = {mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")}
    if "framework" in metafunc.fixturenames and "framework" not in marked:
        arrays = [name for name in config.stash[FRAMEWORKS_KEY] if name != "ray"]
        metafunc.parametrize("framework", arrays)
    if "provider" in metafunc.fixturenames and "provider" not in marked:
        metafunc.parametrize("provider", config.stash[PROVIDERS_KEY])


def _changes(framework: str, item: pytest.Item) -> bool:
    """Whether a test's outcome may depend on a framework: by its marks, its parameters, or what it asks the session."""
    if any(framework in mark.args for mark in item.iter_markers("needs")):
        return True
    if {"frameworks", "providers", "libraries", "worlds"} & set(getattr(item, "fixturenames", ())):
        return True
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    values = [
        part
        for value in parameters.values()
        for part in (value if isinstance(value, tuple) else (value,))
    ]
    return any(isinstance(value, str) and value == framework for value in values)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what needs a framework, a provider or a GPU that is not under test."""
    frameworks, providers = config.stash[FRAMEWORKS_KEY], config.stash[PROVIDERS_KEY]
    no_shm = config.stash[NO_SHM_KEY]
    only_of = os.environ.get("COLLTENSOR_TEST_OF")
    asked_for_gpu = "gpu" in (config.getoption("markexpr") or "")
    kept, dropped = [], []
    for item in items:
        needed = {name for mark in item.iter_markers("needs") for name in mark.args}
        if (ROOT / "tests" / "ray") in item.path.parents:
            item.add_marker("ray")
            needed.add("ray")
        fits = needed <= set(frameworks) and (providers or not item.get_closest_marker("gloo"))
        fits = fits and (no_shm is None or not item.get_closest_marker("shm"))
        fits = fits and (asked_for_gpu or not item.get_closest_marker("gpu"))
        fits = fits and (not only_of or _changes(only_of, item))
        # What is parametrised over nothing selected; pytest would show it as skipped.
        fits = fits and not any(
            "parameter set" in str(mark.kwargs) for mark in item.iter_markers("skip")
        )
        (kept if fits else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture(scope="session", autouse=True)
def nothing_left(pytestconfig: pytest.Config) -> Iterator[None]:
    """Fail, after the last test, where a process, segment, listening port or folder of ours is left."""
    before = Leftovers.now(pytestconfig.stash[FOLDER_KEY])
    yield
    complaints = Leftovers.since(before)
    assert not complaints, "the tests left something behind:\n" + "\n".join(complaints)


@pytest.fixture(scope="session")
def frameworks(pytestconfig: pytest.Config) -> tuple[str, ...]:
    """The selected array frameworks, ray not among them."""
    return tuple(name for name in pytestconfig.stash[FRAMEWORKS_KEY] if name != "ray")


@pytest.fixture(scope="session")
def providers(pytestconfig: pytest.Config) -> tuple[str, ...]:
    """The selected Gloo providers."""
    return pytestconfig.stash[PROVIDERS_KEY]


@pytest.fixture(scope="session")
def pool(nothing_left: None, pytestconfig: pytest.Config) -> Iterator[RankPool]:
    """The session's pool of rank processes."""
    folder = pytestconfig.stash[FOLDER_KEY] / "pool"
    folder.mkdir()
    ranks = RankPool(folder, prefixes=pytestconfig.stash[PREFIXES_KEY])
    yield ranks
    ranks.close()
    left = sorted(str(path.relative_to(folder)) for path in (folder / "rendezvous").iterdir())
    assert not left, f"rendezvous files were left: {left}"
