"""The settings of the files of a run."""

from dataclasses import dataclass
from typing import ClassVar

from revnet.training.settings.fields import SettingsGroup, checked, integer
from revnet.training.settings.save_interval import check_interval


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings(SettingsGroup):
    """Settings of the files of a run."""

    title: ClassVar[str] = "files"

    out_dir: str | None = None
    """Folder of the run, which must be empty or new; by default, the next free `runs/<data>_<model>_<number>`."""

    save_every: int | str = checked("10min", check_interval)
    """Time or number of updates from one checkpoint to the next, such as `90s`, `10min`, `2h`, or `500` for updates.
    The end of an epoch and a stop by Ctrl-C or SIGTERM save too."""

    keep_checkpoints: int = integer(2, at_least=1)
    """Number of checkpoints that are kept, the newest ones."""

    async_save: bool = False
    """Whether checkpoints are written in the background while training goes on, from a copy of weights and optimizer
    on the CPU; shards of `fsdp2` are always written at once. Experimental on a GPU, where it has not been tested."""
