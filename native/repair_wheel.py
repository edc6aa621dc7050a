"""Makes a wheel that carries Gloo: auditwheel's repair, and the licences of the libraries that it puts inside.

    python native/repair_wheel.py WHEEL FOLDER [--root ROOT]...

Writes the new wheel into FOLDER and prints its path. Needs auditwheel and patchelf. The libraries are this machine's,
and so are the texts of their licences: /usr/share/doc/<package>/copyright, below each ROOT first (a folder made by
native/fetch_gloo.py). A library that is not in LICENSES is refused, so that nothing is given on unread.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

LICENSES = {
    "libgloo": "BSD-3-Clause",
    "libhiredis": "BSD-3-Clause",
    "libibverbs": "(GPL-2.0-only OR Linux-OpenIB)",
    "libnl-3": "LGPL-2.1-only",
    "libnl-route-3": "LGPL-2.1-only",
}
"""SPDX's name for the licence of each library that a wheel may carry: Gloo, and what Debian's Gloo is linked to."""

LIBRARIES = "colltensor.libs/"
"""Where auditwheel puts them."""

_NAME = re.compile(r"(?P<library>[\w.-]+?)-[0-9a-f]{8}\.so\.(?P<version>[\d.]+)")


class RepairError(Exception):
    """The wheel cannot be given on; says why."""


def split_name(file: str) -> tuple[str, str]:
    """Return the library and the version of what auditwheel put inside: libnl-3-a9aeb098.so.200.26.0."""
    match = _NAME.fullmatch(file)
    if match is None or match["library"] not in LICENSES:
        raise RepairError(
            f"{file} would be inside, whose licence is not known: read it and add it to LICENSES"
        )
    return match["library"], match["version"]


def copyright_of(library: str, version: str, roots: Sequence[Path]) -> Path:
    """Return the copyright file of the Debian package that has a library.

    The package is called by the library and the front of its version that its soname has, with a dash where digits
    meet (Debian Policy, 8.1).
    """
    numbers = version.split(".")
    dash = "-" if library[-1].isdigit() else ""
    fronts = [".".join(numbers[:count]) for count in range(len(numbers), 0, -1)]
    names = [f"{library}{dash}{front}{suffix}" for front in fronts for suffix in ("", "t64")]
    for root in (*roots, Path("/")):
        for name in names:
            file = root / "usr/share/doc" / name / "copyright"
            if file.is_file():
                return file
    raise RepairError(
        f"no copyright file of {library} {version}: none of /usr/share/doc/{{{','.join(names)}}}"
    )


def with_licenses(metadata: str, files: Sequence[str], licenses: Sequence[str]) -> str:
    """Return the wheel's METADATA with further licences and their files."""
    head, blank, body = metadata.partition("\n\n")
    lines = []
    for line in head.split("\n"):
        expression = line.startswith("License-Expression: ")
        lines.append(" AND ".join([line, *licenses]) if expression else line)
    return "\n".join([*lines, *(f"License-File: {file}" for file in files)]) + blank + body


def _record_of(name: str, content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}"


def add_licenses(wheel: Path, roots: Sequence[Path]) -> None:
    """Put the licences of the libraries inside `wheel` into its dist-info, its METADATA and its RECORD."""
    with zipfile.ZipFile(wheel) as archive:
        items = archive.infolist()
        contents = {item.filename: archive.read(item) for item in items}
    [record] = [name for name in contents if name.endswith(".dist-info/RECORD")]
    info = record.removesuffix("RECORD")
    bundled = [
        split_name(Path(name).name)
        for name in contents
        if name.startswith(LIBRARIES) and name != LIBRARIES
    ]
    added = {
        f"{info}licenses/{library}.txt": copyright_of(library, version, roots).read_bytes()
        for library, version in bundled
    }
    metadata = f"{info}METADATA"
    names = [Path(name).name for name in added]
    licenses = sorted({LICENSES[library] for library, _ in bundled})
    changed = {
        metadata: with_licenses(contents[metadata].decode(), names, licenses).encode(),
        **added,
    }
    kept = [
        line for line in contents[record].decode().splitlines() if line.split(",")[0] not in changed
    ]
    lines = [*kept, *(_record_of(name, content) for name, content in changed.items())]
    changed[record] = "".join(f"{line}\n" for line in lines).encode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for item in items:
            archive.writestr(item, changed.pop(item.filename, contents[item.filename]))
        for name, content in changed.items():
            archive.writestr(name, content)


def repair(wheel: Path, folder: Path, roots: Sequence[Path]) -> Path:
    """Return the repaired wheel, in `folder`.

    Raises:
        RepairError: Gloo is not inside afterwards, or something is whose licence is not known.
        subprocess.CalledProcessError: auditwheel refuses the wheel.
    """
    with tempfile.TemporaryDirectory() as place:
        # libtvm_ffi.so comes from the package apache-tvm-ffi and is loaded before.
        command = [
            sys.executable,
            "-m",
            "auditwheel",
            "repair",
            "--exclude",
            "libtvm_ffi.so",
            "-w",
            place,
            str(wheel),
        ]
        subprocess.run(command, check=True, capture_output=True, text=True)
        [repaired] = Path(place).glob("*.whl")
        if "-py3-none-" not in repaired.name:
            raise RepairError(f"{repaired.name} is not for every Python")
        with zipfile.ZipFile(repaired) as archive:
            if not any(name.startswith(f"{LIBRARIES}libgloo-") for name in archive.namelist()):
                raise RepairError(
                    f"{wheel.name} has no Gloo: it was built where Gloo's headers were not found"
                )
        add_licenses(repaired, roots)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / repaired.name
        target.write_bytes(repaired.read_bytes())
    return target


def main() -> None:
    """Repair one wheel; on failure say why and exit with 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--root", type=Path, action="append", default=[])
    arguments = parser.parse_args()
    try:
        print(repair(arguments.wheel, arguments.folder, arguments.root))
    except RepairError as error:
        sys.exit(str(error))
    except subprocess.CalledProcessError as error:
        sys.exit(f"auditwheel: {error.stderr}")


if __name__ == "__main__":
    main()
