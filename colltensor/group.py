"""Group: the collectives of one group of ranks; checks the tensors of a call, and runs it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final, NoReturn

from colltensor import backends, environment, objects
from colltensor.adapters import is_exportable, no_write_notice, notify_written
from colltensor.arguments import Arguments
from colltensor.backends.base import AgreeingBackend, Backend
from colltensor.buffers import Buffers, TensorBuffers
from colltensor.control import Control, exit_hooks
from colltensor.devices import Devices
from colltensor.engine import Call, Engine, Transfer, verdict
from colltensor.errors import (
    CollectiveError,
    DeviceError,
    GroupError,
    OptionError,
    TensorError,
    is_from_handler,
    remedy_for_system,
    saying_timed_out,
)
from colltensor.fastpath import NO_OP, FastPath
from colltensor.fastpath_trees import TreeFastPath
from colltensor.multigpu import MultiGpu
from colltensor.options import GroupOptions, timeout_of
from colltensor.rendezvous import Introduction, Meeting, meet_through
from colltensor.types import CPU, ReduceOp
from colltensor.untraced import keep_compilers_out

_log: Final = logging.getLogger(__name__)
_END_GRACE_S: Final = 1.0
_LEAVING_S: Final = 2.0
_GOING_S: Final = 1.0
_PACKAGE: Final = os.path.dirname(__file__) + os.sep
_PURE: Final = (_PACKAGE + "control" + os.sep, _PACKAGE + "rendezvous" + os.sep)
"""What calls no native library."""


def connect(meeting: Meeting, options: GroupOptions, deadline: float) -> Group:
    """Make the group of the ranks that met: its control plane, then its backend.

    Raises:
        CollectiveError: The ranks cannot be reached, or the backend cannot be made. Nothing is left
            behind.
    """
    try:
        control = Control(meeting, deadline)
    except CollectiveError:
        raise
    except (RuntimeError, OSError) as error:  # no thread, no descriptor
        if is_from_handler(error):
            raise
        raise GroupError(
            f"group '{meeting.group_name}' (rank {meeting.rank}): it cannot be made: {error}; "
            + remedy_for_system(error, "see that the ranks reach each other")
        ) from error

    # The other ranks make the backend too: they are told why this one cannot.
    try:
        options.prepare(meeting.world_size, meeting.host_ids)
        backend, why = options.make(control, meeting)
    except BaseException as error:
        try:
            found = verdict(control, "init_collective_group", error)
            control.fail(found)
        finally:
            control.close()
        is_own = isinstance(error, (RuntimeError, OSError)) and not is_from_handler(error)
        if found is error or not is_own:
            raise
        raise found from error

    name, rank, size = meeting.group_name, meeting.rank, meeting.world_size
    return Group(name, rank, size, backend, control, options, meeting, why)


def solitary(name: str, options: GroupOptions) -> Group:
    """Make a group of one rank, which needs no other process."""
    spec = backends.get_backend("loopback")
    backend = spec.create(None, None, timeout_s=options.timeout_s, interface=None, provider=None)
    return Group(name, 0, 1, backend, None, options, why="a group of one rank needs no transport")


class Group:
    """A group of ranks that call collectives together. Made by ``init_collective_group``.

    Every method is a collective: all ranks of the group call it, in the same order, with tensors of
    equal dtypes and counts. Shapes and frameworks may differ. ``send``, ``recv`` and ``sendrecv``
    concern two ranks. Elements are matched in row-major order whatever the memory layout.

    For a list of ``world_size`` tensors there may be one array of them all, one after another in
    the order of the ranks. MPI, ``jax.lax.all_gather`` and torch's ``all_gather_into_tensor`` have
    it so. The array is of any shape, usually ``(world_size, ...)``; a strided one is cut along its
    first axis.

    A number of Python's or numpy's is a tensor of one element, alone or in a tree. Python's travel
    as int64, float64, complex128 and bool; the result has the type of what was given. AVERAGE takes
    no int and no bool, as of arrays.

    In what only moves (``broadcast``, ``send`` and ``recv``) trees may have functions, classes,
    strings, dtypes and other constants as well. These stay as they are and have to be the same on
    all ranks.

    Tensors that can be written (numpy, torch, CuPy) are changed in place and returned. JAX arrays
    are left alone and the result is a new array, or with ``donate=True`` the same memory under a
    new array. Results are ready on return, or with ``async_op=True`` (the call returns a ``Work``)
    when ``Work.wait()`` returns. The tensors belong to the operation until then.

    CUDA tensors: the call is queued behind what is on the framework's current stream, and what is
    queued there next comes after it. The host waits for JAX arrays alone, and in ``synchronize``
    and ``barrier``.

    Methods raise the following, beside what they name themselves:

    - ``TensorError`` for a tensor that cannot be used. Nothing was moved.
    - ``MismatchError`` on every rank where the ranks disagree. No data was changed, and the group
      goes on. It is also raised where one rank refuses what it alone brings, as the list of
      ``scatter``.
    - ``PeerLostError`` and ``CollectiveTimeoutError`` for dead and late ranks. The group is broken
      then.
    - ``GroupError`` for a group that is broken or destroyed.

    Attributes:
        name: The group's name.
        rank: This process's rank in the group.
        world_size: The number of ranks.
        backend: The name of the backend in use.
        why: Why it is this one, in words: who asked for it, where the ranks are, what a faster one
            lacks.
        multigpu: The collectives of several devices in each process.
    """

    def __init__(
        self,
        name: str,
        rank: int,
        world_size: int,
        backend: Backend,
        control: Control | None,
        options: GroupOptions,
        meeting: Meeting | None = None,
        why: str = "",
    ) -> None:
        keep_compilers_out()
        environment.name_unknown(name, rank)
        self.name = name
        self.rank = rank
        self.world_size = world_size
        self.backend = backend.name
        self.why = why

        self._options = options
        self._backend = backend
        self._control = control

        agreeing = self._agreeing = backend if isinstance(backend, AgreeingBackend) else None
        self._engine = Engine(name, rank, control, backend, options.timeout_s)
        self._queue = self._engine.queue
        self._is_alone = control is None
        if control is not None:
            control.set_timeout(options.timeout_s)
        self._devices = Devices(name, rank, backend, control, self._engine, options, meeting)
        self._splits = 0
        # Frees the name, where the group has one.
        self._on_destroy: Callable[[], None] | None = None

        self._arguments: Any = Arguments(name, rank, world_size, backend, self._devices.backend_for)
        self.multigpu = MultiGpu(self._arguments, self._engine, name, rank, world_size)

        # Any: calls ask for them in their first lines, where an assertion for the type checker
        # would cost time.
        self._fastpath: Any = None
        self._trees: Any = None
        self._allreduce: Any = None
        self._barrier: Any = None

        fast: Any = agreeing or getattr(backend, "fast_calls", None)
        if fast is not None:
            self._fastpath = FastPath(fast, self._engine, self._arguments, rank, world_size)
            self._allreduce, self._barrier = self._fastpath.allreduce, self._fastpath.barrier
        if agreeing is not None:
            self._trees = TreeFastPath(self._fastpath)

        _groups.add(self)
        _log.debug(
            "group %r (rank %d): made of %d ranks, backend %r: %s",
            name,
            rank,
            world_size,
            self.backend,
            why,
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"group '{self.name}' (rank {self.rank}) cannot be copied or pickled; "
            "pass on its name, and make a group in every process"
        )

    @property
    def timeout_s(self) -> float:
        """How long every operation waits for other ranks, in seconds; see ``set_timeout``."""
        return self._engine.timeout_s

    @property
    def broken(self) -> CollectiveError | None:
        """The error that broke the group, here or on another rank; None while it works."""
        return self._engine.broken or (self._control.broken if self._control is not None else None)

    def allreduce(
        self,
        tensor: Any,
        op: ReduceOp = ReduceOp.SUM,
        *,
        async_op: bool = False,
        donate: bool = False,
        copy: bool | None = None,
        _like: Any = None,
    ) -> Any:
        """Combine the tensors of all ranks elementwise.

        Every rank gets the result, with the same bits.

        Args:
            tensor: A tensor or a pytree of tensors (dict, list, tuple ...), read and written.
            op: The reduce operation.
            async_op: Return a ``Work`` at once.
            donate: JAX only: work in the array's own memory and delete the array.
            copy: False refuses staging copies (strided tensors, fused leaves, emulated dtypes).

        Returns:
            ``tensor`` itself, with JAX arrays and numbers replaced by new ones.
        """
        if op.__class__ is not ReduceOp:
            op = self._arguments.op("allreduce", op)

        # The fast path stands here in line, because each function that a call enters costs time.
        calls = self._allreduce  # which bridge.follow() may take away in another thread
        if calls is not None and copy is None and not async_op and self._queue.idle:
            needs_write_notice = tensor.__class__ not in no_write_notice
            if not needs_write_notice or is_exportable(tensor):
                call = calls[op]
                try:
                    code = call.function(tensor)
                except BaseException as error:  # noqa: BLE001 - raised on there, unless it is an export's
                    call.failed((tensor,), error)
                else:
                    if not code or call.finish((tensor,), code):
                        if needs_write_notice:
                            notify_written(tensor)
                        return tensor

        if async_op and calls is not None and copy is None:
            work = calls[op].issue((tensor,), 0, 1, tensor)
            if work is not None:
                return work

        if self._trees is not None and copy is None and not async_op:
            plan = None if _like is None else _like.plan
            done = self._trees.run("allreduce", op, -1, tensor, True, donate, plan)
            if done is not None:
                return done

        if _like is not None:  # a Synchronizer, whose plan a tree on the fast path is of
            _like.check(tensor)

        arguments, engine = self._arguments, self._engine
        buffers = arguments.tensor("allreduce", "tensor", tensor, op, True, donate, copy, True)
        if not async_op and buffers.__class__ is TensorBuffers:
            if (
                self._is_alone
                and not buffers.allocates
                and engine.before is None
                and engine.broken is None
                and not self._queue.is_busy()
            ):
                buffers.store()  # one rank: the sum of its elements is there
                return tensor
            if engine.device is not None and copy is None and engine.allreduce_at_once(buffers, op):
                return tensor

        move, moved = arguments.backend_for(buffers).allreduce, (buffers.transfers, op)
        fused, result = copy is not False, buffers.result
        return engine.run(
            Call("allreduce", buffers, op, -1, fused, (buffers,), move, moved, result), async_op
        )

    def reduce(
        self,
        tensor: Any,
        dst_rank: int = 0,
        op: ReduceOp = ReduceOp.SUM,
        *,
        async_op: bool = False,
        donate: bool = False,
        copy: bool | None = None,
    ) -> Any:
        """Combine the tensors of all ranks elementwise into rank ``dst_rank``'s.

        The others stay as they were.

        Args:
            tensor: A tensor or a pytree of tensors; written on ``dst_rank`` only.
            dst_rank: The rank, in this group, that gets the result.
            op: The reduce operation.
            async_op: Return a ``Work`` at once.
            donate: JAX only, on ``dst_rank``: work in the array's own memory and delete the array.
            copy: False refuses staging copies.

        Returns:
            On ``dst_rank`` as ``allreduce``; elsewhere ``tensor`` itself.
        """
        fast = self._fastpath if copy is None and op.__class__ is ReduceOp else None
        if fast is not None and dst_rank.__class__ is int:
            call = fast.reduce[op][dst_rank]
            if async_op:
                done = call.issue((tensor,), 0, dst_rank == self.rank, tensor)
            else:
                done = call.run((tensor,), 0, dst_rank == self.rank)
            if done:
                return done if async_op else tensor

        op = self._arguments.op("reduce", op)
        root = self._arguments.rank("reduce", "dst_rank", dst_rank)
        write = root == self.rank
        trees = self._trees if copy is None and not async_op else None
        if trees is not None:
            done = trees.run("reduce", op, root, tensor, write, donate)
            if done is not None:
                return done if write else tensor

        buffers = self._written_by_some("reduce", tensor, op, root, write, donate, copy)
        move, moved = self._arguments.backend_for(buffers).reduce, (buffers.transfers, root, op)
        call = Call(
            "reduce", buffers, op, root, copy is not False, (buffers,), move, moved, buffers.result
        )
        return self._engine.run(call, async_op)

    def scan(
        self,
        tensor: Any,
        op: ReduceOp = ReduceOp.SUM,
        *,
        async_op: bool = False,
        donate: bool = False,
        copy: bool | None = None,
    ) -> Any:
        """Combine the tensors of ranks 0 to this one elementwise, in rank order.

        It is MPI's inclusive ``Scan``.

        Args:
            tensor: A tensor on the host or a pytree of them, read and written. All ranks' have one
                dtype and count.
            op: The reduce operation; AVERAGE divides by the number of ranks that were combined.
            async_op: Return a ``Work`` at once.
            donate: JAX only: work in the array's own memory and delete the array.
            copy: False refuses staging copies.

        Returns:
            ``tensor`` itself, with JAX arrays and numbers replaced by new ones.

        Raises:
            DeviceError: A tensor is on a device.
        """
        op = self._arguments.op("scan", op)
        buffers = self._arguments.tensor("scan", "tensor", tensor, op, True, donate, copy, True)
        backend = self._arguments.backend_for(buffers)
        devices = {str(view.device) for view in buffers.views if view.device is not CPU}
        if devices:
            raise DeviceError(
                f"scan: tensor (rank {self.rank}): it is on {min(devices)}, and scan works on host memory; copy it to "
                "the CPU first"
            )

        prefix = importlib.import_module("colltensor.prefix")  # few programs need it
        move = functools.partial(prefix.scan, backend, self.rank, self.world_size)
        moved, result = (buffers.transfers, op), buffers.result
        call = Call("scan", buffers, op, -1, copy is not False, (buffers,), move, moved, result)
        return self._engine.run(call, async_op)

    def broadcast(
        self,
        tensor: Any,
        src_rank: int = 0,
        *,
        async_op: bool = False,
        donate: bool = False,
        copy: bool | None = None,
    ) -> Any:
        """Copy rank ``src_rank``'s elements to all ranks.

        Args:
            tensor: A tensor or a pytree of tensors of any dtype. Read on ``src_rank``, written
                elsewhere.
            src_rank: The rank, in this group, that has the data.
            async_op: Return a ``Work`` at once.
            donate: JAX only, not on ``src_rank``: receive into the array's own memory and delete
                it.
            copy: False refuses staging copies.

        Returns:
            ``tensor`` itself, with JAX arrays and numbers replaced by new ones where they were
            written.
        """
        if self._fastpath is not None and copy is None and src_rank.__class__ is int:
            call = self._fastpath.broadcast[src_rank]
            if async_op:
                done = call.issue((tensor,), 0, src_rank != self.rank, tensor)
            else:
                done = call.run((tensor,), 0, src_rank != self.rank)
            if done:
                return done if async_op else tensor

        root = self._arguments.rank("broadcast", "src_rank", src_rank)
        write = root != self.rank
        trees = self._trees if copy is None and not async_op else None
        if trees is not None:
            done = trees.run("broadcast", NO_OP, root, tensor, write, donate)
            if done is not None:
                return done if write else tensor

        buffers = self._written_by_some("broadcast", tensor, None, root, write, donate, copy)
        move, moved = self._arguments.backend_for(buffers).broadcast, (buffers.transfers, root)
        fused, result = copy is not False, buffers.result
        call = Call("broadcast", buffers, None, root, fused, (buffers,), move, moved, result)
        return self._engine.run(call, async_op)

    def allgather(
        self, tensor_list: Any, tensor: Any, *, async_op: bool = False, copy: bool | None = None
    ) -> Any:
        """Copy every rank's ``tensor`` into entry ``rank`` of every rank's ``tensor_list``.

        Args:
            tensor_list: ``world_size`` tensors of ``tensor``'s count and dtype, or one array of
                them all, written; JAX arrays are replaced. Entry ``rank`` may be ``tensor`` itself.
            tensor: The tensor to send, of any dtype, only read.
            async_op: Return a ``Work`` at once.
            copy: False refuses staging copies.

        Returns:
            ``tensor_list``, or a new JAX array for one.
        """
        if self._fastpath is not None and copy is None:
            if async_op:
                stacked = tensor_list.__class__ is not list
                call = self._fastpath.allgather_stack if stacked else self._fastpath.allgather
                targets = (tensor_list,) if stacked else tensor_list
                done = call.issue((*targets, tensor), 0, len(targets), tensor_list)
            elif tensor_list.__class__ is not list:
                done = self._fastpath.allgather_stack.pair(tensor_list, tensor, tensor_list)
            else:
                done = self._fastpath.allgather.run((*tensor_list, tensor), 0, len(tensor_list))
            if done:
                return done if async_op else tensor_list

        name, arguments = "allgather", self._arguments
        source = arguments.tensor(name, "tensor", tensor, None, False, False, copy, False)
        view = source.views[0]
        targets = arguments.blocks(name, "tensor_list", tensor_list, view, None, True, copy)
        written = targets.named("tensor_list")
        arguments.separate(name, written, [(view, "tensor")], self.rank, targets.whole)

        def move(deadline: float) -> None:
            backend = arguments.backend_for(source)
            backend.allgather(targets.transfers, source.transfers[0], deadline)

        call = Call(name, source, None, -1, True, (source, targets), move, (), targets.result)
        return self._engine.run(call, async_op)

    def gather(
        self,
        tensor_list: Any,
        tensor: Any,
        dst_rank: int = 0,
        *,
        async_op: bool = False,
        copy: bool | None = None,
    ) -> Any:
        """Copy every rank's ``tensor`` into entry ``rank`` of ``tensor_list`` on rank ``dst_rank``.

        Args:
            tensor_list: On ``dst_rank`` as for ``allgather``; ignored elsewhere, usually None.
            tensor: The tensor to send, of any dtype, only read.
            dst_rank: The rank, in this group, that gets the tensors.
            async_op: Return a ``Work`` at once.
            copy: False refuses staging copies.

        Returns:
            As ``allgather``.
        """
        fast = self._fastpath if copy is None and not async_op else None
        if fast is not None and dst_rank.__class__ is int:
            if dst_rank != self.rank:
                done = fast.gather[dst_rank].run((tensor,), 0, 0)
            elif tensor_list.__class__ is not list:
                done = fast.gather_stack[dst_rank].pair(tensor_list, tensor, tensor_list)
            else:
                done = fast.gather[dst_rank].run((*tensor_list, tensor), 0, len(tensor_list))
            if done:
                return tensor_list

        name, arguments = "gather", self._arguments
        root = arguments.rank(name, "dst_rank", dst_rank)
        source = arguments.tensor(name, "tensor", tensor, None, False, False, copy, False)
        targets = None
        if root == self.rank:
            with self._refusing(name, root, source):
                view = source.views[0]
                targets = arguments.blocks(name, "tensor_list", tensor_list, view, None, True, copy)
                written = targets.named("tensor_list")
                arguments.separate(name, written, [(view, "tensor")], root, targets.whole)

        def move(deadline: float) -> None:
            received = None if targets is None else targets.transfers
            arguments.backend_for(source).gather(received, source.transfers[0], root, deadline)

        def result() -> Any:
            return tensor_list if targets is None else targets.result()

        buffers = (source,) if targets is None else (source, targets)
        return self._engine.run(
            Call(name, source, None, root, True, buffers, move, (), result), async_op
        )

    def scatter(
        self,
        tensor: Any,
        tensor_list: Any = None,
        src_rank: int = 0,
        *,
        async_op: bool = False,
        donate: bool = False,
        copy: bool | None = None,
    ) -> Any:
        """Copy entry ``r`` of rank ``src_rank``'s ``tensor_list`` into rank ``r``'s ``tensor``.

        Args:
            tensor: The tensor that receives, of any dtype. On ``src_rank`` it may be its own entry
                of the list.
            tensor_list: On ``src_rank`` ``world_size`` tensors of ``tensor``'s count and dtype, or
                one array of them all, only read. Ignored elsewhere, usually None.
            src_rank: The rank, in this group, that has the data.
            async_op: Return a ``Work`` at once.
            donate: JAX only: receive into the array's own memory and delete the array.
            copy: False refuses staging copies.

        Returns:
            ``tensor`` itself, or a new JAX array.
        """
        fast = self._fastpath if copy is None and not async_op else None
        if fast is not None and src_rank.__class__ is int:
            if src_rank != self.rank:
                done = fast.scatter[src_rank].run((tensor,), 0, 1)
            elif tensor_list.__class__ is not list:
                done = fast.scatter_stack[src_rank].pair(tensor, tensor_list, tensor)
            else:
                done = fast.scatter[src_rank].run((tensor, *tensor_list), 0, 1)
            if done:
                return tensor

        name, arguments = "scatter", self._arguments
        root = arguments.rank(name, "src_rank", src_rank)
        target = arguments.tensor(name, "tensor", tensor, None, True, donate, copy, False)
        sources = None
        if root == self.rank:
            with self._refusing(name, root, target):
                view = target.views[0]
                sources = arguments.blocks(
                    name, "tensor_list", tensor_list, view, None, False, copy
                )
                if not arguments.in_place(name, target, sources.views[root], copy):
                    arguments.separate(name, [(view, "tensor")], sources.named("tensor_list"))

        def move(deadline: float) -> None:
            sent = None if sources is None else sources.transfers
            arguments.backend_for(target).scatter(target.transfers[0], sent, root, deadline)

        buffers = (target,) if sources is None else (target, sources)
        return self._engine.run(
            Call(name, target, None, root, True, buffers, move, (), target.result), async_op
        )

    def reducescatter(
        self,
        tensor: Any,
        tensor_list: Any,
        op: ReduceOp = ReduceOp.SUM,
        *,
        async_op: bool = False,
        donate: bool = False,
        copy: bool | None = None,
    ) -> Any:
        """Combine entry ``r`` of all ranks' ``tensor_list`` into rank ``r``'s ``tensor``.

        The entries are combined elementwise.

        Args:
            tensor: The tensor that receives; it may be this rank's entry of the list.
            tensor_list: ``world_size`` tensors of ``tensor``'s count and dtype, or one array of
                them all, only read.
            op: The reduce operation.
            async_op: Return a ``Work`` at once.
            donate: JAX only: receive into ``tensor``'s own memory and delete it.
            copy: False refuses staging copies.

        Returns:
            ``tensor`` itself, or a new JAX array.
        """
        fast = self._fastpath if copy is None and op.__class__ is ReduceOp else None
        if fast is not None:
            if async_op and tensor_list.__class__ is not list:
                done = fast.reducescatter_stack[op].issue((tensor, tensor_list), 0, 1, tensor)
            elif async_op:
                done = fast.reducescatter[op].issue((tensor, *tensor_list), 0, 1, tensor)
            elif tensor_list.__class__ is not list:
                done = fast.reducescatter_stack[op].pair(tensor, tensor_list, tensor)
            else:
                done = fast.reducescatter[op].run((tensor, *tensor_list), 0, 1)
            if done:
                return done if async_op else tensor

        name, arguments = "reducescatter", self._arguments
        op = arguments.op(name, op)
        target = arguments.tensor(name, "tensor", tensor, op, True, donate, copy, False)
        view = target.views[0]
        sources = arguments.blocks(name, "tensor_list", tensor_list, view, op, False, copy)
        if not arguments.in_place(name, target, sources.views[self.rank], copy):
            arguments.separate(name, [(view, "tensor")], sources.named("tensor_list"))

        def move(deadline: float) -> None:
            backend = arguments.backend_for(target)
            backend.reducescatter(target.transfers[0], sources.transfers, op, deadline)

        call = Call(name, target, op, -1, True, (target, sources), move, (), target.result)
        return self._engine.run(call, async_op)

    def alltoall(
        self, output_list: Any, input_list: Any, *, async_op: bool = False, copy: bool | None = None
    ) -> Any:
        """Copy entry ``r`` of ``input_list`` into entry ``rank`` of rank ``r``'s ``output_list``.

        Args:
            output_list: ``world_size`` tensors, or one array of them all, written. JAX arrays are
                replaced.
            input_list: ``world_size`` tensors, or one array of them all, only read. All tensors
                have one count and dtype.
            async_op: Return a ``Work`` at once.
            copy: False refuses staging copies.

        Returns:
            ``output_list``, or a new JAX array for one.
        """
        fast, kind = self._fastpath if copy is None else None, output_list.__class__
        if fast is not None:
            done = None
            if kind is not list and input_list.__class__ is not list:
                if async_op:
                    done = fast.alltoall_stack.issue((output_list, input_list), 0, 1, output_list)
                else:
                    done = fast.alltoall_stack.pair(output_list, input_list, output_list)
            elif kind is input_list.__class__ and len(output_list) == len(input_list):
                tensors, count = (*output_list, *input_list), len(output_list)
                if async_op:
                    done = fast.alltoall.issue(tensors, 0, count, output_list)
                else:
                    done = fast.alltoall.run(tensors, 0, count)
            if done:
                return done if async_op else output_list

        name, arguments = "alltoall", self._arguments
        sources = arguments.blocks(name, "input_list", input_list, None, None, False, copy)
        like = sources.views[0]
        targets = arguments.blocks(name, "output_list", output_list, like, None, True, copy)
        read, written = sources.named("input_list"), targets.named("output_list")
        arguments.separate(name, written, read, apart=targets.whole)

        def move(deadline: float) -> None:
            backend = arguments.backend_for(sources)
            backend.alltoall(targets.transfers, sources.transfers, deadline)

        call = Call(name, sources, None, -1, True, (sources, targets), move, (), targets.result)
        return self._engine.run(call, async_op)

    def send(
        self, tensor: Any, dst_rank: int, *, async_op: bool = False, copy: bool | None = None
    ) -> Any:
        """Send a tensor or a pytree of tensors, of any dtype, to rank ``dst_rank``.

        That rank calls ``recv``. Only those two ranks call. The call waits until the receiver has
        come, and of a large tensor until it has it.

        Transfers from one rank to another are matched in the order of issue. With ``async_op=True``
        those in both directions, and with other ranks, pass each other. So two ranks may both send
        first and then receive.

        Raises:
            MismatchError: Both ranks of a pair wait in a send to each other, or both in a ``recv``:
                use ``sendrecv``. Also if ranks wait for each other in any other circle, which
                breaks the group.
        """
        fast = self._fastpath if copy is None and not async_op else None
        if fast is not None and dst_rank.__class__ is int:
            done = fast.send[dst_rank].run((tensor,), 0, 0)
            if done:
                return tensor

        peer = self._arguments.peer("send", "dst_rank", dst_rank)
        trees = self._trees if copy is None and not async_op else None
        if trees is not None and trees.run("transfer", NO_OP, peer, tensor, False) is not None:
            return tensor

        buffers = self._arguments.tensor("send", "tensor", tensor, None, False, False, copy, True)
        move, moved = self._arguments.backend_for(buffers).send, (buffers.transfers, peer)
        fused, result = copy is not False, buffers.result
        peers = [self._transfer(self.rank, peer, buffers)]
        call = Call("send", buffers, None, -1, fused, (buffers,), move, moved, result, peers)
        return self._engine.run(call, async_op)

    def recv(
        self,
        tensor: Any,
        src_rank: int,
        *,
        async_op: bool = False,
        donate: bool = False,
        copy: bool | None = None,
    ) -> Any:
        """Receive into a tensor or a pytree of tensors what rank ``src_rank`` sends; see ``send``.

        Returns:
            ``tensor`` itself, with JAX arrays and numbers replaced by new ones.
        """
        fast = self._fastpath if copy is None and not async_op else None
        if fast is not None and src_rank.__class__ is int:
            done = fast.recv[src_rank].run((tensor,), 0, 1)
            if done:
                return tensor

        peer = self._arguments.peer("recv", "src_rank", src_rank)
        trees = self._trees if copy is None and not async_op else None
        if trees is not None:
            done = trees.run("transfer", NO_OP, -1, tensor, True, donate, source=peer)
            if done is not None:
                return done

        buffers = self._arguments.tensor("recv", "tensor", tensor, None, True, donate, copy, True)
        move, moved = self._arguments.backend_for(buffers).recv, (buffers.transfers, peer)
        fused, result = copy is not False, buffers.result
        peers = [self._transfer(peer, self.rank, buffers)]
        call = Call("recv", buffers, None, -1, fused, (buffers,), move, moved, result, peers)
        return self._engine.run(call, async_op)

    def sendrecv(
        self,
        send_tensor: Any,
        dst_rank: int,
        recv_tensor: Any,
        src_rank: int,
        *,
        async_op: bool = False,
        donate: bool = False,
        copy: bool | None = None,
    ) -> Any:
        """Send to ``dst_rank`` and receive from ``src_rank`` at once, as in a shift along a ring.

        Both tensors may be the same one, as in MPI's ``Sendrecv_replace``: a staging buffer
        receives meanwhile. Both ranks may be this rank itself, as in a ring of one; then the tensor
        is copied. Where one peer agrees and the other does not, the agreed transfer is made before
        MismatchError is raised, because that peer counts on it.

        Returns:
            ``recv_tensor`` itself, or a new JAX array.
        """
        fast = self._fastpath if copy is None and not async_op else None
        if fast is not None and dst_rank.__class__ is int and src_rank.__class__ is int:
            shift = fast.sendrecv[dst_rank][src_rank]
            if shift.pair(send_tensor, recv_tensor, recv_tensor):
                return recv_tensor

        name, arguments = "sendrecv", self._arguments
        to, of = arguments.shift(dst_rank, src_rank)
        source = arguments.tensor(name, "send_tensor", send_tensor, None, False, False, copy, False)
        target = arguments.tensor(name, "recv_tensor", recv_tensor, None, True, donate, copy, False)
        sent, received = source.views[0], target.views[0]
        if not arguments.in_place(name, target, sent, copy):
            arguments.separate(name, [(received, "recv_tensor")], [(sent, "send_tensor")])
        if to == self.rank:  # no peer to compare with
            arguments.alike(name, "recv_tensor", received, sent)
        arguments.same_device(name, "recv_tensor", received, sent)

        def move(deadline: float) -> None:
            backend = arguments.backend_for(source)
            backend.sendrecv(source.transfers[0], to, target.transfers[0], of, deadline)

        there = self._transfer(self.rank, to, source)
        back = self._transfer(of, self.rank, target)
        peers = [] if to == self.rank else [there, back]
        buffers, result = (source, target), target.result
        call = Call(name, source, None, -1, True, buffers, move, (), result, peers)
        return self._engine.run(call, async_op)

    def barrier(self, *, async_op: bool = False) -> Any:
        """Return when all ranks have called."""
        call = self._barrier
        if call is not None and not async_op and self._queue.idle and self._engine.device is None:
            try:
                code = call.function()
            except BaseException as error:  # noqa: BLE001 - raised on there
                call.failed((), error)
            else:
                if not code or call.finish((), code):
                    return None

        if self._engine.device is not None and not async_op:
            self.synchronize()

        def meet(deadline: float) -> None:
            device = self._engine.device
            if device is not None and device is not self._backend:
                device.drain(deadline)  # what was queued while this call waited for its turn
            if not self._backend.needs_agreement:  # else the agreement is a barrier
                self._backend.barrier(deadline)

        return self._engine.run(
            Call("barrier", None, None, -1, True, (), meet, (), lambda: None), async_op
        )

    def broadcast_object(self, obj: Any = None, src_rank: int = 0) -> Any:
        """Return rank ``src_rank``'s ``obj`` on every rank, pickled on the way.

        Peers must be trusted. Other ranks get copies, which keep what pickle keeps. Of tensors that
        is values, data types and ``requires_grad``. 64-bit JAX arrays stay so where the receiver
        has x64 off. Lost are autograd's graph, gradients, shared memory, layout and JAX's sharding.
        A torch tensor on a device arrives on the device of the same number, a JAX or CuPy array on
        the default one.

        Raises:
            CollectiveError: The object cannot be unpickled here, or may not
                (``allow_pickle=False``). The group goes on.
        """
        root = self._arguments.rank("broadcast_object", "src_rank", src_rank)
        payload = b""
        if root == self.rank:
            with self._refusing("broadcast_object", root, None):
                payload = objects.dumps(obj)

        found = self._exchange("broadcast_object", payload, root)
        theirs = self._unpickled(found[root] or payload, "broadcast_object", root)
        return obj if root == self.rank else theirs

    def allgather_object(self, obj: Any) -> list[Any]:
        """Return all ranks' ``obj`` on every rank, pickled as in ``broadcast_object``."""
        payload = objects.dumps(obj)
        found = self._exchange("allgather_object", payload, -1)
        found[self.rank] = payload
        everyone = [
            self._unpickled(theirs, "allgather_object", rank) for rank, theirs in enumerate(found)
        ]
        everyone[self.rank] = obj
        return everyone

    def _unpickled(self, payload: bytes, operation: str, of: int) -> Any:
        """Return rank ``of``'s object; one's own is looked at where it might be refused."""
        allowed = self._options.allow_pickle
        if of == self.rank and allowed:
            return None
        return objects.loads(payload, operation, self.rank, of, allow_pickle=allowed)

    def split(
        self, color: Any, key: int | None = None, *, group_name: str | None = None
    ) -> Group | None:
        """Make one new group of all ranks with the same ``color``.

        The ranks are ordered by ``key``, then by their rank here.

        Args:
            color: A number >= 0, or None to be in no new group (the call is still made).
            key: Orders the new ranks; this group's rank by default.
            group_name: The new group's name in messages; derived from this one's by default.

        Returns:
            The new group, or None where ``color`` is None. It is destroyed on its own.
        """
        color = self._arguments.number("split", "color", color)
        if color is not None and color < 0:
            raise OptionError(
                f"split: color (rank {self.rank}): expected a number >= 0 or None, got {color!r}"
            )

        key = self._arguments.number("split", "key", key)
        ballot = json.dumps([color, self.rank if key is None else key, self.rank]).encode()
        ballots = [json.loads(vote) for vote in self._exchange("split", ballot, -1)]
        members = [
            rank for voted, _, rank in sorted(ballots, key=lambda vote: vote[1:]) if voted == color
        ]

        self._splits += 1
        name = group_name or f"{self.name}/{self._splits}.{color}"
        return self._make_part(name, [] if color is None else members)

    def set_timeout(self, timeout_s: float) -> None:
        """Let the calls that begin from now on wait ``timeout_s`` seconds for other ranks.

        That is for this rank alone. Jitted functions that were traced before follow it as well.

        Raises:
            OptionError: It is no number of seconds above 0, or infinite; nothing has changed.
        """
        timeout_s = timeout_of(timeout_s)
        self._engine.timeout_s = timeout_s
        if self._control is not None:
            self._control.set_timeout(timeout_s)
        if self._engine.device is not None:
            self._engine.device.set_timeout(timeout_s)
        if self._agreeing is None:
            return

        # The timeout is part of the calls that native code was given.
        self._agreeing.set_timeout(timeout_s)
        self._fastpath.renew()
        self._trees.renew()
        if self._allreduce is not None:
            self._allreduce, self._barrier = self._fastpath.allreduce, self._fastpath.barrier

    def destroy(self) -> None:
        """Leave the group and free what it holds, without waiting for other ranks.

        Calls that wait raise GroupError. Each rank destroys for itself. The others get
        PeerLostError if they still call, and at once if this rank was in a call. Idempotent.
        """
        if self._on_destroy is not None:
            self._on_destroy()
        self._close("was destroyed; make it again with init_collective_group()")

    def _end(self) -> None:
        """Do as ``destroy``, but keep the name; calls import nothing more: the process ends."""
        self._arguments = _Ended(self.name, self.rank)
        self._close("has ended, because its process ends")

    def _close(self, how: str) -> None:
        _groups.discard(self)
        inside = self._queue.is_inside()
        self._devices.close()
        self._engine.close(how)
        if not inside:
            self._backend.close()
            return
        try:  # no daemon, because it runs native code
            threading.Thread(target=self._close_behind, name="colltensor leaving").start()
        except RuntimeError:  # no thread can be started: the backend waits for the call, in vain
            self._backend.close()

    def _close_behind(self) -> None:
        """Close the backend after the call in which a signal's handler closed the group."""
        deadline = time.monotonic() + _LEAVING_S
        while self._engine.progress() is not None and time.monotonic() < deadline:
            time.sleep(0.005)
        self._backend.close()

    def synchronize(self, gpu_id: int | None = None) -> None:
        """Return, on the host, when all that this rank has queued on a GPU, or any, is done.

        Raises if it failed.

        Raises:
            CollectiveTimeoutError: It is not done after ``timeout_s``; it goes on.
            CollectiveError: It failed.
        """
        self._devices.synchronize(gpu_id)

    def _make_part(self, name: str, members: list[int]) -> Group | None:
        """Meet the other members over this control plane; others only help to exchange."""

        def exchange(payload: bytes) -> list[bytes]:
            everyone = self._exchange("split", payload, -1)
            return [everyone[rank] for rank in members]

        if self._control is None:
            return solitary(name, self._options) if members else None

        # A meeting has two rounds, and each is an exchange of this whole group.
        if not members:
            exchange(b"")
            exchange(b"")
            return None

        options, size = self._options, len(members)
        deadline = time.monotonic() + self.timeout_s
        with saying_timed_out(self.timeout_s):
            part = Introduction(
                group_name=name,
                world_size=size,
                rank=members.index(self.rank),
                interface=options.interface,
                backend=options.asked_of(size),
                host_id=self._control.host_id,
            )
            return connect(meet_through(exchange, part), options, deadline)

    @contextlib.contextmanager
    def _refusing(self, name: str, root: int, argument: Buffers | None) -> Iterator[None]:
        """Notify the other ranks what is raised over an argument that this one has alone."""
        try:
            yield
        except Exception as error:
            self._engine.refuse(name, root, argument, error)
            raise

    def _written_by_some(
        self,
        name: str,
        tensor: Any,
        op: ReduceOp | None,
        root: int,
        write: bool,
        donate: bool,
        copy: bool | None,
    ) -> Buffers:
        """Adapt a tensor that some ranks alone write, which tell the others if they cannot."""
        adapt: Callable[..., Buffers] = self._arguments.tensor

        try:
            return adapt(name, "tensor", tensor, op, write, donate, copy, True)
        except TensorError as error:
            if write:
                # Suppressed: where it cannot be read either, the other ranks cannot read theirs.
                with contextlib.suppress(CollectiveError):
                    found = adapt(name, "tensor", tensor, op, False, False, copy, True)
                    self._engine.refuse(name, root, found, error)
            raise

    def _transfer(self, source: int, destination: int, buffers: Buffers) -> Transfer:
        """Return what this rank sends, or receives, between itself and another one."""
        backend = self._arguments.backend_for(buffers)
        sends = source == self.rank
        one_way, peer = (backend.send, destination) if sends else (backend.recv, source)

        def move(deadline: float) -> None:
            one_way(buffers.transfers, peer, deadline)

        return Transfer(source, destination, buffers, move)

    def _exchange(self, name: str, payload: bytes, root: int) -> list[bytes]:
        """Allgather bytes over the control plane, once the ranks agreed on the operation."""
        control = self._control
        found: list[bytes] = []

        def move(deadline: float) -> None:
            found.extend([payload] if control is None else control.allgather(payload, deadline))

        call = Call(name, None, None, root, True, (), move, (), lambda: found)
        self._engine.run(call, False)
        return found

    def __repr__(self) -> str:
        check = ", check=True" if self._options.check else ""
        return f"Group({self.name!r}, rank {self.rank} of {self.world_size}, backend {self.backend!r}{check})"


class _Ended:
    """Stands for a group's arguments once its process ends, when nothing can be imported."""

    def __init__(self, name: str, rank: int) -> None:
        self._name = name
        self._rank = rank

    def __getattr__(self, _: str) -> Any:
        where = f"group '{self._name}' (rank {self._rank})"
        raise GroupError(f"{where} has ended, because its process ends")


_groups: Final[weakref.WeakSet[Group]] = weakref.WeakSet()
"""The groups that were not destroyed."""


def groups_named(name: str) -> list[Group]:
    """Return this process's groups of a name, those that ``split`` has made as well."""
    return [group for group in _groups if group.name == name]


def _end_all() -> None:
    """Let the process end while calls are under way.

    Those that can end have a moment, then the rest get an error. A thread that comes back to the
    interpreter after its end is unwound by the system. That goes through frames of the native
    libraries and of tvm-ffi that end the process with SIGABRT. So none may be in a call then. What
    a thread of the caller's gets is of no interest any more, and is not printed.
    """
    groups = list(_groups)
    deadline = time.monotonic() + _END_GRACE_S
    while any(group._engine.progress() for group in groups) and time.monotonic() < deadline:
        time.sleep(0.005)

    if groups:
        threading.excepthook = functools.partial(_notify, threading.excepthook)
    caught = _callers() if groups else set()
    for group in groups:
        try:
            group._end()
        except RuntimeError as error:  # the others end all the same
            _log.debug("group %r (rank %d): does not end well: %s", group.name, group.rank, error)

    deadline = time.monotonic() + _LEAVING_S
    while groups and _calling() and time.monotonic() < deadline:
        time.sleep(0.005)

    # Their callers may have native frames too: torch's backward pass, in which the error goes up.
    deadline = time.monotonic() + _GOING_S
    while caught & set(sys._current_frames()) and time.monotonic() < deadline:
        time.sleep(0.005)


def _calling() -> set[int]:
    """Return the other threads in a function of the package that may call native code."""
    here = threading.get_ident()
    files = {
        ident: frame.f_code.co_filename
        for ident, frame in sys._current_frames().items()
        if ident != here
    }
    return {
        ident
        for ident, file in files.items()
        if file.startswith(_PACKAGE) and not file.startswith(_PURE)
    }


def _callers() -> set[int]:
    """Return the threads of others that are in a call, however deep in it."""
    ours = {
        thread.ident for thread in threading.enumerate() if thread.name.startswith("colltensor")
    }
    found = set()
    for ident, top in sys._current_frames().items():
        frame: FrameType | None = top
        while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        if frame is not None and ident not in ours and ident != threading.get_ident():
            found.add(ident)
    return found


def _notify(hook: Callable[[Any], object], arguments: Any) -> None:
    """Pass what ended a thread on, unless it is that its call was ended."""
    if not isinstance(arguments.exc_value, CollectiveError):
        hook(arguments)


exit_hooks.before_end(_end_all)
os.register_at_fork(after_in_child=_groups.clear)  # they are the parent's
