"""The stages and their checks, what tells most first. Imports nothing of what is checked.

Many checks are functions of ``tests/gpu``, called on one rank. A device that works on one rank
alone shows most of what only a device can show, on every libnccl; what needs two ranks comes after.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: What is checked.
        function: ``module:function``; it raises where the check fails, and may return a figure as
            text.
        arguments: What it gets.
        limit_s: How long it may take before its process is killed.
        needs: Packages; without a card the check is skipped if one is missing, on a card it fails.
        alone: It has a process of its own, which it may spoil.
        informed: It also gets ``channel``, ``folder`` and ``cpu``.
    """

    name: str
    function: str
    arguments: tuple[Any, ...] = ()
    limit_s: float = 20.0
    needs: tuple[str, ...] = ()
    alone: bool = False
    informed: bool = False


@dataclass(frozen=True)
class Stage:
    """Checks that share a limit.

    Attributes:
        name: A letter, and a word.
        limit_s: How long all of them may take, the starts of their processes included.
        checks: In the order of their worth.
        prepared: They are functions on one rank's group, and need the tests' helpers.
        shares: It puts several ranks on one device, or may.
    """

    name: str
    limit_s: float
    checks: tuple[Check, ...]
    prepared: bool = True
    shares: bool = False


REST: Final = 3600.0
"""No limit but that of the whole run."""


def stages_for(*, cpu: bool, inject: bool = False) -> list[Stage]:
    """Return the stages.

    Args:
        cpu: For a machine without a card: the same checks on a fake device, where it has them.
        inject: Add checks that fail, hang and die, which show that the rest goes on.
    """
    streams = ("device",) if cpu else ("torch", "cupy")
    stages = [
        Stage("a-calls", 60, tuple(_calls(streams, cpu))),
        Stage("b-streams", 90, tuple(_streams(streams, cpu))),
        Stage("c-jit", 60, tuple(_jitted(streams, cpu))),
        Stage("d-failures", 60, tuple(_failures(streams[-1], cpu))),
        Stage("e-speed", 60, tuple(_speed())),
        Stage("f-two-ranks", 240, tuple(_two_ranks(cpu)), prepared=False, shares=True),
        Stage("g-tests", REST, tuple(_tests(cpu)), prepared=False, shares=True),
    ]
    if inject:
        stages.insert(0, Stage("injected", 20, _INJECTED, prepared=False))
    return stages


def _calls(streams: tuple[str, ...], cpu: bool) -> Iterator[Check]:
    yield Check("imports", "checks:imports", limit_s=50, informed=True)
    yield Check("backend_unavailable_reason", "checks:available")
    yield Check("the native library can be loaded", "checks:native")
    yield Check("the package is the checkout's", "checks:same_sources")
    for library in (*streams, "jax"):
        yield Check(
            f"allreduce in place, {library}", "checks:in_place", (library,), 30, _needs(library)
        )
    yield Check("an allreduce of donated memory, jax", "checks:donated", needs=("jax",))
    yield Check("which libnccl", "checks:libnccl", informed=True)


def _streams(streams: tuple[str, ...], cpu: bool) -> Iterator[Check]:
    for library in streams:
        for async_op in (False, True):
            how = "asynchronous" if async_op else "synchronous"
            name = f"a long kernel before, a reading after, {how}, {library}"
            yield Check(name, "test_gpu_streams:comes_after", (0, 1, library, async_op), 30)
    if not cpu:
        yield Check("eager arrays are ready, jax", "test_gpu_streams:jax_is_ready", (0, 1), 30)
    for library in streams:
        yield _case("layouts", library)
    for library in streams if cpu else (*streams, "jax"):
        yield _case("reductions", library)
    for library in streams:
        yield Check(f"synchronize, {library}", "test_gpu_streams:synchronized", (0, 1, library))
        yield Check(
            f"calls on two streams, {library}", "test_gpu_streams:on_two_streams", (0, 1, library)
        )
    if not cpu:
        yield Check(
            "1 GiB in place needs no memory",
            "checks:memory_of_a_large_call",
            needs=("torch",),
            limit_s=30,
        )
        yield Check(
            "a stream in use stays current",
            "test_gpu_streams:stays_current",
            (0, 1),
            needs=("cupy",),
        )
    for name in ("not_numbers", "refusals", "stacks", "trees"):
        yield _case(name, streams[0])
    if not cpu:
        yield _case("moves", "jax")
        for library in streams:
            function = "test_gpu_streams:gradients_come_after"
            yield Check(f"gradients after a long kernel, {library}", function, (0, 1, library))
            yield Check(
                f"a group that nobody asked NCCL for, {library}",
                "test_gpu_streams:alone",
                (0, 1, library),
            )
    for library in streams:
        for name in ("moves", "gradients", "one_device_forms", "objects_and_parts"):
            yield _case(name, library)


def _jitted(streams: tuple[str, ...], cpu: bool) -> Iterator[Check]:
    def jitted(name: str, function: str, *arguments: Any, limit_s: float = 30.0) -> Check:
        return Check(name, function, arguments, limit_s, ("jax", "jax_tvm_ffi"))

    yield jitted("one allreduce in a jitted function", "checks:one_jitted")
    yield jitted("a donated argument keeps its memory", "test_gpu_jit:donated", 0, 1)
    yield jitted("each turn of a loop calls, no CUDA graph", "test_gpu_jit:counted", 0, 1)
    for library in streams:
        function = "test_gpu_jit:one_after_the_other"
        yield jitted(f"computations and eager calls in order, {library}", function, 0, 1, library)
    yield jitted("jitted and eager calls in order", "test_gpu_jit:among_eager_ranks", 0, 1)
    yield jitted("a group that nobody asked NCCL for", "test_gpu_jit:alone", 0, 1)
    yield jitted("every collective", "test_gpu_jit:every_collective", 0, 1, limit_s=50)
    if not cpu:
        yield jitted("loops and derivatives", "test_gpu_jit:transformations", 0, 1, limit_s=50)


def _failures(library: str, cpu: bool) -> Iterator[Check]:
    # CuPy's: half of these need a process of their own, and torch takes the longest to import.
    def failure(name: str, function: str, *, alone: bool = False) -> Check:
        return Check(
            name, f"failures:{function}", (library,), alone=alone and not cpu, informed=True
        )

    yield failure("a peer that never calls", "never_calls")
    yield failure("a peer that is killed", "is_killed")
    yield failure("a peer that differs", "differs")
    yield failure("a long kernel before is no timeout", "long_before")
    yield failure("a peer that never connects", "never_connects", alone=True)
    yield failure("destroy behind a long kernel aborts", "destroyed_early", alone=True)
    yield failure("two ranks on one device work or are refused", "two_ranks", alone=True)
    yield failure("an illegal address is named", "illegal_address", alone=True)


def _speed() -> Iterator[Check]:
    needs = ("torch",)
    yield Check(
        "host time of 4 KiB, beside torch.distributed",
        "speed:host_time",
        (),
        30,
        needs,
        informed=True,
    )
    yield Check(
        "1 GiB on one rank, beside torch.distributed",
        "speed:large_call",
        (),
        30,
        needs,
        informed=True,
    )


def _two_ranks(cpu: bool) -> Iterator[Check]:
    yield Check(
        "bandwidth of two ranks", "speed:two_ranks", (), 80, ("torch",), alone=True, informed=True
    )
    if not cpu:  # together, because their ranks take long to start
        words = "2_ranks and reductions and torch or test_gpu_failures and (torch or cupy)"
        yield _part("two ranks: values and failures", words, limit_s=160, shares=True)


def _tests(cpu: bool) -> Iterator[Check]:
    if cpu:
        yield _part("some tests", "test_broadcast", shares=False)
        return
    for words in ("1_rank and mixed", "1_rank and not mixed and not threads", "1_rank and threads"):
        yield _part(f"tests: {words}", words, shares=False)
    for words in (
        "not 1_rank and not 4_ranks and not threads",
        "4_ranks and not threads",
        "not 1_rank and threads",
    ):
        yield _part(f"tests: {words}", words, shares=True)


def _part(name: str, words: str, *, shares: bool, limit_s: float = REST) -> Check:
    return Check(name, "suite:run", (words, shares), limit_s, alone=True, informed=True)


def _case(name: str, library: str) -> Check:
    return Check(
        f"{name}, {library}", "gpu_cases:run", (0, 1, name, (library,)), 40, _needs(library)
    )


def _needs(library: str) -> tuple[str, ...]:
    return () if library == "device" else (library,)


_INJECTED: Final = (
    Check("fails", "injected:fails"),
    Check("hangs", "injected:hangs", limit_s=0.3),
    Check("dies", "injected:dies"),
    Check("leaves", "injected:leaves"),
    Check("spoils", "injected:spoils"),
    Check("goes on", "injected:goes_on"),
    Check("is left out", "injected:is_left_out"),
)
