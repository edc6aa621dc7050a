"""The table of collectives, against native code, the public methods and the functions."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import colltensor as col
from colltensor.backends.base import Backend
from colltensor.group import Group
from colltensor.multigpu import MultiGpu
from colltensor.operations import COLLECTIVES, NATIVE_NAMES, POINT_TO_POINT
from colltensor.operations import NATIVE as NUMBERS

NATIVE = Path(__file__).parents[2] / "native"


def _spelt(name: str) -> str:
    """Return an enumerator of native code as the table spells it."""
    return name.removeprefix("k").lower()


def test_native_code_numbers_operations_as_the_table_does() -> None:
    text = (NATIVE / "include" / "colltensor" / "types.h").read_text()
    found = re.search(r"\bclass Operation [^{]*\{([^}]*)\}", text)
    assert found is not None
    names = [_spelt(name.strip()) for name in found[1].split(",") if name.strip()]
    assert names == list(NATIVE_NAMES)
    assert sorted(NUMBERS.values()) == list(range(len(NUMBERS)))


def test_native_code_signs_with_the_codes_of_the_table() -> None:
    text = (NATIVE / "src" / "fastpath.cpp").read_text()
    found = re.search(r"kCodes\[\] = \{([^}]*)\}", text)
    assert found is not None
    codes = [int(code) for code in found[1].split(",")]
    assert codes == [COLLECTIVES[name].code for name in NATIVE_NAMES]


def test_codes_are_used_once() -> None:
    codes = [row.code for row in COLLECTIVES.values()]
    assert len(set(codes)) == len(codes)
    assert all(0 < code < 256 for code in codes)  # a byte of the signature


def test_every_row_has_its_methods_and_their_arguments() -> None:
    for name, row in COLLECTIVES.items():
        owner = MultiGpu if name.endswith("_multigpu") else Group
        for method, (place, argument) in row.brings.items():
            parameters = list(inspect.signature(getattr(owner, method)).parameters)[1:]
            assert place < 0 or parameters[place] == argument, (name, method)
            if row.kind != POINT_TO_POINT:
                has_root = not {"dst_rank", "src_rank"}.isdisjoint(parameters)
                assert has_root == row.rooted, (name, method)


def test_every_row_that_moves_tensors_has_a_function_and_a_method_of_the_backends() -> None:
    for name, row in COLLECTIVES.items():
        if name.endswith("_multigpu") or not row.brings or name == "split":
            continue
        for method in row.brings:
            assert callable(getattr(col, method))
            assert name == "scan" or callable(getattr(Backend, method))  # composed of allgather
        assert (row.kind == POINT_TO_POINT) == (list(row.brings) != [name])
