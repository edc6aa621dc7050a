"""``import colltensor`` loads no array framework and no ray, and is cheap.

Each look is a fresh interpreter, in which the frameworks are installed but nobody asked for them.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

FRAMEWORKS = (
    "numpy",
    "ml_dtypes",
    "torch",
    "jax",
    "jaxlib",
    "cupy",
    "ray",
    "pygloo",
    "tvm_ffi",
    "tensorflow",
    "mlx",
    "paddle",
)

ON_THE_HOST = ("numpy", "torch", "jax")


def _loaded_after(program: str) -> set[str]:
    """Run a program in a fresh interpreter with this one's search path; return the frameworks it loaded."""
    tail = f"import json, sys; print(json.dumps([m for m in {FRAMEWORKS!r} if sys.modules.get(m)]))"
    setup = f"import sys; sys.path[:] = {sys.path!r}"
    run = subprocess.run(
        [sys.executable, "-c", f"{setup}\n{program}\n{tail}"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_import_loads_no_framework() -> None:
    assert _loaded_after("import colltensor") == set()


def test_public_names_load_no_framework() -> None:
    assert (
        _loaded_after(
            "import colltensor\nfor name in colltensor.__all__: getattr(colltensor, name)"
        )
        == set()
    )


def test_asking_which_backends_there_are_loads_no_array_framework() -> None:
    loaded = _loaded_after("import colltensor\ncolltensor.is_backend_available('loopback')")
    assert loaded == set()


@pytest.mark.parametrize(
    "framework", [pytest.param(name, marks=pytest.mark.needs(name)) for name in ON_THE_HOST]
)
def test_one_framework_does_not_load_another(framework: str) -> None:
    """A rank that uses one framework pays for that one: torch alone takes a second and 200 MB."""
    make = {
        "numpy": "import numpy; x = numpy.ones(3, numpy.float32)",
        "torch": "import torch; x = torch.ones(3)",
        "jax": "import jax.numpy; x = jax.numpy.ones(3)",
    }[framework]
    program = (
        f"{make}\nimport colltensor\n"
        "group = colltensor.init_collective_group(1, 0, 'loopback', 'alone')\n"
        "assert float(group.allreduce(x)[1]) == 1.0\n"
        "group.destroy()"
    )
    allowed = {"numpy", "ml_dtypes", "tvm_ffi", framework} | (
        {"jaxlib"} if framework == "jax" else set()
    )
    assert _loaded_after(program) <= allowed


def test_an_object_without_an_adapter_loads_nothing() -> None:
    program = (
        "import colltensor\n"
        "group = colltensor.init_collective_group(1, 0, 'loopback', 'alone')\n"
        "try: group.allreduce(object())\n"
        "except colltensor.UnsupportedTensorError: pass\n"
        "group.destroy()"
    )
    assert _loaded_after(program) <= {"tvm_ffi"}


@pytest.mark.needs("torch")
def test_torch_knows_the_backend_without_an_import_of_ours(tmp_path: Path) -> None:
    """``import torch`` calls the entry point, which loads nothing; in a checkout it is one that is made here."""
    if not metadata.entry_points(group="torch.backends", name="colltensor"):
        information = tmp_path / "colltensor-0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: colltensor\nVersion: 0\n"
        )
        project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
        [line] = re.findall(
            r'^\[project\.entry-points\."torch\.backends"\]\n(.*)$', project, re.MULTILINE
        )
        (information / "entry_points.txt").write_text("[torch.backends]\n" + line.replace('"', ""))
    program = (
        f"sys.path.append({str(tmp_path)!r})\n"
        "import torch\n"
        "assert 'colltensor' not in sys.modules\n"
        "dist = torch.distributed\n"
        "again = []\n"
        "dist.Backend.register_backend = lambda name, *_, **__: again.append(name)  # torch 2.6 refuses a second\n"
        "dist.init_process_group('cpu:colltensor', store=dist.HashStore(), rank=0, world_size=1)\n"
        "dist.all_reduce(torch.ones(3))\n"
        "assert type(dist.group.WORLD).__name__ == 'ColltensorProcessGroup'\n"
        "dist.destroy_process_group()\n"
        "assert again == []\n"
        "import colltensor_autoload\n"
        "dist.Backend.register_backend = None\n"
        "colltensor_autoload.register()  # which fails, and import torch does not\n"
    )
    assert "torch" in _loaded_after(program)


@pytest.mark.parametrize("missing", ["torch", "jax", "cupy", "ray", "pygloo"])
def test_import_works_where_a_framework_is_missing(missing: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; import colltensor"
    assert _loaded_after(program) == set()


def test_the_installed_package_is_typed() -> None:
    spec = importlib.util.find_spec("colltensor")
    assert spec is not None
    assert spec.loader is not None
    assert spec.loader.get_data(str(spec.origin).replace("__init__.py", "py.typed")) == b""  # type: ignore[attr-defined]


@pytest.mark.parametrize(("backend", "chosen"), [
    pytest.param("shm", None, marks=pytest.mark.shm),
    pytest.param("gloo", "native", marks=pytest.mark.shm),
    pytest.param("gloo", "torch", marks=pytest.mark.needs("torch")),
])  # fmt: skip
def test_a_group_has_imported_what_its_backend_needs_before_that_connects(
    backend: str, chosen: str | None
) -> None:
    """Its timeout is for the other ranks: torch alone took 30 seconds of it on a busy machine."""
    program = (
        "import sys, colltensor\n"
        "from colltensor.options import GroupOptions\n"
        "before = set()\n"
        "def make(*arguments, made=GroupOptions.make):\n"
        "    before.update(sys.modules)\n"
        "    return made(*arguments)\n"
        "GroupOptions.make = make\n"
        f"options = dict(backend={backend!r}, provider={chosen!r}, init_method='tcp://127.0.0.1:1')\n"
        "try: colltensor.init_collective_group(1, 0, **options).destroy()\n"
        "except colltensor.BackendUnavailableError: assert options['provider'] == 'native'\n"
        "late = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert before and not late & {'colltensor', 'torch', 'numpy', 'tvm_ffi'}, sorted(set(sys.modules) - before)"
    )
    _loaded_after(program)


def test_what_ranks_of_several_hosts_need_is_loaded_when_the_hosts_are_known() -> None:
    program = (
        "import sys, colltensor.options\n"
        "options = colltensor.options.GroupOptions()\n"
        "options.prepare(3, ('a', 'a', 'a'))\n"
        "assert 'colltensor.backends.hierarchical.backend' not in sys.modules\n"
        "options.prepare(3, ('a', 'a', 'b'))\n"
        "assert 'colltensor.backends.hierarchical.watch' in sys.modules\n"
        "assert 'colltensor.backends.gloo.backend' in sys.modules"
    )
    _loaded_after(program)
