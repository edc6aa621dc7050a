"""The package's variables of the environment: values that mean nothing are refused, unknown names are named once."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest

import colltensor as col
from colltensor import environment


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin without such variables, and without a memory of those that were named."""
    for name in [name for name in os.environ if name.startswith("COLLTENSOR_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(environment, "_named", set())


@pytest.mark.parametrize(
    ("value", "expected"),
    [("", True), ("1", True), ("On", True), ("0", False), ("off", False), (" FALSE ", False)],
)
def test_a_switch(monkeypatch: pytest.MonkeyPatch, value: str, expected: bool) -> None:
    monkeypatch.setenv("COLLTENSOR_READ_PEERS", value)
    assert environment.is_on(environment.READ_PEERS) is expected


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("READ_PEERS", "of", r"0 \(off\).*1 \(on\).*'of'"),
        ("HOST_ID", "x" * 9000, r"\b256 .*\b9000"),
    ],
)
def test_what_means_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(f"COLLTENSOR_{name}", value)
    with pytest.raises(col.OptionError, match=f"COLLTENSOR_{name}: .*{words}"):
        col.init_collective_group(1, 0, group_name="alone")
    assert not col.is_group_initialized("alone")


def test_an_unknown_variable_is_named_once(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    for name in (
        "COLLTENSOR_HOSTID",
        "COLLTENSOR_ZZZZ",
        "COLLTENSOR_TEST_ANYTHING",
        "COLLTENSOR_SECRET",
    ):
        monkeypatch.setenv(name, "1")
    for _ in range(2):
        col.init_collective_group(1, 0, group_name="alone").destroy()
    warnings = [
        record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
    ]
    assert len(warnings) == 2
    assert "COLLTENSOR_HOSTID " in warnings[0]
    assert "'COLLTENSOR_HOST_ID'" in warnings[0]
    assert "COLLTENSOR_ZZZZ " in warnings[1]
    assert "COLLTENSOR_HOST_ID" in warnings[1]
