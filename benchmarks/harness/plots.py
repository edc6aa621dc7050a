"""Log-log plots of the benchmarks, in one style.

matplotlib is imported when there is something to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

STYLES = ("-", "--", ":")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#777777")
"""Told apart by colour-blind readers too."""


class Line(NamedTuple):
    """One line of a panel: its points, and its colour and style by number."""

    points: Sequence[tuple[float, float]]
    color: int
    style: int = 0


class Panel(NamedTuple):
    """One panel of a figure: its title and its lines by label."""

    title: str
    lines: Mapping[str, Line]


def seconds(value: float, _: object = None) -> str:
    """Return a duration in its own unit."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= unit:
            return f"{value / unit:g} {name}"
    return f"{value * 1e9:g} ns"


def size(nbytes: float, _: object = None) -> str:
    """Return a number of bytes in its own unit."""
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:g} {name}"
    return f"{nbytes:g} B"


def draw(path: str, panels: Sequence[Panel], x_label: str, y_label: str, x_name: Any) -> None:
    """Draw panels side by side into a PNG file, with common axes.

    ``x_name`` names a value of x; y is in seconds.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    width = 5.2 * len(panels)
    figure, [axes] = plt.subplots(1, len(panels), figsize=(width, 4.6), sharey=True, squeeze=False)
    for axis, panel in zip(axes, panels, strict=True):
        for label, line in panel.lines.items():
            style = {"color": COLORS[line.color], "linestyle": STYLES[line.style]}
            axis.plot(
                *zip(*line.points, strict=True), label=label, marker="o", markersize=4, **style
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sorted({x for line in panel.lines.values() for x, _ in line.points}))
        axis.xaxis.set_major_formatter(x_name)
        axis.yaxis.set_major_formatter(seconds)
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(axis="x", labelsize=8, rotation=30)
        axis.tick_params(axis="y", labelleft=True)
        axis.grid(which="major", color="#dddddd")
        axis.set_axisbelow(True)
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel(x_label)
    axes[0].set_ylabel(y_label)
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, fontsize=9, loc="lower center", ncol=min(3, len(labels)))
    figure.tight_layout(rect=(0, 0.03 + 0.05 * -(-len(labels) // 3), 1, 1))
    figure.savefig(path, dpi=130)
