"""The settings of the logs."""

from dataclasses import dataclass
from typing import ClassVar

from revnet.training.settings.checks import check_loggers
from revnet.training.settings.fields import SettingsGroup, checked, integer


@dataclass(frozen=True, kw_only=True)
class LogSettings(SettingsGroup):
    """Settings of the logs."""

    title: ClassVar[str] = "logs"

    logger: str = checked("csv", check_loggers)
    """Destinations of the figures, separated by commas: `csv`, which is always written, `tensorboard`, `wandb` and
    `mlflow`."""

    log_every: int = integer(50, at_least=1)
    """Updates from one row of `updates.csv` to the next; loggers receive the same figures."""
