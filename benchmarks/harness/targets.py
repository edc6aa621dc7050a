"""What ColTensor set out to reach on CPU, and whether a measurement reaches it."""

from __future__ import annotations

from dataclasses import dataclass

from harness.rounds import Samples

KI, MI = 1 << 10, 1 << 20
OURS = "colltensor"
GLOO = "torch Gloo"
OURS_AT_PAGE = "colltensor, page"
OURS_LISTED = "colltensor, lists"
PAGED = "numpy, 4 KiB pages"
MPIS = ("Open MPI", "MPICH")
MPI_TORCH = "Open MPI, torch"

Results = dict[tuple[int, str, int], dict[str, Samples]]
"""Samples by label, by number of ranks, table (``allreduce``, ``frameworks``, or an operation's name) and bytes."""

FASTER_THAN_MPI: dict[int, dict[int, float]] = {
    2: {4: 1, KI: 1, 16 * KI: 2, 256 * KI: 2, MI: 2, 4 * MI: 1.6, 16 * MI: 1.6, 64 * MI: 4},
    4: {4: 1.2, KI: 2, 16 * KI: 3, 256 * KI: 1.8, MI: 1.8, 4 * MI: 1.5, 16 * MI: 1.5, 64 * MI: 2.7},
}
"""By ranks and bytes: how many times faster than the faster MPI an allreduce is to be, at least."""
FASTER_THAN_GLOO = {KI: 100.0, MI: 10.0, 64 * MI: 6.0}
"""By bytes, 2 ranks."""
SMALLEST_US = 1.5
JAX_ADDS_US = 40.0
TORCH_FACTOR = 1.1
"""What "as numpy" means for torch tensors: at most this many times numpy's time."""
OF_MEMCPY = 0.9


@dataclass(frozen=True)
class Verdict:
    """One target and what was measured.

    Attributes:
        target: The target in words.
        ours: Our number.
        other: The number it is compared with.
        reached: The ratio or difference that the target is about.
        holds: Whether it is reached.
    """

    target: str
    ours: str
    other: str
    reached: str
    holds: bool


def verdicts(results: Results) -> list[Verdict]:
    """Return a verdict on each target that the results have the numbers for."""
    found: list[Verdict] = []
    order = {"allreduce": 0, "frameworks": 1}
    for (ranks, table, nbytes), samples in sorted(
        results.items(), key=lambda item: (item[0][0], order.get(item[0][1], 2))
    ):
        where = f"{ranks} ranks, {size(nbytes)}" if nbytes else f"{ranks} ranks"
        if table == "allreduce":
            found += _allreduce(where, ranks, nbytes, samples)
        elif table == "frameworks":
            found += _frameworks(where, samples)
        elif OURS in samples and _fastest(samples, MPIS):
            found.append(_faster(f"{where}, {table}", samples, MPIS, 1))
    return found


def size(nbytes: int) -> str:
    """Return a number of bytes in words."""
    for unit, name in ((MI, "MiB"), (KI, "KiB")):
        if nbytes >= unit and nbytes % unit == 0:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} B"


def _allreduce(where: str, ranks: int, nbytes: int, samples: dict[str, Samples]) -> list[Verdict]:
    found: list[Verdict] = []
    if OURS not in samples:
        return found
    ours = samples[OURS].median_us
    if ranks == 2 and nbytes == 4:
        found.append(
            Verdict(
                f"{where}: at most {SMALLEST_US} us", f"{ours:,.2f} us", "", "", ours <= SMALLEST_US
            )
        )
    if nbytes in FASTER_THAN_MPI.get(ranks, {}) and _fastest(samples, MPIS):
        found.append(_faster(where, samples, MPIS, FASTER_THAN_MPI[ranks][nbytes]))
    if ranks == 2 and nbytes in FASTER_THAN_GLOO and GLOO in samples:
        found.append(_faster(where, samples, (GLOO,), FASTER_THAN_GLOO[nbytes]))
    copy = _fastest(samples, ("copyto", "memmove"))
    if ranks == 2 and nbytes == 64 * MI and copy:
        ratio = samples[copy].median_us / ours
        found.append(
            Verdict(
                f"{where}: at least {OF_MEMCPY} of the speed of one {copy} by each rank at once",
                f"{ours:,.0f} us",
                f"{samples[copy].median_us:,.0f} us",
                f"{ratio:.2f}",
                ratio >= OF_MEMCPY,
            )
        )
    return found


def _frameworks(where: str, samples: dict[str, Samples]) -> list[Verdict]:
    found: list[Verdict] = []
    if "numpy" not in samples:
        return found
    numpy_us = samples["numpy"].median_us
    if "torch" in samples:
        ratio = samples["torch"].median_us / numpy_us
        found.append(
            Verdict(
                f"{where}: torch tensors as numpy (at most {TORCH_FACTOR} times its time)",
                f"{samples['torch'].median_us:,.2f} us",
                f"numpy {numpy_us:,.2f} us",
                f"{ratio:.2f}",
                ratio <= TORCH_FACTOR,
            )
        )
        if MPI_TORCH in samples:
            found.append(_faster(f"{where}, torch tensors", samples, (MPI_TORCH,), 1, "torch"))
    if "JAX" in samples:
        more = samples["JAX"].median_us - numpy_us
        found.append(
            Verdict(
                f"{where}: JAX with donation within {JAX_ADDS_US:.0f} us of numpy",
                f"{samples['JAX'].median_us:,.2f} us",
                f"numpy {numpy_us:,.2f} us",
                f"{more:+,.2f} us",
                more <= JAX_ADDS_US,
            )
        )
        if PAGED in samples:
            paged_us = samples[PAGED].median_us
            more = samples["JAX"].median_us - paged_us
            found.append(
                Verdict(
                    f"{where}: the same, numpy's array in pages of 4 KiB as JAX's",
                    f"{samples['JAX'].median_us:,.2f} us",
                    f"{PAGED} {paged_us:,.2f} us",
                    f"{more:+,.2f} us",
                    more <= JAX_ADDS_US,
                )
            )
    return found


def _faster(
    where: str,
    samples: dict[str, Samples],
    peers: tuple[str, ...],
    factor: float,
    label: str = OURS,
) -> Verdict:
    peer = _fastest(samples, peers)
    assert peer is not None
    ours, theirs = samples[label].median_us, samples[peer].median_us
    wanted = (
        f"not slower than {_any(peers)}"
        if factor == 1
        else f"at least {factor:g} times faster than {_any(peers)}"
    )
    return Verdict(
        f"{where}: {wanted}",
        f"{ours:,.2f} us",
        f"{peer} {theirs:,.2f} us",
        f"{theirs / ours:.2f}",
        theirs / ours >= factor,
    )


def _any(peers: tuple[str, ...]) -> str:
    return "MPI" if peers == MPIS else " and ".join(peers)


def _fastest(samples: dict[str, Samples], labels: tuple[str, ...]) -> str | None:
    """Return the label with the lowest median, of those that were measured."""
    there = [label for label in labels if label in samples]
    return min(there, key=lambda label: samples[label].median_us, default=None)
