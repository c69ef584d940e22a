"""Place labels next to the points of a picture so that they cover nothing.

This is enough for some ten labels, and saves a dependency on a package such as adjustText.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

_SIDES = ((1, 0), (1, 1), (-1, 0), (-1, 1), (0, 1), (0, -1), (1, -1), (-1, -1))
"""Directions from a point to its label, the best first."""
_DISTANCES = (8, 16, 26, 40)
"""Distances from a point to its label, in points (1/72 inch)."""
_HORIZONTAL = {-1: "right", 0: "center", 1: "left"}
_VERTICAL = {-1: "top", 0: "center", 1: "bottom"}


@dataclass(frozen=True, eq=False)
class Label:
    """Text of a point; `x` and `y` are in the units of the axes."""

    text: str
    x: float
    y: float
    style: dict[str, Any]
    marker_size: float = 0.0
    """Diameter of the point's marker, in points (1/72 inch); no label covers it."""


def place_labels(axes: Any, labels: Sequence[Label], obstacles: npt.ArrayLike) -> None:
    """Write each label near its point, where it covers no other label and as few obstacles as possible.

    Set the limits of the axes first.

    Args:
        axes: Axes to write on.
        labels: Labels, the most important first, since earlier ones are placed first.
        obstacles: Points that should stay visible, in the units of the axes.

    Shape:
        obstacles: (N, 2).
    """
    axes.figure.draw_without_rendering()  # settles the layout, so that sizes are final
    points = axes.transData.transform(np.asarray(obstacles, float))
    frame = axes.get_window_extent()
    taken = [_marker_box(axes, label) for label in labels]
    for label in labels:
        text = axes.annotate(
            label.text, (label.x, label.y), (0, 0), textcoords="offset points", parse_math=False, **label.style
        )
        text.set_in_layout(False)  # otherwise the axes would shrink to make room for it
        costs = {}
        for distance, side in product(_DISTANCES, _SIDES):
            _move(text, distance, side)
            box = text.get_window_extent().padded(4)
            is_outside = not (frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1))
            num_covered = int(((points > box.min) & (points < box.max)).all(axis=1).sum())
            costs[distance, side] = (is_outside + box.count_overlaps(taken), num_covered)
        _move(text, *min(costs, key=lambda position: costs[position]))
        taken.append(text.get_window_extent())


def _marker_box(axes: Any, label: Label) -> Any:
    from matplotlib.transforms import Bbox

    x, y = axes.transData.transform((label.x, label.y))
    radius = label.marker_size / 2 * axes.figure.dpi / 72
    return Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)


def _move(text: Any, distance: int, side: tuple[int, int]) -> None:
    x, y = side
    # Diagonals have the same distance as the other directions.
    scale = distance / (x**2 + y**2) ** 0.5
    text.set(position=(scale * x, scale * y), ha=_HORIZONTAL[x], va=_VERTICAL[y])
