"""Panels and legends of the figures."""

from typing import Any

from revnet._figure import clear_frame, new_figure


def new_panels(num_panels: int) -> tuple[Any, list[Any]]:
    """Return a figure and its panels, in one row."""
    figure = new_figure(4.9 * num_panels, 4.8)
    panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
    for axes in panels:
        clear_frame(axes)
    return figure, panels


def legend_below(axes: Any, *, num_columns: int = 2) -> None:
    """Draw the legend below the axes, where it hides no data."""
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, -0.15), ncols=num_columns, fontsize=8, frameon=False, borderaxespad=0
    )
