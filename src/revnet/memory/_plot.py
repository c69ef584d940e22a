"""The pictures: what is alive during a step, and time against memory of the plans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from revnet._palette import BLUE, CYAN, INK, LIGHT_GRAY, PURPLE, YELLOW
from revnet._picture import clear_frame, new_figure, save, write_title
from revnet.memory._bytes import format_bytes
from revnet.memory._labels import Label, place_labels
from revnet.memory._step_memory import StepMemory, Timeline

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))
_MARKERS = "sD^vPX"
_CARET_DOWN = 7
"""matplotlib's number of the triangle that stands on its tip."""
_MOST_COLUMNS = 400
"""Of a timeline: with more, what comes and goes in each block becomes a comb."""
_LONGEST_NAME = 40
_FARTHEST_BUDGET = 1.5
"""In peaks of the plan that needs most: a line farther to the right would leave little room for all else."""


def plot_timeline(memory: StepMemory, path: Path, *, title: str) -> None:
    """Draw what is alive at each moment of a training step, and mark the peak.

    Args:
        memory: The step.
        path: The PNG file to write.
        title: What was measured: "RevNet-110, batch 128".

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = new_figure(7.5, 4.4)
    axes = figure.subplots()
    unit, unit_bytes = _unit(memory.peak_bytes)
    names, colors, bands = zip(*_bands(memory), strict=True)
    total = np.sum(bands, axis=0)
    shown = _highest_of_each_column(total)
    edges = [*shown, len(total)]
    heights = [band[[*shown, -1]] / unit_bytes for band in bands]
    axes.stackplot(edges, heights, colors=colors, labels=names, step="post", linewidth=0)
    axes.set(xlim=(0, len(total)), ylim=(0, 1.25 * memory.peak_bytes / unit_bytes), xticks=[])
    axes.set_xlabel("what the step allocates and frees, in order")
    axes.set_ylabel(f"memory ({unit})")
    _mark_phases(axes, memory.timeline)
    _mark_peak(axes, memory, int(total.argmax()) / len(total), unit_bytes)
    clear_frame(axes)
    axes.set_axisbelow(True)
    write_title(axes, title, pad=20)
    handles, _ = axes.get_legend_handles_labels()
    # The highest first, as they lie on each other.
    figure.legend(
        handles[::-1],
        names[::-1],
        loc="outside lower left",
        title="at the peak",
        alignment="left",
        ncols=3,
        frameon=False,
        fontsize=9,
        title_fontsize=9,
    )
    save(figure, path)


def plot_plan(
    points: Sequence[tuple[int, float]],
    chosen: tuple[str, int, float],
    references: Sequence[tuple[str, int, float]],
    path: Path,
    *,
    title: str,
    budget_bytes: int | None,
) -> None:
    """Draw what time each peak of memory costs: the best plans, the chosen one, and others to compare with.

    A time is that of a step relative to the same step under plain autograd.

    Args:
        points: The best plans, (peak in bytes, time), by ascending peak.
        chosen: The plan that was chosen: (name, peak in bytes, time).
        references: What else could be done: ("plain autograd", peak in bytes, time), ...
        path: The PNG file to write.
        title: What was planned: "RevNet-110, batch 128".
        budget_bytes: What the plan must fit into, if anything.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = new_figure(7.5, 4.6)
    axes = figure.subplots()
    marked = [chosen, *references]
    most = max([*(peak for peak, _ in points), *(peak for _, peak, _ in marked)])
    if budget_bytes is not None and budget_bytes < _FARTHEST_BUDGET * most:
        most = max(most, budget_bytes)
    times = [*(time for _, time in points), *(time for _, _, time in marked)]
    unit, unit_bytes = _unit(most)
    right = 1.1 * most / unit_bytes
    margin = 0.12 * max(0.2, max(times) - min(times))
    axes.set(xlim=(0, right), ylim=(min(1.0, *times) - margin, max(times) + 2 * margin))
    axes.set_xlabel(f"peak memory of a step ({unit})")
    axes.set_ylabel("time of a step / of plain autograd")
    clear_frame(axes)
    write_title(axes, title, pad=20)
    steps = [(peak / unit_bytes, time) for peak, time in points]
    steps.append((right, steps[-1][1]))  # more memory is of no use from there on
    axes.plot(*zip(*steps, strict=True), drawstyle="steps-post", color=BLUE, linewidth=2)
    covered = _points_along(steps)
    if budget_bytes is not None:
        covered += _mark_budget(axes, budget_bytes, unit_bytes)
    name, *place = chosen
    name = " = ".join([name, *(other for other, *its_place in references if its_place == place)])
    labels = [_mark_plan(axes, name, *chosen[1:], unit_bytes, "o", size=13, color=PURPLE, fontweight="bold")]
    for reference, marker in zip(references, cycle(_MARKERS), strict=False):
        if reference[1:] != chosen[1:]:
            labels.append(_mark_plan(axes, *reference, unit_bytes, marker, size=7, color=INK))
    covered += [(label.x, label.y) for label in labels]
    labels.append(Label("the fastest plan that fits", *steps[len(points) // 2], {"color": BLUE, "fontsize": 9}))
    place_labels(axes, labels, covered)
    save(figure, path)


def _unit(most_bytes: int) -> tuple[str, int]:
    """The unit in which so many bytes are a number with few digits, and its bytes."""
    return next((name, size) for name, size in _UNITS if most_bytes >= size)


def _bands(memory: StepMemory) -> Iterator[tuple[str, str, npt.NDArray[np.int64]]]:
    """Label, colour, and the bytes at each point of the timeline, from the lowest to the highest; nothing empty."""
    timeline, at_peak = memory.timeline, memory.at_peak
    always = np.ones(len(timeline), np.int64)
    for name, color, num_bytes, band in (
        ("parameters and buffers", LIGHT_GRAY, at_peak.parameters + at_peak.buffers, always),
        ("optimizer state", CYAN, at_peak.optimizer, always),
        ("inputs", YELLOW, at_peak.inputs, always),
        ("gradients", PURPLE, at_peak.gradients, timeline.gradient_bytes),
        ("activations", BLUE, at_peak.held + at_peak.transient, timeline.activation_bytes),
    ):
        bytes_there = num_bytes * band if band is always else band
        if bytes_there.any():
            yield f"{name}  {format_bytes(num_bytes)}", color, bytes_there


def _highest_of_each_column(total: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The points to show, in order: all, or those that stand out of their neighbours where there are too many."""
    columns = np.array_split(np.arange(len(total)), min(len(total), _MOST_COLUMNS))
    return np.array([column[total[column].argmax()] for column in columns])


def _mark_phases(axes: Any, timeline: Timeline) -> None:
    starts = {"forward": 0, "backward": timeline.backward_start, "optimizer": timeline.optimizer_start}
    for name, start in starts.items():
        if start < len(timeline):
            axes.annotate(name, (start, 1.02), xycoords=("data", "axes fraction"), fontsize=9, color=INK)
            if start:
                axes.axvline(start, color=INK, linewidth=0.8, linestyle=":")


def _mark_peak(axes: Any, memory: StepMemory, place: float, unit_bytes: int) -> None:
    module = memory.peak_module
    if len(module) > _LONGEST_NAME:
        module = "..." + module[3 - _LONGEST_NAME :]
    where = f"{memory.peak_phase}, {module}" if module else memory.peak_phase
    height = memory.peak_bytes / unit_bytes
    x = place * len(memory.timeline)
    axes.plot([x], [height], marker=_CARET_DOWN, color=INK, markersize=7, zorder=3)
    axes.annotate(
        f"peak {format_bytes(memory.peak_bytes)}\n{where}",
        (x, height),
        (0, 8),
        textcoords="offset points",
        ha=_side_that_fits(place),
        fontsize=9,
        color=INK,
        parse_math=False,
        bbox={"color": "white", "pad": 1},  # no line behind it
    )


def _mark_budget(axes: Any, budget_bytes: int, unit_bytes: int) -> list[tuple[float, float]]:
    """Draw the line, or say that it lies to the right; returns points on it."""
    x, right = budget_bytes / unit_bytes, axes.get_xlim()[1]
    text = f"budget {format_bytes(budget_bytes)}" + (" ->" if x > right else "")
    style = {"ha": _side_that_fits(x / right), "fontsize": 9, "color": INK}
    axes.annotate(text, (min(x, right), 1.02), xycoords=("data", "axes fraction"), **style)
    axes.axvline(x, color=INK, linewidth=1, linestyle="--")
    low, high = axes.get_ylim()
    return [(x, float(y)) for y in np.linspace(low, high, 100)]


def _mark_plan(
    axes: Any, name: str, peak: int, time: float, unit_bytes: int, marker: str, *, size: float, color: str, **style: Any
) -> Label:
    """Draw the point; returns its label."""
    x = peak / unit_bytes
    axes.plot([x], [time], marker, markersize=size, color=color, markeredgecolor="white", zorder=20 - size)
    return Label(f"{name}\n{format_bytes(peak)}, {time:.2f}x", x, time, {"color": color, "fontsize": 9, **style}, size)


def _points_along(steps: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points on the staircase, dense enough to say what covers it."""
    points: list[tuple[float, float]] = []
    num_each = 2 + 200 // len(steps)
    for (x, y), (next_x, next_y) in pairwise(steps):
        points += zip(np.linspace(x, next_x, num_each), [y] * num_each, strict=True)
        points += zip([next_x] * num_each, np.linspace(y, next_y, num_each), strict=True)
    return points


def _side_that_fits(place: float) -> str:
    """How to align a text at this fraction of the width, for it to stay inside."""
    return "left" if place < 0.2 else "right" if place > 0.8 else "center"
