"""What the tests of JAX on CUDA devices share: modules, values, and a rank that calls the target as XLA would."""

from __future__ import annotations

import importlib
from typing import Any

import device
import numpy as np

from colltensor import ReduceOp
from colltensor.group import Group
from colltensor.operations import NATIVE
from colltensor.types import DTYPES

COUNT = 12
NO_OP, NO_RANK = 255, -1
SUM = int(ReduceOp.SUM)


def jax_modules() -> tuple[Any, Any, Any]:
    """Return jax, jax.numpy and colltensor.jax."""
    jax = importlib.import_module("jax")
    return jax, jax.numpy, importlib.import_module("colltensor.jax")


def inside(name: str) -> Any:
    """Return a module of colltensor.jax's own."""
    return importlib.import_module(f"colltensor.jax._{name}")


def given(rank: int, shape: tuple[int, ...] = (COUNT,), dtype: str = "float32") -> Any:
    numbers = np.arange(int(np.prod(shape))).reshape(shape) % 7 + 10 * rank + 1
    return numbers.astype(np.dtype(getattr(importlib.import_module("ml_dtypes"), dtype, dtype)))


class Rank:
    """One rank's side of fast calls of the target: its stream, and what the memory of a call is."""

    def __init__(self, group: Group, machine: device.Machine) -> None:
        self.group = group
        self.machine = machine
        self.stream = device.new_stream(machine)
        self.number = inside("groups").number_of(group)

    def write(self, values: Any) -> Any:
        """Return memory that gets its values only when the stream comes to them, over other ones until then."""
        memory = np.full_like(values, 77)
        self.machine.kept.append(memory)
        self.machine.queue(self.stream, lambda: memory.__setitem__(..., values))
        return memory

    def call(
        self,
        name: str,
        operand: Any,
        result: Any,
        *,
        op: int = NO_OP,
        root: int = NO_RANK,
        source: int = NO_RANK,
        dtype: str | None = None,
    ) -> None:
        self.machine.kept += [operand, result]
        inside("targets").queue(
            self.number,
            DTYPES[dtype or str(operand.dtype)].code,
            NATIVE[name],
            op,
            root,
            source,
            self.stream,
            0,
            operand.ctypes.data,
            operand.nbytes,
            result.ctypes.data,
            result.nbytes,
        )

    def later(self, memory: Any) -> list[Any]:
        """Queue reading memory."""
        found: list[Any] = []
        self.machine.queue(self.stream, lambda: found.append(memory.copy()))
        return found

    def read(self, memory: Any) -> Any:
        found = self.later(memory)
        self.machine.synchronize(self.stream)
        return found[0]
