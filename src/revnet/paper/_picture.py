"""What all pictures of this room share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from revnet.data._optional import require


def check_matplotlib() -> None:
    """Raise unless pictures can be drawn: better now than after the measurements.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", package="matplotlib", purpose="a figure")


def new_panels(num_panels: int) -> tuple[Any, list[Any]]:
    """A figure with so many panels side by side."""
    # The figure is made without pyplot, which would choose a window system and keep the figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.9 * num_panels, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, panels


def legend_below(axes: Any, *, num_columns: int = 2) -> None:
    """Put the legend where it hides nothing."""
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, -0.15), ncols=num_columns, fontsize=8, frameon=False, borderaxespad=0
    )


def save(figure: Any, path: Path) -> None:
    """Write the figure as PNG."""
    figure.savefig(path, format="png")
