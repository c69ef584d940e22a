"""Figures in one style, drawn without a window system."""

from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from revnet.errors import MissingDependencyError

_DOTS_PER_INCH = 150


def check_matplotlib() -> None:
    """Raise if figures cannot be drawn. Call this before a long measurement whose figure would be lost.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import_module("matplotlib")
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of("matplotlib", "a figure") from error


def new_figure(width: float, height: float, *, layout: Literal["constrained"] | None = "constrained") -> Any:
    """Return an empty figure of this size in inches.

    It does not use pyplot, which would choose a window system and keep the figure alive.

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
    """Remove the top and right sides of the frame, and draw a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def write_title(axes: Any, text: str, **options: Any) -> None:
    """Write the title of a panel, aligned to the left. Dollar signs in it are plain text."""
    axes.set_title(text, loc="left", fontsize="medium", fontweight="bold", parse_math=False, **options)


def save(figure: Any, path: Path, **options: Any) -> None:
    """Save the figure as a PNG file, even if the name of the file ends differently."""
    figure.savefig(path, format="png", **options)
