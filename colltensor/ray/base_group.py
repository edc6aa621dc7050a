"""What ``ray.util.collective`` calls: our groups behind the methods of Ray's ``BaseGroup``."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Final

from ray.util.collective import types as ray_types
from ray.util.collective.collective_group.base_collective_group import BaseGroup

from colltensor import backends, table
from colltensor.arguments import first_elements
from colltensor.errors import OptionError
from colltensor.types import ReduceOp

options: Final[dict[str, Any]] = {}
"""What ``register`` was told."""

_UNSET: Final = getattr(ray_types, "unset_timeout_ms", None)


class RayGroup(BaseGroup):  # type: ignore[misc]  # Ray's types are not looked into
    """One group of ranks, made and used by ``ray.util.collective``.

    Every rank calls, as for ``Group``. Ray's functions hand over lists with one tensor a device and
    an object of options. ``ray.util.collective.get_group_handle()`` returns this object. Its holder
    may pass a tensor of any framework, or a pytree, in place of such a list, and leave the options
    out. Every method returns the same as ``Group``'s, in a list where it was given a list. JAX
    arrays are immutable, so use the returned ones.

    Attributes:
        group: The ``Group``, which has all collectives and their options; ``colltensor`` finds it
            by its name, too.
    """

    transport: ClassVar[str] = "auto"

    def __init__(self, world_size: int, rank: int, group_name: str) -> None:
        super().__init__(world_size, rank, group_name)
        self.group = table.init_collective_group(
            world_size, rank, self.transport, group_name, **options
        )

    def destroy_group(self) -> None:
        """Leave the group; waits for no other rank."""
        self.group.destroy()

    @classmethod
    def backend(cls) -> str:
        """Return the name under which Ray has this class."""
        return "COLLTENSOR" if cls.transport == "auto" else f"COLLTENSOR_{cls.transport.upper()}"

    @classmethod
    def check_backend_availability(cls) -> bool:
        """Return whether groups can be made here; ``backend_unavailable_reason`` says why not."""
        return cls.transport == "auto" or backends.is_available(cls.transport)

    def allreduce(self, tensor: Any, allreduce_options: Any = None) -> Any:
        """Combine the tensors of all ranks, in place."""
        op = _option("allreduce", allreduce_options, "reduceOp", ReduceOp.SUM)
        if not isinstance(tensor, list):
            return self.group.allreduce(tensor, op)
        if _is_one(tensor):
            return [self.group.allreduce(tensor[0], op)]
        return self.group.multigpu.allreduce(tensor, op)

    def barrier(self, barrier_options: Any = None) -> None:
        """Return when all ranks have called."""
        _option("barrier", barrier_options, "timeout_ms", _UNSET)
        self.group.barrier()

    def reduce(self, tensor: Any, reduce_options: Any = None) -> Any:
        """Combine the tensors of all ranks into the root's; the others stay as they were."""
        op = _option("reduce", reduce_options, "reduceOp", ReduceOp.SUM)
        root = _option("reduce", reduce_options, "root_rank", 0)
        index = _option("reduce", reduce_options, "root_tensor", 0)
        if not isinstance(tensor, list):
            return self.group.reduce(tensor, root, op)
        if _is_one(tensor) and index == 0:
            return [self.group.reduce(tensor[0], root, op)]
        return self.group.multigpu.reduce(tensor, root, index, op)

    def allgather(self, tensor_list: Any, tensor: Any, allgather_options: Any = None) -> Any:
        """Copy every rank's tensor into the list, or into each of the lists."""
        _option("allgather", allgather_options, "timeout_ms", _UNSET)
        if not isinstance(tensor, list):
            return self.group.allgather(tensor_list, tensor)
        if _is_one(tensor) and _is_one(tensor_list):
            return [self.group.allgather(tensor_list[0], tensor[0])]
        return self.group.multigpu.allgather(tensor_list, tensor)

    def broadcast(self, tensor: Any, broadcast_options: Any = None) -> Any:
        """Copy the root's elements to all ranks."""
        root = _option("broadcast", broadcast_options, "root_rank", 0)
        index = _option("broadcast", broadcast_options, "root_tensor", 0)
        if not isinstance(tensor, list):
            return self.group.broadcast(tensor, root)
        if _is_one(tensor) and index == 0:
            return [self.group.broadcast(tensor[0], root)]
        return self.group.multigpu.broadcast(tensor, root, index)

    def reducescatter(
        self, tensor: Any, tensor_list: Any, reducescatter_options: Any = None
    ) -> Any:
        """Combine entry ``r`` of all lists, which stay, into rank ``r``'s tensor."""
        op = _option("reducescatter", reducescatter_options, "reduceOp", ReduceOp.SUM)
        if not isinstance(tensor, list):
            return self.group.reducescatter(tensor, tensor_list, op)
        if _is_one(tensor) and _is_one(tensor_list):
            return [self.group.reducescatter(tensor[0], tensor_list[0], op)]
        return self.group.multigpu.reducescatter(tensor, tensor_list, op)

    def send(self, tensor: Any, send_options: Any) -> Any:
        """Send a tensor, or its first ``n_elements``, to one rank."""
        rank = _option("send", send_options, "dst_rank", None)
        sent = self.group.send(_part("send", tensor, send_options), rank)
        return [sent] if isinstance(tensor, list) else sent

    def recv(self, tensor: Any, recv_options: Any) -> Any:
        """Receive into a tensor, or into its first ``n_elements``, from one rank."""
        rank = _option("recv", recv_options, "src_rank", None)
        found = self.group.recv(_part("recv", tensor, recv_options), rank)
        return [found] if isinstance(tensor, list) else found


@functools.cache
def group_class(transport: str) -> type[RayGroup]:
    """Return the class of groups over this backend."""
    if transport == "auto":
        return RayGroup
    return type(f"RayGroup_{transport}", (RayGroup,), {"transport": transport})


def _option(operation: str, given: Any, name: str, default: Any) -> Any:
    """Return the value in an object of options, or the default where it has none.

    Ray's ``allreduce`` (2.60) passes the class ``AllReduceOptions`` itself and leaves its op in it.
    So a value that a new object of it seems to have may come from an earlier call.
    """
    if given is None:
        return default
    if getattr(given, "timeout_ms", _UNSET) != _UNSET:
        raise OptionError(
            f"{operation}: timeout_ms: a group has one timeout, which colltensor.ray.register(timeout_s=...) sets; got "
            f"{given.timeout_ms!r}"
        )
    if type(given).__module__ == ray_types.__name__ and name not in vars(given):
        return default
    return getattr(given, name, default)


def _part(operation: str, tensor: Any, given: Any) -> Any:
    """Return the part of the only tensor that a point-to-point call moves."""
    if isinstance(tensor, list) and not _is_one(tensor):
        raise OptionError(
            f"{operation}: tensor: expected a list of one tensor, got a list of {len(tensor)}"
        )
    only = tensor[0] if isinstance(tensor, list) else tensor
    return first_elements(operation, only, _option(operation, given, "n_elements", 0))


def _is_one(tensors: Any) -> bool:
    return isinstance(tensors, list) and len(tensors) == 1
