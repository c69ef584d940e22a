"""Reproductions of the paper's figures and tables.

The names below load PyTorch and Lightning on first use, so that the command line can check its flags and print its help
without them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from revnet.errors import MissingDependencyError

if TYPE_CHECKING:
    from revnet.paper.complexity.costs import ComplexitySettings as ComplexitySettings
    from revnet.paper.complexity.costs import measure_complexity as measure_complexity
    from revnet.paper.complexity.page import run_complexity as run_complexity
    from revnet.paper.gradient_angle.callbacks import GradientAngle as GradientAngle
    from revnet.paper.gradient_angle.gradients import GradientError as GradientError
    from revnet.paper.gradient_angle.gradients import gradient_errors as gradient_errors
    from revnet.paper.gradient_angle.page import run_gradient_angle as run_gradient_angle
    from revnet.paper.reproduction import reproduce as reproduce
    from revnet.paper.tables import TABLES as TABLES

_HOME = {
    "ComplexitySettings": "complexity.costs",
    "GradientAngle": "gradient_angle.callbacks",
    "GradientError": "gradient_angle.gradients",
    "gradient_errors": "gradient_angle.gradients",
    "measure_complexity": "complexity.costs",
    "reproduce": "reproduction",
    "run_complexity": "complexity.page",
    "run_gradient_angle": "gradient_angle.page",
    "TABLES": "tables",
}

__all__ = [  # noqa: RUF022 - sorted as a reader would, case-insensitively
    "ComplexitySettings",
    "gradient_errors",
    "GradientAngle",
    "GradientError",
    "measure_complexity",
    "reproduce",
    "run_complexity",
    "run_gradient_angle",
    "TABLES",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'revnet.paper' has no attribute {name!r}")
    try:
        return getattr(import_module(f"revnet.paper.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package in ("None", "revnet"):
            raise
        raise MissingDependencyError.of(package, "a figure") from error


def __dir__() -> list[str]:
    return sorted(__all__)
