"""Actors whose module registers the transport, as every process that imports the module must."""

from __future__ import annotations

import os

import numpy as np
import ray

import colltensor.ray

colltensor.ray.register_tensor_transports(["numpy"])


class Counter:
    """Returns arrays by the transport that its class names."""

    def pid(self) -> int:
        return os.getpid()

    @ray.method(tensor_transport="COLLTENSOR_NUMPY")
    def count(self, end: int) -> colltensor.ray.NumpyArray:
        return colltensor.ray.NumpyArray(np.arange(end))
