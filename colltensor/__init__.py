"""ColTensor: collective communication for the arrays of every Python framework, in Ray workers and outside them.

``import colltensor as col`` stands in for ``import ray.util.collective as col``. Importing it loads
no array framework and no ray.
"""

from colltensor.adapters import register_adapter
from colltensor.backends import register_backend
from colltensor.collectives import (
    allgather,
    allgather_multigpu,
    allgather_object,
    allreduce,
    allreduce_multigpu,
    alltoall,
    backend_unavailable_reason,
    barrier,
    broadcast,
    broadcast_multigpu,
    broadcast_object,
    collective_group,
    create_collective_group,
    gather,
    get_collective_group_size,
    get_group_handle,
    get_rank,
    gloo_available,
    is_backend_available,
    nccl_available,
    recv,
    recv_multigpu,
    reduce,
    reduce_multigpu,
    reducescatter,
    reducescatter_multigpu,
    scatter,
    send,
    send_multigpu,
    sendrecv,
    synchronize,
)
from colltensor.errors import (
    AliasError,
    BackendUnavailableError,
    CollectiveError,
    CollectiveTimeoutError,
    DeviceError,
    GroupError,
    MismatchError,
    OptionError,
    PeerLostError,
    RankError,
    ReadOnlyError,
    ShapeError,
    TensorError,
    UnsupportedDTypeError,
    UnsupportedTensorError,
)
from colltensor.group import Group
from colltensor.observers import Operation, add_observer, remove_observer
from colltensor.table import destroy_collective_group, init_collective_group, is_group_initialized
from colltensor.types import Device, DType, ReduceOp
from colltensor.view import BufferView
from colltensor.work import Work

__version__ = "0.1.0"

__all__ = [
    "AliasError", "BackendUnavailableError", "BufferView", "CollectiveError", "CollectiveTimeoutError", "DType",
    "Device", "DeviceError", "Group", "GroupError", "MismatchError", "Operation", "OptionError", "PeerLostError",
    "RankError", "ReadOnlyError", "ReduceOp", "ShapeError", "TensorError", "UnsupportedDTypeError",
    "UnsupportedTensorError", "Work", "add_observer", "allgather", "allgather_multigpu", "allgather_object",
    "allreduce", "allreduce_multigpu", "alltoall", "backend_unavailable_reason", "barrier", "broadcast",
    "broadcast_multigpu", "broadcast_object", "collective_group", "create_collective_group", "destroy_collective_group",
    "gather", "get_collective_group_size", "get_group_handle", "get_rank", "gloo_available", "init_collective_group",
    "is_backend_available", "is_group_initialized", "nccl_available", "recv", "recv_multigpu", "reduce",
    "reduce_multigpu", "reducescatter", "reducescatter_multigpu", "register_adapter", "register_backend",
    "remove_observer", "scatter", "send", "send_multigpu", "sendrecv", "synchronize",
]
