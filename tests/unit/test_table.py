"""The process's table of groups, with groups of one rank."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import colltensor as col


@pytest.fixture(autouse=True)
def no_group_left() -> Iterator[None]:
    yield
    col.destroy_collective_group("here")
    assert not col.is_group_initialized("here")


def make() -> col.Group:
    return col.init_collective_group(1, 0, group_name="here")


def test_a_name_is_taken_until_the_group_is_destroyed() -> None:
    make()
    with pytest.raises(col.GroupError, match=r"group 'here' .*destroy_collective_group\(\)"):
        make()
    col.destroy_collective_group("here")
    assert make() is col.get_group_handle("here")


def test_destroying_the_group_itself_frees_its_name() -> None:
    first = make()
    first.destroy()
    assert not col.is_group_initialized("here")
    second = make()
    first.destroy()
    assert col.get_group_handle("here") is second


def test_a_group_that_was_split_off_is_destroyed_by_its_name() -> None:
    whole = make()
    part = whole.split(0)
    assert part is not None
    col.destroy_collective_group(part.name)
    with pytest.raises(col.GroupError):
        part.barrier()
    whole.barrier()


def test_a_destroyed_group_refuses_calls() -> None:
    group = make()
    group.destroy()
    with pytest.raises(col.GroupError, match=r"^barrier: group 'here' .*init_collective_group\(\)"):
        group.barrier()
    with pytest.raises(col.GroupError, match=r"^group 'here' .*init_collective_group\(\)"):
        col.barrier("here")
    assert (col.get_rank("here"), col.get_collective_group_size("here")) == (-1, -1)
