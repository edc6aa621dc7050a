"""sync_gradients: keeps the gradients of one's own training loop in step over a group's ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Literal

import torch

from colltensor.errors import OptionError
from colltensor.group import Group
from colltensor.table import find_group
from colltensor.torch.agreement import (
    Named,
    Report,
    Source,
    compare,
    described,
    named_tensors,
    sendable,
    spare_cores,
    take_over,
    telling,
)
from colltensor.torch.compression import Compression, compression_of
from colltensor.torch.reducer import Options, Reducer
from colltensor.torch.tracked import is_kept_in_step

_LONE_NBYTES: Final = {"shm": 64 << 10}
_LONE_NBYTES_ELSEWHERE: Final = 4 << 20
"""From how many bytes on a gradient travels by itself.

Another transfer costs as much as a copy there.
"""


def sync_gradients(
    module_or_parameters: Source,
    group: str | Group = "default",
    *,
    bucket_nbytes: int = 25 << 20,
    average: bool = True,
    overlap: bool | Literal["worker"] = True,
    compression: str | Compression | None = None,
) -> GradientSync:
    """Keep gradients in step: ``backward()`` leaves the average of all ranks' gradients.

    Every rank has it when ``backward()`` returns. The loop stays as it is: forward, ``backward()``,
    clip, ``optimizer.step()``, ``zero_grad()``. All ranks call this once, after the module is where
    it will be trained, and then run the same number of backward passes. First the ranks compare
    parameters, buffers and options, and take over rank 0's values.

    Several backward passes before ``zero_grad()`` add up, each in step; ``no_sync()`` saves the
    transfers of all but the last. A parameter without a gradient on some ranks counts as zeros
    there, and its ``grad`` stays None only if no rank has one. Small gradients are views of flat
    buckets. The next backward pass overwrites the former content of ``parameter.grad``, so clone it
    to keep it.

    Parameters of a module may be unfrozen later, added, or put in the place of others
    (``module.head = ...``, ``load_state_dict(assign=True)``). The next backward pass takes them in,
    where all ranks changed the same. It does not take over their values: call ``broadcast()``. An
    optimizer that steps inside the backward pass, in hooks of its own, steps before the gradients
    are in step.

    The handle need not be kept; the hooks live as long as the parameters. With ``average=False``
    they keep the parameters alive until ``remove()``. Where ``module.to()`` is to swap parameters,
    call ``torch.__future__.set_swap_module_params_on_conversion(True)`` before this. With
    ``average=False`` torch refuses to swap them until ``remove()``.

    Two of these whose modules share one backward pass need a group each, ``group.split(0)``.

    Args:
        module_or_parameters: A module, or parameters, or pairs of name and parameter.
        group: The group or its name.
        bucket_nbytes: The most that one bucket of small gradients holds.
        average: Average over the ranks; False is the sum.
        overlap: Reduce a bucket in a worker thread as soon as all its gradients are there. That
            needs more cores on every rank's host than its ranks have torch threads. Else, and with
            False, reduce everything when the backward pass has computed all gradients. ``"worker"``
            does not look at the cores.
        compression: ``"fp16"``, ``"bf16"``, a ``PowerSGD`` or an object of one's own: see
            ``Compression``.

    Returns:
        The handle: ``no_sync()``, ``remove()``. As a context manager it removes itself at the end.

    Raises:
        MismatchError: On every rank, where one differs from rank 0; names the parameters. On the
            others, where a rank refused its own call. From ``backward()``, where the module was
            changed and not on all ranks alike.
        OptionError, TensorError: An argument that cannot be used.
        CollectiveError: From ``backward()`` too: a rank is lost or late, or a gradient cannot be
            reduced.
    """
    module = module_or_parameters if isinstance(module_or_parameters, torch.nn.Module) else None
    found = group if isinstance(group, Group) else find_group(group)

    with telling(found):
        if (
            isinstance(bucket_nbytes, bool)
            or not isinstance(bucket_nbytes, int)
            or bucket_nbytes < 1
        ):
            raise OptionError(
                f"sync_gradients: bucket_nbytes: expected a number >= 1, got {bucket_nbytes!r}"
            )
        if overlap not in (True, False, "worker"):
            raise OptionError(
                f"sync_gradients: overlap: expected True, False or 'worker', got {overlap!r}"
            )

        chosen = compression_of(compression)
        parameters, buffers = named_tensors(module_or_parameters)
        _refuse_twice(found, parameters)
        sent = sendable([*parameters, *buffers])

    words = {
        "bucket_nbytes": str(bucket_nbytes),
        "average": str(bool(average)),
        "overlap": repr(overlap),
        "compression": _spelt(chosen),
    }
    reports = compare(found, described(parameters, buffers, frozen=True), words)

    lone_nbytes = _LONE_NBYTES.get(found.backend, _LONE_NBYTES_ELSEWHERE)
    options = Options(bucket_nbytes, lone_nbytes, average, _early(overlap, reports), chosen)
    take_over(found, sent)
    return GradientSync(found, module, parameters, options)


def _refuse_twice(group: Group, parameters: Named) -> None:
    for name, parameter in parameters:
        if is_kept_in_step(parameter, group):
            raise OptionError(
                f"sync_gradients: {name} is kept in step over group '{group.name}' already, and would be reduced "
                "twice; remove() the other handle first"
            )


def _spelt(compression: Compression | None) -> str:
    """Name a compression so that equal ones have equal names; the default repr has an address."""
    kind = type(compression)
    return kind.__qualname__ if kind.__repr__ is object.__repr__ else repr(compression)


def _early(overlap: bool | str, reports: list[Report]) -> bool:
    """Choose whether buckets are reduced before the end; the same on every rank.

    A worker takes its time from somebody. These are microseconds by which a step took longer than
    without synchronisation. They are for an MLP 64-w-w-10 with w = 64, 512, 2048, in shared memory,
    with 2 ranks of one thread each on 2 cores. It was 205, 592 and 5,643 us where a worker reduced,
    and 82, 345 and 4,157 us at the end. It was 86, 387 and 4,498 us in the hooks, which stops the
    pass for each bucket.
    """
    if overlap is not True:
        return overlap == "worker"
    return all(spare_cores(reports, rank) > 0 for rank in range(len(reports)))


class GradientSync:
    """The handle of ``sync_gradients``.

    Attributes:
        group: The group whose ranks are kept in step.
    """

    def __init__(
        self, group: Group, module: torch.nn.Module | None, parameters: Named, options: Options
    ) -> None:
        self.group = group
        self._source: torch.nn.Module | Named = parameters if module is None else module
        self._reducer = Reducer(group, module, parameters, options)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Copy and pickle as None.

        A copy of a model, or one that is loaded elsewhere, is kept in step by nobody.
        """
        return type(None), ()

    def broadcast(self) -> None:
        """Copy rank 0's present parameters and buffers to all ranks once more; every rank calls.

        Raises:
            MismatchError: On every rank, where one has others than rank 0; names them, and nothing
                was copied.
        """
        with telling(self.group):
            parameters, buffers = named_tensors(self._source)
            sent = sendable([*parameters, *buffers])
        compare(self.group, described(parameters, buffers), {})
        take_over(self.group, sent)
        if self.group.world_size > 1 and not self._reducer.removed:
            self._reducer.tracked.attach(parameters)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let backward passes only accumulate; the next one outside reduces the sum.

        Every rank must leave out the same passes.
        """
        before, self._reducer.paused = self._reducer.paused, True
        try:
            yield
        finally:
            self._reducer.paused = before

    def remove(self) -> None:
        """Leave the module alone from now on; its gradients stay.

        Idempotent, and on this rank alone.
        """
        self._reducer.remove()

    def __enter__(self) -> GradientSync:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()
