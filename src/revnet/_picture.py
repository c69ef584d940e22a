"""What all pictures share: figures without a window system, and one look."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from revnet.errors import MissingDependencyError

_DOTS_PER_INCH = 150


def check_matplotlib() -> None:
    """Raise unless pictures can be drawn: better now than after the measurements.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import_module("matplotlib")
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of("matplotlib", "a figure") from error


def new_figure(width: float, height: float, *, layout: Literal["constrained"] | None = "constrained") -> Any:
    """An empty figure of so many inches.

    It is made without pyplot, which would choose a window system and keep the figure alive.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def clear_frame(axes: Any) -> None:
    """Take away the frame above and to the right, and draw a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def write_title(axes: Any, text: str, **options: Any) -> None:
    """Write the title of a panel, from its left edge; no sign in it makes a formula."""
    axes.set_title(text, loc="left", fontsize="medium", fontweight="bold", parse_math=False, **options)


def save(figure: Any, path: Path, **options: Any) -> None:
    """Write the figure as PNG, whatever the name of the file."""
    figure.savefig(path, format="png", **options)
