"""The settings of the first weights."""

from dataclasses import dataclass
from typing import ClassVar

from revnet.training.settings.fields import SettingsGroup


@dataclass(frozen=True, kw_only=True)
class StartSettings(SettingsGroup):
    """Settings of the first weights, and which of them are trained."""

    title: ClassVar[str] = "start"

    weights: str | None = None
    """Weights to start from: the folder of a run, whose last weights are loaded, a `.safetensors` or `.ckpt` file, or
    `hub:owner/name`. Parts that belong to other classes or characters start from random weights; a line says which. By
    default, the run starts from random weights."""

    freeze: str | None = None
    """Parameters that are not trained: patterns of their names, separated by commas, such as `stem,stages.0*`. A
    pattern also matches all parameters of a module. Frozen batch norms use their averages. By default, everything is
    trained."""
