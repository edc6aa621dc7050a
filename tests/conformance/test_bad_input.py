"""Malformed calls: each gets the right error, soon, with words that help; nothing is changed and the group goes on.

The table has one row a call. Every rank makes the call and must get the row's error; then all ranks
do an allreduce, which must be right.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporters import ReadOnly
from oracle import numpy_dtype
from pool import RankPool
from samples import as_numpy
from worlds import Transport, World

import colltensor as col
from colltensor.gradients import Synchronizer, sync_gradients

SIZE = 3
SOON_S = 10.0


@dataclass
class Site:
    """Where a malformed call is made; remembers the arrays that it must not change."""

    group: Any
    url: str
    held: list[tuple[Any, Any]] = field(default_factory=list)

    @property
    def rank(self) -> int:
        """This process's rank."""
        return int(self.group.rank)

    def hold(self, tensor: Any) -> Any:
        """Remember a tensor's values."""
        self.held.append((tensor, np.array(tensor, copy=True)))
        return tensor

    def array(self, count: int = 4, dtype: str = "float32") -> Any:
        """Return an array that must not change."""
        return self.hold((np.arange(count) + self.rank).astype(numpy_dtype(dtype)))

    def arrays(self, number: int = SIZE, count: int = 4) -> list[Any]:
        """Return several such arrays."""
        return [self.array(count) for _ in range(number)]

    def init(self, *args: Any, **options: Any) -> Any:
        """Call init_collective_group with all that is well, unless ``options`` say otherwise."""
        return col.init_collective_group(
            *args, **{"init_method": self.url, "timeout_s": 5, **options}
        )

    def check(self) -> None:
        """Check that no remembered array changed."""
        for tensor, before in self.held:
            assert np.array(tensor, copy=True).tobytes() == before.tobytes(), (
                "the call changed a tensor"
            )


Call = Callable[[Site], Any]


@dataclass(frozen=True)
class Row:
    """One malformed call.

    Attributes:
        error: The exact class of the error.
        words: Regular expressions, all of which the message must match.
        call: Makes the call.
        needs: The framework it takes.
        ranks: The ranks that the error names in its attribute, or None.
    """

    error: type[Exception]
    words: tuple[str, ...]
    call: Call
    needs: str = "numpy"
    ranks: tuple[int, ...] | None = None


def _torch() -> Any:
    return importlib.import_module("torch")


def _jnp() -> Any:
    return importlib.import_module("jax.numpy")


def _marked(site: Site) -> Any:
    return ReadOnly(site.array())


def _read_only(site: Site, count: int = 4) -> Any:
    array = site.array(count)
    array.flags.writeable = False
    return array


def _fake_tensor() -> Any:
    fake = importlib.import_module("torch._subclasses.fake_tensor")
    with fake.FakeTensorMode():
        return _torch().ones(3)


def _torch_subclass() -> Any:
    class Tagged(_torch().Tensor):  # type: ignore[misc]
        pass

    return _torch().ones(3).as_subclass(Tagged)


def _freed() -> Any:
    tensor = _torch().ones(4)
    tensor.untyped_storage().resize_(0)
    return tensor


def _view_of_freed() -> Any:
    whole = _torch().ones(20)
    part = whole[10:]
    whole.untyped_storage().resize_(0)
    return part


def _quantized() -> Any:
    return _torch().quantize_per_tensor(_torch().ones(3), 0.1, 0, _torch().qint8)


def _sparse(rank: int = 0, nse: int = 2) -> Any:
    sparse = importlib.import_module("jax.experimental.sparse")
    dense = np.zeros((2, 2), np.float32)
    dense[0, rank % 2] = dense[1, 0] = rank + 1.0
    return sparse.BCOO.fromdense(_jnp().array(dense), nse=nse)


def _with_flags(array: Any) -> Any:
    """Return the same sparse array without the promise that its indices are sorted."""
    return type(array)((array.data, array.indices), shape=array.shape, indices_sorted=False)


def _packed() -> Any:
    return _torch().nn.utils.rnn.pack_sequence([_torch().ones(2), _torch().ones(1)])


def _deleted(site: Site) -> Any:
    array = _jnp().ones(3)
    array.delete()
    return array


def _cuda_array() -> Any:
    """A CuPy array whose memory is the host's: enough for its adapter, and no GPU is needed."""
    cupy = importlib.import_module("cupy")
    host = np.ones(4, np.float32)
    memory = cupy.cuda.UnownedMemory(host.ctypes.data, host.nbytes, host, 0)
    return cupy.ndarray((4,), cupy.float32, cupy.cuda.MemoryPointer(memory, 0))


class _OnMetal:
    """An array on a device that no backend reaches."""

    def __dlpack__(self, **options: Any) -> Any:
        raise AssertionError("asked for memory that cannot be reached")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 8, 0


class _Closed(_OnMetal):
    """An array on the host that does not give its memory away."""

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("not today")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class _Broken(_Closed):
    """An array whose export is no capsule."""

    def __dlpack__(self, **options: Any) -> Any:
        return 42


class _HalfProtocol:
    """Has one half of the DLPack protocol only."""

    def __dlpack__(self, **options: Any) -> Any:
        raise AssertionError("asked for memory on an unknown device")


def _in_child(site: Site) -> None:
    """Call in a forked child and raise what it got here."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            site.group.allreduce(site.array())
        except col.GroupError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as lines:
        message = lines.read()
    os.waitpid(child, 0)
    raise col.GroupError(message)


def _destroyed(site: Site) -> Any:
    part = site.group.split(0)
    part.destroy()
    return part


def _by_name_after_destroy(site: Site) -> None:
    site.init(1, 0, "loopback", "short-lived", init_method=None)
    col.destroy_collective_group("short-lived")
    col.allreduce(site.array(), "short-lived")


def _transfer(site: Site, count: int, dtype: str) -> Any:
    """Rank 0 sends 4 float32; rank 1 expects something else; rank 2 is not concerned."""
    if site.rank == 0:
        return site.group.send(site.array(), 1)
    if site.rank == 1:
        return site.group.recv(site.array(count, dtype), 0)
    raise col.MismatchError(
        "transfer #1 from rank 0 to rank 1: rank 2 is not concerned float32[4] float64[4] 5", (1,)
    )


def _shift(site: Site) -> Any:
    """Around the ring, rank 1 with fewer elements; from rank 2 to rank 0 all is well, and that transfer is made."""
    count = 3 if site.rank == 1 else 4
    target = site.array(count) if site.rank else np.zeros(4, np.float32)
    try:
        return site.group.sendrecv(
            site.array(count), (site.rank + 1) % SIZE, target, (site.rank - 1) % SIZE
        )
    finally:
        assert site.rank or target.tolist() == [2, 3, 4, 5]


def _choose(site: Site, odd: Call, others: Call, culprit: int = 1) -> Any:
    return (odd if site.rank == culprit else others)(site)


R = col.ReduceOp

_TENSORS = {
    "a string": Row(
        col.UnsupportedTensorError,
        ("allreduce", "tensor", r"\bstr\b", "broadcast_object"),
        lambda s: s.group.allreduce("abc"),
    ),
    "a large Python int": Row(
        col.UnsupportedDTypeError,
        ("allreduce", "tensor", "int64", "broadcast_object"),
        lambda s: s.group.allreduce(1 << 64),
    ),
    "a numpy scalar without a type of ours": Row(
        col.UnsupportedTensorError,
        ("reduce", "numpy.longdouble"),
        lambda s: s.group.reduce(np.longdouble(1)),
    ),
    "a generator": Row(
        col.UnsupportedTensorError,
        ("allreduce", "generator"),
        lambda s: s.group.allreduce(x for x in [s.array()]),
    ),
    "a set": Row(
        col.UnsupportedTensorError, ("broadcast", r"\bset\b"), lambda s: s.group.broadcast({1})
    ),
    "a class": Row(
        col.UnsupportedTensorError,
        ("allreduce", r"\btype\b"),
        lambda s: s.group.allreduce(np.ndarray),
    ),
    "a bad leaf": Row(
        col.UnsupportedTensorError,
        ("allreduce", r"leaf \['a'\]\[1\]", r"\bstr\b"),
        lambda s: s.group.allreduce({"a": [s.array(), "b"]}),
    ),
    "object dtype": Row(
        col.UnsupportedDTypeError,
        ("allreduce", "object", "broadcast_object"),
        lambda s: s.group.allreduce(np.array([1, None], object)),
    ),
    "structured dtype": Row(
        col.UnsupportedDTypeError,
        ("allgather", "structured", "field"),
        lambda s: s.group.allgather(s.arrays(), np.zeros(3, [("a", "f4"), ("b", "i4")])),
    ),
    "a field that cuts through items": Row(
        col.UnsupportedTensorError,
        ("broadcast", "strides", r"x\.copy\(\)"),
        lambda s: s.group.broadcast(np.zeros(4, [("a", "i1"), ("b", "f4")])["b"]),
    ),
    "datetime dtype": Row(
        col.UnsupportedDTypeError,
        ("send", "datetime64"),
        lambda s: s.group.send(np.zeros(3, "M8[D]"), (s.rank + 1) % SIZE),
    ),
    "text dtype": Row(
        col.UnsupportedDTypeError,
        ("broadcast", "<U1"),
        lambda s: s.group.broadcast(np.array(["a"])),
    ),
    "another byte order": Row(
        col.UnsupportedDTypeError,
        ("allreduce", "astype"),
        lambda s: s.group.allreduce(np.ones(3, ">f4")),
    ),
    "long double": Row(
        col.UnsupportedDTypeError,
        ("allreduce", "longdouble|float128"),
        lambda s: s.group.allreduce(np.ones(3, np.longdouble)),
    ),
    "a masked array": Row(
        col.UnsupportedTensorError,
        ("allreduce", "MaskedArray", "register_adapter"),
        lambda s: s.group.allreduce(np.ma.array([1.0, 2.0], mask=[0, 1])),
    ),
    "a matrix": Row(
        col.UnsupportedTensorError,
        ("allreduce", "matrix"),
        lambda s: s.group.allreduce(np.asmatrix([[1.0]])),
    ),
    "a read-only array": Row(
        col.ReadOnlyError,
        ("allreduce", "tensor", r"x\.copy\(\)"),
        lambda s: s.group.allreduce(_read_only(s)),
    ),
    "a read-only output": Row(
        col.ReadOnlyError,
        ("allgather", r"tensor_list\[2\]"),
        lambda s: s.group.allgather([*s.arrays(2), _read_only(s)], s.array()),
    ),
    "a read-only reducescatter target": Row(
        col.ReadOnlyError,
        ("reducescatter", r"x\.copy\(\)"),
        lambda s: s.group.reducescatter(_read_only(s), s.arrays()),
    ),
    "a read-only leaf": Row(
        col.ReadOnlyError,
        ("allreduce", r"leaf \['b'\]"),
        lambda s: s.group.allreduce({"a": s.array(), "b": _read_only(s)}),
    ),
    **{
        f"marked read-only: {name}": Row(
            col.ReadOnlyError, (name, r"ReadOnly\b", r"numpy\.array\(x\)"), call
        )
        for name, call in {
            "allreduce": lambda s: s.group.allreduce(_marked(s)),
            "reduce": lambda s: s.group.reduce(_marked(s), s.rank),
            "broadcast": lambda s: s.group.broadcast(_marked(s), (s.rank + 1) % SIZE),
            "allgather": lambda s: s.group.allgather([*s.arrays(2), _marked(s)], s.array()),
            "gather": lambda s: s.group.gather([*s.arrays(2), _marked(s)], s.array(), s.rank),
            "scatter": lambda s: s.group.scatter(_marked(s), s.arrays(), s.rank),
            "reducescatter": lambda s: s.group.reducescatter(_marked(s), s.arrays()),
            "alltoall": lambda s: s.group.alltoall([_marked(s), *s.arrays(2)], s.arrays()),
            "recv": lambda s: s.group.recv(_marked(s), (s.rank + 1) % SIZE),
            "sendrecv": lambda s: s.group.sendrecv(
                s.array(), (s.rank + 1) % SIZE, _marked(s), (s.rank - 1) % SIZE
            ),
        }.items()
    },
    "a leaf marked read-only": Row(
        col.ReadOnlyError,
        ("allreduce", r"leaf \['b'\]"),
        lambda s: s.group.allreduce({"a": s.array(), "b": _marked(s)}),
    ),
    "a gradient marked read-only": Row(
        col.ReadOnlyError,
        (r"leaf \['a'\]",),
        lambda s: Synchronizer({"a": np.ones(4, np.float32)}, group=s.group).sync(
            {"a": _marked(s)}
        ),
    ),
    "a device out of reach": Row(
        col.DeviceError,
        ("allreduce", r"\b8\b", r"\bcpu\b", r"\bcuda\b"),
        lambda s: s.group.allreduce(_OnMetal()),
    ),
    "an array that exports nothing": Row(
        col.ReadOnlyError,
        ("allreduce", "_Closed", "not today", "copy"),
        lambda s: s.group.allreduce(_Closed()),
    ),
    "an export that is none": Row(
        col.UnsupportedTensorError,
        ("allreduce", "_Broken", "DLPack"),
        lambda s: s.group.allreduce(_Broken()),
    ),
    "half of the protocol": Row(
        col.UnsupportedTensorError,
        ("allreduce", "__dlpack_device__", "register_adapter"),
        lambda s: s.group.allreduce(_HalfProtocol()),
    ),
}

_TORCH = {
    "torch sparse": Row(
        col.UnsupportedTensorError,
        ("allreduce", "sparse_coo", r"to_dense\(\)"),
        lambda s: s.group.allreduce(_torch().eye(3).to_sparse()),
        "torch",
    ),
    "torch sparse rows": Row(
        col.UnsupportedTensorError,
        ("allreduce", "sparse_csr", r"to_dense\(\)"),
        lambda s: s.group.allreduce(_torch().eye(3).to_sparse_csr()),
        "torch",
    ),
    "torch packed sequence": Row(
        col.UnsupportedTensorError,
        ("allreduce", "PackedSequence", r"pass x\.data"),
        lambda s: s.group.allreduce({"a": _packed()}),
        "torch",
    ),
    "torch values and indices": Row(
        col.UnsupportedTensorError,
        ("reduce", "return_types.topk", r"pass x\.values"),
        lambda s: s.group.reduce([_torch().topk(_torch().ones(3), 2)]),
        "torch",
    ),
    "torch meta": Row(
        col.DeviceError,
        ("allreduce", r"\bmeta\b", r"\bcpu\b"),
        lambda s: s.group.allreduce(_torch().ones(3, device="meta")),
        "torch",
    ),
    "torch fake": Row(
        col.UnsupportedTensorError,
        ("allreduce", "FakeTensor"),
        lambda s: s.group.allreduce(_fake_tensor()),
        "torch",
    ),
    "torch freed, a view": Row(
        col.UnsupportedTensorError,
        ("allreduce", r"resize_\(0\)"),
        lambda s: s.group.allreduce(_view_of_freed()),
        "torch",
    ),
    "torch freed, a view in a tree": Row(
        col.UnsupportedTensorError,
        ("allreduce", r"resize_\(0\)"),
        lambda s: s.group.allreduce({"a": _view_of_freed()}),
        "torch",
    ),
    "torch freed": Row(
        col.UnsupportedTensorError,
        ("allreduce", r"resize_\(0\)"),
        lambda s: s.group.allreduce(_freed()),
        "torch",
    ),
    "torch zeros without memory": Row(
        col.UnsupportedTensorError,
        ("broadcast", r"clone\(\)"),
        lambda s: s.group.broadcast(_torch()._efficientzerotensor((3,))),
        "torch",
    ),
    "torch nested": Row(
        col.UnsupportedTensorError,
        ("allreduce", "tensor"),
        lambda s: s.group.allreduce(
            _torch().nested.nested_tensor([_torch().ones(2), _torch().ones(3)])
        ),
        "torch",
    ),
    "torch jagged": Row(
        col.UnsupportedTensorError,
        ("allreduce", "NestedTensor"),
        lambda s: s.group.allreduce(
            _torch().nested.nested_tensor(
                [_torch().ones(2), _torch().ones(3)], layout=_torch().jagged
            )
        ),
        "torch",
    ),
    "torch lazy conjugate": Row(
        col.UnsupportedTensorError,
        ("allreduce", "resolve_conj"),
        lambda s: s.group.allreduce(_torch().ones(3).to(_torch().complex64).conj()),
        "torch",
    ),
    "torch lazy negation": Row(
        col.UnsupportedTensorError,
        ("broadcast", "resolve_neg"),
        lambda s: s.group.broadcast(_torch().ones(3, dtype=_torch().complex64).conj().imag),
        "torch",
    ),
    "torch expanded": Row(
        col.AliasError,
        ("allreduce", "tensor", "copy"),
        lambda s: s.group.allreduce(_torch().ones(1).expand(4)),
        "torch",
    ),
    "torch quantized": Row(
        col.UnsupportedDTypeError,
        ("allreduce", "qint8"),
        lambda s: s.group.allreduce(_quantized()),
        "torch",
    ),
    "torch subclass": Row(
        col.UnsupportedTensorError,
        ("allreduce", "Tagged", "register_adapter"),
        lambda s: s.group.allreduce(_torch_subclass()),
        "torch",
    ),
    "torch requires grad": Row(
        col.ReadOnlyError,
        ("allreduce", r"torch\.no_grad\(\)", r"detach\(\)"),
        lambda s: s.group.allreduce(_torch().ones(3, requires_grad=True)),
        "torch",
    ),
    "torch in vmap": Row(
        col.UnsupportedTensorError,
        ("allreduce", "tensor"),
        lambda s: _torch().vmap(lambda x: s.group.allreduce(x))(_torch().ones(2, 3)),
        "torch",
    ),
}

_JAX = {
    "a deleted JAX array": Row(
        col.UnsupportedTensorError,
        ("allreduce", "tensor", "deleted"),
        lambda s: s.group.allreduce(_deleted(s)),
        "jax",
    ),
    "a JAX array in jit": Row(
        col.UnsupportedTensorError,
        ("allreduce", "Tracer", r"colltensor\.jax\.allreduce"),
        lambda s: importlib.import_module("jax").jit(lambda x: s.group.allreduce(x))(
            _jnp().ones(3)
        ),
        "jax",
    ),
    "a JAX array in grad": Row(
        col.UnsupportedTensorError,
        ("allreduce", "Tracer", "jax.grad"),
        lambda s: importlib.import_module("jax").grad(lambda x: s.group.allreduce(x).sum())(
            _jnp().ones(3)
        ),
        "jax",
    ),
    "a JAX random key": Row(
        col.UnsupportedTensorError,
        ("broadcast", "PRNGKeyArray"),
        lambda s: s.group.broadcast(importlib.import_module("jax").random.key(0)),
        "jax",
    ),
    **{
        f"a sparse JAX array: {name}": Row(
            col.UnsupportedTensorError, ("BCOO", r"todense\(\)"), call, "jax"
        )
        for name, call in {
            "allreduce": lambda s: s.group.allreduce(_sparse(s.rank)),
            "reduce in a tree": lambda s: s.group.reduce({"a": s.array(), "b": [_sparse(s.rank)]}),
            "donated": lambda s: s.group.allreduce([_sparse(s.rank)], donate=True),
            "in a node of JAX": lambda s: s.group.allreduce(
                importlib.import_module("jax").tree_util.Partial(max, _sparse(s.rank))
            ),
            "sync_gradients": lambda s: sync_gradients({"w": _sparse(s.rank)}, group=s.group),
            "Synchronizer": lambda s: Synchronizer({"w": _sparse(s.rank)}, group=s.group),
            "sync": lambda s: Synchronizer(
                {"w": _jnp().ones((2, 2), "float32")}, group=s.group
            ).sync({"w": _sparse(s.rank)}),
        }.items()
    },
    "sparse JAX arrays of other rows": Row(
        col.UnsupportedTensorError,
        ("BCSR", r"todense\(\)"),
        lambda s: s.group.allreduce(
            importlib.import_module("jax.experimental.sparse").BCSR.fromdense(_jnp().eye(2))
        ),
        "jax",
    ),
    "sparse JAX arrays as blocks": Row(
        col.UnsupportedTensorError,
        ("reducescatter", "BCOO", r"todense\(\)"),
        lambda s: s.group.reducescatter(s.array(), [_sparse(s.rank)] * SIZE),
        "jax",
    ),
    "a sparse SciPy array": Row(
        col.UnsupportedTensorError,
        ("allreduce", r"toarray\(\)"),
        lambda s: s.group.allreduce(importlib.import_module("scipy.sparse").eye(3)),
        "jax",
    ),
    "sparse JAX arrays of other lengths": Row(
        col.MismatchError,
        ("broadcast", "2", "3"),
        lambda s: s.group.broadcast(_sparse(0, 3 if s.rank == 1 else 2)),
        "jax",
        ranks=(1,),
    ),
    "sparse JAX arrays of other kinds": Row(
        col.MismatchError,
        ("broadcast",),
        lambda s: s.group.broadcast(
            [_sparse().sum_duplicates() if s.rank != 1 else _with_flags(_sparse())]
        ),
        "jax",
        ranks=(1,),
    ),
    "a JAX shape": Row(
        col.UnsupportedTensorError,
        ("broadcast", "ShapeDtypeStruct"),
        lambda s: s.group.broadcast(
            importlib.import_module("jax").ShapeDtypeStruct((3,), "float32")
        ),
        "jax",
    ),
    "JAX int4": Row(
        col.UnsupportedDTypeError,
        ("broadcast", "int4"),
        lambda s: s.group.broadcast(_jnp().ones(4, _jnp().int4)),
        "jax",
    ),
    "CUDA memory on gloo": Row(
        col.DeviceError,
        ("allreduce", "cuda", "gloo", "nccl"),
        lambda s: s.group.allreduce(_cuda_array()),
        "cupy",
    ),
}

_ALIASES = {
    "a broadcast numpy array": Row(
        col.AliasError,
        ("recv", "tensor", "copy"),
        lambda s: s.group.recv(
            np.lib.stride_tricks.as_strided(s.array(), (3, 2), (4, 4)), (s.rank + 1) % SIZE
        ),
    ),
    "one array as two leaves": Row(
        col.AliasError,
        ("allreduce", r"leaf \['a'\]", r"leaf \['b'\]"),
        lambda s: s.group.allreduce(dict.fromkeys("ab", s.array())),
    ),
    "leaves that overlap": Row(
        col.AliasError,
        (r"leaf \[0\]", r"leaf \[1\]"),
        lambda s: (lambda x: s.group.allreduce([x[:3], x[2:]]))(s.array(5)),
    ),
    "one array as all outputs": Row(
        col.AliasError,
        ("allgather", r"tensor_list\[0\]", r"tensor_list\[[12]\]"),
        lambda s: s.group.allgather([s.array()] * SIZE, s.array()),
    ),
    "outputs that overlap": Row(
        col.AliasError,
        ("alltoall", r"output_list\[0\]", r"output_list\[1\]"),
        lambda s: (lambda x: s.group.alltoall([x[:4], x[3:7], s.array()], s.arrays()))(s.array(7)),
    ),
    "an output that is an input": Row(
        col.AliasError,
        ("alltoall", r"output_list\[1\]", r"input_list\[2\]"),
        lambda s: (lambda x: s.group.alltoall([s.array(), x, s.array()], [*s.arrays(2), x]))(
            s.array()
        ),
    ),
    "the tensor in another rank's entry": Row(
        col.AliasError,
        ("allgather", r"tensor_list\[\d\]", r"tensor\b"),
        lambda s: (
            lambda x: s.group.allgather(
                [x if entry == (s.rank + 1) % SIZE else s.array() for entry in range(SIZE)], x
            )
        )(s.array()),
    ),
    "a target that is a source of another rank": Row(
        col.AliasError,
        ("reducescatter", "tensor", r"tensor_list\[\d\]"),
        lambda s: (
            lambda x: s.group.reducescatter(
                x, [x if entry == (s.rank + 1) % SIZE else s.array() for entry in range(SIZE)]
            )
        )(s.array()),
    ),
    "receiving into part of what is sent": Row(
        col.AliasError,
        ("sendrecv", "recv_tensor", "send_tensor"),
        lambda s: (
            lambda x: s.group.sendrecv(x[1:], (s.rank + 1) % SIZE, x[:-1], (s.rank - 1) % SIZE)
        )(s.array(5)),
    ),
    "numpy and torch over one memory": Row(
        col.AliasError,
        ("allreduce", r"leaf \[0\]", r"leaf \[1\]"),
        lambda s: (lambda x: s.group.allreduce([x, _torch().from_numpy(x)]))(s.array()),
        "torch",
    ),
}

_LISTS = {
    "an empty list": Row(
        col.ShapeError,
        ("allgather", "tensor_list", rf"\b{SIZE}\b", r"\b0\b"),
        lambda s: s.group.allgather([], s.array()),
    ),
    "a list too short": Row(
        col.ShapeError,
        ("reducescatter", "tensor_list", r"\b2\b"),
        lambda s: s.group.reducescatter(s.array(), s.arrays(2)),
    ),
    "a list too long": Row(
        col.ShapeError,
        ("alltoall", "input_list", r"\b4\b"),
        lambda s: s.group.alltoall(s.arrays(), s.arrays(4)),
    ),
    "no list at the root": Row(
        col.ShapeError,
        ("scatter", "tensor_list", "NoneType"),
        lambda s: s.group.scatter(s.array(), None, s.rank),
    ),
    "an array that cannot be divided": Row(
        col.ShapeError,
        ("gather", "tensor_list", rf"\b{SIZE}\b", r"\b10\b"),
        lambda s: s.group.gather(np.ones((2, 5), np.float32), s.array(), s.rank),
    ),
    "an array of other blocks": Row(
        col.ShapeError,
        ("reducescatter", "tensor_list", r"\b4\b", r"\b5\b"),
        lambda s: s.group.reducescatter(s.array(), np.ones((SIZE, 5), np.float32)),
    ),
    "an array of another dtype": Row(
        col.ShapeError,
        ("alltoall", "output_list", "float32", "int32"),
        lambda s: s.group.alltoall(np.ones((SIZE, 4), np.int32), np.ones((SIZE, 4), np.float32)),
    ),
    "a strided array that cannot be divided": Row(
        col.ShapeError,
        ("allgather", "tensor_list", "contiguous"),
        lambda s: s.group.allgather(np.ones((3, 4), np.float32).T, s.array()),
    ),
    "an array in a list": Row(
        col.ShapeError,
        ("allgather", rf"\b{SIZE}\b", r"\b1\b"),
        lambda s: s.group.allgather([np.ones((SIZE, 4), np.float32)], s.array()),
    ),
    "a read-only array for a list": Row(
        col.ReadOnlyError,
        ("alltoall", "output_list", r"x\.copy\(\)"),
        lambda s: s.group.alltoall(_read_only(s, SIZE * 4), np.ones((SIZE, 4), np.float32)),
    ),
    "another block of the array": Row(
        col.AliasError,
        ("allgather", r"tensor_list\[\d\]", r"tensor\b"),
        lambda s: (lambda x: s.group.allgather(x, x[(s.rank + 1) % SIZE]))(
            np.ones((SIZE, 4), np.float32)
        ),
    ),
    "an array into itself": Row(
        col.AliasError,
        ("alltoall", r"output_list\[0\]", r"input_list\[0\]"),
        lambda s: (lambda x: s.group.alltoall(x, x))(np.ones((SIZE, 4), np.float32)),
    ),
    "unequal lists of enough tensors": Row(
        col.ShapeError,
        ("alltoall", "input_list", r"\b4\b"),
        lambda s: s.group.alltoall(s.arrays(2), s.arrays(4)),
    ),
    "a dict for a list": Row(
        col.ShapeError,
        ("allgather", "tensor_list", "dict"),
        lambda s: s.group.allgather({0: s.array()}, s.array()),
    ),
    "an entry of another count": Row(
        col.ShapeError,
        ("allgather", r"tensor_list\[1\]", r"\b4\b", r"\b5\b"),
        lambda s: s.group.allgather([s.array(), s.array(5), s.array()], s.array()),
    ),
    "an entry of another dtype": Row(
        col.ShapeError,
        ("alltoall", r"output_list\[2\]", "float32", "int32"),
        lambda s: s.group.alltoall([*s.arrays(2), s.array(4, "int32")], s.arrays()),
    ),
    "a container as an entry": Row(
        col.UnsupportedTensorError,
        ("allgather", r"tensor_list\[0\]", r"\blist\b"),
        lambda s: s.group.allgather([[s.array()]] * SIZE, s.array()),
    ),
    "a container where a tensor belongs": Row(
        col.UnsupportedTensorError,
        ("scatter", "tensor", r"\bdict\b"),
        lambda s: s.group.scatter({"a": s.array()}, s.arrays(), s.rank),
    ),
    "two tensors for one device": Row(
        col.DeviceError,
        ("allreduce_multigpu", "tensor_list", r"\bCUDA\b", r"\bcpu\b"),
        lambda s: col.allreduce_multigpu(s.arrays(2), s.group.name),
    ),
    "another GPU": Row(
        col.OptionError,
        ("send_multigpu", "dst_gpu_index", r"\bGPU\b", "-1"),
        lambda s: col.send_multigpu(s.array(), (s.rank + 1) % SIZE, -1, s.group.name),
    ),
}

_RANKS = {
    "a rank too high": Row(
        col.RankError,
        ("broadcast", "src_rank", "0 to 2", r"\b3\b"),
        lambda s: s.group.broadcast(s.array(), 3),
    ),
    "a negative rank": Row(
        col.RankError, ("reduce", "dst_rank", "-1"), lambda s: s.group.reduce(s.array(), -1)
    ),
    "half a rank": Row(
        col.RankError,
        ("gather", "dst_rank", r"1\.5"),
        lambda s: s.group.gather(s.arrays(), s.array(), 1.5),
    ),
    "a rank in words": Row(
        col.RankError,
        ("scatter", "src_rank", "'0'"),
        lambda s: s.group.scatter(s.array(), s.arrays(), "0"),
    ),
    "no rank": Row(
        col.RankError, ("recv", "src_rank", "None"), lambda s: s.group.recv(s.array(), None)
    ),
    "sending to oneself": Row(
        col.RankError, ("send", "dst_rank", "copy"), lambda s: s.group.send(s.array(), s.rank)
    ),
    "receiving from oneself": Row(
        col.RankError, ("recv", "src_rank"), lambda s: s.group.recv(s.array(), s.rank)
    ),
    "shifting more to oneself than fits": Row(
        col.ShapeError,
        ("sendrecv", "recv_tensor", r"\b6\b", "float32", r"\b4\b"),
        lambda s: s.group.sendrecv(s.array(6), s.rank, s.array(4), s.rank),
    ),
    "shifting to nobody": Row(
        col.RankError,
        ("sendrecv", "dst_rank", r"\b7\b"),
        lambda s: s.group.sendrecv(s.array(), 7, s.array(), 0),
    ),
    "an object from nobody": Row(
        col.RankError,
        ("broadcast_object", "src_rank", r"\b9\b"),
        lambda s: s.group.broadcast_object(1, 9),
    ),
}

_OPTIONS = {
    "an op in words": Row(
        col.OptionError, (r"\bop\b", "SUM", "'SUM'"), lambda s: s.group.allreduce(s.array(), "SUM")
    ),
    "an op by number": Row(
        col.OptionError, (r"\bop\b", r"\b0\b"), lambda s: s.group.reduce(s.array(), 0, 0)
    ),
    "no op": Row(
        col.OptionError,
        (r"\bop\b", "None"),
        lambda s: s.group.reducescatter(s.array(), s.arrays(), None),
    ),
    "an average of integers": Row(
        col.UnsupportedDTypeError,
        ("allreduce", "AVERAGE", "int32", "SUM"),
        lambda s: s.group.allreduce(s.array(4, "int32"), R.AVERAGE),
    ),
    "an average of bools": Row(
        col.UnsupportedDTypeError,
        ("reduce", "AVERAGE", "bool"),
        lambda s: s.group.reduce(s.array(4, "bool"), 0, R.AVERAGE),
    ),
    "a minimum of complex": Row(
        col.UnsupportedDTypeError,
        ("allreduce", "MIN", "complex64"),
        lambda s: s.group.allreduce(s.array(4, "complex64"), R.MIN),
    ),
    "a product of complex": Row(
        col.UnsupportedDTypeError,
        ("allreduce", "PRODUCT", "complex128"),
        lambda s: s.group.allreduce(s.array(4, "complex128"), R.PRODUCT),
    ),
    "bits of floats": Row(
        col.UnsupportedDTypeError,
        ("reducescatter", "BAND", "float32"),
        lambda s: s.group.reducescatter(s.array(), s.arrays(), R.BAND),
    ),
    "a sum of float8": Row(
        col.UnsupportedDTypeError,
        ("allreduce", "float8_e5m2", "float16"),
        lambda s: s.group.allreduce(s.array(4, "float8_e5m2")),
    ),
    "a bad leaf dtype": Row(
        col.UnsupportedDTypeError,
        ("allreduce", "AVERAGE", "int64"),
        lambda s: s.group.allreduce([s.array(), s.array(4, "int64")], R.AVERAGE),
    ),
    "a colour that is none": Row(
        col.OptionError, ("split", "color", "'red'"), lambda s: s.group.split("red")
    ),
    "a negative colour": Row(
        col.OptionError, ("split", "color", "-2"), lambda s: s.group.split(-2)
    ),
    "a key that is none": Row(
        col.OptionError, ("split", "key", "'a'"), lambda s: s.group.split(0, "a")
    ),
}

_GROUPS = {
    "an unknown group": Row(
        col.GroupError,
        ("'nowhere'", r"init_collective_group\(\)"),
        lambda s: col.allreduce(s.array(), "nowhere"),
    ),
    "an op for a group name": Row(
        col.GroupError,
        ("'0'", r"init_collective_group\(\)"),
        lambda s: col.allreduce(s.array(), R.SUM),
    ),
    "a list for a group name": Row(
        col.GroupError,
        (r"\['pool'\]", r"init_collective_group\(\)"),
        lambda s: col.barrier(["pool"]),
    ),
    "a group's handle that is gone": Row(
        col.GroupError,
        ("allreduce", r"init_collective_group\(\)"),
        lambda s: _destroyed(s).allreduce(s.array()),
    ),
    "an async call after destroy": Row(
        col.GroupError,
        ("allreduce", r"init_collective_group\(\)"),
        lambda s: _destroyed(s).allreduce(s.array(), async_op=True),
    ),
    "objects after destroy": Row(
        col.GroupError,
        ("allgather_object", r"init_collective_group\(\)"),
        lambda s: _destroyed(s).allgather_object(1),
    ),
    "a split after destroy": Row(
        col.GroupError, ("split", r"init_collective_group\(\)"), lambda s: _destroyed(s).split(0)
    ),
    "a name after destroy": Row(
        col.GroupError, ("short-lived", r"init_collective_group\(\)"), _by_name_after_destroy
    ),
    "a group of the parent process": Row(col.GroupError, ("allreduce", r"\bfork"), _in_child),
    "a name that is taken": Row(
        col.GroupError,
        ("init_collective_group", "destroy_collective_group"),
        lambda s: s.init(1, 0, "loopback", s.group.name),
    ),
    "no name": Row(col.OptionError, ("group_name", "''"), lambda s: s.init(1, 0, "loopback", "")),
    "a number for a name": Row(
        col.OptionError, ("group_name", r"\b5\b"), lambda s: s.init(1, 0, "loopback", 5)
    ),
    "nobody in the group": Row(
        col.RankError, ("world_size", r"\b1\b", r"\b0\b"), lambda s: s.init(0, 0)
    ),
    "a rank outside": Row(
        col.RankError, ("rank", "0 to 2", r"\b3\b"), lambda s: s.init(3, 3, group_name="x")
    ),
    "a negative own rank": Row(
        col.RankError, ("rank", "-1"), lambda s: s.init(3, -1, group_name="x")
    ),
    "half an own rank": Row(
        col.RankError, ("rank", r"1\.5"), lambda s: s.init(3, 1.5, group_name="x")
    ),
    "a world size in words": Row(
        col.RankError, ("world_size", "'3'"), lambda s: s.init("3", 0, group_name="x")
    ),
    "an unknown backend": Row(
        col.OptionError, ("backend", "gloo", "'mpi'"), lambda s: s.init(3, s.rank, "mpi", "x")
    ),
    "no backend": Row(col.OptionError, ("backend", "None"), lambda s: s.init(3, s.rank, None, "x")),
    "loopback with several ranks": Row(
        col.OptionError, ("backend", "loopback", "auto"), lambda s: s.init(2, 0, "loopback", "x")
    ),
    "no time": Row(
        col.OptionError,
        ("timeout_s", r"\b0\b"),
        lambda s: s.init(3, s.rank, group_name="x", timeout_s=0),
    ),
    "time for ever": Row(
        col.OptionError,
        ("timeout_s", r"\binf\b"),
        lambda s: s.init(3, s.rank, group_name="x", timeout_s=float("inf")),
    ),
    "time in words": Row(
        col.OptionError,
        ("timeout_s", "'5'"),
        lambda s: s.init(3, s.rank, group_name="x", timeout_s="5"),
    ),
    "Ray's timeout in words": Row(
        col.OptionError,
        ("gloo_timeout", "milliseconds", "'x'"),
        lambda s: s.init(3, s.rank, group_name="x", gloo_timeout="x"),
    ),
    "an unknown scheme": Row(
        col.OptionError,
        ("init_method", "tcp://", "http://x"),
        lambda s: s.init(3, s.rank, group_name="x", init_method="http://x"),
    ),
    "no port": Row(
        col.OptionError,
        ("init_method", "tcp://host:port"),
        lambda s: s.init(3, s.rank, group_name="x", init_method="tcp://nohost"),
    ),
    "a number for a method": Row(
        col.OptionError,
        ("init_method", r"\b5\b"),
        lambda s: s.init(3, s.rank, group_name="x", init_method=5),
    ),
    "no environment": Row(
        col.OptionError,
        ("MASTER_ADDR", "torchrun", "file://"),
        lambda s: s.init(3, s.rank, group_name="x", init_method=None),
    ),
    "a folder that is not there": Row(
        col.OptionError,
        ("init_method", "/no/such/dir"),
        lambda s: s.init(3, s.rank, group_name="x", init_method="file:///no/such/dir/x"),
    ),
    "an unknown provider": Row(
        col.OptionError,
        ("provider", "torch", "'mpi'"),
        lambda s: s.init(3, s.rank, group_name="x", provider="mpi"),
    ),
    "an unknown interface": Row(
        col.OptionError,
        ("interface", "'eth77'", "lo"),
        lambda s: s.init(3, s.rank, group_name="x", interface="eth77"),
    ),
    "an adapter that is none": Row(
        col.OptionError, ("register_adapter", "claims"), lambda s: col.register_adapter(5)
    ),
    "a backend that is none": Row(
        col.OptionError, ("register_backend", "create"), lambda s: col.register_backend("x", 5)
    ),
    "world sizes that differ": Row(
        col.MismatchError,
        ("world_size|ranks", "3", "4"),
        lambda s: s.init(4 if s.rank == 2 else 3, s.rank, group_name="x"),
    ),
}

_MISMATCHES = {
    "count": Row(
        col.MismatchError,
        ("allreduce", r"float32\[4\]", r"float32\[5\]", "rank 1"),
        lambda s: s.group.allreduce(s.array(5 if s.rank == 1 else 4)),
        ranks=(1,),
    ),
    "a count that travels otherwise": Row(
        col.MismatchError,
        ("allreduce", r"float32\[4\]", r"float32\[90000\]", "rank 1"),
        lambda s: s.group.allreduce(s.array(90_000 if s.rank == 1 else 4)),
        ranks=(1,),
    ),
    "dtype": Row(
        col.MismatchError,
        ("allreduce", r"float32\[4\]", r"int32\[4\]"),
        lambda s: s.group.allreduce(s.array(4, "int32" if s.rank == 2 else "float32")),
        ranks=(2,),
    ),
    "dtypes of one width and kind": Row(
        col.MismatchError,
        (r"\bfloat16", "bfloat16"),
        lambda s: s.group.allreduce(s.array(4, "bfloat16" if s.rank == 0 else "float16")),
        ranks=(0,),
    ),
    "op": Row(
        col.MismatchError,
        ("allreduce", "SUM", "MAX"),
        lambda s: s.group.allreduce(s.array(), R.MAX if s.rank == 1 else R.SUM),
        ranks=(1,),
    ),
    "root": Row(
        col.MismatchError,
        ("broadcast", "root 0", "root 1"),
        lambda s: s.group.broadcast(s.array(), int(s.rank == 2)),
        ranks=(2,),
    ),
    "reduce's root": Row(
        col.MismatchError,
        ("reduce", "root"),
        lambda s: s.group.reduce(s.array(), int(s.rank == 2)),
        ranks=(2,),
    ),
    "everyone a root": Row(
        col.MismatchError,
        ("scatter", "root"),
        lambda s: s.group.scatter(s.array(), s.arrays(), s.rank),
    ),
    "operation": Row(
        col.MismatchError,
        ("allreduce", "broadcast"),
        lambda s: _choose(
            s, lambda s: s.group.broadcast(s.array()), lambda s: s.group.allreduce(s.array())
        ),
        ranks=(1,),
    ),
    "a barrier": Row(
        col.MismatchError,
        ("barrier", "allreduce"),
        lambda s: _choose(s, lambda s: s.group.barrier(), lambda s: s.group.allreduce(s.array())),
        ranks=(1,),
    ),
    "an object": Row(
        col.MismatchError,
        ("allgather_object", "barrier"),
        lambda s: _choose(s, lambda s: s.group.allgather_object(1), lambda s: s.group.barrier(), 2),
        ranks=(2,),
    ),
    "an object's root": Row(
        col.MismatchError,
        ("broadcast_object", "root"),
        lambda s: s.group.broadcast_object(1, int(s.rank == 1)),
        ranks=(1,),
    ),
    "a split": Row(
        col.MismatchError,
        ("split", "barrier"),
        lambda s: _choose(s, lambda s: s.group.split(0), lambda s: s.group.barrier()),
        ranks=(1,),
    ),
    "paths of leaves": Row(
        col.MismatchError,
        ("allreduce", r"\['a'\]", r"\['b'\]"),
        lambda s: s.group.allreduce({"b" if s.rank == 1 else "a": s.array()}),
        ranks=(1,),
    ),
    "two leaves swapped": Row(
        col.MismatchError,
        ("allreduce", r"\['a'\]", r"\[3\]"),
        lambda s: s.group.allreduce(
            {"a": s.array(3 + (s.rank == 1)), "b": s.array(4 - (s.rank == 1))}
        ),
        ranks=(1,),
    ),
    "a leaf more": Row(
        col.MismatchError,
        ("allreduce",),
        lambda s: s.group.allreduce([s.array(2)] if s.rank == 1 else [s.array(1), s.array(1)]),
        ranks=(1,),
    ),
    "a tree for a tensor": Row(
        col.MismatchError,
        ("allreduce",),
        lambda s: s.group.allreduce([s.array()] if s.rank == 1 else s.array()),
        ranks=(1,),
    ),
    "nothing for a tensor": Row(
        col.MismatchError,
        ("allreduce",),
        lambda s: s.group.allreduce({} if s.rank == 1 else s.array()),
        ranks=(1,),
    ),
    "copy=False": Row(
        col.MismatchError,
        ("allreduce", "copy=False"),
        lambda s: s.group.allreduce(s.array(), copy=False if s.rank == 1 else None),
        ranks=(1,),
    ),
    "count of a gather": Row(
        col.MismatchError,
        ("allgather", r"\[4\]", r"\[6\]"),
        lambda s: s.group.allgather(
            s.arrays(SIZE, 6 if s.rank == 2 else 4), s.array(6 if s.rank == 2 else 4)
        ),
        ranks=(2,),
    ),
    "count of a scatter": Row(
        col.MismatchError,
        ("scatter", r"\[4\]", r"\[6\]"),
        lambda s: s.group.scatter(
            s.array(6 if s.rank == 0 else 4), s.arrays(SIZE, 6) if s.rank == 0 else None
        ),
        ranks=(0,),
    ),
    "count of an exchange": Row(
        col.MismatchError,
        ("alltoall", r"\[4\]", r"\[6\]"),
        lambda s: s.group.alltoall(
            s.arrays(SIZE, 6 if s.rank == 2 else 4), s.arrays(SIZE, 6 if s.rank == 2 else 4)
        ),
        ranks=(2,),
    ),
    "op of a reducescatter": Row(
        col.MismatchError,
        ("reducescatter", "SUM", "MIN"),
        lambda s: s.group.reducescatter(s.array(), s.arrays(), R.MIN if s.rank == 1 else R.SUM),
        ranks=(1,),
    ),
    "count of a message": Row(
        col.MismatchError,
        (r"transfer #\d", "rank 0", "rank 1", "5"),
        lambda s: _transfer(s, 5, "float32"),
    ),
    "dtype of a message": Row(
        col.MismatchError,
        (r"transfer #\d", r"float32\[4\]", r"float64\[4\]"),
        lambda s: _transfer(s, 4, "float64"),
    ),
    "count of a shift": Row(col.MismatchError, (r"transfer #\d", r"\[4\]", r"\[3\]"), _shift),
    "an empty tensor": Row(
        col.MismatchError,
        (r"\[0\]", r"\[4\]"),
        lambda s: s.group.allreduce(s.array(0 if s.rank == 1 else 4)),
        ranks=(1,),
    ),
    "many ops at once": Row(
        col.MismatchError,
        ("SUM",),
        lambda s: s.group.allreduce(s.array(), (R.SUM, R.MIN, R.MAX)[s.rank]),
        ranks=(1, 2),
    ),
}

TABLE = {
    f"{section}: {name}": row
    for section, rows in (
        ("tensor", _TENSORS),
        ("torch", _TORCH),
        ("jax", _JAX),
        ("alias", _ALIASES),
        ("list", _LISTS),
        ("rank", _RANKS),
        ("option", _OPTIONS),
        ("group", _GROUPS),
        ("ranks disagree on", _MISMATCHES),
    )
    for name, row in rows.items()
}


@dataclass(frozen=True)
class Outcome:
    """What a rank got for a malformed call, and whether its group worked afterwards."""

    kind: str
    message: str
    ranks: tuple[int, ...] | None
    elapsed_s: float
    sum_after: list[float]


def make_the_call(rank: int, world_size: int, world: World, name: str, url: str) -> Outcome:
    site = Site(world.group(), url)
    began = time.monotonic()
    error: BaseException | None = None
    try:
        TABLE[name].call(site)
    except Exception as caught:
        error = caught
    elapsed = time.monotonic() - began
    site.check()
    after = site.group.allreduce(np.arange(3.0) + rank)
    message = str(error).replace(site.group.name, "NAME")  # whose digits would match
    return Outcome(
        type(error).__name__, message, getattr(error, "ranks", None), elapsed, after.tolist()
    )


def check_outcome(row: Row, rank: int, outcome: Outcome, world_size: int) -> None:
    described = f"rank {rank} got {outcome.kind}: {outcome.message}"
    assert outcome.kind == row.error.__name__, described
    for word in row.words:
        assert re.search(word, outcome.message), f"no {word!r}; {described}"
    if row.ranks is not None:
        assert outcome.ranks == row.ranks, f"{outcome.ranks}; {described}"
    assert outcome.elapsed_s < SOON_S, f"after {outcome.elapsed_s:.1f} s; {described}"
    assert outcome.sum_after == [
        world_size * index + sum(range(world_size)) for index in range(3)
    ], described


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.needs(row.needs)) for name, row in TABLE.items()]
)
def test_malformed_call(pool: RankPool, transport: Transport, name: str) -> None:
    url = f"file://{pool.folder / 'rendezvous'}"
    outcomes = pool.run(SIZE, make_the_call, World(SIZE, *transport), name, url)
    for rank, outcome in enumerate(outcomes):
        check_outcome(TABLE[name], rank, outcome, SIZE)


def test_the_table_is_large_enough() -> None:
    assert len(TABLE) >= 40


def sharded(rank: int, world_size: int) -> list[Any]:
    """Two host devices: an array over both is refused, one on the second works and stays there."""
    jax = importlib.import_module("jax")
    group = World(1, "loopback", None).group()
    first, second = jax.devices()
    mesh = jax.sharding.Mesh(np.array([first, second]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    spread = jax.device_put(jax.numpy.arange(4.0), sharding)
    messages = []
    for call in (
        group.allreduce,
        lambda x: group.allreduce({"w": x}, donate=True),
        group.broadcast,
    ):
        with pytest.raises(col.UnsupportedTensorError) as caught:
            call(spread)
        messages.append(str(caught.value))
    assert spread.tolist() == [0.0, 1.0, 2.0, 3.0]
    everywhere = jax.device_put(
        jax.numpy.arange(4.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
    with pytest.raises(col.UnsupportedTensorError, match=r"x\.addressable_data\(0\)"):
        group.allreduce(everywhere)
    assert jax.device_put(
        group.allreduce(everywhere.addressable_data(0)), everywhere.sharding
    ).is_fully_replicated
    there = jax.device_put(jax.numpy.arange(3.0), second)
    result = group.allreduce(there)
    assert result.devices() == {second}
    assert as_numpy(result, "float32").tolist() == [0.0, 1.0, 2.0]
    part = spread.addressable_shards[1].data
    assert group.allreduce(part).tolist() == [2.0, 3.0]
    return messages


@pytest.mark.needs("jax")
def test_sharded_jax_array(tmp_path: Path) -> None:
    devices = RankPool(tmp_path, {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"})
    try:
        (messages,) = devices.run(1, sharded)
    finally:
        devices.close()
    for message, words in zip(
        messages, ("allreduce: tensor", r"leaf \['w'\]", "broadcast: tensor"), strict=True
    ):
        assert re.search(words, message)
        assert "x.addressable_shards" in message, message
