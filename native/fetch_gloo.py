"""Unpacks Debian's or Ubuntu's Gloo into a folder, for which nobody has to be root.

    python native/fetch_gloo.py FOLDER

Prints the folders of its libraries, for LD_LIBRARY_PATH; with them ``-DGloo_DIR=FOLDER/usr/share/cmake/Gloo`` builds
against it. A wheel made so is for native/repair_wheel.py, which puts the libraries inside: nothing else finds them. As
root, ``apt-get install libgloo-dev`` is simpler.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = "libgloo-dev"
LIMIT_S = 120.0
"""What one command may take; the system's lists of packages are most of it."""

UNPACKED = "complete"
"""A file that says that the folder was unpacked to its end."""

LEAVE_OUT = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")


def missing_packages(lists: list[str]) -> list[str]:
    """Return the package and those that it depends on, without what is installed of these."""
    options = [f"--no-{relation}" for relation in LEAVE_OUT]
    tree = _output("apt-cache", *lists, "depends", "--recurse", *options, PACKAGE)
    names = {line for line in tree.splitlines() if re.match(r"[a-z0-9]", line)}
    status = _output("dpkg-query", "-W", "-f", "${db:Status-Status} ${Package}\n")
    installed = {line.split()[1] for line in status.splitlines() if line.startswith("installed ")}
    return sorted((names - installed) | {PACKAGE})


def fetch(folder: Path) -> None:
    """Download the packages and unpack them into `folder`, which is emptied first.

    Raises:
        OSError: This is no Debian or Ubuntu, or its package is not laid out as expected.
        subprocess.SubprocessError: No package of that name, or no network.
    """
    shutil.rmtree(folder, ignore_errors=True)
    packages = folder / "packages"
    for place in (
        packages,
        folder / "lists" / "partial",
        folder / "cache" / "archives" / "partial",
    ):
        place.mkdir(parents=True)
    # Lists of our own, because the system's may be missing, as in most containers, and only root may bring them.
    lists = ["-o", f"Dir::State::lists={folder / 'lists'}", "-o", f"Dir::Cache={folder / 'cache'}"]
    _output("apt-get", *lists, "update", "-qq")
    _output("apt-get", *lists, "download", "-qq", *missing_packages(lists), within=packages)
    for package in packages.glob("*.deb"):
        _output("dpkg", "-x", str(package), str(folder))
    for unused in ("lists", "cache", "packages"):
        shutil.rmtree(folder / unused)
    # CMake's files name the library by where the package puts it.
    found = list((folder / "usr/share/cmake/Gloo").glob("GlooTargets-*.cmake"))
    if not found:
        raise FileNotFoundError(f"{PACKAGE} holds no usr/share/cmake/Gloo/GlooTargets-*.cmake")
    for targets in found:
        targets.write_text(targets.read_text().replace('"/usr/', f'"{folder}/usr/'))
    (folder / UNPACKED).touch()


def _output(*command: str, within: Path | None = None) -> str:
    return subprocess.run(
        command,
        cwd=within,
        check=True,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        stdin=subprocess.DEVNULL,
    ).stdout


def main() -> None:
    """Fetch, unless it was done before; on failure say why and exit with 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    try:
        if not (folder / UNPACKED).exists():
            fetch(folder)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or "").strip().splitlines()
        sys.exit(f"{PACKAGE} cannot be fetched: {said[-1] if said else error}")
    print(":".join(sorted({str(library.parent) for library in folder.glob("**/lib*.so.*")})))


if __name__ == "__main__":
    main()
