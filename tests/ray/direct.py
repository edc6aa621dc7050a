"""Direct transport for the tests: actors that give and take arrays, and arrays of all kinds to give.

The workers import this by its name, so what functions leave in ``kept`` is found by later ones of the same process.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import ray
from crew import PATIENCE_S

import colltensor.ray as cr
from colltensor.ray import link

TRANSPORT = {"torch": "COLLTENSOR", "jax": "COLLTENSOR_JAX", "numpy": "COLLTENSOR_NUMPY"}
FRAMEWORKS = [
    "numpy",
    pytest.param("torch", marks=pytest.mark.needs("torch")),
    pytest.param("jax", marks=pytest.mark.needs("jax")),
]

kept: dict[str, Any] = {}
"""What the functions that run in actors leave for later ones, in each process."""


def remote(kind: type, **options: Any) -> Any:
    return ray.remote(**{"num_cpus": 0, "enable_tensor_transport": True, **options})(kind).remote()


def give(actor: Any, framework: str, function: Callable[..., Any], *args: Any) -> Any:
    """Have an actor return something by the transport of a framework."""
    return actor.run.options(tensor_transport=TRANSPORT[framework]).remote(function, *args)


def result(actor: Any, function: Callable[..., Any], *args: Any) -> Any:
    return ray.get(actor.run.remote(function, *args), timeout=PATIENCE_S)


def array(framework: str, values: np.ndarray[Any, Any]) -> Any:
    if framework == "numpy":
        return cr.NumpyArray(values)
    if framework == "torch":
        return importlib.import_module("torch").tensor(values)
    return importlib.import_module("jax.numpy").array(values)


def counted(framework: str, count: int, offset: int = 0) -> Any:
    return array(framework, np.arange(offset, offset + count, dtype=np.float32))


def total(value: Any) -> float:
    return float(np.asarray(value).sum(dtype=np.float64))


def remember(value: Any) -> Any:
    kept["value"] = value
    return value


def is_alive() -> bool:
    gc.collect()
    return kept["watch"]() is not None


def numpy_transport() -> Any:
    return importlib.import_module("colltensor.ray.transport").NumpyTransport()


def describe_by_hand(obj_id: str) -> Any:
    grid = cr.NumpyArray(np.arange(4.0).reshape(2, 2))
    return numpy_transport().extract_tensor_transport_metadata(obj_id, [grid])


def receive_by_hand(description: Any, shape: tuple[int, ...]) -> Any:
    ((_, dtype),) = description.tensor_meta
    described = dataclasses.replace(description, tensor_meta=[(shape, dtype)])
    (received,) = numpy_transport().recv_multiple_tensors("by-hand", described, None)
    return received.array.tolist()


def samples(framework: str) -> dict[str, Any]:
    """Arrays of all kinds in nested containers, equal in every process."""
    make: dict[str, Callable[[], dict[str, Any]]] = {
        "numpy": numpy_samples,
        "torch": torch_samples,
        "jax": jax_samples,
    }
    found = make[framework]()
    return {
        "plain": 7,
        "arrays": found,
        "nested": [(found["big"], "text"), {"again": array(framework, np.ones(3))}],
    }


def numpy_samples() -> dict[str, Any]:
    import ml_dtypes

    grid = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    read_only = np.arange(4.0)
    read_only.flags.writeable = False
    arrays = {
        "scalar": np.array(2.5),
        "empty": np.empty((0, 3), np.float32),
        "strided": grid[:, ::2, ::-1],
        "transposed": grid.T,
        "fortran": np.asfortranarray(grid),
        "read_only": read_only,
        "bfloat16": np.arange(9).astype(ml_dtypes.bfloat16),
        "float8": np.arange(9).astype(ml_dtypes.float8_e4m3fn),
        "bool": np.array([True, False, True]),
        "complex": np.arange(3) + 1j,
        "big": np.arange(1 << 19, dtype=np.uint32),
    }
    return {name: cr.NumpyArray(value) for name, value in arrays.items()}


def torch_samples() -> dict[str, Any]:
    import torch

    grid = torch.arange(60, dtype=torch.int16).reshape(3, 4, 5)
    return {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "strided": grid[:, ::2, 1:4],
        "transposed": grid.permute(2, 0, 1),
        "expanded": torch.arange(3.0).expand(4, 3),
        "bfloat16": torch.arange(9, dtype=torch.bfloat16),
        "float8": torch.arange(9).to(torch.float8_e5m2),
        "bool": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 2j]),
        "big": torch.arange(1 << 21, dtype=torch.int32),
        "parameter": torch.nn.Parameter(torch.arange(4.0)),
    }


def jax_samples() -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    with jax.enable_x64(True):
        wide = jnp.arange(3, dtype=jnp.float64) / 3
    grid = jnp.arange(60, dtype=jnp.int16).reshape(3, 4, 5)
    return {
        "scalar": jnp.float32(2.5),
        "empty": jnp.zeros((0, 3)),
        "strided": grid[:, ::2, ::-1],
        "transposed": grid.T,
        "bfloat16": jnp.arange(9, dtype=jnp.bfloat16),
        "float8": jnp.arange(9).astype(jnp.float8_e5m2),
        "wide": wide,
        "bool": jnp.array([True, False]),
        "complex": jnp.array([1 + 2j]),
        "big": jnp.arange(1 << 19, dtype=jnp.int32),
    }


def check_samples(value: dict[str, Any], framework: str) -> int:
    """Compare with what this process makes itself; returns how many arrays there were."""
    expected = samples(framework)
    assert value["plain"] == 7
    assert list(value["arrays"]) == list(expected["arrays"])
    assert value["nested"][0][1] == "text"
    pairs = [(value["arrays"][name], expected["arrays"][name], name) for name in expected["arrays"]]
    pairs.append((value["nested"][0][0], expected["nested"][0][0], "nested"))
    pairs.append((value["nested"][1]["again"], expected["nested"][1]["again"], "again"))
    for found, wanted, name in pairs:
        assert type(found) is type(wanted), name
        if framework == "numpy":
            found, wanted = found.array, wanted.array
        assert found.dtype == wanted.dtype, name
        assert found.shape == wanted.shape, name
        if framework == "torch":
            torch = importlib.import_module("torch")
            found, wanted = (
                x.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
                for x in (found, wanted)
            )
        assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes(), name
    return len(pairs)


def backends_of_links() -> list[str]:
    return [kept_link._group.backend for links in link.LINKS._idle.values() for kept_link in links]
