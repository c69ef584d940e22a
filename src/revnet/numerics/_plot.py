"""The picture of a drift: errors and amplification by depth."""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from revnet._palette import BLUE, INK, LIGHT_GRAY, RED
from revnet._picture import clear_frame, new_figure, save, write_title
from revnet.numerics._verdict import SOUND_BELOW, WRONG_ABOVE, level_of, rebuilt_runs

if TYPE_CHECKING:
    from revnet.numerics._drift import Drift

_FLOOR, _CEILING = 1e-8, 1e1
"""What the axis of errors shows at least: from below the rounding of float32 to nothing being right."""


def plot_drift(drift: Drift, path: Path, *, title: str) -> None:
    """Draw the errors of activations, and of gradients if there are any, over the amplification of each block.

    Args:
        drift: What was measured.
        path: The PNG file to write.
        title: What was measured.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = new_figure(7.5, 5.6)
    errors, growth = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    _plot_errors(errors, drift)
    _plot_amplification(growth, drift)
    _mark_parts(errors, drift)
    growth.set_xlabel("block (the backward pass rebuilds from right to left)")
    growth.set_xlim(-0.6, max(len(drift.blocks) - 0.4, 0.6))
    growth.xaxis.get_major_locator().set_params(integer=True)
    write_title(errors, title, pad=20)
    figure.align_ylabels()
    save(figure, path)


def _plot_errors(axes: Any, drift: Drift) -> None:
    clear_frame(axes)
    axes.set_yscale("log")
    axes.set_ylabel("relative error")
    numbers = {id(block): number for number, block in enumerate(drift.blocks)}
    style: dict[str, Any] = {"color": BLUE, "marker": "o", "markersize": 4, "linewidth": 1.6}
    drawn = [
        [(numbers[id(block)], block.error) for block in run if block.error and math.isfinite(block.error)]
        for run in rebuilt_runs(drift)
    ]
    for index, points in enumerate(filter(None, drawn)):
        axes.plot(*zip(*points, strict=True), **style, label=None if index else "activations, as rebuilt", zorder=3)
    gradients = [
        (number, block.gradient.relative_error)
        for number, block in enumerate(drift.blocks)
        if block.gradient is not None and 0 < block.gradient.relative_error < math.inf
    ]
    if gradients:
        axes.plot(*zip(*gradients, strict=True), color=RED, linestyle=(0, (3, 2)), label="gradients of the block")
    values = [value for points in [*drawn, gradients] for _, value in points if value is not None]
    axes.set_ylim(min([_FLOOR, *(value / 3 for value in values)]), max([_CEILING, *(3 * value for value in values)]))
    low, high = axes.get_ylim()
    axes.axhspan(WRONG_ABOVE, high, color=RED, alpha=0.08, linewidth=0)
    axes.axhspan(low, SOUND_BELOW, color=BLUE, alpha=0.06, linewidth=0)
    for height, word, align in ((SOUND_BELOW, "sound below", "top"), (WRONG_ABOVE, "wrong above", "bottom")):
        axes.annotate(
            f"{word} {height:g}",
            (1, height),
            xycoords=("axes fraction", "data"),
            xytext=(-4, -2 if align == "top" else 2),
            textcoords="offset points",
            ha="right",
            va=align,
            fontsize=8,
            color=INK,
        )
    broken = [number for number, block in enumerate(drift.blocks) if not math.isfinite(block.error or 0)]
    if broken:
        axes.plot(broken, [high / 2] * len(broken), "x", color=RED, label="NaN or inf when rebuilt")
    if level_of(drift) in ("exact", "kept"):
        word = "exact: the error is 0 at every block" if level_of(drift) == "exact" else "nothing is rebuilt"
        axes.text(0.5, 0.5, word, transform=axes.transAxes, ha="center", fontsize="large", color=BLUE)
    kept = [number for number, block in enumerate(drift.blocks) if block.error is None]
    if kept and len(kept) < len(drift.blocks):
        axes.plot(kept, [low * 1.6] * len(kept), "^", color=INK, markersize=5, label="kept, not rebuilt")
    for index, place in enumerate(_keyframe_places(drift)):
        axes.axvline(place, color=INK, linewidth=1, linestyle=":", label=None if index else "keyframe")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", frameon=False, fontsize=8, ncols=3, bbox_to_anchor=(1, 1.13), borderaxespad=0)


def _keyframe_places(drift: Drift) -> list[float]:
    """Before a block, or in its midst."""
    numbers = {block.name: number for number, block in enumerate(drift.blocks)}
    places = [keyframe.rpartition(".") for keyframe in drift.keyframes]
    return [numbers[block] - (0.5 if function == "f" else 0) for block, _, function in places if block in numbers]


def _plot_amplification(axes: Any, drift: Drift) -> None:
    clear_frame(axes)
    axes.set_ylabel("amplification")
    numbers = {id(block): number for number, block in enumerate(drift.blocks)}
    points = [(numbers[id(block)], factor) for block, factor in drift.amplifications()]
    axes.axhline(1, color=LIGHT_GRAY, linewidth=1)
    if points:
        axes.bar(*zip(*points, strict=True), color=BLUE, width=0.7, zorder=3)
        assert drift.amplification is not None
        axes.axhline(drift.amplification, color=INK, linewidth=1, linestyle=":", zorder=4)
        average = f"dotted: average, {drift.amplification:.2f}"
        axes.text(1, 0.98, average, transform=axes.transAxes, ha="right", va="top", fontsize=8, color=INK)
        axes.set_ylim(0, 1.3 * max(factor for _, factor in points))


def _mark_parts(axes: Any, drift: Drift) -> None:
    """Where one sequence ends and the next begins."""
    parts = [
        (part, len(list(blocks))) for part, blocks in groupby(drift.blocks, lambda b: b.name.rpartition(".blocks")[0])
    ]
    if len(parts) < 2:
        return
    start = 0
    for part, count in parts:
        if start:
            for each in axes.figure.axes:
                each.axvline(start - 0.5, color=LIGHT_GRAY, linewidth=1)
        if len(parts) <= 8:
            axes.text(
                start + (count - 1) / 2,
                0.97,
                part.removesuffix(".reversible"),
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="top",
                fontsize=8,
                color=INK,
            )
        start += count
