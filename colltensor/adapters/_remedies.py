"""What to do with what is no tensor, by its type's name."""

from __future__ import annotations

from typing import Any, Final

_VARIABLE: Final = (
    "a variable is no tensor: pass its value, x = tf.convert_to_tensor(v), and "
    "v.assign(col.allreduce(x))"
)
_IN_A_FILE: Final = "it is in a file: read it, call with the array, and write that back: a = x[...]; ...; x[...] = a"
_PANDAS: Final = (
    "pandas shows its memory as read-only: pass a = x.to_numpy(copy=True), and write the result back, "
    "x[:] = a"
)
_INDEX: Final = (
    "it cannot be written: pass a = x.to_numpy(copy=True), and make pandas.Index(a) of the result"
)
_KEY: Final = (
    "a typed key is no array of numbers: pass jax.random.key_data(x), and make a key of the result with "
    "jax.random.wrap_key_data()"
)
_ITERATOR: Final = (
    "what it yields is gone once it is read: pass tensors = list(x), which are written in place"
)
_SET: Final = "a set has no order that all ranks share: pass a list, in one order on every rank"
_SHARES: Final = "pass numpy.asarray(x), which shares its memory"
_OBJECT: Final = "it holds no numbers: use broadcast_object or allgather_object"

_BY_NAME: Final = {
    "NoneType": "nothing was given: pass a tensor, or an empty list in a call without tensors",
    "str": _OBJECT,
    "bytes": _OBJECT,
    "function": "it holds no numbers: leave it out",
    "type": "it holds no numbers: leave it out",
    "set": _SET,
    "frozenset": _SET,
    "generator": _ITERATOR,
    "map": _ITERATOR,
    "filter": _ITERATOR,
    "zip": _ITERATOR,
    "list_iterator": _ITERATOR,
    "dict_values": "pass list(x), which are written in place",
    "dict_items": "pass dict(x), whose tensors are written in place",
    "bytearray": "pass numpy.frombuffer(x, numpy.uint8), which shares its memory",
    "memoryview": _SHARES,
    "array.array": _SHARES,
    "jax._src.core.Tracer": (
        "inside jax.jit, jax.grad or jax.vmap arrays have no memory: use colltensor.jax, as in "
        "colltensor.jax.allreduce(x), or call it outside the traced function"
    ),
    "jax._src.random.prng.PRNGKeyArray": _KEY,
    "jax._src.prng.PRNGKeyArray": _KEY,
    "jax.ShapeDtypeStruct": "it has a shape, but no memory: pass jax.numpy.zeros(x.shape, x.dtype)",
    "torch.nn.modules.container.ParameterList": "pass list(x), under torch.no_grad()",
    "torch.nn.modules.container.ParameterDict": "pass dict(x.items()), under torch.no_grad()",
    "torch.nn.modules.module.Module": "pass x.state_dict(), whose tensors are the module's own",
    "paddle.nn.layer.layers.Layer": "pass x.state_dict(), whose tensors are the layer's own",
    "torch.optim.optimizer.Optimizer": "pass x.state_dict(), and load what comes back with x.load_state_dict()",
    "tensordict.base.TensorDictBase": "pass dict(x.flatten_keys().items()), whose tensors are its own",
    "tensorflow.python.framework.ops.SymbolicTensor": (
        "inside tf.function tensors have no memory: call it outside, or from tf.py_function"
    ),
    "tensorflow.python.framework.composite_tensor.CompositeTensor": (
        "it is no array but several: pass a dense one, tf.convert_to_tensor(x), or what it is made of"
    ),
    "h5py._hl.dataset.Dataset": _IN_A_FILE,
    "zarr.core.array.Array": _IN_A_FILE,
    "zarr.core.Array": _IN_A_FILE,
    "h5py._hl.group.Group": "pass what its datasets hold, {name: x[name][...] for name in x}, and write that back",
    "xarray.core.dataarray.DataArray": "pass x.values, which is its memory where it holds a numpy array",
    "xarray.core.dataset.Dataset": (
        "pass {name: x[name].values for name in x}, which is its memory where it holds numpy arrays"
    ),
    "dask.array.core.Array": (
        "its numbers are not computed yet: pass a = x.compute(), and go on with dask.array.from_array(a)"
    ),
    "pandas.Series": _PANDAS,
    "pandas.DataFrame": _PANDAS,
    "pandas.core.series.Series": _PANDAS,
    "pandas.core.frame.DataFrame": _PANDAS,
    "pandas.Index": _INDEX,
    "pandas.core.indexes.base.Index": _INDEX,
}
"""By the full name of a class or a base of it; Python's own without their module."""


def name_of(kind: type) -> str:
    """Return the full name of a type; without its module where that is Python's own."""
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}"


def remedy_for(tensor: Any) -> str:
    """Return what to do with an object that no adapter takes, for the end of a message."""
    kind = type(tensor)
    names = [name_of(base) for base in kind.__mro__]

    for name in names:
        if name in _BY_NAME:
            return _BY_NAME[name]
        if name.endswith("variables.Variable"):  # TensorFlow's and Keras's
            return _VARIABLE

    # No name is known: its methods say something.
    if hasattr(kind, "todense"):  # SciPy's, JAX's, CuPy's and pydata's
        return (
            f"it is sparse, several arrays of any length: pass a dense one, x.{_dense(kind)}(), or x.data alone where "
            "all ranks have the same indices"
        )

    if hasattr(kind, "__dlpack__") and not hasattr(kind, "__dlpack_device__"):
        return "it has __dlpack__ but not __dlpack_device__, which the protocol asks for: register_adapter() for it"
    if hasattr(kind, "__dlpack__"):
        return (
            "subclasses are refused because their memory may mean something else: pass the plain tensor, or register "
            "the type with colltensor.register_adapter()"
        )
    if hasattr(kind, "__array__") or hasattr(kind, "__array_interface__"):
        return "pass a = numpy.array(x), a copy, and use what the call returns; or register_adapter() for its type"
    return "pass the arrays that it holds, in a list or dict, or register_adapter() for its type"


def _dense(kind: type) -> str:
    return "toarray" if hasattr(kind, "toarray") else "todense"  # SciPy's todense makes a matrix
