"""Adapters: each framework's tensor as a view of its very memory, and what is refused."""

from __future__ import annotations

import ctypes
import importlib
import re
import runpy
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporters import Copying, Exporter, ReadOnly, imitated

import colltensor as col
import colltensor.adapters as adapters_module
from colltensor import (
    BufferView,
    DeviceError,
    OptionError,
    ReadOnlyError,
    UnsupportedDTypeError,
    UnsupportedTensorError,
    dlpack,
    register_adapter,
)
from colltensor.adapters import adapter_of, find_adapter, memory_of, target_of
from colltensor.adapters._numpy_dtypes import numpy_dtype
from colltensor.types import CPU, DTYPES, Device

exports_by_version = pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.1.0",
    reason="numpy says since 2.1 what an export is, by its version",
)


@pytest.fixture
def own_adapters() -> Iterator[None]:
    """Forget, after the test, the adapters that it registered."""
    before = list(adapters_module._registered)
    yield
    adapters_module._registered[:] = before
    adapters_module.known.clear()


def target(tensor: Any) -> BufferView:
    return adapter_of(tensor).target(tensor)


def source(tensor: Any) -> BufferView:
    return adapter_of(tensor).source(tensor)


class TestNumpy:
    """numpy.ndarray."""

    @pytest.mark.parametrize(
        "name", [name for name in DTYPES if name == "bool" or hasattr(np, name)]
    )
    def test_numpy_dtypes(self, name: str) -> None:
        array = np.zeros((2, 3), name)
        view = target(array)
        assert (view.pointer, view.dtype, view.shape, view.strides) == (
            array.ctypes.data,
            DTYPES[name],
            (2, 3),
            None,
        )
        assert (view.device, view.readonly, view.owner is array) == (CPU, False, True)

    def test_dtypes_of_ml_dtypes(self) -> None:
        ml_dtypes = importlib.import_module("ml_dtypes")
        for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
            array = np.zeros(6, getattr(ml_dtypes, name))[::2]
            for view in (target(array), source(array)):
                assert (view.pointer, view.dtype.name, view.strides) == (
                    array.ctypes.data,
                    name,
                    (2,),
                )

    @pytest.mark.parametrize(
        "index",
        [np.s_[::-1, ::2], np.s_[1:3, 1], np.s_[:, None, 2:4], np.s_[3:, :0], np.s_[0, 0:1]],
    )
    def test_any_layout(self, index: Any) -> None:
        array = np.arange(24, dtype=np.int16).reshape(4, 6)[index]
        for view in (target(array), target(array.T), source(array)):
            assert view.count == array.size
            if array.size > 1:
                assert view.pointer == array.ctypes.data
        expected = None if array.flags.c_contiguous else tuple(step // 2 for step in array.strides)
        assert target(array).strides == expected

    def test_memory_mapped_files_are_arrays(self, tmp_path: Any) -> None:
        mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=(4,))
        assert target(mapped).pointer == mapped.ctypes.data

    def test_read_only(self) -> None:
        array = np.ones(3)
        array.flags.writeable = False
        assert source(array).readonly
        assert source(array).pointer == array.ctypes.data
        with pytest.raises(ReadOnlyError, match=r"x\.copy\(\)"):
            target(array)
        with pytest.raises(ReadOnlyError):
            target(np.frombuffer(b"12345678", np.float64))

    @pytest.mark.parametrize(
        "dtype", ["O", "M8[s]", "m8[s]", "U3", "S3", "V4", ">i4", "g", "G", [("a", "f4")]]
    )
    def test_other_dtypes(self, dtype: Any) -> None:
        array = np.zeros(2, dtype)
        for look in (target, source):
            with pytest.raises(UnsupportedDTypeError, match=re.escape(str(array.dtype))):
                look(array)

    @pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
    def test_subclasses_are_refused(self) -> None:
        class Tagged(np.ndarray):
            pass

        for array in (
            np.ma.zeros(3),
            np.asmatrix([[1.0]]),
            np.zeros(3).view(Tagged),
            np.rec.array([(1, 2)]),
        ):
            with pytest.raises(
                UnsupportedTensorError, match=rf"{type(array).__name__}\b.*register_adapter\(\)"
            ):
                target(array)

    def test_no_reference_is_kept(self) -> None:
        array = np.ones(3)
        before = sys.getrefcount(array)
        view = target(array)
        assert sys.getrefcount(array) > before
        del view
        assert sys.getrefcount(array) == before


class TestHostMemory:
    """Staging buffers and copies between layouts."""

    def test_allocation_is_aligned(self) -> None:
        for nbytes in (0, 1, 63, 64, 1_000_003):
            view = memory_of("cpu").allocate(nbytes)
            assert view.pointer % 64 == 0
            assert view.nbytes == nbytes

    @pytest.mark.parametrize(
        "dtype", ["bool", "uint8", "int64", "complex128", "bfloat16", "float8_e4m3fn"]
    )
    def test_copies_between_layouts(self, dtype: str) -> None:
        kind = np.dtype(getattr(importlib.import_module("ml_dtypes"), dtype, dtype))
        raw = np.arange(24 * kind.itemsize, dtype=np.uint8)
        values = (raw % 2 == 1)[:24] if dtype == "bool" else raw.view(kind)
        spread = np.zeros((8, 6), kind)
        for one, other in (
            (values.reshape(4, 6), spread[::2]),
            (values.reshape(4, 6).T, spread[::-2, :]),
            (values[::-1], spread[:4, :]),
            (values.reshape(6, 4), spread[4:]),
        ):
            memory_of("cpu").copy(target(other), source(one))
            assert np.ascontiguousarray(other).tobytes() == np.ascontiguousarray(one).tobytes()
        assert spread[4:].any() or dtype == "bool"

    def test_empty_copies(self) -> None:
        memory_of("cpu").copy(target(np.zeros((0, 3))), source(np.zeros(0)))


@pytest.mark.needs("torch")
class TestTorch:
    """torch.Tensor, Parameter and Buffer."""

    @staticmethod
    def torch() -> Any:
        return importlib.import_module("torch")

    def test_dtypes(self) -> None:
        torch = self.torch()
        known = [name for name in DTYPES if hasattr(torch, name)]
        assert {"bool", "int8", "uint64", "bfloat16", "float8_e5m2", "complex128"} <= set(known)
        for name in known:
            tensor = torch.zeros((2, 3), dtype=getattr(torch, name))
            view = target(tensor)
            assert (view.pointer, view.dtype.name, tuple(view.shape), view.strides) == (
                tensor.data_ptr(),
                name,
                (2, 3),
                None,
            )

    def test_layouts(self) -> None:
        tensor = self.torch().arange(24).reshape(4, 6)
        for part in (
            tensor.T,
            tensor[1::2, ::3],
            tensor[:, 2],
            tensor[2:],
            tensor.permute(1, 0)[:, :1],
        ):
            view = target(part)
            assert view.pointer == part.data_ptr()
            assert (
                view.strides is None
                if part.is_contiguous()
                else tuple(view.strides) == part.stride()
            )

    def test_channels_last(self) -> None:
        torch = self.torch()
        tensor = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
        assert tuple(target(tensor).strides or ()) == tensor.stride()

    def test_parameters_are_read_and_written_under_no_grad(self) -> None:
        torch = self.torch()
        for leaf in (torch.nn.Parameter(torch.ones(3)), torch.ones(3, requires_grad=True)):
            assert source(leaf).pointer == leaf.data_ptr()
            with pytest.raises(ReadOnlyError, match=r"torch\.no_grad\(\)"):
                target(leaf)
            with torch.no_grad():
                assert target(leaf).pointer == leaf.data_ptr()
        assert target(torch.nn.Buffer(torch.ones(2))).count == 2

    def test_written_bumps_the_version(self) -> None:
        tensor = self.torch().ones(3)
        before = tensor._version
        adapter_of(tensor).written(tensor)
        assert tensor._version == before + 1

    def test_inference_tensors(self) -> None:
        torch = self.torch()
        with torch.inference_mode():
            tensor = torch.ones(3)
            assert target(tensor).count == 3
            adapter_of(tensor).written(tensor)
        assert source(tensor).count == 3
        with pytest.raises(ReadOnlyError, match="inference_mode"):
            target(tensor)

    def test_lazy_values_are_refused(self) -> None:
        torch = self.torch()
        x = torch.ones(3, dtype=torch.complex64)
        for lazy in (x.conj(), x.conj().imag):
            for look in (source, target):
                with pytest.raises(
                    UnsupportedTensorError, match=r"resolve_neg\(\)\.resolve_conj\(\)"
                ):
                    look(lazy)
        assert target(x.conj().resolve_conj()).count == 3

    # torch calls sparse and nested tensors prototypes
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_no_plain_memory(self) -> None:
        torch = self.torch()
        for tensor in (
            torch.eye(3).to_sparse(),
            torch.eye(3).to_sparse_csr(),
            torch.eye(3).to_sparse_csc(),
            torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        ):
            for look in (source, target):
                with pytest.raises(UnsupportedTensorError):
                    look(tensor)
        with pytest.raises(DeviceError, match="meta"):
            target(torch.ones(3, device="meta"))

    @pytest.mark.usefixtures("own_adapters")
    def test_subclasses_come_by_registration(self) -> None:
        torch = self.torch()

        class Tagged(torch.Tensor):  # type: ignore[misc]
            pass

        tensor = torch.ones(3).as_subclass(Tagged)
        with pytest.raises(UnsupportedTensorError, match="register_adapter"):
            target(tensor)

        class TaggedAdapter(type(adapter_of(torch.ones(1)))):  # type: ignore[misc]
            def claims(self, kind: type) -> bool:
                return kind is Tagged

        register_adapter(TaggedAdapter())
        assert target(tensor).pointer == tensor.data_ptr()
        assert find_adapter(torch.Tensor) is not find_adapter(Tagged)


@pytest.mark.needs("jax")
class TestJax:
    """jax.Array."""

    @staticmethod
    def jax() -> Any:
        return importlib.import_module("jax")

    def test_views(self) -> None:
        jnp = self.jax().numpy
        for name in (
            "bool",
            "int8",
            "uint32",
            "float16",
            "bfloat16",
            "float32",
            "complex64",
            "float8_e4m3fn",
        ):
            array = jnp.zeros((2, 3), getattr(jnp, name))
            for view in (source(array), target(array)):
                assert (view.pointer, view.dtype.name, view.shape) == (
                    array.unsafe_buffer_pointer(),
                    name,
                    (2, 3),
                )
                assert view.readonly

    def test_allocate_result_copies_or_takes(self) -> None:
        jnp = self.jax().numpy
        adapter = adapter_of(jnp.ones(3))
        assert adapter.immutable
        x = jnp.arange(1000.0)
        copy, view = adapter.allocate_result(x, False)
        assert view.pointer == copy.unsafe_buffer_pointer() != x.unsafe_buffer_pointer()
        assert not view.readonly
        pointer = x.unsafe_buffer_pointer()
        taken, view = adapter.allocate_result(x, True)
        assert x.is_deleted()
        assert view.pointer == taken.unsafe_buffer_pointer() == pointer

    def test_refusals(self) -> None:
        jax = self.jax()
        x = jax.numpy.ones(3)
        x.delete()
        with pytest.raises(UnsupportedTensorError, match="deleted"):
            source(x)
        with pytest.raises(UnsupportedDTypeError, match="int4"):
            source(jax.numpy.ones(3, jax.numpy.int4))
        with pytest.raises(UnsupportedTensorError, match="PRNGKeyArray"):
            source(jax.random.key(0))
        with pytest.raises(UnsupportedTensorError, match=r"Tracer.*colltensor\.jax"):
            jax.jit(source)(jax.numpy.ones(3))


# of libraries that a machine without a GPU lacks
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.needs("cupy")
class TestCupy:
    """cupy.ndarray, over host memory that poses as a device's: the adapter looks at addresses only."""

    @pytest.fixture(autouse=True)
    def stream(self, monkeypatch: pytest.MonkeyPatch) -> int:
        """Which stream is the current one needs a driver to say; here it is this."""
        monkeypatch.setattr("colltensor.adapters.cupy._current_stream", lambda index: 7 + index)
        return 7

    @staticmethod
    def array(
        host: Any, shape: tuple[int, ...], strides: tuple[int, ...] | None = None, offset: int = 0
    ) -> Any:
        cupy = importlib.import_module("cupy")
        memory = cupy.cuda.UnownedMemory(host.ctypes.data, host.nbytes, host, 0)
        return cupy.ndarray(shape, host.dtype, cupy.cuda.MemoryPointer(memory, offset), strides)

    @pytest.mark.parametrize("name", ["bool", "int8", "uint64", "float16", "float32", "complex128"])
    def test_views(self, name: str, stream: int) -> None:
        host = np.zeros(12, name)
        for look in (source, target):
            view = look(self.array(host, (3, 4)))
            assert (view.pointer, view.dtype.name, view.shape, view.strides) == (
                host.ctypes.data,
                name,
                (3, 4),
                None,
            )
            assert (view.device, view.stream) == (Device("cuda", 0), stream)
            assert not view.readonly

    def test_layouts(self) -> None:
        host = np.zeros(24, np.float32)
        view = target(self.array(host, (2, 3), (48, -8), 20))
        assert (view.pointer, view.strides) == (host.ctypes.data + 20, (12, -2))
        assert target(self.array(host, (4, 6)).T).strides == (1, 6)

    def test_the_view_keeps_the_array(self) -> None:
        host = np.zeros(4)
        array = self.array(host, (4,))
        before = sys.getrefcount(array)
        view = target(array)
        assert sys.getrefcount(array) == before + 1
        assert view.owner is array
        del view
        assert sys.getrefcount(array) == before

    def test_arrays_that_interleave_share_no_memory(self) -> None:
        whole = self.array(np.zeros(24, np.float32), (4, 6))
        left, right, middle = (target(part) for part in (whole[:, :3], whole[:, 3:], whole[:, 2:4]))
        overlap = memory_of("cuda").overlap
        assert not overlap(left, right)
        assert overlap(left, middle)
        assert overlap(right, middle)


class TestDlpack:
    """Any object with ``__dlpack__`` and ``__dlpack_device__``."""

    @pytest.mark.parametrize(
        "name",
        [
            "bool",
            "int8",
            "int64",
            "uint8",
            "uint64",
            "float16",
            "float32",
            "float64",
            "complex64",
            "complex128",
        ],
    )
    def test_views(self, name: str) -> None:
        array = np.zeros((2, 6), name)
        for tensor, strides in ((array, None), (array[:, ::-2], (6, -2)), (array.T, (1, 6))):
            view = target(Exporter(tensor))
            assert (view.pointer, view.dtype.name, view.strides) == (
                tensor.ctypes.data,
                name,
                strides,
            )
            assert view.device == CPU

    def test_device_numbers(self) -> None:
        with pytest.raises(DeviceError, match=r"\b8\b.*\bcpu\b"):
            target(Exporter(np.ones(3), (8, 0)))

    def test_read_only_memory(self) -> None:
        array = np.ones(3)
        array.flags.writeable = False
        with pytest.raises(ReadOnlyError, match="copy"):
            target(Exporter(array))

    @exports_by_version
    def test_memory_marked_read_only(self) -> None:
        """It is viewed to be read; an unversioned export would not tell."""
        array = np.arange(6.0)[::2]
        view = source(ReadOnly(array))
        assert (view.pointer, view.strides, view.readonly) == (array.ctypes.data, (2,), True)
        assert BufferView.from_dlpack(ReadOnly(array), dtype=DTYPES["float64"], device=CPU).readonly
        assert not BufferView.from_dlpack(array, dtype=DTYPES["float64"], device=CPU).readonly
        with pytest.raises(ReadOnlyError, match=r"ReadOnly\b.*numpy\.array\(x\)"):
            target(ReadOnly(array))

    @exports_by_version
    def test_a_copy_is_read_but_not_written(self) -> None:
        array = np.arange(3.0)
        assert source(Copying(array)).count == 3
        with pytest.raises(ReadOnlyError, match=r"Copying\b.*numpy\.array\(x\)"):
            target(Copying(array))

    def test_a_device_without_an_index(self) -> None:
        array = np.ones(3)
        assert target(Exporter(array, (1, None))).pointer == array.ctypes.data

    def test_the_export_ends_with_the_view(self) -> None:
        array = np.ones(3)
        before = sys.getrefcount(array)
        view = target(Exporter(array))
        assert sys.getrefcount(array) > before
        del view
        assert sys.getrefcount(array) == before

    def test_half_of_the_protocol_is_not_enough(self) -> None:
        class Half:
            def __dlpack__(self) -> Any:
                raise AssertionError("must not be asked")

        assert find_adapter(Half) is None
        with pytest.raises(UnsupportedTensorError, match="__dlpack_device__"):
            target(Half())


@pytest.fixture
def alone() -> Iterator[Any]:
    """A group of one rank."""
    group = col.init_collective_group(1, 0, "loopback", "alone", init_method=None)
    yield group
    group.destroy()


class TestTensorflow:
    """TensorFlow's eager tensors, as far as they are imitated."""

    def test_a_shared_constant_stays(self, alone: Any) -> None:
        with imitated("tensorflow") as tf:
            x = tf.constant(2.0)
            assert adapter_of(x).name == "tensorflow"
            y, z = alone.allreduce(x), alone.allreduce(x, donate=True)
            assert y.__class__ is z.__class__ is tf.EagerTensor
            assert len({entry.array.ctypes.data for entry in (x, y, z)}) == 3
            _, view = adapter_of(x).allocate_result(x, False)
            view.memory()[:] = bytes(4)
            assert float(tf.constant(2.0).array) == 2.0

    def test_reads_take_the_very_memory(self) -> None:
        with imitated("tensorflow") as tf:
            x = tf.constant([[1, 2], [3, 4]])
            view = source(x)
            assert (view.pointer, view.dtype.name, view.readonly) == (
                x.array.ctypes.data,
                "int64",
                True,
            )

    def test_what_it_cannot_export(self) -> None:
        ml_dtypes = importlib.import_module("ml_dtypes")
        with imitated("tensorflow") as tf:
            for value in ("text", np.ones(2, ml_dtypes.float8_e5m2)):
                with pytest.raises(UnsupportedDTypeError):
                    source(tf.constant(value))

    def test_on_a_device_it_is_only_read(self) -> None:
        with imitated("tensorflow") as tf:
            x = tf.EagerTensor(np.ones(2), (2, 0))
            assert source(x).device == Device("cuda", 0)
            with pytest.raises(DeviceError, match=r"tf\.identity"):
                target(x)

    def test_variables_are_refused_by_name(self) -> None:
        with (
            imitated("tensorflow") as tf,
            pytest.raises(UnsupportedTensorError, match=r"v\.assign\("),
        ):
            source(tf.Variable())


class TestMlx:
    """mlx arrays, as far as they are imitated."""

    def test_results_are_new(self, alone: Any) -> None:
        with imitated("mlx") as mlx:
            mx = mlx.core
            x = mx.array(np.arange(6, dtype=np.float32).reshape(2, 3))
            assert (source(x).pointer, source(x).readonly) == (x.array.ctypes.data, True)
            for given in (
                x,
                mx.transpose(x),
                mx.array(np.float32(3)),
                mx.array(np.zeros((0, 3), np.float32)),
            ):
                before = given.array.copy()
                result = alone.allreduce([given, np.ones(1)])[0]
                assert result.__class__ is mx.array
                assert result.shape == given.shape
                assert (result.array == before).all()
                _, view = adapter_of(given).allocate_result(given, False)
                assert view.strides is None
                if view.count:
                    view.memory()[:] = bytes(view.nbytes)
                    assert not np.shares_memory(result.array, given.array)
                assert (given.array == before).all()

    def test_strided_arrays_are_sent_as_they_lie(self) -> None:
        with imitated("mlx") as mlx:
            x = mlx.core.transpose(mlx.core.array(np.zeros((2, 3))))
            assert source(x).strides == (1, 3)
            assert target(x).strides is None


class TestPaddle:
    """Paddle tensors, as far as they are imitated."""

    @exports_by_version
    def test_in_place_and_told(self, alone: Any) -> None:
        with imitated("paddle") as paddle:
            x = paddle.Tensor(np.ones(3))
            assert target(x).pointer == x.array.ctypes.data
            assert alone.allreduce(x) is x
            assert x.inplace_version == 1

    @exports_by_version
    def test_what_has_a_gradient_is_only_read(self, alone: Any) -> None:
        with imitated("paddle") as paddle:
            for kind in (paddle.Tensor, paddle.base.framework.EagerParamBase):
                x = kind(np.ones(3), stop_gradient=False)
                assert source(x).pointer == x.array.ctypes.data
                with pytest.raises(ReadOnlyError, match=r"stop_gradient=False.*no_grad"):
                    alone.allreduce(x)
                paddle.grad_enabled = False
                assert alone.allreduce({"x": x})["x"] is x
                paddle.grad_enabled = True


class Custom:
    """A tensor of the user's own."""

    def __init__(self) -> None:
        self.array = np.arange(3.0)


class CustomAdapter:
    """Its adapter."""

    name = "custom"
    immutable = False

    def __init__(self) -> None:
        self.writes = 0

    def claims(self, kind: type) -> bool:
        return kind is Custom

    def source(self, tensor: Any) -> BufferView:
        return source(tensor.array)

    def target(self, tensor: Any) -> BufferView:
        return target(tensor.array)

    def allocate_result(self, tensor: Any, donate: bool) -> tuple[Any, BufferView]:
        return tensor, self.target(tensor)

    def written(self, tensor: Any) -> None:
        self.writes += 1


@pytest.mark.usefixtures("own_adapters")
def test_register_adapter() -> None:
    with pytest.raises(UnsupportedTensorError, match="register_adapter"):
        adapter_of(Custom())
    first, last = CustomAdapter(), CustomAdapter()
    register_adapter(first)
    assert adapter_of(Custom()) is first
    register_adapter(last)
    assert adapter_of(Custom()) is last
    with pytest.raises(OptionError, match="claims, source"):
        register_adapter(object())  # type: ignore[arg-type]
    for attributes, words in (
        ({"name": None}, r"\bname\b.*\bstr\b.*\bNone\b"),
        ({"immutable": 1}, r"\bimmutable\b.*\bbool\b"),
        ({"directly_exportable": True}, r"directly_exportable: .*\bTrue\b"),
    ):
        with pytest.raises(OptionError, match=words):
            register_adapter(type("Wrong", (CustomAdapter,), attributes)())
    with pytest.raises(OptionError, match=r"CustomAdapter\(\)"):
        register_adapter(CustomAdapter)  # type: ignore[arg-type]


@pytest.mark.usefixtures("own_adapters")
@exports_by_version
def test_read_only_views_of_a_registered_adapter_are_not_written(alone: Any) -> None:
    class Locked(CustomAdapter):
        def source(self, tensor: Any) -> BufferView:
            return BufferView.from_dlpack(
                ReadOnly(tensor.array), dtype=DTYPES["float64"], device=CPU
            )

        target = source

    register_adapter(Locked())
    tensor = Custom()
    alone.broadcast(tensor, 0)
    calls = [
        lambda: alone.allreduce(tensor),
        lambda: alone.allreduce([tensor]),
        lambda: target_of(Locked(), tensor),
    ]
    for call in calls:
        with pytest.raises(ReadOnlyError, match=r"\bCustom\b"):
            call()


@pytest.mark.parametrize(
    "thing",
    [None, "x", b"x", [], {}, object(), np.longdouble(1), np.dtype("f4"), Custom, np.str_("x")],
)
def test_what_is_no_tensor(thing: Any) -> None:
    assert find_adapter(type(thing)) is None
    with pytest.raises(UnsupportedTensorError, match=rf"__dlpack__.*\b{type(thing).__name__}\b"):
        adapter_of(thing)


@pytest.mark.parametrize("number", [1, 1.5, True, 1j, np.float32(1), np.bool_(True), np.float16(1)])
def test_numbers_are_no_tensors_but_have_an_adapter(number: Any) -> None:
    assert find_adapter(type(number)) is None
    adapter = adapter_of(number)
    result, view = adapter.allocate_result(number, donate=False)
    assert (view.count, view.shape, view.readonly, adapter.source(number).readonly) == (
        1,
        (),
        False,
        True,
    )
    result[()] = 0
    assert repr(adapter.restored(result, number)) == repr(type(number)(0))


def named(name: str) -> Any:
    """Return an object of a type that is called so, as a package's that need not be installed."""
    module, _, kind = name.rpartition(".")
    return type(kind, (), {"__module__": module, "__array__": None, "__qualname__": kind})()


@pytest.mark.parametrize(
    ("thing", "advice"),
    [
        ("abc", "broadcast_object"),
        (b"abc", "broadcast_object"),
        (None, r"\bNoneType; (?!.*register_adapter)"),
        ({1}, r"\blist\b"),
        (frozenset({1}), r"\blist\b"),
        ((x for x in [1]), r"list\(x\)"),
        (map(int, []), r"list\(x\)"),
        ({}.values(), r"list\(x\)"),
        (bytearray(2), r"numpy\.frombuffer\(x, numpy\.uint8\)"),
        (memoryview(b""), r"numpy\.asarray\(x\)"),
        (len, "register_adapter"),
        (int, r"\btype; (?!.*register_adapter)"),
        (named("h5py._hl.dataset.Dataset"), r"x\[\.\.\.\] = a"),
        (named("zarr.core.array.Array"), r"x\[\.\.\.\] = a"),
        (named("h5py._hl.group.Group"), r"x\[name\]\[\.\.\.\]"),
        (named("xarray.core.dataarray.DataArray"), r"x\.values"),
        (named("xarray.core.dataset.Dataset"), r"x\[name\]\.values"),
        (named("dask.array.core.Array"), r"x\.compute\(\)"),
        (named("pandas.Series"), r"copy=True\).*x\[:\] = a"),
        (named("pandas.core.frame.DataFrame"), r"x\[:\]"),
        (named("pandas.Index"), r"pandas\.Index\(a\)"),
        (named("tensordict.base.TensorDictBase"), "flatten_keys"),
        pytest.param(
            named("jax._src.random.prng.PRNGKeyArray"), "key_data", marks=pytest.mark.needs("jax")
        ),
        (named("some.Table"), r"numpy\.array\(x\)"),
    ],
    ids=lambda thing: thing if isinstance(thing, str) else type(thing).__name__,
)
def test_what_is_no_tensor_says_what_is(thing: Any, advice: str) -> None:
    with pytest.raises(UnsupportedTensorError, match=advice):
        adapter_of(thing)


@pytest.mark.needs("torch")
def test_advice_for_what_holds_tensors_of_torch_can_be_followed(alone: Any) -> None:
    torch = importlib.import_module("torch")
    module, tensors = torch.nn.Linear(2, 2), torch.nn.ParameterList([torch.zeros(2)])
    for thing, advice in (
        (module, r"x\.state_dict\(\)"),
        (tensors, r"list\(x\), under torch\.no_grad"),
    ):
        for given in (thing, {"a": thing}):
            with pytest.raises(UnsupportedTensorError, match=advice):
                alone.broadcast(given)
    result = alone.allreduce(module.state_dict())
    assert result["weight"].data_ptr() == module.weight.data_ptr()
    with torch.no_grad():
        assert alone.allreduce(list(tensors))[0] is tensors[0]


@pytest.mark.needs("torch")
def test_torch_tells_tensors_that_are_not_as_plain_as_others() -> None:
    torch = importlib.import_module("torch")
    adapter: Any = find_adapter(torch.Tensor)
    first, second = torch.ones(3), torch.ones(2, dtype=torch.complex64)
    gone = weakref.ref(first)
    alike = adapter.alike((first, second))
    assert alike is not None, (
        "this torch has no such check any more: each tensor is asked, at ten times the cost"
    )
    del first
    assert gone() is None
    plain, pair = torch.ones(3), torch.ones(2, dtype=torch.complex64)
    assert alike(plain, pair)
    assert alike(torch.ones(8)[::2], torch.ones(5, dtype=torch.complex64)), (
        "layouts and counts are looked at later"
    )
    with torch.no_grad():
        assert not alike(torch.ones(3, requires_grad=True), pair)
    with torch.inference_mode():
        made_there = torch.ones(3)
        assert not alike(made_there, pair)
    assert not alike(made_there, pair)
    assert not alike(plain, pair.conj())
    assert not alike(torch.complex(plain, plain).conj().imag, pair)
    assert not alike(torch.ones(3, dtype=torch.float64), pair)
    assert not alike(torch.ones(3, device="meta"), pair)
    assert not alike(torch.ones(3).to_sparse(), pair)
    assert not alike(torch.nn.Parameter(plain, requires_grad=False), pair), (
        "another type, which may have its own rules"
    )
    assert not alike(np.ones(3, np.float32), pair)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    assert not alike(nested, pair), "which ends the process where torch's check is given it"
    with torch.inference_mode():
        assert adapter.alike((plain, pair)) is None, (
            "it would take an inference tensor outside for such a one"
        )
    asked: list[bool] = []
    torch.vmap(lambda x: asked.append(alike(x, pair)) or x)(torch.ones(2, 3))
    torch.func.functionalize(lambda x: asked.append(alike(x, pair)))(plain)
    assert asked == [False, False]


@pytest.mark.needs("torch")
def test_a_guard_knows_only_what_its_adapter_said(own_adapters: None) -> None:
    torch = importlib.import_module("torch")
    guard, tensors = adapters_module.Guard(), [torch.ones(2), torch.ones(3)]
    find_adapter(torch.Tensor)
    assert not guard.knows(tensors)
    assert adapters_module.are_exportable(tensors, guard)
    assert guard.knows(tensors)
    assert not adapters_module.are_exportable(
        [torch.ones(2), torch.ones(3, requires_grad=True)], guard
    )
    assert guard.knows(tensors)

    class Own:
        name, immutable = "own", False

        def claims(self, kind: type) -> bool:
            return kind is torch.Tensor

        source = target = allocate_result = written = lambda self, *arguments: None

    register_adapter(Own())
    find_adapter(torch.Tensor)
    assert not guard.knows(tensors)
    assert not adapters_module.are_exportable(tensors, guard)


@pytest.mark.needs("torch")
def test_a_functional_tensor_is_called_so(alone: Any) -> None:
    """It has no address either, and was told of freed storage."""
    torch = importlib.import_module("torch")
    with pytest.raises(UnsupportedTensorError, match=r"torch\.func\.functionalize"):
        torch.func.functionalize(alone.allreduce)(torch.zeros(2))


def test_advice_for_types_of_ml_dtypes_that_were_lost(alone: Any, tmp_path: Path) -> None:
    for name, lost in (("bfloat16", "V2"), ("float8_e4m3fn", "V1")):
        kind = getattr(importlib.import_module("ml_dtypes"), name)
        np.save(tmp_path / "x.npy", np.ones(3, kind))
        array = np.load(tmp_path / "x.npy")
        with pytest.raises(
            UnsupportedDTypeError, match=rf"dtype \|{lost} .*x\.view\(ml_dtypes\.{name}\)"
        ):
            alone.broadcast(array)
        assert alone.broadcast(array.view(kind)).tolist() == [1.0] * 3


def test_an_export_without_a_device_number(alone: Any) -> None:
    """As Paddle's tensors on the host have it."""
    tensor = Exporter(np.arange(3.0), (1, None))
    assert alone.allreduce({"a": tensor})["a"] is tensor
    assert alone.broadcast(tensor) is tensor


def test_a_framework_imported_later_is_found() -> None:
    """The table is looked up by what is in sys.modules at the time of the call."""
    program = (
        "import sys; from colltensor.adapters import find_adapter\n"
        "assert find_adapter(list) is None and 'numpy' not in sys.modules\n"
        "import numpy; assert find_adapter(numpy.ndarray).name == 'numpy'"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{program}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.needs("jax")
def test_the_adapter_for_jax_may_be_loaded_while_jax_traces() -> None:
    jax, loaded = importlib.import_module("jax"), []

    def traced(x: Any) -> Any:
        loaded.append(runpy.run_module("colltensor.adapters.jax")["ADAPTER"])
        return x

    x = jax.numpy.ones(2)
    jax.jit(traced)(x)
    assert loaded[0].claims(type(x))


@pytest.mark.shm
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "complex64", "complex128"])
def test_native_copies_between_layouts(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    importlib.import_module("colltensor.gathered")
    calls = []

    def counted() -> Any:
        return lambda address: calls.append(address) or native(address)

    native = adapters_module.native_copies[0]()
    assert native is not None
    monkeypatch.setattr("colltensor.adapters.numpy.native_copies", [counted])
    memory = memory_of("cpu")
    grid = (np.arange(96 * 80 * 5) % 251 + 1).astype(dtype).reshape(96, 80, 5)
    layouts: tuple[Callable[[Any], Any], ...] = (
        lambda a: a.T,
        lambda a: a[:, ::2],
        lambda a: a[::-1],
        lambda a: a[:, :, ::-3],
        lambda a: a.transpose(1, 0, 2),
        lambda a: a[5:, 3:-3, 1],
    )
    for layout in layouts:
        wanted, whole = layout(grid), np.zeros_like(grid)
        flat, scattered = np.zeros(wanted.size, dtype), layout(whole)
        memory.copy(adapter_of(flat).target(flat), adapter_of(wanted).source(wanted))
        assert (flat == wanted.reshape(-1)).all()
        memory.copy(adapter_of(scattered).target(scattered), adapter_of(flat).source(flat))
        assert (scattered == wanted).all()
        assert np.count_nonzero(whole) == wanted.size
    assert len(calls) == 12


def read(kind: type, tensor: Any) -> list[int] | None:
    """Return what native code reads of a tensor: address, DLPack's code, bits, axes, extents, strides; None if none."""
    importlib.import_module("colltensor.gathered")
    reader = adapters_module.reader_of(kind)
    native = adapters_module.native_readers[0]()
    if native is None:
        pytest.skip("this Python has no interpreter lock, or another C API")
    assert reader, "this framework's tensors lie otherwise than native code knows them"
    words = (ctypes.c_int64 * 32)()
    return list(words) if native[1](reader, id(tensor), ctypes.addressof(words)) else None


@pytest.mark.shm
def test_native_code_reads_what_numpy_exports_and_no_more() -> None:
    find_adapter(np.ndarray)
    for dtype in DTYPES.values():
        found = numpy_dtype(dtype)
        whole = np.zeros((4, 6), found)
        if dtype.moves_only:
            assert read(np.ndarray, whole) is None
            continue
        for sample in (whole, whole.T, whole[::2, ::-3], whole[:0], whole[0, 0, ...]):
            words = read(np.ndarray, sample)
            assert words is not None, dtype
            strides = [step // sample.itemsize for step in sample.strides]
            assert words[2 : 4 + 2 * sample.ndim] == [
                8 * dtype.itemsize,
                sample.ndim,
                *sample.shape,
                *strides,
            ]
            assert words[0] == sample.ctypes.data
            if dtype.name != "bfloat16":  # which numpy does not export
                assert words[1] == {"b": 6, "i": 0, "u": 1, "f": 2, "c": 5}[dtype.kind], (
                    "DLPack's code"
                )
                assert dlpack.export(sample).data_ptr() == words[0]
    for alike in "bhilqBHILQ":
        assert read(np.ndarray, np.zeros(2, alike)) is not None
    fields = np.zeros(3, np.dtype([("a", "<i2"), ("b", "<f4")]))
    frozen = np.zeros(3)
    frozen.flags.writeable = False
    for refused in (
        fields,
        fields["b"],
        frozen,
        np.zeros(2, ">f4"),
        np.zeros(2, "U3"),
        np.zeros(2, object),
        np.zeros(2, "M8[s]"),
        np.zeros(2, np.longdouble),
    ):
        assert read(np.ndarray, refused) is None, refused.dtype


@pytest.mark.shm
@pytest.mark.needs("torch")
def test_native_code_reads_torch_tensors_by_its_exchange_api() -> None:
    torch = importlib.import_module("torch")
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has none")
    find_adapter(torch.Tensor)
    tensor = torch.zeros(4, 6)[::2, 1:]
    assert read(torch.Tensor, tensor)[:8] == [tensor.data_ptr(), 2, 32, 2, 2, 5, 12, 1]
    assert read(torch.Tensor, torch.zeros(3).to_sparse()) is None
    assert read(torch.Tensor, tensor) is not None, "no Python error stays behind"


def test_what_has_no_exchange_api_is_not_read() -> None:
    assert dlpack.exchange_reader(np.ndarray) == 0
    assert dlpack.exchange_reader(type("Own", (), {"__dlpack_c_exchange_api__": 3})) == 0


class BytearrayAdapter(col.AdapterBase):
    """What an adapter needs to have of its own."""

    name = "bytearray"

    def claims(self, kind: type) -> bool:
        return kind is bytearray

    def source(self, tensor: Any) -> col.BufferView:
        return col.BufferView.from_buffer(tensor)


@pytest.mark.usefixtures("own_adapters")
def test_a_base_has_the_rest_of_an_adapter() -> None:
    col.register_adapter(BytearrayAdapter())
    group = col.init_collective_group(1, 0, group_name="of bytes")
    try:
        given = bytearray(b"abc")
        assert group.allreduce(given) is given
    finally:
        col.destroy_collective_group("of bytes")


def test_what_a_base_cannot_know_is_asked_for() -> None:
    class Viewless(col.AdapterBase):
        name = "viewless"

        def claims(self, kind: type) -> bool:
            return False

    class Immutable(BytearrayAdapter):
        immutable = True

    for wrong, words in ((Viewless(), r"\bsource\b"), (Immutable(), "allocate_result")):
        with pytest.raises(OptionError, match=words):
            col.register_adapter(wrong)


def test_numpy_s_interface_is_looked_up_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numpy 1.26 has a package ``_core`` with other contents, once something has imported it."""
    module = importlib.import_module("colltensor.adapters.numpy")
    monkeypatch.setattr(module.np, "_core", None, raising=False)
    assert module._c_version() > 0


@pytest.mark.needs("torch")
def test_a_view_of_freed_storage_has_no_memory() -> None:
    torch = importlib.import_module("torch")
    whole = torch.ones(20)
    part = whole[10:]
    whole.untyped_storage().resize_(0)
    assert part.data_ptr() != 0  # the offset
    with pytest.raises(UnsupportedTensorError, match=r"resize_\(0\)"):
        find_adapter(torch.Tensor).source(part)  # type: ignore[union-attr]
