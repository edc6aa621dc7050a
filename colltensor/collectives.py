"""The functional API: finds the group by its name and calls its method of the same name.

Names and argument order are ``ray.util.collective``'s. Tensors, results and errors are described
at ``Group``; every function raises GroupError where this process has no group of that name.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from colltensor import backends
from colltensor.arguments import first_elements
from colltensor.errors import BackendUnavailableError, OptionError
from colltensor.group import Group
from colltensor.table import all_groups, find_group, is_group_initialized
from colltensor.types import ReduceOp

if TYPE_CHECKING:
    from colltensor.ray.declare import CollectiveGroup


def allreduce(
    tensor: Any,
    group_name: str = "default",
    op: ReduceOp = ReduceOp.SUM,
    *,
    async_op: bool = False,
    donate: bool = False,
    copy: bool | None = None,
) -> Any:
    """Combine the tensors of all ranks elementwise, in place; see ``Group.allreduce``."""
    return find_group(group_name).allreduce(tensor, op, async_op=async_op, donate=donate, copy=copy)


def reduce(
    tensor: Any,
    dst_rank: int = 0,
    group_name: str = "default",
    op: ReduceOp = ReduceOp.SUM,
    *,
    async_op: bool = False,
    donate: bool = False,
    copy: bool | None = None,
) -> Any:
    """Combine the tensors of all ranks into rank ``dst_rank``'s; see ``Group.reduce``."""
    return find_group(group_name).reduce(
        tensor, dst_rank, op, async_op=async_op, donate=donate, copy=copy
    )


def scan(
    tensor: Any,
    group_name: str = "default",
    op: ReduceOp = ReduceOp.SUM,
    *,
    async_op: bool = False,
    donate: bool = False,
    copy: bool | None = None,
) -> Any:
    """Combine the tensors of ranks 0 to this one, in rank order; see ``Group.scan``."""
    return find_group(group_name).scan(tensor, op, async_op=async_op, donate=donate, copy=copy)


def broadcast(
    tensor: Any,
    src_rank: int = 0,
    group_name: str = "default",
    *,
    async_op: bool = False,
    donate: bool = False,
    copy: bool | None = None,
) -> Any:
    """Copy rank ``src_rank``'s elements to all ranks; see ``Group.broadcast``."""
    return find_group(group_name).broadcast(
        tensor, src_rank, async_op=async_op, donate=donate, copy=copy
    )


def allgather(
    tensor_list: Any,
    tensor: Any,
    group_name: str = "default",
    *,
    async_op: bool = False,
    copy: bool | None = None,
) -> Any:
    """Copy every ``tensor`` into ``tensor_list`` on ``dst_rank``; see ``Group.gather``."""
    return find_group(group_name).allgather(tensor_list, tensor, async_op=async_op, copy=copy)


def reducescatter(
    tensor: Any,
    tensor_list: Any,
    group_name: str = "default",
    op: ReduceOp = ReduceOp.SUM,
    *,
    async_op: bool = False,
    donate: bool = False,
    copy: bool | None = None,
) -> Any:
    """Combine all lists' entry ``r`` into rank ``r``'s ``tensor``; see ``Group.reducescatter``."""
    return find_group(group_name).reducescatter(
        tensor, tensor_list, op, async_op=async_op, donate=donate, copy=copy
    )


def gather(
    tensor_list: Any,
    tensor: Any,
    dst_rank: int = 0,
    group_name: str = "default",
    *,
    async_op: bool = False,
    copy: bool | None = None,
) -> Any:
    """Copy every ``tensor`` into ``tensor_list`` on ``dst_rank``; see ``Group.gather``."""
    return find_group(group_name).gather(
        tensor_list, tensor, dst_rank, async_op=async_op, copy=copy
    )


def scatter(
    tensor: Any,
    tensor_list: Any = None,
    src_rank: int = 0,
    group_name: str = "default",
    *,
    async_op: bool = False,
    donate: bool = False,
    copy: bool | None = None,
) -> Any:
    """Copy ``src_rank``'s entry ``r`` into rank ``r``'s ``tensor``; see ``Group.scatter``."""
    return find_group(group_name).scatter(
        tensor, tensor_list, src_rank, async_op=async_op, donate=donate, copy=copy
    )


def alltoall(
    output_list: Any,
    input_list: Any,
    group_name: str = "default",
    *,
    async_op: bool = False,
    copy: bool | None = None,
) -> Any:
    """Send entry ``r`` of ``input_list`` to rank ``r``; see ``Group.alltoall``."""
    return find_group(group_name).alltoall(output_list, input_list, async_op=async_op, copy=copy)


def send(
    tensor: Any,
    dst_rank: int,
    group_name: str = "default",
    *,
    async_op: bool = False,
    copy: bool | None = None,
) -> Any:
    """Send a tensor to rank ``dst_rank``; see ``Group.send``."""
    return find_group(group_name).send(tensor, dst_rank, async_op=async_op, copy=copy)


def recv(
    tensor: Any,
    src_rank: int,
    group_name: str = "default",
    *,
    async_op: bool = False,
    donate: bool = False,
    copy: bool | None = None,
) -> Any:
    """Receive a tensor from rank ``src_rank``; see ``Group.recv``."""
    return find_group(group_name).recv(
        tensor, src_rank, async_op=async_op, donate=donate, copy=copy
    )


def sendrecv(
    send_tensor: Any,
    dst_rank: int,
    recv_tensor: Any,
    src_rank: int,
    group_name: str = "default",
    *,
    async_op: bool = False,
    donate: bool = False,
    copy: bool | None = None,
) -> Any:
    """Send to ``dst_rank`` and receive from ``src_rank`` at once; see ``Group.sendrecv``."""
    return find_group(group_name).sendrecv(
        send_tensor, dst_rank, recv_tensor, src_rank, async_op=async_op, donate=donate, copy=copy
    )


def barrier(group_name: str = "default", *, async_op: bool = False) -> Any:
    """Return when all ranks have called."""
    return find_group(group_name).barrier(async_op=async_op)


def broadcast_object(obj: Any = None, src_rank: int = 0, group_name: str = "default") -> Any:
    """Return rank ``src_rank``'s ``obj`` on every rank; see ``Group.broadcast_object``."""
    return find_group(group_name).broadcast_object(obj, src_rank)


def allgather_object(obj: Any, group_name: str = "default") -> list[Any]:
    """Return all ranks' ``obj`` on every rank; see ``Group.allgather_object``."""
    return find_group(group_name).allgather_object(obj)


def allreduce_multigpu(
    tensor_list: list[Any], group_name: str = "default", op: ReduceOp = ReduceOp.SUM
) -> Any:
    """As ``allreduce`` over every process's list of one tensor a GPU; see ``Group.multigpu``."""
    group = find_group(group_name)
    if _is_one(tensor_list):
        return [group.allreduce(tensor_list[0], op)]
    return group.multigpu.allreduce(tensor_list, op)


def reduce_multigpu(
    tensor_list: list[Any],
    dst_rank: int = 0,
    dst_tensor: int = 0,
    group_name: str = "default",
    op: ReduceOp = ReduceOp.SUM,
) -> Any:
    """As ``reduce`` into entry ``dst_tensor`` of rank ``dst_rank``'s list."""
    group = find_group(group_name)
    if _is_one(tensor_list) and dst_tensor == 0:
        return [group.reduce(tensor_list[0], dst_rank, op)]
    return group.multigpu.reduce(tensor_list, dst_rank, dst_tensor, op)


def broadcast_multigpu(
    tensor_list: list[Any], src_rank: int = 0, src_tensor: int = 0, group_name: str = "default"
) -> Any:
    """As ``broadcast`` from entry ``src_tensor`` of rank ``src_rank``'s list."""
    group = find_group(group_name)
    if _is_one(tensor_list) and src_tensor == 0:
        return [group.broadcast(tensor_list[0], src_rank)]
    return group.multigpu.broadcast(tensor_list, src_rank, src_tensor)


def allgather_multigpu(
    output_tensor_lists: list[Any], input_tensor_list: list[Any], group_name: str = "default"
) -> Any:
    """As ``allgather`` with one list of outputs and one input a GPU."""
    group = find_group(group_name)
    if _is_one(input_tensor_list) and _is_one(output_tensor_lists):
        return [group.allgather(output_tensor_lists[0], input_tensor_list[0])]
    return group.multigpu.allgather(output_tensor_lists, input_tensor_list)


def reducescatter_multigpu(
    output_tensor_list: list[Any],
    input_tensor_lists: list[Any],
    group_name: str = "default",
    op: ReduceOp = ReduceOp.SUM,
) -> Any:
    """As ``reducescatter`` with one output and one list of inputs a GPU."""
    group = find_group(group_name)
    if _is_one(output_tensor_list) and _is_one(input_tensor_lists):
        return [group.reducescatter(output_tensor_list[0], input_tensor_lists[0], op)]
    return group.multigpu.reducescatter(output_tensor_list, input_tensor_lists, op)


def send_multigpu(
    tensor: Any, dst_rank: int, dst_gpu_index: int, group_name: str = "default", n_elements: int = 0
) -> Any:
    """As ``send`` of the first ``n_elements`` (0: all), whichever GPU ``dst_rank`` receives on."""
    _index("send_multigpu", "dst_gpu_index", dst_gpu_index)
    return send(first_elements("send_multigpu", tensor, n_elements), dst_rank, group_name)


def recv_multigpu(
    tensor: Any, src_rank: int, src_gpu_index: int, group_name: str = "default", n_elements: int = 0
) -> Any:
    """As ``recv`` into the first ``n_elements`` (0: all), whichever GPU ``src_rank`` sends from."""
    _index("recv_multigpu", "src_gpu_index", src_gpu_index)
    return recv(first_elements("recv_multigpu", tensor, n_elements), src_rank, group_name)


def synchronize(gpu_id: int) -> None:
    """Return, on the host, when all collectives that this process has queued on a GPU are done.

    Args:
        gpu_id: The index of the GPU.

    Raises:
        CollectiveError: One of them failed, in any of the process's groups.
        BackendUnavailableError: There is no NCCL here.
    """
    reason = backends.reason("nccl")
    if reason is not None:
        raise BackendUnavailableError(f"synchronize: gpu_id {gpu_id}: {reason}")
    _index("synchronize", "gpu_id", gpu_id)
    for group in all_groups():
        group.synchronize(gpu_id)


def get_rank(group_name: str = "default") -> int:
    """Return this process's rank in the group, or -1 where it is not in it."""
    return find_group(group_name).rank if is_group_initialized(group_name) else -1


def get_collective_group_size(group_name: str = "default") -> int:
    """Return the group's number of ranks, or -1 where this process is not in it."""
    return find_group(group_name).world_size if is_group_initialized(group_name) else -1


def get_group_handle(group_name: str = "default") -> Group:
    """Return the ``Group`` of this name."""
    return find_group(group_name)


def nccl_available() -> bool:
    """Return True if the NCCL backend can be used here."""
    return is_backend_available("nccl")


def gloo_available() -> bool:
    """Return True if the Gloo backend can be used here."""
    return is_backend_available("gloo")


def is_backend_available(backend: str) -> bool:
    """Return True if this backend can be used here; ``backend_unavailable_reason`` says why not."""
    return backends.is_available(str(backend).lower())


def backend_unavailable_reason(backend: str) -> str | None:
    """Return why a backend cannot be used here and what to install, or None if it can."""
    return backends.reason(str(backend).lower())


def create_collective_group(
    actors: Sequence[Any],
    world_size: int | None = None,
    ranks: Sequence[int] | None = None,
    backend: str = "auto",
    group_name: str = "default",
    gloo_timeout: float | None = None,
    *,
    timeout_s: float = 30.0,
    interface: str | None = None,
    provider: str | None = None,
    check: bool = False,
) -> CollectiveGroup:
    """Make a group of Ray actors; see ``colltensor.ray.create_collective_group``."""
    arguments = locals()
    declare = importlib.import_module("colltensor.ray.declare")
    group: CollectiveGroup = declare.create_collective_group(**arguments)
    return group


def collective_group(
    actors: Sequence[Any],
    backend: str = "auto",
    group_name: str | None = "default",
    *,
    ranks: Sequence[int] | None = None,
    timeout_s: float = 30.0,
    interface: str | None = None,
    provider: str | None = None,
    check: bool = False,
) -> CollectiveGroup:
    """Make a group of Ray actors for a ``with`` block; see ``colltensor.ray.collective_group``."""
    arguments = locals()
    declare = importlib.import_module("colltensor.ray.declare")
    group: CollectiveGroup = declare.collective_group(**arguments)
    return group


def _is_one(tensor_list: Any) -> bool:
    return isinstance(tensor_list, (list, tuple)) and len(tensor_list) == 1


def _index(operation: str, argument: str, value: Any) -> None:
    if not isinstance(value, int) or value < 0:
        raise OptionError(f"{operation}: {argument}: expected the index of a GPU, got {value!r}")
