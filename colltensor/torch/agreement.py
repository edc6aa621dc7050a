"""Before the first step: the ranks compare what they have, and take over rank 0's values."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from colltensor.adapters import adapter_of
from colltensor.errors import (
    CollectiveError,
    MismatchError,
    OptionError,
    TensorError,
    UnsupportedTensorError,
)
from colltensor.group import Group
from colltensor.net import host_id

_SHOWN: Final = 3

Named = list[tuple[str, torch.Tensor]]
Sendable = list[tuple[str, torch.Tensor, torch.Tensor]]
Source = torch.nn.Module | Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Report:
    """What one rank tells the others.

    Attributes:
        options: The options by name, in words.
        tensors: Each parameter and buffer by name, in words.
        host: Where the rank runs.
        cores: How many cores its process may use.
        threads: How many threads torch computes with.
        refusal: What it refuses of its own call, "" where nothing.
    """

    options: dict[str, str]
    tensors: dict[str, str]
    host: str
    cores: int
    threads: int
    refusal: str = ""


def named_tensors(source: Source) -> tuple[Named, Named]:
    """Return a module's parameters and buffers, or the parameters given, each once, with names.

    Raises:
        OptionError: It is neither a module nor parameters, or has none.
        UnsupportedTensorError: A parameter that has no memory yet.
    """
    buffers: Named = []
    if isinstance(source, torch.nn.Module):
        parameters: Named = list(source.named_parameters())
        buffers = list(source.named_buffers())
    else:
        given = [
            entry if isinstance(entry, tuple) else (f"parameter {number}", entry)
            for number, entry in enumerate(source)
        ]
        # Each once, by its first name.
        once = {id(parameter): (name, parameter) for name, parameter in reversed(given)}
        parameters = list(once.values())[::-1]

    for name, parameter in parameters:
        if not isinstance(parameter, torch.Tensor) or not parameter.is_leaf:
            raise OptionError(
                f"sync_gradients: {name}: expected a parameter (a leaf tensor), got {type(parameter).__name__}"
            )
        is_lazy = isinstance(parameter, (UninitializedParameter, UninitializedBuffer))
        if is_lazy or parameter.is_meta:
            raise UnsupportedTensorError(
                f"sync_gradients: {name} has no memory yet (a lazy module, or device 'meta'); run a first forward "
                "pass, or move the module to its device, before"
            )

    names = [name for name, _ in parameters]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise OptionError(
            f"sync_gradients: module_or_parameters: expected each name once, got several parameters named {twice!r}; "
            "put the name of its module before each, or leave the names away"
        )
    if not parameters:
        raise OptionError(
            "sync_gradients: module_or_parameters: expected a module with parameters, got none"
        )
    return parameters, buffers


def described(parameters: Named, buffers: Named, *, frozen: bool = False) -> dict[str, str]:
    """Return parameters and buffers in the words that ranks compare; ``frozen`` says which are."""
    tensors = {}
    for name, parameter in parameters:
        tensors[name] = _in_words(parameter, "parameter")
        if frozen and not parameter.requires_grad:
            tensors[name] += " frozen"
    return tensors | {name: _in_words(buffer, "buffer") for name, buffer in buffers}


def compare(group: Group, tensors: dict[str, str], options: dict[str, str]) -> list[Report]:
    """Exchange the ranks' descriptions, and return every rank's report.

    Args:
        group: The group.
        tensors: What ``described`` says of parameters and buffers.
        options: The options by name, in words.

    Raises:
        MismatchError: On every rank, where one differs from rank 0; names the tensors. On the
            others, where a rank refused its own call.
    """
    mine = Report(options, tensors, host_id(), _cores(), torch.get_num_threads())
    reports: list[Report] = group.allgather_object(mine)
    refusing = [rank for rank, report in enumerate(reports) if report.refusal]
    if refusing:
        raise MismatchError(
            f"sync_gradients: rank {refusing[0]} of group '{group.name}' refused its own call: "
            f"{reports[refusing[0]].refusal}; nothing was changed, call again on all ranks",
            refusing,
        )

    complaints, ranks = [], []
    for rank, report in enumerate(reports):
        found = _differences(reports[0].options, report.options)
        found += _differences(reports[0].tensors, report.tensors)
        if not found and list(report.tensors) != list(reports[0].tensors):
            found = ["the same parameters in another order"]
        if found:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            complaints.append(f"rank {rank} has {', '.join(found[:_SHOWN])}{more}")
            ranks.append(rank)

    if complaints:
        raise MismatchError(
            f"sync_gradients: the ranks of group '{group.name}' differ: {'; '.join(complaints)}; make the same "
            "module and pass the same options on all ranks",
            ranks,
        )
    return reports


def sendable(tensors: Named) -> Sendable:
    """Return each tensor with its sendable form: itself without repetitions, or a contiguous copy.

    A copy stands for memory that is strided, or that holds other values than the tensor shows
    (lazily conjugated or negated). It also stands for memory that another tensor shares: a view,
    the complex numbers of a real view, bytes.

    Raises:
        TensorError: One that cannot be sent; names it.
    """
    found = []
    for name, tensor in tensors:
        own = _distinct(_checked(name, tensor.detach()))
        plain = own.is_contiguous() and not own.is_conj() and not own.is_neg()
        found.append((name, own, plain))

    shared = _sharing([own for _, own, _ in found])
    sent = []
    for number, (name, own, plain) in enumerate(found):
        form = own
        if not plain or number in shared:
            form = own.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        _refuse(name, form)
        sent.append((name, own, form))
    return sent


def take_over(group: Group, tensors: Sendable) -> None:
    """Copy rank 0's values into every rank's tensors, in place; ``tensors`` must be of now."""
    with torch.no_grad():
        group.broadcast({name: sent for name, _, sent in tensors}, 0)
        if group.rank != 0:
            for _, own, sent in tensors:
                if sent is not own:
                    own.copy_(sent)


@contextlib.contextmanager
def telling(group: Group) -> Iterator[None]:
    """Notify the other ranks, which wait in ``compare``, what this rank refuses of its own call."""
    try:
        yield
    except CollectiveError as error:
        with contextlib.suppress(CollectiveError):
            group.allgather_object(Report({}, {}, host_id(), 0, 0, str(error)))
        raise


def _checked(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind, remedy = ("nested", "unbind()") if tensor.is_nested else ("sparse", "to_dense()")
        raise UnsupportedTensorError(
            f"sync_gradients: {name} is {kind} ({tensor.layout}), and only dense tensors are sent; keep it as an "
            f"attribute of the module that is no buffer, or as {remedy} gives it"
        )
    _refuse(name, torch.empty(0, dtype=tensor.dtype))
    return tensor


def _refuse(name: str, tensor: torch.Tensor) -> None:
    """Refuse what no group can write.

    Raises:
        TensorError: Names it.
    """
    try:
        adapter_of(tensor).target(tensor)
    except TensorError as error:
        raise type(error)(f"sync_gradients: {name}: {error}") from error


def _sharing(tensors: Sequence[torch.Tensor]) -> set[int]:
    """Return which of the tensors lie in memory that another one reaches into, by number."""
    spans = []
    for number, tensor in enumerate(tensors):
        if tensor.numel():
            axes = zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((length - 1) * stride for length, stride in axes)
            start = tensor.data_ptr()
            spans.append((str(tensor.device), start, start + (last + 1) * tensor.itemsize, number))
    shared: set[int] = set()
    before = ("", 0, 0, 0)  # that of the tensors so far which ends last
    for span in sorted(spans):
        if span[0] == before[0] and span[1] < before[2]:
            shared |= {before[3], span[3]}
        if span[0] != before[0] or span[2] > before[2]:
            before = span
    return shared


def _distinct(tensor: torch.Tensor) -> torch.Tensor:
    """Return an expanded tensor without the repetitions."""
    for axis, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[axis] > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def spare_cores(reports: Sequence[Report], rank: int) -> int:
    """Return how many cores of this rank's host no rank computes on."""
    mine = reports[rank]
    return mine.cores - sum(report.threads for report in reports if report.host == mine.host)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_words(tensor: torch.Tensor, kind: str) -> str:
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    words = [kind, str(tensor.dtype).removeprefix("torch."), shape]
    if tensor.layout is torch.strided and not tensor.is_contiguous():
        words.append(f"strides {tensor.stride()}")
    return " ".join(words)


def _differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Return in words what one rank has otherwise than rank 0."""
    lacking = [name for name in expected if name not in found]
    more = [name for name in found if name not in expected]
    other = [name for name in expected if name in found and found[name] != expected[name]]
    return [
        *(f"no {name} (rank 0: {expected[name]})" for name in lacking),
        *(f"{name}: {found[name]} (rank 0: none)" for name in more),
        *(f"{name}: {found[name]} (rank 0: {expected[name]})" for name in other),
    ]
