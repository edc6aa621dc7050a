"""ColltensorProcessGroup: the ProcessGroup of torch.distributed on one Group."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

import torch

from colltensor._compat import torch as _compat
from colltensor.torch.c10d import payloads
from colltensor.torch.c10d.base import BaseProcessGroup
from colltensor.torch.c10d.payloads import bare, flat, of_rank, only, op_of, options, split
from colltensor.types import ReduceOp
from colltensor.untraced import keep_compilers_out

Tensor = torch.Tensor
Timeout = timedelta | None
c10d: Any = _compat.c10d()
_ALLREDUCE: Final = c10d.AllreduceOptions


class ColltensorProcessGroup(BaseProcessGroup):
    """torch.distributed's process group on our transports.

    It is made by ``dist.init_process_group("cpu:colltensor")``. Each method is torch's of that
    name: it writes the tensors in place and returns a ``dist.Work``. With the option ``asyncOp``,
    the operation runs in a thread of the group's, in the order of issue; else it is done on return.
    All have that option but those of torch's Python functions without ``async_op``. Beside what
    torch's Gloo takes, tensors may be strided, of any dtype, and averaged. Tensors on other devices
    go to their own backend, if the group has one.

    Methods raise the errors of a ``Group``'s methods, or their Work does when it is waited for.
    """

    def allreduce(
        self, tensors: Any, opts: Any = None, timeout: Timeout = None, *, op: Any = None
    ) -> Any:
        """Combine one tensor over all ranks; a sparse one may have other elements on each rank."""
        if opts.__class__ is not _ALLREDUCE:
            opts = options(_ALLREDUCE, opts, timeout, reduceOp=op)
        tensor = only("allreduce", "tensors", tensors) if tensors.__class__ is list else tensors
        if not tensor.is_cpu:
            return self._elsewhere(tensor).allreduce([tensor], opts)

        name, group, reduce_op = "allreduce", self._group, op_of("allreduce", opts.reduceOp)
        if tensor.layout is not torch.strided:
            sparse = payloads.allreduce_sparse
            return self._run(name, opts, [tensor], sparse, group, bare(tensor), reduce_op)
        if reduce_op is ReduceOp.AVERAGE and payloads.is_integral(tensor):
            return self._run(name, opts, [tensor], payloads.reduce_all, group, [bare(tensor)])
        return self._run(name, opts, [tensor], group.allreduce, bare(tensor), reduce_op)

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        """Combine several tensors over all ranks, in as few transfers as pays."""
        opts = options(c10d.AllreduceCoalescedOptions, opts)
        if tensors and not tensors[0].is_cpu:
            return self._elsewhere(tensors[0]).allreduce_coalesced(tensors, opts)
        name, group = "allreduce_coalesced", self._group
        reduce_op = op_of(name, opts.reduceOp)
        written, given = list(tensors), [bare(tensor) for tensor in tensors]
        if reduce_op is ReduceOp.AVERAGE and any(map(payloads.is_integral, given)):
            return self._run(name, opts, written, payloads.reduce_all, group, given)
        return self._run(name, opts, written, group.allreduce, given, reduce_op)

    def reduce(
        self,
        tensors: Any,
        opts: Any = None,
        op: Any = None,
        timeout: Timeout = None,
        *,
        root: int | None = None,
    ) -> Any:
        """Combine one tensor over all ranks into the root's; the others stay as they were."""
        opts = options(c10d.ReduceOptions, opts, timeout, rootRank=root, reduceOp=op)
        tensor = only("reduce", "tensors", tensors)
        if not tensor.is_cpu:
            return self._elsewhere(tensor).reduce([tensor], opts)

        name, group, reduce_op = "reduce", self._group, op_of("reduce", opts.reduceOp)
        arguments = bare(tensor), opts.rootRank
        if reduce_op is ReduceOp.AVERAGE and payloads.is_integral(tensor):
            return self._run(name, opts, [tensor], payloads.reduce_to, group, *arguments)
        return self._run(name, opts, [tensor], group.reduce, *arguments, reduce_op)

    def broadcast(
        self, tensors: Any, opts: Any = None, timeout: Timeout = None, *, root: int | None = None
    ) -> Any:
        """Copy the root's tensor to all ranks."""
        opts = options(c10d.BroadcastOptions, opts, timeout, rootRank=root)
        tensor = only("broadcast", "tensors", tensors)
        if not tensor.is_cpu:
            return self._elsewhere(tensor).broadcast([tensor], opts)
        return self._run(
            "broadcast", opts, [tensor], self._group.broadcast, bare(tensor), opts.rootRank
        )

    def allgather(
        self, output_tensors: Any, input_tensors: Any, opts: Any = None, timeout: Timeout = None
    ) -> Any:
        """Copy every rank's tensor into the entry of its rank of every rank's list."""
        opts = options(c10d.AllgatherOptions, opts, timeout)
        source = only("allgather", "input_tensors", input_tensors)
        outputs = of_rank("allgather", output_tensors)
        if not source.is_cpu:
            return self._elsewhere(source).allgather([outputs], [source], opts)
        targets = [bare(output) for output in outputs]
        return self._run("allgather", opts, outputs, self._group.allgather, targets, bare(source))

    def allgather_coalesced(
        self,
        output_lists: Sequence[Sequence[Tensor]],
        input_list: Sequence[Tensor],
        opts: Any = None,
    ) -> Any:
        """Copy every rank's tensors into the list of its rank, one after another."""
        opts = options(c10d.AllgatherOptions, opts)
        if input_list and not input_list[0].is_cpu:
            return self._elsewhere(input_list[0]).allgather_coalesced(
                output_lists, input_list, opts
            )

        pairs = [
            ([bare(outputs[index]) for outputs in output_lists], bare(source))
            for index, source in enumerate(input_list)
        ]
        written = [output for outputs in output_lists for output in outputs]
        return self._run(
            "allgather_coalesced", opts, written, payloads.one_by_one, self._group.allgather, pairs
        )

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        """Copy every rank's tensor into its part of every output; they may share memory."""
        opts = options(c10d.AllgatherOptions, opts)
        if not input.is_cpu:
            return self._elsewhere(input).all_gather_single(output, input, opts)
        arguments = self._group, bare(output), bare(input)
        return self._run("all_gather_single", opts, [output], payloads.gather_rows, *arguments)

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(
        self, output_lists: Sequence[Tensor], input_list: Sequence[Tensor], opts: Any = None
    ) -> Any:
        """Do ``all_gather_single`` for several tensors, one after another."""
        opts = options(c10d.AllgatherOptions, opts)
        if input_list and not input_list[0].is_cpu:
            return self._elsewhere(input_list[0]).all_gather_single_coalesced(
                output_lists, input_list, opts
            )
        pairs = zip(output_lists, input_list, strict=True)
        calls = [(self._group, bare(output), bare(source)) for output, source in pairs]
        name, arguments = "all_gather_single_coalesced", (payloads.gather_rows, calls)
        return self._run(name, opts, list(output_lists), payloads.one_by_one, *arguments)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def gather(
        self,
        output_tensors: Any,
        input_tensors: Any,
        opts: Any = None,
        timeout: Timeout = None,
        *,
        root: int | None = None,
    ) -> Any:
        """Copy every rank's tensor into the entry of its rank of the root's list."""
        opts = options(c10d.GatherOptions, opts, timeout, rootRank=root)
        source = only("gather", "input_tensors", input_tensors)
        outputs = of_rank("gather", output_tensors) if opts.rootRank == self.rank() else []
        if not source.is_cpu:
            return self._elsewhere(source).gather(output_tensors, [source], opts)
        targets = [bare(output) for output in outputs]
        return self._run(
            "gather", opts, outputs, self._group.gather, targets, bare(source), opts.rootRank
        )

    def scatter(
        self,
        output_tensors: Any,
        input_tensors: Any,
        opts: Any = None,
        timeout: Timeout = None,
        *,
        root: int | None = None,
    ) -> Any:
        """Copy the root's entry of each rank into that rank's tensor."""
        opts = options(c10d.ScatterOptions, opts, timeout, rootRank=root)
        target = only("scatter", "output_tensors", output_tensors)
        inputs = of_rank("scatter", input_tensors) if opts.rootRank == self.rank() else []
        if not target.is_cpu:
            return self._elsewhere(target).scatter([target], input_tensors, opts)
        sources = [bare(source) for source in inputs]
        return self._run(
            "scatter", opts, [target], self._group.scatter, bare(target), sources, opts.rootRank
        )

    def reduce_scatter(
        self,
        output_tensors: Any,
        input_tensors: Any,
        opts: Any = None,
        timeout: Timeout = None,
        *,
        op: Any = None,
    ) -> Any:
        """Combine all ranks' entry of each rank into its tensor; sizes may differ by rank."""
        opts = options(c10d.ReduceScatterOptions, opts, timeout, reduceOp=op)
        target = only("reduce_scatter", "output_tensors", output_tensors)
        inputs = of_rank("reduce_scatter", input_tensors)
        if not target.is_cpu:
            return self._elsewhere(target).reduce_scatter([target], [inputs], opts)

        reduce_op = op_of("reduce_scatter", opts.reduceOp)
        arguments = self._group, bare(target), [bare(source) for source in inputs], reduce_op
        return self._run("reduce_scatter", opts, [target], payloads.reduce_parts, *arguments)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        """Combine all ranks' part of each rank into that rank's tensor."""
        opts = options(c10d.ReduceScatterOptions, opts)
        if not output.is_cpu:
            return self._elsewhere(output).reduce_scatter_single(output, input, opts)
        reduce_op = op_of("reduce_scatter_single", opts.reduceOp)
        arguments = self._group, bare(output), bare(input), reduce_op
        return self._run("reduce_scatter_single", opts, [output], payloads.reduce_rows, *arguments)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(
        self, output_tensors: Sequence[Tensor], input_tensors: Sequence[Tensor], opts: Any = None
    ) -> Any:
        """Do ``reduce_scatter_single`` for several tensors, one after another."""
        opts = options(c10d.ReduceScatterOptions, opts)
        if output_tensors and not output_tensors[0].is_cpu:
            elsewhere = self._elsewhere(output_tensors[0])
            return elsewhere.reduce_scatter_single_coalesced(output_tensors, input_tensors, opts)
        name = "reduce_scatter_single_coalesced"
        reduce_op = op_of(name, opts.reduceOp)
        pairs = zip(output_tensors, input_tensors, strict=True)
        calls = [(self._group, bare(output), bare(source), reduce_op) for output, source in pairs]
        arguments = payloads.reduce_rows, calls
        return self._run(name, opts, list(output_tensors), payloads.one_by_one, *arguments)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: Sequence[int] = (),
        input_split_sizes: Sequence[int] = (),
        opts: Any = None,
        timeout: Timeout = None,
    ) -> Any:
        """Copy part ``r`` of inputs to the sender's part of rank ``r``'s output, of any size."""
        opts = options(c10d.AllToAllOptions, opts, timeout)
        if not input.is_cpu:
            return self._elsewhere(input).all_to_all_single(
                output, input, list(output_split_sizes), list(input_split_sizes), opts
            )

        name, count = "all_to_all_single", self.size()
        whole, source = bare(output), bare(input).contiguous()
        target = flat(whole)
        targets = split(name, "output", target, output_split_sizes, count)
        sources = split(name, "input", source, input_split_sizes, count)
        arguments = None if target is whole else whole, target, targets, sources
        return self._run(name, opts, [output], payloads.exchange, self._group, *arguments)

    alltoall_base = all_to_all_single

    def alltoall(
        self,
        output_tensors: Sequence[Tensor],
        input_tensors: Sequence[Tensor],
        opts: Any = None,
        timeout: Timeout = None,
    ) -> Any:
        """Copy entry ``r`` of inputs to the sender's entry of ``r``'s outputs, of any size."""
        opts = options(c10d.AllToAllOptions, opts, timeout)
        if input_tensors and not input_tensors[0].is_cpu:
            return self._elsewhere(input_tensors[0]).alltoall(output_tensors, input_tensors, opts)
        outputs = list(output_tensors)
        targets = [bare(output) for output in outputs]
        arguments = None, None, targets, [bare(source) for source in input_tensors]
        return self._run("alltoall", opts, outputs, payloads.exchange, self._group, *arguments)

    def barrier(self, opts: Any = None, timeout: Timeout = None) -> Any:
        """Meet all ranks."""
        opts = options(c10d.BarrierOptions, opts, timeout)
        return self._run("barrier", opts, [], self._group.barrier)

    def monitored_barrier(self, timeout: Timeout = None, wait_all_ranks: bool = False) -> None:
        """Meet all ranks; the error names those that do not come, all of them in any case."""
        made = options(c10d.BarrierOptions, None, timeout)
        made.asyncOp = False
        self._run("monitored_barrier", made, [], self._group.barrier).wait()


keep_compilers_out()
