"""Picture of a plan: time against memory."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from revnet._bytes import format_bytes
from revnet._figure import clear_frame, new_figure, save, write_title
from revnet._palette import BLUE, INK, PURPLE
from revnet.memory.planning._label_placement import Label, place_labels
from revnet.memory.planning._planned_unit import PlanPoint
from revnet.memory.step._timeline_plot import alignment_inside, largest_unit

_MARKERS = "sD^vPX"
_LARGEST_LINEAR = 5.0
"""Largest ratio of times on a linear axis."""
_LONGEST_LINE = 75
"""Largest number of characters in a line of the title."""
_FARTHEST_BUDGET = 1.5
"""Largest budget that is drawn as a line, relative to the largest peak; a line farther away would squeeze the rest."""


def plot_plan(
    points: Sequence[PlanPoint],
    chosen: PlanPoint,
    references: Mapping[str, PlanPoint],
    path: Path,
    *,
    title: str,
    budget_bytes: int | None,
) -> None:
    """Draw the time of a step against its peak memory: the best plans, the chosen one, and references.

    Args:
        points: The best plans, by ascending peak.
        chosen: The plan that was chosen.
        references: Other ways to run the step, by name.
        path: PNG file to write.
        title: Title of the picture, such as "RevNet-110, batch 128".
        budget_bytes: Budget of the plan; None for no line.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = new_figure(7.5, 4.6)
    axes = figure.subplots()
    drawn = [*points, chosen, *references.values()]
    most = max(point.peak_bytes for point in drawn)
    if budget_bytes is not None and budget_bytes < _FARTHEST_BUDGET * most:
        most = max(most, budget_bytes)
    times = [point.time_ratio for point in drawn]
    unit, unit_bytes = largest_unit(most)
    right = 1.1 * most / unit_bytes
    axes.set_xlim(0, right)
    _set_time_axis(axes, min(1.0, *times), max(times))
    axes.set_xlabel(f"peak memory of a step ({unit})")
    axes.set_ylabel("time of a step / of plain autograd")
    clear_frame(axes)
    write_title(axes, textwrap.fill(title, _LONGEST_LINE, break_on_hyphens=False), pad=20)
    steps = [(point.peak_bytes / unit_bytes, point.time_ratio) for point in points]
    steps.append((right, steps[-1][1]))  # beyond the largest peak, more memory saves no time
    axes.plot(*zip(*steps, strict=True), drawstyle="steps-post", color=BLUE, linewidth=2)
    covered = _points_along(steps)
    if budget_bytes is not None:
        covered += _mark_budget(axes, budget_bytes, unit_bytes)
    same = [name for name, point in references.items() if point == chosen]
    name = " = ".join(["this plan", *same])
    labels = [_mark_point(axes, name, chosen, unit_bytes, "o", size=13, color=PURPLE, fontweight="bold")]
    for (name, point), marker in zip(references.items(), cycle(_MARKERS), strict=False):
        if point != chosen:
            labels.append(_mark_point(axes, name, point, unit_bytes, marker, size=7, color=INK))
    covered += [(label.x, label.y) for label in labels]
    labels.append(Label("the fastest plan that fits", *steps[len(points) // 2], {"color": BLUE, "fontsize": 9}))
    place_labels(axes, labels, covered)
    save(figure, path)


def _set_time_axis(axes: Any, least: float, most: float) -> None:
    """Set the scale and the limits of the axis of times, which is logarithmic if one time would dwarf the others."""
    if most > _LARGEST_LINEAR * least:
        axes.set_yscale("log")
        axes.set_ylim(least / 1.5, most * 2)
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        margin = 0.12 * max(0.2, most - least)
        axes.set_ylim(least - margin, most + 2 * margin)


def _mark_budget(axes: Any, budget_bytes: int, unit_bytes: int) -> list[tuple[float, float]]:
    """Draw the budget as a line, with an arrow if it is to the right of the axes; return points on the line."""
    x, right = budget_bytes / unit_bytes, axes.get_xlim()[1]
    text = f"budget {format_bytes(budget_bytes)}" + (" ->" if x > right else "")
    style = {"ha": alignment_inside(x / right), "fontsize": 9, "color": INK}
    axes.annotate(text, (min(x, right), 1.02), xycoords=("data", "axes fraction"), **style)
    axes.axvline(x, color=INK, linewidth=1, linestyle="--")
    low, high = axes.get_ylim()
    return [(x, float(y)) for y in np.linspace(low, high, 100)]


def _mark_point(
    axes: Any, name: str, point: PlanPoint, unit_bytes: int, marker: str, *, size: float, color: str, **style: Any
) -> Label:
    """Draw the point and return its label."""
    x, y = point.peak_bytes / unit_bytes, point.time_ratio
    axes.plot([x], [y], marker, markersize=size, color=color, markeredgecolor="white", zorder=20 - size)
    text = f"{name}\n{format_bytes(point.peak_bytes)}, {y:.2f}x"
    return Label(text, x, y, {"color": color, "fontsize": 9, **style}, size)


def _points_along(steps: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return points on the staircase, dense enough to show whether a label covers it."""
    points: list[tuple[float, float]] = []
    num_per_line = 2 + 200 // len(steps)
    for (x, y), (next_x, next_y) in pairwise(steps):
        points += zip(np.linspace(x, next_x, num_per_line), [y] * num_per_line, strict=True)
        points += zip([next_x] * num_per_line, np.linspace(y, next_y, num_per_line), strict=True)
    return points
