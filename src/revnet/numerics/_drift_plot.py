"""Picture of a drift: errors and amplification by depth."""

import math
import textwrap
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeGuard

from revnet._figure import clear_frame, new_figure, save, write_title
from revnet._palette import BLUE, INK, LIGHT_GRAY, RED
from revnet.numerics._block_drift import BlockDrift, amplifications, mean_amplification, rebuilt_runs
from revnet.numerics._drift_verdict import SOUND_BELOW, WRONG_ABOVE

_FLOOR, _CEILING = 1e-8, 1e1
"""Smallest range of the axis of errors: from below the rounding of float32 to an error of 1000 %."""
_OUTLIER = 10.0
"""Largest amplification, relative to the mean, that is drawn on a linear axis."""
_LONGEST_LINE = 75
"""Largest number of characters in a line of the title, and in the names of all lists of blocks."""
_MOST_PARTS = 8
"""Largest number of lists to name."""


def plot_drift(blocks: Sequence[BlockDrift], keyframes: Sequence[str], path: Path, *, title: str) -> None:
    """Draw the errors of activations, and of gradients if there are any, above the amplification of each block.

    Args:
        blocks: Drift of each block.
        keyframes: Names of the residual functions before which a stream was kept.
        path: PNG file to write.
        title: Title of the picture.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = new_figure(7.5, 5.8)
    errors, growth = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    _plot_errors(errors, blocks, keyframes)
    _plot_amplification(growth, blocks)
    has_parts = _mark_parts(errors, blocks)
    growth.set_xlabel("block (the backward pass rebuilds from right to left)")
    growth.set_xlim(-0.6, max(len(blocks) - 0.4, 0.6))
    growth.xaxis.get_major_locator().set_params(integer=True)
    write_title(errors, textwrap.fill(title, _LONGEST_LINE, break_on_hyphens=False), pad=20 if has_parts else 10)
    figure.align_ylabels()
    handles, labels = errors.get_legend_handles_labels()
    if handles:
        # Below the panels, where a long title or a high curve cannot run into it.
        figure.legend(handles, labels, loc="outside lower left", frameon=False, fontsize=8, ncols=4)
    save(figure, path)


def _plot_errors(axes: Any, blocks: Sequence[BlockDrift], keyframes: Sequence[str]) -> None:
    clear_frame(axes)
    axes.set_yscale("log")
    axes.set_ylabel("relative error")
    errors = [block.error for block in blocks]
    gradients = [None if block.gradient is None else block.gradient.relative_error for block in blocks]
    drawn = [error for error in [*errors, *gradients] if _is_drawable(error)]
    low, high = min([_FLOOR, *(error / 3 for error in drawn)]), max([_CEILING, *(3 * error for error in drawn)])
    axes.set_ylim(low, high)
    _plot_curves(axes, blocks, gradients)
    _mark_thresholds(axes, low, high)
    # Values that a logarithmic axis cannot show have markers at its ends, each kind at a height of its own.
    bottom = [low * (high / low) ** share for share in (0.03, 0.07, 0.11)]
    _mark(axes, [error == 0 for error in errors], bottom[0], "o", BLUE, "activations, error 0", hollow=True)
    _mark(axes, [error == 0 for error in gradients], bottom[1], "s", RED, "gradients, error 0", hollow=True)
    is_kept = [error is None for error in errors]
    _mark(axes, is_kept, bottom[2], "^", INK, "kept, not rebuilt")
    is_broken = [error is not None and not math.isfinite(error) for error in errors]
    _mark(axes, is_broken, high / 2, "x", RED, "NaN or inf when rebuilt")
    for index, position in enumerate(_keyframe_positions(blocks, keyframes)):
        axes.axvline(position, color=INK, linewidth=1, linestyle=":", label=None if index else "keyframe")
    if all(is_kept):
        _write(axes, "nothing is rebuilt")
    elif not any(errors) and not any(gradients):
        _write(axes, "exact: the error of every block is 0")


def _is_drawable(error: float | None) -> TypeGuard[float]:
    """Return whether a logarithmic axis can show the error."""
    return error is not None and 0 < error < math.inf


def _plot_curves(axes: Any, blocks: Sequence[BlockDrift], gradients: Sequence[float | None]) -> None:
    numbers = {id(block): number for number, block in enumerate(blocks)}
    label = "activations, as rebuilt"
    for run in rebuilt_runs(blocks):
        points = [(numbers[id(block)], block.error) for block in run if _is_drawable(block.error)]
        if points:
            style: dict[str, Any] = {"color": BLUE, "marker": "o", "markersize": 4, "linewidth": 1.6, "zorder": 3}
            axes.plot(*zip(*points, strict=True), **style, label=label)
            label = "_"  # one entry in the legend for all runs
    points = [(number, error) for number, error in enumerate(gradients) if _is_drawable(error)]
    if points:
        # The dots show single blocks, which have no line.
        style = {"color": RED, "linestyle": (0, (3, 2)), "marker": ".", "markersize": 3}
        axes.plot(*zip(*points, strict=True), **style, label="gradients of the block")


def _mark_thresholds(axes: Any, low: float, high: float) -> None:
    """Shade the ranges of acceptable and of too large errors, with labels to the right of the axes."""
    axes.axhspan(WRONG_ABOVE, high, color=RED, alpha=0.08, linewidth=0)
    axes.axhspan(low, SOUND_BELOW, color=BLUE, alpha=0.06, linewidth=0)
    for height, text, align in (
        (SOUND_BELOW, f"sound\nbelow\n{SOUND_BELOW:g}", "top"),
        (WRONG_ABOVE, f"wrong\nabove\n{WRONG_ABOVE:g}", "bottom"),
    ):
        _write_at_right(axes, text, height, align)


def _mark(
    axes: Any, is_marked: Sequence[bool], height: float, marker: str, color: str, label: str, *, hollow: bool = False
) -> None:
    numbers = [number for number, is_here in enumerate(is_marked) if is_here]
    if numbers:
        style = {"color": color, "markersize": 5, "markerfacecolor": "none" if hollow else color}
        axes.plot(numbers, [height] * len(numbers), marker, **style, label=label, zorder=3)


def _write(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", fontsize="large", color=BLUE)


def _write_at_right(axes: Any, text: str, height: float, align: str) -> None:
    """Write a text to the right of the axes, where it covers no curve."""
    axes.annotate(
        text,
        (1, height),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va=align,
        fontsize=8,
        color=INK,
    )


def _keyframe_positions(blocks: Sequence[BlockDrift], keyframes: Sequence[str]) -> list[float]:
    """Return the positions of keyframes on the axis: before a block, or in its middle."""
    numbers = {block.name: number for number, block in enumerate(blocks)}
    names = [keyframe.rpartition(".") for keyframe in keyframes]
    return [numbers[block] - (0.5 if function == "f" else 0) for block, _, function in names if block in numbers]


def _plot_amplification(axes: Any, blocks: Sequence[BlockDrift]) -> None:
    clear_frame(axes)
    axes.set_ylabel("amplification")
    axes.axhline(1, color=LIGHT_GRAY, linewidth=1)
    numbers = {id(block): number for number, block in enumerate(blocks)}
    points = [(numbers[id(block)], factor) for block, factor in amplifications(blocks)]
    mean = mean_amplification(blocks)
    if not points or mean is None:
        axes.set_ylim(0, 2)
        return
    factors = [factor for _, factor in points]
    if max(factors) > _OUTLIER * mean or min(factors) < mean / _OUTLIER:
        # One outlier on a linear axis would flatten all other bars.
        axes.set_yscale("log")
        axes.bar([number for number, _ in points], [factor - 1 for factor in factors], bottom=1, color=BLUE, zorder=3)
        axes.set_ylim(min(0.5, min(factors) / 2), 2 * max(factors))
    else:
        axes.bar(*zip(*points, strict=True), color=BLUE, width=0.7, zorder=3)
        axes.set_ylim(0, 1.1 * max(factors))
    axes.axhline(mean, color=INK, linewidth=1, linestyle=":", zorder=4)
    _write_at_right(axes, f"mean\n{mean:.2f}", mean, "center")


def _mark_parts(axes: Any, blocks: Sequence[BlockDrift]) -> bool:
    """Separate the lists of blocks by lines, and write their names above the axes; return whether any are."""
    parts = [(part, len(list(members))) for part, members in groupby(blocks, lambda b: b.name.rpartition(".")[0])]
    if len(parts) < 2:
        return False
    has_names = len(parts) <= _MOST_PARTS
    start = 0
    for part, count in parts:
        if start:
            for panel in axes.figure.axes:
                panel.axvline(start - 0.5, color=LIGHT_GRAY, linewidth=1)
        if has_names:
            axes.annotate(
                _part_name(part, _LONGEST_LINE // len(parts)),
                (start + (count - 1) / 2, 1.02),
                xycoords=("data", "axes fraction"),
                ha="center",
                fontsize=8,
                color=INK,
            )
        start += count
    return has_names


def _part_name(part: str, most: int) -> str:
    """Return the name of a list of blocks or of its sequence, cut to `most` characters from the left."""
    name = part.removesuffix(".blocks").removesuffix(".reversible")
    return name if len(name) <= most else f"...{name[3 - most :]}"
