"""The nccl backend where there is no GPU: what is missing is said, and nothing is imported to say it."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from typing import Any

import device
import numpy as np
import pytest

import colltensor as col
from colltensor import ReduceOp
from colltensor.backends.nccl import reductions
from colltensor.types import DTYPES, Device
from colltensor.view import BufferView


def _is_missing() -> bool:
    return not col.is_backend_available("nccl")


@pytest.mark.skipif(not _is_missing(), reason="there is a GPU, where nothing is missing")
class TestWithoutGpu:
    """Import, availability, errors."""

    def test_the_reason_says_what_to_do(self) -> None:
        assert col.nccl_available() is False
        reason = col.backend_unavailable_reason("nccl")
        assert reason is not None
        assert any(word in reason for word in ("pip install", "driver", "CUDA"))

    def test_a_group_cannot_be_made(self) -> None:
        with pytest.raises(col.BackendUnavailableError, match="nccl") as caught:
            col.init_collective_group(
                2, 0, "nccl", "without a gpu", init_method="tcp://127.0.0.1:1"
            )
        assert str(col.backend_unavailable_reason("nccl")) in str(caught.value)
        assert not col.is_group_initialized("without a gpu")

    def test_synchronize_says_why(self) -> None:
        with pytest.raises(col.BackendUnavailableError, match="gpu_id 0"):
            col.synchronize(0)

    def test_the_package_does_not_import_cupy_to_look(self) -> None:
        code = (
            "import sys, colltensor; import colltensor.backends.nccl.backend; "
            "sys.exit('cupy' in sys.modules or 'numpy' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


class TestElements:
    """Data types and reduce ops as NCCL has them."""

    def test_every_pair_is_spelt_or_refused(self) -> None:
        for dtype in DTYPES.values():
            for op in ReduceOp:
                refused = None
                try:
                    reductions.require("allreduce", dtype, op)
                except col.UnsupportedDTypeError as error:
                    refused = str(error)
                if refused is None:
                    assert reductions.reduction(dtype, op) is not None
                else:
                    assert dtype.name in refused

    def test_moves_take_everything(self) -> None:
        for dtype in DTYPES.values():
            reductions.require("broadcast", dtype, None)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    def test_keys_keep_order_and_values(self, dtype: str) -> None:
        way = reductions.order_encoding(DTYPES[dtype])
        limits = np.iinfo(way.bits.name)
        random = np.random.default_rng(3)
        bits = (
            np.arange(1 << 16, dtype=np.uint16).view(np.int16)
            if way.bits.itemsize == 2
            else (random.integers(limits.min, limits.max, 20_000, way.bits.name, endpoint=True))
        )
        bits = np.concatenate([bits, _bits(np.array([0.0, -0.0, np.inf, -np.inf]), dtype)])
        bits = bits[~np.isnan(_floats(bits, dtype))]
        for op in (ReduceOp.MIN, ReduceOp.MAX):
            keys = device.keys_of(bits.astype(way.keys.name), way.mask, way.infinity, way.nan(op))
            np.testing.assert_array_equal(device.bits_of(keys, way.mask), bits)
            floats = _floats(bits[np.argsort(keys, kind="stable")], dtype)
            assert (floats[1:] >= floats[:-1]).all()

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    def test_nan_is_least_for_min_and_greatest_for_max(self, dtype: str) -> None:
        way = reductions.order_encoding(DTYPES[dtype])
        bits = _bits(np.array([np.nan, -np.nan, np.inf, -np.inf, 0]), dtype).astype(way.keys.name)
        for op, found in ((ReduceOp.MAX, np.max), (ReduceOp.MIN, np.min)):
            keys = device.keys_of(bits, way.mask, way.infinity, way.nan(op))
            assert keys[0] == keys[1] == found(keys) != found(keys[2:])
            again = _floats(device.bits_of(keys, way.mask).astype(way.bits.name), dtype)
            np.testing.assert_array_equal(again, [np.nan, np.nan, np.inf, -np.inf, 0])


def _bits(floats: np.ndarray, dtype: str) -> np.ndarray:
    """Return the bits of float64 values as a float type has them, as signed integers; bfloat16's are exact here."""
    if dtype == "bfloat16":
        return (floats.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.int16)
    return floats.astype(dtype).view(f"int{8 * np.dtype(dtype).itemsize}")


def _floats(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Undo ``_bits``."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        return _widened(bits, dtype)


def _widened(bits: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(dtype).astype(np.float64)


def _need_libnccl() -> None:
    if not importlib.import_module("cupy.cuda.nccl").available:
        pytest.skip(
            "CuPy finds no libnccl (300 MB, which only `nox -s gpu` installs) and has no NCCL without it"
        )


@pytest.mark.needs("cupy")
class TestWithCupy:
    """What can be seen of CuPy's side without a GPU."""

    @pytest.mark.parametrize("status", [1, 6, 7, 8])
    def test_what_a_failed_call_raises_is_known_as_an_error(self, status: int) -> None:
        _need_libnccl()
        driver = importlib.import_module("colltensor.backends.nccl.driver").CupyDriver
        nccl = importlib.import_module("cupy.cuda.nccl")
        with pytest.raises(driver.error):
            nccl.check_status(status)

    @pytest.mark.parametrize(
        "module", ["colltensor.backends.nccl.driver", "colltensor.adapters.cupy"]
    )
    def test_the_object_of_a_stream_is_made_once_and_does_not_warn(self, module: str) -> None:
        if module.endswith("driver"):
            _need_libnccl()
        stream = importlib.import_module(module)._stream
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert stream(12345, 0) is stream(12345, 0)
            assert (stream(12345, 0).ptr, stream(12345, 0).device_id) == (12345, 0)

    @pytest.mark.parametrize("dtype", sorted(DTYPES))
    def test_every_type_can_be_packed(self, dtype: str) -> None:
        adapter = importlib.import_module("colltensor.adapters.cupy")
        size = DTYPES[dtype].itemsize
        view = BufferView.from_address(
            4096, (6,), DTYPES[dtype], device=Device("cuda", 0), owner=self
        )
        array = adapter.device_array(view)
        assert (array.itemsize, array.shape, array.data.ptr) == (size, (6,), 4096)
        assert array.dtype.name in ("uint8", "uint16", "uint32", "uint64", "complex128")


class TestDriver:
    """What CuPy says, as the backend understands it."""

    @pytest.fixture
    def driver(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not importlib.import_module("cupy.cuda.nccl").available:
                pytest.skip("CuPy finds no libnccl: pip install nvidia-nccl-cu13")
        return importlib.import_module("colltensor.backends.nccl.driver").CupyDriver()

    @pytest.mark.needs("cupy")
    def test_an_error_that_stays_is_raised(
        self, driver: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runtime = importlib.import_module("cupy.cuda.runtime")
        for status in (0, 600, 900):  # done, not ready, not while another thread captures
            monkeypatch.setattr(runtime, "eventQuery", lambda event, status=status: status)
            driver.check(1)
        monkeypatch.setattr(runtime, "eventQuery", lambda event: 700)
        with pytest.raises(RuntimeError, match="cudaErrorIllegalAddress"):
            driver.check(1)
        assert driver.done(1) is False

    @pytest.mark.needs("cupy")
    def test_a_driver_that_cannot_be_asked_ends_no_watcher(
        self, driver: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []

        def missing(name: str) -> None:
            asked.append(name)
            raise OSError(f"{name}: cannot open shared object file")

        monkeypatch.setattr(importlib.import_module("ctypes"), "CDLL", missing)
        driver.mind_own_captures()
        assert asked == ["libcuda.so.1"]

    @pytest.mark.needs("cupy")
    def test_the_default_stream_beside_a_capture(
        self, driver: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runtime = importlib.import_module("cupy.cuda.runtime")
        status = 906  # cudaErrorStreamCaptureImplicit

        def refuse(stream: int) -> bool:
            raise runtime.CUDARuntimeError(status)

        monkeypatch.setattr(runtime, "streamIsCapturing", refuse)
        assert driver.capturing(1) is True
        status = 700
        with pytest.raises(RuntimeError, match="cudaErrorIllegalAddress"):
            driver.capturing(1)

    @pytest.mark.needs("cupy")
    def test_a_communicator_in_progress_has_no_error(self, driver: Any) -> None:
        nccl = importlib.import_module("cupy.cuda.nccl")

        class Communicator:
            def __init__(self, error: Exception | None) -> None:
                self.error = error

            def check_async_error(self) -> None:
                if self.error is not None:
                    raise self.error

        assert driver.error_of(Communicator(None)) is None
        # CuPy's way to say ncclInProgress
        assert driver.error_of(Communicator(KeyError(7))) is None
        for error in (KeyError(8), nccl.NcclError(6)):
            assert driver.error_of(Communicator(error)) is error

    @pytest.mark.needs("cupy")
    def test_a_group_of_calls_that_an_interrupt_left_open_is_closed(
        self, driver: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nccl = importlib.import_module("cupy.cuda.nccl")
        said: list[str] = []
        monkeypatch.setattr(nccl, "groupStart", lambda: said.append("start"))
        monkeypatch.setattr(nccl, "groupEnd", lambda: said.append("end"))
        with driver.together():
            pass
        driver.ungroup()
        assert said == ["start", "end"]
        with pytest.raises(KeyboardInterrupt), driver.together():
            raise KeyboardInterrupt
        assert said == ["start", "end", "start"]
        driver.ungroup()
        driver.ungroup()
        assert said == ["start", "end", "start", "end"]
