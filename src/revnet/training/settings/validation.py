"""The settings of validation."""

from dataclasses import dataclass
from typing import ClassVar

from revnet.training.settings.fields import SettingsGroup, integer


@dataclass(frozen=True, kw_only=True)
class ValidationSettings(SettingsGroup):
    """Settings of validation."""

    title: ClassVar[str] = "validation"

    val_every: int | None = integer(None, at_least=1)
    """Number of updates from one validation to the next; the run also validates after its last update. By default, it
    validates at the end of each epoch."""

    patience: int | None = integer(None, at_least=1)
    """Number of validations in a row without a better result after which the run ends; by default, it runs to the
    end."""
