"""The settings of a run: a dataclass whose fields carry their rules, written and read as YAML."""

import sys
from abc import ABC
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, Self

from revnet._atomic_file import write_text
from revnet._documents import read_yaml
from revnet._input_files import open_regular
from revnet.training.settings.activations import ActivationSettings
from revnet.training.settings.checkpoints import CheckpointSettings
from revnet.training.settings.combinations import check_combinations
from revnet.training.settings.devices import DeviceSettings
from revnet.training.settings.execution import ExecutionSettings
from revnet.training.settings.fields import list_groups
from revnet.training.settings.logs import LogSettings
from revnet.training.settings.optimization import OptimizationSettings
from revnet.training.settings.start import StartSettings
from revnet.training.settings.updates import UpdateSettings
from revnet.training.settings.validation import ValidationSettings

_END = b"\n..."
"""Mark at the end of a YAML document."""


@dataclass(frozen=True, kw_only=True)
class AbstractRunConfig(
    StartSettings,
    OptimizationSettings,
    UpdateSettings,
    ValidationSettings,
    ActivationSettings,
    DeviceSettings,
    ExecutionSettings,
    CheckpointSettings,
    LogSettings,
    ABC,
):
    """Settings of any training run: the base of three dataclasses.

    A field is checked by its type and by the rule that `integer` or `number` gives it; None passes where the type has
    it.

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: A setting is out of range, or does not go with another.
    """

    command: ClassVar[str]
    """Command that takes these settings; its `--help` lists them."""

    usual_beta2: ClassVar[float] = 0.999
    """Second beta of `adamw` and its relatives, if the settings leave it open."""

    # The fields that all three have, each with its own default.
    data: str | None
    epochs: int
    max_updates: int | None
    batch_size: int
    val_fraction: float
    seed: int

    def __post_init__(self) -> None:
        self.check()
        super().__post_init__()

    def _check_together(self) -> None:
        check_combinations(self)

    def limit_updates(self, updates_per_epoch: int) -> tuple[Self, int]:
        """Return the settings with as many epochs as `max_updates` leaves, and the number of updates of the run."""
        num_updates = min(self.epochs * updates_per_epoch, self.max_updates or sys.maxsize)
        epochs = -(-num_updates // updates_per_epoch)
        return replace(self, epochs=epochs), num_updates

    def save(self, path: Path) -> None:
        """Write the settings as YAML that `--config` reads."""
        import yaml

        values = asdict(self)
        names = [name for group in list_groups(type(self)).values() for name in group]
        settings = {name: list(values[name]) if isinstance(values[name], tuple) else values[name] for name in names}
        write_text(path, yaml.safe_dump(settings, sort_keys=False, explicit_end=True))

    @classmethod
    def load(cls, path: Path, *, whole: bool = False) -> Self:
        """Read settings from a YAML file.

        Args:
            path: The file.
            whole: Whether `save` wrote the file, and every setting must be there; otherwise missing ones have their
                defaults, as in a recipe.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is not a YAML mapping, has an unknown setting, or was cut off.
        """
        if whole:
            check_whole(path)
        settings = read_yaml(path)
        known = {setting.name for setting in fields(cls)}
        unknown = sorted(set(map(str, settings)) - known)
        if unknown:
            raise ValueError(f"`{path}` has the unknown setting `{unknown[0]}`; `{cls.command} --help` lists them all.")
        return cls(**settings)


def read_task(path: Path) -> str | None:
    """Return the `task` that a file of settings names; settings of a classification name none.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not a YAML mapping.
    """
    task = read_yaml(path).get("task")
    if task is not None and not isinstance(task, str):
        raise ValueError(f"`task` (={task}) in `{path}` must be text; restore the file.")
    return task


def check_whole(path: Path) -> None:
    """Raise unless the file of settings ends with the mark that `save` writes at the end.

    A file that was cut off would otherwise continue a run with the defaults of the settings that are missing.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The mark is missing.
    """
    with open_regular(path) as file:
        file.seek(max(0, path.stat().st_size - 2 * len(_END)))
        end = file.read()
    if not end.replace(b"\r\n", b"\n").rstrip().endswith(_END):
        raise ValueError(f"`{path}` was cut off: its last line must be `...`; restore the file, or start a new run.")
