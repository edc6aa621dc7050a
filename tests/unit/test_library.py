"""Finding and loading the native library: where it is looked for, and what each error tells the user to do."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import colltensor
from colltensor import dlpack
from colltensor.backends import is_available, reason
from colltensor.backends.gloo import library as gloo_library
from colltensor.backends.shm import library
from colltensor.errors import BackendUnavailableError


@pytest.fixture(autouse=True)
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has yet to load the library."""
    monkeypatch.setattr(library, "_loaded", [])


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder where an installed package, and no variable, has its library; empty."""
    monkeypatch.setattr(colltensor, "__path__", [str(tmp_path)])
    monkeypatch.delenv("COLLTENSOR_LIBRARY", raising=False)
    (tmp_path / "lib").mkdir()
    return tmp_path / "lib"


def file_of(folder: Path, contents: bytes = b"no library at all") -> Path:
    place = folder / "libcolltensor.so"
    place.write_bytes(contents)
    return place


def test_the_built_library_loads_once() -> None:
    if not is_available("shm"):
        pytest.skip(str(reason("shm")))
    module = library.load()
    assert module.shm_interface() == library.INTERFACE
    assert library.load() is module


def test_the_library_is_part_of_an_installed_package() -> None:
    try:
        files = importlib.metadata.files("colltensor") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("colltensor is not installed: this is the checkout")
    if sys.platform != "linux":
        pytest.skip("only wheels for Linux hold the library")
    libraries = {file.name for file in files if file.suffix == ".so"}
    assert libraries - {"libcolltensor_gloo.so"} == {"libcolltensor.so"}
    assert ("libcolltensor_gloo.so" in libraries) == (gloo_library.reason() is None)
    tags = [
        line
        for line in str(
            importlib.metadata.distribution("colltensor").read_text("WHEEL")
        ).splitlines()
        if line.startswith("Tag:")
    ]
    assert tags
    assert all(tag.startswith(("Tag: py3-none-linux", "Tag: py3-none-manylinux")) for tag in tags)


def test_it_is_found_in_whichever_folder_of_an_editable_install_has_it(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    sources = folder / "sources"
    monkeypatch.setattr(colltensor, "__path__", [str(sources), str(folder.parent)])
    assert library.path() == sources / "lib" / "libcolltensor.so"  # where there is none: the first
    place = file_of(folder)
    assert library.path() == place


def test_a_missing_library(folder: Path) -> None:
    with pytest.raises(
        BackendUnavailableError, match=r"pip install .*apt-get install g\+\+.*-e \."
    ) as caught:
        library.load()
    assert str(folder / "libcolltensor.so") in str(caught.value)
    assert reason("shm") == str(caught.value).removeprefix("backend 'shm': ")


def test_the_variable_names_a_file_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLLTENSOR_LIBRARY", str(tmp_path / "elsewhere.so"))
    with pytest.raises(
        BackendUnavailableError, match=rf"{tmp_path}/elsewhere\.so, .*\bCOLLTENSOR_LIBRARY\b"
    ):
        library.load()


def test_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(BackendUnavailableError, match=r"\bdarwin; .*backend='gloo'"):
        library.load()
    assert not is_available("shm")


def test_a_file_that_is_no_library(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    place = file_of(folder)
    assert is_available("shm")  # which loads nothing
    with pytest.raises(BackendUnavailableError, match=r"; pip install --force-reinstall") as caught:
        library.load()
    assert str(place) in str(caught.value)
    monkeypatch.setenv("COLLTENSOR_LIBRARY", str(place))
    with pytest.raises(BackendUnavailableError, match=rf"; build {place}\b"):
        library.load()


def test_a_library_of_something_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = [
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "libc.so" in line
    ]
    if not found:
        pytest.skip("there is no libc.so to take for it")
    other = tmp_path / "other.so"
    other.symlink_to(found[0])
    monkeypatch.setenv("COLLTENSOR_LIBRARY", str(other))
    with pytest.raises(BackendUnavailableError, match=r"other\.so .*\bshm_interface\b"):
        library.load()


def fake_tvm_ffi(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, interface: int
) -> list[str]:
    """Put a tvm_ffi of this version, and a library of this interface, in place of the real ones."""
    asked: list[str] = []

    def load_module(path: str) -> Any:
        asked.append(path)
        return SimpleNamespace(shm_interface=lambda: interface)

    package = SimpleNamespace(__version__=version, load_module=load_module)
    monkeypatch.setattr(dlpack, "tvm_ffi", lambda: package)
    monkeypatch.setenv("COLLTENSOR_LIBRARY", str(file_of(tmp_path)))
    return asked


def test_a_library_of_another_interface(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_tvm_ffi(monkeypatch, tmp_path, "0.1.13.post2", library.INTERFACE + 1)
    wanted = rf"\b{library.INTERFACE + 1}, .*\b{library.INTERFACE}; build {tmp_path}"
    with pytest.raises(BackendUnavailableError, match=wanted):
        library.load()


@pytest.mark.parametrize("version", ["0.2.0", "1.0", "0.10.1", "0.2.0rc1"])
def test_a_tvm_ffi_of_another_abi(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str
) -> None:
    asked = fake_tvm_ffi(monkeypatch, tmp_path, version, library.INTERFACE)
    wanted = rf"\b{version} .*: pip install 'apache-tvm-ffi==0\.1\.\*'"
    with pytest.raises(BackendUnavailableError, match=wanted):
        library.load()
    assert not asked, "the library was loaded against another ABI"


@pytest.mark.parametrize("version", ["0.1", "0.1.99", "0.1.13.post2"])
def test_a_tvm_ffi_of_the_same_series(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str
) -> None:
    asked = fake_tvm_ffi(monkeypatch, tmp_path, version, library.INTERFACE)
    library.load()
    assert asked == [str(library.path())]


def test_it_exports_its_own_functions_alone() -> None:
    """Neither the static libstdc++'s symbols nor tvm-ffi's templates stand in for those of other libraries."""
    if not is_available("shm"):
        pytest.skip(str(reason("shm")))
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm to read the library's symbols with (apt-get install binutils)")
    ran = subprocess.run(
        [nm, "-D", "--defined-only", str(library.path())],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    names = [line.split()[-1] for line in ran.stdout.splitlines()]
    assert "__tvm_ffi_shm_interface" in names
    assert [name for name in names if not name.startswith("__tvm_ffi_shm_")] == []
