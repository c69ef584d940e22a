"""The settings of a run: a dataclass whose fields carry their rules, written and read as YAML."""

import sys
from abc import ABC
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from revnet.training.atomic_file import atomic_path
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
        with atomic_path(path) as temporary:
            temporary.write_text(yaml.safe_dump(settings, sort_keys=False))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read settings that `save` wrote.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is not a YAML mapping, or has an unknown setting.
        """
        settings = _read(path)
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
    return _read(path).get("task")


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        settings = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"`{path}` is not valid YAML: {_one_line(error)}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"`{path}` must hold one `setting: value` per line.")
    return settings


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
