"""The wheel that carries Gloo: where its library comes from, how large it is, what the repair does to it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import colltensor

NATIVE = Path(__file__).parents[2] / "native"
LIBRARIES = Path(colltensor.__file__).parents[1] / "colltensor.libs"
LIMIT_MB = 60


def carries_gloo(test: Callable[..., None]) -> Callable[..., None]:
    """A test of a wheel with Gloo inside, once that is installed."""
    reason = "colltensor was built here and not repaired: its Gloo, if any, is the system's"
    marked: Callable[..., None] = pytest.mark.gloo(
        pytest.mark.skipif(not LIBRARIES.is_dir(), reason=reason)(test)
    )
    return marked


MAPPED = """
import json, re
from colltensor.backends.gloo import library
library.load()
names = {line.split()[-1] for line in open("/proc/self/maps")}
print(json.dumps([name for name in names if re.search("/lib(gloo|hiredis|ibverbs|nl)[^/]*$", name)]))
"""


def mapped_by_the_provider(*prefix: str) -> list[str]:
    """The files of Gloo and of what it needs that a new process has, once the native provider is loaded."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    # nothing of the folder that this runs in
    command = [*prefix, sys.executable, "-I", "-c", MAPPED]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    names: list[str] = json.loads(done.stdout)
    return names


@carries_gloo
def test_gloo_comes_out_of_the_wheel() -> None:
    names = mapped_by_the_provider()
    assert any(Path(name).name.startswith("libgloo-") for name in names), names
    assert {Path(name).parent for name in names} == {LIBRARIES}, names


@carries_gloo
def test_the_systems_libraries_are_not_needed() -> None:
    """Where the wheel was built they are installed: nothing is behind their names in a namespace of our own."""
    cache = subprocess.run(
        ["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True
    ).stdout
    systems = [
        line.split()[-1]
        for line in cache.splitlines()
        if line.split()[0].startswith(("libgloo.", "libhiredis.", "libibverbs.", "libnl-"))
    ]
    hide = " && ".join(
        ["true", *(f"mount --bind /dev/null {name}" for name in sorted(set(systems)))]
    )
    prefix = ["unshare", "--mount", "sh", "-c", f'{hide} && exec "$@"', "sh"]
    permitted = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    if permitted.returncode:
        pytest.skip(f"the system's libraries cannot be hidden here: {permitted.stderr.strip()}")
    assert {Path(name).parent for name in mapped_by_the_provider(*prefix)} == {LIBRARIES}


@carries_gloo
def test_the_licences_of_what_is_inside_are_installed() -> None:
    repair = load("repair_wheel")
    inside = {repair.split_name(file.name)[0] for file in LIBRARIES.iterdir()}
    assert "libgloo" in inside
    distribution = metadata.distribution("colltensor")
    named = distribution.metadata.get_all("License-File") or []
    assert set(named) == {"LICENSE", *(f"{library}.txt" for library in inside)}
    files = {file.name: file for file in distribution.files or () if "licenses" in file.parts}
    for name in named:
        assert "opyright" in files[name].read_text(), name
    for library in inside:
        assert repair.LICENSES[library] in distribution.metadata["License-Expression"]


@carries_gloo
def test_colltensor_and_what_it_brings_beside_numpy_is_small() -> None:
    names = ["colltensor", "apache-tvm-ffi", "ml_dtypes", "optree", "typing-extensions"]
    files = [file for name in names for file in metadata.distribution(name).files or ()]
    total = sum(
        path.stat().st_size
        for path in (Path(str(file.locate())) for file in files)
        if path.is_file()
    )
    assert total < LIMIT_MB * 1e6


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, NATIVE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("file", "package"),
    [
        ("libgloo-7592c4f9.so.0.5.0", "libgloo0"),
        ("libhiredis-93a3341c.so.0.14", "libhiredis0.14"),
        ("libnl-3-a9aeb098.so.200.26.0", "libnl-3-200"),
        ("libnl-route-3-6a64fbc7.so.200.26.0", "libnl-route-3-200"),
        ("libgloo-7592c4f9.so.0.5.0", "libgloo0t64"),
    ],
)
def test_a_library_leads_to_its_package(tmp_path: Path, file: str, package: str) -> None:
    repair = load("repair_wheel")
    text = tmp_path / "usr" / "share" / "doc" / package / "copyright"
    text.parent.mkdir(parents=True)
    text.touch()
    assert repair.copyright_of(*repair.split_name(file), [tmp_path]) == text


@pytest.mark.parametrize("file", ["libssl-7592c4f9.so.3", "libgloo.so.0"])
def test_a_library_of_unknown_licence_is_refused(file: str) -> None:
    repair = load("repair_wheel")
    with pytest.raises(repair.RepairError, match=re.escape(file)):
        repair.split_name(file)


def test_a_library_without_copyright_file_is_refused(tmp_path: Path) -> None:
    repair = load("repair_wheel")
    with pytest.raises(repair.RepairError, match=r"\bcopyright\b.*\blibhiredis 77\.1"):
        repair.copyright_of("libhiredis", "77.1", [tmp_path])


def test_added_licences_are_recorded(tmp_path: Path) -> None:
    repair = load("repair_wheel")
    wheel = tmp_path / "colltensor-1-py3-none-any.whl"
    info = "colltensor-1.dist-info/"
    library = "colltensor.libs/libgloo-7592c4f9.so.0.5.0"
    text = "License-Expression: Apache-2.0\nLicense-File: LICENSE\n\nLicense-Expression: x\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(library, "binary")
        archive.writestr(f"{info}METADATA", text)
        archive.writestr(f"{info}RECORD", f"{library},,\n{info}METADATA,,\n{info}RECORD,,\n")
    copyright_file = tmp_path / "usr/share/doc/libgloo0/copyright"
    copyright_file.parent.mkdir(parents=True)
    copyright_file.write_text("Copyright: somebody")
    repair.add_licenses(wheel, [tmp_path])
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(f"{info}licenses/libgloo.txt").decode() == "Copyright: somebody"
        lines = archive.read(f"{info}METADATA").decode().split("\n")
        assert lines[0] == "License-Expression: Apache-2.0 AND BSD-3-Clause"
        assert lines[-2] == "License-Expression: x"
        assert lines[1:3] == ["License-File: LICENSE", "License-File: libgloo.txt"]
        record = dict(
            line.split(",", 1) for line in archive.read(f"{info}RECORD").decode().splitlines()
        )
        assert record.keys() == set(archive.namelist())
        # What `printf 'Copyright: somebody' | openssl dgst -sha256 -binary | basenc --base64url` says, without its "=".
        assert (
            record[f"{info}licenses/libgloo.txt"]
            == "sha256=JJiEpYzfH-_MZcBiXcmWBGP5CcLwgPYImbZdfMii0LI,19"
        )
