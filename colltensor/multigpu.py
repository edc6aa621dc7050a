"""MultiGpu: the collectives of processes that work on several CUDA devices each.

Their forms are those of ``ray.util.collective``. Every process brings as many devices as the
others. A device of a process is what a rank is elsewhere: device ``i`` of rank ``r`` comes at
``r * devices + i``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from colltensor.arguments import Arguments
from colltensor.backends.base import QueueingBackend
from colltensor.buffers import Buffers
from colltensor.engine import Call, Engine
from colltensor.errors import DeviceError, OptionError, RankError, ShapeError
from colltensor.types import ReduceOp


class MultiGpu:
    """The collectives of one group on lists of tensors, one a device.

    All are contiguous, and of one count and dtype. Every rank calls, with as many devices and in
    the same order. Calls are queued on the devices as those of ``Group``. They raise, beside what
    ``Group``'s methods do, ``DeviceError`` for two tensors on one device, and ``MismatchError``
    where ranks bring different numbers of devices.

    Attributes:
        name: The group's name.
        rank: This process's rank in the group.
        world_size: The number of ranks.
    """

    def __init__(
        self, arguments: Arguments, engine: Engine, name: str, rank: int, world_size: int
    ) -> None:
        self._arguments = arguments
        self._engine = engine
        self.name = name
        self.rank = rank
        self.world_size = world_size

    def allreduce(self, tensor_list: list[Any], op: ReduceOp = ReduceOp.SUM) -> list[Any]:
        """Combine all tensors of all ranks elementwise, in place; returns the list."""
        name = "allreduce_multigpu"
        op = self._arguments.op(name, op)
        buffers = self._tensors(name, "tensor_list", tensor_list, op, True)
        device = self._device(buffers[0])
        return self._run(
            name, buffers, op, -1, buffers, device.allreduce_multigpu, (_transfers(buffers), op)
        )

    def reduce(
        self,
        tensor_list: list[Any],
        dst_rank: int = 0,
        dst_tensor: int = 0,
        op: ReduceOp = ReduceOp.SUM,
    ) -> list[Any]:
        """Combine all ranks' tensors into entry ``dst_tensor`` of rank ``dst_rank``'s list.

        Returns the list.
        """
        name = "reduce_multigpu"
        op, root = self._arguments.op(name, op), self._arguments.rank(name, "dst_rank", dst_rank)
        index = self._entry(name, "dst_tensor", dst_tensor, tensor_list)

        buffers = self._tensors(
            name, "tensor_list", tensor_list, op, False, index if root == self.rank else None
        )

        moved = (_transfers(buffers), root, index, op)
        return self._run(
            name, buffers, op, root, buffers, self._device(buffers[0]).reduce_multigpu, moved
        )

    def broadcast(
        self, tensor_list: list[Any], src_rank: int = 0, src_tensor: int = 0
    ) -> list[Any]:
        """Copy entry ``src_tensor`` of rank ``src_rank``'s list to all tensors of all ranks.

        Returns the list.
        """
        name = "broadcast_multigpu"
        root = self._arguments.rank(name, "src_rank", src_rank)
        index = self._entry(name, "src_tensor", src_tensor, tensor_list)
        buffers = self._tensors(name, "tensor_list", tensor_list, None, True)
        moved = (_transfers(buffers), root, index)
        return self._run(
            name, buffers, None, root, buffers, self._device(buffers[0]).broadcast_multigpu, moved
        )

    def allgather(
        self, output_tensor_lists: list[list[Any]], input_tensor_list: list[Any]
    ) -> list[list[Any]]:
        """Copy all inputs of all ranks, by rank and device, into each list of outputs.

        There is one list on each device.
        """
        name = "allgather_multigpu"
        sources = self._tensors(name, "input_tensor_list", input_tensor_list, None, False)
        lists = self._lists(name, "output_tensor_lists", output_tensor_lists, sources, None, True)

        flat = [buffers for outputs in lists for buffers in outputs]
        moved = ([_transfers(outputs) for outputs in lists], _transfers(sources))
        self._run(
            name,
            sources,
            None,
            -1,
            [*sources, *flat],
            self._device(sources[0]).allgather_multigpu,
            moved,
        )

        for given, outputs in zip(output_tensor_lists, lists, strict=True):
            given[:] = [buffers.result() for buffers in outputs]
        return output_tensor_lists

    def reducescatter(
        self,
        output_tensor_list: list[Any],
        input_tensor_lists: list[list[Any]],
        op: ReduceOp = ReduceOp.SUM,
    ) -> list[Any]:
        """Combine entry ``r * devices + i`` of all lists into output ``i`` of rank ``r``."""
        name = "reducescatter_multigpu"
        op = self._arguments.op(name, op)
        targets = self._tensors(name, "output_tensor_list", output_tensor_list, op, True)
        lists = self._lists(name, "input_tensor_lists", input_tensor_lists, targets, op, False)
        flat = [buffers for inputs in lists for buffers in inputs]
        moved = (_transfers(targets), [_transfers(inputs) for inputs in lists], op)
        device = self._device(targets[0])
        return self._run(
            name, targets, op, -1, [*targets, *flat], device.reducescatter_multigpu, moved
        )

    def _run(
        self,
        name: str,
        results: Sequence[Buffers],
        op: ReduceOp | None,
        root: int,
        buffers: Sequence[Buffers],
        move: Any,
        arguments: tuple[Any, ...],
    ) -> list[Any]:
        found: list[Any] = self._engine.run(
            Call(
                name,
                results[0],
                op,
                root,
                True,
                buffers,
                move,
                arguments,
                lambda: [entry.result() for entry in results],
            ),
            False,
        )
        return found

    def _device(self, buffers: Buffers) -> QueueingBackend:
        return cast("QueueingBackend", self._arguments.backend_for(buffers))

    def _tensors(
        self,
        name: str,
        argument: str,
        tensor_list: Any,
        op: ReduceOp | None,
        write: bool,
        written: int | None = None,
    ) -> list[Buffers]:
        """Adapt one tensor a device.

        ``written`` is the only entry to be written where ``write`` is False.
        """
        if not isinstance(tensor_list, (list, tuple)) or not tensor_list:
            raise OptionError(
                f"{name}: {argument} (rank {self.rank}): expected a list of tensors, one a device, "
                f"got {tensor_list!r:.80}"
            )

        found: list[Buffers] = []
        for index, tensor in enumerate(tensor_list):
            entry = f"{argument}[{index}]"
            buffers = self._arguments.tensor(
                name, entry, tensor, op, write or index == written, False, None, False
            )
            self._alike(name, entry, buffers, (found or [buffers])[0])
            found.append(buffers)

        devices = [buffers.views[0].device for buffers in found]
        if any(device.type != "cuda" for device in devices) or len(set(devices)) < len(devices):
            raise DeviceError(
                f"{name}: {argument} (rank {self.rank}): expected tensors on different CUDA devices, got tensors on "
                f"{', '.join(map(str, devices))}"
            )

        return found

    def _lists(
        self,
        name: str,
        argument: str,
        lists: Any,
        like: Sequence[Buffers],
        op: ReduceOp | None,
        write: bool,
    ) -> list[list[Buffers]]:
        """Adapt one list a device, each with a tensor for every device of every rank."""
        total = len(like) * self.world_size
        if not isinstance(lists, (list, tuple)) or len(lists) != len(like):
            raise ShapeError(
                f"{name}: {argument} (rank {self.rank}): expected {len(like)} lists, one a device"
            )

        found = []
        for index, (tensors, one) in enumerate(zip(lists, like, strict=True)):
            if not isinstance(tensors, list) or len(tensors) != total:
                raise ShapeError(
                    f"{name}: {argument}[{index}] (rank {self.rank}): expected a list of {total} tensors, one for "
                    "each device of each rank"
                )

            entries = []
            for place, tensor in enumerate(tensors):
                entry = f"{argument}[{index}][{place}]"
                buffers = self._arguments.tensor(name, entry, tensor, op, write, False, None, False)
                self._alike(name, entry, buffers, one)
                if buffers.views[0].device != one.views[0].device:
                    raise DeviceError(
                        f"{name}: {entry} (rank {self.rank}): expected a tensor on {one.views[0].device}, got one on "
                        f"{buffers.views[0].device}"
                    )
                entries.append(buffers)
            found.append(entries)

        return found

    def _alike(self, name: str, entry: str, buffers: Buffers, like: Buffers) -> None:
        view, expected = buffers.views[0], like.views[0]
        if view.strides is not None:
            raise OptionError(
                f"{name}: {entry} (rank {self.rank}): expected a contiguous tensor, got {view!r}"
            )
        if view.count != expected.count or view.dtype is not expected.dtype:
            raise ShapeError(
                f"{name}: {entry} (rank {self.rank}): expected {expected.count} elements of {expected.dtype}, as the "
                f"others of the call, got {view.count} of {view.dtype}"
            )

    def _entry(self, name: str, argument: str, index: Any, tensor_list: Any) -> int:
        count = len(tensor_list) if isinstance(tensor_list, (list, tuple)) else 0
        if not isinstance(index, int) or not 0 <= index < count:
            raise RankError(
                f"{name}: {argument} (rank {self.rank}): expected 0 to {count - 1}, got {index!r}"
            )
        return index


def _transfers(buffers: Sequence[Buffers]) -> list[Any]:
    return [entry.transfers[0] for entry in buffers]
