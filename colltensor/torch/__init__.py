"""For torch users only. Imports torch; nothing outside this folder imports it, unless by name.

``sync_gradients`` keeps the gradients of one's own training loop in step. The collectives here
return new tensors, and autograd differentiates them. (The package's own work in place, and autograd
does not see them.) Importing this registers the backend ``colltensor`` with torch.distributed.
"""

from __future__ import annotations

from colltensor.torch.buckets import Bucket
from colltensor.torch.c10d import register
from colltensor.torch.collectives import (
    allgather,
    allreduce,
    alltoall,
    broadcast,
    gather,
    recv,
    reduce,
    reducescatter,
    scatter,
    send,
)
from colltensor.torch.compression import Compression
from colltensor.torch.gradients import GradientSync, sync_gradients
from colltensor.torch.powersgd import PowerSGD
from colltensor.untraced import keep_compilers_out

__all__ = [
    "Bucket",
    "Compression",
    "GradientSync",
    "PowerSGD",
    "allgather",
    "allreduce",
    "alltoall",
    "broadcast",
    "gather",
    "recv",
    "reduce",
    "reducescatter",
    "scatter",
    "send",
    "sync_gradients",
]

register()
keep_compilers_out()
