"""Objects: what of tensors survives being pickled for another rank."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from colltensor import CollectiveError
from colltensor.objects import dumps, loads


def copied(obj: Any) -> Any:
    return loads(dumps(obj), "broadcast_object", 1, 0)


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
    with pytest.raises(CollectiveError, match=r"broadcast_object \(rank 1\).* of rank 0 .*no_such_package") as caught:
        copied([Elsewhere()])
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.needs("jax")
@pytest.mark.parametrize("name", ["int64", "uint64", "float64", "complex128"])
def test_wide_arrays_of_jax_stay_wide(name: str) -> None:
    jax = importlib.import_module("jax")
    x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental").enable_x64
    with x64(True):
        array = jax.numpy.array(np.array([2**40 + 5, 7], name))
        weak = jax.jit(lambda value: value)(2.0)
        payload = dumps({"x": [array, array], "weak": weak})
    with x64(False):
        found = loads(payload, "broadcast_object", 1, 0)
    assert found["x"][0] is found["x"][1]
    assert found["x"][0].dtype == name
    assert np.asarray(found["x"][0]).tolist() == [2**40 + 5, 7]
    assert (found["weak"].dtype, found["weak"].weak_type) == ("float64", True)


@pytest.mark.needs("jax")
def test_other_arrays_of_jax() -> None:
    jax = importlib.import_module("jax")
    assert copied(jax.numpy.ones(3, "bfloat16")).dtype == "bfloat16"
    assert (jax.random.key_data(copied(jax.random.key(7))) == jax.random.key_data(jax.random.key(7))).all()


@pytest.mark.needs("torch")
def test_a_view_of_torch_brings_its_elements_alone() -> None:
    torch = importlib.import_module("torch")
    whole = torch.arange(1_000_000.0)
    view, column = whole[3:6], whole.reshape(1000, 1000)[:, 1]
    view.note = "kept"
    parameter = torch.nn.Parameter(whole[:2], requires_grad=True)
    given = [view, column, parameter, whole[:4].clone().requires_grad_(), torch.ones(1).expand(1000)]
    payload = dumps(given)
    assert len(payload) < 10_000
    found = loads(payload, "broadcast_object", 1, 0)
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
