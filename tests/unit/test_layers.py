"""The layers of ARCHITECTURE.md, read off the sources: no import points the wrong way.

Reads every module's syntax tree, so that it needs no framework and also sees imports inside functions.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

FRAMEWORKS = {
    "numpy",
    "torch",
    "jax",
    "jaxlib",
    "cupy",
    "ray",
    "pygloo",
    "ml_dtypes",
    "tvm_ffi",
    "optree",
    "jax_tvm_ffi",
    "optax",
    "tensorflow",
    "mlx",
    "paddle",
    "mpi4py",
    "matplotlib",
    "typer",
    "rich",
}
"""Packages that only the modules named in FRAMEWORKS_OF may import."""

VALUES = {"errors", "types", "view"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "_compat": set(),
    "types": {"errors"},
    "operations": set(),
    "dlpack": {"errors"},
    "view": {"errors", "types", "dlpack"},
    "adapters": {*VALUES, "_compat", "dlpack"},
    "environment": {"errors"},
    "net": {"errors"},
    "listener": {"net"},
    "rendezvous": {"errors", "net", "listener"},
    "control": {"errors", "net", "listener", "rendezvous"},
    "backends": {
        "operations",
        *VALUES,
        "dlpack",
        "environment",
        "net",
        "listener",
        "rendezvous",
        "control",
    },
    "tree": {"errors", "adapters"},
    "buffers": {*VALUES, "adapters", "tree"},
    "arguments": {*VALUES, "adapters", "backends", "buffers", "gathered"},
    "objects": {"errors", "environment", "types", "adapters"},
    "untraced": {"_compat"},
    "turn": set(),
    "work": {"errors", "backends"},
    "native_queue": {"backends", "turn", "work"},
    "operation_queue": {"errors", "backends", "native_queue", "turn", "work"},
    "engine": {"operations", *VALUES, "backends", "control", "buffers", "operation_queue", "work"},
    "fastpath": {
        "operations",
        *VALUES,
        "adapters",
        "backends",
        "arguments",
        "buffers",
        "dlpack",
        "engine",
        "work",
    },
    "tree_plans": {*VALUES, "adapters", "buffers", "tree"},
    "gathered": {*VALUES, "adapters", "backends", "buffers", "tree_plans"},
    "fastpath_trees": {
        "operations",
        *VALUES,
        "adapters",
        "backends",
        "fastpath",
        "engine",
        "tree",
        "tree_plans",
    },
    "multigpu": {*VALUES, "backends", "buffers", "arguments", "engine"},
    "options": {"errors", "backends", "objects"},
    "devices": {*VALUES, "backends", "control", "engine", "options", "rendezvous", "work"},
    "prefix": {*VALUES, "adapters", "backends"},
    "group": {
        *VALUES,
        "adapters",
        "backends",
        "rendezvous",
        "control",
        "buffers",
        "arguments",
        "fastpath",
        "fastpath_trees",
        "engine",
        "environment",
        "work",
        "multigpu",
        "devices",
        "options",
        "objects",
        "untraced",
        "prefix",
    },
    "bridge": {"errors", "group"},
    "observers": {"operations", "errors", "adapters", "tree", "work", "multigpu", "group"},
    "table": {
        "errors",
        "environment",
        "objects",
        "backends",
        "control",
        "rendezvous",
        "group",
        "options",
    },
    "collectives": {*VALUES, "backends", "arguments", "tree", "work", "group", "table"},
    "replicas": {*VALUES, "adapters", "tree", "group"},
    "gradients": {
        *VALUES,
        "adapters",
        "tree",
        "tree_plans",
        "buffers",
        "work",
        "group",
        "table",
        "replicas",
    },
    "": {
        *VALUES,
        "adapters",
        "backends",
        "tree",
        "work",
        "group",
        "observers",
        "table",
        "collectives",
        "gradients",
    },
}
"""The units of the package (a top-level module or folder; "" is ``__init__``) and what each may import."""

FOR_ONE_FRAMEWORK = {"torch", "jax", "ray"}
"""Folders for the users of one framework: they may import every unit, and no other unit imports them.

Others may name their classes in annotations, and find them by name when they are asked for.
"""

COMMAND = {"cli", "__main__"}
"""The command: it may import every unit but those for one framework, and no other unit imports it."""

NOT_IMPORTED = {*FOR_ONE_FRAMEWORK, *COMMAND}

FRAMEWORKS_OF = {
    "_compat.torch": {"torch"},
    "_compat.jax": {"jax"},
    "_compat.ray": {"ray"},
    "adapters._numpy_dtypes": {"numpy", "ml_dtypes"},
    "adapters.numpy": {"numpy", "ml_dtypes"},
    "adapters.numbers": {"numpy", "ml_dtypes"},
    "adapters.cupy": {"cupy", "numpy", "ml_dtypes"},
    "adapters.torch": {"torch"},
    "adapters.jax": {"jax", "jaxlib", "numpy", "ml_dtypes"},
    "adapters.tensorflow": {"tensorflow"},
    "adapters.mlx": {"mlx"},
    "adapters.paddle": {"paddle"},
    "backends.nccl.driver": {"cupy"},
    "backends.loopback": {"numpy"},  # copies strided host memory with numpy's loops
    # reduces host memory where Gloo lacks the type
    "backends.arithmetic": {"numpy", "ml_dtypes"},
    "backends.gloo.composed": {"numpy"},
    "backends.gloo.pygloo_provider": {"pygloo", "numpy"},
    "backends.gloo.torch_provider": {"torch"},
    "backends.nccl": {"cupy"},
    "dlpack": {"tvm_ffi"},
    "tree": {"optree"},
    "torch": {"torch"},
    "jax": {"jax", "jaxlib", "jax_tvm_ffi", "numpy", "optax"},
    "ray": {"ray"},
    "ray.arrays": {"torch", "jax", "cupy", "numpy"},
    "cli.app": {"typer"},
    "cli.report": {"rich"},
    "cli.bench": {"matplotlib", "rich"},
    "cli.doctor": {"cupy"},
    "cli.worker": {"numpy"},
    "cli.libraries": {"jax", "mpi4py", "numpy", "ray", "torch"},
    "cli.operations": {"ml_dtypes", "numpy"},
    "cli.ray_workers": {"ray"},
    "cli.selftest": {"cupy", "mlx", "numpy"},
}
"""Modules, or folders, and the packages of FRAMEWORKS that each may import."""


@dataclass(frozen=True)
class Import:
    """One import in a module: what, where, and whether only the type checker sees it."""

    name: str
    line: int
    for_types_only: bool


def _imports(source: str, module: str, is_package: bool) -> Iterator[Import]:
    """Yield every import of a module, ``importlib.import_module("literal")`` among them."""
    tree = ast.parse(source)
    guarded = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for child in ast.walk(statement)
    }
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from colltensor import errors` names a unit in the alias, not in the module.
            names = (
                [f"{origin}.{alias.name}" for alias in node.names]
                if origin == "colltensor"
                else [origin]
            )
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [
                arg.value
                for arg in node.args[:1]
                if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            ]
            # The package's own plug-ins (adapters, providers, a framework's folder) are looked up by name on purpose.
            names = [name for name in names if not name.startswith("colltensor")]
        for name in names:
            yield Import(name, getattr(node, "lineno", 0), id(node) in guarded)


def _unit(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def _allowed_frameworks(module: str) -> set[str]:
    name = module.removeprefix("colltensor").removeprefix(".")
    allowed: set[str] = set()
    for prefix, frameworks in FRAMEWORKS_OF.items():
        if name == prefix or name.startswith(f"{prefix}."):
            allowed |= frameworks
    return allowed


def _complaints(source: str, module: str, is_package: bool = False) -> list[str]:
    """Return a line for each import of one module that breaks a rule."""
    unit = _unit(module)
    if unit not in MAY_IMPORT and unit not in NOT_IMPORTED:
        return [f"{module}: the unit {unit!r} is in no layer; give it a line in MAY_IMPORT"]
    complaints = []
    for found in _imports(source, module, is_package):
        where = f"{module}:{found.line}"
        top = found.name.split(".")[0]
        if (
            top in FRAMEWORKS
            and not found.for_types_only
            and top not in _allowed_frameworks(module)
        ):
            complaints.append(
                f"{where} imports {top}, which belongs to its adapter or provider only"
            )
        if top != "colltensor":
            continue
        target = _unit(found.name)
        if target not in MAY_IMPORT and target not in NOT_IMPORTED:
            target = ""  # a public name, imported from the package itself
        if target == unit or (found.for_types_only and target in FOR_ONE_FRAMEWORK):
            continue
        allowed = set(MAY_IMPORT) if unit in NOT_IMPORTED else MAY_IMPORT[unit]
        if unit in COMMAND:
            allowed |= COMMAND
        if target not in allowed:
            rule = f"{unit or '__init__'} may not import {target or '__init__'}"
            complaints.append(f"{where} imports {found.name}: {rule}")
    return complaints


def _modules() -> Iterator[tuple[str, Path]]:
    spec = importlib.util.find_spec("colltensor")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        yield ".".join(("colltensor", *(part for part in parts if part != "__init__"))), path


def test_no_import_points_the_wrong_way() -> None:
    modules = list(_modules())
    assert len(modules) > 10
    complaints = []
    for module, path in modules:
        complaints += _complaints(path.read_text(), module, path.name == "__init__.py")
    assert not complaints, "\n".join(complaints)


def test_no_unit_reaches_itself_through_the_table() -> None:
    """The table itself has no cycle, so that the layers are layers."""

    def reach(unit: str, path: tuple[str, ...]) -> None:
        assert unit not in path, f"MAY_IMPORT has a cycle: {' -> '.join((*path, unit))}"
        for target in MAY_IMPORT[unit]:
            reach(target, (*path, unit))

    for unit in MAY_IMPORT:
        reach(unit, ())


def test_adapters_and_backends_do_not_know_each_other() -> None:
    assert "adapters" not in MAY_IMPORT["backends"]
    assert "backends" not in MAY_IMPORT["adapters"]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("colltensor.adapters.numpy", "from colltensor.backends import gloo"),
        ("colltensor.adapters.torch", "def f():\n    import jax"),
        ("colltensor.backends.loopback", "from colltensor.adapters import adapter_of"),
        ("colltensor.backends.gloo", "import torch.distributed"),
        ("colltensor.errors", "from colltensor import types"),
        ("colltensor.group", "import colltensor.ray"),
        ("colltensor.group", "import importlib\nimportlib.import_module('numpy')"),
        ("colltensor.view", "import tvm_ffi"),
        ("colltensor.torch.hooks", "from colltensor.jax import x"),
        ("colltensor.torch.hooks", "import ray"),
        ("colltensor.adapters.numpy", "from .. import group"),
        ("colltensor.newcomer", ""),
        ("colltensor.view", "from colltensor import BufferView"),
        ("colltensor.group", "from colltensor.cli import launcher"),
        ("colltensor.cli.run", "import rich"),
        ("colltensor.cli.run", "import colltensor.ray"),
    ],
)
def test_the_check_sees_a_wrong_import(module: str, source: str) -> None:
    assert len(_complaints(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("colltensor.adapters.torch", "import torch\nfrom colltensor.view import BufferView"),
        (
            "colltensor.backends.gloo.torch_provider",
            "import torch\nfrom colltensor.backends.base import Backend",
        ),
        (
            "colltensor.group",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy",
        ),
        (
            "colltensor.rendezvous",
            "import importlib\nimportlib.import_module('colltensor.ray.rendezvous')",
        ),
        (
            "colltensor.ray.groups",
            "import ray\nimport colltensor\nfrom colltensor import Group, errors",
        ),
    ],
)
def test_the_check_lets_a_right_import_pass(module: str, source: str) -> None:
    assert _complaints(source, module) == []


def _targets(source: str, module: str, names: set[str]) -> set[str]:
    """Return the package's modules that one of them imports, also for types, inside functions and by name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        asked: list[str] = []
        if isinstance(node, ast.Import):
            asked = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            asked = [member if member in names else node.module for member in members]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            asked = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        found |= {name for name in asked if name in names and name != module}
    return found


def _circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the nodes that are left when those are taken away that lead nowhere or that nothing leads to."""
    left = dict(graph)
    while True:
        reached = {target for targets in left.values() for target in targets}
        inside = {name: targets & left.keys() for name, targets in left.items() if name in reached}
        inside = {name: targets & inside.keys() for name, targets in inside.items()}
        inside = {name: targets for name, targets in inside.items() if targets}
        if inside.keys() == left.keys():
            return sorted([name, *sorted(targets)] for name, targets in left.items())
        left = inside


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Plug-ins that are looked up by a table (an adapter's, a backend's) import the table; that is no circle."""
    sources = {module: path.read_text() for module, path in _modules()}
    graph = {name: _targets(source, name, set(sources)) for name, source in sources.items()}
    # looked up by a tensor's type, as the adapters of the table are
    graph["colltensor.adapters"] -= {"colltensor.adapters.dlpack", "colltensor.adapters.numbers"}
    assert _circles(graph) == []


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set[str]()}
    assert _circles(graph) == [["b", "c"], ["c", "b"]]
