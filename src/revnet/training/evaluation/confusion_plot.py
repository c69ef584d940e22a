"""The plot of the confusions of a classifier."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revnet._figure import new_figure, plain, save
from revnet._outside_text import shorten
from revnet.training.evaluation.confusion import Confusion

# Largest numbers of classes for which cells show numbers, and rows and columns show names.
_NUMBERS_UP_TO = 20
_NAMES_UP_TO = 120

_LEAST_DARKEST = 20
"""Smallest share of a class, in percent, that has the darkest red. A few mistakes must not look like a failure."""

_LONGEST_NAME = 24
_OTHERS = "(others)"


def plot_confusion(confusion: Confusion, path: Path, title: str) -> None:
    """Plot the right answers on the diagonal, in blue, and the wrong answers off the diagonal, in red.

    Only classes that have images get a row and a column; all other answers share a last column.
    """
    counts, rows, columns = _shown(confusion)
    size = min(12.0, max(4.0, 1.5 + 0.45 * len(rows)))
    figure = new_figure(size, size, layout=None)
    axes = figure.subplots()
    _draw_cells(axes, counts)
    if len(rows) <= _NAMES_UP_TO:
        fontsize = min(10.0, 60 * size / len(rows))
        axes.set_xticks(range(len(columns)), [_shorten(name) for name in columns], rotation=90, fontsize=fontsize)
        axes.set_yticks(range(len(rows)), [_shorten(name) for name in rows], fontsize=fontsize)
    counted = "" if len(rows) <= _NAMES_UP_TO else ", counted from 0"
    axes.set_xlabel(f"answer{counted}")
    axes.set_ylabel(f"class{counted}")
    axes.set_title(plain(title), loc="left")
    save(figure, path, bbox_inches="tight")


def _shown(confusion: Confusion) -> tuple[Tensor, list[str], list[str]]:
    """Return the part of the matrix to draw, and the names of its rows and columns."""
    used = confusion.counts.any(dim=1)
    names = [name for name, is_used in zip(confusion.class_names, used.tolist(), strict=True) if is_used]
    inside, outside = confusion.counts[used][:, used], confusion.counts[used][:, ~used].sum(dim=1, keepdim=True)
    if not outside.any():
        return inside, names, names
    return torch.cat((inside, outside), dim=1), names, [*names, _OTHERS]


def _draw_cells(axes: Any, counts: Tensor) -> None:
    is_right = torch.eye(*counts.shape, dtype=torch.bool)
    shares, wrong = 100 * counts / counts.sum(dim=1, keepdim=True), counts.where(~is_right, 0)
    draw = _draw_squares if len(counts) <= _NAMES_UP_TO else _draw_dots
    right = draw(axes, shares.where(is_right, torch.nan), "Blues", _linear(100))
    _draw_bar(axes, right, 0, "right, % of the class", range(0, 101, 20))
    if len(counts) <= _NUMBERS_UP_TO:
        wrong_shares = shares.where(wrong > 0, torch.nan)
        darkest = max(_LEAST_DARKEST, math.ceil(float(wrong_shares.nan_to_num().max()) / 10) * 10)
        mistakes = draw(axes, wrong_shares, "Reds", _linear(darkest))
        _draw_bar(axes, mistakes, 1, "wrong, % of the class", range(0, darkest + 1, 5 if darkest <= 30 else 20))
        _write_numbers(axes, counts, shares.where(is_right, 100 * shares / darkest))
    else:
        most = max(1, int(wrong.max()))
        mistakes = draw(axes, wrong.where(wrong > 0, torch.nan), "Reds", _log(most))
        _draw_bar(axes, mistakes, 1, "wrong, images", _round_numbers(most))


def _linear(most: int) -> Any:
    from matplotlib.colors import Normalize

    return Normalize(0, most)


def _log(most: int) -> Any:
    from matplotlib.colors import LogNorm

    return LogNorm(0.5, max(2, most))  # starts below 1, so that a single image is visible


def _draw_squares(axes: Any, values: Tensor, colors: str, scale: Any) -> Any:
    return axes.imshow(values.numpy(), cmap=colors, norm=scale, interpolation="nearest")


def _draw_dots(axes: Any, values: Tensor, colors: str, scale: Any) -> Any:
    """Draw dots, since a cell would have about one pixel; the darkest dots are the largest, and on top."""
    num_rows, num_columns = values.shape
    axes.set(xlim=(-0.5, num_columns - 0.5), ylim=(num_rows - 0.5, -0.5), aspect="equal")
    rows, columns = (~values.isnan()).nonzero().unbind(1)
    sorted_values, order = values[rows, columns].sort()
    x, y, color = (tensor.numpy() for tensor in (columns[order], rows[order], sorted_values))
    return axes.scatter(x, y, s=1 + 14 * scale(color) ** 2, c=color, cmap=colors, norm=scale, linewidths=0)


def _draw_bar(axes: Any, cells: Any, number: int, label: str, ticks: Iterable[int]) -> None:
    inch = 1 / axes.figure.get_figwidth() / axes.get_position().width
    bar = axes.inset_axes([1 + (0.2 + 0.9 * number) * inch, 0.1, 0.18 * inch, 0.8])
    axes.figure.colorbar(cells, cax=bar, label=label, ticks=list(ticks), format="%d").minorticks_off()
    bar.set_ylim(bottom=min(ticks))


def _round_numbers(most: int) -> list[int]:
    """Return the numbers 1, 2, 5, 10, 20, 50, ... up to `most`."""
    return [step * 10**power for power in range(len(str(most))) for step in (1, 2, 5) if step * 10**power <= most]


def _write_numbers(axes: Any, counts: Tensor, darkness: Tensor) -> None:
    for row, column in counts.nonzero().tolist():
        color = "white" if darkness[row, column] > 60 else "black"
        text = f"{int(counts[row, column]):,}"
        axes.text(column, row, text, color=color, ha="center", va="center", fontsize="small")


def _shorten(name: str) -> str:
    return plain(shorten(name, _LONGEST_NAME))
