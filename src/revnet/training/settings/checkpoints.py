"""The settings of the files of a run."""

from dataclasses import dataclass
from typing import ClassVar

from revnet.training.settings.fields import SettingsGroup


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings(SettingsGroup):
    """Settings of the files of a run."""

    title: ClassVar[str] = "files"

    out_dir: str | None = None
    """Folder of the run, which must be empty or new; null takes the next free `runs/<data>_<model>_<number>`."""
