"""What control groups grant, read from folders like the kernel's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from colltensor.backends.shm import cgroup


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that stands for /sys/fs/cgroup; /proc/self/cgroup is its file `memberships`."""
    monkeypatch.setattr(cgroup, "_MOUNTED", tmp_path)
    monkeypatch.setattr(cgroup, "_MEMBERSHIPS", tmp_path / "memberships")
    return tmp_path


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_nothing_said_is_no_limit(mounted: Path) -> None:
    assert cgroup.processors() == cgroup.spare_nbytes() == math.inf
    write(
        mounted, memberships="0::/a", memory__max="max", memory__current="5", cpu__max="max 100000"
    )
    assert cgroup.processors() == cgroup.spare_nbytes() == math.inf


def test_the_tightest_group_on_the_way_to_the_root_counts(mounted: Path) -> None:
    write(mounted, memberships="0::/a/b")
    stat = "anon 70\nfile 30\nactive_file 10\ninactive_file 5\nslab 9\nslab_reclaimable 2"
    write(
        mounted / "a" / "b",
        memory__max="1000",
        memory__current="100",
        memory__stat=stat,
        cpu__max="max 100000",
    )
    write(
        mounted / "a",
        memory__max="500",
        memory__current="200",
        memory__stat=stat,
        cpu__max="150000 100000",
    )
    write(
        mounted / "c",
        memory__max="1",
        memory__current="1",
        memory__stat=stat,
        cpu__max="1000 100000",
    )
    assert cgroup.spare_nbytes() == 500 - 200 + 17
    assert cgroup.processors() == 1.5


def test_a_container_sees_its_own_group_as_the_root(mounted: Path) -> None:
    """The path is that of the host, whose folders the container does not have."""
    write(mounted, memberships="0::/system.slice/docker-1234.scope", cpu__max="50000 100000")
    write(
        mounted,
        memory__max="100",
        memory__current="160",
        memory__stat="active_file 10\ninactive_file 5",
    )
    assert cgroup.spare_nbytes() == 0
    assert cgroup.processors() == 0.5


def test_version_1(mounted: Path) -> None:
    write(mounted, memberships="9:memory:/a\n3:cpuacct,cpu:/b\n1:name=systemd:/\n0::/")
    stat = "active_file 1\ninactive_file 2\ntotal_active_file 10\ntotal_inactive_file 20"
    files = {
        "memory__limit_in_bytes": "1000",
        "memory__usage_in_bytes": "900",
        "memory__stat": stat,
    }
    write(mounted / "memory" / "a", **files)
    write(mounted / "memory", **{**files, "memory__limit_in_bytes": "9223372036854771712"})
    write(mounted / "cpu" / "b", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert cgroup.spare_nbytes() == 100 + 30
    assert cgroup.processors() == math.inf
    write(mounted / "cpu", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    assert cgroup.processors() == 3
