"""What shows whether anything works at all.

Imports, one rank, every library's arrays in place, one jitted function.
"""

from __future__ import annotations

import filecmp
import importlib
import re
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from child import ROOT, Channel, SkippedError
from gpu_arrays import DeviceSample, expected_of
from gpu_streams import shared_group
from oracle import reduced
from samples import dense

COUNT = 5003
LARGE = 1 << 20
_DISTRIBUTIONS = (
    "colltensor", "torch", "cupy-cuda13x", "cupy-cuda12x", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin",
    "jax-tvm-ffi", "apache-tvm-ffi", "optree", "numpy", "ml_dtypes", "nvidia-nccl-cu13", "nvidia-nccl-cu12", "pytest",
    "pytest-timeout",
)  # fmt: skip


def imports(*, channel: Channel, folder: Path, cpu: bool) -> str:
    """Import what all else needs; returns how long each took.

    One that cannot be imported does not hide the others.
    """
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    took, broken = [], []
    for name in ("colltensor", *(() if cpu else ("torch", "cupy", "jax", "jax_tvm_ffi"))):
        began = time.monotonic()
        try:
            module = importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - whatever an import raises is the result
            broken.append(f"{name}: {type(error).__name__}: {error}")
        else:
            took.append(f"{name} {time.monotonic() - began:.1f} s")
            found[f"{name} from"] = str(getattr(module, "__file__", ""))
    channel.facts(**found)
    if not cpu and not broken:
        torch, runtime = (
            importlib.import_module("torch"),
            importlib.import_module("cupy.cuda.runtime"),
        )
        card = torch.cuda.get_device_properties(0)
        channel.facts(
            device=f"{card.name}, {card.total_memory >> 20} MiB, {torch.cuda.device_count()} devices",
            cuda=f"torch {torch.version.cuda}, CuPy {runtime.runtimeGetVersion()}, driver {runtime.driverGetVersion()}",
        )
    backends = importlib.import_module("colltensor.backends")
    channel.facts(
        **{
            f"backend {name}": backends.reason(name) or "can be used"
            for name in ("nccl", "shm", "gloo")
        }
    )
    assert not broken, "; ".join(broken)
    return ", ".join(took)


def available() -> None:
    """Check that nothing is missing for NCCL."""
    reason = importlib.import_module("colltensor").backend_unavailable_reason("nccl")
    assert reason is None, reason


def native() -> None:
    """Check that this C library can load the native one, which jitted collectives need."""
    reason = importlib.import_module("colltensor.backends").reason("shm")
    assert reason is None, reason


def same_sources() -> str:
    """Check that the package in use, a wheel's say, is that of the checkout under test."""
    used = Path(importlib.import_module("colltensor").__file__ or "").parent
    ours = {path.relative_to(ROOT / "colltensor"): path for path in ROOT.glob("colltensor/**/*.py")}
    same = {
        name
        for name, path in ours.items()
        if (used / name).is_file() and filecmp.cmp(path, used / name, False)
    }
    other = ", ".join(sorted(map(str, set(ours) - same)))
    assert not other, f"gather the wheels again: in {used} these are missing, or others: {other}"
    return f"{len(ours)} files in {used}"


def in_place(library: str) -> str:
    """Allreduce an array of one library: right values at the address that it had.

    Returns how long the first took.
    """
    group = shared_group(1)
    values = reduced("float32", COUNT, 0)
    sample = DeviceSample(library, "float32", dense(COUNT), values)
    began = time.monotonic()
    result = group.allreduce(sample.tensor)
    took = time.monotonic() - began
    sample.check_result(result, *expected_of("float32", "SUM", [values]))
    return f"the first call {took * 1e3:.0f} ms"


def donated() -> None:
    """Allreduce a donated JAX array: its memory is the result's."""
    importlib.import_module("gpu_cases").run(0, 1, "donations", ("jax",))


def libnccl(*, channel: Channel, folder: Path, cpu: bool) -> str:
    """Return NCCL's version, and this process's libraries of that name: it should be one."""
    if cpu:
        raise SkippedError("there is none on a fake device")
    number = importlib.import_module("cupy.cuda.nccl").get_version()
    # As soon as JAX has a device it may load one of its own.
    importlib.import_module("jax").devices()
    loaded = sorted(set(re.findall(r"\S+/libnccl\S*", Path("/proc/self/maps").read_text())))
    channel.facts(nccl=number, libnccl=loaded)
    return f"{number}: {', '.join(loaded)}"


def memory_of_a_large_call() -> str:
    """Allreduce 1 GiB in place; returns by how much the device's free memory fell meanwhile."""
    streams = importlib.import_module("test_gpu_streams")
    peak = streams.peak_of_a_large_call(0, 1)
    assert peak < streams.GIB // 4, f"{peak >> 20} MiB"
    return f"{peak >> 20} MiB"


def one_jitted() -> str:
    """Allreduce inside ``jax.jit``; returns how long compiling and the first call took."""
    jit = importlib.import_module("test_gpu_jit")
    jax, jnp, cj = jit._jax()
    group = shared_group(1)
    step: Any = jax.jit(lambda a: cj.allreduce(2 * a, group) + 1)
    began = time.monotonic()
    y = step(jnp.full(LARGE, 3.0)).block_until_ready()
    took = time.monotonic() - began
    np.testing.assert_array_equal(np.asarray(y), 7.0)
    assert y.devices() == {jax.devices()[0]}
    return f"compiled and called in {took:.2f} s"
