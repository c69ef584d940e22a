"""The settings of an update."""

from dataclasses import dataclass
from typing import ClassVar

from revnet.training.settings.fields import SettingsGroup, number


@dataclass(frozen=True, kw_only=True)
class UpdateSettings(SettingsGroup):
    """Settings of an update."""

    title: ClassVar[str] = "updates"

    max_grad_norm: float | None = number(None, "above 0", lambda x: x > 0, usual="1")
    """Norm to which the gradient of an update is clipped; null does not clip."""
