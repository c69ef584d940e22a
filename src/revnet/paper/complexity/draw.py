"""The figure of the measured complexities: memory, arithmetic and time by depth."""

from pathlib import Path
from typing import Any

from revnet._figure import save, write_title
from revnet._palette import CHECKPOINT_RECURSIVE, CHECKPOINT_SQRT, GRAY, REVERSIBLE, STORED
from revnet.paper._panels import legend_below, new_panels
from revnet.paper.complexity.costs import TECHNIQUES, Complexity, Technique

_MIB = 2**20
_COLORS = (GRAY, STORED, CHECKPOINT_SQRT, CHECKPOINT_RECURSIVE, REVERSIBLE)
_OURS = "revnet"


def plot(complexity: Complexity, path: Path) -> None:
    """Draw peak memory against depth, and the ratio of arithmetic and step time to naive."""
    figure, (memory, compute) = new_panels(2)
    _plot_memory(memory, complexity)
    _plot_compute(compute, complexity)
    for axes, order in ((memory, "activations"), (compute, "compute")):
        depths = sorted({*complexity.settings.memory_depths, *complexity.settings.time_depths})
        axes.set_xscale("log", base=2)
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.set_xlabel("reversible blocks L")
        for technique, line in zip(TECHNIQUES, axes.get_lines(), strict=False):
            paper = getattr(technique, order)
            line.set_label(technique.title + (f", paper: {_math(paper)}" if paper else ""))
        legend_below(axes, num_columns=1)
    save(figure, path)


def _plot_memory(axes: Any, complexity: Complexity) -> None:
    write_title(axes, "peak memory of a step")
    for technique, color in zip(TECHNIQUES, _COLORS, strict=True):
        costs = complexity.costs_of(technique)
        peaks = [cost.peak_bytes / _MIB for cost in costs]
        axes.plot([cost.depth for cost in costs], peaks, color=color, marker="o", linewidth=_width(technique))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_ylabel("MiB without parameters and input")


def _plot_compute(axes: Any, complexity: Complexity) -> None:
    title = "arithmetic of a step" + ("; diamonds: its time" if complexity.times else "")
    write_title(axes, title)
    naive = [cost.flops for cost in complexity.costs_of(TECHNIQUES[0])]
    for technique, color in zip(TECHNIQUES, _COLORS, strict=True):
        costs = complexity.costs_of(technique)
        ratios = [cost.flops / reference for cost, reference in zip(costs, naive, strict=True)]
        axes.plot([cost.depth for cost in costs], ratios, color=color, marker="o", linewidth=_width(technique))
    for index, (technique, color) in enumerate(zip(TECHNIQUES, _COLORS, strict=True)):
        for row in complexity.times_of(technique):
            if row.times is not None and technique is not TECHNIQUES[0]:
                ratio = row.times.over_plain
                at = row.depth * 1.09 ** (index + 1)  # next to each other
                axes.plot([at, at], [ratio.first, ratio.third], color=color, linewidth=1.4)
                axes.plot([at], [ratio.median], color=color, marker="D", markersize=5, markerfacecolor="white")
    axes.set_ylim(bottom=0.9)
    axes.set_ylabel("ratio to naive")


def _width(technique: Technique) -> float:
    return 2.6 if technique.method == _OURS else 1.4


def _math(order: str) -> str:
    """Return the order in the notation of matplotlib's formulas."""
    return "$" + order.replace("sqrt L", r"\sqrt{L}").replace("log L", r"\,\log\,L") + "$"
