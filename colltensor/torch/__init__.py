"""For torch users only. Imports torch; nothing outside this folder imports it but by name, when it is needed."""

from __future__ import annotations

from colltensor.torch.buckets import Bucket
from colltensor.torch.compression import Compression
from colltensor.torch.gradients import GradientSync, sync_gradients
from colltensor.torch.powersgd import PowerSGD

__all__ = ["Bucket", "Compression", "GradientSync", "PowerSGD", "sync_gradients"]
