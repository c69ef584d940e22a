"""The figures and tables of the paper, measured anew.

The names below load PyTorch and Lightning when they are first used, so that the command line can check its flags, or
print its help, without them.

Names that `revnet` itself does not export are provisional: they may change in any release.
"""

from typing import TYPE_CHECKING

from revnet._lazy import attach

if TYPE_CHECKING:
    from revnet.paper.complexity import Complexity as Complexity
    from revnet.paper.complexity import ComplexitySettings as ComplexitySettings
    from revnet.paper.complexity import measure_complexity as measure_complexity
    from revnet.paper.complexity_report import run_complexity as run_complexity
    from revnet.paper.gradient_angle import GradientError as GradientError
    from revnet.paper.gradient_angle import gradient_errors as gradient_errors
    from revnet.paper.gradient_angle_callbacks import GradientAngle as GradientAngle
    from revnet.paper.gradient_angle_report import run_gradient_angle as run_gradient_angle
    from revnet.paper.report import RunFigures as RunFigures
    from revnet.paper.reproduction import reproduce as reproduce
    from revnet.paper.tables import TABLES as TABLES
    from revnet.paper.tables import Table as Table

_HOME = {
    "Complexity": "complexity",
    "ComplexitySettings": "complexity",
    "GradientAngle": "gradient_angle_callbacks",
    "GradientError": "gradient_angle",
    "gradient_errors": "gradient_angle",
    "measure_complexity": "complexity",
    "reproduce": "reproduction",
    "RunFigures": "report",
    "run_complexity": "complexity_report",
    "run_gradient_angle": "gradient_angle_report",
    "TABLES": "tables",
    "Table": "tables",
}

__all__ = sorted(_HOME, key=str.casefold)

__getattr__, __dir__ = attach(__name__, _HOME, purpose="a figure")
