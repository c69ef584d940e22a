"""Figures in one style, drawn without a window system."""

import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from revnet._atomic_file import atomic_path
from revnet._outside_text import printable
from revnet._result_files import PICTURE_METADATA
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


def set_log_scale(axes: Any) -> None:
    """Make the y-axis logarithmic, with labels such as 0.5 instead of powers of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: _minor_label(value, *axes.get_ylim()))


def _minor_label(value: float, low: float, high: float) -> str:
    """Return the label between two powers of ten; on a long axis, only 2 and 5 have one."""
    return f"{value:g}" if high < 10 * low or f"{value:e}"[0] in "25" else ""


def write_title(axes: Any, text: str, **options: Any) -> None:
    """Write the title of a panel, aligned to the left, as plain text; it may have several lines."""
    lines = [plain(line) for line in text.split("\n")]
    axes.set_title("\n".join(lines), loc="left", fontsize="medium", fontweight="bold", **options)


def save(figure: Any, path: Path, **options: Any) -> None:
    """Save the figure as a PNG file, whole or not at all, even if the name of the file ends differently."""
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the glyph is drawn as a box
        figure.savefig(temporary, format="png", metadata=PICTURE_METADATA, **options)


def plain(text: str) -> str:
    """Return a name for a figure: a dollar sign in it starts no formula, and it has no control characters."""
    return printable(text).replace("$", r"\$")


def try_to_draw(draw: Callable[[], object], path: Path) -> bool:
    """Draw a picture whose failure must not stop a run; then warn, and return false.

    Args:
        draw: Function that draws the picture and writes the file.
        path: The file, for the warning.
    """
    try:
        draw()
    except (MissingDependencyError, OSError, MemoryError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        warnings.warn(f"`{path}` was not drawn: {printable(reason)}", stacklevel=3)
        return False
    return True
