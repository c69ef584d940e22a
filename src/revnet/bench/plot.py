"""The figures: memory by depth, and time against memory."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from revnet._figure import clear_frame, new_figure, save, write_title
from revnet._palette import (
    CHECKPOINT_RECURSIVE,
    CHECKPOINT_SQRT,
    GRAY,
    GREEN,
    PURPLE,
    REVERSIBLE,
    REVERSIBLE_LIGHT,
    STORED,
)
from revnet.bench.cases import CASES
from revnet.bench.methods import METHODS, PLAIN
from revnet.bench.run import Results

_MIB = 2**20
_COLORS = {
    "plain": GRAY,
    "checkpoint": STORED,
    "checkpoint sqrt": CHECKPOINT_SQRT,
    "checkpoint recursive": CHECKPOINT_RECURSIVE,
    "selective checkpoint": "#bb7744",
    "save_on_cpu": "#999999",
    "compile, budget": "#bb4477",
    "revnet": REVERSIBLE,
    "revnet, last stored": REVERSIBLE_LIGHT,
    "revnet, hold": "#3377cc",
    "revnet, hold and keep": "#66a3d9",
}
_LIBRARY_COLORS = (PURPLE, GREEN, "#66aacc", "#884422", "#555599", "#999933")


class _Label(NamedTuple):
    """A label and the last point of its curve."""

    text: str
    x: float
    y: float
    color: str
    is_ours: bool


def plot_memory(results: Results, path: Path) -> None:
    """Draw peak memory against depth on logarithmic axes."""
    figure, panels = _figure()
    depths = sorted({row.depth for row in results.memory})
    for case, axes in zip(CASES, panels, strict=True):
        labels = []
        for name, color in _colors().items():
            rows = [row for row in results.memory if (row.case, row.method) == (case.name, name)]
            points = [(row.depth, row.peak_bytes / _MIB) for row in rows if row.peak_bytes is not None]
            if points:
                is_ours = name.startswith("revnet")
                width = 2.5 if is_ours else 1.4
                axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, linewidth=width)
                depth, peak = points[-1]
                at = "" if depth == depths[-1] else f" at {depth}"
                labels.append(_Label(f"{name}  {peak:,.0f}{at}", depth, peak, color, is_ours))
        axes.set_xscale("log", base=2)
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.set_xlabel("reversible blocks")
        axes.set_xlim(depths[0] / 1.15, depths[-1] * 1.15)
        _finish(axes, case.name, labels)
    save(figure, path)


def plot_times(results: Results, path: Path) -> None:
    """Draw peak memory against step time, one point per method. The lower left is best."""
    figure, panels = _figure()
    colors = _colors()
    peaks = {(row.case, row.depth, row.method): row.peak_bytes for row in results.memory}
    for case, axes in zip(CASES, panels, strict=True):
        labels = []
        for row in results.times:
            peak = peaks.get((row.case, row.depth, row.method))
            if row.case != case.name or row.times is None or peak is None:
                continue
            ratio, color = row.times.over_plain, colors[row.method]
            axes.plot([ratio.first, ratio.third], [peak / _MIB] * 2, color=color, linewidth=2.5, alpha=0.4)
            axes.plot([ratio.median], [peak / _MIB], color=color, marker="o")
            is_ours = row.method.startswith("revnet")
            labels.append(_Label(f"{row.method}  {ratio.median:.2f}x", ratio.median, peak / _MIB, color, is_ours))
            if row.method == PLAIN.name:
                ideal = 1 / row.times.over_ideal.median
                axes.axvline(ideal, color=GRAY, linewidth=0.8, linestyle=":")
                style = {"ha": "center", "fontsize": 7, "color": "#666666"}
                axes.annotate("one more forward", (ideal, 1.02), xycoords=("data", "axes fraction"), **style)
        axes.set_xlabel(f"step time / plain step time, {results.settings.time_depth} blocks")
        _finish(axes, case.name, labels)
    save(figure, path)


def _figure() -> tuple[Any, Any]:
    figure = new_figure(5.6 * len(CASES), 4.2, layout=None)
    panels = figure.subplots(1, len(CASES), squeeze=False)[0]
    figure.subplots_adjust(left=0.06, right=0.81, top=0.87, bottom=0.13, wspace=0.95)
    return figure, panels


def _finish(axes: Any, title: str, labels: Sequence[_Label]) -> None:
    write_title(axes, title, pad=16)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:,.0f}" if str(value)[0] in "25" else "")
    axes.tick_params(axis="y", which="both", labelsize=8)
    axes.set_ylabel("peak activation memory (MiB)")
    clear_frame(axes)
    _name(axes, labels)


def _name(axes: Any, labels: Sequence[_Label]) -> None:
    """Write the labels in a column to the right of the axes, in the order of their points, and connect them."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    heights = [(math.log(label.y) - low) / (high - low) for label in labels]
    label_heights = _spread(heights, spacing=0.062)
    for label, height in zip(labels, label_heights, strict=True):
        axes.annotate(
            label.text,
            (label.x, label.y),
            (1.06, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=label.color,
            fontweight="bold" if label.is_ours else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": label.color,
                "linewidth": 0.6,
                "linestyle": ":",
                "relpos": (0, 0.5),  # from the left end of the text, so that no line crosses another label
                "shrinkB": 3,
            },
        )


def _spread(heights: Sequence[float], spacing: float) -> list[float]:
    """Move heights apart until neighbors are `spacing` apart. The order does not change."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    places = list(heights)
    for _ in range(500):
        for below, above in pairwise(order):
            overlap = spacing - (places[above] - places[below])
            if overlap > 0:
                places[below] -= overlap / 2
                places[above] += overlap / 2
        for rank, index in enumerate(order):
            places[index] = max(places[index], rank * spacing)
    return places


def _colors() -> dict[str, str]:
    """Return the color of each method."""
    libraries = [method.name for method in METHODS if method.name not in _COLORS]
    return _COLORS | {name: _LIBRARY_COLORS[index % len(_LIBRARY_COLORS)] for index, name in enumerate(libraries)}
