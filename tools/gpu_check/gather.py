"""The wheels that a machine without a network needs: gathered here, unpacked there.

Standard library alone.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent.parent
MAX_NBYTES: Final = 60 << 20
PACKAGES: Final = ("apache-tvm-ffi", "optree", "jax-tvm-ffi", "pytest-timeout")
"""What is not where torch, CuPy, JAX and pytest are.

The rest of what these need comes with those.
"""
_PLATFORMS: Final = tuple(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17))
_SUMS: Final = "SHA256SUMS"
_NCCL: Final = "nvidia-nccl-cu13==2.30.*"
"""The first that lets ranks share a device, and the smallest."""
_PART: Final = "part"


def gather(folder: Path, python: str, *, nccl: bool) -> int:
    """Fill a folder with the wheels and their sums.

    Returns 0, or 1 if they are too large to bring at once.

    Args:
        folder: What is brought; emptied first.
        python: The version of the Python that is to use them.
        nccl: Also fetch libnccl, and put parts of it beside the folder, in ``nccl-0``, ``nccl-1``
            ...
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.whl"), folder / _SUMS]:
        old.unlink(missing_ok=True)
    _download(folder, python, *PACKAGES)
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(ROOT),
    ]
    # The system's libgloo would be missed there.
    without_gloo = "--config-settings=cmake.define.CMAKE_DISABLE_FIND_PACKAGE_Gloo=ON"
    subprocess.run([*wheel, without_gloo], check=True)
    wheels = sorted(folder.glob("*.whl"))
    (folder / _SUMS).write_text("".join(f"{_sum(path)}  {path.name}\n" for path in wheels))
    total = sum(path.stat().st_size for path in wheels)
    for path in wheels:
        print(f"{path.stat().st_size / 2**20:7.2f} MiB  {path.name}")
    print(f"{total / 2**20:7.2f} MiB  in all, of {MAX_NBYTES >> 20}; sums in {folder / _SUMS}")
    if nccl:
        _gather_nccl(folder.resolve().parent, python)
    return 0 if total < MAX_NBYTES else 1


def _download(folder: Path, python: str, *packages: str) -> None:
    platforms = [word for platform in _PLATFORMS for word in ("--platform", platform)]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
    ]
    subprocess.run(
        [*command, "--python-version", python, *platforms, "-d", str(folder), *packages], check=True
    )


def _gather_nccl(beside: Path, python: str) -> None:
    """Fetch libnccl's wheel and cut it in parts."""
    whole = beside / "nccl"
    whole.mkdir(exist_ok=True)
    _download(whole, python, _NCCL)
    (wheel,) = whole.glob("*.whl")
    sums, content = [], wheel.read_bytes()
    for number, start in enumerate(range(0, len(content), MAX_NBYTES)):
        part = beside / f"nccl-{number}"
        part.mkdir(exist_ok=True)
        (part / _PART).write_bytes(content[start : start + MAX_NBYTES])
        sums.append(_sum(part / _PART))
    # Every part knows all sums, so that a missing one is seen.
    for number in range(len(sums)):
        (beside / f"nccl-{number}" / _SUMS).write_text("\n".join(sums))
    print(
        f"{len(content) / 2**20:7.2f} MiB  {wheel.name}, in {len(sums)} parts: {beside / 'nccl-*'}"
    )


def install(wheels: Path, site: Path) -> str:
    """Unpack the wheels into a folder for the search path; returns what was done.

    Raises:
        ValueError: A wheel is not what was gathered, or one is missing.
        OSError: There are none.
    """
    sums = dict(line.split("  ", 1)[::-1] for line in (wheels / _SUMS).read_text().splitlines())
    wrong = [
        name
        for name, wanted in sums.items()
        if not (wheels / name).is_file() or _sum(wheels / name) != wanted
    ]
    total = 0
    for name in sorted(set(sums) - set(wrong)):
        total += (wheels / name).stat().st_size
        _unpack(wheels / name, site)
    if wrong:
        raise ValueError(
            f"missing, or with another sum than when they were gathered: {', '.join(wrong)}"
        )
    return f"{len(sums)} wheels, {total / 2**20:.1f} MiB, sums agree"


def _unpack(wheel: Path, site: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            first, _, rest = name.partition("/")
            kind, _, inside = rest.partition("/")
            if not first.endswith(".data"):
                archive.extract(name, site)
            elif kind in ("purelib", "platlib") and inside and not inside.endswith("/"):
                target = site / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))


def brought_nccl(beside: Path, folder: Path) -> Path | None:
    """Return the libnccl that was brought in parts, put together once.

    None where a part is missing or is wrong.
    """
    library = folder / "libnccl.so.2"
    if library.exists():
        return library
    first = beside / "nccl-0" / _SUMS
    if not first.exists():
        return None
    sums = first.read_text().split()
    parts = [beside / f"nccl-{number}" / _PART for number in range(len(sums))]
    if not all(
        part.exists() and _sum(part) == wanted for part, wanted in zip(parts, sums, strict=True)
    ):
        return None
    wheel = folder / "nccl.whl"
    with wheel.open("wb") as whole:
        for part in parts:
            whole.write(part.read_bytes())
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/libnccl.so.2")]
        library.write_bytes(archive.read(name))
    wheel.unlink()
    return library


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
