"""Names beside the points of a picture, where they cover nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_SIDES = ((1, 0), (1, 1), (-1, 0), (-1, 1), (0, 1), (0, -1), (1, -1), (-1, -1))
"""Where a label may stand from its point; the best first."""
_DISTANCES = (8, 16, 26)
"""How far from it, in points of a font."""
_HORIZONTAL = {-1: "right", 0: "center", 1: "left"}
_VERTICAL = {-1: "top", 0: "center", 1: "bottom"}


class Label(NamedTuple):
    """A text that belongs to a point, in the units of the axes."""

    text: str
    x: float
    y: float
    style: dict[str, Any]
    marker_size: float = 0.0
    """Of the point's marker, in points of a font: no label covers it."""


def place_labels(axes: Any, labels: Sequence[Label], obstacles: npt.ArrayLike) -> None:
    """Write each label near its point, where it covers no other label, and as few obstacles as can be.

    The limits of the axes must be final.

    Args:
        axes: Where to write.
        labels: The most important first: they have the choice.
        obstacles: Points that shall stay visible, in the units of the axes.

    Shape:
        obstacles: (N, 2).
    """
    axes.figure.draw_without_rendering()  # the layout must be settled before distances can be measured
    points = axes.transData.transform(np.asarray(obstacles, float))
    frame = axes.get_window_extent()
    taken = [_marker_box(axes, label) for label in labels]
    for label in labels:
        text = axes.annotate(
            label.text, (label.x, label.y), (0, 0), textcoords="offset points", parse_math=False, **label.style
        )
        text.set_in_layout(False)  # or the axes would make room for it, and all would move
        costs = {}
        for distance, side in product(_DISTANCES, _SIDES):
            _move(text, distance, side)
            box = text.get_window_extent().padded(4)
            is_outside = not (frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1))
            num_covered = int(((points > box.min) & (points < box.max)).all(axis=1).sum())
            costs[distance, side] = (is_outside + box.count_overlaps(taken), num_covered)
        _move(text, *min(costs, key=lambda place: costs[place]))
        taken.append(text.get_window_extent())


def _marker_box(axes: Any, label: Label) -> Any:
    from matplotlib.transforms import Bbox

    x, y = axes.transData.transform((label.x, label.y))
    radius = label.marker_size / 2 * axes.figure.dpi / 72
    return Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)


def _move(text: Any, distance: int, side: tuple[int, int]) -> None:
    x, y = side
    # In a corner, as far from the point as beside it.
    scale = distance / (x**2 + y**2) ** 0.5
    text.set(position=(scale * x, scale * y), ha=_HORIZONTAL[x], va=_VERTICAL[y])
