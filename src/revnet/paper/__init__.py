"""Reproductions of the paper's figures and tables.

The names below load PyTorch and Lightning on first use, so that the command line can check its flags and print its help
without them.

Names that `revnet` itself does not export are provisional: they may change in any release.
"""

from typing import TYPE_CHECKING

from revnet._lazy import attach

if TYPE_CHECKING:
    from revnet.paper.complexity.page import run_complexity as run_complexity
    from revnet.paper.gradient_angle.callbacks import GradientAngle as GradientAngle
    from revnet.paper.gradient_angle.gradients import gradient_errors as gradient_errors
    from revnet.paper.gradient_angle.page import run_gradient_angle as run_gradient_angle
    from revnet.paper.reproduction import reproduce as reproduce
    from revnet.paper.tables import TABLES as TABLES

_HOME = {
    "GradientAngle": "gradient_angle.callbacks",
    "gradient_errors": "gradient_angle.gradients",
    "reproduce": "reproduction",
    "run_complexity": "complexity.page",
    "run_gradient_angle": "gradient_angle.page",
    "TABLES": "tables",
}

__all__ = sorted(_HOME, key=str.casefold)

__getattr__, __dir__ = attach(__name__, _HOME, purpose="a figure")
