"""Objects: what of tensors survives being pickled for another rank."""

from __future__ import annotations

import importlib
import tempfile
import uuid
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
from pool import RankPool

import colltensor as col
from colltensor import CollectiveError, OptionError, replicas
from colltensor.objects import dumps, loads, pickle_allowed
from colltensor.replicas import Leaf, Plain
from colltensor.types import DTYPES


def copied(obj: Any) -> Any:
    return loads(dumps(obj), "broadcast_object", 1, 0, allow_pickle=True)


def plain(obj: Any) -> Any:
    return loads(dumps(obj), "broadcast_object", 1, 0, allow_pickle=False)


def test_plain_objects() -> None:
    given = {"a": [1, 2.5, None], "b": np.arange(3), "c": len, "d": CollectiveError("x")}
    found = copied(given)
    assert found["a"] == given["a"]
    assert found["b"].tolist() == [0, 1, 2]
    assert found["c"] is len
    assert str(found["d"]) == "x"


class Elsewhere:
    """Cannot be made where it arrives."""

    def __reduce__(self) -> Any:
        return importlib.import_module, ("no_such_package",)


def test_what_cannot_be_made_here_names_both_ranks() -> None:
    with pytest.raises(
        CollectiveError, match=r"broadcast_object \(rank 1\).* rank 0 .*no_such_package"
    ) as caught:
        copied([Elsewhere()])
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_plain_data_passes_without_pickles_that_call() -> None:
    data = {"a": [1, -(2**70), 2.5, 1j, None, True], b"b": ("x", {3, "y"}, frozenset())}
    assert plain(data) == data
    leaf = Leaf("['w']", (2, 3), DTYPES["float32"], "abc")
    assert plain((("average", True), leaf, Plain("", "3"))) == (
        ("average", True),
        leaf,
        Plain("", "3"),
    )


@pytest.mark.parametrize(
    ("obj", "name"),
    [
        ([len], "builtins.len"),
        (np.arange(3), "numpy"),
        ({"e": CollectiveError("x")}, "colltensor.errors.Collective"),
        (Path("x"), "pathlib"),
        (range(3), "builtins.range"),
        (Elsewhere(), "importlib.import_module"),
    ],
)
def test_objects_are_refused_by_name_where_none_are_wanted(obj: Any, name: str) -> None:
    with pytest.raises(CollectiveError, match=rf"broadcast_object \(rank 1\): .*rank 0 .*{name}"):
        plain(obj)


def test_no_pickle_changes_what_the_process_shares() -> None:
    """Opcodes may set the attributes of what was made before."""
    named = b"\x80\x04\x8c\x10colltensor.types\x8c\x06_named\x93"
    for payload in (
        named + b"\x8c\x07float32\x85R}\x8c\x08itemsizeK@sb.",
        named + b"}\x8c\x0c__defaults__)sb.",
    ):
        with pytest.raises(CollectiveError, match=r"broadcast_object \(rank 1\): .*rank 0\b"):
            loads(payload, "broadcast_object", 1, 0, allow_pickle=False)
    assert DTYPES["float32"].itemsize == 4


def test_the_variable_that_refuses_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, expected in (("0", False), ("1", True), ("", True), (" 0\n", False), ("off", False)):
        monkeypatch.setenv("COLLTENSOR_ALLOW_PICKLE", said)
        assert pickle_allowed(None) is expected
        assert pickle_allowed(True) is True
    monkeypatch.setenv("COLLTENSOR_ALLOW_PICKLE", "never")
    with pytest.raises(OptionError, match=r"COLLTENSOR_ALLOW_PICKLE: .*'never'"):
        pickle_allowed(None)


def refuse_on_one_rank(rank: int, size: int, name: str) -> list[Any]:
    """Rank 1 wants no objects: it refuses those of others and its own, and the group goes on."""
    group = col.init_collective_group(
        size,
        rank,
        group_name=name,
        init_method=f"file://{Path(tempfile.gettempdir()) / name}",
        timeout_s=20.0,
        allow_pickle=None if rank == 0 else False,
    )
    found: list[Any] = []
    for call in (
        lambda: group.broadcast_object(len, 0),
        lambda: group.broadcast_object(len, 1),
        lambda: group.allgather_object(Path("x")),
        lambda: group.allgather_object({"rank": rank}),
        lambda: group.split(0).broadcast_object(len, 0),
        lambda: replicas.compare_tree({"w": np.ones(3)}, group, "compare", "make them equal"),
        lambda: int(group.allreduce(np.ones(1))[0]),
    ):
        try:
            found.append(call())
        except CollectiveError as error:
            found.append(str(error))
    col.destroy_collective_group(name)
    return found


def test_a_rank_that_wants_no_objects(pool: RankPool) -> None:
    zero, one = pool.run(2, refuse_on_one_rank, f"plain-{uuid.uuid4().hex}")
    assert zero == [len, len, [Path("x")] * 2, [{"rank": 0}, {"rank": 1}], len, None, 2]
    refused = [words for words in one if isinstance(words, str)]
    assert [words.split(" does not ")[0].split("holds ")[1].split(",")[0] for words in refused] == [
        "builtins.len",
        "builtins.len",
        PosixPath.__module__ + ".PosixPath",
        "builtins.len",
    ]
    assert all("allow_pickle=False" in words for words in refused)
    assert one[3] == [{"rank": 0}, {"rank": 1}]
    assert one[5:] == [None, 2]


@pytest.mark.needs("jax")
@pytest.mark.parametrize("name", ["int64", "uint64", "float64", "complex128"])
def test_wide_arrays_of_jax_stay_wide(name: str) -> None:
    jax = importlib.import_module("jax")
    x64 = (
        jax.enable_x64
        if hasattr(jax, "enable_x64")
        else importlib.import_module("jax.experimental").enable_x64
    )
    with x64(True):
        array = jax.numpy.array(np.array([2**40 + 5, 7], name))
        weak = jax.jit(lambda value: value)(2.0)
        payload = dumps({"x": [array, array], "weak": weak})
    with x64(False):
        found = loads(payload, "broadcast_object", 1, 0, allow_pickle=True)
    assert found["x"][0] is found["x"][1]
    assert found["x"][0].dtype == name
    assert np.asarray(found["x"][0]).tolist() == [2**40 + 5, 7]
    assert (found["weak"].dtype, found["weak"].weak_type) == ("float64", True)


@pytest.mark.needs("jax")
def test_other_arrays_of_jax() -> None:
    jax = importlib.import_module("jax")
    assert copied(jax.numpy.ones(3, "bfloat16")).dtype == "bfloat16"
    assert (
        jax.random.key_data(copied(jax.random.key(7))) == jax.random.key_data(jax.random.key(7))
    ).all()


@pytest.mark.needs("torch")
def test_a_view_of_torch_brings_its_elements_alone() -> None:
    torch = importlib.import_module("torch")
    whole = torch.arange(1_000_000.0)
    view, column = whole[3:6], whole.reshape(1000, 1000)[:, 1]
    view.note = "kept"
    parameter = torch.nn.Parameter(whole[:2], requires_grad=True)
    given = [
        view,
        column,
        parameter,
        whole[:4].clone().requires_grad_(),
        torch.ones(1).expand(1000),
    ]
    payload = dumps(given)
    assert len(payload) < 10_000
    found = loads(payload, "broadcast_object", 1, 0, allow_pickle=True)
    for tensor, before in zip(found, given, strict=True):
        assert type(tensor) is type(before)
        assert torch.equal(tensor, before)
        assert tensor.requires_grad == before.requires_grad
    assert found[0].note == "kept"


@pytest.mark.needs("torch")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_other_tensors_of_torch() -> None:
    torch = importlib.import_module("torch")
    sparse = torch.eye(3).to_sparse()
    assert torch.equal(copied(sparse).to_dense(), torch.eye(3))
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    assert copied(nested).is_nested
    lazy = torch.complex(torch.arange(8.0), torch.ones(8))[1:3].conj()
    assert torch.equal(copied(lazy), lazy)
    layer = torch.nn.Linear(2, 2)
    assert torch.equal(copied(layer).weight, layer.weight)
