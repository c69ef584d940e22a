"""Picture of a training step: memory alive at each moment, with the peak."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from revnet._bytes import format_bytes
from revnet._figure import clear_frame, new_figure, save, write_title
from revnet._palette import BLUE, CYAN, INK, LIGHT_GRAY, PURPLE, YELLOW
from revnet.memory.step._memory_parts import Timeline
from revnet.memory.step._step_memory import StepMemory

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))
_CARET_DOWN = 7
"""Number of matplotlib's triangle that points down, with its tip at the position of the marker."""
_MOST_COLUMNS = 400
"""Largest number of columns of a timeline; with more, the allocations of each block would look like a comb."""
_LONGEST_NAME = 40
_LONGEST_LINE = 75
"""Largest number of characters in a line of the title."""


def plot_timeline(memory: StepMemory, path: Path, *, title: str) -> None:
    """Draw the memory alive at each moment of a training step, and mark the peak.

    Args:
        memory: Memory of the step.
        path: PNG file to write.
        title: Title of the picture, such as "RevNet-110, batch 128".

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = new_figure(7.5, 4.4)
    axes = figure.subplots()
    unit, unit_bytes = largest_unit(memory.peak_bytes)
    names, colors, bands = zip(*_bands(memory), strict=True)
    total = np.sum(bands, axis=0)
    shown = _highest_of_each_column(total)
    edges = [*shown, len(total)]
    heights = [band[[*shown, -1]] / unit_bytes for band in bands]
    axes.stackplot(edges, heights, colors=colors, labels=names, step="post", linewidth=0)
    axes.set(xlim=(0, len(total)), ylim=(0, 1.25 * memory.peak_bytes / unit_bytes), xticks=[])
    axes.set_xlabel("allocations and frees, in order")
    axes.set_ylabel(f"memory ({unit})")
    _mark_phases(axes, memory.timeline)
    _mark_peak(axes, memory, int(total.argmax()) / len(total), unit_bytes)
    clear_frame(axes)
    axes.set_axisbelow(True)
    write_title(axes, textwrap.fill(title, _LONGEST_LINE, break_on_hyphens=False), pad=20)
    handles, _ = axes.get_legend_handles_labels()
    # The topmost band first.
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


def largest_unit(most_bytes: int) -> tuple[str, int]:
    """Return the largest unit that is not larger than `most_bytes`, and its size in bytes."""
    return next((name, size) for name, size in _UNITS if most_bytes >= size)


def alignment_inside(position: float) -> str:
    """Return the alignment that keeps a text at this fraction of the width inside the axes."""
    return "left" if position < 0.2 else "right" if position > 0.8 else "center"


def _bands(memory: StepMemory) -> Iterator[tuple[str, str, npt.NDArray[np.int64]]]:
    """Yield label, color and bytes at each point of the timeline for each band, from the lowest; skip empty ones."""
    timeline, at_peak = memory.timeline, memory.at_peak
    always = np.ones(len(timeline), np.int64)
    for name, color, num_bytes, band in (
        ("parameters and buffers", LIGHT_GRAY, at_peak.parameters + at_peak.buffers, always),
        ("optimizer state", CYAN, at_peak.optimizer, always),
        ("inputs", YELLOW, at_peak.inputs, always),
        ("gradients", PURPLE, at_peak.gradients, timeline.gradient_bytes),
        ("activations", BLUE, at_peak.held + at_peak.transient, timeline.activation_bytes),
    ):
        heights = num_bytes * band if band is always else band
        if heights.any():
            yield f"{name}  {format_bytes(num_bytes)}", color, heights


def _highest_of_each_column(total: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the points to draw, in order: all, or the highest of each column if there are too many."""
    columns = np.array_split(np.arange(len(total)), min(len(total), _MOST_COLUMNS))
    return np.array([column[total[column].argmax()] for column in columns])


def _mark_phases(axes: Any, timeline: Timeline) -> None:
    starts = {"forward": 0, "backward": timeline.backward_start, "optimizer": timeline.optimizer_start}
    for name, start in starts.items():
        if start < len(timeline):
            # The optimizer's step is often so short that its name would leave the picture on the right.
            align = "right" if start > 0.85 * len(timeline) else "left"
            axes.annotate(name, (start, 1.02), xycoords=("data", "axes fraction"), ha=align, fontsize=9, color=INK)
            if start:
                axes.axvline(start, color=INK, linewidth=0.8, linestyle=":")


def _mark_peak(axes: Any, memory: StepMemory, position: float, unit_bytes: int) -> None:
    module = memory.peak_module
    if len(module) > _LONGEST_NAME:
        module = "..." + module[3 - _LONGEST_NAME :]
    where = f"{memory.peak_phase}, {module}" if module else memory.peak_phase
    height = memory.peak_bytes / unit_bytes
    x = position * len(memory.timeline)
    axes.plot([x], [height], marker=_CARET_DOWN, color=INK, markersize=7, zorder=3)
    axes.annotate(
        f"peak {format_bytes(memory.peak_bytes)}\n{where}",
        (x, height),
        (0, 8),
        textcoords="offset points",
        ha=alignment_inside(position),
        fontsize=9,
        color=INK,
        parse_math=False,
        bbox={"color": "white", "pad": 1},  # hides the lines that cross the text
    )
